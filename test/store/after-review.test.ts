/** What must hold at the edges of a store's life: while it closes, while a file is being made, at its first start after a crash. */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { expect, onTestFinished, test, vi } from 'vitest';
import { LocalStore } from '../../src/store/local/local-store.js';
import { StoreError } from '../../src/store/object-store.js';
import { VdiExports } from '../../src/export/vdi-exports.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { msSince, stampNow } from '../../src/vdi/stamp.js';
import { temporaryDirectory } from '../harness/daemon.js';

const OBJECT = 2 ** 20;

test('a store that is closed stores nothing any more, and is not opened again by what comes late', async () => {
  const directory = path.join(temporaryDirectory(), 'store');
  const store = await LocalStore.open(directory);
  const early = store.state.commit(new Map([['early', { a: 1 }]]));
  await store.close();
  await early;
  const second = await LocalStore.open(directory);
  for (const value of [1, 2]) {
    await expect(store.state.commit(new Map([['late', { value }]]))).rejects.toMatchObject({ code: 'CLOSED' });
  }
  expect(() => store.state.entries()).toThrow(/is closed/);
  expect([...second.state.entries().keys()]).toEqual(['early']);
  await second.close();
});

test('a failed sync of a folder is final for an object that is being made in it at that moment', async () => {
  const store = await LocalStore.open(path.join(temporaryDirectory(), 'store'));
  const catalog = new VdiCatalog(store);
  onTestFinished(() => catalog.close().catch(() => undefined));
  for (const name of ['first', 'second']) await catalog.create(name, 1024 * OBJECT, { blockSizeShift: 20 });
  const [first, second] = [await catalog.openVdi('first'), await catalog.openVdi('second')];
  const { files } = store;
  const create = files.create.bind(files);
  let goOn!: () => void;
  const isHeld = new Promise<void>((resolve) => (goOn = resolve));
  let made!: () => void;
  const isMade = new Promise<void>((resolve) => (made = resolve));
  // Objects of vid 1 at idx 0 and of vid 2 at idx 768 are in one folder.
  files.create = async (...args) => {
    await create(...args);
    made();
    await isHeld;
  };
  const writing = second.write(768 * OBJECT, Buffer.from('new'), false);
  await isMade;
  files.create = create;
  await first.write(0, Buffer.from('new'), false);
  const cause = Object.assign(new Error('EIO: i/o error, fsync'), { code: 'EIO', syscall: 'fsync' });
  const sync = files.syncDirectories.bind(files);
  files.syncDirectories = () => Promise.reject(new StoreError('IO', 'syncing a folder: EIO', { cause }));
  await expect(first.flush()).rejects.toMatchObject({ code: 'IO' });
  files.syncDirectories = sync;
  goOn();
  await writing;
  await expect(second.flush()).rejects.toMatchObject({ code: 'IO' });
});

test('an uptime that has gone back is not of the same boot: the wall clock tells', () => {
  const stamp = { ...stampNow(), at: Date.now() - 60_000 };
  const uptime = vi.spyOn(os, 'uptime').mockReturnValue(1);
  onTestFinished(() => uptime.mockRestore());
  expect(msSince(stamp)).toBeGreaterThanOrEqual(60_000);
});

test('check --repair leaves what the start that it runs in has kept, says so, and removes it when it is said again', async () => {
  const directory = path.join(temporaryDirectory(), 'store');
  const store = await LocalStore.open(directory);
  const catalog = new VdiCatalog(store);
  onTestFinished(() => catalog.close().catch(() => undefined));
  await catalog.create('disk', 8 * OBJECT, { blockSizeShift: 20 });
  await (await catalog.openVdi('disk')).write(0, Buffer.from('new'), false);
  const copy = path.join(temporaryDirectory(), 'copy');
  fs.cpSync(directory, copy, { recursive: true, filter: (name) => !name.endsWith('.sock') });
  const second = new VdiCatalog(await LocalStore.open(copy));
  onTestFinished(() => second.close().catch(() => undefined));
  const first = await second.check({ repair: true });
  expect(first.problems.join('\n')).toContain('kept by this very start: look first, then say check --repair again');
  expect(first.repaired).toBe(0);
  expect(fs.readdirSync(path.join(copy, 'set-aside'))).toHaveLength(1);
  expect((await second.check({ repair: true })).repaired).toBe(2);
  expect((await second.check({ repair: false })).problems).toEqual([]);
});

test('an export that its store cannot open is in the log with the cause, once, though clients come back', async () => {
  const store = await LocalStore.open(path.join(temporaryDirectory(), 'store'));
  const catalog = new VdiCatalog(store);
  onTestFinished(() => catalog.close().catch(() => undefined));
  await catalog.create('disk', OBJECT, { blockSizeShift: 20 });
  const lines: string[] = [];
  const exports = new VdiExports(catalog, { log: (line) => lines.push(line) });
  store.catalog.open = () => Promise.reject(new StoreError('IO', 'reading metadata: EIO'));
  const peer = {} as Parameters<VdiExports['open']>[1];
  for (let n = 0; n < 3; n++) await expect(exports.open('disk', peer)).rejects.toMatchObject({ code: 'FAILED' });
  await expect(exports.open('other', peer)).rejects.toMatchObject({ code: 'UNKNOWN' });
  expect(lines).toEqual(['export "disk" cannot be opened: reading metadata: EIO']);
});
