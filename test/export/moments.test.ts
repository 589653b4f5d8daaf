/**
 * What is remembered of clients, without a daemon: moments that are lost on a full disk, stores that cannot remember, the
 * bounds, and clocks that jump.
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import type { BlockDevice, Peer } from 'nbd-server-ts';
import { EndedMoments } from '../../src/export/ended-moments.js';
import { VdiExports } from '../../src/export/vdi-exports.js';
import { LocalStore } from '../../src/store/local/local-store.js';
import { StoreError, type StoreState } from '../../src/store/object-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { InUse } from '../../src/vdi/in-use.js';
import { Memory } from '../../src/vdi/memory.js';
import { lookAtProcess } from '../../src/vdi/process-identity.js';

const SIZE = 8 * 2 ** 20;
const BLOCK = 4096;

let directory: string;
let store: LocalStore;
let catalog: VdiCatalog;
let exports: VdiExports;
let lines: string[];

beforeEach(async () => {
  directory = fs.mkdtempSync(path.join(os.tmpdir(), 'sheepgate-moments-'));
  lines = [];
  const log = (line: string): void => void lines.push(line);
  store = await LocalStore.open(directory, { log });
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

async function read(device: BlockDevice): Promise<number> {
  const block = Buffer.alloc(BLOCK);
  await device.read(0, block);
  return block[0] ?? -1;
}

async function write(value: number): Promise<void> {
  const vdi = await catalog.openVdi('disk');
  await vdi.write(0, Buffer.alloc(BLOCK, value), true);
  await catalog.release(vdi);
}

for (const spec of ['disk@now', 'disk@now:run']) {
  test(`${spec}: lost on a full disk, it is no other moment for who tries again, though it said goodbye`, async () => {
    await write(1);
    const device = await open(spec);
    // A directory in its place: the scratch file cannot be made.
    fs.mkdirSync(path.join(directory, 'scratch'));
    await write(2);
    fs.rmdirSync(path.join(directory, 'scratch'));
    await expect(read(device)).rejects.toThrow(/is lost, because what disk overwrites could not be kept aside/);
    // As nbdkit's retry filter does.
    await device.close('disconnect');
    await expect(open(spec)).rejects.toThrow(/has ended \(disk@now\S* is lost, because/);
    expect((await catalog.list()).map(({ tag }) => tag)).toEqual(['']);
  });

  test(`${spec}: who was told of an error and opens it again after a goodbye finds the same moment`, async () => {
    await write(1);
    const device = await open(spec);
    vi.spyOn(store.files, 'read').mockImplementationOnce(() => {
      throw new StoreError('IO', 'a bad sector');
    });
    await expect(read(device)).rejects.toThrow('a bad sector');
    await device.close('disconnect');
    await write(2);
    const again = await open(spec);
    expect(await read(again)).toBe(1);
    await again.close('disconnect');
    expect((await catalog.list()).map(({ tag }) => tag)).toEqual(['']);
  });
}

test('what is kept for somebody gives way to a writer on a full disk, and is no other moment for him', async () => {
  await write(1);
  const device = await open('disk@now:run');
  await device.close('lost');
  await write(2);
  const vdi = await catalog.openVdi('disk');
  vi.spyOn(store.files, 'write').mockImplementationOnce(() => {
    throw new StoreError('NO_SPACE', 'no space left');
  });
  await vdi.write(0, Buffer.alloc(BLOCK, 3), true);
  await catalog.release(vdi);
  await vi.waitFor(async () => expect((await catalog.list()).map(({ tag }) => tag)).toEqual(['']), 10_000);
  await expect(open('disk@now:run')).rejects.toThrow(/has ended \(disk@now:run is lost, because/);
});

test('where it cannot be remembered, NAME@now is refused up front, and a disk is served all the same', async () => {
  await write(1);
  vi.spyOn(store.metadata, 'storeState').mockRejectedValue(new StoreError('NO_SPACE', 'no space left'));
  for (const spec of ['disk@now', 'disk@now:run']) await expect(open(spec), spec).rejects.toThrow('no space left');
  expect((await catalog.list()).map(({ tag }) => tag)).toEqual(['']);
  const guest = await open('disk');
  expect(await read(guest)).toBe(1);
  expect(lines.join('\n')).toMatch(/disk is open by process \d+ \(.+\), which is forgotten if this process is killed/);
  await guest.close('lost');
  await expect(catalog.remove('disk')).rejects.toThrow(/is in use by/);
  vi.restoreAllMocks();
  const label = await open('disk@now:run');
  await label.close('disconnect');
});

test('many clients that come at once are remembered in few commits', async () => {
  const commits = vi.spyOn(store.metadata, 'storeState');
  const devices = await Promise.all(Array.from({ length: 200 }, (_, n) => open('disk', tcp(`192.0.2.${n}`))));
  expect(commits.mock.calls.length).toBeLessThan(200);
  commits.mockClear();
  // And more connections of one that is known already, in none.
  const more = await Promise.all(Array.from({ length: 50 }, () => open('disk', tcp('192.0.2.1'))));
  expect(commits.mock.calls.filter(([changes]) => changes.size > 0)).toEqual([]);
  for (const device of [...devices, ...more]) await device.close('disconnect');
  await catalog.remove('disk');
});

test('of one export 32 clients that were cut off are told apart, and none is forgotten', async () => {
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

class FakeState implements StoreState {
  readonly isShared = false;
  readonly stored = new Map<string, unknown>();

  entries(): Map<string, unknown> {
    return new Map(this.stored);
  }

  commit(changes: ReadonlyMap<string, unknown>): Promise<void> {
    for (const [key, value] of changes) {
      if (value === undefined) this.stored.delete(key);
      else this.stored.set(key, JSON.parse(JSON.stringify(value)));
    }
    return Promise.resolve();
  }
}

const memoryOf = (state: StoreState): Memory => new Memory(state, () => undefined);

test('the oldest labels that ended in order make room; with those that may be asked for again, new ones are refused', async () => {
  const state = new FakeState();
  const memory = memoryOf(state);
  const ended = new EndedMoments(memory, 1000, () => undefined);
  for (let n = 0; n < 300; n++) {
    await ended.useLabel('disk', `now:${n}`);
    ended.labelEnded('disk', `now:${n}`, 'it was read to its end', true);
  }
  await memory.flush();
  expect(state.stored.size).toBe(256);
  ended.checkLabel('disk', 'now:0');
  expect(() => ended.checkLabel('disk', 'now:299')).toThrow(/has ended/);
  for (let n = 0; n < 256; n++) {
    await ended.useLabel('disk', `now:lost${n}`);
    ended.labelEnded('disk', `now:lost${n}`, 'its client was cut off', false);
  }
  await expect(ended.useLabel('disk', 'now:more')).rejects.toThrow(/no more can be remembered/);
  expect(() => ended.checkLabel('disk', 'now:lost0')).toThrow(/has ended/);
  await ended.useLabel('other', 'now:more');
});

test('a label is forgotten when its time has passed, and not when the clock says so within one boot', async () => {
  const memory = memoryOf(new FakeState());
  const ended = new EndedMoments(memory, 1000, () => undefined);
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

test('what is stored in another form, or damaged, is passed over', () => {
  const state = new FakeState();
  for (const [n, value] of [null, 7, 'x', [], {}, { name: 'disk', tag: '', client: null }].entries()) {
    for (const prefix of ['use', 'label', 'reader']) state.stored.set(`${prefix}/disk/${n}`, value);
  }
  const memory = memoryOf(state);
  expect(new InUse(memory, { forMs: 1000, log: () => undefined }).of('disk', '')).toEqual([]);
  new EndedMoments(memory, 1000, () => undefined).checkLabel('disk', '0');
});
