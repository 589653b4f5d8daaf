/**
 * Clients that come back before the server sees the end of their old connection, without a daemon: what is stored of them, how the
 * next process reads that, and what remains when they have said goodbye.
 */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import type { CompleteDevice, Peer } from 'nbd-server-ts';
import { AuthorisedExports } from '../../src/export/authorised-exports.js';
import { VdiExports } from '../../src/export/vdi-exports.js';
import { LocalStore } from '../../src/store/local/local-store.js';
import type { StoreState } from '../../src/store/object-store.js';
import { StoreError } from '../../src/store/store-error.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { InUse } from '../../src/vdi/in-use.js';
import { StoredFacts } from '../../src/vdi/stored-facts.js';
import { lookAtProcess } from '../../src/system/process-identity.js';
import { FailingDisk, READS } from '../harness/failing-disk.js';
import { BLOCK, readFirst, writeFirst } from './first-block.js';

const SIZE = 8 * 2 ** 20;
const HOUR_S = 3600;
const CLIENT: Peer = { transport: 'tcp', address: '192.0.2.1:1', host: '192.0.2.1' };
const COMMAND: Peer = { transport: 'internal', address: 'command line' };

let directory: string;
let failing: FailingDisk;
let store: LocalStore;
let catalog: VdiCatalog;
let exports: VdiExports;

beforeEach(async () => {
  hours = 0;
  directory = fs.mkdtempSync(path.join(os.tmpdir(), 'sheepgate-reconnected-'));
  failing = new FailingDisk();
  store = await LocalStore.open(directory, { disk: failing.disk });
  catalog = new VdiCatalog(store);
  exports = new VdiExports(catalog, { serves: true });
  await catalog.create('disk', SIZE);
  await write(1);
});

afterEach(async () => {
  vi.restoreAllMocks();
  await catalog.close().catch(() => undefined);
  fs.rmSync(directory, { recursive: true, force: true });
});

async function open(spec: string, from: Peer = CLIENT): Promise<CompleteDevice> {
  return (await exports.open(spec, from)).device;
}

const read = readFirst;
const write = (value: number): Promise<void> => writeFirst(catalog, value);

const tags = async (): Promise<string[]> => (await catalog.list()).map(({ tag }) => tag);

const ownProcess = (): Peer => ({
  transport: 'unix',
  address: '/run/nbd.sock',
  credentials: { pid: process.pid, uid: 0, gid: 0, ...lookAtProcess(process.pid) },
});

let hours = 0;
const realUptime = os.uptime.bind(os);
function pass(more: number): void {
  hours += more;
  vi.spyOn(os, 'uptime').mockImplementation(() => realUptime() + hours * HOUR_S);
}

/** As if the process that stored the facts was killed: a new one takes over. */
async function startAgain(): Promise<{ catalog: VdiCatalog; exports: VdiExports }> {
  await catalog.facts.flush();
  const killed = new Map<string, unknown>();
  for (const [key, value] of store.metadata.state()) killed.set(key, { ...(value as object), server: 'gone:1:1' });
  await store.metadata.storeState(killed);
  const again = new VdiCatalog(store);
  return { catalog: again, exports: new VdiExports(again, { readerMemoryMs: 1000 }) };
}

test('a client whose old connection is seen to end only after it has come back is still in use after kill -9', async () => {
  const old = await open('disk');
  await old.write(0, Buffer.alloc(BLOCK, 1), false);
  const back = await open('disk');
  await old.close('lost');
  pass(2);
  await back.write(0, Buffer.alloc(BLOCK, 2), true);
  const next = await startAgain();
  await expect(next.catalog.remove('disk')).rejects.toThrow(/is in use by tcp 192\.0\.2\.1/);
  pass(0.9);
  await expect(next.catalog.remove('disk')).rejects.toThrow(/is in use by/);
});

test('a reader of NAME@now whose old connection is seen to end late is refused after kill -9, and gets no other snapshot', async () => {
  const old = await open('disk@now');
  const back = await open('disk@now');
  await old.close('lost');
  expect(await read(back)).toBe(1);
  pass(2);
  await write(2);
  const next = await startAgain();
  await expect(next.exports.open('disk@now', CLIENT)).rejects.toThrow(/has ended \(the daemon ended\)/);
});

test('a reader that reads another snapshot NAME@now is not one that was cut off', async () => {
  const first = await open('disk@now');
  await first.close('lost');
  pass(2);
  const next = await startAgain();
  await (await next.exports.open('disk@now', CLIENT)).device.close('disconnect');
});

for (const order of ['before its goodbye', 'after its goodbye'] as const) {
  for (const spec of ['disk@now', 'disk@now:run']) {
    test(`${spec}: a run that came back and ended in order leaves nothing to the next, its old end seen ${order}`, async () => {
      const old = await open(spec);
      await read(old);
      const back = await open(spec);
      if (order === 'before its goodbye') await old.close('lost');
      expect(await read(back)).toBe(1);
      await back.close('disconnect');
      if (order === 'after its goodbye') await old.close('lost');
      expect(await tags()).toEqual(['']);
      await write(2);
      if (spec === 'disk@now') expect(await read(await open(spec))).toBe(2);
    });
  }

  test(`a disk and a snapshot are free when their client has come back and left in order, its old end seen ${order}`, async () => {
    await catalog.snapshot('disk', 'monday');
    for (const from of [CLIENT, ownProcess()]) {
      for (const spec of ['disk', 'disk@monday']) {
        const use = async (device: CompleteDevice): Promise<void> => {
          if (spec === 'disk') await device.write(0, Buffer.alloc(BLOCK, 3), true);
          else await read(device);
        };
        const old = await open(spec, from);
        await use(old);
        const back = await open(spec, from);
        if (order === 'before its goodbye') await old.close('lost');
        await use(back);
        await back.close('disconnect');
        if (order === 'after its goodbye') await old.close('lost');
        expect((await catalog.show(spec)).clients, `${spec} ${from.transport}`).toEqual([]);
      }
    }
    await catalog.remove('disk');
  });
}

test('one of four parallel connections was cut off: the snapshot is kept, though the others have left in order', async () => {
  const four = await Promise.all(Array.from({ length: 4 }, () => open('disk@now')));
  for (const device of four) await read(device);
  await four[0]?.close('lost');
  await write(2);
  for (const device of four.slice(1)) await device.close('disconnect');
  const back = await open('disk@now');
  expect(await read(back)).toBe(1);
  await back.close('disconnect');
  expect(await tags()).toEqual(['']);
});

test('the goodbye of a client that only looks does not count for a guest of the same address that is cut off later', async () => {
  const guest = await open('disk');
  await guest.write(0, Buffer.alloc(BLOCK, 1), false);
  const looker = await open('disk');
  await guest.close('lost');
  await looker.close('disconnect');
  await expect(catalog.remove('disk')).rejects.toThrow(/is in use by/);
});

test('a label given to a command gets one snapshot only; a label drawn for a run is not remembered', async () => {
  const first = await open('disk@now:L2', COMMAND);
  await first.close('disconnect');
  await write(2);
  for (const from of [COMMAND, CLIENT]) {
    await expect(open('disk@now:L2', from)).rejects.toThrow(
      /disk@now:L2 was a temporary snapshot of .* that has ended/,
    );
  }
  const { labelOfRun } = await import('../../src/vdi/names.js');
  await (await open(`disk@now:${labelOfRun('backup')}`, COMMAND)).close('disconnect');
  await catalog.facts.flush();
  expect([...store.metadata.state().keys()].filter((key) => key.startsWith('label/'))).toEqual(['label/disk/now%3AL2']);
});

test('a client that continues after an error and leaves in order will not retry: its snapshot and its disk are free', async () => {
  for (const spec of ['disk@now', 'disk']) {
    const device = await open(spec);
    const badSector = failing.fail({ calls: READS, file: /objects/ }, 'EIO');
    await expect((async () => read(device))()).rejects.toThrow("the server's storage failed");
    badSector.off();
    expect(await read(device)).toBe(1);
    await device.close('disconnect');
    expect(await tags()).toEqual(['']);
    expect((await catalog.show('disk')).clients).toEqual([]);
  }
});

test('a read of damaged data is not tried again: a goodbye after it ends the snapshot', async () => {
  const device = await open('disk@now');
  const objects = path.join(directory, 'objects');
  for (const name of fs.readdirSync(objects, { recursive: true, encoding: 'utf8' }))
    if (fs.statSync(path.join(objects, name)).isFile()) fs.truncateSync(path.join(objects, name), 0);
  await expect((async () => read(device))()).rejects.toThrow('damaged or missing');
  await device.close('disconnect');
  expect(await tags()).toEqual(['']);
});

test('a base that could not be opened is opened at the next request', async () => {
  await catalog.snapshot('disk', 'monday');
  const device = await open('disk');
  const ask = async (): Promise<void> => device.extents('sheepgate:changed:monday', 0, BLOCK, () => true);
  vi.spyOn(catalog, 'openVdi').mockRejectedValueOnce(new StoreError('IO', 'a bad sector'));
  await expect(ask()).rejects.toThrow("the server's storage failed");
  await ask();
  await device.close('disconnect');
});

test('a peer that is refused because the name now belongs to another VDI does not count as a user', async () => {
  let asked = 0;
  const subjectOf = exports.subjectOf.bind(exports);
  vi.spyOn(exports, 'subjectOf').mockImplementation(async (name) =>
    ++asked % 2 === 0 ? { name: 'other', tag: undefined } : subjectOf(name),
  );
  const guarded = new AuthorisedExports(exports, { decide: () => 'read-write' });
  for (const spec of ['disk', 'disk@now']) {
    await expect(guarded.open(spec, CLIENT)).rejects.toThrow(/not allowed/);
    expect((await catalog.show('disk')).clients).toEqual([]);
    expect(await tags()).toEqual(['']);
  }
});

test('a temporary snapshot that was taken and cannot be opened is dropped', async () => {
  vi.spyOn(catalog, 'openTemporary').mockRejectedValueOnce(new StoreError('IO', 'a bad sector'));
  await expect(open('disk@now')).rejects.toThrow('a bad sector');
  expect(await tags()).toEqual(['']);
});

test('the clients that were cut off first are counted together, until the last of them counts no more', async () => {
  const first = await open('disk', { ...CLIENT, host: '192.0.2.99' });
  for (let n = 0; n < 32; n++) {
    await (
      await open('disk', { transport: 'tcp', address: `198.51.100.${n}:1`, host: `198.51.100.${n}` })
    ).close('lost');
    pass(0.01);
  }
  await first.close('lost');
  const named = (await catalog.show('disk')).clients.map(({ client }) => client);
  expect(named).toContain('tcp 192.0.2.99');
  expect(named).not.toContain('tcp 198.51.100.0');
  expect(named).toContain('clients that were cut off earlier');
});

test('the longest names, tags and certificates can be stored, and do not keep other clients from it', async () => {
  const long = 'ä'.repeat(120);
  await catalog.create(long, SIZE);
  await catalog.snapshot(long, 'ö'.repeat(120));
  const from: Peer = { ...CLIENT, tls: { pskUser: 'ü'.repeat(2000) } as NonNullable<Peer['tls']> };
  await (await open(`${long}@${'ö'.repeat(120)}`, from)).close('lost');
  await (await open(long, from)).close('lost');
  await catalog.facts.flush();
  const next = await startAgain();
  await expect(next.catalog.remove(long)).rejects.toThrow(/is in use by/);
});

test('creating a disk to which a client may come back is refused, and the error names the option that the caller has', async () => {
  const use = await catalog.inUse.begin({ name: 'new', tag: '' }, { id: 'x', label: 'x', isExact: false }, true);
  const span = { opened: 1, lastRequest: 1 };
  catalog.inUse.end(use, { isOver: false, hadErrors: false, hasWritten: true, span });
  const forceHint = "'sheepgate vdi create new 8M --force'";
  await expect(catalog.create('new', SIZE, { forceHint })).rejects.toThrow(
    /cannot be created again, unless 'sheepgate vdi create new 8M --force' says that no client will come back/,
  );
});

/** Commits one after the other, when the test says so; fails for some keys. */
class SlowState implements StoreState {
  readonly isShared = false;
  readonly stored = new Map<string, unknown>();
  readonly waiting: (() => void)[] = [];
  isSlow = false;
  poison = '';

  entries(): Map<string, unknown> {
    return new Map(this.stored);
  }

  async commit(changes: ReadonlyMap<string, unknown>): Promise<void> {
    if (this.isSlow) await new Promise<void>((resolve) => this.waiting.push(resolve));
    if (this.poison !== '' && changes.has(this.poison)) throw new StoreError('IO', 'this key is too long');
    for (const [key, value] of changes) this.stored.set(key, value);
  }
}

test('a fact that cannot be stored does not keep others from being stored, now or later', async () => {
  const state = new SlowState();
  const facts = new StoredFacts(state, () => undefined);
  state.poison = 'bad';
  facts.putSoon('bad', {});
  await facts.put('good', {});
  expect([...state.stored.keys()]).toEqual(['good']);
  await facts.put('later', {});
  await facts.flush();
  await expect(facts.put('bad', {})).rejects.toThrow('too long');
});

test('a connection that opens while the commit of another one is in flight waits for it', async () => {
  const state = new SlowState();
  const inUse = new InUse(new StoredFacts(state, () => undefined), { forMs: 60_000, log: () => undefined });
  const client = { id: 'x', label: 'x', isExact: false };
  const disk = { name: 'disk', tag: '' };
  state.isSlow = true;
  let open = 0;
  const first = inUse.begin(disk, client, false).then(() => open++);
  await vi.waitFor(() => expect(state.waiting).toHaveLength(1));
  // The second connection may write, which needs another commit; the third finds that commit in flight.
  const second = inUse.begin(disk, client, true).then(() => open++);
  state.waiting.shift()?.();
  await first;
  const third = inUse.begin(disk, client, true).then(() => open++);
  await vi.waitFor(() => expect(state.waiting).toHaveLength(1));
  expect(open).toBe(1);
  state.waiting.shift()?.();
  await Promise.all([second, third]);
});
