/** The transmission phase with clients that follow the protocol: the calls of the device and the replies. */

import net from 'node:net';
import { join } from 'node:path';
import { inspect } from 'node:util';
import { describe, expect, onTestFinished, test } from 'vitest';
import { DeviceError, MAX_PAYLOAD, type DeviceErrorCode } from '../src/index.js';
import { CMD, CMD_FLAG, NBD_ERRNO, OPT, SIMPLE_REPLY_SIZE } from '../src/protocol/wire.js';
import { duplexPair } from './duplex-pair.js';
import { infoQuery, optionBytes, RawClient, requestBytes, uint32 } from './raw-client.js';
import { Gate, TestExport, type DeviceCall } from './test-device.js';
import { startServer, temporaryDirectory, until, type TestServer } from './test-server.js';

const KIB = 1024;
const MIB = 1024 * KIB;

/** A late failure of a device, of any kind. */
async function failLater(failure: unknown): Promise<never> {
  await Promise.resolve();
  throw failure;
}

/** The initial content of the disk of a TestExport. */
function pattern(offset: number, length: number): Buffer {
  const bytes = Buffer.alloc(length);
  for (let at = 0; at < length; at += 4) bytes.writeUInt32BE(offset + at + 1, at);
  return bytes;
}

/** Sequential reads of 4 KiB, wrapping around the disk of 1 MiB; the cookie is the number of the read. */
function manyReads(count: number): Buffer {
  return Buffer.concat(
    Array.from({ length: count }, (_, i) =>
      requestBytes({ type: CMD.READ, offset: (i % 256) * 4096, length: 4096, cookie: BigInt(i) }),
    ),
  );
}

async function expectManyReads(client: RawClient, count: number): Promise<void> {
  for (let i = 0; i < count; i++) {
    const { errno, cookie, data } = await client.readReply(4096);
    if (errno !== 0 || cookie !== BigInt(i) || !data.equals(pattern((i % 256) * 4096, 4096))) {
      throw new Error(`read ${i} was answered with cookie ${cookie}, errno ${errno}, or the wrong data`);
    }
  }
}

/** Random whole numbers from 0 to below the argument; the same for the same seed. */
function randomNumbers(seed: number): (below: number) => number {
  let state = seed;
  return (below) => {
    state = (Math.imul(state, 1103515245) + 12345) >>> 0;
    return Math.floor((state / 2 ** 32) * below);
  };
}

/** A client in the transmission phase over a pair of streams, with access to the server's end. */
async function openedPair(server: TestServer) {
  const pair = duplexPair();
  server.server.serveConnection(pair.server);
  const client = new RawClient(pair.client);
  await client.open('disk');
  return { client, end: pair.server };
}

/**
 * Resolves when every connection of the server has had its turn of the event loop since the call: then no request is left that
 * a connection may still begin by itself. Calls no device.
 */
async function everyConnectionHadItsTurn(server: TestServer): Promise<void> {
  const other = await server.raw();
  await other.greet();
  for (let i = 0; i < 3; i++) await other.option(OPT.LIST);
  other.vanish();
}

/** A client in the transmission phase over a unix socket whose server end the test can look at. */
async function openedSocket(server: TestServer) {
  const path = join(await temporaryDirectory(), 'own.sock');
  let end: net.Socket | undefined;
  const listener = net.createServer({ allowHalfOpen: true }, (socket) => {
    end = socket;
    server.server.serveConnection(socket);
  });
  onTestFinished(() => void listener.close());
  await new Promise<void>((resolve) => listener.listen(path, resolve));
  const client = await RawClient.connect({ path });
  await client.open('disk');
  if (end === undefined) throw new Error('a client was served without a socket');
  return { client, end };
}

describe('order', () => {
  test('a slow read does not delay a later one', async () => {
    const { opened, provider } = await startServer();
    const gate = new Gate();
    provider.hook = ({ offset }) => (offset === 0 ? gate.opened : undefined);
    const client = await opened();
    client.request({ type: CMD.READ, offset: 0, length: 8, cookie: 1n });
    client.request({ type: CMD.READ, offset: 64, length: 8, cookie: 2n });
    expect(await client.readReply(8)).toEqual({ errno: 0, cookie: 2n, data: pattern(64, 8) });
    gate.open();
    expect(await client.readReply(8)).toEqual({ errno: 0, cookie: 1n, data: pattern(0, 8) });
  });

  for (const length of [512, 4 * KIB, 300 * KIB]) {
    test(`reads of ${length} bytes that finish in reverse order are answered in that order, each with its own data`, async () => {
      const { opened, provider } = await startServer();
      const gates = new Map<number, Gate>();
      provider.hook = ({ offset }) => {
        const gate = new Gate();
        gates.set(offset, gate);
        return gate.opened;
      };
      const client = await opened();
      const offsets = Array.from({ length: 40 }, (_, i) => i * 1024);
      client.send(...offsets.map((offset) => requestBytes({ type: CMD.READ, offset, length, cookie: BigInt(offset) })));
      await until(() => gates.size === offsets.length, 'the device has all reads');
      for (const offset of offsets.toReversed()) {
        gates.get(offset)?.open();
        const reply = await client.readReply(length);
        expect({ cookie: reply.cookie, same: reply.data.equals(pattern(offset, length)) }).toEqual({
          ...{ cookie: BigInt(offset), same: true },
        });
      }
    });
  }

  test('reads, writes and errors of every size, at once or later, in any order, have the right replies', async () => {
    const { opened, provider, allOver } = await startServer({ exports: [new TestExport('disk', { size: 4 * MIB })] });
    const random = randomNumbers(12345);
    const expectedDisk = pattern(0, 4 * MIB);
    const late: Gate[] = [];
    const fates = new Map<number, { readonly isLate: boolean; readonly isBad: boolean }>();
    provider.hook = ({ offset }) => {
      const fate = fates.get(offset);
      const bad = new DeviceError('EIO', 'a bad block');
      if (fate?.isLate) {
        const gate = new Gate();
        late.push(gate);
        return gate.opened.then(() => (fate.isBad ? Promise.reject(bad) : undefined));
      }
      if (fate?.isBad) throw bad;
    };
    const client = await opened();
    const sizes = [1, 16, 511, 4096, 20_000, 128 * KIB, 128 * KIB + 1, 200_000];
    for (let round = 0; round < 30; round++) {
      fates.clear();
      const requests: Buffer[] = [];
      const expected = new Map<bigint, { readonly errno: number; readonly data: Buffer }>();
      // The requests of a round do not overlap: their order does not matter.
      for (let slot = 0; slot < 16; slot++) {
        const offset = slot * 256 * KIB + random(50_000);
        const length = sizes[random(sizes.length)] ?? 1;
        const cookie = BigInt(round * 100 + slot);
        const fate = { isLate: random(2) === 0, isBad: random(4) === 0 };
        const errno = fate.isBad ? NBD_ERRNO.EIO : 0;
        fates.set(offset, fate);
        if (random(2) === 0) {
          const data = fate.isBad ? Buffer.alloc(0) : Buffer.from(expectedDisk.subarray(offset, offset + length));
          expected.set(cookie, { errno, data });
          requests.push(requestBytes({ type: CMD.READ, offset, length, cookie }));
        } else {
          const data = Buffer.alloc(length, random(256));
          expected.set(cookie, { errno, data: Buffer.alloc(0) });
          requests.push(requestBytes({ type: CMD.WRITE, offset, length, cookie }), data);
          if (!fate.isBad) data.copy(expectedDisk, offset);
        }
      }
      const callsBefore = provider.calls.length;
      client.send(...requests);
      await until(() => provider.calls.length === callsBefore + 16, 'the device has the requests of the round');
      while (late.length > 0) late.splice(random(late.length), 1)[0]?.open();
      while (expected.size > 0) {
        const { errno, cookie, data } = await client.readReply((answered) => expected.get(answered)?.data.length ?? 0);
        const wanted = expected.get(cookie);
        expect({ cookie, errno, same: data.equals(wanted?.data ?? data) }).toEqual({
          ...{ cookie, errno: wanted?.errno, same: true },
        });
        expected.delete(cookie);
      }
    }
    expect(provider.exports.get('disk')?.disk.equals(expectedDisk)).toBe(true);
    client.vanish();
    await allOver();
  });

  test('a disconnect is followed by the replies to requests in flight, then by the end of the connection', async () => {
    const { opened, provider, allOver, closes } = await startServer();
    const gate = new Gate();
    provider.hook = () => gate.opened;
    const client = await opened();
    client.send(
      requestBytes({ type: CMD.READ, offset: 4, length: 4, cookie: 1n }),
      requestBytes({ type: CMD.FLUSH, cookie: 2n }),
      requestBytes({ type: CMD.DISC, cookie: 3n }),
      requestBytes({ type: CMD.READ, offset: 8, length: 4, cookie: 4n }),
    );
    await until(() => provider.unfinished === 2, 'two requests are in flight');
    gate.open();
    expect(await client.readReply(4)).toEqual({ errno: 0, cookie: 1n, data: uint32(5) });
    expect(await client.readReply()).toMatchObject({ errno: 0, cookie: 2n });
    expect(await client.readToEnd()).toHaveLength(0);
    await allOver();
    expect(provider.calls).toHaveLength(2);
    expect(closes[0]?.reason).toBe('the client disconnected');
  });

  test('a client that closes its side after its requests gets all replies', async () => {
    const { opened, provider, allOver } = await startServer();
    const gate = new Gate();
    provider.hook = ({ offset }) => (offset === 0 ? gate.opened : undefined);
    const client = await opened();
    client.send(manyReads(200));
    client.halfClose();
    await until(() => provider.calls.length === 200, 'the device has all reads');
    gate.open();
    const cookies = new Set<bigint>();
    for (let i = 0; i < 200; i++) cookies.add((await client.readReply(4096)).cookie);
    expect(cookies.size).toBe(200);
    expect(await client.readToEnd()).toHaveLength(0);
    await allOver();
  });
});

describe('arrival', () => {
  const requests = Buffer.concat([
    requestBytes({ type: CMD.WRITE, offset: 100, length: 10, cookie: 1n }),
    Buffer.from('0123456789'),
    requestBytes({ type: CMD.READ, offset: 99, length: 12, cookie: 2n }),
    requestBytes({ type: CMD.WRITE, offset: 2n ** 63n, length: 5, cookie: 3n }),
    Buffer.from('abcde'),
    requestBytes({ type: CMD.READ, offset: 4096, length: 4, cookie: 4n }),
  ]);

  async function expectAnswers(client: RawClient): Promise<void> {
    expect(await client.readReply()).toMatchObject({ errno: 0, cookie: 1n });
    const { errno, cookie, data } = await client.readReply(12);
    expect({ errno, cookie, text: data.toString('latin1', 1, 11) }).toEqual({
      errno: 0,
      cookie: 2n,
      text: '0123456789',
    });
    expect(await client.readReply()).toMatchObject({ errno: NBD_ERRNO.ENOSPC, cookie: 3n });
    expect(await client.readReply(4)).toEqual({ errno: 0, cookie: 4n, data: uint32(4097) });
  }

  test('requests and payloads split in two at any byte are understood', async () => {
    const server = await startServer();
    const { client } = await openedPair(server);
    for (let at = 1; at < requests.length; at++) {
      client.send(requests.subarray(0, at));
      client.send(requests.subarray(at));
      await expectAnswers(client);
    }
  });

  test('requests and payloads arriving byte by byte are understood', async () => {
    const { client } = await openedPair(await startServer());
    for (const byte of requests) client.send(Buffer.of(byte));
    await expectAnswers(client);
  });

  test('the first request is understood wherever it is split from the end of the handshake', async () => {
    const server = await startServer();
    const handshake = Buffer.concat([uint32(3), optionBytes(OPT.GO, infoQuery('disk'))]);
    const all = Buffer.concat([handshake, requests]);
    for (let at = handshake.length - 2; at <= handshake.length + 30; at++) {
      const pair = duplexPair();
      server.server.serveConnection(pair.server);
      const client = new RawClient(pair.client);
      await client.read(18);
      client.send(all.subarray(0, at));
      client.send(all.subarray(at));
      await client.readOptionReply();
      await client.readOptionReply();
      await expectAnswers(client);
    }
  });

  test('a large payload in pieces of odd sizes is written as it was sent', async () => {
    const { client } = await openedPair(await startServer());
    const payload = pattern(77_000, 300 * KIB);
    client.send(requestBytes({ type: CMD.WRITE, offset: 1000, length: payload.length, cookie: 1n }));
    for (let at = 0, size = 1; at < payload.length; at += size, size = (size * 3) % 7919) {
      client.send(payload.subarray(at, at + size));
    }
    expect(await client.readReply()).toMatchObject({ errno: 0, cookie: 1n });
    client.request({ type: CMD.READ, offset: 1000, length: payload.length, cookie: 2n });
    expect((await client.readReply(payload.length)).data.equals(payload)).toBe(true);
  });

  test('cookies are returned as sent, all 64 bits', async () => {
    const client = await (await startServer()).opened();
    const cookies = [0n, 1n, 2n ** 31n, 2n ** 32n, 2n ** 53n + 1n, 2n ** 63n, 2n ** 64n - 1n, 0x0123456789abcdefn];
    for (const cookie of cookies) {
      client.request({ type: CMD.READ, length: 4, cookie });
      expect((await client.readReply(4)).cookie).toBe(cookie);
      client.request({ type: CMD.FLUSH, cookie });
      expect((await client.readReply()).cookie).toBe(cookie);
      client.request({ type: 0xffff, cookie });
      expect((await client.readReply()).cookie).toBe(cookie);
    }
  });

  test('two requests in flight may have the same cookie', async () => {
    const client = await (await startServer()).opened();
    client.send(
      requestBytes({ type: CMD.READ, offset: 4, length: 4, cookie: 9n }),
      requestBytes({ type: CMD.READ, offset: 8, length: 4, cookie: 9n }),
    );
    expect(await client.readReply(4)).toEqual({ errno: 0, cookie: 9n, data: uint32(5) });
    expect(await client.readReply(4)).toEqual({ errno: 0, cookie: 9n, data: uint32(9) });
  });
});

/** A turn of the loop is limited in time: on a busy machine some turns end within a batch, but not all. */
const BATCHES = 10;

async function leaveInOneWrite(end: { readonly writes: number }, batch: () => Promise<void>): Promise<void> {
  const counts: number[] = [];
  while (counts.length < BATCHES && !counts.includes(1)) {
    const before = end.writes;
    await batch();
    counts.push(end.writes - before);
  }
  expect(counts).toContain(1);
}

describe('coalescing', () => {
  test('32 pipelined reads of 4 KiB arrive complete and correct over a unix socket', async () => {
    const client = await (await startServer()).opened();
    client.send(manyReads(32));
    await expectManyReads(client, 32);
  });

  test('32 reads that arrive together and are answered synchronously are sent in one write', async () => {
    const { client, end } = await openedPair(await startServer());
    await leaveInOneWrite(end, async () => {
      client.send(manyReads(32));
      await expectManyReads(client, 32);
    });
  });

  test('32 reads that finish together later are sent in one write', async () => {
    const server = await startServer();
    let gate = new Gate();
    server.provider.hook = () => gate.opened;
    const { client, end } = await openedPair(server);
    await leaveInOneWrite(end, async () => {
      gate = new Gate();
      client.send(manyReads(32));
      await until(() => server.provider.unfinished === 32, 'the device has all reads');
      gate.open();
      await expectManyReads(client, 32);
    });
  });

  test('writes, flushes and refusals that arrive together are answered in one write', async () => {
    const { client, end } = await openedPair(await startServer());
    await leaveInOneWrite(end, async () => {
      client.send(
        requestBytes({ type: CMD.WRITE, length: 4, cookie: 1n }),
        uint32(7),
        requestBytes({ type: CMD.FLUSH, cookie: 2n }),
        requestBytes({ type: 0xffff, cookie: 3n }),
        requestBytes({ type: CMD.TRIM, length: 4, cookie: 4n }),
      );
      for (const cookie of [1n, 2n, 3n, 4n]) expect((await client.readReply()).cookie).toBe(cookie);
    });
  });
});

describe('back-pressure', () => {
  const READS = 4000;

  test('while a client reads no replies, the device gets no more requests than replies may wait', async () => {
    const limits = { maxUnsentBytes: 256 * KIB };
    const server = await startServer({ limits });
    const { client, end } = await openedPair(server);
    client.socket.pause();
    client.send(manyReads(READS));
    const held = (): number => server.provider.calls.length * (4096 + SIMPLE_REPLY_SIZE);
    await until(() => held() >= limits.maxUnsentBytes, 'as many replies wait as may');
    await everyConnectionHadItsTurn(server);
    expect(end.isPaused()).toBe(true);
    expect(held()).toBeLessThan(limits.maxUnsentBytes + 2 * (4096 + SIMPLE_REPLY_SIZE));
    client.socket.resume();
    await expectManyReads(client, READS);
  });

  test('over a unix socket a client that reads no replies is throttled, and served when it reads again', async () => {
    const limits = { maxUnsentBytes: 256 * KIB };
    const server = await startServer({ limits });
    const { client, end } = await openedSocket(server);
    client.socket.pause();
    client.send(manyReads(READS));
    await until(() => end.writableLength >= limits.maxUnsentBytes, 'as many replies wait as may');
    await everyConnectionHadItsTurn(server);
    expect(end.writableLength).toBeLessThan(limits.maxUnsentBytes + 2 * (4096 + SIMPLE_REPLY_SIZE));
    // The buffers of the kernel and of the client's stream are far smaller than the 16 MiB requested.
    expect(server.provider.calls.length).toBeLessThan((limits.maxUnsentBytes + 4 * MIB) / 4096);
    client.socket.resume();
    await expectManyReads(client, READS);
  });

  test('a client that sends all its requests before it reads gets all replies', async () => {
    const server = await startServer({ limits: { maxUnsentBytes: 64 * KIB } });
    const { client } = await openedSocket(server);
    client.socket.pause();
    client.send(manyReads(READS));
    client.halfClose();
    await until(() => server.provider.calls.length > 16, 'some reads are made');
    client.socket.resume();
    await expectManyReads(client, READS);
    expect(await client.readToEnd()).toHaveLength(0);
    await server.allOver();
  });

  test('requests sent together with the handshake and a half-close are all answered', async () => {
    const server = await startServer({ limits: { maxUnsentBytes: 64 * KIB } });
    const client = await server.raw();
    client.socket.pause();
    const gate = new Gate();
    server.provider.openHook = () => gate.opened;
    client.send(uint32(3), optionBytes(OPT.GO, infoQuery('disk')), manyReads(200));
    client.halfClose();
    await until(() => client.socket.writableFinished, 'all is sent');
    gate.open();
    await until(() => server.provider.calls.length > 0, 'reads are made');
    client.socket.resume();
    await client.read(18);
    await client.readOptionReply();
    await client.readOptionReply();
    await expectManyReads(client, 200);
    expect(await client.readToEnd()).toHaveLength(0);
  });

  for (const { what, limits, inFlight } of [
    { what: 'requests', limits: { maxInFlightRequests: 8 }, inFlight: 8 },
    { what: 'bytes', limits: { maxInFlightBytes: 10 * 4096 }, inFlight: 10 },
  ]) {
    test(`a slow device gets no more ${what} at a time than the limit in flight, and all of them in the end`, async () => {
      const server = await startServer({ limits });
      const gates: Gate[] = [];
      let most = 0;
      server.provider.hook = () => {
        const gate = new Gate();
        gates.push(gate);
        most = Math.max(most, server.provider.unfinished + 1);
        return gate.opened;
      };
      const { client, end } = await openedPair(server);
      client.send(manyReads(100));
      await until(() => server.provider.unfinished >= inFlight, 'the device has as many as it may have');
      await everyConnectionHadItsTurn(server);
      expect(end.isPaused()).toBe(true);
      expect(server.provider.unfinished).toBe(inFlight);
      for (let i = 0; i < 100; i++) {
        await until(() => gates.length > 0, 'the device is asked');
        gates.shift()?.open();
      }
      await expectManyReads(client, 100);
      expect(most).toBe(inFlight);
    });
  }

  test('a single request larger than the limit of bytes in flight is carried out', async () => {
    const server = await startServer({ limits: { maxInFlightBytes: 1000, maxUnsentBytes: 1000 } });
    server.provider.hook = () => Promise.resolve();
    const client = await server.opened();
    client.request({ type: CMD.READ, length: MIB, cookie: 1n });
    expect((await client.readReply(MIB)).data.equals(pattern(0, MIB))).toBe(true);
  });
});

describe('calls of the device', () => {
  async function callsFor(type: number, flags: number): Promise<DeviceCall[]> {
    const { opened, provider } = await startServer();
    const client = await opened();
    const isFlush = type === CMD.FLUSH;
    const range = { offset: isFlush ? 0 : 4096, length: isFlush ? 0 : 512 };
    client.request({ type, flags, ...range, cookie: 1n }, Buffer.alloc(type === CMD.WRITE ? 512 : 0));
    expect(await client.readReply(type === CMD.READ ? 512 : 0)).toMatchObject({ errno: 0, cookie: 1n });
    return provider.calls;
  }

  const range = { offset: 4096, length: 512 };
  for (const fua of [false, true]) {
    const flags = fua ? CMD_FLAG.FUA : 0;
    const how = fua ? 'with FUA' : 'without FUA';
    test(`a write ${how} reaches the device as a write ${how}`, async () => {
      expect(await callsFor(CMD.WRITE, flags)).toEqual([{ method: 'write', ...range, fua }]);
    });
    test(`a trim ${how} reaches the device as a trim ${how}`, async () => {
      expect(await callsFor(CMD.TRIM, flags)).toEqual([{ method: 'trim', ...range, fua }]);
    });
    for (const noHole of [false, true]) {
      for (const fastZero of [false, true]) {
        const mode = { noHole, fua, fastZero };
        test(`a zero with ${JSON.stringify(mode)} reaches the device with these options`, async () => {
          const modeFlags = flags | (noHole ? CMD_FLAG.NO_HOLE : 0) | (fastZero ? CMD_FLAG.FAST_ZERO : 0);
          expect(await callsFor(CMD.WRITE_ZEROES, modeFlags)).toEqual([{ method: 'zero', ...range, mode }]);
        });
      }
    }
    test(`reads, flushes and caches are allowed ${how}`, async () => {
      expect(await callsFor(CMD.READ, flags)).toEqual([{ method: 'read', ...range }]);
      expect(await callsFor(CMD.FLUSH, flags)).toEqual([{ method: 'flush', offset: 0, length: 0 }]);
      expect(await callsFor(CMD.CACHE, flags)).toEqual([{ method: 'cache', ...range }]);
    });
  }

  test('requests of length 0 succeed, also at the end of the export, without a call of the device', async () => {
    const { opened, provider } = await startServer();
    const client = await opened();
    for (const type of [CMD.READ, CMD.WRITE, CMD.TRIM, CMD.WRITE_ZEROES, CMD.CACHE]) {
      for (const offset of [0, 17, MIB]) {
        client.request({ type, offset, length: 0, cookie: 5n });
        expect(await client.readReply()).toMatchObject({ errno: 0, cookie: 5n });
      }
    }
    expect(provider.calls).toEqual([]);
  });

  test('trims and zeros may be far longer than a payload', async () => {
    const { opened, provider } = await startServer({ exports: [new TestExport('disk', { size: 80 * MIB })] });
    const client = await opened();
    for (const type of [CMD.TRIM, CMD.WRITE_ZEROES, CMD.CACHE]) {
      client.request({ type, offset: 0, length: 80 * MIB, cookie: 1n });
      expect((await client.readReply()).errno).toBe(0);
    }
    expect(provider.calls.map(({ length }) => length)).toEqual([80 * MIB, 80 * MIB, 80 * MIB]);
  });

  for (const how of ['at once', 'later'] as const) {
    test(`32 MiB are written and read back from a device that answers ${how}`, async () => {
      const { opened, provider } = await startServer({ exports: [new TestExport('disk', { size: 64 * MIB })] });
      if (how === 'later') provider.hook = () => Promise.resolve();
      const client = await opened();
      const data = pattern(123_456, MAX_PAYLOAD);
      client.request({ type: CMD.WRITE, offset: 20 * MIB, length: MAX_PAYLOAD, cookie: 1n }, data);
      expect((await client.readReply()).errno).toBe(0);
      client.request({ type: CMD.READ, offset: 20 * MIB, length: MAX_PAYLOAD, cookie: 2n });
      client.request({ type: CMD.READ, offset: 20 * MIB - 4, length: 4, cookie: 3n });
      expect((await client.readReply(MAX_PAYLOAD)).data.equals(data)).toBe(true);
      expect((await client.readReply(4)).data).toEqual(uint32(20 * MIB - 3));
    });
  }
});

describe('failures of the device', () => {
  const COMMANDS = [CMD.READ, CMD.WRITE, CMD.FLUSH, CMD.TRIM, CMD.CACHE, CMD.WRITE_ZEROES];
  const length = (type: number): number => (type === CMD.FLUSH ? 0 : 512);

  /** The errors of all commands if the device fails with `failure`, at once and later. */
  async function errorsFor(server: TestServer, failure: unknown, flags = 0): Promise<number[]> {
    const client = await server.opened();
    const errors: number[] = [];
    for (const isLate of [false, true]) {
      server.provider.hook = () => {
        if (isLate) return failLater(failure);
        throw failure;
      };
      for (const type of COMMANDS) {
        const payload = Buffer.alloc(type === CMD.WRITE ? 512 : 0);
        client.request({ type, flags, length: length(type), cookie: BigInt(type) }, payload);
        const { errno, cookie } = await client.readReply();
        expect(cookie).toBe(BigInt(type));
        errors.push(errno);
      }
    }
    return errors;
  }

  for (const code of Object.keys(NBD_ERRNO) as DeviceErrorCode[]) {
    if (code === 'ENOTSUP') continue;
    test(`a DeviceError ${code} of any command is answered with ${NBD_ERRNO[code]} and not reported`, async () => {
      const server = await startServer();
      const errors = await errorsFor(server, new DeviceError(code, 'as told'));
      expect(errors).toEqual(errors.map(() => NBD_ERRNO[code]));
      expect(server.deviceErrors).toEqual([]);
    });
  }

  test('ENOTSUP is answered only to a zero with FAST_ZERO; elsewhere it is EINVAL', async () => {
    const server = await startServer();
    const failure = new DeviceError('ENOTSUP', 'slow');
    expect(new Set(await errorsFor(server, failure))).toEqual(new Set([NBD_ERRNO.EINVAL]));
    const client = await server.opened();
    client.request({ type: CMD.WRITE_ZEROES, flags: CMD_FLAG.FAST_ZERO, length: 512 });
    expect((await client.readReply()).errno).toBe(NBD_ERRNO.ENOTSUP);
  });

  for (const failure of [new TypeError('a bug'), 'a string', undefined, { code: 'ENOSPC' }]) {
    test(`${inspect(failure)} thrown by a device is answered EIO and reported`, async () => {
      const server = await startServer();
      const errors = await errorsFor(server, failure);
      expect(errors).toEqual(errors.map(() => NBD_ERRNO.EIO));
      expect(server.deviceErrors).toEqual(errors.map(() => ({ error: failure, exportName: 'disk' })));
    });
  }

  test('a failed read between two good ones does not change their data', async () => {
    for (const isLate of [false, true]) {
      const { opened, provider } = await startServer();
      provider.hook = ({ offset }) => {
        const failure = new DeviceError('EIO', 'a bad block');
        if (offset === 4096 && isLate) return Promise.reject(failure);
        if (offset === 4096) throw failure;
      };
      const client = await opened();
      client.send(manyReads(3));
      const replies = [];
      for (let i = 0; i < 3; i++) replies.push(await client.readReply(4096));
      replies.sort((a, b) => Number(a.cookie - b.cookie));
      expect(replies.map(({ errno }) => errno)).toEqual([0, NBD_ERRNO.EIO, 0]);
      expect(replies[0]?.data.equals(pattern(0, 4096))).toBe(true);
      expect(replies[2]?.data.equals(pattern(8192, 4096))).toBe(true);
    }
  });

  test('a program that closes the server when a read fails sends the error and no other memory', async () => {
    const { provider, raw, server, deviceErrors } = await startServer();
    const client = await raw();
    await client.open('disk');
    provider.hook = ({ offset }) => {
      if (offset !== 4096) return;
      void server.close();
      throw new TypeError('a bug');
    };
    client.send(manyReads(2));
    expect(await client.readReply(4096)).toMatchObject({ errno: 0, cookie: 0n });
    expect(await client.readReply(4096)).toMatchObject({ errno: NBD_ERRNO.EIO, cookie: 1n });
    expect(await client.readToEnd()).toHaveLength(0);
    expect(deviceErrors).toHaveLength(1);
  });
});
