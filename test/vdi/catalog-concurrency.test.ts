/**
 * Concurrent operations of the catalog, on the local store: a long operation on one disk does not hold up the others, and an
 * operation on one disk looks at no other.
 */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import { VdiExports } from '../../src/export/vdi-exports.js';
import { LocalStore } from '../../src/store/local/local-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { FailingDisk } from '../harness/failing-disk.js';

const OBJECT = 2 ** 22;
const SIZE = 4 * OBJECT;
const PEER = { transport: 'internal', address: 'test' } as const;

let directory: string;
let failing: FailingDisk;
let store: LocalStore;
let catalog: VdiCatalog;

beforeEach(async () => {
  directory = fs.mkdtempSync(path.join(os.tmpdir(), 'sheepgate-catalog-'));
  failing = new FailingDisk();
  store = await LocalStore.open(directory, { disk: failing.disk });
  catalog = new VdiCatalog(store);
});

afterEach(async () => {
  vi.restoreAllMocks();
  await catalog.close().catch(() => undefined);
  fs.rmSync(directory, { recursive: true, force: true });
});

/** From here on no data of objects reaches the disk until `open` is called. `stopped` resolves when a sync waits for that. */
function holdSyncs(): { open: () => void; stopped: () => Promise<void> } {
  const { release, reached } = failing.hold({ calls: ['fdatasync'], file: /objects/ });
  return { open: release, stopped: () => reached };
}

async function written(name: string): Promise<void> {
  const vdi = await catalog.openVdi(name);
  await vdi.write(0, Buffer.alloc(4096, 7), false);
  void catalog.release(vdi);
}

describe('while a disk that its last user has left is being flushed,', () => {
  let disk: ReturnType<typeof holdSyncs>;
  let leaving: Promise<void>;

  beforeEach(async () => {
    await catalog.create('slow', SIZE);
    await catalog.create('other', SIZE);
    const vdi = await catalog.openVdi('slow');
    await vdi.write(0, Buffer.alloc(4096, 7), false);
    disk = holdSyncs();
    leaving = catalog.release(vdi);
    await disk.stopped();
  });

  test('any other disk is opened, made, snapshotted, cloned, shown and deleted', async () => {
    const other = await catalog.openVdi('other');
    await catalog.release(other);
    await catalog.create('new', SIZE);
    await catalog.snapshot('other', 's');
    await catalog.clone('other@s', 'copy');
    await catalog.remove('copy');
    expect(await catalog.details()).toHaveLength(4);
    expect((await catalog.show('new')).open).toBe(0);
    disk.open();
    await leaving;
  });

  test('the next open of it succeeds at once, with the written data', async () => {
    const again = await catalog.openVdi('slow');
    const data = Buffer.alloc(4096);
    await again.read(0, data);
    expect(data.equals(Buffer.alloc(4096, 7))).toBe(true);
    expect((await catalog.show('slow')).open).toBe(1);
    disk.open();
    await leaving;
    // It is still open: the flush has not closed it under its new user.
    await again.write(OBJECT, Buffer.alloc(4096, 8), true);
    await expect(catalog.remove('slow')).rejects.toThrow(/open by 1 connection/);
    await catalog.release(again);
    await catalog.remove('slow');
  });

  test('a delete, a rollback or a check waits for the flush, and is not refused', async () => {
    let isDone = false;
    const removing = catalog.remove('slow').then(() => (isDone = true));
    const other = await catalog.openVdi('other');
    await catalog.release(other);
    expect(isDone).toBe(false);
    disk.open();
    await removing;
    await leaving;
    expect((await catalog.check({ repair: false })).problems).toEqual([]);
  });

  test('a check delays no other operation, whether it waits for the flush or is refused', async () => {
    const checking = catalog.check({ repair: false });
    const other = await catalog.openVdi('other');
    await expect(catalog.check({ repair: false })).rejects.toThrow(/other is open/);
    await catalog.release(other);
    disk.open();
    expect((await checking).problems).toEqual([]);
    await leaving;
  });

  test('closing the store waits for the flush, and nothing is lost', async () => {
    const closing = catalog.close();
    disk.open();
    await closing;
    await leaving;
    store = await LocalStore.open(directory);
    catalog = new VdiCatalog(store);
    const vdi = await catalog.openVdi('slow');
    const data = Buffer.alloc(4096);
    await vdi.read(0, data);
    expect(data.equals(Buffer.alloc(4096, 7))).toBe(true);
    await catalog.release(vdi);
  });
});

test('while a snapshot waits for its disk, other disks are opened', async () => {
  await catalog.create('slow', SIZE);
  await catalog.create('other', SIZE);
  const vdi = await catalog.openVdi('slow');
  await vdi.write(0, Buffer.alloc(4096, 7), false);
  const disk = holdSyncs();
  const taking = catalog.snapshot('slow', 's');
  await disk.stopped();
  await catalog.release(await catalog.openVdi('other'));
  // So is the same one, as long as only the flush before the snapshot is in flight.
  await catalog.release(await catalog.openVdi('slow'));
  disk.open();
  await taking;
  await catalog.release(vdi);
});

test('a clone that is changed while its snapshot is deleted keeps both changes', async () => {
  for (let n = 0; n < 20; n++) {
    const base = `base-${n}`;
    const clone = `clone-${n}`;
    await catalog.create(base, SIZE);
    await catalog.snapshot(base, 's');
    await catalog.clone(`${base}@s`, clone);
    await written(clone);
    await Promise.all([catalog.snapshot(clone, 'a'), catalog.remove(`${base}@s`), catalog.resize(clone, 2 * SIZE)]);
    const vids = new Set((await catalog.list()).map(({ vid }) => vid));
    const [first, working] = await catalog.named(clone);
    expect(vids.has(first?.parentVid ?? -1) || first?.parentVid === 0).toBe(true);
    expect(working).toMatchObject({ size: 2 * SIZE, parentVid: first?.vid });
  }
});

test('opening, showing, making, snapshotting, deleting and exporting a disk looks at no other disk', async () => {
  for (let n = 0; n < 50; n++) await catalog.create(`disk-${n}`, SIZE);
  const exports = new VdiExports(catalog);
  const all = vi.spyOn(store.metadata, 'records');
  const vdi = await catalog.openVdi('disk-7');
  await catalog.release(vdi);
  await catalog.show('disk-7');
  await catalog.create('new', SIZE);
  await catalog.snapshot('new', 's');
  await catalog.clone('new@s', 'copy');
  await catalog.remove('copy');
  await exports.describe('disk-8', PEER);
  const { device } = await exports.open('disk-8@now', PEER);
  await device.close('disconnect');
  const { vid } = await catalog.find('disk-9');
  await catalog.find(`@${vid.toString(16)}`);
  // A free id is looked for among the ids of all.
  expect(all.mock.calls.length).toBeLessThanOrEqual(1);
});

test('the details of all in one pass are those of each alone', async () => {
  for (let n = 0; n < 5; n++) {
    await catalog.create(`disk-${n}`, SIZE);
    await written(`disk-${n}`);
    await catalog.snapshot(`disk-${n}`, 's');
    await written(`disk-${n}`);
  }
  const open = await catalog.openVdi('disk-3');
  await open.write(2 * OBJECT, Buffer.alloc(4096, 1), false);
  await catalog.snapshotTemporary('disk-4', 'now');
  const details = await catalog.details();
  expect(details).toHaveLength(11);
  for (const each of details.filter(({ isTemporary }) => !isTemporary)) {
    expect(each).toEqual(await catalog.show(each.tag === '' ? each.name : `${each.name}@${each.tag}`));
  }
  await catalog.release(open);
  await catalog.dropTemporary('disk-4', 'now');
});
