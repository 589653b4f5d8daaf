/**
 * Temporary snapshots and their clients, without a daemon: snapshots that are lost on a full disk, stores that cannot remember
 * clients, the limits, and clocks that jump.
 */
import { spawn } from '../harness/daemon.js';
import { once } from 'node:events';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import type { BlockDevice, Peer } from 'nbd-server-ts';
import { AuthorisedExports } from '../../src/export/authorised-exports.js';
import { EndedSnapshots } from '../../src/export/ended-snapshots.js';
import { VdiExports } from '../../src/export/vdi-exports.js';
import { LocalStore } from '../../src/store/local/local-store.js';
import type { StoreState } from '../../src/store/object-store.js';
import { StoreError } from '../../src/store/store-error.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { InUse } from '../../src/vdi/in-use.js';
import { StoredFacts } from '../../src/vdi/stored-facts.js';
import { labelOfRun } from '../../src/vdi/names.js';
import { lookAtProcess, processKey } from '../../src/system/process-identity.js';
import { timestampNow } from '../../src/vdi/timestamp.js';
import { FailingDisk, READS, WRITES } from '../harness/failing-disk.js';
import { BLOCK, readFirst, writeFirst } from './first-block.js';

const SIZE = 8 * 2 ** 20;

let directory: string;
let failing: FailingDisk;
let store: LocalStore;
let catalog: VdiCatalog;
let exports: VdiExports;
let lines: string[];

beforeEach(async () => {
  directory = fs.mkdtempSync(path.join(os.tmpdir(), 'sheepgate-moments-'));
  lines = [];
  const log = (line: string): void => void lines.push(line);
  failing = new FailingDisk();
  store = await LocalStore.open(directory, { log, disk: failing.disk });
  catalog = new VdiCatalog(store, { log });
  exports = new VdiExports(catalog, { serves: true, log });
  await catalog.create('disk', SIZE);
});

afterEach(async () => {
  vi.restoreAllMocks();
  await catalog.close().catch(() => undefined);
  fs.rmSync(directory, { recursive: true, force: true });
});

/** This process, on another connection each time. */
function peer(): Peer {
  const credentials = { pid: process.pid, uid: 0, gid: 0, ...lookAtProcess(process.pid) };
  return { transport: 'unix', address: '/run/nbd.sock', credentials };
}

const tcp = (host: string): Peer => ({ transport: 'tcp', address: `${host}:1`, host });

async function open(spec: string, from: Peer = peer()): Promise<BlockDevice> {
  return (await exports.open(spec, from)).device;
}

const read = readFirst;
const write = (value: number): Promise<void> => writeFirst(catalog, value);

for (const spec of ['disk@now', 'disk@now:run']) {
  test(`${spec}: lost on a full disk, a client that tries again after a goodbye gets no other snapshot`, async () => {
    await write(1);
    const device = await open(spec);
    // A directory in its place: the scratch file cannot be created.
    fs.mkdirSync(path.join(directory, 'scratch'));
    await write(2);
    fs.rmdirSync(path.join(directory, 'scratch'));
    // Without the file's name, which is for the log.
    await expect(read(device)).rejects.toThrow(/is lost: data that was overwritten in disk could not be kept; [^/]*$/);
    // As nbdkit's retry filter does.
    await device.close('disconnect');
    await expect(open(spec)).rejects.toThrow(/has ended \(disk@now\S* is lost: data[^/]*$/);
    expect((await catalog.list()).map(({ tag }) => tag)).toEqual(['']);
  });

  test(`${spec}: a client that got an error and opens it again after a goodbye finds the same snapshot`, async () => {
    await write(1);
    const device = await open(spec);
    const badSector = failing.fail({ calls: READS, file: /objects/ }, 'EIO');
    await expect(read(device)).rejects.toThrow("the server's storage failed");
    badSector.off();
    await device.close('disconnect');
    await write(2);
    const again = await open(spec);
    expect(await read(again)).toBe(1);
    await again.close('disconnect');
    expect((await catalog.list()).map(({ tag }) => tag)).toEqual(['']);
  });
}

test('on a full disk a kept snapshot gives way to a writer, and its client gets no other snapshot', async () => {
  await write(1);
  const device = await open('disk@now:run');
  await device.close('lost');
  await write(2);
  const vdi = await catalog.openVdi('disk');
  failing.fail({ calls: WRITES, file: /objects/, times: 1 }, 'ENOSPC');
  await vdi.write(0, Buffer.alloc(BLOCK, 3), true);
  await catalog.release(vdi);
  await vi.waitFor(async () => expect((await catalog.list()).map(({ tag }) => tag)).toEqual(['']), 10_000);
  await expect(open('disk@now:run')).rejects.toThrow(/has ended \(disk@now:run is lost: data/);
});

test('if a store cannot remember clients, NAME@now is refused at once, and disks are served all the same', async () => {
  await write(1);
  const full = failing.fail({ calls: ['commit'] }, 'ENOSPC');
  for (const spec of ['disk@now', 'disk@now:run']) await expect(open(spec), spec).rejects.toThrow(/no space left/i);
  expect((await catalog.list()).map(({ tag }) => tag)).toEqual(['']);
  const guest = await open('disk');
  expect(await read(guest)).toBe(1);
  expect(lines.join('\n')).toMatch(
    /disk is open by process \d+ \(.+\), but this cannot be stored, and is forgotten if this process is killed/,
  );
  await guest.close('lost');
  await expect(catalog.remove('disk')).rejects.toThrow(/is in use by/);
  full.off();
  const label = await open('disk@now:run');
  await label.close('disconnect');
});

test('many clients that come at once need few commits', async () => {
  const commits = vi.spyOn(store.metadata, 'storeState');
  const devices = await Promise.all(Array.from({ length: 200 }, (_, n) => open('disk', tcp(`192.0.2.${n}`))));
  expect(commits.mock.calls.length).toBeLessThan(200);
  commits.mockClear();
  // More connections of a known client need none.
  const more = await Promise.all(Array.from({ length: 50 }, () => open('disk', tcp('192.0.2.1'))));
  expect(commits.mock.calls.filter(([changes]) => changes.size > 0)).toEqual([]);
  for (const device of [...devices, ...more]) await device.close('disconnect');
  await catalog.remove('disk');
});

test('of one export 32 clients that were cut off are remembered one by one, and none is forgotten', async () => {
  for (let n = 0; n < 100; n++) await (await open('disk', tcp(`192.0.2.${n}`))).close('lost');
  const { clients } = await catalog.show('disk');
  expect(clients).toHaveLength(33);
  expect(clients.map(({ client }) => client)).toContain('clients that were cut off earlier');
  expect(store.metadata.state().size).toBeLessThanOrEqual(100);
  await expect(catalog.remove('disk')).rejects.toThrow(/and by 32 more/);
  await catalog.remove('disk', { force: true });
});

test('a process that only read a snapshot and has ended does not count; one that could write does', async () => {
  await catalog.snapshot('disk', 'monday');
  const child = spawn('sleep', ['1000']);
  const { pid = 0 } = child;
  const from: Peer = {
    transport: 'unix',
    address: '/run/nbd.sock',
    credentials: { pid, uid: 0, gid: 0, ...lookAtProcess(pid) },
  };
  await (await open('disk@monday', from)).close('lost');
  await (await open('disk', from)).close('lost');
  await expect(catalog.remove('disk@monday')).rejects.toThrow(/is in use by process \d+ \(sleep\)/);
  const gone = once(child, 'exit');
  child.kill('SIGKILL');
  await gone;
  await catalog.remove('disk@monday');
  await expect(catalog.remove('disk')).rejects.toThrow(/is in use by process/);
});

test('a connection that may only read is no writer: ended, it does not count, and its goodbye says nothing about a writer', async () => {
  const child = spawn('sleep', ['1000']);
  const { pid = 0 } = child;
  const from: Peer = {
    transport: 'unix',
    address: '/run/nbd.sock',
    credentials: { pid, uid: 0, gid: 0, ...lookAtProcess(pid) },
  };
  const guarded = (ro: boolean): AuthorisedExports =>
    new AuthorisedExports(exports, { decide: () => (ro ? 'read-only' : 'read-write') });
  const openAs = async (ro: boolean, who: Peer, spec = 'disk'): Promise<BlockDevice> =>
    (await guarded(ro).open(spec, who)).device;
  const byId = `@${(await catalog.find('disk')).vid.toString(16)}`;
  const reader = await openAs(true, from);
  expect(reader.geometry.readOnly).toBe(true);
  expect(() => reader.write(0, Buffer.alloc(BLOCK), false)).toThrow('may only read');
  await reader.close('lost');
  await (await openAs(false, from, byId)).close('lost');
  await expect(catalog.create('disk', SIZE)).rejects.toThrow(/exists/);
  await expect(catalog.remove('disk')).rejects.toThrow(/is in use by process \d+ \(sleep\)/);
  // The writers of the same process and of the same address are away: the goodbye of a reader does not change that.
  await (await openAs(false, from)).close('lost');
  await (await openAs(false, tcp('192.0.2.1'))).close('lost');
  for (const who of [from, tcp('192.0.2.1')]) {
    await (await openAs(true, who)).close('disconnect');
    await (await openAs(false, who, byId)).close('disconnect');
  }
  expect((await catalog.show('disk')).clients.filter(({ lostAt }) => lostAt !== null)).toHaveLength(2);
  for (const who of [from, tcp('192.0.2.1')]) {
    const writer = await openAs(false, who);
    await writer.write(0, Buffer.alloc(BLOCK, 1), false);
    await writer.close('disconnect');
  }
  expect((await catalog.show('disk')).clients).toEqual([]);
  await (await openAs(true, from)).close('lost');
  const gone = once(child, 'exit');
  child.kill('SIGKILL');
  await gone;
  await catalog.remove('disk');
});

test('a client that said goodbye after an error may try again: it counts, but not once its process has ended, and never for long', async () => {
  const child = spawn('sleep', ['1000']);
  const { pid = 0 } = child;
  const credentials = { pid, uid: 0, gid: 0, ...lookAtProcess(pid) };
  const process: Peer = { transport: 'unix', address: '/run/nbd.sock', credentials };
  const fail = async (from: Peer): Promise<void> => {
    const device = await open('disk', from);
    const full = failing.fail({ calls: WRITES, file: /objects/ }, 'ENOSPC');
    await expect((async () => device.write(0, Buffer.alloc(BLOCK, 1), false))()).rejects.toThrow('no space left');
    full.off();
    await device.close('disconnect');
  };
  await write(1);
  for (const [others, from] of [process, tcp('192.0.2.1')].entries()) {
    await fail(from);
    await expect(catalog.remove('disk')).rejects.toThrow(/is in use by/);
    // An error that a retry cannot cure does not count.
    const again = await open('disk', from);
    await again.write(0, Buffer.alloc(BLOCK, 1), false);
    const slow = vi.spyOn(store.objects, 'write').mockImplementation(() => {
      throw new StoreError('SLOW', 'not fast');
    });
    await expect((async () => again.write(0, Buffer.alloc(BLOCK, 1), false))()).rejects.toMatchObject({
      code: 'ENOTSUP',
    });
    slow.mockRestore();
    await again.close('disconnect');
    expect((await catalog.show('disk')).clients).toHaveLength(others);
    await fail(from);
  }
  expect((await catalog.show('disk')).clients).toHaveLength(2);
  const gone = once(child, 'exit');
  child.kill('SIGKILL');
  await gone;
  const [left, ...more] = (await catalog.show('disk')).clients;
  expect(more).toEqual([]);
  expect((left?.until ?? 0) - Date.now()).toBeLessThanOrEqual(300_000);
  // If it was cut off as well, it counts for the whole time.
  await (await open('disk', tcp('192.0.2.1'))).close('lost');
  expect(((await catalog.show('disk')).clients[0]?.until ?? 0) - Date.now()).toBeGreaterThan(3_000_000);
});

test('several connections of one address come back and leave in order: one that has written counts for all', async () => {
  const four = await Promise.all(Array.from({ length: 4 }, () => open('disk', tcp('192.0.2.1'))));
  for (const device of four) await device.close('lost');
  const again = await Promise.all(Array.from({ length: 4 }, () => open('disk', tcp('192.0.2.1'))));
  await again[1]?.write(0, Buffer.alloc(BLOCK, 1), false);
  for (const device of again) await device.close('disconnect');
  expect((await catalog.show('disk')).clients).toEqual([]);
});

test('a connection that only looks does not extend the time of one that was cut off, from the same address', async () => {
  const hours = (n: number): void => void vi.spyOn(os, 'uptime').mockReturnValue(uptime + n * 3600);
  const uptime = os.uptime();
  hours(0);
  await (await open('disk', tcp('192.0.2.1'))).close('lost');
  const { lostAt } = (await catalog.show('disk')).clients[0] ?? {};
  hours(0.9);
  await (await open('disk', tcp('192.0.2.1'))).close('disconnect');
  expect((await catalog.show('disk')).clients[0]?.lostAt).toBe(lostAt);
  await expect(catalog.remove('disk')).rejects.toThrow(/is in use by tcp 192\.0\.2\.1/);
  hours(1.1);
  await catalog.remove('disk');
});

test('on a store that several processes serve, a client that was cut off from this process still counts when that is stored', async () => {
  const state = new FakeState(true);
  const facts = factsIn(state);
  const inUse = new InUse(facts, { forMs: 60_000, log: () => undefined });
  const client = { id: 'x', label: 'x', isExact: false };
  const use = await inUse.begin({ name: 'disk', tag: '' }, client, true);
  inUse.end(use, { isOver: false, hadErrors: false, hasWritten: false, span: { opened: 1, lastRequest: 1 } });
  await facts.flush();
  expect(inUse.of('disk', '')).toMatchObject([{ client: 'x' }]);
  state.stored.clear(); // --force, in another process
  expect(inUse.of('disk', '')).toEqual([]);
});

test('in a copy of a store, clients of the process that serves the original count as cut off; in a shared store, as elsewhere', () => {
  const anyNumber = expect.any(Number) as number;
  const child = spawn('sleep', ['1000']);
  const { pid = 0 } = child;
  const server = processKey(pid, lookAtProcess(pid)?.startTime ?? 0);
  for (const isShared of [false, true]) {
    const state = new FakeState(isShared);
    const client = { id: 'x', label: 'x', isExact: false };
    const record = { name: 'disk', tag: '', client, since: 1, writable: true, server, forMs: 60_000 };
    state.stored.set('use/disk//x', record);
    const [use] = new InUse(factsIn(state), { forMs: 60_000, log: () => undefined }).of('disk', '');
    if (isShared) expect(use).toEqual({ client: 'x', since: 1, lostAt: null, until: null, isElsewhere: true });
    else expect(use).toEqual({ client: 'x', since: 1, lostAt: anyNumber, until: anyNumber });
    // A label that a client reads in the original: no client reads it in the copy.
    state.stored.set('label/disk/now%3Arun', { name: 'disk', tag: 'now:run', usedAt: timestampNow(), server });
    const ended = new EndedSnapshots(factsIn(state), 1000);
    expect(() => ended.checkLabel('disk', 'now:run')).toThrow(
      isShared ? /another daemon has opened it/ : /has ended \(the daemon ended\)/,
    );
  }
  child.kill('SIGKILL');
});

test('a client that is refused because its base has vanished leaves nothing behind, and may use its label again', async () => {
  await catalog.snapshot('disk', 'monday');
  // The base exists at the lookup, and is gone when the snapshot is taken, or when the base is opened.
  const take = catalog.snapshotTemporary.bind(catalog);
  vi.spyOn(catalog, 'snapshotTemporary').mockImplementationOnce(async (...of) => {
    await catalog.remove('disk@monday');
    return take(...of);
  });
  const openVdi = catalog.openVdi.bind(catalog);
  vi.spyOn(catalog, 'openVdi').mockImplementation(async (spec, options) => {
    if (spec === 'disk@monday') await catalog.remove(spec);
    return openVdi(spec, options);
  });
  for (const spec of ['disk@now/since=monday', 'disk@now:run/since=monday', 'disk/since=monday']) {
    await expect(open(spec), spec).rejects.toThrow(/has no snapshot "monday"/);
    expect(
      (await catalog.list()).map(({ tag }) => tag),
      spec,
    ).toEqual(['']);
    expect((await catalog.show('disk')).clients, spec).toEqual([]);
    if (spec !== 'disk/since=monday') await catalog.snapshot('disk', 'monday');
  }
  vi.restoreAllMocks();
  await (await open('disk@now:run')).close('disconnect');
});

test('a client that was cut off and is refused for its base stays cut off: its snapshot and its disk are kept for it', async () => {
  await write(1);
  await catalog.snapshot('disk', 'monday');
  await (await open('disk@now')).close('lost');
  await (await open('disk')).close('lost');
  vi.spyOn(catalog, 'openVdi').mockRejectedValueOnce(new StoreError('IO', 'a bad sector'));
  await expect(open('disk@now/since=monday')).rejects.toThrow('a bad sector');
  await write(2);
  expect((await catalog.show('disk')).clients).toMatchObject([{ until: expect.any(Number) as number }]);
  const back = await open('disk@now/since=monday');
  expect(await read(back)).toBe(1);
  await back.close('disconnect');
  expect((await catalog.list()).map(({ tag }) => tag)).toEqual(['monday', '']);
});

test('a base is held as long as a snapshot that was compared with it is kept; a new one of its tag is not used in its place', async () => {
  await catalog.snapshot('disk', 'monday');
  for (const spec of ['disk@now/since=monday', 'disk@now:run/since=monday']) {
    await (await open(spec)).close('lost');
    await expect(catalog.remove('disk@monday'), spec).rejects.toThrow(/is in use by process/);
    await catalog.remove('disk@monday', { force: true });
    await catalog.snapshot('disk', 'monday');
    await expect(open(spec), spec).rejects.toThrow(
      /disk@monday is another snapshot now than the one that disk@now\S* was compared with/,
    );
    // Without the base it still reads the same.
    const back = await open(spec.replace('/since=monday', ''));
    await back.close('disconnect');
  }
  const device = await open('disk@now/since=monday');
  await device.close('lost');
  await (await open('disk@now/since=monday')).close('disconnect');
  await catalog.remove('disk@monday');
});

test('one of several connections was cut off: the snapshot ends with the process that left in order, and not before', async () => {
  for (const spec of ['disk@now', 'disk@now:run']) {
    const child = spawn('sleep', ['1000']);
    const { pid = 0 } = child;
    const credentials = { pid, uid: 0, gid: 0, ...lookAtProcess(pid) };
    const from: Peer = { transport: 'unix', address: '/run/nbd.sock', credentials };
    const [first, second] = [await open(spec, from), await open(spec, from)];
    await read(first);
    await first.close('lost');
    await second.close('disconnect');
    expect((await catalog.show('disk')).kept, spec).toHaveLength(1);
    const gone = once(child, 'exit');
    child.kill('SIGKILL');
    await gone;
    await vi.waitFor(async () => expect((await catalog.list()).map(({ tag }) => tag)).toEqual(['']), 10_000);
  }
});

test('two clients that make room for their snapshots at the same time do not wait for each other', async () => {
  const command: Peer = { transport: 'internal', address: '' };
  const label = `disk@now:${labelOfRun('y')}`;
  const first = await open(label, command);
  for (const host of ['192.0.2.3', '192.0.2.4']) await (await open('disk@now', tcp(host))).close('lost');
  // The first one is being closed: no connection has it open, but it is not gone yet.
  let goOn: () => void = () => undefined;
  const release = catalog.release.bind(catalog);
  vi.spyOn(catalog, 'release').mockImplementationOnce(async (vdi) => {
    await new Promise<void>((resolve) => (goOn = resolve));
    await release(vdi);
  });
  const take = catalog.snapshotTemporary.bind(catalog);
  const full = vi.spyOn(catalog, 'snapshotTemporary');
  for (let n = 0; n < 2; n++) full.mockRejectedValueOnce(new StoreError('LIMIT', 'no more are possible'));
  full.mockImplementation(take);
  const closing = first.close('disconnect');
  await vi.waitFor(() => expect(catalog.release).toHaveBeenCalled());
  const opening = [open(label, tcp('192.0.2.1')), open('disk@now', tcp('192.0.2.2'))];
  await new Promise((resolve) => setImmediate(resolve));
  goOn();
  const opened = await Promise.allSettled([closing, ...opening]);
  expect(opened.map(({ status }) => status)).toEqual(['fulfilled', 'fulfilled', 'fulfilled']);
}, 10_000);

test('creating a VDI again ends the kept snapshots of the old one', async () => {
  Object.assign(store.catalog, { isBarelyMade: () => Promise.resolve(true) });
  await (await open('disk@now:run')).close('lost');
  const beginning = { by: 'import', of: '', run: 'a1', size: SIZE, overwrites: false, goesOn: false } as const;
  await catalog.begin('disk', beginning);
  expect((await catalog.list()).map(({ tag }) => tag)).toEqual(['']);
  expect(lines.join('\n')).toMatch(/dropped disk@now:run, kept for process .*: disk was created again/);
  await catalog.finish('disk', 'a1');
  await expect(open('disk@now:run')).rejects.toThrow(/has ended \(disk was created again\)/);
});

class FakeState implements StoreState {
  readonly stored = new Map<string, unknown>();

  constructor(readonly isShared = false) {}

  entries(): Map<string, unknown> {
    return structuredClone(this.stored);
  }

  commit(changes: ReadonlyMap<string, unknown>): Promise<void> {
    for (const [key, value] of changes) {
      if (value === undefined) this.stored.delete(key);
      else this.stored.set(key, JSON.parse(JSON.stringify(value)));
    }
    return Promise.resolve();
  }
}

const factsIn = (state: StoreState): StoredFacts => new StoredFacts(state, () => undefined);

test('the oldest labels that ended in order make room; labels that clients may ask for again do not, and new ones are refused', async () => {
  const state = new FakeState();
  const facts = factsIn(state);
  const ended = new EndedSnapshots(facts, 1000);
  for (let n = 0; n < 300; n++) {
    await ended.useLabel('disk', `now:${n}`);
    ended.labelEnded('disk', `now:${n}`, 'it was read to its end', true);
  }
  await facts.flush();
  expect(state.stored.size).toBe(256);
  ended.checkLabel('disk', 'now:0');
  expect(() => ended.checkLabel('disk', 'now:299')).toThrow(/has ended/);
  for (let n = 0; n < 256; n++) {
    await ended.useLabel('disk', `now:lost${n}`);
    ended.labelEnded('disk', `now:lost${n}`, 'its client was cut off', false);
  }
  await expect(ended.useLabel('disk', 'now:more')).rejects.toThrow(/no more can be/);
  expect(() => ended.checkLabel('disk', 'now:lost0')).toThrow(/has ended/);
  await ended.useLabel('other', 'now:more');
});

test('a label is forgotten when its time has passed, and not because the clock was set within one boot', async () => {
  const facts = factsIn(new FakeState());
  const ended = new EndedSnapshots(facts, 1000);
  await ended.useLabel('disk', 'now:run');
  ended.labelEnded('disk', 'now:run', 'it was read to its end', true);
  const now = Date.now();
  vi.spyOn(Date, 'now').mockReturnValue(now + 365 * 86_400_000);
  expect(() => ended.checkLabel('disk', 'now:run')).toThrow(/has ended/);
  vi.spyOn(Date, 'now').mockReturnValue(now - 3_600_000);
  expect(() => ended.checkLabel('disk', 'now:run')).toThrow(/has ended/);
  const uptime = os.uptime();
  vi.spyOn(os, 'uptime').mockReturnValue(uptime + 13 * 3600);
  ended.checkLabel('disk', 'now:run');
});

test('stored records of another form, or damaged ones, are skipped', () => {
  const state = new FakeState();
  for (const [n, value] of [null, 7, 'x', [], {}, { name: 'disk', tag: '', client: null }].entries()) {
    for (const prefix of ['use', 'label', 'reader']) state.stored.set(`${prefix}/disk/${n}`, value);
  }
  const facts = factsIn(state);
  expect(new InUse(facts, { forMs: 1000, log: () => undefined }).of('disk', '')).toEqual([]);
  new EndedSnapshots(facts, 1000).checkLabel('disk', '0');
});
