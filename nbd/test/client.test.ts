/** The library's client against its server, and against servers that misbehave. */

import net from 'node:net';
import { join } from 'node:path';
import { describe, expect, onTestFinished, test } from 'vitest';
import { DeviceError, ExportError, MAX_PAYLOAD, NbdClient, type DeviceErrorCode } from '../src/index.js';
import {
  NBD_ERRNO,
  OPT,
  OPTION_HEADER_SIZE,
  REP,
  REQUEST_HEADER_SIZE,
  SIMPLE_REPLY_MAGIC,
} from '../src/protocol/wire.js';
import { duplexPair } from './duplex-pair.js';
import { failureOf, fakeServer, GREETING, letIn, optionReply, refuseUpTo } from './fake-server.js';
import { uint16, uint32 } from './raw-client.js';
import { DISK_SIZE, Gate, TestExport } from './test-device.js';
import { startServer, temporaryDirectory, until } from './test-server.js';

async function connected(path: string): Promise<NbdClient> {
  const client = await NbdClient.connect({ path });
  onTestFinished(() => client.destroy());
  return client;
}

describe('options', () => {
  test('list() returns the exports with their descriptions', async () => {
    const exports = [new TestExport('disk', {}, 'the first'), new TestExport('größe ☃', {}, '')];
    const client = await connected((await startServer({ exports })).path);
    expect(await client.list()).toEqual([
      { name: 'disk', description: 'the first' },
      { name: 'größe ☃', description: '' },
    ]);
  });

  const details = {
    size: DISK_SIZE,
    readOnly: true,
    canFlush: true,
    canFua: false,
    canTrim: false,
    canZero: false,
    canFastZero: false,
    canCache: true,
    canDf: true,
    multiConn: true,
    rotational: true,
    minimumBlockSize: 512,
    preferredBlockSize: 65536,
    maximumPayload: MAX_PAYLOAD,
    name: 'disk',
    description: 'about disk',
  };
  const described = new TestExport('disk', {
    ...{ readOnly: true, rotational: true, canFua: false, minimumBlockSize: 512, preferredBlockSize: 65536 },
  });

  test('info() returns all properties of an export without opening it, and go() the same', async () => {
    const { path, provider } = await startServer({ exports: [described] });
    const client = await connected(path);
    expect(await client.info('disk')).toEqual(details);
    expect(provider.opened).toBe(0);
    expect(await client.go('disk')).toEqual(details);
    expect(provider.opened).toBe(1);
  });

  test('list(), info() and a failed go() may be followed by another go()', async () => {
    const client = await connected((await startServer()).path);
    await client.list();
    await client.info('disk');
    expect((await failureOf(client.info('nothing'))).code).toBe('UNKNOWN_EXPORT');
    expect(await failureOf(client.go('nothing'))).toMatchObject({
      ...{ code: 'UNKNOWN_EXPORT', message: 'no export "nothing"' },
    });
    await client.go('disk');
    expect(await client.read(4, 4)).toEqual(uint32(5));
  });

  for (const { code, expected } of [
    { code: 'POLICY', expected: 'POLICY' },
    { code: 'SHUTDOWN', expected: 'ESHUTDOWN' },
    { code: 'FAILED', expected: 'UNKNOWN_EXPORT' },
  ] as const) {
    test(`a provider's ${code} arrives as ${expected} with the server's message`, async () => {
      const { path, provider } = await startServer();
      provider.openHook = () => {
        throw new ExportError(code, 'come back tomorrow');
      };
      const failure = await failureOf((await connected(path)).go('disk'));
      expect(failure).toMatchObject({ code: expected, message: 'come back tomorrow' });
    });
  }

  test('options after go() fail without a message to the server', async () => {
    const client = await (await startServer()).client();
    expect((await failureOf(client.list())).code).toBe('CLOSED');
  });

  for (const noZeroes of [true, false]) {
    test(`go() uses EXPORT_NAME with a server that has no GO and ${noZeroes ? 'omits' : 'sends'} the zeros`, async () => {
      const path = await fakeServer(async (peer) => {
        peer.send(Buffer.from('NBDMAGICIHAVEOPT'), uint16(noZeroes ? 3 : 1));
        expect((await peer.read(4)).readUInt32BE(0)).toBe(noZeroes ? 3 : 1);
        await refuseUpTo(peer, OPT.GO);
        peer.send(optionReply(OPT.GO, REP.ERR_UNSUP));
        const exportName = await peer.read(OPTION_HEADER_SIZE + 4);
        expect(exportName.readUInt32BE(8)).toBe(OPT.EXPORT_NAME);
        expect(exportName.toString('utf8', OPTION_HEADER_SIZE)).toBe('disk');
        peer.send(Buffer.from('0000000000100000', 'hex'), uint16(3), Buffer.alloc(noZeroes ? 0 : 124));
        const read = await peer.read(REQUEST_HEADER_SIZE);
        peer.send(uint32(SIMPLE_REPLY_MAGIC), uint32(0), read.subarray(8, 16), Buffer.from('data'));
      });
      const client = await connected(path);
      expect(await client.go('disk')).toMatchObject({ size: 1024 * 1024, readOnly: true, name: undefined });
      expect((await client.read(0, 4)).toString()).toBe('data');
    });
  }
});

describe('requests', () => {
  test('written data are read back; zeroed and trimmed ranges read as zeros', async () => {
    const client = await (await startServer()).client();
    const data = Buffer.from('a few bytes, at an odd place');
    await client.write(1001, data);
    expect((await client.read(1001, data.length)).toString()).toBe(data.toString());
    await client.zero(1003, 5);
    await client.trim(1010, 2);
    await client.flush();
    await client.cache(0, 4096);
    const into = Buffer.alloc(data.length);
    await client.readInto(1001, into);
    expect(into).toEqual(Buffer.from(data).fill(0, 2, 7).fill(0, 9, 11));
  });

  test('options of requests reach the device', async () => {
    const { client: open, provider } = await startServer();
    const client = await open();
    await client.write(0, Buffer.alloc(4), { fua: true });
    await client.trim(0, 4, { fua: true });
    await client.zero(0, 4, { fua: true });
    await client.zero(0, 4, { noHole: true });
    await client.zero(0, 4, { fastZero: true });
    const zero = { method: 'zero', offset: 0, length: 4 };
    expect(provider.calls).toEqual([
      { method: 'write', offset: 0, length: 4, fua: true },
      { method: 'trim', offset: 0, length: 4, fua: true },
      { ...zero, mode: { fua: true, noHole: false, fastZero: false } },
      { ...zero, mode: { fua: false, noHole: true, fastZero: false } },
      { ...zero, mode: { fua: false, noHole: false, fastZero: true } },
    ]);
  });

  test('requests of length 0 succeed', async () => {
    const client = await (await startServer()).client();
    expect(await client.read(17, 0)).toHaveLength(0);
    await client.write(17, Buffer.alloc(0));
    await client.zero(17, 0);
    await client.trim(17, 0);
  });

  test('32 MiB are written and read in one request each', async () => {
    const { client: open } = await startServer({ exports: [new TestExport('disk', { size: 2 * MAX_PAYLOAD })] });
    const client = await open();
    const data = Buffer.alloc(MAX_PAYLOAD, 'all work and no play');
    await client.write(12345, data);
    expect((await client.read(12345, MAX_PAYLOAD)).equals(data)).toBe(true);
  });

  for (const code of Object.keys(NBD_ERRNO) as DeviceErrorCode[]) {
    test(`a device's ${code} arrives as ${code}, and the connection continues`, async () => {
      const { client: open, provider } = await startServer();
      const client = await open();
      provider.hook = () => {
        throw new DeviceError(code, 'as told');
      };
      const failure = await failureOf(client.zero(512, 1024, { fastZero: true }));
      expect(failure).toMatchObject({
        code,
        message: `zero of 1024 bytes at 512: the server answered ${code}: as told`,
      });
      provider.hook = () => undefined;
      expect(await client.read(4, 4)).toEqual(uint32(5));
    });
  }

  test('requests that the server would refuse fail with its error, and are not sent', async () => {
    const { client: open } = await startServer({
      exports: [new TestExport('disk'), new TestExport('fixed', { readOnly: true })],
    });
    const client = await open();
    expect((await failureOf(client.read(DISK_SIZE, 1))).code).toBe('EINVAL');
    expect((await failureOf(client.write(DISK_SIZE, Buffer.alloc(1)))).code).toBe('ENOSPC');
    expect((await failureOf(client.write(0, Buffer.alloc(MAX_PAYLOAD + 1)))).code).toBe('ENOSPC');
    const readOnly = await open('fixed');
    expect((await failureOf(readOnly.write(0, Buffer.alloc(1)))).code).toBe('EPERM');
  });

  for (const { offset, length } of [
    { offset: -1, length: 1 },
    { offset: 0.5, length: 1 },
    { offset: 2 ** 53, length: 1 },
    { offset: NaN, length: 1 },
    { offset: 0, length: -1 },
    { offset: 0, length: 2 ** 53 },
  ]) {
    test(`a trim of ${length} bytes at ${offset} is an invalid range and is not sent`, async () => {
      const { client: open, requests } = await startServer();
      const client = await open();
      expect((await failureOf(client.trim(offset, length))).code).toBe('EINVAL');
      await client.flush();
      expect(requests).toHaveLength(1);
    });
  }

  test('requests before go() fail', async () => {
    const client = await connected((await startServer()).path);
    expect((await failureOf(client.read(0, 4))).code).toBe('CLOSED');
    expect((await failureOf(client.flush())).code).toBe('CLOSED');
  });

  test('a thousand concurrent requests each get their own answer', async () => {
    const { client: open, provider } = await startServer();
    provider.hook = ({ offset }) => (offset % 3 === 0 ? Promise.resolve() : undefined);
    const client = await open();
    const offsets = Array.from({ length: 1000 }, (_, i) => i * 1024);
    const words = await Promise.all(offsets.map((offset) => client.read(offset, 512)));
    expect(words.map((data) => data.readUInt32BE(0))).toEqual(offsets.map((offset) => offset + 1));
  });

  test('answers out of order reach their requests', async () => {
    const { client: open, provider } = await startServer();
    const gate = new Gate();
    provider.hook = ({ offset }) => (offset === 0 ? gate.opened : undefined);
    const client = await open();
    const slow = client.read(0, 4);
    expect(await client.read(4096, 4)).toEqual(uint32(4097));
    gate.open();
    expect(await slow).toEqual(uint32(1));
  });
});

describe('the end of a connection', () => {
  test('disconnect() before go() ends the handshake', async () => {
    const { path, allOver, closes } = await startServer();
    const client = await connected(path);
    await client.disconnect();
    await allOver();
    expect(closes[0]?.reason).toBe('the client aborted the handshake');
  });

  test('disconnect() after go() waits for the replies to requests in flight', async () => {
    const { client: open, provider, allOver, closes } = await startServer();
    const gate = new Gate();
    provider.hook = () => gate.opened;
    const client = await open();
    const read = client.read(4, 4);
    const gone = client.disconnect();
    await until(() => provider.unfinished === 1, 'the read is in flight');
    gate.open();
    expect(await read).toEqual(uint32(5));
    await gone;
    await allOver();
    expect(closes[0]?.reason).toBe('the client disconnected');
    expect((await failureOf(client.read(0, 4))).code).toBe('CLOSED');
    await client.disconnect();
  });

  test('a lost server fails every unanswered request, and every later one', async () => {
    const { client: open, provider, server } = await startServer();
    const gate = new Gate();
    provider.hook = () => gate.opened;
    const client = await open();
    const pending = [client.read(0, 4), client.write(0, Buffer.alloc(4)), client.flush(), client.trim(0, 4)];
    const failures = pending.map(failureOf);
    await until(() => provider.unfinished === 4, 'all are in flight');
    server.destroy();
    for (const failure of failures) expect((await failure).code).toBe('CLOSED');
    expect((await failureOf(client.flush())).code).toBe('CLOSED');
    gate.open();
  });

  test('a server lost within the data of a read fails that read', async () => {
    const path = await fakeServer(async (peer) => {
      await letIn(peer);
      const read = await peer.read(REQUEST_HEADER_SIZE);
      peer.send(uint32(SIMPLE_REPLY_MAGIC), uint32(0), read.subarray(8, 16), Buffer.alloc(100));
      peer.halfClose();
    });
    const client = await connected(path);
    await client.go('disk');
    expect((await failureOf(client.read(0, 4096))).code).toBe('CLOSED');
  });

  test('destroy() fails pending requests, and the server closes the device', async () => {
    const { client: open, provider, allOver } = await startServer();
    const gate = new Gate();
    provider.hook = () => gate.opened;
    const client = await open();
    const failure = failureOf(client.read(0, 4));
    await until(() => provider.unfinished === 1, 'a read is in flight');
    client.destroy();
    expect((await failure).code).toBe('CLOSED');
    gate.open();
    await allOver();
  });

  test('a server that shuts down answers later requests with ESHUTDOWN', async () => {
    const { client: open, provider, server } = await startServer();
    const gate = new Gate();
    provider.hook = () => gate.opened;
    const client = await open();
    const read = client.read(4, 4);
    await until(() => provider.unfinished === 1, 'a read is in flight');
    const closed = server.close();
    expect((await failureOf(client.read(8, 4))).code).toBe('ESHUTDOWN');
    gate.open();
    expect(await read).toEqual(uint32(5));
    await closed;
  });

  test('connect() to a path without a listener fails', async () => {
    const path = join(await temporaryDirectory(), 'nobody.sock');
    const failure = await failureOf(NbdClient.connect({ path }));
    expect(failure.code).toBe('CLOSED');
    expect(failure.message).toContain(path);
  });

  test('go() to a missing export of a server without GO fails when the server closes the connection', async () => {
    const path = await fakeServer(async (peer) => {
      peer.send(GREETING);
      await peer.read(4);
      await refuseUpTo(peer, OPT.GO);
      peer.send(optionReply(OPT.GO, REP.ERR_UNSUP));
      await peer.read(OPTION_HEADER_SIZE + 4);
      peer.halfClose();
    });
    expect((await failureOf((await connected(path)).go('disk'))).code).toBe('CLOSED');
  });
});

describe('servers that do not speak NBD', () => {
  for (const { what, greeting } of [
    { what: 'speaks HTTP', greeting: Buffer.from('HTTP/1.1 400 Bad Request\r\n\r\n') },
    {
      what: 'is oldstyle',
      greeting: Buffer.concat([Buffer.from('NBDMAGIC00420281861253', 'latin1'), Buffer.alloc(140)]),
    },
    { what: 'is newstyle but not fixed', greeting: Buffer.concat([Buffer.from('NBDMAGICIHAVEOPT'), uint16(0)]) },
  ]) {
    test(`connect() to a server that ${what} fails with PROTOCOL`, async () => {
      const path = await fakeServer((peer) => {
        peer.send(greeting);
        return Promise.resolve();
      });
      expect((await failureOf(NbdClient.connect({ path }))).code).toBe('PROTOCOL');
    });
  }

  test('connect() to a server that closes the connection within its greeting fails with CLOSED', async () => {
    const path = await fakeServer((peer) => {
      peer.send(GREETING.subarray(0, 10));
      peer.halfClose();
      return Promise.resolve();
    });
    expect((await failureOf(NbdClient.connect({ path }))).code).toBe('CLOSED');
  });

  for (const { what, answer } of [
    { what: 'no reply magic', answer: Buffer.alloc(20, 0xee) },
    { what: 'the reply to another option', answer: optionReply(OPT.INFO, REP.ACK) },
    { what: 'a reply of 4 GiB', answer: optionReply(OPT.LIST, REP.SERVER).fill(0xff, 16) },
    { what: 'an entry that ends within its length', answer: optionReply(OPT.LIST, REP.SERVER, Buffer.alloc(3)) },
    { what: 'an entry shorter than its name', answer: optionReply(OPT.LIST, REP.SERVER, uint32(1)) },
    { what: 'a name that is not UTF-8', answer: optionReply(OPT.LIST, REP.SERVER, Buffer.from('00000001ff', 'hex')) },
  ]) {
    test(`${what} in answer to list() fails with PROTOCOL`, async () => {
      const path = await fakeServer(async (peer) => {
        peer.send(GREETING);
        await peer.read(4 + OPTION_HEADER_SIZE);
        peer.send(answer, optionReply(OPT.LIST, REP.ACK));
      });
      expect((await failureOf((await connected(path)).list())).code).toBe('PROTOCOL');
    });
  }

  for (const { what, reply } of [
    { what: 'with a wrong magic', reply: (cookie: Buffer): Buffer => Buffer.concat([uint32(1), uint32(0), cookie]) },
    {
      what: 'to no request',
      reply: (): Buffer => Buffer.concat([uint32(SIMPLE_REPLY_MAGIC), uint32(0), Buffer.alloc(8, 0x77)]),
    },
  ]) {
    test(`a reply ${what} fails everything pending with PROTOCOL`, async () => {
      const path = await fakeServer(async (peer) => {
        await letIn(peer);
        const requests = await peer.read(2 * REQUEST_HEADER_SIZE);
        peer.send(reply(requests.subarray(8, 16)));
      });
      const client = await connected(path);
      await client.go('disk');
      const failures = [client.read(0, 4), client.flush()].map(failureOf);
      for (const failure of failures) expect((await failure).code).toBe('PROTOCOL');
    });
  }

  test('an unknown error number counts as EINVAL', async () => {
    const path = await fakeServer(async (peer) => {
      await letIn(peer);
      const read = await peer.read(REQUEST_HEADER_SIZE);
      peer.send(uint32(SIMPLE_REPLY_MAGIC), uint32(12345), read.subarray(8, 16));
    });
    const client = await connected(path);
    await client.go('disk');
    expect((await failureOf(client.read(0, 4))).code).toBe('EINVAL');
  });
});

describe('sockets that the program connected', () => {
  test('client and server talk over a pair of streams', async () => {
    const { server } = await startServer();
    const pair = duplexPair();
    server.serveConnection(pair.server);
    const client = await NbdClient.connect({ socket: pair.client });
    await client.go('disk');
    expect(await client.read(8, 4)).toEqual(uint32(9));
    await client.disconnect();
  });

  test('a greeting that was already read from a socket, paused since, is taken from `head`', async () => {
    const { path } = await startServer();
    const socket = net.connect({ path });
    onTestFinished(() => void socket.destroy());
    const head = await new Promise<Buffer>((resolve) => {
      socket.once('data', (chunk: Buffer) => {
        socket.pause();
        resolve(chunk);
      });
    });
    const client = await NbdClient.connect({ socket, head });
    await client.go('disk');
    expect(await client.read(8, 4)).toEqual(uint32(9));
  });
});
