/**
 * Disks that are opened exclusively, without a daemon: which client may write, the messages for clients and the log, and that no
 * request of an old connection has an effect once a new writer is admitted. The NBD server and the store are real, in this
 * process; the tests choose the pids that distinguish clients.
 */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { NbdClient, NbdServer, type ExportDetails, type Peer, type PeerCredentials } from 'nbd-server-ts';
import { ServerConnections } from '../../src/daemon/server-connections.js';
import { AuthorisedExports, type Access } from '../../src/export/authorised-exports.js';
import { VdiExports, type ExportsOptions } from '../../src/export/vdi-exports.js';
import { LocalStore } from '../../src/store/local/local-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { lookAtProcess } from '../../src/system/process-identity.js';
import type { Vdi } from '../../src/vdi/vdi.js';
import { CMD } from '../../nbd/src/protocol/wire.js';
import { RawClient } from '../../nbd/test/raw-client.js';
import { waitUntil } from '../harness/daemon.js';

const SIZE = 64 * 2 ** 20;
const BLOCK = 4096;
const OBJECT = 4 * 2 ** 20;
/** Above every pid that Linux gives. */
const NO_PROCESS = 2 ** 23;
const ME: PeerCredentials = {
  ...{ pid: process.pid, uid: 0, gid: 0, command: 'me' },
  startTime: lookAtProcess(process.pid)?.startTime ?? 0,
};

let directory: string;
let catalog: VdiCatalog;
let exports: VdiExports;
let server: NbdServer;
let log: string[];
let clients: NbdClient[];
/** The client that connects next. */
let next: PeerCredentials;
let access: Access | undefined;
/** What each client got when it opened its export. */
const details = new WeakMap<NbdClient, ExportDetails>();

async function serve(options: ExportsOptions = {}): Promise<void> {
  exports = new VdiExports(catalog, { ...options, serves: true, log: (line) => void log.push(line) });
  const guarded = new AuthorisedExports(exports, { decide: () => access ?? 'read-write' });
  server = new NbdServer({ provider: guarded, peerCredentials: () => next });
  exports.writers.connected = new ServerConnections(server);
  await server.listen({ path: path.join(directory, 'nbd.sock') });
}

beforeEach(async () => {
  directory = fs.mkdtempSync(path.join(os.tmpdir(), 'sheepgate-exclusive-'));
  log = [];
  clients = [];
  access = undefined;
  next = ME;
  catalog = new VdiCatalog(await LocalStore.open(path.join(directory, 'store'), { mayCreate: true }));
  await catalog.create('disk', SIZE);
});

afterEach(async () => {
  for (const client of clients) client.destroy();
  await server.close();
  await catalog.close();
  fs.rmSync(directory, { recursive: true, force: true });
});

/** A process that does not run, for each number another one. */
function gone(number: number): PeerCredentials {
  return { pid: NO_PROCESS + number, uid: 0, gid: 0, startTime: number, command: `client${number}` };
}

async function connect(name: string, who: PeerCredentials = ME): Promise<NbdClient> {
  next = who;
  const client = await NbdClient.connect({ path: path.join(directory, 'nbd.sock') });
  clients.push(client);
  details.set(client, await client.go(name));
  return client;
}

/** What the access rules let the client do. */
function mayOf(client: NbdClient): string {
  return wordsOf(details.get(client));
}

function wordsOf({ readOnly, multiConn }: Partial<ExportDetails> = {}): string {
  return `${readOnly ? 'reads' : 'writes'}${multiConn ? ', as one of several' : ''}`;
}

async function mayDo(name: string, who: PeerCredentials = ME): Promise<string> {
  return mayOf(await connect(name, who));
}

function holders(): string[] {
  return exports.writers.of('disk').map(({ client, isExclusive }) => `${client}${isExclusive ? ' alone' : ''}`);
}

async function byteAt(offset: number): Promise<number> {
  const vdi = await catalog.openVdi('disk');
  const block = Buffer.alloc(1);
  await vdi.read(offset, block);
  await catalog.release(vdi);
  return block[0] ?? -1;
}

/** Keep all writes of the disk outside until `open` is called. */
async function closeGate(): Promise<{ vdi: Vdi; open: () => Promise<void> }> {
  const vdi = await catalog.openVdi('disk');
  let letGo: () => void = () => undefined;
  const isHeld = new Promise<void>((resolve) => {
    void vdi.withWritersHeld(async () => {
      resolve();
      await new Promise<void>((end) => (letGo = end));
    });
  });
  await isHeld;
  return {
    vdi,
    open: async () => {
      letGo();
      await catalog.release(vdi);
    },
  };
}

describe('one connection writes', () => {
  test('the others read, none gets multi-conn, and once it has left another may write', async () => {
    await serve();
    const first = await connect('disk/exclusive', gone(1));
    expect(mayOf(first)).toBe('writes');
    await first.write(0, Buffer.alloc(BLOCK, 1));
    for (const name of ['disk/exclusive', 'disk', 'disk/exclusive=read-only', '@=d%69sk/exclusive']) {
      expect(await mayDo(name, gone(2)), name).toBe('reads');
    }
    const reader = clients.at(-1) as NbdClient;
    const block = Buffer.alloc(BLOCK);
    await reader.readInto(0, block);
    expect(block[0]).toBe(1);
    await expect(reader.write(0, block)).rejects.toThrow(/EPERM|read-only/i);
    // Repeated lines are dropped by the daemon, not here.
    expect([...new Set(log)].filter((line) => line.includes('disk is read-only for'))).toEqual([
      `disk is read-only for process ${NO_PROCESS + 2} (client2): only one client may write it, and process ${NO_PROCESS + 1} (client1) has it open for writing`,
    ]);
    expect(holders()).toEqual([`process ${NO_PROCESS + 1} (client1) alone`]);
    // At once: the server may see its socket closed later than the client.
    await first.disconnect();
    const second = await connect('disk/exclusive', gone(3));
    expect(mayOf(second)).toBe('writes');
    // A client that was admitted as a reader stays read-only.
    await expect(reader.write(0, block)).rejects.toThrow();
    await second.disconnect();
    expect(await mayDo('disk', gone(4))).toBe('writes, as one of several');
  });

  test('a client that finds another writer, exclusive or not, reads, or is refused with a message that names the writer', async () => {
    await serve();
    const plain = await connect('disk', gone(1));
    expect(mayOf(plain)).toBe('writes, as one of several');
    expect(await mayDo('disk', gone(2))).toBe('writes, as one of several');
    expect(await mayDo('disk/exclusive', gone(3))).toBe('reads');
    await expect(connect('disk/exclusive=refuse', gone(3))).rejects.toThrow(
      /disk is open for writing by process \d+ \(client1\), and by 1 more, and only one client may write it/,
    );
    for (const client of clients.splice(0)) await client.disconnect();
    const owner = await connect('disk/exclusive=refuse', gone(4));
    expect(mayOf(owner)).toBe('writes');
    // The owner's option counts for clients that give none.
    for (const name of ['disk', 'disk/exclusive']) {
      await expect(connect(name, gone(5)), name).rejects.toThrow(/by process \d+ \(client4\)/);
    }
    expect(await mayDo('disk/exclusive=read-only', gone(5))).toBe('reads');
    expect(await mayDo('disk@now', gone(5))).toBe('reads, as one of several');
  });

  test('the server’s option counts for all disks, an access rule for one client; snapshots and readers are not affected', async () => {
    await serve({ exclusive: 'refuse' });
    await catalog.snapshot('disk', 'monday');
    const first = await connect('disk', gone(1));
    expect(mayOf(first)).toBe('writes');
    await expect(connect('disk', gone(2))).rejects.toThrow(/client1/);
    expect(await mayDo('disk/exclusive=read-only', gone(2))).toBe('reads');
    for (const name of ['disk@monday', 'disk@now']) expect(await mayDo(name, gone(2))).toBe('reads, as one of several');
    access = 'exclusive=read-only';
    expect(await mayDo('disk', gone(2))).toBe('reads');
    access = 'read-only';
    expect(await mayDo('disk', gone(2))).toBe('reads, as one of several');
    await first.disconnect();
    // Readers keep no writer out.
    access = 'exclusive';
    expect(await mayDo('disk', gone(3))).toBe('writes');
    for (const name of ['disk@monday/exclusive', 'disk@now/exclusive', '@1/exclusive']) {
      await expect(connect(name), name).rejects.toThrow(/exclusive needs a VDI that can be written/);
    }
  });

  test('INFO reports what opening would give, and does not keep others from writing', async () => {
    await serve();
    const ask = async (name: string): Promise<string> => {
      const asking = await NbdClient.connect({ path: path.join(directory, 'nbd.sock') });
      clients.push(asking);
      return wordsOf(await asking.info(name));
    };
    expect(await ask('disk/exclusive')).toBe('writes');
    expect(await mayDo('disk/exclusive', gone(1))).toBe('writes');
    expect(await ask('disk/exclusive')).toBe('reads');
    expect(await ask('disk')).toBe('reads');
    // Tools that list all exports query each: a disk in use must not fail.
    expect(await ask('disk/exclusive=refuse')).toBe('reads');
    expect(log.filter((line) => line.includes('cannot be opened'))).toEqual([]);
  });

  test('our own commands keep no writer out and do not wait for one, and do not write beside an exclusive writer', async () => {
    await serve({ exclusive: 'refuse' });
    const command: Peer = { transport: 'internal', address: 'command line' };
    const early = await exports.open('disk', command);
    const owner = await connect('disk', gone(1));
    expect(mayOf(owner)).toBe('writes');
    const late = await exports.open('disk', command);
    for (const { device } of [early, late]) {
      await device.read(0, Buffer.alloc(BLOCK));
      expect(() => device.write(0, Buffer.alloc(BLOCK, 9), false)).toThrow(
        /open exclusively by process \d+ \(client1\)/,
      );
    }
    await owner.disconnect();
    await waitUntil(() => holders().length === 0, 'the owner has left');
    await late.device.write(0, Buffer.alloc(BLOCK, 9), false);
    // Now it does write.
    await expect(connect('disk', gone(2))).rejects.toThrow(/by a command/);
    await early.device.close('disconnect');
    await late.device.close('disconnect');
    expect(await mayDo('disk', gone(3))).toBe('writes');
  });
});

describe('no request of an old connection has an effect once another client may write', () => {
  /** Writes that wait at the gate, more than run at a time, the last one half sent. */
  async function busyWriter(name: string): Promise<NbdClient> {
    const old = await connect(name, gone(1));
    for (let n = 0; n < 300; n++) {
      old.write((n % 16) * OBJECT, Buffer.alloc(BLOCK, 7)).catch(() => undefined);
    }
    const [connection] = server.connections.values();
    await waitUntil(() => (connection?.inFlight ?? 0) >= 256, 'its writes wait');
    return old;
  }

  async function isTakenOverIntact(): Promise<void> {
    const held = await closeGate();
    await busyWriter('disk/exclusive');
    let isIn = false;
    const coming = connect('disk/exclusive=take-over', gone(2)).then((client) => {
      isIn = true;
      return client;
    });
    await waitUntil(() => log.some((line) => line.includes('did not answer and is cut off')), 'the old one is cut off');
    await new Promise((resolve) => setImmediate(resolve));
    expect(isIn).toBe(false);
    await held.open();
    const newcomer = await coming;
    expect(mayOf(newcomer)).toBe('writes');
    // From here on only the new client writes.
    for (let n = 0; n < 16; n++) await newcomer.write(n * OBJECT, Buffer.alloc(BLOCK, 8));
    await newcomer.flush();
    for (let n = 0; n < 16; n++) expect(await byteAt(n * OBJECT), `object ${n}`).toBe(8);
    expect(holders()).toEqual([`process ${NO_PROCESS + 2} (client2) alone`]);
    expect(server.connections.size).toBe(1);
  }

  test('after a take-over while writes to the same objects wait at the gate', async () => {
    await serve();
    await isTakenOverIntact();
  });

  test('of many writers that are gone, all end before the client that takes over is admitted', async () => {
    await serve();
    const held = await closeGate();
    for (const number of [1, 2, 3]) {
      const old = await connect('disk', gone(number));
      old.write(0, Buffer.alloc(BLOCK, number)).catch(() => undefined);
    }
    await waitUntil(() => [...server.connections.values()].every(({ inFlight }) => inFlight === 1), 'all are writing');
    const coming = connect('disk/exclusive=take-over', gone(4));
    await waitUntil(() => log.filter((line) => line.includes('is cut off')).length === 3, 'all are cut off');
    await held.open();
    expect(mayOf(await coming)).toBe('writes');
    expect(holders()).toHaveLength(1);
  });

  test('after a goodbye, or a close, with requests in flight: the next client waits for their end', async () => {
    await serve({ exclusive: 'refuse' });
    for (const how of ['goodbye', 'closed'] as const) {
      const held = await closeGate();
      const old = await connect('disk', gone(1));
      old.write(0, Buffer.alloc(BLOCK, 5)).catch(() => undefined);
      const [connection] = server.connections.values();
      await waitUntil(() => connection?.inFlight === 1, 'it is in flight');
      if (how === 'goodbye') void old.disconnect();
      else old.destroy();
      let isIn = false;
      const coming = connect('disk', gone(2)).then((client) => {
        isIn = true;
        return client;
      });
      await waitUntil(() => server.connections.size === 2, 'the next one is here');
      await waitUntil(() => connection?.phase === 'closing', 'the old one is seen to end');
      expect(isIn).toBe(false);
      await held.open();
      const newcomer = await coming;
      expect(mayOf(newcomer), how).toBe('writes');
      await newcomer.write(0, Buffer.alloc(BLOCK, 6));
      expect(await byteAt(0)).toBe(6);
      await newcomer.disconnect();
      await waitUntil(() => server.connections.size === 0, 'all have left');
    }
  });

  test('after the operator cut it off: it is kept out for a time, on all its connections, and its requests in flight are not written', async () => {
    await serve();
    const held = await closeGate();
    const old = await busyWriter('disk');
    const [connection] = server.connections.values();
    if (connection === undefined) throw new Error('no connection');
    exports.writers.keepOut(connection.peer, 60_000);
    const over = server.disconnect(connection.id, 'disconnected by the operator');
    await expect(connect('disk', gone(1))).rejects.toThrow(
      /client1\) was disconnected from disk at .* kept out for 60 s/,
    );
    await expect(connect('disk/exclusive', gone(1))).rejects.toThrow(/kept out/);
    expect(await mayDo('disk@now', gone(1))).toBe('reads, as one of several');
    // Also a connection without "exclusive".
    let isIn = false;
    const plain = connect('disk', gone(2)).then((client) => {
      isIn = true;
      return client;
    });
    await waitUntil(() => server.connections.size >= 4, 'another one comes');
    await new Promise((resolve) => setImmediate(resolve));
    expect(isIn).toBe(false);
    await held.open();
    await over;
    await (await plain).disconnect();
    old.destroy();
    expect(await mayDo('disk/exclusive', gone(2))).toBe('writes');
  });

  test('a fenced device writes nothing', async () => {
    await serve();
    const peer: Peer = { transport: 'tcp', address: '192.0.2.1:7', host: '192.0.2.1' };
    const { device } = await exports.open('disk', peer);
    await device.write(0, Buffer.alloc(BLOCK, 1), false);
    exports.writers.keepOut(peer, 0);
    for (const change of [
      () => device.write(0, Buffer.alloc(BLOCK, 2), false),
      () => device.trim(0, BLOCK, false),
      () => device.zero(0, BLOCK, { noHole: true, fua: false, fastZero: false }),
    ]) {
      expect(change).toThrow(/was cut off/);
    }
    await device.read(0, Buffer.alloc(BLOCK));
    await device.close('lost');
    expect(() => device.write(0, Buffer.alloc(BLOCK, 2), false)).toThrow(/was cut off/);
    expect(await byteAt(0)).toBe(1);
  });
});

describe('taking over', () => {
  test('from a client that sends nothing more and takes no replies: it holds the disk for some seconds only', async () => {
    await serve();
    next = gone(1);
    const first = await RawClient.connect({ path: path.join(directory, 'nbd.sock') });
    await first.open('disk/exclusive');
    first.socket.pause();
    for (let n = 0; n < 20; n++) first.request({ type: CMD.READ, length: 2 ** 20 });
    first.halfClose();
    const coming = connect('disk/exclusive=take-over', gone(2));
    expect(mayOf(await coming)).toBe('writes');
    expect(log.join()).toMatch(/client1\) has ended, does not take its last replies and is cut off/);
  });

  test('from a reachable client is refused, and that client continues', async () => {
    await serve({ exclusive: 'take-over' });
    const first = await connect('disk', ME);
    await expect(connect('disk', gone(2))).rejects.toThrow(/by process \d+ \(me\), which still answers/);
    await first.write(0, Buffer.alloc(BLOCK, 3));
    expect(await byteAt(0)).toBe(3);
    // Of several clients that take over from one that is gone at the same time, one gets the disk.
    await first.disconnect();
    await connect('disk', gone(1));
    const coming = await Promise.allSettled(['disk', 'disk', 'disk'].map((name) => connect(name, ME)));
    expect(coming.map(({ status }) => status).sort()).toEqual(['fulfilled', 'rejected', 'rejected']);
    expect(holders()).toEqual([`process ${process.pid} (me) alone`]);
  });

  test('from a client that says goodbye during the probe does not cut it off', async () => {
    await serve();
    const first = await connect('disk/exclusive', gone(1));
    const real = exports.writers.connected;
    let asked: (() => void) | undefined;
    exports.writers.connected = {
      isEnding: (peer) => real.isEnding(peer),
      hasEnded: (peer) => real.hasEnded(peer),
      isThere: async () => {
        await new Promise<void>((resolve) => (asked = resolve));
        return true;
      },
      cutOff: () => Promise.reject(new Error('cut off')),
    };
    const coming = connect('disk/exclusive=take-over', gone(2));
    await waitUntil(() => asked, 'it is asked');
    await first.disconnect();
    await waitUntil(() => holders().length === 0, 'it has left');
    asked?.();
    expect(mayOf(await coming)).toBe('writes');
  });
});

describe('two writers that know nothing of each other', () => {
  test('cause one warning, at the first write of the second, not when they open', async () => {
    await serve();
    const first = await connect('disk', gone(1));
    const same = await connect('disk', gone(1));
    const second = await connect('disk', gone(2));
    await first.write(0, Buffer.alloc(BLOCK, 1));
    await same.write(0, Buffer.alloc(BLOCK, 1));
    await second.readInto(0, Buffer.alloc(BLOCK));
    await second.flush();
    expect(log).toEqual([]);
    expect(exports.writers.twoWritersOf('disk')).toBeUndefined();
    await second.zero(0, BLOCK);
    await second.write(0, Buffer.alloc(BLOCK, 2));
    expect(log).toHaveLength(1);
    expect(log[0]).toMatch(
      /^disk is written by two clients at once, process \d+ \(client1\) and process \d+ \(client2\)/,
    );
    expect(exports.writers.twoWritersOf('disk')?.clients.join()).toMatch(/client1.*client2/);
    // With ever new processes: still one warning in a while.
    for (let number = 3; number < 6; number++) {
      const other = await connect('disk', gone(number));
      await other.write(0, Buffer.alloc(BLOCK, number));
      await other.disconnect();
    }
    expect(log).toHaveLength(1);
    expect(exports.writers.twoWritersOf('disk')?.clients.join()).toMatch(/client1.*client5/);
  });

  test('a client that has said goodbye is no writer, though its socket is not closed yet; nor is a client of a deleted disk', async () => {
    await serve();
    next = gone(1);
    const first = await RawClient.connect({ path: path.join(directory, 'nbd.sock'), allowHalfOpen: true });
    await first.open('disk');
    first.request({ type: CMD.WRITE, length: BLOCK }, Buffer.alloc(BLOCK, 1));
    expect(await first.readReply()).toMatchObject({ errno: 0 });
    first.request({ type: CMD.DISC });
    const [connection] = server.connections.values();
    await waitUntil(() => connection?.hasEnded, 'its goodbye is heard');
    const second = await connect('disk', gone(2));
    await second.write(0, Buffer.alloc(BLOCK, 2));
    expect(holders()).toHaveLength(2);
    expect(log).toEqual([]);
    const third = await connect('disk', gone(3));
    await third.write(0, Buffer.alloc(BLOCK, 3));
    expect(exports.writers.twoWritersOf('disk')?.clients.join()).toMatch(/client2.*client3/);
    exports.writers.forget('disk');
    expect(exports.writers.twoWritersOf('disk')).toBeUndefined();
  });

  test('one after the other cause no warning', async () => {
    await serve();
    for (const number of [1, 2]) {
      const client = await connect('disk', gone(number));
      await client.write(0, Buffer.alloc(BLOCK, number));
      await client.disconnect();
      await waitUntil(() => holders().length === 0, 'it has left');
    }
    expect(log).toEqual([]);
  });
});
