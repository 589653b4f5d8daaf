/** Devices in files: sizes and kinds of files, durability, files that others change, holes, block devices. */

import { execFile, execFileSync } from 'node:child_process';
import { open, rm, stat, symlink, truncate, writeFile, type FileHandle } from 'node:fs/promises';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { promisify } from 'node:util';
import { expect, onTestFinished, test, vi } from 'vitest';
import { STATE_HOLE, STATE_ZERO, type CompleteDevice, type ZeroMode } from '../src/index.js';
import { fileDevice, type FileOptions } from '../src/devices/file.js';
import { Syncs } from '../src/devices/syncs.js';
import { testContent } from './device-suite.js';
import { fileCalls } from './file-calls.js';
import { Gate } from './test-device.js';
import { temporaryDirectory } from './test-server.js';

const MIB = 1024 * 1024;
const MODE: ZeroMode = { noHole: false, fua: false, fastZero: false };

async function opened(path: string | URL, options?: FileOptions): Promise<CompleteDevice> {
  const device = await fileDevice(path, options);
  onTestFinished(() => device.close('lost'));
  return device;
}

async function fileOf(bytes: Buffer | number): Promise<string> {
  const path = join(await temporaryDirectory(), 'disk');
  await writeFile(path, typeof bytes === 'number' ? '' : bytes);
  if (typeof bytes === 'number') await truncate(path, bytes);
  return path;
}

/** The methods of all FileHandles: to make calls of the system fail. */
async function fileHandles(): Promise<FileHandle> {
  const one = await open('/dev/null');
  onTestFinished(() => {
    vi.restoreAllMocks();
  });
  await one.close();
  return Object.getPrototypeOf(one) as FileHandle;
}

type Transfer = (this: FileHandle, data: Buffer, at: number, length: number, position: number) => Promise<unknown>;

/** Other reads or writes of all FileHandles, made from the real ones. */
function replace(handles: FileHandle, method: 'read' | 'write', make: (original: Transfer) => Transfer): void {
  const original = handles[method] as unknown as Transfer;
  vi.spyOn(handles, method).mockImplementation(make(original) as never);
}

async function extentsOf(device: CompleteDevice, offset = 0, length = device.geometry.size): Promise<number[][]> {
  const found: number[][] = [];
  await device.extents('base:allocation', offset, length, (...extent) => found.push(extent) > 0);
  return found;
}

test.each([0, 1, 511, 513, 4095, 4097, 70_001])('a file of %i bytes is a disk of this size', async (size) => {
  const content = testContent(size);
  const path = await fileOf(content);
  const device = await opened(path);
  expect(device.geometry).toMatchObject({ size, readOnly: false, canFlush: true, canFua: true, multiConn: true });
  expect(device.geometry).toMatchObject({ canTrim: false, canFastZero: false, contexts: [] });
  const into = Buffer.alloc(size, 0xaa);
  await device.read(0, into);
  expect(into.equals(content)).toBe(true);
  if (size > 0) await device.write(size - 1, Buffer.from('z'), true);
  expect((await stat(path)).size).toBe(size);
});

test('a new file is made of the given size, sparse and for its owner only', async () => {
  const path = join(await temporaryDirectory(), 'new');
  const device = await opened(path, { create: true, size: 64 * MIB });
  expect(device.geometry.size).toBe(64 * MIB);
  const found = await stat(path);
  expect(found.size).toBe(64 * MIB);
  expect(found.blocks).toBe(0);
  expect(found.mode & 0o777).toBe(0o600);
  await device.write(63 * MIB, Buffer.from('kept'), true);
  // The second time it is there, with its data.
  const again = await opened(pathToFileURL(path), { create: true, size: 64 * MIB });
  const into = Buffer.alloc(4);
  await again.read(63 * MIB, into);
  expect(into.toString()).toBe('kept');
});

test('a file that cannot be made durable is not left behind', async () => {
  const path = join(await temporaryDirectory(), 'new');
  vi.spyOn(await fileHandles(), 'sync').mockRejectedValue(Object.assign(new Error('full'), { code: 'ENOSPC' }));
  await expect(fileDevice(path, { create: true, size: MIB })).rejects.toMatchObject({ code: 'ENOSPC' });
  await expect(stat(path)).rejects.toMatchObject({ code: 'ENOENT' });
});

test('another size than the given one, and what is no file, are refused', async () => {
  const path = await fileOf(1000);
  await expect(fileDevice(path, { size: 1001 })).rejects.toMatchObject({
    code: 'EINVAL',
    message: /has 1000 bytes, not 1001/,
  });
  await expect(fileDevice(path, { create: true, size: 5 })).rejects.toMatchObject({ code: 'EINVAL' });
  await expect(fileDevice(path, { create: true })).rejects.toThrow(RangeError);
  expect((await stat(path)).size).toBe(1000);
  const directory = await temporaryDirectory();
  await expect(fileDevice(directory, { readOnly: true })).rejects.toMatchObject({
    message: /neither a regular file nor/,
  });
  await expect(fileDevice(join(directory, 'none'))).rejects.toMatchObject({ code: 'ENOENT' });
  await expect(fileDevice('/dev/null')).rejects.toMatchObject({ code: 'EINVAL' });
  await symlink('nowhere', join(directory, 'link'));
  await expect(fileDevice(join(directory, 'link'), { create: true, size: 5 })).rejects.toMatchObject({
    code: 'ENOENT',
  });
  execFileSync('mkfifo', [join(directory, 'fifo')]);
  // Opening a fifo for reading waits for a writer.
  await expect(fileDevice(join(directory, 'fifo'), { readOnly: true })).rejects.toMatchObject({ code: 'EINVAL' });
});

test('reads behind the end of a file that somebody has truncated fail, and change nothing else', async () => {
  const content = Buffer.alloc(20_000, 7);
  const path = await fileOf(content);
  const device = await opened(path, { calls: fileCalls });
  await truncate(path, 10_000);
  const into = Buffer.alloc(4096);
  await expect(device.read(9000, into)).rejects.toMatchObject({ code: 'EIO', offset: 10_000 });
  await expect(device.read(15_000, into)).rejects.toMatchObject({ code: 'EIO', offset: 15_000 });
  await expect(extentsOf(device, 15_000, 100)).rejects.toMatchObject({ code: 'EIO' });
  expect(await extentsOf(device, 0, 20_000)).toEqual([[0, 10_000, 0]]);
  await device.read(5904, into);
  expect(into.equals(Buffer.alloc(4096, 7))).toBe(true);
});

test('short reads and writes of the system are continued, and end where nothing is transferred', async () => {
  const content = testContent(50_000);
  const device = await opened(await fileOf(content));
  const handles = await fileHandles();
  const inFewBytes = (original: Transfer): Transfer =>
    async function (data, at, length, position) {
      return original.call(this, data, at, Math.min(length, 777), position);
    };
  replace(handles, 'read', inFewBytes);
  replace(handles, 'write', inFewBytes);
  await device.write(100, Buffer.alloc(9000, 0x33), false);
  content.fill(0x33, 100, 9100);
  const into = Buffer.alloc(50_000);
  await device.read(0, into);
  expect(into.equals(content)).toBe(true);
  replace(handles, 'write', () => () => Promise.resolve({ bytesWritten: 0 }));
  await expect(device.write(0, into, false)).rejects.toMatchObject({ code: 'EIO' });
});

test('errors of the system pass as they are', async () => {
  const device = await opened(await fileOf(4096));
  const full = Object.assign(new Error('ENOSPC: no space left on device, write'), { code: 'ENOSPC' });
  vi.spyOn(await fileHandles(), 'write').mockRejectedValue(full);
  await expect(device.write(0, Buffer.alloc(512), false)).rejects.toBe(full);
  await expect(device.zero(0, 512, MODE)).rejects.toBe(full);
});

test('flush, and FUA of a write and of zeros, sync the file after what they wait for', async () => {
  const device = await opened(await fileOf(MIB));
  const handles = await fileHandles();
  const order: string[] = [];
  replace(
    handles,
    'write',
    (original) =>
      async function (...args) {
        const result = await original.apply(this, args);
        order.push('written');
        return result;
      },
  );
  vi.spyOn(handles, 'datasync').mockImplementation(() => Promise.resolve(void order.push('synced')));
  await device.write(0, Buffer.alloc(512), false);
  expect(order).toEqual(['written']);
  await device.flush();
  await device.write(0, Buffer.alloc(512), true);
  await device.zero(0, 512, { ...MODE, fua: true });
  expect(order).toEqual(['written', 'synced', 'written', 'synced', 'written', 'synced']);
});

test('after a failed sync no flush, no FUA and no change succeeds any more', async () => {
  const device = await opened(await fileOf(Buffer.alloc(4096, 9)));
  const datasync = vi.spyOn(await fileHandles(), 'datasync');
  datasync.mockRejectedValueOnce(Object.assign(new Error('EIO: i/o error, fdatasync'), { code: 'EIO' }));
  await device.write(0, Buffer.alloc(512, 1), false);
  await expect(device.flush()).rejects.toThrow('fdatasync');
  // The kernel would answer the next one with success.
  const lost = { code: 'EIO', message: /earlier sync of the file has failed/ };
  await expect(device.flush()).rejects.toMatchObject(lost);
  await expect(device.write(0, Buffer.alloc(512), false)).rejects.toMatchObject(lost);
  await expect(device.write(0, Buffer.alloc(512), true)).rejects.toMatchObject(lost);
  await expect(device.zero(0, 512, MODE)).rejects.toMatchObject(lost);
  expect(datasync).toHaveBeenCalledTimes(1);
  await device.read(0, Buffer.alloc(512));
});

test('syncs run one after the other, and who asks during one gets the next', async () => {
  const gates: Gate[] = [];
  const syncs = new Syncs(() => {
    const gate = new Gate();
    gates.push(gate);
    return gate.opened;
  });
  const ended: string[] = [];
  const ask = (name: string): Promise<void> =>
    syncs.request().then(
      () => void ended.push(name),
      () => void ended.push(`${name} failed`),
    );
  const first = ask('first');
  const second = ask('second');
  const third = ask('third');
  expect(gates.length).toBe(1);
  gates[0]?.open();
  await first;
  expect(ended).toEqual(['first']);
  await vi.waitFor(() => expect(gates.length).toBe(2));
  const fourth = ask('fourth');
  gates[1]?.fail(new Error('lost'));
  await Promise.all([second, third, fourth]);
  expect(ended.sort()).toEqual(['first', 'fourth failed', 'second failed', 'third failed']);
  await expect(syncs.request()).rejects.toMatchObject({ code: 'EIO' });
  expect(gates.length).toBe(2);
});

test('zeros are written in pieces, until the client has gone', async () => {
  const device = await opened(await fileOf(5 * MIB));
  const handles = await fileHandles();
  const lengths: number[] = [];
  const gone = new AbortController();
  let isGoing = false;
  replace(handles, 'write', () => (_data, _at, length) => {
    lengths.push(length);
    if (isGoing && lengths.length === 2) gone.abort();
    return Promise.resolve({ bytesWritten: length });
  });
  await device.zero(100, 2 * MIB + 500, MODE);
  expect(lengths).toEqual([MIB, MIB, 500]);
  lengths.length = 0;
  isGoing = true;
  const zeros = device.zero(0, 4 * MIB, MODE, gone.signal);
  await expect(zeros).rejects.toMatchObject({ code: 'ESHUTDOWN', offset: 2 * MIB });
});

test('without calls of the system a fast zero is refused', async () => {
  const device = await opened(await fileOf(4096));
  await expect(device.zero(0, 512, { ...MODE, fastZero: true })).rejects.toMatchObject({ code: 'ENOTSUP' });
});

test('with calls of the system, holes are reported, and made by trims and zeros', async () => {
  const path = await fileOf(8 * MIB);
  const device = await opened(path, { calls: fileCalls });
  expect(device.geometry).toMatchObject({ canTrim: true, canFastZero: true, contexts: ['base:allocation'] });
  const hole = STATE_HOLE | STATE_ZERO;
  expect(await extentsOf(device)).toEqual([[0, 8 * MIB, hole]]);
  await device.write(MIB, Buffer.alloc(2 * MIB, 5), false);
  const data = [MIB, 2 * MIB, 0];
  expect(await extentsOf(device)).toEqual([[0, MIB, hole], data, [3 * MIB, 5 * MIB, hole]]);
  expect(await extentsOf(device, 2 * MIB, MIB)).toEqual([[2 * MIB, MIB, 0]]);
  await device.zero(MIB, MIB, { ...MODE, fastZero: true });
  expect(await extentsOf(device, 0, 4 * MIB)).toEqual([
    [0, 2 * MIB, hole],
    [2 * MIB, MIB, 0],
    [3 * MIB, MIB, hole],
  ]);
  await device.trim(2 * MIB, MIB, true);
  expect(await extentsOf(device)).toEqual([[0, 8 * MIB, hole]]);
  expect((await stat(path)).size).toBe(8 * MIB);
});

test('what the filesystem cannot do by fallocate is written, or refused if it must be fast', async () => {
  const unable = { calls: { fallocate: () => -95 } };
  const device = await opened(await fileOf(Buffer.alloc(4096, 7)), unable);
  await expect(device.zero(0, 512, { ...MODE, fastZero: true })).rejects.toMatchObject({ code: 'ENOTSUP' });
  await device.zero(0, 512, MODE);
  await device.trim(512, 512, false);
  const into = Buffer.alloc(1024);
  await device.read(0, into);
  expect(into).toEqual(Buffer.concat([Buffer.alloc(512), Buffer.alloc(512, 7)]));
  const full = await opened(await fileOf(4096), { calls: { fallocate: () => -28, lseek: () => -5 } });
  await expect(full.zero(0, 512, MODE)).rejects.toMatchObject({ code: 'ENOSPC', syscall: 'fallocate' });
  await expect(extentsOf(full)).rejects.toMatchObject({ code: 'EIO', syscall: 'lseek' });
});

test.for([512, 3 * 512, 10 * MIB])('a block device of %i bytes', async (size, { skip }) => {
  const backing = await fileOf(size);
  let path: string;
  try {
    path = (await promisify(execFile)('losetup', ['-f', '--show', backing])).stdout.trim();
  } catch (error) {
    const reason = `no loop device can be had: ${(error as Error).message.split('\n')[0]}`;
    console.log(`skipped: ${reason}`);
    skip(reason);
    return;
  }
  onTestFinished(async () => void (await promisify(execFile)('losetup', ['-d', path])));
  const device = await opened(path, { size, calls: fileCalls });
  expect(device.geometry).toMatchObject({ size, contexts: [], canTrim: true });
  const data = testContent(size);
  await device.write(0, data, true);
  await device.zero(0, 512, { ...MODE, fua: true });
  data.fill(0, 0, 512);
  // The system refuses parts of blocks.
  await expect(device.zero(100, 11, { ...MODE, fastZero: true })).rejects.toMatchObject({ code: 'ENOTSUP' });
  await device.write(100, Buffer.alloc(300, 1), false);
  await device.zero(200, 100, MODE);
  await device.zero(300, 50, { ...MODE, noHole: true });
  await device.trim(150, 10, false);
  data.fill(1, 100, 400).fill(0, 200, 350);
  const into = Buffer.alloc(size, 0xaa);
  await device.read(0, into);
  expect(into.equals(data)).toBe(true);
  const readOnly = await opened(path, { readOnly: true });
  expect(readOnly.geometry).toMatchObject({ size, readOnly: true, canFlush: false });
  await rm(backing);
});
