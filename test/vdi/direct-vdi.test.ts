/**
 * A store whose disks do copy-on-write themselves, behind the same catalog as the others: disks in memory that are no objects.
 * Also how the catalog handles answers that such a store does not have, or has late.
 */
import { beforeEach, describe, expect, test } from 'vitest';
import type { ExtentSink } from '../../src/store/open-vdi.js';
import { dataPageOf, changesPage } from '../../src/operations/data-page.js';
import { VdiDevice } from '../../src/export/vdi-device.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { objectsOf, type Vdi } from '../../src/vdi/vdi.js';
import type { MemoryDisk } from '../stores/memory-disk.js';
import { MemoryStore } from '../stores/memory-store.js';

const SIZE = 1024 * 1024;

let store: MemoryStore;
let catalog: VdiCatalog;
let vdi: Vdi;

beforeEach(async () => {
  store = new MemoryStore();
  catalog = new VdiCatalog(store);
  await catalog.create('disk', SIZE);
  vdi = await catalog.openVdi('disk');
});

async function bytesOf(spec: string): Promise<Buffer> {
  const opened = await catalog.openVdi(spec);
  const bytes = Buffer.alloc(opened.size, 0xff);
  await opened.read(0, bytes);
  await catalog.release(opened);
  return bytes;
}

const diskOf = (of: Vdi): MemoryDisk => store.disks.get(of.record.vid) as MemoryDisk;

describe('a store whose disks do copy-on-write themselves', () => {
  test('snapshots, clones, rolls back, resizes and deletes through the same catalog', async () => {
    await vdi.write(100, Buffer.from('first'), true);
    await catalog.snapshot('disk', 'a');
    await vdi.write(100, Buffer.from('other'), false);
    await vdi.zero(4096, 4096, { noHole: true, fua: false });
    expect((await bytesOf('disk@a')).toString('latin1', 100, 105)).toBe('first');
    expect((await bytesOf('disk')).toString('latin1', 100, 105)).toBe('other');
    await catalog.clone('disk@a', 'clone');
    expect((await bytesOf('clone')).toString('latin1', 100, 105)).toBe('first');
    await catalog.resize('disk', 2 * SIZE);
    expect(vdi.size).toBe(2 * SIZE);
    await catalog.release(vdi);
    await catalog.rollback('disk@a');
    expect((await bytesOf('disk')).toString('latin1', 100, 105)).toBe('first');
    await catalog.remove('disk@a');
    expect((await catalog.list()).map(({ name, tag }) => [name, tag])).toEqual([
      ['clone', ''],
      ['disk', ''],
    ]);
  });

  test('has temporary snapshots by the same way, if it has no cheaper one', async () => {
    await vdi.write(0, Buffer.from('before'), false);
    const { vid, tag } = await catalog.snapshotTemporary('disk', 'now');
    await vdi.write(0, Buffer.from('after!'), false);
    expect(tag).toBe('now');
    const stored = Buffer.alloc(6);
    store.disks.get(vid)?.readDisk(0, stored);
    expect(stored.toString('latin1')).toBe('before');
    expect((await bytesOf('disk@now')).toString('latin1', 0, 6)).toBe('before');
    await catalog.dropTemporary('disk', 'now');
    expect(store.disks.has(vid)).toBe(false);
  });

  test('gets no request outside the disk, and no change of a snapshot or of a read-only store', async () => {
    await catalog.snapshot('disk', 'a');
    const snapshot = await catalog.openVdi('disk@a');
    const asked = [diskOf(vdi).requests, diskOf(snapshot).requests];
    expect(() => vdi.read(SIZE - 1, Buffer.alloc(2))).toThrow(/behind its end/);
    expect(() => vdi.read(-1, Buffer.alloc(1))).toThrow(/invariant/);
    expect(() => vdi.write(SIZE - 1, Buffer.alloc(2), false)).toThrow(expect.objectContaining({ code: 'NO_SPACE' }));
    expect(() => vdi.zero(SIZE, 1, { noHole: false, fua: false })).toThrow(/behind its end/);
    expect(() => snapshot.write(0, Buffer.alloc(1), false)).toThrow(/is a snapshot/);
    expect([diskOf(vdi).requests, diskOf(snapshot).requests]).toEqual(asked);
    store.readOnlyBecause = 'the medium is read-only';
    const other = await new VdiCatalog(store).openVdi('disk');
    expect(() => other.trim(0, 512, false)).toThrow(/nothing is written: the medium is read-only/);
  });

  test('is not used any more once it is closed', async () => {
    await catalog.release(vdi);
    expect(store.disks.get(vdi.record.vid)?.isOpen).toBe(false);
    expect(() => vdi.read(0, Buffer.alloc(1))).toThrow(/invariant.*after its close/);
    expect(() => vdi.write(0, Buffer.alloc(1), false)).toThrow(/invariant.*after its close/);
  });

  test('that cannot tell data from holes, or changes, has data and changes everywhere', async () => {
    await catalog.snapshot('disk', 'a');
    const base = await catalog.openVdi('disk@a');
    diskOf(vdi).diskExtents = undefined;
    diskOf(vdi).diskChanges = undefined;
    const extents = async (offset: number, length: number, sink: (...of: [number, number, number]) => boolean) => {
      await vdi.extents(offset, length, (at, size, hole) => sink(at, size, hole ? 3 : 0));
    };
    const all = { ranges: [{ offset: 0, length: SIZE }], next: null };
    expect(await dataPageOf(SIZE, 0, extents)).toEqual(all);
    expect(await changesPage(vdi, base, 0)).toEqual(all);
    expect(vdi.isHole(0, SIZE)).toBe(false);
    expect(() => objectsOf(vdi)).toThrow(/no map of objects/);
  });

  test('may answer late, and for a part only: the rest counts as data, and as changed', async () => {
    await catalog.snapshot('disk', 'a');
    const base = await catalog.openVdi('disk@a');
    const late = async (_of: unknown, offset: number, sink: ExtentSink): Promise<void> => {
      await new Promise((resolve) => setImmediate(resolve));
      sink(offset, 4096, true);
      sink(offset + 4096, 4096, true);
      sink(offset + 8192, 4096, false);
    };
    const disk = diskOf(vdi);
    disk.diskExtents = (offset, length, sink) => late(length, offset, sink);
    disk.diskChanges = ({ tag }, offset, length, sink) => {
      expect(tag).toBe('a');
      return late(length, offset, sink);
    };
    const device = new VdiDevice(vdi, {
      tags: ['a'],
      isReadOnly: false,
      exportName: 'disk',
      peer: {} as never,
      openBase: () => Promise.resolve(base),
      releaseBase: () => Promise.resolve(),
      close: () => undefined,
    });
    const told: [number, number, number][] = [];
    const sink = (...extent: [number, number, number]): boolean => told.push(extent) > 0;
    await device.extents('base:allocation', 0, SIZE, sink);
    await device.extents('sheepgate:changed:a', 0, SIZE, sink);
    expect(told).toEqual([
      [0, 8192, 3],
      [8192, SIZE - 8192, 0],
      [0, 8192, 1],
      [8192, 4096, 0],
      [12_288, SIZE - 12_288, 1],
    ]);
    await device.close('disconnect');
  });
});
