/**
 * What every store keeps to whose VDIs consist of objects (ObjectVdi, src/store/open-vdi.ts): as src/vdi uses it, one object at a
 * time. Left out for a store whose VDIs are disks (DiskVdi).
 */
import { expect, test, type TestContext } from 'vitest';
import type { ObjectVdi } from '../../src/store/open-vdi.js';
import type { Disk, Session } from './session.js';

const BLOCK = 4096;

export function objects(session: Session): void {
  const { objectSize: OBJECT } = session;

  /** The store's side of an open disk. */
  const objectsOf = (context: TestContext, { vdi }: Disk): ObjectVdi => {
    if (vdi.opened.kind !== 'objects') return context.skip();
    return vdi.opened;
  };
  const readObject = async (of: ObjectVdi, idx: number): Promise<Buffer> => {
    const all = Buffer.alloc(OBJECT, 0xaa);
    await of.readObject(of.map[idx] ?? 0, idx, 0, all);
    return all;
  };
  const make = async (of: ObjectVdi, idx: number, offset: number, data: Buffer): Promise<void> => {
    const { creationVid } = of;
    await of.createObject(idx, offset, data, of.map[idx] ?? 0);
    await of.setOwner(idx, creationVid);
  };

  test('an object that is made is zeros but for the data laid over it, exclusive, and in the map under its vid', async (context) => {
    const { disk } = await session.newDisk(3);
    const of = objectsOf(context, disk);
    expect([...of.map]).toEqual([0, 0, 0]);
    await make(of, 1, 1000, Buffer.alloc(BLOCK, 1));
    expect(of.map[1]).toBe(of.creationVid);
    expect(of.exclusive(1)).toBe(true);
    expect((await readObject(of, 1)).equals(Buffer.alloc(OBJECT).fill(1, 1000, 1000 + BLOCK))).toBe(true);
    await of.writeObject(1, OBJECT - 10, Buffer.alloc(10, 2));
    expect((await readObject(of, 1)).subarray(OBJECT - 10)).toEqual(Buffer.alloc(10, 2));
    await session.release(disk.vdi);
  });

  test('after a snapshot an object is not exclusive; its copy has the old content with the data over it, the old one is kept', async (context) => {
    if (!session.abilities.canSnapshot) return context.skip();
    const { name, disk } = await session.newDisk(2);
    const of = objectsOf(context, disk);
    await disk.write(0, OBJECT, 1);
    await session.catalog.snapshot(name, 's');
    const before = of.map[0] ?? 0;
    expect(of.exclusive(0)).toBe(false);
    expect(of.creationVid).not.toBe(before);
    await make(of, 0, 512, Buffer.alloc(512, 2));
    expect(of.map[0]).not.toBe(before);
    expect(of.exclusive(0)).toBe(true);
    expect((await readObject(of, 0)).equals(Buffer.alloc(OBJECT, 1).fill(2, 512, 1024))).toBe(true);
    const old = Buffer.alloc(OBJECT);
    await of.readObject(before, 0, 0, old);
    expect(old.equals(Buffer.alloc(OBJECT, 1))).toBe(true);
    await session.release(disk.vdi);
    await session.checkSpec(`${name}@s`, Buffer.alloc(2 * OBJECT).fill(1, 0, OBJECT));
  });

  test('a zeroed range of an object is zeros, allocated or not, and its neighbours are as they were', async (context) => {
    const { disk } = await session.newDisk(1);
    const of = objectsOf(context, disk);
    await disk.write(0, OBJECT, 1);
    await of.zeroObject(0, BLOCK, 2 * BLOCK, { noHole: false });
    await of.zeroObject(0, OBJECT - BLOCK - 7, BLOCK, { noHole: true });
    const expected = Buffer.alloc(OBJECT, 1);
    expected.fill(0, BLOCK, 3 * BLOCK).fill(0, OBJECT - BLOCK - 7, OBJECT - 7);
    expect((await readObject(of, 0)).equals(expected)).toBe(true);
    await session.release(disk.vdi);
  });

  test('data and holes of an object come in order, and no hole has data in it; all data is said of no object with a hole', async (context) => {
    const { disk } = await session.newDisk(1);
    const of = objectsOf(context, disk);
    await make(of, 0, BLOCK, Buffer.alloc(BLOCK, 1));
    let reached = 0;
    const holes: number[] = [];
    await of.objectExtents(of.map[0] ?? 0, 0, 0, OBJECT, (at, length, isHole) => {
      expect(at).toBe(reached);
      expect(length).toBeGreaterThan(0);
      if (isHole) expect(at >= 2 * BLOCK || at + length <= BLOCK, `hole at ${at}`).toBe(true);
      if (isHole) holes.push(at);
      reached += length;
      return true;
    });
    expect(reached).toBeLessThanOrEqual(OBJECT);
    if (holes.length > 0) expect(of.isAllData?.(of.map[0] ?? 0, 0) ?? false).toBe(false);
    await session.release(disk.vdi);
  });

  test('an object that is given up reads as a hole of the disk, and one made in its place has nothing of it', async (context) => {
    const { disk } = await session.newDisk(2);
    const of = objectsOf(context, disk);
    await disk.write(0, OBJECT, 1);
    await of.setOwner(0, 0);
    expect(of.map[0]).toBe(0);
    await make(of, 0, 5, Buffer.alloc(1, 2));
    disk.content.fill(0, 0, OBJECT).fill(2, 5, 6);
    await disk.check();
    await session.release(disk.vdi);
  });

  test('what flushObject has answered for is there after a kill', async (context) => {
    if (!session.abilities.keepsState) return context.skip();
    const { name, disk } = await session.newDisk(2);
    const of = objectsOf(context, disk);
    await make(of, 1, 0, Buffer.alloc(BLOCK, 1));
    await of.flushObject(1);
    await of.writeObject(1, BLOCK, Buffer.alloc(BLOCK, 2));
    await of.flushObject(1);
    await session.crash();
    await session.checkSpec(
      name,
      Buffer.alloc(2 * OBJECT)
        .fill(1, OBJECT, OBJECT + BLOCK)
        .fill(2, OBJECT + BLOCK, OBJECT + 2 * BLOCK),
    );
  });
}
