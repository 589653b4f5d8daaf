/**
 * The local store on real filesystems on block devices that go away, are copied, are slow or fail, all of it under load: what was
 * flushed is there afterwards, on the same boot. ext4 and XFS. Needs root and loop devices; `npm run test:long` makes many rounds
 * (fifteen minutes).
 */
import { spawn } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { NbdClient } from 'nbd-server-ts';
import { describe, expect, test, type TestContext } from 'vitest';
import {
  cli,
  ended,
  haveCommand,
  ok,
  skipBecause,
  startDaemon,
  temporaryDirectory,
  waitUntil,
  type Daemon,
} from '../harness/daemon.js';
import { mountAgain, mountCopy, mountImage, shutDown, unmount } from '../harness/filesystems.js';
import { byLength } from '../harness/length.js';
import { BLOCKS, checkSnapshots, Expectation, load, randomOf, readStamps, SIZE } from './stamps.js';

const ROUNDS = byLength({ quick: 1, full: 1, long: 60 });
/** Sparse. mkfs.ext4 takes blocks of 4 KiB from 512 MiB on: with smaller ones, a block that was not flushed may be torn. */
const DISK = 2 ** 30;
const TIMEOUT_MS = 30 * 60_000;
/** Copies of an image for each round. */
const COPIES = 2;

interface Loaded {
  readonly client: NbdClient;
  readonly ended: Promise<void>;
}

/** The store with the disk `disk`, what it should hold, and its snapshots. */
class Subject {
  readonly expected = new Expectation();
  snapshots = new Map<string, Float64Array>();
  readonly #random: () => number;
  #count = 0;

  constructor(
    readonly store: string,
    seed: number,
  ) {
    this.#random = randomOf(seed);
  }

  async create(): Promise<void> {
    await this.#run(['vdi', 'create', 'disk', String(SIZE), '--block-size-shift', '20']);
  }

  async load(daemon: Daemon): Promise<Loaded> {
    const client = await NbdClient.connect({ path: daemon.socket });
    await client.go('disk');
    return { client, ended: load(client, this.expected, this.#random) };
  }

  /** Until some flushes, snapshots and merges have happened under the load. */
  async work(daemon: Daemon): Promise<void> {
    const tag = `s${this.#count++}`;
    await this.#run(['vdi', 'snapshot', 'disk', tag]);
    this.snapshots.set(tag, await readStamps(daemon, `disk@${tag}`));
    const [oldest] = this.snapshots.keys();
    if (this.snapshots.size > 2 && oldest !== undefined) {
      await this.#run(['vdi', 'delete', `disk@${oldest}`]);
      this.snapshots.delete(oldest);
    }
    const target = this.expected.flushes + 2;
    await waitUntil(() => this.expected.flushes >= target, 'two flushes');
    await delay(this.#random() * 300);
  }

  async #run(args: string[]): Promise<void> {
    expect((await cli(args, { store: this.store })).stderr).toBe('');
  }

  /** Open the store, compare all with `expected`, and check. What was found counts from now on. */
  async compare({ store = this.store, expected = this.expected } = {}): Promise<void> {
    const daemon = await startDaemon({ store });
    const seen = await readStamps(daemon, 'disk');
    for (let block = 0; block < BLOCKS; block++)
      if (!expected.allowsUnflushed(block, seen[block] as number))
        expect.fail(`block ${block} holds ${seen[block]}; ${expected.told(block)}`);
    await checkSnapshots(daemon, this.snapshots);
    expect((await daemon.stop()).code).toBe(0);
    // Logs of a disk that was away on this boot are set aside: told once, and removed.
    await cli(['check', '--repair'], { store });
    await cli(['check', '--repair'], { store });
    const { stdout } = await cli(['check', '--json'], { store });
    expect(JSON.parse(stdout)).toMatchObject({ problems: [] });
    expected.restart(seen);
  }
}

describe.each(['ext4', 'xfs'] as const)('on %s', (type) => {
  function onDisk(context: TestContext, image?: string): string {
    return mountImage(type, DISK, image) ?? skipBecause(context, `mounting a loop device with ${type} needs root`);
  }

  test(
    `${ROUNDS} times the disk goes away under load and is back on the same boot`,
    async (context) => {
      const disk = onDisk(context);
      const subject = new Subject(path.join(disk, 'store'), 1);
      await subject.create();
      for (let round = 0; round < ROUNDS; round++) {
        const daemon = await startDaemon({ store: subject.store });
        const { client, ended: loaded } = await subject.load(daemon);
        await subject.work(daemon);
        shutDown(disk, { unsynced: true });
        // Also killed while it notices, and ended in order with errors.
        if (round % 2 === 0) await daemon.kill();
        else await daemon.stop();
        await loaded;
        client.destroy();
        mountAgain(disk);
        await subject.compare();
      }
    },
    TIMEOUT_MS,
  );

  test(
    `${ROUNDS * COPIES} copies of the disk, taken under load, are sound stores`,
    async (context) => {
      const outer = mountImage('xfs', 3 * DISK);
      if (outer === undefined) return skipBecause(context, 'mounting a loop device with XFS needs root');
      const image = path.join(outer, 'image');
      const disk = onDisk(context, image);
      const subject = new Subject(path.join(disk, 'store'), 2);
      await subject.create();
      for (let round = 0; round < ROUNDS; round++) {
        const daemon = await startDaemon({ store: subject.store });
        const { client, ended: loaded } = await subject.load(daemon);
        for (let n = 0; n < COPIES; n++) {
          await subject.work(daemon);
          const copy = path.join(outer, 'copy');
          const copied = subject.expected.copying();
          await ok('cp', ['--reflink=always', image, copy]);
          const expected = copied();
          const mounted = mountCopy(type, copy);
          if (mounted === undefined) throw new Error('the copy cannot be mounted');
          await subject.compare({ store: path.join(mounted, 'store'), expected });
          unmount(mounted);
          fs.rmSync(copy);
        }
        await daemon.kill();
        await loaded;
        expect(subject.expected.problems).toEqual([]);
        client.destroy();
        await subject.compare();
      }
    },
    TIMEOUT_MS,
  );
});

describe('a disk of nbdkit', () => {
  /** ext4 on a disk with `filters` of nbdkit. */
  async function onFilters(context: TestContext, filters: readonly string[]): Promise<string> {
    for (const command of ['nbdkit', 'nbdfuse', 'mkfs.ext4'])
      if (!haveCommand(command)) return skipBecause(context, `needs ${command}`);
    if (process.getuid?.() !== 0) return skipBecause(context, 'needs root, to mount a filesystem');
    if (!fs.existsSync('/dev/fuse')) return skipBecause(context, 'needs /dev/fuse');
    const directory = temporaryDirectory();
    const image = path.join(directory, 'image');
    fs.closeSync(fs.openSync(image, 'w'));
    fs.truncateSync(image, DISK);
    await ok('mkfs.ext4', ['-q', image]);
    const point = path.join(directory, 'fuse');
    fs.mkdirSync(point);
    const child = spawn(
      'nbdfuse',
      [path.join(point, 'disk'), '--command', 'nbdkit', '-s', '--exit-with-parent', 'file', image, ...filters],
      { stdio: 'ignore' },
    );
    context.onTestFinished(async () => {
      await ok('umount', ['-l', point]).catch(() => undefined);
      child.kill();
      await ended(child);
    });
    await waitUntil(() => fs.existsSync(path.join(point, 'disk')), 'nbdfuse is ready');
    return mountCopy('ext4', path.join(point, 'disk')) ?? skipBecause(context, 'no loop device over a FUSE file');
  }

  test(
    'that is slow: nothing is lost, flushed or not, when the daemon is killed',
    async (context) => {
      const disk = await onFilters(context, ['--filter=delay', 'delay-write=1ms', 'delay-read=1ms']);
      const subject = new Subject(path.join(disk, 'store'), 3);
      await subject.create();
      const daemon = await startDaemon({ store: subject.store });
      const { client, ended: loaded } = await subject.load(daemon);
      await subject.work(daemon);
      await daemon.kill();
      await loaded;
      expect(subject.expected.problems).toEqual([]);
      client.destroy();
      await subject.compare();
    },
    TIMEOUT_MS,
  );

  test(
    `whose writes fail ${ROUNDS} times under load: clients get errors, and what was flushed is there when it works again`,
    async (context) => {
      const fails = path.join(temporaryDirectory(), 'fails');
      const disk = await onFilters(context, ['--filter=error', 'error-pwrite-rate=100%', `error-file=${fails}`]);
      const subject = new Subject(path.join(disk, 'store'), 4);
      await subject.create();
      for (let round = 0; round < ROUNDS; round++) {
        const daemon = await startDaemon({ store: subject.store });
        const { client, ended: loaded } = await subject.load(daemon);
        await subject.work(daemon);
        fs.writeFileSync(fails, '');
        // Writes go to the page cache: the next flush tells.
        await loaded;
        await daemon.stop();
        client.destroy();
        fs.rmSync(fails);
        mountAgain(disk);
        await subject.compare();
      }
    },
    TIMEOUT_MS,
  );
});
