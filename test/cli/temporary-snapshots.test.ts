/** NAME@now and NAME@now:LABEL as users see them: taken at the first open, dropped after the last close, however that happens. */
import fs from 'node:fs';
import path from 'node:path';
import { expect, test } from 'vitest';
import { NbdClient } from 'nbd-server-ts';
import {
  BIN,
  cli,
  type Daemon,
  ended,
  haveCommand,
  haveNbdsh,
  run,
  skipBecause,
  startDaemon,
  temporaryDirectory,
  waitUntil,
  spawn,
} from '../harness/daemon.js';
import { LocalStore } from '../../src/store/local/local-store.js';
import { attach, diskUsage, expectBytes, MIB, patterned, storeWith, type TestStore } from './both-ways.js';

const SIZE = 8 * MIB;
const CHUNK = 4 * MIB;

async function daemonWithDisk(seed: number): Promise<{ daemon: Daemon; target: TestStore; writer: NbdClient }> {
  const daemon = await startDaemon({ args: ['--create', `disk:${SIZE}`] });
  const writer = await attach(daemon, 'disk');
  await writeAll(writer, patterned(SIZE, seed));
  await writer.flush();
  return { daemon, target: storeWith(daemon.store, daemon), writer };
}

async function writeAll(client: NbdClient, data: Buffer): Promise<void> {
  for (let at = 0; at < data.length; at += CHUNK) await client.write(at, data.subarray(at, at + CHUNK));
}

async function readAll(client: NbdClient, size = SIZE): Promise<Buffer> {
  const data = Buffer.alloc(size);
  for (let at = 0; at < size; at += CHUNK) await client.readInto(at, data.subarray(at, at + CHUNK));
  return data;
}

/** Bytes of deleted files that the daemon has open: the data that it keeps for temporary snapshots. */
function scratchOf({ child, store }: Daemon): number {
  let bytes = 0;
  const descriptors = `/proc/${child.pid}/fd`;
  for (const fd of fs.readdirSync(descriptors)) {
    try {
      if (!fs.readlinkSync(path.join(descriptors, fd)).startsWith(path.join(store, 'scratch'))) continue;
      bytes += fs.statSync(path.join(descriptors, fd)).blocks * 512;
    } catch {
      // closed since it was listed
    }
  }
  return bytes;
}

const objectsOf = (daemon: Daemon): number => diskUsage(path.join(daemon.store, 'objects'));

async function isGone(target: TestStore, spec: string): Promise<void> {
  await waitUntil(async () => !(await target.names()).includes(spec), `${spec} is gone`);
}

test('NAME@now is read-only and of one point in time, and the writer continues', async () => {
  const { daemon, target, writer } = await daemonWithDisk(1);
  const reader = await NbdClient.connect({ path: daemon.socket });
  expect(await reader.go('disk@now')).toMatchObject({ size: SIZE, readOnly: true, multiConn: true });
  await writeAll(writer, patterned(SIZE, 2));
  expectBytes(await readAll(reader), patterned(SIZE, 1));
  await expect(reader.write(0, Buffer.alloc(512))).rejects.toMatchObject({ code: 'EPERM' });
  await expect(reader.trim(0, 512)).rejects.toMatchObject({ code: 'EPERM' });
  await expect(reader.zero(0, 512)).rejects.toMatchObject({ code: 'EPERM' });
  expectBytes(await readAll(writer), patterned(SIZE, 2));
  expect(await target.names()).toEqual(['disk@now', 'disk']);
  await reader.disconnect();
  await isGone(target, 'disk@now');
  await writer.disconnect();
});

test('connections that are open at the same time share one snapshot; after the last close, the next open takes a new one', async () => {
  const { daemon, target, writer } = await daemonWithDisk(1);
  const first = await attach(daemon, 'disk@now');
  await writeAll(writer, patterned(SIZE, 2));
  const second = await attach(daemon, 'disk@now');
  expectBytes(await readAll(second), patterned(SIZE, 1));
  await first.disconnect();
  const third = await attach(daemon, 'disk@now');
  expectBytes(await readAll(third), patterned(SIZE, 1));
  expect(await target.ok('vdi', 'show', 'disk@now')).toMatch(/open +by 2 connections/);
  await Promise.all([second.disconnect(), third.disconnect()]);
  await isGone(target, 'disk@now');
  const fresh = await attach(daemon, 'disk@now');
  expectBytes(await readAll(fresh), patterned(SIZE, 2));
  await fresh.disconnect();
  await writer.disconnect();
});

test('two labels are two snapshots, each of its own point in time', async () => {
  const { daemon, target, writer } = await daemonWithDisk(1);
  const nightly = await attach(daemon, 'disk@now:nightly');
  await writeAll(writer, patterned(SIZE, 2));
  const weekly = await attach(daemon, 'disk@now:weekly');
  const plain = await attach(daemon, 'disk@now');
  await writeAll(writer, patterned(SIZE, 3));
  expectBytes(await readAll(nightly), patterned(SIZE, 1));
  expectBytes(await readAll(weekly), patterned(SIZE, 2));
  expectBytes(await readAll(plain), patterned(SIZE, 2));
  expect((await target.names()).sort()).toEqual(['disk', 'disk@now', 'disk@now:nightly', 'disk@now:weekly']);
  await nightly.disconnect();
  await isGone(target, 'disk@now:nightly');
  expectBytes(await readAll(weekly), patterned(SIZE, 2));
  await Promise.all([weekly.disconnect(), plain.disconnect()]);
  await isGone(target, 'disk@now');
  await isGone(target, 'disk@now:weekly');
  await writer.disconnect();
});

test('a temporary snapshot is not listed as an export, a query leaves none, and none can be deleted while it is read', async () => {
  const { daemon, target, writer } = await daemonWithDisk(1);
  const asking = await NbdClient.connect({ path: daemon.socket });
  expect(await asking.info('disk@now')).toMatchObject({ size: SIZE, readOnly: true });
  await expect(asking.info('nope@now')).rejects.toMatchObject({ code: 'UNKNOWN_EXPORT' });
  await expect(asking.info('disk@now:')).rejects.toMatchObject({ code: 'UNKNOWN_EXPORT' });
  await expect(asking.info('disk@nowhere')).rejects.toMatchObject({ code: 'UNKNOWN_EXPORT' });
  expect(await target.names()).toEqual(['disk']);
  const reader = await attach(daemon, 'disk@now');
  expect((await asking.list()).map(({ name }) => name)).toEqual(['disk']);
  expect(await target.fails('vdi', 'delete', 'disk@now')).toMatch(/disk@now is open by 1 connection/);
  await asking.disconnect();
  await reader.disconnect();
  await isGone(target, 'disk@now');
  await writer.disconnect();
});

test('a temporary snapshot ends when its client is killed', async () => {
  const { daemon, target, writer } = await daemonWithDisk(1);
  const script = `import { NbdClient } from 'nbd-server-ts';
    const client = await NbdClient.connect({ path: ${JSON.stringify(daemon.socket)} });
    await client.go('disk@now'); await client.read(0, 512); console.log('open');`;
  const client = spawn(process.execPath, ['--input-type=module', '-e', script], {
    cwd: path.dirname(path.dirname(BIN)),
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  await new Promise((resolve) => client.stdout.once('data', resolve));
  expect(await target.names()).toEqual(['disk@now', 'disk']);
  client.kill('SIGKILL');
  await ended(client);
  await isGone(target, 'disk@now');
  await writer.disconnect();
});

test('after a temporary snapshot was dropped, its space is free, and rewriting the disk makes no copies', async () => {
  const { daemon, target, writer } = await daemonWithDisk(1);
  const before = objectsOf(daemon);
  const reader = await attach(daemon, 'disk@now');
  await writeAll(writer, patterned(SIZE, 2));
  await writer.flush();
  // No object was copied: the old blocks are kept separately.
  expect(objectsOf(daemon)).toBeLessThan(before + MIB);
  expect(scratchOf(daemon)).toBeGreaterThan(SIZE - MIB);
  await reader.disconnect();
  await isGone(target, 'disk@now');
  await waitUntil(() => scratchOf(daemon) === 0, 'the before-images are gone');
  await waitUntil(() => objectsOf(daemon) < before + MIB, 'the space is back');
  expect(await target.json('vdi', 'show', 'disk')).toMatchObject({ allocatedBytes: SIZE, exclusiveBytes: SIZE });
  // 512 bytes per object: a copy of any of them would show.
  for (let at = 0; at < SIZE; at += CHUNK) await writer.write(at, Buffer.alloc(512, 7));
  await writer.flush();
  expect(objectsOf(daemon)).toBeLessThan(before + MIB);
  await writer.disconnect();
  expect((await daemon.stop()).code, daemon.log()).toBe(0);
});

test('a daemon that is killed (SIGKILL) leaves nothing of a temporary snapshot behind', async () => {
  const { daemon, writer } = await daemonWithDisk(1);
  const reader = await attach(daemon, 'disk@now:nightly');
  await writeAll(writer, patterned(SIZE, 2));
  await writer.flush();
  await daemon.kill();
  writer.destroy();
  reader.destroy();
  const again = await startDaemon({ store: daemon.store });
  const target = storeWith(again.store, again);
  expect(await target.names()).toEqual(['disk']);
  const client = await attach(again, 'disk');
  expectBytes(await readAll(client), patterned(SIZE, 2));
  await client.disconnect();
  await waitUntil(() => objectsOf(again) < SIZE + 3 * MIB, 'the space is back');
  expect(await target.ok('check')).toMatch(/, 0 problems/);
});

test('SIGTERM leaves nothing of a temporary snapshot behind, with its reader still connected', async () => {
  const { daemon, writer } = await daemonWithDisk(1);
  const reader = await attach(daemon, 'disk@now');
  await writeAll(writer, patterned(SIZE, 2));
  expect((await daemon.stop()).code, daemon.log()).toBe(0);
  writer.destroy();
  reader.destroy();
  const target = storeWith(daemon.store, undefined);
  expect(await target.names()).toEqual(['disk']);
  expect(objectsOf(daemon)).toBeLessThan(SIZE + 3 * MIB);
  expect(await target.ok('check')).toMatch(/, 0 problems/);
});

test('a temporary snapshot that an earlier version stored is dropped at the next open of the store, with a note', async () => {
  const store = path.join(temporaryDirectory(), 'store');
  expect((await cli(['vdi', 'create', 'disk', '32M'], { store })).code).toBe(0);
  const opened = await LocalStore.open(store);
  const [record] = opened.catalog.list();
  const vdi = await opened.catalog.open(record?.vid ?? 0);
  const change = vdi.prepareSwitch('now:nightly');
  await change.switchOver();
  await change.finish();
  await opened.close();
  const result = await cli(['vdi', 'list', '--json'], { store });
  expect((JSON.parse(result.stdout) as { tag: string | null }[]).map(({ tag }) => tag)).toEqual([null]);
  expect(result.stderr).toMatch(/dropped 1 temporary snapshot/);
});

test('a temporary snapshot ends when real clients are killed: nbdcopy in the middle of a copy, and a libnbd shell', async (context) => {
  if (!haveCommand('nbdcopy') || !haveNbdsh())
    return skipBecause(context, 'nbdcopy or python3-libnbd is not installed');
  const { daemon, target, writer } = await daemonWithDisk(1);
  // The reader of its output does not read: nbdcopy stops in the middle of the disk.
  const copying = spawn('nbdcopy', ['--connections=2', daemon.uri('disk@now'), '-'], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  await new Promise((resolve) => copying.stdout.once('readable', resolve));
  const script = `h.connect_uri("${daemon.uri('disk@now')}"); h.pread(512, 0); print("open", flush=True); sys.stdin.read()`;
  const shell = spawn('/usr/bin/python3', ['-m', 'nbd', '-c', 'import sys', '-c', script], {
    stdio: ['pipe', 'pipe', 'inherit'],
  });
  await new Promise((resolve) => shell.stdout.once('data', resolve));
  expect(await target.names()).toEqual(['disk@now', 'disk']);
  copying.kill('SIGKILL');
  await ended(copying);
  await waitUntil(async () => /open +by 1 connection/.test(await target.ok('vdi', 'show', 'disk@now')), 'one is left');
  shell.kill('SIGKILL');
  await ended(shell);
  await isGone(target, 'disk@now');
  await writer.disconnect();
});

test('sheepgate export NAME@now and nbdcopy with four connections see one point in time under a busy writer', async (context) => {
  if (!haveCommand('nbdcopy')) return skipBecause(context, 'nbdcopy is not installed (sh test/install.sh installs it)');
  const { daemon, target, writer } = await daemonWithDisk(1);
  const enough = new AbortController();
  let generation = 0;
  // Every generation stamps block 0 first and the last block second: a mixed copy has an older end than beginning.
  const writing = (async () => {
    while (!enough.signal.aborted) {
      generation++;
      const stamp = Buffer.alloc(512);
      stamp.writeUInt32LE(generation);
      await writer.write(0, stamp);
      await writer.write(SIZE - 512, stamp);
    }
  })();
  const pointInTime = (image: Buffer): void => {
    expect(image.length).toBe(SIZE);
    const [begin, end] = [image.readUInt32LE(0), image.readUInt32LE(SIZE - 512)];
    expect(begin - end === 0 || begin - end === 1, `${begin} and ${end}`).toBe(true);
    const middle = patterned(SIZE, 1);
    expectBytes(image.subarray(512, SIZE - 512), middle.subarray(512, SIZE - 512));
  };
  await waitUntil(() => generation > 10, 'the writer writes');
  for (let round = 0; round < 3; round++) {
    const copied = await run('nbdcopy', ['--connections=4', daemon.uri('disk@now'), '-']);
    expect(copied.code, copied.stderr).toBe(0);
    pointInTime(copied.stdoutBytes);
    const exported = await target.run(['export', `disk@now:mine${round}`, '-']);
    expect(exported.code, exported.stderr).toBe(0);
    pointInTime(exported.stdoutBytes);
  }
  const seen = generation;
  await waitUntil(() => generation > seen, 'the writer still writes');
  enough.abort();
  await writing;
  await isGone(target, 'disk@now');
  expect(await target.names()).toEqual(['disk']);
  await writer.disconnect();
});
