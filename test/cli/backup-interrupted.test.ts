/**
 * Backups that fail: killed at any moment, stopped by a signal, out of space, two at the same time. Earlier backups stay intact in
 * every case, and the next run continues by itself.
 */
import type { ChildProcess } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { expect, test } from 'vitest';
import { BIN, ended, run, skipBecause, temporaryDirectory, waitUntil, spawn } from '../harness/daemon.js';
import { BackedUpDisk, bases, hashOf, qemuMissing, readWithQemu } from './backups.js';
import { attach, MIB, oneLineOf, patterned, sharedStore, storeWith, testStore } from './both-ways.js';

const SIZE = 6 * MIB;
/** More blocks than a job has in flight: some are not begun when it is stopped. */
const PAUSED_SIZE = 24 * MIB;
const KILL_AT = path.resolve(import.meta.dirname, 'kill-at.mjs');
const PAUSED_IO = path.resolve(import.meta.dirname, 'paused-io.mjs');
/** Moments of a run to kill it at; all of them would take minutes. */
const MOMENTS = 9;
const TIMEOUT_MS = 300_000;

const withDaemon = sharedStore('through a daemon');

/** Run sheepgate with every change below `place` counted; killed before number `at`, if that is given. */
async function killed(store: string, place: string, args: readonly string[], at?: number) {
  const counted = path.join(temporaryDirectory(), 'count');
  const result = await run(process.execPath, ['--import', KILL_AT, BIN, ...args], {
    env: {
      SHEEPGATE_STORE: store,
      KILL_BELOW: place,
      ...(at === undefined ? { KILL_COUNT: counted } : { KILL_AT: String(at) }),
    },
  });
  return { ...result, calls: at === undefined ? Number(fs.readFileSync(counted, 'utf8')) : 0 };
}

test.each(['vm', 'vm.img'])(
  'a backup to %s that is killed at any moment leaves the earlier backups intact, and the next run continues',
  async (name) => {
    const original = new BackedUpDisk(await testStore('directly on the store'), SIZE);
    await original.create();
    await original.write(0, patterned(3 * MIB, 1));
    const directory = temporaryDirectory();
    const keep = name === 'vm' ? ['--keep', '2'] : [];
    await original.backup(path.join(directory, name), ...keep);
    await original.write(MIB, patterned(100_000, 2));
    if (name === 'vm') await original.backup(path.join(directory, name), ...keep);
    const before = hashOf(original.content);
    await original.write(2 * MIB, patterned(200_000, 3));
    await original.write(0, Buffer.alloc(MIB));
    const after = hashOf(original.content);

    const scene = temporaryDirectory();
    const store = path.join(scene, 'store');
    const place = path.join(scene, 'backups');
    const to = path.join(place, name);
    const setUp = (): void => {
      // The folders of a store stay: there are 256 of them, nearly all empty.
      if (fs.existsSync(store)) {
        const entries = fs.readdirSync(store, { recursive: true, withFileTypes: true });
        for (const entry of entries) if (!entry.isDirectory()) fs.rmSync(path.join(entry.parentPath, entry.name));
      }
      fs.rmSync(place, { recursive: true, force: true });
      for (const [from, copy] of [
        [original.target.store, store],
        [directory, place],
      ] as const) {
        fs.cpSync(from, copy, { recursive: true, preserveTimestamps: true });
      }
    };
    const args = ['backup', 'vm', '--to', to, ...keep, '--json'];
    setUp();
    const whole = await killed(store, place, args);
    expect(whole.code, whole.stderr).toBe(0);
    expect(whole.calls).toBeGreaterThan(MOMENTS);
    const seen = new Set<string>();
    for (let moment = 0; moment < MOMENTS; moment++) {
      const at = 1 + Math.floor((moment * (whole.calls - 1)) / (MOMENTS - 1));
      setUp();
      expect((await killed(store, place, args, at)).signal, `killed at ${at}`).toBe('SIGKILL');
      // The state after the kill, before any other command.
      const disk = new BackedUpDisk(storeWith(store, undefined), SIZE);
      for (const [id, sha256] of original.at) disk.at.set(id, sha256);
      disk.at.set(original.at.size + 1, after);
      const ids = await disk.checkAllByReading(to);
      expect(ids.length, `at ${at}`).toBeGreaterThan(0);
      seen.add(ids.join());
      expect(ids.at(-1) === original.at.size || ids.at(-1) === original.at.size + 1, `at ${at}: ${ids.join()}`).toBe(
        true,
      );
      // And the next run.
      disk.content = Buffer.from(original.content);
      disk.at.set((ids.at(-1) ?? 0) + 1, after);
      const next = await disk.target.run(args);
      expect(next.code, `after ${at}: ${next.stderr}`).toBe(0);
      await disk.checkAll(to);
      expect(await bases(disk.target), `after ${at}`).toHaveLength(1);
      const files = fs.readdirSync(place, { recursive: true }).map(String);
      expect(files.filter((each) => each.endsWith('.partial'))).toEqual([]);
    }
    // It was killed both before and after the new backup was committed.
    expect(seen.size).toBeGreaterThan(1);
    expect(before).not.toBe(after);
  },
  TIMEOUT_MS,
);

test('a first backup that was killed starts again, and leaves no files of the killed run', async () => {
  const disk = new BackedUpDisk(withDaemon(), SIZE);
  await disk.create();
  await disk.write(0, patterned(3 * MIB, 1));
  const directory = temporaryDirectory();
  const to = path.join(directory, 'vm');
  for (const at of [2, 4, 9]) {
    expect((await killed(disk.target.store, directory, ['backup', 'vm', '--to', to], at)).signal).toBe('SIGKILL');
  }
  expect(await disk.target.fails('restore', to, 'x')).toMatch(/.* has no complete backup/);
  expect(await disk.backup(to)).toMatchObject({ id: 1, kind: 'full' });
  expect(await bases(disk.target)).toHaveLength(1);
  expect(await disk.checkAll(to)).toEqual([1]);
});

interface Started {
  readonly child: ChildProcess;
  readonly stderr: () => string;
}

/** A sheepgate that still runs when this returns. */
function start(store: string, args: readonly string[], env: NodeJS.ProcessEnv = {}, options: string[] = []): Started {
  const child = spawn(process.execPath, [...options, BIN, ...args], {
    env: { ...process.env, SHEEPGATE_STORE: store, ...env },
    stdio: ['ignore', 'ignore', 'pipe'],
  });
  let text = '';
  child.stderr.setEncoding('utf8').on('data', (chunk: string) => (text += chunk));
  return { child, stderr: () => text };
}

/** ... whose third read or write of a block waits until `goOn` is called: until then it is in the middle of its work. */
function startPaused(call: 'read' | 'write', store: string, args: readonly string[]): Started & { goOn: () => void } {
  const until = path.join(temporaryDirectory(), 'until');
  const env = { PAUSED_CALL: call, PAUSED_UNTIL: until };
  return { ...start(store, args, env, ['--import', PAUSED_IO]), goOn: () => fs.writeFileSync(until, '') };
}

test('a second run and a restore are refused while a run is at work; a stopped run cleans up', async () => {
  const disk = new BackedUpDisk(withDaemon(), SIZE);
  await disk.create();
  await disk.write(0, patterned(3 * MIB, 1));
  const { target } = disk;
  const directory = temporaryDirectory();
  const to = path.join(directory, 'vm');
  await disk.backup(to);
  const names = await target.names();
  const files = fs.readdirSync(to).sort();
  const mark = path.join(directory, 'frozen');
  const hooks = ['--freeze-cmd', `touch ${mark}; sleep 60`, '--thaw-cmd', `rm ${mark}`, '--freeze-timeout', '100'];
  for (const signal of ['SIGTERM', 'SIGINT'] as const) {
    const { child, stderr } = start(target.store, ['backup', 'vm', '--to', to, ...hooks]);
    await waitUntil(() => fs.existsSync(mark), 'it has begun');
    expect(await target.fails('backup', 'vm', '--to', to)).toMatch(/another sheepgate is at work on the backups in/);
    expect(await target.fails('restore', to, 'x')).toMatch(/another sheepgate is at work/);
    child.kill(signal);
    expect(await ended(child)).toEqual({ code: signal === 'SIGTERM' ? 143 : 130, signal: null });
    expect(stderr()).toBe(`sheepgate: interrupted by ${signal}\n`);
    expect(fs.existsSync(mark)).toBe(false);
    expect(await target.names()).toEqual(names);
    expect(fs.readdirSync(to).sort()).toEqual(files);
  }
  expect((await disk.backup(to)).notes).toEqual([]);
});

test('a backup that is stopped while it copies leaves neither snapshot nor files', async () => {
  const disk = new BackedUpDisk(withDaemon(), PAUSED_SIZE);
  await disk.create();
  await disk.write(0, patterned(PAUSED_SIZE, 1));
  const to = path.join(temporaryDirectory(), 'vm');
  const partial = path.join(to, 'base-1.img.partial');
  const { child, stderr, goOn } = startPaused('write', disk.target.store, ['backup', 'vm', '--to', to]);
  await waitUntil(() => (fs.statSync(partial, { throwIfNoEntry: false })?.blocks ?? 0) > 0, 'it copies');
  child.kill('SIGTERM');
  goOn();
  expect(await ended(child), stderr()).toEqual({ code: 143, signal: null });
  expect(fs.readdirSync(to).sort()).toEqual(['lock', 'manifest.json']);
  expect(await disk.target.names()).toEqual(['vm']);
});

test('a full target is reported, keeps its backups, and takes the next one when it has space', async (context) => {
  if (process.getuid?.() !== 0) return skipBecause(context, 'only root can mount a small filesystem');
  const directory = temporaryDirectory();
  const mounted = await run('mount', ['-t', 'tmpfs', '-o', 'size=6m', 'tmpfs', directory]);
  if (mounted.code !== 0) return skipBecause(context, `no small filesystem: ${mounted.stderr.trim()}`);
  try {
    const disk = new BackedUpDisk(withDaemon(), 16 * MIB);
    await disk.create();
    await disk.write(0, patterned(3 * MIB, 1));
    const to = path.join(directory, 'vm');
    await disk.backup(to);
    const names = await disk.target.names();
    await disk.write(4 * MIB, patterned(6 * MIB, 2));
    const refusal = await disk.target.fails('backup', 'vm', '--to', to);
    expect(refusal).toMatch(
      /no space left in .*; free some space there, or --keep fewer backups; the backups in it are unharmed: 1\n/,
    );
    expect(await disk.checkAllByReading(to)).toEqual([1]);
    expect(await disk.target.names()).toEqual(names);
    expect((await run('mount', ['-o', 'remount,size=20m', directory])).code).toBe(0);
    expect(await disk.backup(to)).toMatchObject({ id: 2, notes: [] });
    expect(await disk.checkAll(to)).toEqual([1, 2]);
  } finally {
    await run('umount', ['-l', directory]);
  }
});

test('a target that goes away during the backup is an error in one line, and the disk is unchanged', async () => {
  const disk = new BackedUpDisk(withDaemon(), SIZE);
  await disk.create();
  await disk.write(0, patterned(MIB, 1));
  const to = path.join(temporaryDirectory(), 'vm');
  await disk.backup(to);
  const names = await disk.target.names();
  const result = await disk.target.run([
    ...['backup', 'vm', '--to', to],
    ...['--freeze-cmd', `rm -rf ${to}`, '--thaw-cmd', 'true'],
  ]);
  oneLineOf(result, 1, 'backup');
  expect(await disk.target.names()).toEqual(names);
});

test('a restore that is stopped or loses the daemon leaves no partial VDI that looks complete', async () => {
  const disk = new BackedUpDisk(withDaemon(), PAUSED_SIZE);
  await disk.create();
  await disk.write(0, patterned(PAUSED_SIZE, 1));
  const { target } = disk;
  const image = path.join(temporaryDirectory(), 'vm.img');
  await disk.backup(image);
  const { child, stderr, goOn } = startPaused('read', target.store, ['restore', image, 'again']);
  await waitUntil(async () => (await target.names()).includes('again'), 'it restores');
  child.kill('SIGINT');
  goOn();
  expect(await ended(child), stderr()).toEqual({ code: 130, signal: null });
  expect(await target.names()).not.toContain('again');
  // A client has it open: the restore must not overwrite it.
  if (!target.daemon) throw new Error('invariant: there is a daemon');
  const client = await attach(target.daemon, 'vm');
  expect(await target.fails('restore', image, 'vm', '--overwrite')).toMatch(/vm is open by 1 connection/);
  await client.disconnect();
  if (qemuMissing.length === 0) expect(hashOf(await readWithQemu(image))).toBe(hashOf(disk.content));
});
