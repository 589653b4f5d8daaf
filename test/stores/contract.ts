/**
 * The rules for every store, through the catalog and open VDIs: names, sizes, bytes, snapshots, clones, holes, changes, and the
 * content after the store was closed or killed. Owns no VDI beyond each test.
 */
import { expect, test } from 'vitest';
import {
  bytesOf,
  changesOf,
  checkContent,
  codeOf,
  Disk,
  expectSame,
  extentsOf,
  type Extent,
  type Session,
} from './session.js';

const BLOCK = 4096;

export function contract(session: Session): void {
  names(session);
  content(session);
  holes(session);
  if (session.abilities.canSnapshot) snapshots(session);
  if (session.abilities.canSnapshotTemporarily) temporaries(session);
  if (session.abilities.canClone) clones(session);
  if (session.abilities.canResize) sizes(session);
  if (session.abilities.tellsChanges) changes(session);
  if (session.abilities.keepsState) endings(session);
}

function names(session: Session): void {
  const { objectSize: OBJECT } = session;

  test('a VDI that was made is found by its name, in the list and by its ID, with the size that was asked for', async () => {
    const name = session.newName();
    const made = await session.create(name, 3 * OBJECT + 512);
    const { vid, size, isSnapshot, tag, blockSizeShift, snapshotAt } = await session.catalog.find(name);
    expect({ vid, size, isSnapshot, tag, shift: blockSizeShift, snapshotAt }).toEqual({
      vid: made.vid,
      size: 3 * OBJECT + 512,
      isSnapshot: false,
      tag: '',
      shift: Math.log2(OBJECT),
      snapshotAt: 0,
    });
    expect(await session.names()).toEqual([name]);
    expect((await session.catalog.find(`@${vid.toString(16)}`)).name).toBe(name);
    expect(await session.catalog.named(name)).toHaveLength(1);
    expect(await session.catalog.named('nobody')).toEqual([]);
  });

  test('a name that does not exist is refused with NO_VDI, a tag with NO_TAG', async () => {
    const { catalog } = session;
    const name = session.newName();
    await session.create(name, OBJECT);
    expect(await codeOf(() => catalog.find('nobody'))).toBe('NO_VDI');
    expect(await codeOf(() => catalog.find('nobody@s'))).toBe('NO_VDI');
    expect(await codeOf(() => catalog.find(`${name}@s`))).toBe('NO_TAG');
    expect(await codeOf(() => catalog.find('@ffffff'))).toBe('NO_VDI');
    expect(await codeOf(() => catalog.openVdi('nobody'))).toBe('NO_VDI');
    expect(await codeOf(() => catalog.remove('nobody'))).toBe('NO_VDI');
    expect(await codeOf(() => catalog.snapshot('nobody', 's'))).toBe('NO_VDI');
    expect(await codeOf(() => catalog.resize('nobody', 2 * OBJECT))).toBe('NO_VDI');
    expect(await codeOf(() => catalog.show('nobody'))).toBe('NO_VDI');
  });

  test('a name that is taken is refused with EXISTS, and its VDI is unchanged', async () => {
    const { name, disk } = await session.newDisk(1);
    await disk.write(0, BLOCK, 1);
    expect(await codeOf(() => session.create(name, OBJECT))).toBe('EXISTS');
    await disk.check();
    await session.release(disk.vdi);
  });

  test('a VDI that was deleted is gone, its space is given back, and its name is free for an empty one', async () => {
    const { name, disk } = await session.newDisk(2);
    await disk.write(0, 2 * OBJECT, 1);
    await session.release(disk.vdi);
    await session.catalog.remove(name);
    expect(await session.names()).toEqual([]);
    await session.checkNothingLeft();
    const again = await session.newDisk(2, name);
    await again.disk.check();
    await session.release(again.disk.vdi);
  });

  test('the deletion of an open VDI is refused with BUSY until its last user has released it', async () => {
    const { name, disk } = await session.newDisk(1);
    const second = await session.openVdi(name);
    expect(await codeOf(() => session.catalog.remove(name))).toBe('BUSY');
    await session.catalog.release(second);
    expect(await codeOf(() => session.catalog.remove(name))).toBe('BUSY');
    expect(await codeOf(() => session.catalog.check({ repair: false }))).toBe('BUSY');
    expect((await session.catalog.show(name)).open).toBe(1);
    await session.release(disk.vdi);
    expect((await session.catalog.show(name)).open).toBe(0);
    await session.catalog.remove(name);
  });

  test('all users of one VDI share one opening, and one release too many is an internal error', async () => {
    const { name, disk } = await session.newDisk(1);
    const second = await session.openVdi(name);
    expect(second).toBe(disk.vdi);
    await session.catalog.release(second);
    await disk.write(0, BLOCK, 1);
    await session.release(disk.vdi);
    expect(await codeOf(() => session.catalog.release(disk.vdi))).toMatch(/^invariant/);
    await session.checkSpec(name, disk.content);
  });

  test('details in one pass are those that each VDI has alone', async () => {
    for (let n = 0; n < session.repeats(4); n++) {
      const { name, disk } = await session.newDisk(4);
      await disk.write(n * OBJECT, BLOCK, 1);
      await disk.vdi.flush();
      if (session.abilities.canSnapshot) await session.catalog.snapshot(name, 's');
      await disk.write(0, BLOCK, 2);
      await session.release(disk.vdi);
    }
    const details = await session.catalog.details();
    expect(details.map(({ name }) => name)).toEqual((await session.catalog.list()).map(({ name }) => name));
    for (const each of details) {
      expect(each).toEqual(await session.catalog.show(each.tag === '' ? each.name : `${each.name}@${each.tag}`));
      expect(each.exclusiveBytes).toBeLessThanOrEqual(each.allocatedBytes);
      expect(each.allocatedBytes).toBeGreaterThan(0);
    }
  });

  test('a VDI that a command fills is UNFINISHED for all others until that run has finished it', async () => {
    const { catalog } = session;
    const name = session.newName();
    const beginning = { by: 'import', of: 'ab', size: 2 * OBJECT, overwrites: false, goesOn: false } as const;
    const begin = { ...beginning, blockSizeShift: Math.log2(OBJECT), run: '01' };
    await catalog.begin(name, begin);
    expect(await codeOf(() => catalog.openVdi(name))).toBe('UNFINISHED');
    expect(await codeOf(() => catalog.finish(name, '02'))).toBe('UNFINISHED');
    expect(await codeOf(() => catalog.begin(name, { ...begin, by: 'restore' }))).toBe('EXISTS');
    const vdi = await catalog.openVdi(name, { run: '01' });
    await vdi.write(5, Buffer.alloc(10, 1), false);
    await catalog.release(vdi);
    await catalog.finish(name, '01');
    expect((await catalog.find(name)).unfinished).toBeUndefined();
    await session.checkSpec(name, Buffer.alloc(2 * OBJECT).fill(1, 5, 15));
    expect(await codeOf(() => catalog.begin(name, begin))).toBe('EXISTS');
  });

  test('a snapshot of a VDI that is being filled is finished; its VDI is not, until it is rolled back by somebody else', async (context) => {
    const { catalog, abilities } = session;
    if (!abilities.canSnapshot || !abilities.canClone) return context.skip();
    const name = session.newName();
    const run = '01';
    const beginning = { by: 'import', of: 'ab', size: 2 * OBJECT, overwrites: false, goesOn: false } as const;
    await catalog.begin(name, { ...beginning, blockSizeShift: Math.log2(OBJECT), run });
    const disk = new Disk(await catalog.openVdi(name, { run }));
    await disk.write(5, 10, 1);
    expect(await codeOf(() => catalog.snapshot(name, 's'))).toBe('UNFINISHED');
    await catalog.snapshot(name, 's', { run });
    const frozen = disk.now();
    await disk.write(OBJECT, 10, 2);
    await catalog.release(disk.vdi);
    expect((await catalog.find(`${name}@s`)).unfinished).toBeUndefined();
    await session.checkSpec(`${name}@s`, frozen);
    expect((await catalog.find(name)).unfinished?.run).toBe(run);
    await catalog.rollback(`${name}@s`, { run });
    expect((await catalog.find(name)).unfinished?.run).toBe(run);
    await catalog.rollback(`${name}@s`);
    expect((await catalog.find(name)).unfinished).toBeUndefined();
    await session.checkSpec(name, frozen);
  });

  test('a check of a sound store finds nothing', async () => {
    const { name, disk } = await session.newDisk(3);
    await disk.write(0, 2 * OBJECT, 1);
    await session.release(disk.vdi);
    const report = await session.catalog.check({ repair: false });
    expect(report.problems).toEqual([]);
    expect(report.vdis).toBeGreaterThanOrEqual(1);
    await session.checkSpec(name, disk.content);
  });
}

function content(session: Session): void {
  const { objectSize: OBJECT } = session;

  test('what was written is read, and unwritten space is zeros', async () => {
    const { disk } = await session.newDisk(9);
    await disk.write(1000, 5000, 1);
    await disk.write(3 * OBJECT - 700, 5 * OBJECT, 2);
    await disk.write(9 * OBJECT - 1, 1, 3);
    await disk.check();
    for (const [at, length] of [
      [0, 1],
      [999, 5003],
      [OBJECT - 1, 2],
      [2 * OBJECT + 17, 4 * OBJECT],
      [9 * OBJECT - 1, 1],
    ] as const) {
      const part = Buffer.alloc(length, 0xaa);
      await disk.vdi.read(at, part);
      expectSame(part, disk.content.subarray(at, at + length), `${length} bytes at ${at}`);
    }
    await session.release(disk.vdi);
  });

  test('a disk that does not end where an object does is read, written, trimmed and told of up to its last byte', async () => {
    const name = session.newName();
    await session.create(name, 2 * OBJECT + 1024);
    const disk = new Disk(await session.openVdi(name));
    await disk.write(2 * OBJECT + 500, 524, 7);
    await disk.check();
    await disk.trim(2 * OBJECT, 1024);
    await disk.check();
    await disk.write(OBJECT, OBJECT + 1024, 8, true);
    await disk.zero(2 * OBJECT + 512, 512, true);
    await disk.check();
    await session.release(disk.vdi);
    await session.checkSpec(name, disk.content);
  });

  test('a trimmed object that is written again at once keeps what was written', async () => {
    const { disk } = await session.newDisk(3);
    for (let round = 1; round <= 25; round++) {
      await disk.write(0, 2 * OBJECT, round);
      await disk.trim(0, 2 * OBJECT);
      await disk.write(OBJECT + 100, 50, round);
    }
    await disk.check();
    await session.release(disk.vdi);
  });

  test('a fast zero of what is a hole already is done, with its neighbours as they were', async () => {
    const { disk } = await session.newDisk(3);
    await disk.write(OBJECT, OBJECT, 1);
    await disk.vdi.zero(0, BLOCK, { noHole: false, fua: false, fastZero: true });
    await disk.vdi.zero(2 * OBJECT, OBJECT, { noHole: false, fua: true, fastZero: true });
    await disk.check();
    await session.release(disk.vdi);
  });

  test('a cache hint changes nothing, whether there is data or not', async () => {
    const { disk } = await session.newDisk(3);
    await disk.write(OBJECT - 5, 10, 1);
    await disk.vdi.cache(0, 3 * OBJECT);
    await disk.vdi.cache(2 * OBJECT, BLOCK);
    await disk.check();
    await session.release(disk.vdi);
  });
}

function holes(session: Session): void {
  const { objectSize: OBJECT } = session;

  test('an empty disk is one hole, also when only a part of it is asked about', async () => {
    const { disk } = await session.newDisk(100);
    const { vdi } = disk;
    expect(await extentsOf(vdi)).toEqual([{ at: 0, length: 100 * OBJECT, flag: true }]);
    expect(await extentsOf(vdi, 700, OBJECT)).toEqual([{ at: 700, length: OBJECT, flag: true }]);
    if (session.abilities.knowsHolesAtOnce) expect(vdi.isHole(0, 100 * OBJECT)).toBe(true);
    await session.release(vdi);
  });

  test('objects that were written are data, those around them holes; a sink that has enough is asked no more', async () => {
    const { disk } = await session.newDisk(5);
    const { vdi } = disk;
    await disk.write(OBJECT, OBJECT, 1);
    await disk.write(3 * OBJECT, OBJECT, 2);
    const expected: Extent[] = [0, 1, 2, 3, 4].map((idx) => ({
      at: idx * OBJECT,
      length: OBJECT,
      flag: idx % 2 === 0,
    }));
    expect(await extentsOf(vdi)).toEqual(expected);
    if (session.abilities.knowsHolesAtOnce) expect(vdi.isHole(0, OBJECT)).toBe(true);
    expect(vdi.isHole(OBJECT - 1, 2)).toBe(false);
    let asked = 0;
    await vdi.extents(0, vdi.size, () => ++asked < 2);
    expect(asked).toBe(2);
    await disk.trim(OBJECT, OBJECT);
    expect(await extentsOf(vdi, 0, 3 * OBJECT)).toEqual([{ at: 0, length: 3 * OBJECT, flag: true }]);
    await session.release(vdi);
  });

  test('zeros that must stay allocated are, and a trim gives their space back', async () => {
    const { name, disk } = await session.newDisk(2);
    await disk.zero(0, OBJECT, true);
    await disk.check();
    await disk.vdi.flush();
    expect((await session.catalog.show(name)).allocatedBytes).toBe(OBJECT);
    await disk.trim(0, OBJECT);
    await disk.vdi.flush();
    expect((await session.catalog.show(name)).allocatedBytes).toBe(0);
    await session.release(disk.vdi);
    await session.catalog.remove(name);
  });
}

function snapshots(session: Session): void {
  const { objectSize: OBJECT } = session;

  test('a snapshot keeps its bytes when its VDI is written, trimmed and zeroed, and is listed before it', async () => {
    const { name, disk } = await session.newDisk(5);
    await disk.write(0, 4 * OBJECT, 1);
    const record = await session.catalog.snapshot(name, 's');
    const frozen = disk.now();
    const snapshot = await session.openVdi(`${name}@s`);
    await disk.write(OBJECT / 2, OBJECT, 2);
    await disk.trim(2 * OBJECT, OBJECT);
    await disk.zero(3 * OBJECT + 10, 100, true);
    await disk.write(4 * OBJECT, 100, 3);
    await checkContent(snapshot, frozen);
    await disk.check();
    await session.release(snapshot, disk.vdi);
    await session.checkSpec(`${name}@s`, frozen);
    expect(await session.names()).toEqual([`${name}@s`, name]);
    expect(record).toMatchObject({ isSnapshot: true, tag: 's', name, size: 5 * OBJECT });
    expect(Math.abs(record.snapshotAt - Date.now())).toBeLessThan(120_000);
  });

  test('a tag that is taken is refused with EXISTS, a snapshot of a snapshot with IS_SNAPSHOT', async () => {
    const { name, disk } = await session.newDisk(1);
    await session.release(disk.vdi);
    await session.catalog.snapshot(name, 's');
    expect(await codeOf(() => session.catalog.snapshot(name, 's'))).toBe('EXISTS');
    expect(await codeOf(() => session.catalog.snapshot(`${name}@s`, 't'))).toBe('IS_SNAPSHOT');
    expect(await session.names()).toEqual([`${name}@s`, name]);
  });

  test('snapshots outlive their VDI and keep its name taken', async () => {
    const { name, disk } = await session.newDisk(2);
    await disk.write(5, OBJECT, 1);
    await session.catalog.snapshot(name, 's');
    await session.release(disk.vdi);
    await session.catalog.remove(name);
    await session.checkSpec(`${name}@s`, disk.content);
    expect(await codeOf(() => session.catalog.find(name))).toBe('NO_VDI');
    expect(await codeOf(() => session.create(name, OBJECT))).toBe('EXISTS');
    await session.catalog.remove(`${name}@s`);
    await session.checkNothingLeft();
  });

  test('snapshots of a VDI are listed in the order in which they were taken, and each has its own bytes', async () => {
    const { name, disk } = await session.newDisk(3);
    const taken = new Map<string, Buffer>();
    for (const [n, tag] of ['zebra', 'ant', 'mouse', 'bee'].entries()) {
      await disk.write((n % 3) * OBJECT + n * 100, OBJECT / 2, n + 1);
      await session.catalog.snapshot(name, tag);
      taken.set(`${name}@${tag}`, disk.now());
    }
    expect(await session.names()).toEqual([...taken.keys(), name]);
    await session.catalog.remove(`${name}@ant`);
    taken.delete(`${name}@ant`);
    for (const [spec, expected] of taken) await session.checkSpec(spec, expected);
    await session.release(disk.vdi);
    await session.checkSpec(name, disk.content);
  });

  test('a snapshot bears the time that it was given, and what it shares with its VDI is exclusive to neither', async () => {
    const { name, disk } = await session.newDisk(4);
    await disk.write(0, 3 * OBJECT, 1, true);
    const takenAt = Date.UTC(2010, 0, 2, 3, 4, 5);
    expect((await session.catalog.snapshot(name, 's', { takenAt })).snapshotAt).toBe(takenAt);
    expect((await session.catalog.find(`${name}@s`)).snapshotAt).toBe(takenAt);
    await disk.write(OBJECT, OBJECT, 2, true);
    await disk.write(3 * OBJECT, BLOCK, 2, true);
    const spaceOf = async (spec: string): Promise<number[]> => {
      const { allocatedBytes, exclusiveBytes } = await session.catalog.show(spec);
      return [allocatedBytes / OBJECT, exclusiveBytes / OBJECT];
    };
    expect(await spaceOf(name)).toEqual([4, 2]);
    expect(await spaceOf(`${name}@s`)).toEqual([3, 1]);
    await session.release(disk.vdi);
  });

  test('when the last snapshot is gone, nothing is copied any more and nothing of it takes space', async (context) => {
    if (!session.abilities.copiesEndWithSnapshots) return context.skip();
    const { name, disk } = await session.newDisk(4);
    await disk.write(0, 4 * OBJECT, 1);
    await session.catalog.snapshot(name, 'a');
    await disk.write(0, BLOCK, 2);
    if (session.abilities.countsCopies) expect(disk.vdi.copies).toBe(1);
    await session.catalog.snapshot(name, 'b');
    await disk.write(OBJECT, BLOCK, 3);
    for (const tag of ['a', 'b']) await session.catalog.remove(`${name}@${tag}`);
    const { copies } = disk.vdi;
    for (let idx = 0; idx < 4; idx++) await disk.write(idx * OBJECT + 7, 512, 9);
    expect(disk.vdi.copies).toBe(copies);
    await disk.check();
    await disk.vdi.flush();
    expect(await session.catalog.show(name)).toMatchObject({
      allocatedBytes: 4 * OBJECT,
      exclusiveBytes: 4 * OBJECT,
    });
    await session.release(disk.vdi);
  });

  test('trims of what is zeros already copy nothing, and a fast zero that would copy an object is SLOW before anything changes', async () => {
    const { name, disk } = await session.newDisk(3);
    await disk.write(0, OBJECT, 1);
    await disk.write(OBJECT, OBJECT, 0);
    await session.catalog.snapshot(name, 's');
    const { copies } = disk.vdi;
    await disk.trim(OBJECT, OBJECT);
    await disk.trim(OBJECT + 512, 5000);
    await disk.trim(2 * OBJECT, OBJECT);
    expect(disk.vdi.copies).toBe(copies);
    const fast = { noHole: false, fua: false, fastZero: true };
    if (session.abilities.copiesBlocks) {
      await disk.vdi.zero(OBJECT / 2, BLOCK, fast);
      disk.content.fill(0, OBJECT / 2, OBJECT / 2 + BLOCK);
    } else {
      expect(await codeOf(() => disk.vdi.zero(OBJECT / 2, BLOCK, fast))).toBe('SLOW');
      expect(disk.vdi.copies).toBe(copies);
    }
    await disk.check();
    await session.release(disk.vdi);
  });
}

function temporaries(session: Session): void {
  const { objectSize: OBJECT } = session;

  test('a temporary snapshot leaves the vid alone and nothing to be copied', async () => {
    const { name, disk } = await session.newDisk(8);
    await disk.write(0, 8 * OBJECT, 1);
    const { vid } = disk.vdi.record;
    for (let round = 2; round < 2 + session.repeats(6); round++) {
      const frozen = disk.now();
      await session.catalog.snapshotTemporary(name, 'now');
      const now = await session.openVdi(`${name}@now`);
      expect(now.record).toMatchObject({ isTemporary: true, isSnapshot: true, tag: 'now' });
      await disk.write(OBJECT / 2, 3 * OBJECT, round);
      await disk.trim(5 * OBJECT, OBJECT);
      await disk.write(5 * OBJECT + 9, 9, round);
      await checkContent(now, frozen);
      await disk.check();
      await session.release(now);
      await session.catalog.dropTemporary(name, 'now');
    }
    expect(disk.vdi.record.vid).toBe(vid);
    const { copies } = disk.vdi;
    for (let idx = 0; idx < 8; idx++) await disk.write(idx * OBJECT + 7, 512, 99);
    expect(disk.vdi.copies).toBe(copies);
    await disk.check();
    expect(await session.names()).toEqual([name]);
    await session.release(disk.vdi);
  });

  test('two temporary snapshots with labels of their own do not disturb each other', async () => {
    const { name, disk } = await session.newDisk(4);
    await disk.write(0, 4 * OBJECT, 1);
    const a = disk.now();
    await session.catalog.snapshotTemporary(name, 'now:a');
    await disk.write(100, OBJECT, 2);
    const b = disk.now();
    await session.catalog.snapshotTemporary(name, 'now:b');
    await disk.write(200, 2 * OBJECT, 3);
    await session.checkSpec(`${name}@now:a`, a);
    await session.checkSpec(`${name}@now:b`, b);
    await session.catalog.dropTemporary(name, 'now:a');
    await disk.write(0, 4 * OBJECT, 4);
    await session.checkSpec(`${name}@now:b`, b);
    await session.catalog.dropTemporary(name, 'now:b');
    await disk.check();
    await session.release(disk.vdi);
  });

  test('a temporary snapshot that is open is BUSY, and one that was dropped is gone for who opens it', async () => {
    const { name, disk } = await session.newDisk(1);
    await session.catalog.snapshotTemporary(name, 'now');
    const now = await session.openVdi(`${name}@now`);
    expect(await codeOf(() => session.catalog.dropTemporary(name, 'now'))).toBe('BUSY');
    await session.release(now);
    await session.catalog.dropTemporary(name, 'now');
    expect(await codeOf(() => session.catalog.openVdi(`${name}@now`))).toBe('NO_TAG');
    expect(await codeOf(() => session.catalog.snapshotTemporary(name, 'other'))).toBe('BAD_NAME');
    await session.release(disk.vdi);
  });
}

function clones(session: Session): void {
  const { objectSize: OBJECT } = session;

  test('snapshot, clone, rollback and delete keep every byte of everybody else', async () => {
    const { name, disk } = await session.newDisk(6);
    await disk.write(0, 3 * OBJECT, 1);
    await session.catalog.snapshot(name, 'first');
    const first = disk.now();
    await disk.write(OBJECT + 5, 100, 2);
    await session.catalog.snapshot(name, 'second');
    const second = disk.now();
    await disk.write(0, 6 * OBJECT, 3);
    await session.catalog.clone(`${name}@first`, `${name}-clone`);
    const clone = new Disk(await session.openVdi(`${name}-clone`), Buffer.from(first));
    await clone.write(2 * OBJECT, 10, 9);
    await clone.check();
    await session.release(clone.vdi);
    await session.checkSpec(`${name}@first`, first);
    await session.checkSpec(`${name}@second`, second);
    await disk.check();
    await session.release(disk.vdi);
    await session.catalog.remove(`${name}@second`);
    await session.checkSpec(name, disk.content);
    await session.catalog.rollback(`${name}@first`);
    await session.checkSpec(name, first);
    expect((await session.catalog.list()).map(({ tag }) => tag).filter(Boolean)).toEqual(['first']);
    await session.catalog.remove(`${name}@first`);
    await session.checkSpec(name, first);
    await session.checkSpec(`${name}-clone`, clone.content);
  });

  test('two clones of a deleted snapshot never see each other, whatever each has flushed', async () => {
    const { name, disk } = await session.newDisk(4);
    await disk.write(0, 4 * OBJECT, 1, true);
    const base = disk.now();
    await session.release(disk.vdi);
    await session.catalog.snapshot(name, 's');
    await session.catalog.clone(`${name}@s`, `${name}-a`);
    await session.catalog.clone(`${name}@s`, `${name}-b`);
    await session.catalog.remove(`${name}@s`);
    await session.catalog.remove(name);
    const a = new Disk(await session.openVdi(`${name}-a`), Buffer.from(base));
    const b = new Disk(await session.openVdi(`${name}-b`), Buffer.from(base));
    // a copies its object but does not flush: on disk its map still points at the shared one.
    await a.write(0, BLOCK, 2);
    await b.write(0, BLOCK, 3, true);
    await a.vdi.flush();
    await b.vdi.flush();
    // Now each has its own; the other three objects are shared by both.
    await a.write(BLOCK, BLOCK, 4);
    await a.check();
    await b.check();
    if (session.abilities.countsCopies) expect([a.vdi.copies, b.vdi.copies]).toEqual([1, 1]);
    await session.release(a.vdi);
    await session.catalog.remove(`${name}-a`);
    await b.write(2 * OBJECT, BLOCK, 5);
    await b.check();
    await session.release(b.vdi);
  });

  test('only snapshots are cloned and rolled back to, to a name that is free and of a VDI that nobody has open', async () => {
    const { name, disk } = await session.newDisk(1);
    await session.catalog.snapshot(name, 's');
    expect(await codeOf(() => session.catalog.clone(name, `${name}-clone`))).toBe('IS_SNAPSHOT');
    expect(await codeOf(() => session.catalog.clone(`${name}@s`, name))).toBe('EXISTS');
    expect(await codeOf(() => session.catalog.clone(`${name}@t`, `${name}-clone`))).toBe('NO_TAG');
    expect(await codeOf(() => session.catalog.rollback(name))).toBe('IS_SNAPSHOT');
    expect(await codeOf(() => session.catalog.rollback(`${name}@s`))).toBe('BUSY');
    await session.release(disk.vdi);
    expect(await session.names()).toEqual([`${name}@s`, name]);
  });

  test('a temporary snapshot is neither cloned nor rolled back to: it goes when its reader does', async (context) => {
    if (!session.abilities.canSnapshotTemporarily) return context.skip();
    const { catalog } = session;
    const { name, disk } = await session.newDisk(1);
    await session.release(disk.vdi);
    const { vid } = await catalog.snapshotTemporary(name, 'now');
    const refused = async (): Promise<void> => {
      expect(await codeOf(() => catalog.clone(`${name}@now`, `${name}-clone`))).toBe('UNSUPPORTED');
      expect(await codeOf(() => catalog.rollback(`${name}@now`))).toBe('UNSUPPORTED');
      expect(await session.names()).toEqual([`${name}@now`, name]);
    };
    await refused();
    // Also while it is kept for a client: a rollback ends such snapshots, and one that is refused must not.
    const kept = { client: 'a client', until: Date.now() + 60_000 };
    catalog.keeper = { kept: (other) => (other === vid ? kept : undefined), dropped: () => undefined };
    await refused();
    await catalog.dropTemporary(name, 'now');
  });
}

function sizes(session: Session): void {
  const { objectSize: OBJECT } = session;

  test('a disk that grows keeps its content and has zeros behind it, also while it is open', async () => {
    const { name, disk } = await session.newDisk(2);
    await disk.write(0, 2 * OBJECT, 1);
    await session.catalog.resize(name, 5 * OBJECT);
    const grown = new Disk(disk.vdi, Buffer.concat([disk.content, Buffer.alloc(3 * OBJECT)]));
    await grown.check();
    await grown.write(4 * OBJECT, 100, 2);
    await session.release(disk.vdi);
    await session.checkSpec(name, grown.content);
  });

  test('what a disk that shrinks cuts off is gone for good; its snapshots keep theirs', async (context) => {
    const { name, disk } = await session.newDisk(4);
    await disk.write(0, 4 * OBJECT, 1);
    if (session.abilities.canSnapshot) await session.catalog.snapshot(name, 's');
    expect(await codeOf(() => session.catalog.resize(name, OBJECT))).toBe('NEEDS_FORCE');
    expect(await codeOf(() => session.catalog.resize(name, OBJECT, { force: true }))).toBe('BUSY');
    await session.release(disk.vdi);
    await session.catalog.resize(name, OBJECT + 512, { force: true });
    await session.checkSpec(name, disk.content.subarray(0, OBJECT + 512));
    await session.catalog.resize(name, 4 * OBJECT);
    await session.checkSpec(name, Buffer.alloc(4 * OBJECT).fill(1, 0, OBJECT + 512));
    if (!session.abilities.canSnapshot) return context.skip();
    await session.checkSpec(`${name}@s`, disk.content);
  });

  test('a disk shrinks where a snapshot shares zeros with it, and leaves nothing behind its end', async (context) => {
    const { catalog, abilities } = session;
    if (!abilities.canSnapshot) return context.skip();
    const { name, disk } = await session.newDisk(3);
    await disk.write(0, OBJECT, 1);
    await disk.zero(OBJECT, 2 * OBJECT, true);
    await catalog.snapshot(name, 's');
    await session.release(disk.vdi);
    await catalog.resize(name, 512, { force: true });
    await session.checkSpec(name, disk.content.subarray(0, 512));
    expect((await catalog.check({ repair: false })).problems).toEqual([]);
    await session.checkSpec(`${name}@s`, disk.content);
    await catalog.remove(`${name}@s`);
    await catalog.remove(name);
    await session.checkNothingLeft();
  });
}

function changes(session: Session): void {
  const { objectSize: OBJECT } = session;

  test('what has changed since a snapshot is told to the object at least, in both directions and between snapshots', async () => {
    const { name, disk } = await session.newDisk(6);
    await disk.write(0, 4 * OBJECT, 1);
    await session.catalog.snapshot(name, 'a');
    await disk.write(OBJECT + 5, 1, 2);
    await session.catalog.snapshot(name, 'b');
    await disk.write(5 * OBJECT, BLOCK, 3);
    await disk.trim(3 * OBJECT, OBJECT);
    const [a, b] = [await session.openVdi(`${name}@a`), await session.openVdi(`${name}@b`)];
    const changed = (found: Extent[]): number[] =>
      found.flatMap(({ at, length, flag }) =>
        flag ? Array.from({ length: Math.ceil(length / OBJECT) }, (_, n) => Math.floor(at / OBJECT) + n) : [],
      );
    expect(changed(await changesOf(disk.vdi, a))).toEqual([1, 3, 5]);
    expect(changed(await changesOf(disk.vdi, b))).toEqual([3, 5]);
    expect(changed(await changesOf(b, a))).toEqual([1]);
    expect(changed(await changesOf(a, b))).toEqual([1]);
    expect(changed(await changesOf(a, a))).toEqual([]);
    // What is not known to be unchanged counts as changed; the byte that was written always does.
    const [first, ...rest] = await changesOf(disk.vdi, a, OBJECT + 5, OBJECT);
    expect(first).toMatchObject({ at: OBJECT + 5, flag: true });
    expect(rest).toEqual([
      { at: 5 + OBJECT + (first?.length ?? 0), length: OBJECT - (first?.length ?? 0), flag: false },
    ]);
    await session.release(a, b, disk.vdi);
  });
}

function endings(session: Session): void {
  const { objectSize: OBJECT } = session;

  test('a store that was closed and opened again has all VDIs, snapshots, sizes and bytes', async () => {
    const { name, disk } = await session.newDisk(4);
    await disk.write(OBJECT / 2, 2 * OBJECT, 1);
    const frozen = disk.now();
    if (session.abilities.canSnapshot) await session.catalog.snapshot(name, 's');
    await disk.write(0, BLOCK, 2);
    await disk.trim(OBJECT, OBJECT);
    await session.create(`${name}-empty`, 512);
    await session.release(disk.vdi);
    const before = await session.catalog.list();
    await session.reopen();
    expect(await session.catalog.list()).toEqual(before);
    await session.checkSpec(name, disk.content);
    if (session.abilities.canSnapshot) await session.checkSpec(`${name}@s`, frozen);
    expect((await session.catalog.check({ repair: false })).problems).toEqual([]);
  });

  test('what a VDI that nobody has released was written is there when the store was closed', async () => {
    const { name, disk } = await session.newDisk(3);
    await disk.write(100, 2 * OBJECT, 1);
    await session.reopen();
    await session.checkSpec(name, disk.content);
  });

  test('after a kill all that a flush or a FUA request has answered is there', async () => {
    const { name, disk } = await session.newDisk(4);
    await disk.write(0, 2 * OBJECT, 1);
    await disk.vdi.flush();
    await disk.write(2 * OBJECT + 5, 100, 2, true);
    await disk.vdi.zero(OBJECT / 2, 1000, { noHole: true, fua: true });
    await disk.vdi.trim(OBJECT, OBJECT, true);
    disk.content.fill(0, OBJECT / 2, OBJECT / 2 + 1000).fill(0, OBJECT, 2 * OBJECT);
    await session.crash();
    await session.checkSpec(name, disk.content);
    expect((await session.catalog.check({ repair: false })).problems).toEqual([]);
  });

  test('after a kill a snapshot that was answered is there, and so is what was flushed after it', async (context) => {
    if (!session.abilities.canSnapshot) return context.skip();
    const { name, disk } = await session.newDisk(3);
    await disk.write(0, 3 * OBJECT, 1);
    await session.catalog.snapshot(name, 's');
    const frozen = disk.now();
    await disk.write(OBJECT, BLOCK, 2, true);
    await disk.trim(2 * OBJECT, OBJECT);
    await disk.vdi.flush();
    await session.crash();
    await session.checkSpec(`${name}@s`, frozen);
    await session.checkSpec(name, disk.content);
    await session.catalog.remove(`${name}@s`);
    await session.checkSpec(name, disk.content);
  });

  test('after a kill nothing is left of a temporary snapshot, and the next one is as good as any', async (context) => {
    if (!session.abilities.canSnapshotTemporarily) return context.skip();
    const { name, disk } = await session.newDisk(4);
    await disk.write(0, 3 * OBJECT, 1);
    await session.catalog.snapshotTemporary(name, 'now');
    await disk.write(100, OBJECT, 2);
    await disk.vdi.flush();
    await session.crash();
    const again = new Disk(await session.openVdi(name), disk.content);
    await again.write(2 * OBJECT, 10, 3);
    await again.check();
    expect(await session.names()).toEqual([name]);
    await session.catalog.snapshotTemporary(name, 'now');
    const frozen = again.now();
    await again.write(0, 3 * OBJECT, 4);
    await session.checkSpec(`${name}@now`, frozen);
    await session.catalog.dropTemporary(name, 'now');
    expectSame(await bytesOf(again.vdi), again.content, name);
    await session.release(again.vdi);
  });

  test('a VDI that a killed command was filling is still unfinished, and that command completes it', async () => {
    const name = session.newName();
    const beginning = { by: 'import', of: 'ab', size: 2 * OBJECT, overwrites: false, goesOn: true } as const;
    const begin = { ...beginning, blockSizeShift: Math.log2(OBJECT) };
    await session.catalog.begin(name, { ...begin, run: '01' });
    const vdi = await session.catalog.openVdi(name, { run: '01' });
    await vdi.write(0, Buffer.alloc(BLOCK, 1), true);
    await session.crash();
    expect(await codeOf(() => session.catalog.openVdi(name))).toBe('UNFINISHED');
    await session.catalog.begin(name, { ...begin, run: '02' });
    await session.catalog.finish(name, '02');
    await session.checkSpec(name, Buffer.alloc(2 * OBJECT).fill(1, 0, BLOCK));
  });
}
