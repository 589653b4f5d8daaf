/** Backups as an operator sees them: what is stored, restored and kept, and the messages if that is impossible. */
import fs from 'node:fs';
import path from 'node:path';
import { describe, expect, test } from 'vitest';
import { run, temporaryDirectory } from '../harness/daemon.js';
import { BackedUpDisk, bases, hashOf, qemuMissing, readWithQemu, type BackupResult } from './backups.js';
import {
  attach,
  diskUsage,
  lastLineOf,
  MIB,
  oneLineOf,
  patterned,
  sharedStore,
  testStore,
  WAYS,
  type Way,
} from './both-ways.js';

const KIB = 1024;
/** A quarter of an object: small disks keep the tests fast. */
const UNIT = 256 * KIB;
const SIZE = 48 * UNIT;

const withDaemon = sharedStore('through a daemon');

/** 48 units, data in the first 16 and in one at 40, the rest unwritten. */
async function diskWithData(way: Way): Promise<BackedUpDisk> {
  const disk = new BackedUpDisk(way === 'through a daemon' ? withDaemon() : await testStore(way), SIZE);
  await disk.create();
  await disk.write(0, patterned(16 * UNIT, 1));
  await disk.write(40 * UNIT, patterned(UNIT, 2));
  return disk;
}

function newTarget(name = 'vm'): string {
  return path.join(temporaryDirectory(), name);
}

describe.each(WAYS)('%s', (way) => {
  // The same code writes the files in both ways: qemu reads all of them in one, those of the first test in the other.
  const check = (disk: BackedUpDisk, to: string): Promise<number[]> =>
    way === 'directly on the store' ? disk.checkAll(to) : disk.checkAllByReading(to);

  test('the first backup is full, later ones hold what has changed, zeros and trimmed ranges too', async () => {
    const disk = await diskWithData(way);
    const to = newTarget();
    expect(await disk.backup(to)).toMatchObject({
      id: 1,
      kind: 'full',
      size: SIZE,
      storedBytes: 17 * UNIT,
      dropped: [],
      notes: [],
    });
    expect(diskUsage(path.join(to, 'base-1.img'))).toBeLessThan(18 * UNIT + MIB);
    await disk.write(5 * UNIT, patterned(4 * KIB, 3));
    await disk.write(9 * UNIT, Buffer.alloc(UNIT));
    await disk.trim(12 * UNIT, 4 * UNIT);
    await disk.write(30 * UNIT, patterned(UNIT, 4));
    const second = await disk.backup(to);
    // 4 KiB at 5 MiB is one cluster of 64 KiB; zeros and holes are not data.
    expect(second).toMatchObject({ id: 2, kind: 'incremental', storedBytes: UNIT + 64 * KIB });
    expect(second.changedBytes).toBe(16 * UNIT);
    expect(diskUsage(second.file)).toBeLessThan(2 * UNIT);
    expect(await disk.backup(to)).toMatchObject({ id: 3, changedBytes: 0, storedBytes: 0, notes: [] });
    expect(await disk.checkAll(to)).toEqual([1, 2, 3]);
    await disk.checkRestored(to);
    await disk.checkSource();
    expect(await disk.target.ok('check')).toMatch(/, 0 problems/);
  });

  test('a disk that grows, shrinks and grows again is restored with the size of each backup', async () => {
    const disk = await diskWithData(way);
    const to = newTarget();
    await disk.backup(to);
    await disk.resize(61 * UNIT + 512);
    await disk.write(60 * UNIT, patterned(UNIT + 512, 5));
    expect(await disk.backup(to)).toMatchObject({ size: 61 * UNIT + 512 });
    await disk.resize(41 * UNIT + 512);
    await disk.backup(to);
    await disk.resize(64 * UNIT);
    await disk.backup(to);
    await disk.write(42 * UNIT, patterned(4 * KIB, 6));
    await disk.backup(to);
    expect(await check(disk, to)).toEqual([1, 2, 3, 4, 5]);
    for (const keep of [4, 3, 2, 1]) {
      await disk.backup(to, '--keep', String(keep));
      expect(await check(disk, to)).toHaveLength(keep);
    }
  });

  test('--no-base leaves no snapshot on the source and still stores only differences', async () => {
    const disk = await diskWithData(way);
    const to = newTarget();
    expect(await disk.backup(to, '--no-base')).toMatchObject({ kind: 'full', base: null });
    expect(await disk.target.names()).toEqual(['vm']);
    await disk.write(3 * UNIT, patterned(UNIT, 11));
    await disk.trim(8 * UNIT, 4 * UNIT);
    const second = await disk.backup(to, '--no-base');
    expect(second).toMatchObject({ kind: 'incremental', storedBytes: UNIT, base: null });
    expect(await disk.target.names()).toEqual(['vm']);
    // and back to a base
    expect(await disk.backup(to)).toMatchObject({ kind: 'incremental', storedBytes: 0 });
    await disk.write(3 * UNIT, patterned(UNIT, 12));
    expect(await disk.backup(to)).toMatchObject({ storedBytes: UNIT });
    expect(await disk.backup(to, '--no-base')).toMatchObject({ storedBytes: 0 });
    expect(await disk.target.names()).toEqual(['vm']);
    expect(await check(disk, to)).toEqual([1, 2, 3, 4, 5]);
  });
});

describe('one by one', () => {
  const way = 'directly on the store';
  test('only the snapshot of the last backup is kept, and it has the content of that backup', async () => {
    const disk = await diskWithData(way);
    const to = newTarget();
    for (let id = 1; id <= 3; id++) {
      const { base } = await disk.backup(to);
      expect(await disk.target.names()).toEqual([`vm@${base}`, 'vm']);
      expect(base).toMatch(new RegExp(`^backup-[0-9a-f]{8}-${id}$`));
      expect(hashOf(await disk.target.contentOf(`vm@${base}`))).toBe(disk.at.get(id));
      await disk.write(id * UNIT, patterned(512, id + 5));
    }
  });

  test('--keep 2 over five backups keeps the newest two, both intact, and no file of the others', async () => {
    const disk = await diskWithData(way);
    const to = newTarget();
    const dropped: number[] = [];
    for (let id = 1; id <= 5; id++) {
      if (id === 3) await disk.trim(0, 4 * UNIT);
      await disk.write(id * 5 * UNIT + id * 512, patterned(100 * KIB, id));
      const result = await disk.backup(to, '--keep', '2');
      expect(result.kept).toEqual(id === 1 ? [1] : [id - 1, id]);
      dropped.push(...result.dropped);
      expect(await disk.checkAll(to)).toEqual(result.kept);
    }
    expect(dropped).toEqual([1, 2, 3]);
    expect(fs.readdirSync(to).filter((name) => name.endsWith('.qcow2'))).toHaveLength(2);
    expect(fs.readdirSync(to).filter((name) => name.endsWith('.hashes'))).toHaveLength(2);
    // 4 MiB, and what was written elsewhere
    expect(diskUsage(to)).toBeLessThan(20 * UNIT + MIB);
  });

  test('a smaller --keep in the next run drops backups', async () => {
    const disk = await diskWithData(way);
    const to = newTarget();
    for (let id = 1; id <= 4; id++) {
      await disk.write(id * UNIT, patterned(64 * KIB, id));
      await disk.backup(to);
    }
    expect(await disk.backup(to, '--keep', '1')).toMatchObject({ kept: [5], dropped: [1, 2, 3, 4] });
    expect(await disk.checkAll(to)).toEqual([5]);
  });

  test('an image is updated in place, and is a plain disk image at all times', async () => {
    const disk = await diskWithData(way);
    const image = newTarget('vm.img');
    expect(await disk.backup(image)).toMatchObject({ id: 1, kind: 'full', file: image });
    expect(hashOf(fs.readFileSync(image))).toBe(hashOf(disk.content));
    await disk.write(20 * UNIT, patterned(UNIT, 3));
    await disk.trim(0, 8 * UNIT);
    expect(await disk.backup(image)).toMatchObject({ id: 2, kind: 'incremental', kept: [2], dropped: [1] });
    expect(hashOf(fs.readFileSync(image))).toBe(hashOf(disk.content));
    expect(diskUsage(image)).toBeLessThan(11 * UNIT + MIB);
    expect(await disk.checkAll(image)).toEqual([2]);
    expect(await disk.backup(image, '--full')).toMatchObject({ id: 3, kind: 'full', kept: [3] });
    expect(hashOf(fs.readFileSync(image))).toBe(hashOf(disk.content));
    expect((await disk.backup(image)).notes).toEqual([]);
    expect(await disk.checkAll(image)).toEqual([4]);
    // A guest is started from it.
    const fd = fs.openSync(image, 'r+');
    fs.writeSync(fd, Buffer.from('a journal'), 0, 9, UNIT);
    fs.closeSync(fd);
    const refused = lastLineOf(await disk.target.run(['backup', 'vm', '--to', image]), 1, 'backup');
    expect(refused).toMatch(/vm\.img is damaged: .*--full starts again/);
    expect(await disk.backup(image, '--full')).toMatchObject({ kept: [5] });
    fs.rmSync(image);
    expect(await disk.target.fails('backup', 'vm', '--to', image)).toMatch(/vm\.img is missing/);
    await disk.backup(image, '--full');
    expect(await disk.checkAll(image)).toEqual([6]);
    const many = await disk.target.run(['backup', 'vm', '--to', image, '--keep', '7']);
    expect(oneLineOf(many, 2, 'backup')).toMatch(/is an image, .* --keep 7 needs a directory/);
  });

  test('data written after a rollback is distinguished from data written before it', async () => {
    const disk = await diskWithData(way);
    const to = newTarget();
    const old = Buffer.from(disk.content);
    await disk.target.ok('vdi', 'snapshot', 'vm', 'good');
    await disk.write(4 * UNIT, patterned(8 * UNIT, 7));
    await disk.backup(to);
    await disk.target.ok('vdi', 'rollback', 'vm@good');
    disk.content = old;
    expect(await disk.backup(to)).toMatchObject({ kind: 'incremental', changedBytes: 8 * UNIT });
    await disk.write(0, patterned(4 * KIB, 8));
    await disk.backup(to);
    expect(await disk.checkAll(to)).toEqual([1, 2, 3]);
  });

  test('two targets of one VDI have a base each', async () => {
    const disk = await diskWithData(way);
    const [nightly, weekly] = [newTarget(), newTarget('weekly.img')];
    await disk.backup(nightly);
    await disk.write(UNIT, patterned(UNIT, 9));
    await disk.backup(weekly);
    await disk.write(8 * UNIT, patterned(UNIT, 10));
    const there = new Map(disk.at);
    await disk.backup(nightly);
    expect(await bases(disk.target)).toHaveLength(2);
    disk.at.set(1, there.get(1) as string);
    expect(hashOf(fs.readFileSync(weekly))).toBe(there.get(1));
    await disk.backup(weekly);
    expect(await bases(disk.target)).toHaveLength(2);
    expect(hashOf(fs.readFileSync(weekly))).toBe(hashOf(disk.content));
  });

  test('a deleted base is reported, and --compare or --full continues', async () => {
    const disk = await diskWithData(way);
    const to = newTarget();
    const { base } = await disk.backup(to);
    await disk.target.ok('vdi', 'delete', `vm@${base}`);
    await disk.write(UNIT, patterned(UNIT, 13));
    const refusal = await disk.target.fails('backup', 'vm', '--to', to);
    expect(refusal).toMatch(/vm in .* has no snapshot "backup-.*-1".*--compare.*--full/);
    expect(await disk.target.names()).toEqual(['vm']);
    expect(await disk.backup(to, '--compare')).toMatchObject({ id: 2, kind: 'incremental', storedBytes: UNIT });
    expect(await disk.backup(to)).toMatchObject({ id: 3, changedBytes: 0 });
    await disk.target.ok('vdi', 'delete', `${(await bases(disk.target))[0]}`);
    const full = await disk.backup(to, '--full', '--keep', '2');
    // The previous chain is dropped as a whole, when none of its backups is kept any longer.
    expect(full).toMatchObject({ id: 4, kind: 'full', kept: [1, 2, 3, 4] });
    expect(await disk.checkAll(to)).toEqual([1, 2, 3, 4]);
    expect(await disk.backup(to, '--keep', '2')).toMatchObject({ kept: [4, 5], dropped: [1, 2, 3] });
    expect(fs.readdirSync(to)).not.toContain('base-1.img');
    expect(await disk.checkAll(to)).toEqual([4, 5]);
  });

  test('another disk of the same name is not taken for the one that was backed up', async () => {
    const disk = await diskWithData(way);
    const to = newTarget();
    const { base } = await disk.backup(to);
    const { target } = disk;
    await target.ok('vdi', 'delete', 'vm');
    await target.ok('vdi', 'delete', `vm@${base}`);
    await target.ok('vdi', 'create', 'vm', String(SIZE));
    expect(await target.fails('backup', 'vm', '--to', to)).toMatch(/were deleted, or vm is now another disk/);
    // not even if the snapshot has the right name
    await target.ok('vdi', 'snapshot', 'vm', base as string);
    const refusal = await target.fails('backup', 'vm', '--to', to);
    expect(refusal).toMatch(/is not the snapshot of the last backup/);
    expect(await target.names()).toEqual([`vm@${base}`, 'vm']);
  });

  test('restore creates a VDI only if the whole backup is intact, and overwrites one only with --overwrite', async () => {
    const disk = await diskWithData(way);
    const { target } = disk;
    const to = newTarget();
    await disk.backup(to);
    await disk.write(0, patterned(UNIT, 14));
    await disk.backup(to);
    expect(await target.fails('restore', to, 'vm')).toMatch(/named "vm" exists already/);
    expect(await target.json('restore', to, 'other')).toMatchObject({ name: 'other', id: 2, size: SIZE });
    await target.ok('vdi', 'resize', 'other', '16M');
    expect(await target.ok('restore', to, 'other', '--at', '1', '--overwrite')).toMatch(
      /^restored other from backup 1 of vm, .*: 4.25 MiB of data of 12 MiB, in [\d.]+ s\n$/,
    );
    expect(hashOf(await target.contentOf('other'))).toBe(disk.at.get(1));
    // A byte of the image is changed.
    const file = path.join(to, 'base-1.img');
    const { atime, mtime } = fs.statSync(file);
    const fd = fs.openSync(file, 'r+');
    fs.writeSync(fd, Buffer.from([1, 2, 3]), 0, 3, 9 * UNIT);
    fs.closeSync(fd);
    fs.utimesSync(file, atime, mtime);
    const refusal = await target.fails('restore', to, 'third');
    expect(refusal).toMatch(/base-1\.img is damaged: the 1048576 bytes of the disk at 2097152 .*--verify.*--at/);
    expect(await target.names()).not.toContain('third');
    const verdict = await target.fails('restore', to, '--verify');
    expect(verdict).toMatch(/no backup is intact.*--full/);
  });

  test('the list shows all backups, and --at takes numbers, days and times', async () => {
    const disk = await diskWithData(way);
    const { target } = disk;
    const to = newTarget();
    await disk.backup(to);
    await disk.backup(to);
    const lines = (await target.ok('restore', to, '--list')).trimEnd().split('\n');
    expect(lines[0]).toBe(`backups of vm (${target.store})`);
    expect(lines[1]).toMatch(/^ID +TIME +KIND +SIZE +CHANGED +STORED +FILE$/);
    expect(lines[2]).toMatch(/^ *1 +20\S+ +full +12 MiB +5 MiB +4.25 MiB +\S+\/0001-\d+T\d+Z\.qcow2$/);
    expect(lines[3]).toMatch(/^ *2 +20\S+ +incremental +12 MiB +0 B +0 B +\S+\/0002-/);
    const { backups } = await target.json<{ backups: { id: number; time: string }[] }>('restore', to, '--list');
    const first = backups[0]?.time as string;
    expect(await target.json('restore', to, 'a', '--at', first)).toMatchObject({ id: 1 });
    expect(await target.json('restore', to, 'b', '--at', new Date().toISOString())).toMatchObject({ id: 2 });
    expect(await target.fails('restore', to, 'c', '--at', '2020-02-01')).toMatch(
      /there is no backup 2020-02-01: the oldest is/,
    );
    expect(await target.fails('restore', to, 'c', '--at', '9')).toMatch(/there is no backup 9/);
    const usage = await target.run(['restore', to, 'c', '--at', 'yesterday']);
    expect(oneLineOf(usage, 2, 'restore')).toMatch(/--at yesterday: give a backup's number, a day/);
  });
});

test('a backup of a disk that is being written is of one moment, and the writer continues', async () => {
  const disk = await diskWithData('through a daemon');
  const { daemon } = disk.target;
  if (!daemon) throw new Error('invariant: there is a daemon');
  const to = newTarget();
  const writer = await attach(daemon, 'vm');
  const enough = new AbortController();
  let generation = 0;
  // Block 0 first, the last block second: a mixed copy has an older end than beginning.
  const writing = (async () => {
    while (!enough.signal.aborted) {
      generation++;
      const stamp = Buffer.alloc(512);
      stamp.writeUInt32LE(generation);
      await writer.write(0, stamp);
      await writer.write(((generation * 7) % 90) * 128 * KIB + 512, stamp);
      await writer.write(SIZE - 512, stamp);
    }
  })();
  const results: BackupResult[] = [];
  for (let id = 1; id <= 4; id++) {
    const seen = generation;
    results.push(await disk.target.json<BackupResult>('backup', 'vm', '--to', to, '--keep', '3'));
    expect(generation).toBeGreaterThan(seen);
  }
  enough.abort();
  await writing;
  await writer.disconnect();
  for (const { id } of results.slice(1)) {
    await disk.target.ok('restore', to, 'restored', '--at', String(id));
    const image = await disk.target.contentOf('restored');
    await disk.target.ok('vdi', 'delete', 'restored');
    const [begin, end] = [image.readUInt32LE(0), image.readUInt32LE(SIZE - 512)];
    expect(begin).toBeGreaterThan(0);
    expect(begin - end === 0 || begin - end === 1, `${begin} and ${end}`).toBe(true);
  }
  expect(await bases(disk.target)).toHaveLength(1);
});

test('qemu opens the newest file of a directory by itself, and sees which clusters are in it', async (context) => {
  if (qemuMissing.length > 0) return context.skip(`${qemuMissing.join()} not installed`);
  const disk = await diskWithData('directly on the store');
  const to = newTarget();
  await disk.backup(to);
  await disk.write(5 * UNIT, patterned(64 * KIB, 1));
  await disk.trim(8 * UNIT, 4 * UNIT);
  const { file } = await disk.backup(to);
  // Somewhere else: the names in it are relative.
  const moved = path.join(temporaryDirectory(), 'moved');
  fs.renameSync(to, moved);
  const head = path.join(moved, path.basename(file));
  expect(hashOf(await readWithQemu(head))).toBe(disk.at.get(2));
  const map = await run('qemu-img', ['map', '-f', 'qcow2', '--output=json', head]);
  const own = (JSON.parse(map.stdout) as { start: number; length: number; depth: number; zero: boolean }[])
    .filter(({ depth }) => depth === 0)
    .map(({ start, length, zero }) => [start, length, zero]);
  expect(own).toEqual([
    [5 * UNIT, 64 * KIB, false],
    [8 * UNIT, 4 * UNIT, true],
  ]);
});

describe('a target', () => {
  test('that was damaged gets no new increment, and the message says what to do', async () => {
    const disk = await diskWithData('directly on the store');
    const to = newTarget();
    await disk.backup(to);
    await disk.write(UNIT, patterned(UNIT, 1));
    const second = await disk.backup(to);
    const { target } = disk;
    const refused = async (): Promise<string> => {
      const line = lastLineOf(await target.run(['backup', 'vm', '--to', to]), 1, 'backup');
      expect(line).toMatch(/--verify' shows which backups are intact, and --full starts again/);
      expect(await bases(target)).toEqual([`vm@${second.base}`]);
      return line;
    };
    const whole = fs.readFileSync(second.file);
    fs.truncateSync(second.file, whole.length - 65536);
    expect(await refused()).toMatch(/0002-.*qcow2 is damaged: it has \d+ bytes, not \d+/);
    // The same length, other bytes.
    const bad = Buffer.from(whole);
    bad.fill(0xff, 65536 + 5, 65536 + 9);
    fs.writeFileSync(second.file, bad);
    expect(await refused()).toMatch(/0002-.*qcow2 .*is damaged/);
    expect(await target.fails('restore', to, '--verify')).toMatch(/intact backups: 1;/);
    bad.fill(0, 0, 65536);
    fs.writeFileSync(second.file, bad);
    expect(await refused()).toMatch(/its header is not the one that was written/);
    fs.rmSync(second.file);
    expect(await refused()).toMatch(/0002-.*qcow2 is missing/);
    fs.writeFileSync(second.file, whole);
    // The old content with another time: it is compared, and accepted.
    const { notes } = await disk.backup(to);
    expect(notes.join()).toMatch(
      /changed since the last run: .*0002-.*; comparing the stored backups .*,the stored backups match their hashes$/,
    );
    expect((await disk.backup(to)).notes).toEqual([]);
    const hashes = path.join(to, fs.readdirSync(to).find((name) => /^0004.*hashes$/.test(name)) as string);
    const { size } = fs.statSync(hashes);
    fs.writeFileSync(hashes, Buffer.alloc(size));
    expect(lastLineOf(await target.run(['backup', 'vm', '--to', to]), 1, 'backup')).toMatch(/0004-.*hashes is damaged/);
    fs.writeFileSync(path.join(to, 'manifest.json'), '{"format":');
    expect(await target.fails('backup', 'vm', '--to', to)).toMatch(/manifest\.json is damaged/);
    expect(await target.fails('restore', to, '--list')).toMatch(/manifest\.json is damaged/);
    fs.rmSync(path.join(to, 'manifest.json'));
    expect(await target.fails('backup', 'vm', '--to', to)).toMatch(/manifest\.json is missing: restore it/);
  });

  test('with a damaged chain gets a new one by --full, and intact backups can still be restored', async () => {
    const disk = await diskWithData('directly on the store');
    const to = newTarget();
    await disk.backup(to);
    await disk.write(UNIT, patterned(UNIT, 1));
    const second = await disk.backup(to);
    fs.truncateSync(second.file, 65536);
    expect(await disk.backup(to, '--full', '--keep', '2')).toMatchObject({ id: 3, kind: 'full' });
    await disk.target.ok('restore', to, 'one', '--at', '1');
    await disk.target.ok('restore', to, 'three');
    expect(await disk.target.fails('restore', to, 'two', '--at', '2')).toMatch(/damaged/);
    expect(await disk.backup(to, '--keep', '2')).toMatchObject({ kept: [3, 4], dropped: [1, 2] });
    expect(await disk.checkAll(to)).toEqual([3, 4]);
  });

  test('with a missing file gets a new chain by --full, which the old chain does not block', async () => {
    const disk = await diskWithData('directly on the store');
    const to = newTarget();
    await disk.backup(to);
    await disk.write(UNIT, patterned(UNIT, 1));
    const second = await disk.backup(to);
    fs.rmSync(second.file);
    expect(await disk.backup(to, '--full')).toMatchObject({ id: 3, kind: 'full' });
    await disk.write(UNIT, patterned(UNIT, 2));
    expect(await disk.backup(to)).toMatchObject({ id: 4, kind: 'incremental' });
    await disk.target.ok('restore', to, 'one', '--at', '1');
    expect(await disk.target.fails('restore', to, 'two', '--at', '2')).toMatch(/0002-.*qcow2 is missing/);
  });

  test('that is damaged is not restored over a disk: the disk stays unchanged', async () => {
    const disk = await diskWithData('directly on the store');
    const to = newTarget();
    await disk.backup(to);
    await disk.write(UNIT, patterned(UNIT, 1));
    const second = await disk.backup(to);
    const fd = fs.openSync(second.file, 'r+');
    fs.writeSync(fd, Buffer.from([9, 9, 9]), 0, 3, 65536);
    fs.closeSync(fd);
    const before = hashOf(await disk.target.contentOf('vm'));
    expect(await disk.target.fails('restore', to, 'vm', '--overwrite')).toMatch(/0002-.*is damaged/);
    expect(hashOf(await disk.target.contentOf('vm'))).toBe(before);
  });

  test('with an increment that was damaged since does not fold the damage into the image below it', async () => {
    const disk = await diskWithData('directly on the store');
    const to = newTarget();
    await disk.backup(to);
    await disk.write(UNIT, patterned(UNIT, 1));
    const second = await disk.backup(to);
    const { atime, mtime } = fs.statSync(second.file);
    const fd = fs.openSync(second.file, 'r+');
    fs.writeSync(fd, Buffer.from([9, 9, 9]), 0, 3, 65536);
    fs.closeSync(fd);
    fs.utimesSync(second.file, atime, mtime);
    await disk.write(20 * UNIT, patterned(UNIT, 1));
    const refusal = await disk.target.fails('backup', 'vm', '--to', to, '--keep', '1');
    expect(refusal).toMatch(/backup 3 was taken, but an old backup could not be dropped: .*0002-.*is damaged/);
    await disk.target.ok('restore', to, 'one', '--at', '1');
    expect(hashOf(await disk.target.contentOf('one'))).toBe(disk.at.get(1));
  });

  test('must be a directory or image of its own, with an existing parent', async () => {
    const disk = await diskWithData('directly on the store');
    const { target } = disk;
    const directory = temporaryDirectory();
    const to = path.join(directory, 'vm');
    await disk.backup(to);
    await target.ok('vdi', 'create', 'other', '4M');
    expect(await target.fails('backup', 'other', '--to', to)).toMatch(/holds backups of "vm", not of "other"/);
    expect(await target.fails('backup', 'vm', '--to', directory)).toMatch(/holds other files \(vm\) and no backups/);
    const image = path.join(directory, 'an.img');
    fs.writeFileSync(image, 'something');
    expect(await target.fails('backup', 'vm', '--to', image)).toMatch(/exists and is not a backup target/);
    expect(fs.readFileSync(image, 'utf8')).toBe('something');
    const unmounted = path.join(directory, 'not', 'mounted');
    expect(await target.fails('backup', 'vm', '--to', unmounted)).toMatch(
      /does not exist; create it, or mount the disk/,
    );
    expect(fs.existsSync(path.dirname(unmounted))).toBe(false);
    expect(await target.fails('backup', 'no-such-vm', '--to', path.join(directory, 'new'))).toMatch(/no VDI named/);
    expect(fs.existsSync(path.join(directory, 'new'))).toBe(false);
    expect(await target.fails('restore', directory, 'x')).toMatch(/there are no backups in .*; there are some in .*vm/);
    expect(await target.fails('restore', image, 'x')).toMatch(/not a backup target.*sheepgate import/);
    expect(await target.fails('backup', 'vm', '--to', '/dev/null')).toMatch(/neither a file nor a directory/);
  });

  test('that was copied before later backups of the original is recognized as a copy', async () => {
    const disk = await diskWithData('directly on the store');
    const to = newTarget();
    await disk.backup(to);
    const copy = `${to}-copy`;
    fs.cpSync(to, copy, { recursive: true, preserveTimestamps: true });
    await disk.backup(to);
    expect(await disk.target.fails('backup', 'vm', '--to', copy)).toMatch(/-copy is an older copy of a target in use/);
    expect(await bases(disk.target)).toHaveLength(1);
    await disk.backup(to);
  });

  test('keeps backups in order even if the clock jumps', async () => {
    const disk = await diskWithData('directly on the store');
    const to = newTarget();
    await disk.backup(to);
    // As if the first had been taken in 2999, and the clock had been set back since.
    const manifest = path.join(to, 'manifest.json');
    const time = /"time": "(.*?)"/.exec(fs.readFileSync(manifest, 'utf8'))?.[1] as string;
    const compact = time.replaceAll(/[-:]|\.\d+/g, '');
    const future = compact.replace(/^\d{4}/, '2999');
    for (const name of fs.readdirSync(to)) {
      const file = path.join(to, name);
      if (name.includes(compact)) fs.renameSync(file, file.replace(compact, future));
    }
    const text = fs.readFileSync(manifest, 'utf8');
    fs.writeFileSync(manifest, text.replaceAll(compact, future).replaceAll(time, time.replace(/^\d{4}/, '2999')));
    await disk.write(UNIT, patterned(UNIT, 3));
    await disk.backup(to);
    await disk.write(2 * UNIT, patterned(UNIT, 4));
    expect(await disk.backup(to, '--keep', '2')).toMatchObject({ kept: [2, 3], dropped: [1] });
    expect(await disk.checkAll(to)).toEqual([2, 3]);
  });
});
