/** `createServer`: many exports from one function; what clients see that ask, list or leave, and who gets what under TLS. */

import { execFile } from 'node:child_process';
import { join } from 'node:path';
import tls from 'node:tls';
import { promisify } from 'node:util';
import { expect, onTestFinished, test } from 'vitest';
import {
  createServer,
  ExportError,
  NbdClient,
  shared,
  type CreateServerOptions,
  type Device,
  type ExportRequest,
  type ListedExports,
  type NbdServer,
  type ServerObserver,
} from '../src/index.js';
import { OPT, REP } from '../src/protocol/wire.js';
import { duplexPair } from './duplex-pair.js';
import { infoQuery, RawClient } from './raw-client.js';
import { Gate } from './test-device.js';
import { temporaryDirectory, until } from './test-server.js';

const run = promisify(execFile);
const SIZE = 64 * 1024;

/** Notes which devices are opened and closed; each has a size of its own. */
class Disks {
  readonly events: string[] = [];
  readonly requests: ExportRequest[] = [];
  #count = 0;

  readonly open = (name: string, request: ExportRequest): Device => {
    const id = `${name}${++this.#count}`;
    this.events.push(`open ${id}`);
    this.requests.push(request);
    return {
      size: SIZE * this.#count,
      read: (_, into) => void into.fill(this.#count),
      close: (ending) => void this.events.push(`close ${id} ${ending}`),
      extents: (_, offset, length, sink) => void sink(offset, length, 0),
    };
  };
}

interface Started {
  readonly server: NbdServer;
  readonly path: string;
  readonly uri: (name: string) => string;
  readonly reported: unknown[];
  client(): Promise<NbdClient>;
}

async function started(options: CreateServerOptions): Promise<Started> {
  const path = join(await temporaryDirectory(), 'nbd.sock');
  const reported: unknown[] = [];
  const observer: ServerObserver = { onError: (error) => reported.push(error) };
  const server = createServer({ observer, ...options });
  onTestFinished(() => server.destroy());
  await server.listen(`nbd+unix:///?socket=${path}`);
  const uri = (name: string): string => `nbd+unix:///${name}?socket=${path}`;
  const client = async (): Promise<NbdClient> => {
    const connected = await NbdClient.connect({ path });
    onTestFinished(() => connected.destroy());
    return connected;
  };
  return { server, path, uri, reported, client };
}

test('a device for each connection', async () => {
  const disks = new Disks();
  const { server, client } = await started({ exports: disks.open });
  const [first, second] = [await client(), await client()];
  expect(await first.go('a')).toMatchObject({ size: SIZE, readOnly: true, multiConn: false });
  expect(await second.go('a')).toMatchObject({ size: 2 * SIZE });
  expect(disks.requests[0]?.peer).toMatchObject({ transport: 'unix' });
  await first.disconnect();
  second.destroy();
  await server.close();
  expect(disks.events.slice(0, 2)).toEqual(['open a1', 'open a2']);
  expect(disks.events.slice(2).sort()).toEqual(['close a1 disconnect', 'close a2 lost']);
});

test('a full device, and answers that come later', async () => {
  const full = {
    geometry: { size: SIZE, canFua: true, multiConn: true },
    read: () => undefined,
    write: () => undefined,
    flush: () => undefined,
    close: () => undefined,
  };
  const { client } = await started({ exports: (name) => Promise.resolve(name === 'full' ? full : null) });
  expect(await (await client()).go('full')).toMatchObject({ size: SIZE, canFua: true, multiConn: true });
  await expect((await client()).go('b')).rejects.toThrow('there is no export "b"');
});

test('no device: null, undefined, an ExportError returned or thrown', async () => {
  const refused = new ExportError('POLICY', 'not for you');
  const { client, reported } = await started({
    exports: (name) => {
      if (name === 'null') return null;
      if (name === 'returned') return refused;
      if (name === 'later') return Promise.reject(refused);
      if (name === 'thrown') throw refused;
      return undefined;
    },
  });
  const asking = await client();
  for (const name of ['null', 'undefined', '']) {
    await expect(asking.info(name)).rejects.toMatchObject({ message: expect.stringContaining('no export') as unknown });
  }
  for (const name of ['returned', 'later', 'thrown']) await expect(asking.go(name)).rejects.toThrow('not for you');
  expect(reported).toEqual([]);
});

test('other errors, and what is no device, are reported and not told', async () => {
  const bug = new TypeError('secret path');
  const wrong: Record<string, unknown> = {
    returned: bug,
    true: true,
    shapeless: {},
    size: { size: NaN, read: () => undefined },
    function: () => undefined,
  };
  const { client, reported } = await started({
    exports: (name) => {
      if (name === 'thrown') throw bug;
      return wrong[name] as Device;
    },
  });
  const asking = await client();
  for (const name of ['thrown', ...Object.keys(wrong)]) {
    await expect(asking.go(name)).rejects.toThrow('the export cannot be opened: internal error');
  }
  expect(reported.slice(0, 2)).toEqual([bug, bug]);
  // The client asks for each twice: what it is, then to open it.
  expect([...new Set(reported.map((error) => (error as Error).message))].slice(1)).toEqual([
    'export "true" cannot be served: it is a boolean, and a device is an object',
    'export "shapeless" cannot be served: it is an object without a method read',
    'export "size" cannot be served: size NaN is not an integer from 0 to 2^53-1',
    'export "function" cannot be served: it is a function; createServer takes a function that gives a device',
  ]);
});

test('a device that cannot be served is closed again', async () => {
  let [opened, closed] = [0, 0];
  const exports = (): Device => {
    opened++;
    return { size: -1, read: () => undefined, close: () => void closed++ };
  };
  const { client } = await started({ exports });
  await expect((await client()).go('a')).rejects.toThrow('internal error');
  expect(opened).toBeGreaterThan(0);
  expect(closed).toBe(opened);
});

test('a client that asks first gets the device that was described', async () => {
  const disks = new Disks();
  const { server, client } = await started({ exports: disks.open });
  const asking = await client();
  expect(await asking.info('a')).toMatchObject({ size: SIZE });
  expect(await asking.info('a')).toMatchObject({ size: SIZE });
  await asking.selectContexts('a', ['base:allocation']);
  expect(await asking.go('a')).toMatchObject({ size: SIZE });
  expect(await asking.blockStatus('base:allocation', 0, 512)).toBeDefined();
  expect(disks.events).toEqual(['open a1']);
  await asking.disconnect();
  await server.close();
  expect(disks.events).toEqual(['open a1', 'close a1 disconnect']);
});

test('at most one described device is kept for a connection', async () => {
  const disks = new Disks();
  const { server, client } = await started({ exports: disks.open });
  const asking = await client();
  for (const name of ['a', 'b', 'a']) await asking.info(name);
  expect(disks.events).toEqual(['open a1', 'close a1 disconnect', 'open b2', 'close b2 disconnect', 'open a3']);
  await asking.go('c');
  expect(disks.events.slice(5)).toEqual(['close a3 disconnect', 'open c4']);
  await asking.disconnect();
  const leaving = await client();
  await leaving.info('d');
  leaving.destroy();
  await server.close();
  expect(disks.events.at(-1)).toBe('close d5 disconnect');
  expect(disks.events).toHaveLength(10);
});

test('a described device is closed if its client is refused another, and after an error of its own', async () => {
  const disks = new Disks();
  const { server, client, reported } = await started({
    exports: (name, request) => {
      if (name === 'none') return null;
      const device = disks.open(name, request);
      return name === 'dirty' ? { ...device, close: () => Promise.reject(new Error('still dirty')) } : device;
    },
  });
  const asking = await client();
  await asking.info('a');
  await expect(asking.go('none')).rejects.toThrow('no export');
  expect(disks.events).toEqual(['open a1', 'close a1 disconnect']);
  await asking.info('dirty');
  await asking.disconnect();
  await server.close();
  expect(reported).toMatchObject([{ message: 'still dirty' }]);
});

test('a device that is opened for a description after the client has left is closed', async () => {
  const disks = new Disks();
  const gate = new Gate();
  let isAsked = false;
  const { server, client } = await started({
    exports: async (name, request) => {
      isAsked = true;
      await gate.opened;
      return disks.open(name, request);
    },
  });
  const asking = await client();
  const asked = asking.info('a').catch(() => undefined);
  await until(() => isAsked, 'it is asked');
  asking.destroy();
  await asked;
  gate.open();
  await until(() => disks.events.length === 2, 'it is closed');
  await server.close();
  expect(disks.events).toEqual(['open a1', 'close a1 disconnect']);
});

test('`exports` gets the id of the connection, and a signal that is aborted when the client has gone', async () => {
  const disks = new Disks();
  const { server, client } = await started({ exports: disks.open });
  const asking = await client();
  await asking.info('a');
  const [id] = server.connections.keys();
  const [request] = disks.requests;
  expect(request).toMatchObject({ id, peer: { transport: 'unix' } });
  expect(request?.signal.aborted).toBe(false);
  asking.destroy();
  await until(() => request?.signal.aborted === true, 'it is aborted');
});

test('a shared device that is being opened is given up when its client leaves', async () => {
  let signal: AbortSignal | undefined;
  const { client } = await started({
    exports: shared(async (_, about) => {
      signal = about.signal;
      await new Promise((resolve) => about.signal.addEventListener('abort', resolve));
      throw about.signal.reason;
    }),
  });
  const opening = await client();
  const opened = opening.go('a').catch(() => undefined);
  await until(() => signal !== undefined, 'it is being opened');
  opening.destroy();
  await opened;
  await until(() => signal?.aborted === true, 'the opening is aborted');
});

test('without a list clients are told so, and can open what they name', async () => {
  const { uri } = await started({
    exports: (name, request) => (name === 'a' ? new Disks().open(name, request) : null),
  });
  await expect(
    run('qemu-nbd', ['--list', '-k', new URL(uri('')).searchParams.get('socket') ?? '']),
  ).rejects.toMatchObject({ stderr: expect.stringContaining('this server does not list its exports') as unknown });
  const { stdout } = await run('nbdinfo', ['--size', uri('a')]);
  expect(stdout.trim()).toBe(String(SIZE));
});

test.each<readonly [string, ListedExports]>([
  ['an array', ['a', { name: 'b', description: 'the second' }]],
  ['a set', new Set(['a', { name: 'b', description: 'the second' }])],
  ['an iterator', ['a', { name: 'b', description: 'the second' }].values()],
  ['a function', () => ['a', { name: 'b', description: 'the second' }]],
  ['an async function', () => Promise.resolve(new Set(['a', { name: 'b', description: 'the second' }]))],
])('a list from %s', async (_, list) => {
  const { client, uri } = await started({ exports: new Disks().open, list });
  const expected = [
    { name: 'a', description: '' },
    { name: 'b', description: 'the second' },
  ];
  expect(await (await client()).list()).toEqual(expected);
  expect(await (await client()).list()).toEqual(expected);
  const { stdout } = await run('nbdinfo', ['--list', '--json', uri('')]);
  const shown = (JSON.parse(stdout) as { exports: unknown[] }).exports;
  expect(shown).toHaveLength(2);
  expect(shown).toContainEqual(expect.objectContaining({ 'export-name': 'b' }));
});

test('a description is shown with the opened export', async () => {
  const { client } = await started({ exports: new Disks().open, list: [{ name: 'a', description: 'the first' }] });
  expect(await (await client()).go('a')).toMatchObject({ description: 'the first' });
});

test('wrong options are refused at once, wrong lists of functions reported', async () => {
  const exports = (): null => null;
  const created = (options: unknown) => () => createServer(options as CreateServerOptions);
  expect(created({})).toThrow(
    'createServer: exports is undefined, not a function (name, { peer, id, signal }) => device',
  );
  expect(created({ exports: {} })).toThrow(TypeError);
  expect(created({ exports, list: 'abc' })).toThrow('list is a string, not an array');
  expect(created({ exports, list: Promise.resolve([]) })).toThrow(
    'list is a promise, not an array or another iterable',
  );
  expect(created({ exports, list: ['a', 5] })).toThrow('list has a number, which is neither a name');
  expect(created({ exports, list: [{ name: 5 }] })).toThrow(TypeError);
  const { client, reported } = await started({ exports, list: () => 'abc' });
  await expect((await client()).list()).rejects.toThrow('internal error');
  expect(reported).toMatchObject([{ message: 'list is a string, not an array or another iterable of names' }]);
});

test('`exports` may be a method that uses its object', async () => {
  class Store implements CreateServerOptions {
    readonly size = SIZE;
    exports(): Device {
      return { size: this.size, read: () => undefined };
    }
  }
  const path = join(await temporaryDirectory(), 'nbd.sock');
  const server = createServer(new Store());
  onTestFinished(() => server.destroy());
  await server.listen({ path });
  const client = await NbdClient.connect({ path });
  expect(await client.go('a')).toMatchObject({ size: SIZE });
  await client.disconnect();
});

test('many exports by TLS identity', async () => {
  const keys = new Map([
    ['alice', Buffer.alloc(16, 1)],
    ['bob', Buffer.alloc(16, 2)],
  ]);
  const disks = new Disks();
  const server = createServer({
    tls: { mode: 'require', material: () => ({ verifyPeer: false, pskKey: (user) => keys.get(user) }) },
    exports: (name, request) => {
      const user = request.peer.tls?.pskUser;
      if (user === undefined || !name.startsWith(`${user}/`)) return new ExportError('POLICY', 'not your disk');
      return disks.open(name, request);
    },
  });
  onTestFinished(() => server.destroy());
  const bound = await server.listen('nbds://127.0.0.1:0');
  if (bound.transport !== 'tcp') throw new Error('no port');
  const as = async (user: string): Promise<NbdClient> => {
    const psk = { user, key: keys.get(user) ?? Buffer.alloc(16) };
    const client = await NbdClient.connect({ host: bound.host, port: bound.port, tls: { psk } });
    onTestFinished(() => client.destroy());
    return client;
  };
  const alice = await as('alice');
  await alice.info('alice/disk');
  expect(await alice.go('alice/disk')).toMatchObject({ size: SIZE });
  const bob = await as('bob');
  await expect(bob.go('alice/disk')).rejects.toThrow('not your disk');
  expect(await bob.go('bob/disk')).toMatchObject({ size: 2 * SIZE });
  expect(disks.events).toEqual(['open alice/disk1', 'open bob/disk2']);
});

test('a described device is not kept over the beginning of TLS', async () => {
  const key = Buffer.alloc(16, 1);
  const disks = new Disks();
  const asked: (string | undefined)[] = [];
  const server = createServer({
    tls: { mode: 'on', material: () => ({ verifyPeer: false, pskKey: () => key }) },
    exports: (name, request) => {
      asked.push(request.peer.tls?.pskUser);
      return disks.open(name, request);
    },
  });
  onTestFinished(() => server.destroy());
  const path = join(await temporaryDirectory(), 'nbd.sock');
  await server.listen({ path });
  const raw = await RawClient.connect({ path });
  await raw.greet();
  await raw.option(OPT.INFO, infoQuery('a'));
  expect(disks.events).toEqual(['open a1']);
  expect((await raw.option(OPT.STARTTLS)).map(({ type }) => type)).toEqual([REP.ACK]);
  raw.socket.removeAllListeners('data').removeAllListeners('end');
  const secure = tls.connect({
    ...{ socket: raw.socket, ciphers: 'TLS_AES_128_GCM_SHA256', minVersion: 'TLSv1.3' },
    pskCallback: () => ({ psk: key, identity: 'alice' }),
    checkServerIdentity: () => undefined,
  });
  const inTls = new RawClient(secure);
  await new Promise((resolve, reject) => secure.once('secureConnect', resolve).once('error', reject));
  await inTls.option(OPT.INFO, infoQuery('a'));
  expect(disks.events).toEqual(['open a1', 'close a1 disconnect', 'open a2']);
  expect(asked).toEqual([undefined, 'alice']);
  await server.close();
  expect(disks.events).toEqual(['open a1', 'close a1 disconnect', 'open a2', 'close a2 disconnect']);
});

test('connections that were given with one peer object do not share what they asked about', async () => {
  const disks = new Disks();
  const server = createServer({ exports: disks.open });
  onTestFinished(() => server.destroy());
  const peer = { transport: 'internal', address: 'a program' } as const;
  const clients = await Promise.all(
    [0, 1].map(async () => {
      const pair = duplexPair();
      server.serveConnection(pair.server, { peer });
      return NbdClient.connect({ socket: pair.client });
    }),
  );
  const sizes = await Promise.all(clients.map(async (client) => (await client.info('x')).size));
  expect(new Set(sizes).size).toBe(2);
  expect(await Promise.all(clients.map(async (client) => (await client.go('x')).size))).toEqual(sizes);
  for (const client of clients) client.destroy();
  await until(() => disks.events.filter((event) => event.startsWith('close')).length === 2, 'both are closed');
});
