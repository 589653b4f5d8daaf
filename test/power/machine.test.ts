/**
 * The machine in memory: its disk answers like a real one, the same seed is the same run, and what is durable when is what the
 * rules of journal.ts say.
 */
import { createHash } from 'node:crypto';
import fs from 'node:fs';
import path from 'node:path';
import { describe, expect, test } from 'vitest';
import { O_CREAT, O_EXCL, O_RDONLY, O_RDWR, O_TRUNC, type HostDisk } from '../../src/system/disk.js';
import { hostDisk } from '../../src/system/real-disk.js';
import { memoryDirectory } from '../harness/daemon.js';
import { crashFiles, digestOf, type Loss, type Recording } from './crash-state.js';
import { MachineDisk } from './machine-disk.js';
import { Machine, type Inode } from './machine.js';
import { Random } from './random.js';
import { record } from './workload.js';

const IDENTITY = { bootId: 'one', mounting: 'one' };

function newMachine(): Machine {
  return new Machine({ ...IDENTITY, root: memoryDirectory() });
}

/** What the call returns, or the code of its error. */
async function outcome(call: () => unknown): Promise<unknown> {
  try {
    return await call();
  } catch (error) {
    return (error as NodeJS.ErrnoException).code;
  }
}

/** The same random calls on a disk; returns all outcomes. */
async function randomCalls(disk: HostDisk, root: string, seed: string): Promise<unknown[]> {
  const random = new Random(seed);
  const name = (): string => path.join(root, ...random.pick([['a'], ['b'], ['d', 'a'], ['d', 'b']]));
  const open: number[] = [];
  const outcomes: unknown[] = [];
  for (let left = 400; left > 0; left--) {
    const kind = random.pick([
      'open',
      'open',
      'write',
      'write',
      'read',
      'size',
      'punch',
      'copy',
      'names',
      'change',
    ] as const);
    const at = random.below(30_000);
    const length = random.between(1, 12_000);
    const [file, other] = [name(), name()];
    const flags = random.pick([O_RDWR, O_RDWR | O_CREAT, O_RDWR | O_CREAT | O_EXCL, O_RDWR | O_CREAT | O_TRUNC]);
    const change = random.below(4);
    const fill = random.between(1, 255);
    const [from, to] = [random.below(Math.max(1, open.length)), random.below(Math.max(1, open.length))];
    const fd = open[from];
    if (kind === 'open') {
      const opened = await outcome(() => disk.openSync(file, flags, 0o600));
      if (typeof opened === 'number') open.push(opened);
      outcomes.push(typeof opened);
    } else if (kind === 'names') outcomes.push(await outcome(() => disk.readdirSync(root).sort()));
    else if (kind === 'change') {
      const calls = [
        () => disk.unlinkSync(file),
        () => disk.renameSync(file, other),
        () => disk.mkdirSync(path.join(root, 'd')),
        () => disk.rmdirSync(path.join(root, 'd')),
      ];
      outcomes.push(await outcome(() => calls[change]?.()));
    } else if (fd === undefined) continue;
    else if (kind === 'write') outcomes.push(await disk.write(fd, Buffer.alloc(length, fill), 0, at));
    else if (kind === 'size') {
      await disk.truncate(fd, at);
      outcomes.push(disk.fstatSync(fd).size);
    } else if (kind === 'punch') await disk.punchHole(fd, at, length);
    else if (kind === 'copy' && from !== to) {
      const target = open[to] as number;
      const size = disk.fstatSync(target).size;
      if (disk.fstatSync(fd).ino === disk.fstatSync(target).ino) continue;
      outcomes.push(await disk.copyRange(fd, target, 0, Math.min(size, length)));
    } else {
      const into = Buffer.alloc(20_000);
      outcomes.push(`${disk.readSync(fd, into, at)} ${createHash('sha1').update(into).digest('hex')}`);
    }
  }
  for (const fd of open) disk.closeSync(fd);
  return outcomes;
}

test('random calls on its disk have the results that they have on a real one', async () => {
  for (let seed = 0; seed < 20; seed++) {
    const machine = newMachine();
    const [mine, real] = [
      await randomCalls(new MachineDisk(machine), machine.root, String(seed)),
      await randomCalls(hostDisk, memoryDirectory(), String(seed)),
    ];
    for (const [at, is] of mine.entries()) expect(is, `seed ${seed}, call ${at}`).toEqual(real[at]);
  }
});

test('the same seed is the same run', async () => {
  const place = memoryDirectory();
  for (const number of [1, 2]) {
    const [first, second] = [
      await record({ seed: 'same', number, place }),
      await record({ seed: 'same', number, place }),
    ];
    expect(second.story).toEqual(first.story);
    expect(second.journal.events.map(({ type, at }) => `${type} ${at}`)).toEqual(
      first.journal.events.map(({ type, at }) => `${type} ${at}`),
    );
  }
});

test('everything that was recorded adds up to what the machine has in the end', async () => {
  const workload = await record({ seed: 'all', number: 1, place: memoryDirectory() });
  const built = crashFiles(workload, workload.end, 'death', new Random(''));
  expect(digestOf(built)).toBe(digestOf(workload.machine.snapshot()));
});

describe('after a power loss', () => {
  const written = Buffer.alloc(8192, 7);

  /** Sizes of the file `name` that many states show; -1 where it is missing. */
  function sizesOf(recording: Recording, at: number, loss: Loss, name: string): Set<number> {
    const sizes = new Set<number>();
    for (let seed = 0; seed < 200; seed++) {
      const files = crashFiles(recording, at, loss, new Random(`sizes ${seed}`));
      const root = files.get(2) as Inode;
      const ino = root.entries.get(name);
      sizes.add(ino === undefined ? -1 : (files.get(ino)?.content.size ?? -2));
    }
    return sizes;
  }

  function recordOn(work: (disk: MachineDisk, root: string) => void): Recording & { readonly now: number } {
    const machine = newMachine();
    const before = machine.snapshot();
    work(new MachineDisk(machine), machine.root);
    return { before, inodes: machine.inodes, journal: machine.journal, now: machine.journal.now };
  }

  for (const loss of ['strict', 'ext4'] as const) {
    test(`(${loss}) what was not synced is there or not; the sync of a file and of its directory keeps both`, () => {
      const unsynced = recordOn((disk, root) => {
        const fd = disk.openSync(path.join(root, 'file'), O_RDWR | O_CREAT);
        disk.writeSync(fd, written, 0);
      });
      expect(sizesOf(unsynced, unsynced.now, loss, 'file')).toEqual(new Set([-1, 0, written.length]));
      const synced = recordOn((disk, root) => {
        const fd = disk.openSync(path.join(root, 'file'), O_RDWR | O_CREAT);
        disk.writeSync(fd, written, 0);
        disk.fsyncSync(fd);
        disk.fsyncSync(disk.openSync(root, O_RDONLY));
      });
      expect(sizesOf(synced, synced.now, loss, 'file')).toEqual(new Set([written.length]));
    });
  }

  test('(strict) the sync of a file does not keep its name; (ext4) it does', () => {
    const recording = recordOn((disk, root) => {
      const fd = disk.openSync(path.join(root, 'file'), O_RDWR | O_CREAT);
      disk.truncateSync(fd, 5);
      disk.fsyncSync(fd);
    });
    expect(sizesOf(recording, recording.now, 'strict', 'file')).toEqual(new Set([-1, 5]));
    expect(sizesOf(recording, recording.now, 'ext4', 'file')).toEqual(new Set([5]));
  });

  test('(strict) names may be kept in any order; (ext4) a later one only with all before it', () => {
    const recording = recordOn((disk, root) => {
      for (const name of ['first', 'second']) disk.closeSync(disk.openSync(path.join(root, name), O_RDWR | O_CREAT));
    });
    const seen = (loss: Loss): Set<string> =>
      new Set(
        Array.from({ length: 200 }, (_, seed) => {
          const files = crashFiles(recording, recording.now, loss, new Random(`names ${seed}`));
          return [...(files.get(2)?.entries.keys() ?? [])].join();
        }),
      );
    expect(seen('strict')).toEqual(new Set(['', 'first', 'second', 'first,second']));
    expect(seen('ext4')).toEqual(new Set(['', 'first', 'first,second']));
  });

  test('a write may be torn, between sectors and not within one', () => {
    const recording = recordOn((disk, root) => {
      const fd = disk.openSync(path.join(root, 'file'), O_RDWR | O_CREAT);
      disk.truncateSync(fd, written.length);
      disk.fsyncSync(fd);
      disk.fsyncSync(disk.openSync(root, O_RDONLY));
      disk.writeSync(fd, written, 0);
    });
    let torn = 0;
    for (let seed = 0; seed < 200; seed++) {
      const files = crashFiles(recording, recording.now, 'strict', new Random(`torn ${seed}`));
      const bytes = files.get(files.get(2)?.entries.get('file') ?? -1)?.content.bytes() ?? Buffer.alloc(0);
      const sectors = Array.from(
        { length: bytes.length / 512 },
        (_, n) => new Set(bytes.subarray(n * 512, (n + 1) * 512)),
      );
      expect(sectors.every(({ size }) => size === 1)).toBe(true);
      if (new Set(sectors.map((values) => [...values][0])).size > 1) torn++;
    }
    expect(torn).toBeGreaterThan(5);
  });

  test('the death of the process loses nothing that the kernel had', () => {
    const recording = recordOn((disk, root) => {
      disk.writeSync(disk.openSync(path.join(root, 'file'), O_RDWR | O_CREAT), written, 0);
    });
    expect(sizesOf(recording, recording.now, 'death', 'file')).toEqual(new Set([written.length]));
  });
});

test('a recording leaves no files behind', async () => {
  const place = memoryDirectory();
  await record({ seed: 'left', number: 3, place });
  expect(fs.readdirSync(place)).toEqual([]);
});
