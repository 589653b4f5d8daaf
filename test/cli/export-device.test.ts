/** Exporting to a block device: never one in use, one with data only with --force, never a part of the image, and thin. */
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { beforeAll, expect, onTestFinished, test } from 'vitest';
import { BlockDevice } from '../../src/jobs/block-device.js';
import { PartialFile } from '../../src/jobs/partial-file.js';
import { tryLock } from '../../src/system/libc.js';
import { BIN, haveCommand, run, skipBecause, temporaryDirectory, type RunResult } from '../harness/daemon.js';
import { FailingDisk } from '../harness/failing-disk.js';
import { loopDevice, mounted } from '../harness/loop-device.js';
import { diskUsage, expectBytes, MIB, oneLineOf, patterned, testStore, type TestStore } from './both-ways.js';

const SIZE = 16 * MIB;
const DATA_AT = 9 * MIB;

/** A VDI "vm" with 3 MiB of data in it, for all tests: they only export it. */
let target: TestStore;
const content = Buffer.alloc(SIZE);
patterned(3 * MIB, 1).copy(content, DATA_AT);
beforeAll(async () => {
  target = await testStore('directly on the store');
  await target.fill('vm', content);
});

/** What the device holds, read through itself. */
function bytesOf(device: string, length: number): Buffer {
  const fd = fs.openSync(device, 'r');
  const bytes = Buffer.alloc(length);
  for (let done = 0; done < length;) done += fs.readSync(fd, bytes, done, length - done, done);
  fs.closeSync(fd);
  return bytes;
}

test('a mounted device is not overwritten, not even with --force', async (context) => {
  if (!haveCommand('mkfs.ext4')) return skipBecause(context, 'mkfs.ext4 is not installed');
  const { device } = loopDevice(context, SIZE);
  const files = temporaryDirectory();
  fs.writeFileSync(path.join(files, 'precious'), 'data');
  execFileSync('mkfs.ext4', ['-q', '-d', files, device], { stdio: 'pipe' });
  // Mounted read-only, so that nothing else changes it.
  const directory = mounted(context, device, '-oro');
  const before = bytesOf(device, SIZE);
  for (const force of [[], ['--force']]) {
    const refused = oneLineOf(await target.run(['export', 'vm', device, ...force]), 1, 'export');
    expect(refused).toMatch(/is in use: it, or a part of it, is mounted.*lsblk.*nothing was written/);
  }
  expectBytes(bytesOf(device, SIZE), before);
  expect(fs.readFileSync(path.join(directory, 'precious'), 'utf8')).toBe('data');
});

test('a device that is too small is not written to', async (context) => {
  const { device } = loopDevice(context, SIZE - MIB);
  const refused = oneLineOf(await target.run(['export', 'vm', device]), 1, 'export');
  expect(refused).toMatch(/has 15728640 bytes, too few for the image of 16777216 bytes; nothing was written/);
  expect(bytesOf(device, SIZE - MIB).equals(Buffer.alloc(SIZE - MIB))).toBe(true);
});

test.each([
  ['an ext2, ext3 or ext4 filesystem', 'mkfs.ext4', ['-q']],
  ['an XFS filesystem', 'mkfs.xfs', ['-q', '-f', '-d', 'size=320m']],
  ['a btrfs filesystem', 'mkfs.btrfs', ['-q']],
  ['swap space', 'mkswap', []],
  ['an LVM physical volume', 'pvcreate', ['-q', '-y']],
] as const)('%s on a device asks for --force (%s)', async (what, command, args) => {
  if (!haveCommand(command)) return console.log(`skipped: ${command} is not installed`);
  const file = path.join(temporaryDirectory(), 'made');
  fs.closeSync(fs.openSync(file, 'w'));
  fs.truncateSync(file, 320 * MIB);
  const made = await run(command, [...args, file]);
  if (made.code !== 0) return console.log(`skipped: ${command}: ${made.stderr}`);
  await onDevice(file, async (device) => {
    await expectRefused(device, what);
    const forced = await target.run(['export', 'vm', device, '--force', '--json']);
    expect(forced.code, forced.stderr).toBe(0);
    expectBytes(bytesOf(device, SIZE), content);
  });
});

test.each([
  ['a GPT partition table', 'EFI PART', 512],
  ['a GPT partition table', 'EFI PART', SIZE - 512],
  ['a partition table or boot sector', '\x55\xaa', 510],
  ['a LUKS volume', 'LUKS\xba\xbe', 0],
  ['a member of a RAID (md)', '\xfc\x4e\x2b\xa9', 4096],
  ['a member of a RAID (md)', '\xfc\x4e\x2b\xa9', SIZE - 64 * 1024],
  ['a member of a ZFS pool', '\x0c\xb1\xba\0\0\0\0\0', 128 * 1024 + 4096],
  ['a member of a ZFS pool', '\x0c\xb1\xba\0\0\0\0\0', SIZE - 128 * 1024],
  ['data of an unknown kind', 'what is this', 500_000],
  ['data of an unknown kind', 'in a sample between the ends', SIZE / 2 + 4096],
])('%s asks for --force', async (what, mark, at) => {
  const file = path.join(temporaryDirectory(), 'made');
  const fd = fs.openSync(file, 'w');
  fs.writeSync(fd, Buffer.from(mark, 'latin1'), 0, mark.length, at);
  fs.closeSync(fd);
  fs.truncateSync(file, SIZE);
  await onDevice(file, (device) => expectRefused(device, what));
});

/** Runs with the file as a loop device, if loop devices are available. */
async function onDevice(file: string, work: (device: string) => Promise<void>): Promise<void> {
  let device: string;
  try {
    device = execFileSync('losetup', ['-f', '--show', file], { encoding: 'utf8', stdio: 'pipe' }).trim();
  } catch {
    return void console.log('skipped: no loop device can be had');
  }
  try {
    await work(device);
  } finally {
    execFileSync('losetup', ['-d', device]);
  }
}

async function expectRefused(device: string, what: string): Promise<void> {
  const before = bytesOf(device, SIZE);
  const refused = oneLineOf(await target.run(['export', 'vm', device]), 1, 'export');
  expect(refused).toContain(`${device} holds ${what}; --force overwrites it; nothing was written`);
  expectBytes(bytesOf(device, SIZE), before);
}

test('zeros are discarded: a device that was full becomes as thin as the disk', async (context) => {
  const { device, backing } = loopDevice(context, SIZE + 3 * MIB);
  const full = patterned(SIZE + 3 * MIB, 7);
  fs.writeFileSync(device, full);
  execFileSync('sync', [backing]);
  const before = diskUsage(backing);
  expect(before).toBeGreaterThan(SIZE);
  const punched = execFileSync('cat', [`/sys/block/${path.basename(device)}/queue/write_zeroes_max_bytes`]);
  if (punched.toString().trim() === '0') return skipBecause(context, 'loop devices cannot give space back here');
  const result = await target.run(['export', 'vm', device, '--force', '--json']);
  expect(result.code, result.stderr).toBe(0);
  expect(JSON.parse(result.stdout)).toMatchObject({ dataBytes: 3 * MIB, zeroBytes: SIZE - 3 * MIB });
  // Data behind the image stays.
  expectBytes(bytesOf(device, SIZE + 3 * MIB), Buffer.concat([content, full.subarray(SIZE)]));
  expect(diskUsage(backing)).toBeLessThan(8 * MIB);
});

test('zeros are written if the device does not support discard', async (context) => {
  const directory = path.join(temporaryDirectory(), 'ramfs');
  fs.mkdirSync(directory);
  try {
    // It cannot punch holes, so a loop device on it cannot discard.
    execFileSync('mount', ['-t', 'ramfs', 'none', directory], { stdio: 'pipe' });
  } catch {
    return skipBecause(context, 'no ramfs can be mounted');
  }
  try {
    const file = path.join(directory, 'device');
    fs.writeFileSync(file, patterned(SIZE, 7));
    await onDevice(file, async (device) => {
      const result = await target.run(['export', 'vm', device, '--force', '--json']);
      expect(result.code, result.stderr).toBe(0);
      expectBytes(bytesOf(device, SIZE), content);
    });
  } finally {
    execFileSync('umount', [directory]);
  }
});

test('an empty thin device stays thin', async (context) => {
  const { device, backing } = loopDevice(context, SIZE);
  const result = await target.run(['export', 'vm', device, '--json']);
  expect(result.code, result.stderr).toBe(0);
  expectBytes(bytesOf(device, SIZE), content);
  expect(diskUsage(backing)).toBeLessThan(4 * MIB);
});

test('links, fifos and another export at the path of the partial image are not written through', async (context) => {
  const directory = temporaryDirectory();
  const outside = path.join(temporaryDirectory(), 'precious');
  fs.writeFileSync(outside, 'precious');
  const out = path.join(directory, 'vm.img');
  fs.symlinkSync(outside, `${out}.partial`);
  expect(await target.fails('export', 'vm', out)).toMatch(/vm\.img\.partial is a symbolic link, not a regular file/);
  fs.rmSync(`${out}.partial`);
  if (!haveCommand('mkfifo')) return skipBecause(context, 'no mkfifo here');
  await run('mkfifo', [`${out}.partial`]);
  expect(await target.fails('export', 'vm', out)).toMatch(/vm\.img\.partial is a fifo, not a regular file/);
  fs.rmSync(`${out}.partial`);
  // Another export is writing it; then it was killed.
  const other = fs.openSync(`${out}.partial`, 'w');
  fs.writeSync(other, 'half');
  expect(tryLock(other)).toBe(true);
  expect(await target.fails('export', 'vm', out)).toMatch(
    /another export is writing .*vm\.img; wait until it has ended/,
  );
  expect(fs.readFileSync(`${out}.partial`, 'utf8')).toBe('half');
  fs.closeSync(other);
  expect((await target.run(['export', 'vm', out])).code).toBe(0);
  expectBytes(fs.readFileSync(out), content);
  expect(fs.readFileSync(outside, 'utf8')).toBe('precious');
  // A dangling link counts as existing.
  const link = path.join(directory, 'link');
  fs.symlinkSync(path.join(directory, 'nowhere'), link);
  for (const force of [[], ['--force']]) {
    expect(await target.fails('export', 'vm', link, ...force)).toMatch(
      /link is a symbolic link to a file that does not exist/,
    );
  }
  expect(fs.existsSync(path.join(directory, 'nowhere'))).toBe(false);
});

test('a link to a directory in the path of the image is followed, because the operator gave it', async () => {
  const directory = temporaryDirectory();
  const real = path.join(directory, 'real');
  fs.mkdirSync(real);
  fs.symlinkSync(real, path.join(directory, 'images'));
  expect((await target.run(['export', 'vm', path.join(directory, 'images', 'vm.img')])).code).toBe(0);
  expectBytes(fs.readFileSync(path.join(real, 'vm.img')), content);
});

/** Through a shell, with redirections as an operator types them. */
function shell(command: string, ...words: string[]): Promise<RunResult> {
  const env = { SHEEPGATE_STORE: target.store };
  return run('sh', ['-c', command.replaceAll('sheepgate', `'${process.execPath}' '${BIN}'`), 'sh', ...words], { env });
}

test('a block device as stdout or stdin: stdout is refused with the name to give, stdin is imported', async (context) => {
  const { device } = loopDevice(context, SIZE);
  for (const name of ['-', '/dev/stdout']) {
    const refused = oneLineOf(await shell('sheepgate export vm "$1" 1<>"$2"', name, device), 2, 'export');
    expect(refused).toContain(
      `stdout is a block device: name a file or device instead of redirecting to it (${device})`,
    );
  }
  expectBytes(bytesOf(device, SIZE), Buffer.alloc(SIZE));
  expect((await target.run(['export', 'vm', device])).code).toBe(0);
  expect(await target.json('import', device, 'named')).toMatchObject({ size: SIZE, dataBytes: 3 * MIB });
  const fed = await shell('sheepgate import - fed < "$1"', device);
  expect({ code: fed.code, stderr: fed.stderr }).toEqual({ code: 0, stderr: '' });
  const rest = await shell('(head -c 1048576 > /dev/null; sheepgate import - rest) < "$1"', device);
  expect({ code: rest.code, stderr: rest.stderr }).toEqual({ code: 0, stderr: '' });
  expectBytes(await target.contentOf('named'), content);
  expectBytes(await target.contentOf('fed'), content);
  expectBytes(await target.contentOf('rest'), content.subarray(MIB));
});

test('a read-only device is refused before anything is copied', async (context) => {
  const { device } = loopDevice(context, SIZE);
  if (!haveCommand('blockdev')) return skipBecause(context, 'blockdev (util-linux) is not installed');
  execFileSync('blockdev', ['--setro', device]);
  // Loop devices are reused, and stay read-only.
  onTestFinished(() => void execFileSync('blockdev', ['--setrw', device]));
  const refused = oneLineOf(await target.run(['export', 'vm', device, '--force']), 1, 'export');
  expect(refused).toMatch(/is a read-only device; nothing was written; 'blockdev --setrw/);
});

test('writing zeros to a device ends on a signal', async (context) => {
  const { device: file } = loopDevice(context, SIZE);
  const device = await BlockDevice.open(file, false);
  try {
    const stop = new AbortController();
    stop.abort(new Error('told to stop'));
    await expect(device.zero(1, 4094, stop.signal)).rejects.toThrow('told to stop');
  } finally {
    await device.close();
  }
});

test('--force replaces the target of a link, and the link stays', async () => {
  const directory = temporaryDirectory();
  const real = path.join(temporaryDirectory(), 'real.img');
  const link = path.join(directory, 'link.img');
  fs.writeFileSync(real, 'old');
  fs.symlinkSync(real, link);
  expect(await target.fails('export', 'vm', link)).toMatch(/exists; --force replaces it/);
  expect((await target.run(['export', 'vm', link, '--force'])).code).toBe(0);
  expect(fs.readlinkSync(link)).toBe(real);
  expectBytes(fs.readFileSync(real), content);
});

test('/dev/stdout is stdout, and no file is created in /dev or /proc', async () => {
  const out = path.join(temporaryDirectory(), 'out.img');
  const result = await shell('sheepgate export vm /dev/stdout --force > "$1"', out);
  expect(result.code, result.stderr).toBe(0);
  expectBytes(fs.readFileSync(out), content);
  const missing = `/dev/sheepgate-${process.pid}`;
  expect(await target.fails('export', 'vm', missing)).toMatch(/is in \/dev and is not a device/);
  expect(await target.fails('export', 'vm', '/proc/self/comm', '--force')).toMatch(/is in \/proc and is not a device/);
  expect(fs.existsSync(missing)).toBe(false);
});

test('for an image without space or directory, the error names the place and the remedy', async (context) => {
  const nowhere = path.join(temporaryDirectory(), 'nodir');
  expect(await target.fails('export', 'vm', path.join(nowhere, 'x.img'))).toContain(
    `${nowhere} does not exist; create it`,
  );
  const directory = path.join(temporaryDirectory(), 'small');
  fs.mkdirSync(directory);
  try {
    execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=1m', 'none', directory], { stdio: 'pipe' });
  } catch {
    return skipBecause(context, 'no tmpfs can be mounted');
  }
  try {
    const out = path.join(directory, 'x.img');
    expect(await target.fails('export', 'vm', out)).toContain(
      `no space left for ${out} (ENOSPC), and the partial image was removed`,
    );
    expect(fs.readdirSync(directory)).toEqual([]);
  } finally {
    execFileSync('umount', [directory]);
  }
});

test('of two exports to one file, in any order, one writes it and the other is refused', async () => {
  const directory = temporaryDirectory();
  const file = path.join(directory, 'vm.img');
  const failing = new FailingDisk();
  const others: Promise<PartialFile>[] = [];
  const another = async (): Promise<void> => {
    const other = PartialFile.open(file, failing.disk);
    others.push(other);
    await other.catch(() => undefined);
  };
  // A second export runs to its end between two steps of the first: before and after the first removes the old file, and
  // when the first has created its file and not yet locked it.
  for (const step of ['before', 'after', 'made'] as const) {
    fs.writeFileSync(`${file}.partial`, 'left');
    others.length = 0;
    let isFirst = true;
    const unlinks = failing.instead({ calls: ['unlink'] }, async (_, proceed) => {
      const isOurs = isFirst && step !== 'made';
      isFirst &&= !isOurs;
      if (isOurs && step === 'before') await another();
      await proceed();
      if (isOurs && step === 'after') await another();
    });
    const opens = failing.instead({ calls: ['open'] }, async ({ args }, proceed) => {
      const fd = await proceed();
      const isOurs = isFirst && step === 'made' && (Number(args[1]) & fs.constants.O_EXCL) !== 0;
      isFirst &&= !isOurs;
      if (isOurs) await another();
      return fd;
    });
    const first = PartialFile.open(file, failing.disk);
    await Promise.allSettled([first]);
    const results = await Promise.allSettled([first, ...others]);
    unlinks.off();
    opens.off();
    const owners = results.flatMap((result) => (result.status === 'fulfilled' ? [result.value] : []));
    expect({ step, tried: results.length, owners: owners.length }).toEqual({ step, tried: 2, owners: 1 });
    for (const result of results) {
      if (result.status === 'rejected') expect(String(result.reason)).toMatch(/another export is writing .*vm\.img/);
    }
    await expect(PartialFile.open(file)).rejects.toThrow(/another export is writing/);
    fs.writeSync(owners[0]?.fd ?? -1, 'whole');
    await owners[0]?.finish();
    expect(fs.readdirSync(directory)).toEqual(['vm.img']);
    expect(fs.readFileSync(file, 'utf8')).toBe('whole');
    fs.rmSync(file);
  }
});
