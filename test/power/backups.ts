/**
 * Backups in a workload: taking one, and what a target must have after a crash: every backup in its manifest is what was backed
 * up, byte by byte, none that was answered is missing, and the next run goes on. Owns how the job is called.
 */
import path from 'node:path';
import { VdiExports } from '../../src/export/vdi-exports.js';
import { BackupTarget } from '../../src/jobs/backup/target.js';
import { takeBackup } from '../../src/jobs/backup/take-backup.js';
import { openPoint, restoreBackup } from '../../src/jobs/backup/restore-backup.js';
import { DirectOperations } from '../../src/operations/direct-operations.js';
import type { VdiCatalog } from '../../src/vdi/catalog.js';
import { contentOf, describeWrong, firstDifference, Violation } from './findings.js';
import type { MachineDisk } from './machine-disk.js';
import type { BackupModel, Model } from './model.js';
import type { Random } from './random.js';

/** Backups that a target keeps, if it does not keep all. */
const KEPT = 2;

/** So often the newest backup is also restored into the store. */
const RESTORED = 0.3;

const WORK = {
  progress: () => ({ advance: () => undefined, end: () => undefined }),
  log: () => undefined,
  signal: new AbortController().signal,
};

/** Every third disk is backed up into an image, the others into a directory. */
export function targetOf(root: string, vdi: string): string {
  const isImage = Number(/\d+/.exec(vdi)?.[0]) % 3 === 0;
  return path.join(root, `backups-${vdi}${isImage ? '.img' : ''}`);
}

function isImage(target: string): boolean {
  return target.endsWith('.img');
}

/** Returns its number. */
export async function takeOneBackup(
  catalog: VdiCatalog,
  vdi: string,
  to: string,
  disk: MachineDisk,
  random: Random,
): Promise<number> {
  const operations = new DirectOperations(catalog, new VdiExports(catalog));
  const { point } = await takeBackup((use) => use(operations), {
    ...WORK,
    ...{ vdi, to, disk },
    keep: random.chance(0.5) ? (isImage(to) ? 1 : KEPT) : undefined,
    isFull: random.chance(0.15),
    compares: random.chance(0.2),
    keepsBase: random.chance(0.7),
    verifies: random.chance(0.5),
    sha256: false,
    moment: (take) => take(),
  });
  return point.id;
}

/** All targets of a machine after a crash at `at`. Errors: Violation. */
export async function checkBackups(model: Model, root: string, disk: MachineDisk, at: number): Promise<void> {
  for (const [name, all] of model.backups) {
    const place = targetOf(root, name);
    const home = isImage(place) ? `${place}.sheepgate` : place;
    const backups = all.filter(({ begun }) => begun <= at);
    const answered = backups.filter(({ answered: then }) => then <= at);
    if (!disk.existsSync(path.join(home, 'manifest.json'))) {
      if (answered.length > 0) throw new Violation(`${name}: backups were taken, and their manifest is gone`);
      continue;
    }
    const found = await backupsIn(place, disk);
    for (const [id, bytes] of found) mustBeOne(name, id, bytes, backups);
    // A newer one may have replaced it: an image holds one.
    const last = answered.at(-1)?.id ?? 0;
    if (Math.max(0, ...found.keys()) < last) throw new Violation(`${name}: backup ${last} was taken, and is gone`);
  }
}

/** The content of every backup, by number. Errors: Violation (it cannot be restored). */
async function backupsIn(place: string, disk: MachineDisk): Promise<Map<number, Buffer>> {
  const found = new Map<number, Buffer>();
  try {
    const target = await BackupTarget.openToRead(place, disk);
    try {
      for (const point of target.points) {
        const { hashes, chain } = await openPoint(target, point);
        const bytes = Buffer.alloc(point.size);
        for (let index = 0; index < hashes.count; index++)
          if (!hashes.isZero(index)) (await chain.readChecked(hashes, index)).copy(bytes, index * hashes.blockBytes);
        await chain.close();
        found.set(point.id, bytes);
      }
    } finally {
      await target.close();
    }
  } catch (error) {
    throw new Violation(`${place}: ${(error as Error).message}`, { cause: error });
  }
  return found;
}

function mustBeOne(name: string, id: number, bytes: Buffer, backups: readonly BackupModel[]): void {
  const known = backups.filter((backup) => backup.id === id || backup.answered === Infinity || backup.id === 0);
  if (known.some((backup) => backup.bytes.equals(bytes))) return;
  const [first] = known;
  const wrong = first && describeWrong(firstDifference(bytes, first.bytes));
  throw new Violation(`${name}: backup ${id} is not what was backed up: ${wrong ?? 'nothing was'}`);
}

/** The newest backup as a new VDI, by the job. Errors: Violation. */
async function restore(catalog: VdiCatalog, place: string, disk: MachineDisk, expected: Buffer): Promise<void> {
  const target = await BackupTarget.openToRead(place, disk);
  try {
    const { last } = target;
    if (!last) throw new Violation(`${place} has no backup`);
    const opened = await openPoint(target, last);
    const operations = new DirectOperations(catalog, new VdiExports(catalog));
    const name = `restored-${path.basename(place)}`;
    await restoreBackup(operations, opened, { ...WORK, name, overwrites: false, verifies: true });
    await opened.chain.close();
    const wrong = firstDifference(await contentOf(catalog, name), expected);
    if (wrong) throw new Violation(`${place}, restored: ${describeWrong(wrong) ?? ''}`);
  } finally {
    await target.close();
  }
}

/** The next run on every target. Errors: Violation. */
export async function goOnWithBackups(
  catalog: VdiCatalog,
  model: Model,
  root: string,
  disk: MachineDisk,
  random: Random,
): Promise<void> {
  for (const name of model.backups.keys()) {
    const records = await catalog.named(name);
    const working = records.find(({ isSnapshot, unfinished }) => !isSnapshot && unfinished === undefined);
    if (!working) continue;
    const place = targetOf(root, name);
    const expected = await contentOf(catalog, name);
    let id: number;
    try {
      id = await takeOneBackup(catalog, name, place, disk, random);
    } catch (error) {
      throw new Violation(`${name}: the next backup fails: ${(error as Error).message}`, { cause: error });
    }
    const bytes = (await backupsIn(place, disk)).get(id);
    const wrong = firstDifference(bytes ?? Buffer.alloc(0), expected);
    if (wrong) throw new Violation(`${name}: the next backup is wrong: ${describeWrong(wrong) ?? ''}`);
    if (random.chance(RESTORED)) await restore(catalog, place, disk, expected);
  }
}
