/** What the client is given is checked before anything is sent: types, ranges, names, options of connect(). */

import { describe, expect, test } from 'vitest';
import { NbdClient, NbdClientError, type ClientOptions } from '../src/index.js';
import { CMD } from '../src/protocol/wire.js';
import { failureOf, fakeServer, hear, letIn, reply } from './fake-server.js';
import { DISK_SIZE, TestExport } from './test-device.js';
import { startServer } from './test-server.js';

/** What `work` rejects with; it must not throw. */
async function rejection(work: Promise<unknown>): Promise<unknown> {
  return work.then(
    () => 'nothing',
    (reason: unknown) => reason,
  );
}

describe('requests', () => {
  const WRONG_TYPES: [what: string, call: (client: NbdClient) => Promise<unknown>][] = [
    ['write of a string', (client) => client.write(0, 'é' as never)],
    ['write of an ArrayBuffer', (client) => client.write(0, new ArrayBuffer(4) as never)],
    ['write of an Uint16Array', (client) => client.write(0, new Uint16Array(4) as never)],
    ['write of an array', (client) => client.write(0, [1, 2] as never)],
    ['write of nothing', (client) => client.write(0, undefined as never)],
    ['write at a bigint', (client) => client.write(0n as never, Buffer.alloc(1))],
    ['readInto of a number', (client) => client.readInto(0, 4 as never)],
    ['read at a string', (client) => client.read('0' as never, 1)],
    ['read of nothing', (client) => client.read(0, undefined as never)],
    ['zero of a string', (client) => client.zero(0, '1' as never)],
    ['trim of null', (client) => client.trim(0, null as never)],
    ['cache of an object', (client) => client.cache({} as never, 1)],
    ['block status of a number', (client) => client.blockStatus(1 as never, 0, 1)],
    // As of a device, where it means FUA.
    ['true in place of options', (client) => client.write(0, Buffer.alloc(1), true as never)],
    ['a signal that is none', (client) => client.read(0, 1, { signal: {} as never })],
    ['a signal that is none, of a flush', (client) => client.flush({ signal: 'x' as never })],
  ];
  for (const [what, call] of WRONG_TYPES) {
    test(`${what}: a TypeError, and nothing is sent`, async () => {
      const { client: open, requests } = await startServer();
      const client = await open();
      expect(await rejection(call(client))).toBeInstanceOf(TypeError);
      expect((await client.read(4, 4)).readUInt32BE(0)).toBe(5);
      expect(requests).toHaveLength(1);
    });
  }

  const RANGES: [offset: number, length: number][] = [
    [NaN, 1],
    [0, NaN],
    [-1, 1],
    [0, -1],
    [0.5, 1],
    [0, 0.5],
    [Infinity, 1],
    [0, Infinity],
    [2 ** 53, 1],
    [0, 2 ** 53],
  ];
  test('a command or flag that was not announced fails with EINVAL and is not sent', async () => {
    const heard: number[] = [];
    const path = await fakeServer(async (peer) => {
      await letIn(peer, { flags: 1 });
      const request = await hear(peer);
      heard.push(request.type, request.flags);
      reply(peer, request);
    });
    const client = await NbdClient.connect({ path });
    await client.go('disk');
    const calls: [name: string, call: () => Promise<unknown>][] = [
      ['flush', () => client.flush()],
      ['trim', () => client.trim(0, 1)],
      ['zero', () => client.zero(0, 1)],
      ['cache', () => client.cache(0, 1)],
      ['df', () => client.read(0, 1, { df: true })],
      ['fua', () => client.write(0, Buffer.alloc(1), { fua: true })],
    ];
    for (const [name, call] of calls) {
      expect(await failureOf(call())).toMatchObject({
        code: 'EINVAL',
        message: expect.stringContaining(`the server has not announced ${name} for this export`) as string,
      });
    }
    await client.write(0, Buffer.alloc(1));
    expect(heard).toEqual([CMD.WRITE, 0]);
    client.destroy();
  });

  // Without it, `nbdkit sparse-random` fails an assertion and ends.
  test('neither is fastZero, by which a server could be ended', async () => {
    const path = await fakeServer((peer) => letIn(peer, { flags: 1 | 64 }));
    const client = await NbdClient.connect({ path });
    await client.go('disk');
    const failure = await failureOf(client.zero(0, 1, { fastZero: true }));
    expect(failure.message).toBe('zero of 1 bytes at 0: the server has not announced fastZero for this export');
    client.destroy();
  });

  test('requests of length 0 succeed and are not sent, because servers differ; a block status of nothing is EINVAL', async () => {
    const server = await startServer();
    for (const replies of ['simple', 'structured', 'extended'] as const) {
      const client = await NbdClient.connect({ path: server.path, replies });
      await client.go('disk');
      expect(await client.read(DISK_SIZE, 0)).toHaveLength(0);
      await client.write(17, Buffer.alloc(0), { fua: true });
      await client.zero(17, 0);
      await client.trim(17, 0);
      await client.cache(17, 0);
      expect((await failureOf(client.read(DISK_SIZE + 1, 0))).code).toBe('EINVAL');
      if (replies !== 'simple') {
        expect((await failureOf(client.blockStatus('base:allocation', 0, 0))).code).toBe('EINVAL');
      }
      await client.disconnect();
    }
    expect(server.requests).toEqual([]);
  });

  test('what is no range fails with EINVAL and is not sent', async () => {
    const { client: open, requests } = await startServer();
    const client = await open();
    for (const [offset, length] of RANGES) {
      const calls = [
        client.read(offset, length),
        client.zero(offset, length),
        client.trim(offset, length),
        client.cache(offset, length),
        client.blockStatus('base:allocation', offset, length),
      ];
      if (length === 1) calls.push(client.write(offset, Buffer.alloc(1)), client.readInto(offset, Buffer.alloc(1)));
      for (const call of calls) expect((await failureOf(call)).code).toBe('EINVAL');
    }
    await client.flush();
    expect(requests).toHaveLength(1);
  });

  test('beyond the end of the export the codes are those of the server, and nothing is sent', async () => {
    const { client: open, requests } = await startServer();
    const client = await open();
    for (const [offset, length] of [
      [DISK_SIZE, 1],
      [DISK_SIZE - 1, 2],
      [0, DISK_SIZE + 1],
      [Number.MAX_SAFE_INTEGER, 1],
    ] as const) {
      expect((await failureOf(client.read(offset, length))).code).toBe('EINVAL');
      expect((await failureOf(client.trim(offset, length))).code).toBe('EINVAL');
      expect((await failureOf(client.cache(offset, length))).code).toBe('EINVAL');
      expect((await failureOf(client.zero(offset, length))).code).toBe('ENOSPC');
      expect((await failureOf(client.write(offset, Buffer.alloc(length % 2 ** 32)))).code).toBe('ENOSPC');
    }
    await client.read(0, 1);
    expect(requests).toHaveLength(1);
  });

  test('a change of a read-only export fails with EPERM and is not sent', async () => {
    const { client: open, requests } = await startServer({ exports: [new TestExport('disk', { readOnly: true })] });
    const client = await open();
    for (const call of [client.write(0, Buffer.alloc(1)), client.zero(0, 1), client.trim(0, 1)]) {
      expect((await failureOf(call)).code).toBe('EPERM');
    }
    expect(requests).toHaveLength(0);
  });

  test('a read that no memory is large enough for fails with ENOMEM', async () => {
    const path = await fakeServer((peer) => letIn(peer, { size: 2 ** 50 }));
    const client = await NbdClient.connect({ path });
    await client.go('disk');
    expect((await failureOf(client.read(0, 2 ** 50))).code).toBe('ENOMEM');
    client.destroy();
  });

  test('bytes may be any Uint8Array, also a part of a larger one', async () => {
    const { client: open } = await startServer();
    const client = await open();
    const memory = new Uint8Array(16).map((_, index) => index);
    await client.write(100, memory.subarray(4, 8));
    const into = new Uint8Array(8).fill(0xff);
    await client.readInto(100, into.subarray(2, 6));
    expect([...into]).toEqual([255, 255, 4, 5, 6, 7, 255, 255]);
    const read = await client.read(100, 4);
    expect(Buffer.isBuffer(read)).toBe(true);
    expect([...read]).toEqual([4, 5, 6, 7]);
  });
});

describe('names', () => {
  const calls: [what: string, call: (client: NbdClient, name: string) => Promise<unknown>][] = [
    ['info', (client, name) => client.info(name)],
    ['go', (client, name) => client.go(name)],
    ['listContexts', (client, name) => client.listContexts(name)],
    ['listContexts, a query', (client, name) => client.listContexts('disk', [name])],
    ['selectContexts', (client, name) => client.selectContexts(name, [])],
    ['selectContexts, a context', (client, name) => client.selectContexts('disk', ['base:allocation', name])],
  ];
  for (const [what, call] of calls) {
    test(`${what}: one that the protocol cannot carry is refused, and the connection continues`, async () => {
      const client = await NbdClient.connect({ path: (await startServer()).path });
      for (const name of ['a'.repeat(4097), 'ö'.repeat(2049), 'a\0b', '\ud800']) {
        expect((await failureOf(call(client, name))).code).toBe('INVALID');
      }
      for (const name of [null, 1, {}]) expect(await rejection(call(client, name as never))).toBeInstanceOf(TypeError);
      expect((await client.info('disk')).size).toBe(DISK_SIZE);
      client.destroy();
    });
  }

  test('the export may be left out of every option that names one', async () => {
    const { path } = await startServer();
    const client = await NbdClient.connect({ uri: `nbd+unix:///disk?socket=${path}` });
    expect(await client.listContexts()).toEqual(['base:allocation']);
    expect(await client.selectContexts(undefined, ['base:allocation'])).toEqual(['base:allocation']);
    expect((await client.info()).size).toBe(DISK_SIZE);
    await client.go();
    expect(client.contexts).toEqual(['base:allocation']);
    client.destroy();
  });

  test('contexts that are not an array are a TypeError', async () => {
    const client = await NbdClient.connect({ path: (await startServer()).path });
    expect(await rejection(client.selectContexts('disk', 'base:allocation' as never))).toBeInstanceOf(TypeError);
    client.destroy();
  });
});

describe('options of connect()', () => {
  const path = '/nonexistent/nbd.sock';
  for (const options of [
    undefined,
    null,
    'nbd://h',
    {},
    { path: '' },
    { path: 1 },
    { path, port: 1 },
    { path, uri: 'nbd://h' },
    { host: 'h' },
    { port: '1' },
    { host: '', port: 1 },
    { socket: {} },
    { uri: 7 },
    { uri: 'nbds://h?tls-psk-file=/k' },
    { uri: 'nbds://h?tls-certificates=/c' },
    { uri: 'nbds://h?tls-verify-peer=0' },
    { path, replies: 'best' },
    { path, signal: 'x' },
    { path, timeoutMs: '1' },
    { path, tls: true },
    { path, tls: null },
    { path, tls: [] },
    { path, tls: { psk: null } },
    { path, tls: { authorities: 1 } },
    { path, tls: { authorities: 'ca.pem' } },
    { path, tls: { certificate: { chain: '-----BEGIN CERTIFICATE-----' } } },
    { path, tls: { certificate: { chain: '-----BEGIN CERTIFICATE-----', key: '-----BEGIN PRIVATE KEY-----' } } },
    { path, tls: { serverName: '' } },
  ]) {
    test(`${JSON.stringify(options)} is a TypeError`, async () => {
      expect(await rejection(NbdClient.connect(options as ClientOptions))).toBeInstanceOf(TypeError);
    });
  }

  for (const options of [
    { port: 0 },
    { port: 65536 },
    { port: 1.5 },
    { port: NaN },
    { uri: 'nbd://h:0' },
    { uri: 'nbdx://h' },
    { path, timeoutMs: -1 },
    { path, timeoutMs: Infinity },
    { path, timeoutMs: 2 ** 31 },
    { path, connectTimeoutMs: NaN },
  ]) {
    test(`${JSON.stringify(options)} is a RangeError`, async () => {
      expect(await rejection(NbdClient.connect(options))).toBeInstanceOf(RangeError);
    });
  }
});

test('instanceof is true for the errors of another copy of the package', () => {
  const error = new NbdClientError('EIO', 'x');
  const foreign = Object.assign(new Error('y'), { [Symbol.for('nbd-server-ts.NbdClientError')]: true });
  expect(error).toBeInstanceOf(NbdClientError);
  expect(foreign).toBeInstanceOf(NbdClientError);
  expect(new Error('z')).not.toBeInstanceOf(NbdClientError);
  expect(null).not.toBeInstanceOf(NbdClientError);
  class Own extends NbdClientError {}
  expect(new Own('EIO', 'x')).toBeInstanceOf(NbdClientError);
  expect(error).not.toBeInstanceOf(Own);
});
