/**
 * Commands that fill a VDI, ended before each of their steps in turn as by SIGKILL, without cleaning up. After any step, the VDI
 * is absent, marked as unfinished, or complete; and the same command completes it. In a local store and in a cluster.
 */
import fs from 'node:fs';
import path from 'node:path';
import { describe, expect, test } from 'vitest';
import { BackupTarget } from '../../src/jobs/backup/target.js';
import { openPoint, pointAt, restoreBackup } from '../../src/jobs/backup/restore-backup.js';
import { importInto } from '../../src/jobs/import-image.js';
import { openSource } from '../../src/jobs/image-source.js';
import { closeAfter } from '../../src/system/close-after.js';
import { Migration } from '../../src/jobs/migration/migration.js';
import { DirectOperations } from '../../src/operations/direct-operations.js';
import { OperationError, type Disk, type Operations } from '../../src/operations/operations.js';
import type { VdiRecord } from '../../src/store/vdi-record.js';
import { VdiExports } from '../../src/export/vdi-exports.js';
import { SheepStore } from '../../src/store/sheep/sheep-store.js';
import type { VdiCatalog } from '../../src/vdi/catalog.js';
import { cli, memoryDirectory, temporaryDirectory } from '../harness/daemon.js';
import { byLength } from '../harness/length.js';
import { StandIn } from '../sheep/stand-in.js';
import { expectBytes, MIB, patterned } from './both-ways.js';
import { localPlace, recordsOf, withCatalog, write, type Contents, type Place } from './migration-stores.js';

const SHIFT = 20;
const NAME = 'vm';
/** For a command that must not be ended. */
const NEVER = Number.MAX_SAFE_INTEGER;

/**
 * A cluster is slow: every third step is tried, and every fifth of a history of snapshots, which has many; all of them in long
 * runs. The commands are the same as on a local store, where every step is tried.
 */
const CLUSTER_STRIDE = byLength({ quick: 5, full: 3, long: 1 });
const CLUSTER_HISTORY_STRIDE = byLength({ quick: 8, full: 5, long: 1 });

class Killed extends Error {}

/** Calls that change something: a command is ended before one of these. */
const STEPS = new Set(['create', 'begin', 'finish', 'snapshot', 'rollback', 'resize', 'remove', 'openDisk']);
const DISK_STEPS = new Set(['write', 'zero', 'flush', 'close']);

/** `operations` until the changing call number `at`; from then on, no call does anything. */
class Mortal {
  readonly operations: Operations;
  calls = 0;
  readonly #at: number;
  readonly #disks: Disk[] = [];

  constructor(operations: Operations, at: number) {
    this.#at = at;
    this.operations = this.#wrap(operations, STEPS);
  }

  /** What the operating system does when a process ends. */
  async bury(): Promise<void> {
    for (const disk of this.#disks) await disk.close().catch(() => undefined);
  }

  #wrap<T extends object>(whole: T, steps: ReadonlySet<string>): T {
    return new Proxy(whole, {
      get: (target, key) => {
        const value = Reflect.get(target, key) as unknown;
        if (typeof value !== 'function') return value;
        return (...of: unknown[]): unknown => {
          if (steps.has(String(key))) this.calls++;
          if (this.calls >= this.#at) return Promise.reject(new Killed(`before call ${this.#at}, ${String(key)}`));
          const result = (value as (...of: unknown[]) => unknown).apply(target, of);
          return key === 'openDisk' ? (result as Promise<Disk>).then((disk) => this.#opened(disk)) : result;
        };
      },
    });
  }

  #opened(disk: Disk): Disk {
    this.#disks.push(disk);
    return this.#wrap(disk, DISK_STEPS);
  }
}

interface Command {
  readonly label: string;
  /** The content of the target before. */
  readonly before?: (catalog: VdiCatalog) => Promise<Contents>;
  readonly run: (target: Operations) => Promise<unknown>;
  readonly after: Contents;
}

const signal = new AbortController().signal;
/** Notes of the commands. */
const notes: string[] = [];
const quiet = {
  progress: () => ({ advance: () => undefined, end: () => undefined }),
  signal,
  log: (line: string) => void notes.push(line),
};

async function someDisk(catalog: VdiCatalog): Promise<Contents> {
  const content = Buffer.alloc(4 * MIB);
  await catalog.create(NAME, content.length, { blockSizeShift: SHIFT });
  await write(catalog, NAME, content, 0, patterned(2 * MIB, 77));
  const kept = Buffer.from(content);
  await catalog.snapshot(NAME, 'kept');
  await write(catalog, NAME, content, 3 * MIB, patterned(4096, 78));
  return new Map([
    ['kept', kept],
    ['', content],
  ]);
}

function importing(overwrite: boolean): Command {
  const file = path.join(temporaryDirectory(), 'image');
  const image = Buffer.alloc(3 * MIB);
  patterned(MIB, 5).copy(image, 0);
  patterned(8192, 6).copy(image, 2 * MIB);
  fs.writeFileSync(file, image);
  const whole = overwrite ? Buffer.concat([image, Buffer.alloc(MIB)]) : image;
  const before = overwrite ? someDisk : undefined;
  return {
    label: `import${overwrite ? ' --overwrite' : ''}`,
    ...(before && { before }),
    run: async (target) => {
      const source = openSource(file, { isRaw: true, vdi: NAME });
      try {
        await importInto(target, NAME, source, { overwrite, ...quiet });
      } finally {
        source.close();
      }
    },
    after: new Map([['', whole]]),
  };
}

async function restoring(overwrites: boolean): Promise<Command> {
  const store = path.join(memoryDirectory(), 'store');
  const to = path.join(memoryDirectory(), 'backup');
  const content = Buffer.alloc(6 * MIB);
  patterned(2 * MIB, 9).copy(content, MIB);
  const made = await cli(['import', '-', NAME, '--size', '6M', '--block-size-shift', '20'], { store, input: content });
  expect(made.code, made.stderr).toBe(0);
  const taken = await cli(['backup', NAME, '--to', to], { store });
  expect(taken.code, taken.stderr).toBe(0);
  return {
    label: `restore${overwrites ? ' --overwrite' : ''}`,
    ...(overwrites && { before: someDisk }),
    run: async (target) => {
      const backup = await BackupTarget.openToRead(to);
      try {
        const opened = await openPoint(backup, pointAt(backup, undefined));
        await closeAfter(opened.chain, () =>
          restoreBackup(target, opened, { name: NAME, overwrites, verifies: true, ...quiet }),
        );
      } finally {
        await backup.close();
      }
    },
    after: new Map([['', content]]),
  };
}

/** Three snapshots; the last one continues from the first. */
async function migrating(sync: boolean): Promise<Command> {
  const from = localPlace();
  const after: Contents = new Map();
  await withCatalog(from, async (catalog) => {
    let content = Buffer.alloc(3 * MIB);
    await catalog.create(NAME, content.length, { blockSizeShift: SHIFT });
    for (const tag of ['first', 'second', 'third', '']) {
      if (tag === 'third') {
        await catalog.rollback(`${NAME}@first`);
        content = Buffer.from(after.get('first') as Buffer);
      }
      await write(catalog, NAME, content, MIB, patterned(4096, tag.length + 1));
      if (tag === 'second') await write(catalog, NAME, content, 0, patterned(MIB, 8));
      after.set(tag, Buffer.from(content));
      if (tag !== '') await catalog.snapshot(NAME, tag);
    }
  });
  const run = (target: Operations, isSync: boolean): Promise<unknown> =>
    withCatalog(from, (catalog) =>
      new Migration(new DirectOperations(catalog, new VdiExports(catalog)), target, {
        name: NAME,
        newName: NAME,
        sync: isSync,
        verify: 'all',
        sha256: false,
        isReadOnly: false,
        ...quiet,
      }).run(),
    );
  return {
    label: `migrate${sync ? ' after --sync' : ''}`,
    ...(sync && {
      before: async (catalog) => {
        await run(new DirectOperations(catalog, new VdiExports(catalog)), true);
        return after;
      },
    }),
    run: (target) => run(target, false),
    after,
  };
}

async function contentOf(catalog: VdiCatalog, spec: string): Promise<Buffer> {
  const vdi = await catalog.openVdi(spec);
  try {
    const content = Buffer.alloc(vdi.size);
    await vdi.read(0, content);
    return content;
  } finally {
    await catalog.release(vdi);
  }
}

const withOperations = <T>(
  place: Place,
  work: (operations: Operations, catalog: VdiCatalog) => Promise<T>,
): Promise<T> => withCatalog(place, (catalog) => work(new DirectOperations(catalog, new VdiExports(catalog)), catalog));

/** Run it, ended before call number `at`. Returns the number of calls. */
function ended(place: Place, { run }: Command, at: number): Promise<number> {
  return withOperations(place, async (operations) => {
    const mortal = new Mortal(operations, at);
    await run(mortal.operations).catch((error: unknown) => {
      if (!(error instanceof Killed) && !((error as Error).cause instanceof Killed)) throw error;
    });
    await mortal.bury();
    return mortal.calls;
  });
}

type State = 'absent' | 'unfinished' | 'as before' | 'complete';

/** Fails if a partial VDI could be taken for a complete one. */
async function stateOf(catalog: VdiCatalog, before: Contents | undefined, after: Contents): Promise<State> {
  const records = await recordsOf(catalog, NAME);
  const working = records.find(({ isSnapshot }) => !isSnapshot);
  for (const { tag, isSnapshot } of records) {
    const wanted = before?.get(tag) ?? after.get(tag);
    if (isSnapshot && wanted) expectBytes(await contentOf(catalog, `${NAME}@${tag}`), wanted);
  }
  if (!working) {
    expect(records).toEqual([]);
    return 'absent';
  }
  const listed = [...(await new VdiExports(catalog).list({ transport: 'internal', address: '' }))].map(
    ({ name }) => name,
  );
  if (working.unfinished) {
    await expect(catalog.openVdi(NAME)).rejects.toMatchObject({ code: 'UNFINISHED' });
    await expect(catalog.snapshot(NAME, 'mine')).rejects.toMatchObject({ code: 'UNFINISHED' });
    expect(listed).not.toContain(NAME);
    return 'unfinished';
  }
  expect(listed).toContain(NAME);
  const content = await contentOf(catalog, NAME);
  if (before?.get('')?.equals(content)) return 'as before';
  expectBytes(content, after.get('') as Buffer);
  return 'complete';
}

const KINDS = [
  () => importing(false),
  () => importing(true),
  () => restoring(false),
  () => restoring(true),
  () => migrating(false),
  () => migrating(true),
];

async function clusterPlace(): Promise<{ place: Place; stop(): Promise<void> }> {
  const cluster = await new StandIn({ jitterMs: 0 }).start();
  return {
    place: { argument: `cluster:${cluster.address}`, open: () => SheepStore.open(cluster.address) },
    async stop() {
      await cluster.stop();
      expect(cluster.violations).toEqual([]);
    },
  };
}

/** Its memory is given back at once: there are more than a hundred of them. */
function removablePlace(): { place: Place; stop(): Promise<void> } {
  const place = localPlace();
  return {
    place,
    stop: () => {
      fs.rmSync(place.argument, { recursive: true });
      return Promise.resolve();
    },
  };
}

describe.each(['a local store', 'a cluster'])('%s', (where) => {
  const newPlace = async (): Promise<{ place: Place; stop(): Promise<void> }> =>
    where === 'a cluster' ? clusterPlace() : removablePlace();

  test.each(KINDS)(
    'if a command is ended before any step, its VDI is absent, unfinished or complete, and the next run completes it (%#)',
    async (kind) => {
      const command = await kind();
      const scene = async (): Promise<{ place: Place; before: Contents | undefined; stop(): Promise<void> }> => {
        const { place, stop } = await newPlace();
        const before = command.before && (await withCatalog(place, command.before));
        return { place, before, stop };
      };
      const first = await scene();
      const steps = await ended(first.place, command, NEVER);
      await first.stop();
      const seen = new Set<State>();
      const hasHistory = command.label.startsWith('migrate');
      const stride = where !== 'a cluster' ? 1 : hasHistory ? CLUSTER_HISTORY_STRIDE : CLUSTER_STRIDE;
      for (let at = 1; at <= steps; at += stride) {
        const { place, before, stop } = await scene();
        await ended(place, command, at);
        const state = await withCatalog(place, (catalog) => stateOf(catalog, before, command.after));
        // Past its last step nothing is left to do.
        expect(state, `before call ${at} of ${steps} of ${command.label}`).not.toBe('complete' satisfies State);
        seen.add(state);
        await ended(place, command, NEVER);
        await withCatalog(place, async (catalog) => {
          expect(['as before', 'complete']).toContain(await stateOf(catalog, before, command.after));
          expectBytes(await contentOf(catalog, NAME), command.after.get('') as Buffer);
          for (const { unfinished, tag } of await recordsOf(catalog, NAME)) {
            expect(unfinished).toBe(undefined);
            expect(tag).not.toMatch(/unfinished|migrat/);
          }
        });
        await stop();
      }
      expect([...seen].sort()).toEqual([command.before ? 'as before' : 'absent', 'unfinished']);
    },
    byLength({ quick: 180_000, full: 180_000, long: 20 * 60_000 }),
  );

  test('a command that lost the answer to the last step says that the disk is complete, and keeps it', async () => {
    const lost = 'no answer from the daemon';
    for (const command of [importing(false), await restoring(false), await migrating(false)]) {
      const { place: to, stop } = await newPlace();
      const error = await withOperations(to, (operations) => {
        const finish = async (...of: Parameters<Operations['finish']>): Promise<VdiRecord> => {
          await operations.finish(...of);
          throw new OperationError('UNREACHABLE', lost);
        };
        const deaf = new Proxy(operations, {
          get: (target, key) => {
            const value = Reflect.get(target, key) as unknown;
            if (key === 'finish') return finish;
            return typeof value === 'function' ? (value.bind(target) as unknown) : value;
          },
        });
        return command.run(deaf).then(
          () => undefined,
          (thrown: unknown) => thrown as Error,
        );
      });
      const said = notes.splice(0).join('');
      expect(`${error?.message} ${said}`, command.label).toContain(`${NAME} is nevertheless complete`);
      expect(await withCatalog(to, (catalog) => stateOf(catalog, undefined, command.after))).toBe('complete');
      await stop();
    }
  }, 60_000);

  test('writes of another client between two runs of a migration stay, even if a run was cut off before it saw them', async () => {
    const command = await migrating(true);
    const { place: to, stop } = await newPlace();
    await withCatalog(to, command.before as NonNullable<Command['before']>);
    const content = Buffer.from(command.after.get('') as Buffer);
    await withCatalog(to, (catalog) => write(catalog, NAME, content, 0, patterned(8192, 99)));
    // Its first step is the mark. It can no longer remove the mark when it sees the writes.
    await ended(to, command, 2).catch(() => undefined);
    await withCatalog(to, async (catalog) => {
      expect((await catalog.find(NAME)).unfinished).toMatchObject({ by: 'migrate' });
    });
    await expect(ended(to, command, NEVER)).rejects.toThrow(/was written by another client/);
    await withCatalog(to, async (catalog) => expectBytes(await contentOf(catalog, NAME), content));
    await stop();
  }, 60_000);

  test('an import or a restore does not replace the target of a migration that was cut off', async () => {
    const command = await migrating(false);
    const { place: to, stop } = await newPlace();
    const steps = await ended(to, command, NEVER);
    await withCatalog(to, async (catalog) => {
      for (const { tag } of await recordsOf(catalog, NAME)) await catalog.remove(tag === '' ? NAME : `${NAME}@${tag}`);
    });
    await ended(to, command, steps - 3);
    const before = await withCatalog(to, (catalog) => recordsOf(catalog, NAME));
    expect(before.filter(({ isSnapshot }) => isSnapshot).length).toBeGreaterThan(0);
    for (const other of [importing(true), await restoring(true)]) {
      await expect(ended(to, other, NEVER), other.label).rejects.toMatchObject({ code: 'EXISTS' });
      expect(await withCatalog(to, (catalog) => recordsOf(catalog, NAME))).toEqual(before);
    }
    await ended(to, command, NEVER);
    await withCatalog(to, async (catalog) => {
      for (const [tag, content] of command.after) {
        expectBytes(await contentOf(catalog, tag === '' ? NAME : `${NAME}@${tag}`), content);
      }
    });
    await stop();
  }, 60_000);
});
