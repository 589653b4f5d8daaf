/** The client that reconnects: what is repeated, what is reported, and what ends it. */

import { getEventListeners } from 'node:events';
import { join } from 'node:path';
import { describe, expect, onTestFinished, test } from 'vitest';
import {
  copy,
  DeviceError,
  NbdServer,
  ReconnectingClient,
  type Geometry,
  type ReconnectingClientOptions,
} from '../src/index.js';
import { CMD, NBD_ERRNO } from '../src/protocol/wire.js';
import { failureOf, fakeServer, hear, letIn, reply } from './fake-server.js';
import { uint32 } from './raw-client.js';
import { DISK_SIZE, Gate, TestExport, TestProvider } from './test-device.js';
import { temporaryDirectory, until } from './test-server.js';

const FAST = { delayMs: 1, maxDelayMs: 5 } as const;
/** HAS_FLAGS, SEND_FLUSH, SEND_FUA. */
const FLAGS = 1 | 4 | 8;

type More = Partial<Omit<ReconnectingClientOptions, 'path'>>;

async function connected(path: string, more: More = {}): Promise<ReconnectingClient> {
  const client = await ReconnectingClient.connect({ path, exportName: 'disk', reconnect: FAST, ...more });
  onTestFinished(() => client.destroy());
  return client;
}

/** A server that can be stopped and started again at the same path, over the same disk. */
class Restartable {
  readonly provider: TestProvider;
  #server: NbdServer | undefined;

  constructor(
    readonly path: string,
    geometry: Partial<Geometry> = {},
  ) {
    this.provider = new TestProvider([new TestExport('disk', geometry)]);
    onTestFinished(() => this.#server?.destroy());
  }

  static async start(geometry?: Partial<Geometry>): Promise<Restartable> {
    const server = new Restartable(join(await temporaryDirectory(), 'nbd.sock'), geometry);
    await server.start();
    return server;
  }

  async start(provider = this.provider): Promise<void> {
    this.#server = new NbdServer({ provider, limits: { lingerMs: 100 } });
    await this.#server.listen({ path: this.path });
  }

  /** As if it had crashed. */
  crash(): void {
    this.#server?.destroy();
  }

  async close(): Promise<void> {
    await this.#server?.close({ graceMs: 5000 });
  }
}

describe('after a loss', () => {
  test('requests without an answer are repeated, and later ones wait for the new connection', async () => {
    const server = await Restartable.start();
    const client = await connected(server.path);
    const gate = new Gate();
    server.provider.hook = () => gate.opened;
    const data = Buffer.from('written while the server was away');
    const pending = [client.read(4, 4), client.write(1000, data), client.zero(0, 4), client.trim(8, 4)];
    await until(() => server.provider.unfinished === 4, 'all are in flight');
    server.crash();
    await until(() => !client.isConnected, 'the loss is noticed');
    pending.push(client.read(12, 4));
    server.provider.hook = () => undefined;
    await server.start();
    const [read, , , , later] = await Promise.all(pending);
    expect(read).toEqual(uint32(5));
    expect(later).toEqual(uint32(13));
    expect((await client.read(1000, data.length)).toString()).toBe(data.toString());
    gate.open();
  });

  test('connections that break again and again end nothing, and callbacks that throw only warn', async () => {
    let connections = 0;
    const path = await fakeServer(async (peer, connection) => {
      connections++;
      await letIn(peer, { flags: FLAGS });
      for (let count = 0; count < connection; count++) {
        const request = await hear(peer);
        if (request.type === CMD.DISC) break;
        reply(peer, request, Buffer.alloc(request.length, connection));
      }
      peer.halfClose();
    });
    const told: string[] = [];
    const client = await connected(path, {
      reconnect: {
        ...FAST,
        onLost: ({ code }) => {
          told.push(code);
          throw new Error('my callback is broken');
        },
        onReconnected: () => void told.push('back'),
      },
    });
    const warnings: Error[] = [];
    const onWarning = (warning: Error): void => void warnings.push(warning);
    process.on('warning', onWarning);
    onTestFinished(() => void process.off('warning', onWarning));
    for (let count = 0; count < 6; count++) await client.read(0, 4);
    expect(connections).toBeGreaterThan(2);
    expect(told.slice(0, 2)).toEqual(['CLOSED', 'back']);
    await until(() => warnings.length > 0, 'the warning is there');
    expect(warnings[0]?.message).toBe('my callback is broken');
  });

  test('an error that the server answers is not repeated', async () => {
    const server = await Restartable.start();
    const client = await connected(server.path);
    let calls = 0;
    server.provider.hook = () => {
      calls++;
      throw new DeviceError('ENOSPC', 'full');
    };
    expect((await failureOf(client.write(0, Buffer.alloc(4)))).code).toBe('ENOSPC');
    expect(calls).toBe(1);
  });

  test('ESHUTDOWN: the request is repeated by the next server, others are answered by the old one', async () => {
    const server = await Restartable.start();
    const client = await connected(server.path);
    const gate = new Gate();
    server.provider.hook = () => gate.opened;
    const slow = client.read(4, 4);
    await until(() => server.provider.unfinished === 1, 'a read is in flight');
    const closed = server.close();
    const refused = client.read(8, 4);
    await until(() => !client.isConnected, 'the client leaves');
    server.provider.hook = () => undefined;
    gate.open();
    // The one that was begun is answered by the old server.
    expect(await slow).toEqual(uint32(5));
    await closed;
    await server.start();
    expect(await refused).toEqual(uint32(9));
  });

  test('a server that is silent counts as lost, if there is a time-out', async () => {
    const path = await fakeServer(async (peer, connection) => {
      await letIn(peer);
      const request = await hear(peer);
      if (connection > 0) reply(peer, request, Buffer.alloc(4, 7));
    });
    const client = await connected(path, { timeoutMs: 300 });
    expect(await client.read(0, 4)).toEqual(Buffer.alloc(4, 7));
  });

  test('iterators and copies continue', async () => {
    const server = await Restartable.start();
    const client = await connected(server.path);
    const disk = Buffer.alloc(DISK_SIZE);
    let calls = 0;
    server.provider.hook = ({ method }) => {
      if (method === 'read' && ++calls === 5) {
        server.crash();
        void server.start();
      }
    };
    const to = {
      size: DISK_SIZE,
      read: () => undefined,
      write: (at: number, data: Buffer) => void data.copy(disk, at),
    };
    await copy(client, to, { requestBytes: 64 * 1024, parallel: 3 });
    expect(disk.equals(server.provider.exports.get('disk')?.disk ?? Buffer.alloc(0))).toBe(true);
    let covered = 0;
    for await (const { length } of client.extents()) covered += length;
    expect(covered).toBe(DISK_SIZE);
  });
});

describe('flush()', () => {
  /** Each connection answers `requests` requests, and is lost then. */
  async function losing(...requests: number[]): Promise<{ path: string; types: number[][] }> {
    const types: number[][] = [];
    const path = await fakeServer(async (peer, connection) => {
      await letIn(peer, { flags: FLAGS });
      const heard: number[] = (types[connection] = []);
      for (let count = 0; count < (requests[connection] ?? Infinity); count++) {
        const request = await hear(peer);
        if (request.type === CMD.DISC) break;
        heard.push(request.type);
        reply(peer, request, Buffer.alloc(request.type === CMD.READ ? request.length : 0));
      }
      peer.halfClose();
    });
    return { path, types };
  }

  test('fails once after answered writes were lost unflushed, and succeeds then', async () => {
    const { path } = await losing(1);
    const client = await connected(path);
    await client.write(0, Buffer.alloc(4));
    await until(() => !client.isConnected, 'the loss is noticed');
    const failure = await failureOf(client.flush());
    expect(failure.code).toBe('FLUSH_IN_DOUBT');
    expect(failure.message).toContain('write them again');
    await client.write(0, Buffer.alloc(4));
    await client.flush();
    await client.flush();
  });

  test('all flushes that were pending, or asked before the first has failed, fail', async () => {
    const { path, types } = await losing(1);
    const client = await connected(path);
    await client.write(0, Buffer.alloc(4));
    await until(() => !client.isConnected, 'the loss is noticed');
    const failures = [client.flush(), client.flush()].map(failureOf);
    for (const failure of failures) expect((await failure).code).toBe('FLUSH_IN_DOUBT');
    await client.flush();
    expect(types[1]).toEqual([CMD.FLUSH]);
  });

  test('a flush that is in flight at the loss is not repeated as if nothing had happened', async () => {
    const path = await fakeServer(async (peer, connection) => {
      await letIn(peer, { flags: FLAGS });
      reply(peer, await hear(peer));
      await hear(peer);
      if (connection === 0) peer.halfClose();
    });
    const client = await connected(path);
    await client.write(0, Buffer.alloc(4));
    expect((await failureOf(client.flush())).code).toBe('FLUSH_IN_DOUBT');
  });

  test('nothing is in doubt after a flush, after writes with FUA, or after reads only', async () => {
    const { path, types } = await losing(2, 1, 1);
    const client = await connected(path);
    await client.write(0, Buffer.alloc(4));
    await client.flush();
    await until(() => !client.isConnected, 'the first loss is noticed');
    await client.write(0, Buffer.alloc(4), { fua: true });
    await until(() => types.length === 2 && !client.isConnected, 'the second loss is noticed');
    await client.read(0, 4);
    await until(() => types.length === 3 && !client.isConnected, 'the third loss is noticed');
    await client.flush();
    expect(types[3]).toEqual([CMD.FLUSH]);
  });

  test('a write that was repeated is covered by the next flush', async () => {
    const path = await fakeServer(async (peer, connection) => {
      await letIn(peer, { flags: FLAGS });
      const write = await hear(peer);
      if (connection === 0) {
        peer.halfClose();
        return;
      }
      reply(peer, write);
      reply(peer, await hear(peer));
    });
    const client = await connected(path);
    await client.write(0, Buffer.alloc(4));
    await client.flush();
  });
});

describe('its end', () => {
  test('the first connection is not repeated', async () => {
    const path = join(await temporaryDirectory(), 'nobody.sock');
    expect((await failureOf(ReconnectingClient.connect({ path, reconnect: FAST }))).code).toBe('CLOSED');
    const server = await Restartable.start();
    const wrong = ReconnectingClient.connect({ path: server.path, exportName: 'nothing', reconnect: FAST });
    expect((await failureOf(wrong)).code).toBe('UNKNOWN_EXPORT');
  });

  test('after the attempts everything fails with one error, now and later', async () => {
    const server = await Restartable.start();
    const client = await connected(server.path, { reconnect: { ...FAST, attempts: 3 } });
    server.crash();
    await until(() => !client.isConnected, 'the loss is noticed');
    const failures = await Promise.all([client.read(0, 4), client.flush()].map(failureOf));
    expect(failures[0]?.message).toContain('3 attempts to reconnect have failed; the last one: cannot connect to');
    expect(failures[1]).toBe(failures[0]);
    expect(await failureOf(client.read(0, 4))).toBe(failures[0]);
    expect(await client.closed).toBe(failures[0]);
    await client.disconnect();
  });

  for (const { what, geometry } of [
    { what: 'size', geometry: { size: 2 * DISK_SIZE } },
    { what: 'readOnly', geometry: { readOnly: true } },
    { what: 'minimumBlockSize', geometry: { minimumBlockSize: 512 } },
    { what: 'context base:allocation', geometry: { contexts: [] } },
  ]) {
    test(`an export with another ${what} ends it with EXPORT_CHANGED`, async () => {
      const server = await Restartable.start();
      const client = await connected(server.path);
      server.crash();
      await until(() => !client.isConnected, 'the loss is noticed');
      await server.start(new TestProvider([new TestExport('disk', geometry)]));
      const failure = await failureOf(client.write(0, Buffer.alloc(512)));
      expect(failure.code).toBe('EXPORT_CHANGED');
      expect(failure.message).toContain(what);
      expect(await client.closed).toBe(failure);
    });
  }

  test('an export that is refused for a while is tried again', async () => {
    const server = await Restartable.start();
    const client = await connected(server.path);
    let refusals = 0;
    server.provider.openHook = () => {
      if (refusals++ < 3) throw new DeviceError('EIO', 'not yet');
    };
    server.crash();
    await server.start();
    expect(await client.read(4, 4)).toEqual(uint32(5));
    expect(refusals).toBe(4);
  });

  test('a server that violates the protocol ends it', async () => {
    const path = await fakeServer(async (peer) => {
      await letIn(peer);
      await hear(peer);
      peer.send(Buffer.alloc(16, 0xee));
    });
    const client = await connected(path);
    expect((await failureOf(client.read(0, 4))).code).toBe('PROTOCOL');
    expect((await client.closed).code).toBe('PROTOCOL');
  });

  test('disconnect() while it waits ends it at once, and a signal ends one request', async () => {
    const server = await Restartable.start();
    const client = await connected(server.path, { reconnect: { delayMs: 60_000, maxDelayMs: 60_000 } });
    server.crash();
    await until(() => !client.isConnected, 'the loss is noticed');
    const controller = new AbortController();
    const aborted = failureOf(client.read(0, 4, { signal: controller.signal }));
    const waiting = failureOf(client.read(0, 4));
    controller.abort();
    expect((await aborted).code).toBe('ABORTED');
    expect(getEventListeners(controller.signal, 'abort')).toHaveLength(0);
    await client.disconnect();
    expect(await waiting).toMatchObject({ code: 'CLOSED', message: 'this client has disconnected' });
    expect((await client.closed).message).toBe('this client has disconnected');
  });

  test('disconnect() with a connection answers what is in flight, and says goodbye', async () => {
    const server = await Restartable.start();
    const client = await connected(server.path);
    const gate = new Gate();
    server.provider.hook = () => gate.opened;
    const read = client.read(4, 4);
    await until(() => server.provider.unfinished === 1, 'a read is in flight');
    const gone = client[Symbol.asyncDispose]();
    gate.open();
    expect(await read).toEqual(uint32(5));
    await gone;
    expect((await failureOf(client.flush())).message).toBe('this client has disconnected');
    await until(() => server.provider.endings.length === 1, 'the device is closed');
    expect(server.provider.endings).toEqual(['disconnect']);
  });

  test('wrong options and arguments are refused', async () => {
    const { path } = await Restartable.start();
    const refused = async (more: object, type: new () => Error): Promise<void> => {
      await expect(ReconnectingClient.connect({ path, ...more })).rejects.toBeInstanceOf(type);
    };
    await refused({ reconnect: { attempts: -1 } }, RangeError);
    await refused({ reconnect: { attempts: 0.5 } }, RangeError);
    await refused({ reconnect: { delayMs: NaN } }, RangeError);
    await refused({ reconnect: { maxDelayMs: '1' } }, TypeError);
    await refused({ socket: {} }, TypeError);
    await refused({ exportName: 1 }, TypeError);
    await refused({ reconnect: null }, TypeError);
    await refused({ reconnect: { onLost: 5 } }, TypeError);
    await expect(ReconnectingClient.connect(undefined as never)).rejects.toThrow('the options of connect() must be an');
    const client = await connected(path);
    await expect(client.write(0, 'é' as never)).rejects.toBeInstanceOf(TypeError);
    expect((await failureOf(client.read(DISK_SIZE, 1))).code).toBe('EINVAL');
  });

  test('no contexts are selected if none are wanted', async () => {
    const { path } = await Restartable.start();
    expect((await connected(path)).contexts).toEqual(['base:allocation']);
    expect((await connected(path, { contexts: [] })).contexts).toEqual([]);
  });

  test('an errno of the server that means nothing else is still an answer', async () => {
    const path = await fakeServer(async (peer) => {
      await letIn(peer);
      reply(peer, await hear(peer), undefined, NBD_ERRNO.EIO);
    });
    expect((await failureOf((await connected(path)).read(0, 4))).code).toBe('EIO');
  });
});
