/** A connection in the transmission phase is handed over to another server, in this process or in another, and continues. */

import { fork } from 'node:child_process';
import type net from 'node:net';
import { fileURLToPath } from 'node:url';
import { describe, expect, onTestFinished, test } from 'vitest';
import { MIN_MEMORY_BYTES, NbdServer, type NegotiatedState } from '../src/index.js';
import { CMD, REPLY_TYPE } from '../src/protocol/wire.js';
import { duplicateSocket } from './duplicate.js';
import { duplexPair } from './duplex-pair.js';
import { Random } from './fuzz/random.js';
import { extendedRequestBytes, RawClient, requestBytes } from './raw-client.js';
import { DISK_SIZE, Gate, TestExport, TestProvider, type DeviceCall } from './test-device.js';
import { startServer, until, type TestServer } from './test-server.js';

const MIB = 1024 * 1024;

interface NextServer {
  readonly server: NbdServer;
  readonly provider: TestProvider;
  readonly closes: string[];
}

/** A server without a listener; its default export is that of `startServer`. */
function nextServer(exported = new TestExport('disk')): NextServer {
  const provider = new TestProvider([exported]);
  const closes: string[] = [];
  const server = new NbdServer({ provider, observer: { onConnectionClose: ({ reason }) => closes.push(reason) } });
  onTestFinished(() => server.destroy());
  return { server, provider, closes };
}

const onlyId = (server: NbdServer): number => [...server.connections.keys()][0] ?? NaN;

/** Bytes of payloads and replies that the only connection holds. */
const movedBytes = (server: NbdServer): number =>
  (server.connections.get(onlyId(server)) as unknown as { movedBytes: number }).movedBytes;

/** Hands the only connection of `from` over to `to`, by a duplicated descriptor. */
async function handOver(from: NbdServer, to: NbdServer): Promise<NegotiatedState> {
  const taken = await from.handOver(onlyId(from), (socket, state) => ({ socket: duplicateSocket(socket), state }));
  expect(to.continueConnection(taken.socket, structuredClone(taken.state))).toBeTypeOf('number');
  return taken.state;
}

const callsOf = (provider: TestProvider, method: DeviceCall['method']): number[] =>
  provider.calls.filter((call) => call.method === method).map(({ offset }) => offset);

describe('a hand-over in one process', () => {
  test('answers requests in flight, and leaves requests that were received but not begun to the next server', async () => {
    const { opened, server, provider, allOver } = await startServer({ limits: { maxInFlightRequests: 1 } });
    const next = nextServer();
    const client = await opened();
    const gate = new Gate();
    provider.hook = () => gate.opened;
    const data = Buffer.alloc(512, 7);
    for (let n = 0; n < 10; n++) {
      client.request({ type: CMD.WRITE, cookie: BigInt(n), offset: n * 512, length: 512 }, data);
    }
    client.request({ type: CMD.READ, cookie: 10n, length: 5120 });
    // The header of one more write; its payload is sent later.
    const last = requestBytes({ type: CMD.FLUSH, cookie: 11n });
    client.send(last.subarray(0, 9));
    await until(() => provider.calls.length === 1, 'the first has begun');
    const given = handOver(server, next.server);
    gate.open();
    const state = await given;
    expect(state.unread.length).toBe(9 * (28 + 512) + 28 + 9);
    client.send(last.subarray(9));
    for (let n = 0; n < 12; n++) {
      const reply = await client.readReply((cookie) => (cookie === 10n ? 5120 : 0));
      expect(reply).toMatchObject({ errno: 0, cookie: BigInt(n) });
      if (reply.cookie === 10n) expect(reply.data.subarray(512).equals(Buffer.alloc(4608, 7))).toBe(true);
    }
    expect(callsOf(provider, 'write')).toEqual([0]);
    expect(callsOf(next.provider, 'write')).toEqual([512, 1024, 1536, 2048, 2560, 3072, 3584, 4096, 4608]);
    expect(server.connections.size).toBe(0);
    expect(provider.endings).toEqual(['lost']);
    await allOver();
    client.request({ type: CMD.DISC });
    await until(() => next.closes.length === 1, 'it is over');
    expect(next.closes).toEqual(['the client disconnected']);
    expect(next.provider.breaches).toEqual([]);
  });

  test.each(['simple', 'extended'] as const)(
    'lets the next server carry out a half-received write, once (%s replies)',
    async (level) => {
      const { raw, server, provider } = await startServer();
      const next = nextServer();
      const client = await raw();
      if (level === 'simple') await client.open('disk');
      else await client.openWith('extended');
      const data = Buffer.from(Array.from({ length: DISK_SIZE / 2 }, (_, i) => (i * 7 + (i >> 8)) & 0xff));
      const fields = { type: CMD.WRITE, cookie: 5n, offset: 4096, length: data.length };
      client.send(level === 'simple' ? requestBytes(fields) : extendedRequestBytes(fields), data.subarray(0, 300_000));
      await until(() => movedBytes(server) >= 300_000, 'half of it is here');
      const no = new Error('no');
      const refuse = (): never => {
        throw no;
      };
      // The hand-over is given up in the middle of the write: the rest belongs to this server.
      await expect(server.handOver(onlyId(server), refuse)).rejects.toBe(no);
      client.send(data.subarray(300_000, 400_000));
      await until(() => movedBytes(server) >= 400_000, 'more of it is here');
      await handOver(server, next.server);
      client.send(data.subarray(400_000));
      if (level === 'simple') expect(await client.readReply()).toMatchObject({ errno: 0, cookie: 5n });
      else expect(await client.readChunk()).toMatchObject({ type: REPLY_TYPE.NONE, cookie: 5n, isDone: true });
      expect(callsOf(provider, 'write')).toEqual([]);
      expect(callsOf(next.provider, 'write')).toEqual([4096]);
      expect(
        next.provider.exports
          .get('disk')
          ?.disk.subarray(4096, 4096 + data.length)
          .equals(data),
      ).toBe(true);
    },
  );

  test('during a refused write lets the next server skip the rest of its payload, and refuses the write once', async () => {
    const { opened, server } = await startServer();
    const next = nextServer();
    const client = await opened();
    client.request({ type: CMD.WRITE, cookie: 1n, offset: DISK_SIZE, length: MIB }, Buffer.alloc(MIB / 2, 1));
    await until(() => movedBytes(server) >= MIB / 2, 'half of it is here');
    await handOver(server, next.server);
    client.send(Buffer.alloc(MIB / 2, 2));
    client.request({ type: CMD.FLUSH, cookie: 2n });
    expect(await client.readReply()).toMatchObject({ errno: 28, cookie: 1n });
    expect(await client.readReply()).toMatchObject({ errno: 0, cookie: 2n });
  });

  test('delivers unread replies once, whole and in order, from two servers', async () => {
    const { opened, server } = await startServer();
    const second = nextServer();
    const third = nextServer();
    const client = await opened();
    client.socket.pause();
    for (let n = 0; n < 6; n++) client.request({ type: CMD.READ, cookie: BigInt(n), length: DISK_SIZE });
    await until(() => server.memory.usedBytes > MIB, 'there is more than the system takes');
    const state = await handOver(server, second.server);
    expect(state.unsent.length).toBeGreaterThan(MIB / 2);
    await until(
      () => second.server.connections.get(onlyId(second.server))?.phase === 'transmission',
      'the connection is served there',
    );
    expect((await handOver(second.server, third.server)).unsent.length).toBeGreaterThan(MIB / 2);
    client.socket.resume();
    for (let n = 0; n < 6; n++) {
      const reply = await client.readReply(DISK_SIZE);
      expect(reply).toMatchObject({ errno: 0, cookie: BigInt(n) });
      expect(reply.data.equals(new TestExport('disk').disk)).toBe(true);
    }
  });

  test('moves a request that waits for memory to the next server; without it the request waits where it is', async () => {
    const large = new TestExport('disk', { size: 32 * MIB });
    const { opened, server, provider } = await startServer({
      exports: [large],
      limits: { maxMemoryBytes: MIN_MEMORY_BYTES },
    });
    const next = nextServer(large);
    const holders = [await opened(), await opened()];
    for (const holder of holders) {
      holder.socket.pause();
      holder.request({ type: CMD.READ, length: 32 * MIB });
    }
    await until(() => provider.calls.length === 2, 'all memory is taken');
    const client = await opened();
    const id = [...server.connections.keys()].at(-1) ?? NaN;
    client.request({ type: CMD.READ, cookie: 1n, length: 32 * MIB });
    client.request({ type: CMD.READ, cookie: 2n, length: 4 });
    await until(() => server.memory.waiting === 1, 'it waits');
    const no = new Error('no');
    const refuse = (): never => {
      throw no;
    };
    await expect(server.handOver(id, refuse)).rejects.toBe(no);
    await until(() => server.memory.waiting === 1, 'it waits again');
    const { socket, state } = await server.handOver(id, (from, at) => ({ socket: duplicateSocket(from), state: at }));
    expect(state.unread.length).toBe(2 * 28);
    expect(server.memory.waiting).toBe(0);
    next.server.continueConnection(socket, state);
    expect((await client.readReply(32 * MIB)).data.equals(large.disk)).toBe(true);
    expect(await client.readReply(4)).toMatchObject({ errno: 0, cookie: 2n });
    expect(provider.calls).toHaveLength(2);
  });

  test('is invisible to a client with contexts and structured replies', async () => {
    const { raw, server } = await startServer();
    const next = nextServer();
    const client = await raw();
    await client.openWith('structured', 'disk', ['base:allocation']);
    await handOver(server, next.server);
    client.request({ type: CMD.BLOCK_STATUS, cookie: 3n, length: 4096 });
    expect(await client.readChunk()).toMatchObject({ type: REPLY_TYPE.BLOCK_STATUS, cookie: 3n, isDone: true });
    client.request({ type: CMD.READ, cookie: 4n, offset: 4, length: 4 });
    expect((await client.readChunk()).payload.subarray(8)).toEqual(Buffer.from([0, 0, 0, 5]));
  });

  test('back and forth under load loses no request and repeats none', async () => {
    const random = new Random(18);
    const exported = new TestExport('disk');
    const first = await startServer({ exports: [exported], limits: { maxInFlightRequests: 8 } });
    const other = nextServer(exported);
    const slow = (provider: TestProvider): void => {
      provider.hook = () => {
        if (!random.oneIn(3)) return;
        return new Promise((resolve) => setImmediate(resolve));
      };
    };
    slow(first.provider);
    slow(other.provider);
    const client = await first.opened();
    const model = Buffer.from(exported.disk);
    const COUNT = 600;
    const lengths: number[] = [];
    const sent = Array.from({ length: COUNT }, (_, n) => {
      // The writes do not overlap, as they may be carried out in any order.
      const at = Math.floor((n * DISK_SIZE) / COUNT);
      const length = random.oneIn(5) ? 1500 : 1 + random.below(64);
      const isWrite = random.oneIn(2);
      lengths.push(isWrite ? 0 : length);
      const data = Buffer.alloc(isWrite ? length : 0, n & 0xff);
      data.copy(model, at);
      const type = isWrite ? CMD.WRITE : CMD.READ;
      return Buffer.concat([requestBytes({ type, cookie: BigInt(n), offset: at, length }), data]);
    });
    const stream = Buffer.concat(sent);
    const answered = new Set<bigint>();
    const reading = (async () => {
      while (answered.size < COUNT) {
        const { errno, cookie } = await client.readReply((n) => lengths[Number(n)] ?? 0);
        if (errno !== 0 || answered.has(cookie)) throw new Error(`${cookie} was answered twice, or with ${errno}`);
        answered.add(cookie);
      }
    })();
    let [from, to] = [first.server, other.server];
    let moves = 0;
    for (let at = 0; at < stream.length;) {
      const length = 1 + random.below(20_000);
      client.send(stream.subarray(at, at + length));
      at += length;
      if (random.oneIn(2)) await new Promise((resolve) => setImmediate(resolve));
      await until(() => from.connections.get(onlyId(from))?.phase === 'transmission', 'the connection is served there');
      await handOver(from, to);
      [from, to] = [to, from];
      moves++;
    }
    await reading;
    expect(moves).toBeGreaterThan(3);
    expect(exported.disk.equals(model)).toBe(true);
    const writes = [first, other].flatMap(({ provider }) => callsOf(provider, 'write'));
    expect(new Set(writes).size).toBe(writes.length);
    expect([...first.provider.breaches, ...other.provider.breaches]).toEqual([]);
  });
});

test('a hand-over to another process carries out requests that were received but not begun there', async () => {
  const { opened, server, provider } = await startServer({ limits: { maxInFlightRequests: 1 } });
  const child = fork(fileURLToPath(new URL('next-server.mjs', import.meta.url)), { serialization: 'advanced' });
  onTestFinished(() => void child.kill('SIGKILL'));
  const messages: unknown[] = [];
  child.on('message', (message) => messages.push(message));
  const client = await opened();
  const gate = new Gate();
  provider.hook = () => gate.opened;
  client.request({ type: CMD.FLUSH, cookie: 1n });
  client.request({ type: CMD.WRITE, cookie: 2n, offset: 8, length: 4 }, Buffer.from('kept'));
  await until(() => provider.calls.length === 1, 'the first has begun');
  const given = server.handOver(onlyId(server), (socket, state) => {
    // No bytes are unsent, so the socket itself can be sent.
    expect(state.unsent.length).toBe(0);
    child.send({ state }, socket);
  });
  gate.open();
  await given;
  client.request({ type: CMD.READ, cookie: 3n, offset: 8, length: 4 });
  expect(await client.readReply()).toMatchObject({ errno: 0, cookie: 1n });
  expect(await client.readReply()).toMatchObject({ errno: 0, cookie: 2n });
  expect((await client.readReply(4)).data.toString()).toBe('kept');
  expect(callsOf(provider, 'write')).toEqual([]);
  client.request({ type: CMD.DISC });
  await until(() => messages.length > 0, 'it is over there');
  expect(messages).toEqual([{ closed: 'the client disconnected' }]);
});

describe('a hand-over that is refused or given up', () => {
  const take = (socket: net.Socket): never => expect.unreachable(`${socket.remoteAddress} was taken`);
  const codeOf = (server: TestServer['server'], id = onlyId(server)): Promise<unknown> =>
    server.handOver(id, take).then(
      () => undefined,
      (error: unknown) => (error as { code: unknown }).code,
    );

  test('is refused for a connection that is in the handshake, ending, without a socket, or unknown', async () => {
    const { raw, opened, server, provider } = await startServer();
    expect(await codeOf(server, 99)).toBe('ENDING');
    const early = await raw();
    await early.greet();
    expect(await codeOf(server)).toBe('NOT_READY');
    early.vanish();
    await until(() => server.connections.size === 0, 'it is gone');
    const ends = duplexPair();
    server.serveConnection(ends.server);
    await new RawClient(ends.client).open('disk');
    expect(await codeOf(server)).toBe('NOT_A_SOCKET');
    ends.client.destroy();
    await until(() => server.connections.size === 0, 'it is gone');
    const leaving = await opened();
    const gate = new Gate();
    provider.hook = () => gate.opened;
    leaving.request({ type: CMD.FLUSH });
    leaving.request({ type: CMD.DISC });
    await until(() => server.connections.get(onlyId(server))?.phase === 'closing', 'it says goodbye');
    expect(await codeOf(server)).toBe('ENDING');
    gate.open();
  });

  test('leaves the connection open, with all input that arrived meanwhile', async () => {
    const { opened, server, provider, allOver } = await startServer();
    const client = await opened();
    const gate = new Gate();
    provider.hook = () => gate.opened;
    client.request({ type: CMD.FLUSH, cookie: 1n });
    await until(() => provider.calls.length === 1, 'it has begun');
    const abort = new AbortController();
    const given = server.handOver(onlyId(server), take, { signal: abort.signal });
    client.request({ type: CMD.WRITE, cookie: 2n, length: 4 }, Buffer.from('kept'));
    abort.abort();
    await expect(given).rejects.toMatchObject({ code: 'ABORTED' });
    gate.open();
    provider.hook = () => undefined;
    expect(await client.readReply()).toMatchObject({ cookie: 1n });
    expect(await client.readReply()).toMatchObject({ cookie: 2n });
    // The same for a connection that no server took.
    const refusal = new Error('no');
    const refuse = (): never => {
      throw refusal;
    };
    await expect(server.handOver(onlyId(server), refuse)).rejects.toBe(refusal);
    client.request({ type: CMD.READ, cookie: 3n, length: 4 });
    expect((await client.readReply(4)).data.toString()).toBe('kept');
    client.request({ type: CMD.DISC });
    await allOver();
  });

  test('may end in a shutdown of the paused connection, which is in order', async () => {
    const { opened, server, provider } = await startServer();
    const client = await opened();
    const gate = new Gate();
    provider.hook = () => gate.opened;
    client.request({ type: CMD.FLUSH, cookie: 1n });
    await until(() => provider.calls.length === 1, 'it has begun');
    const given = codeOf(server);
    // It pauses in the next turn of the loop; input after that waits.
    for (let turn = 0; turn < 2; turn++) await new Promise((resolve) => setImmediate(resolve));
    client.request({ type: CMD.FLUSH, cookie: 2n });
    const closed = server.close();
    gate.open();
    expect(await given).toBe('ENDING');
    expect(await client.readReply()).toMatchObject({ errno: 0, cookie: 1n });
    expect(await client.readReply()).toMatchObject({ errno: 108, cookie: 2n });
    client.halfClose();
    await closed;
  });
});

test.each([
  [{ size: DISK_SIZE / 2 }, 'it has 524288 bytes, and had 1048576'],
  [{ readOnly: true }, 'it is read-only now'],
  [{ minimumBlockSize: 512 }, 'its blocks have 512 bytes, and had 1'],
  [{ canTrim: false }, 'it no longer supports what was announced (transmission flags 0x20)'],
])('is refused if the export no longer has what was announced: %o', async (geometry, why) => {
  const { opened, server } = await startServer();
  const next = nextServer(new TestExport('disk', geometry));
  const client = await opened();
  await handOver(server, next.server);
  await client.readToEnd();
  client.halfClose();
  await until(() => next.closes.length === 1, 'it is closed');
  expect(next.closes).toEqual([`it cannot continue with the export "disk": ${why}`]);
  expect(next.provider.openNow).toBe(0);
});

test('is not caused by an export that has grown or has more features: the connection keeps those announced', async () => {
  const { opened, server } = await startServer({
    exports: [new TestExport('disk', { readOnly: true, canTrim: false })],
  });
  const next = nextServer(new TestExport('disk', { size: 2 * DISK_SIZE }));
  const client = await opened();
  await handOver(server, next.server);
  client.request({ type: CMD.READ, cookie: 1n, offset: DISK_SIZE, length: 4 });
  client.request({ type: CMD.WRITE, cookie: 2n, length: 4 }, Buffer.alloc(4));
  expect((await client.readReply()).errno).toBe(22);
  expect((await client.readReply()).errno).toBe(1);
});
