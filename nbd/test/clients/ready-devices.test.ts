/** Real clients of the ready devices: what nbdinfo is told, what nbdcopy and qemu read and write. A client that is missing is skipped. */

import { execFile, execFileSync } from 'node:child_process';
import { readFile, writeFile } from 'node:fs/promises';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { expect, onTestFinished, test } from 'vitest';
import { NbdServer } from '../../src/index.js';
import { completeDevice, type AnyDevice } from '../../src/device.js';
import { fileDevice } from '../../src/devices/file.js';
import { httpRangeDevice } from '../../src/devices/http-range.js';
import { memoryDevice } from '../../src/devices/memory.js';
import { cache } from '../../src/filters/cache.js';
import { errors } from '../../src/filters/error.js';
import { overlay } from '../../src/filters/overlay.js';
import { partition } from '../../src/filters/partition.js';
import { readOnly } from '../../src/filters/read-only.js';
import { stats } from '../../src/filters/stats.js';
import { testContent } from '../device-suite.js';
import { fileCalls } from '../file-calls.js';
import { temporaryDirectory } from '../test-server.js';

const MIB = 1024 * 1024;
const SIZE = 16 * MIB;
const run = promisify(execFile);

function has(...programs: readonly string[]): boolean {
  return programs.every((program) => {
    try {
      execFileSync(program, ['--version'], { stdio: 'ignore' });
      return true;
    } catch {
      console.log(`skipped: tests with ${program}, which is not installed`);
      return false;
    }
  });
}

const canCopy = has('nbdinfo', 'nbdcopy');
const hasQemu = has('qemu-img', 'qemu-io');

interface Served {
  readonly uri: string;
  readonly directory: string;
  readonly reportsExtents: boolean;
}

async function serve(device: AnyDevice): Promise<Served> {
  const directory = await temporaryDirectory();
  const path = join(directory, 'nbd.sock');
  // One device for all connections.
  const shared = Object.assign(completeDevice(device), { close: () => undefined });
  const info = { name: '', description: '' };
  const server = new NbdServer({
    provider: {
      list: () => [info],
      describe: () => ({ geometry: shared.geometry, info }),
      open: () => ({ device: shared, info }),
    },
  });
  onTestFinished(() => server.destroy());
  await server.listen({ path });
  return { uri: `nbd+unix:///?socket=${path}`, directory, reportsExtents: shared.geometry.contexts.length > 0 };
}

interface MapEntry {
  readonly offset: number;
  readonly length: number;
  readonly type: number;
}

async function mapOf(uri: string): Promise<MapEntry[]> {
  const { stdout } = await run('nbdinfo', ['--json', '--map', uri]);
  return (JSON.parse(stdout) as MapEntry[]).map(({ offset, length, type }) => ({ offset, length, type }));
}

async function sparseMemory(): Promise<AnyDevice> {
  const device = memoryDevice({ size: SIZE, multiConn: true });
  await device.write(0, testContent(3 * MIB), false);
  await device.write(9 * MIB, testContent(2 * MIB), false);
  return device;
}

async function newFile(calls = false): Promise<AnyDevice> {
  const path = join(await temporaryDirectory(), 'disk');
  const device = await fileDevice(path, { create: true, size: SIZE, calls: calls ? fileCalls : undefined });
  onTestFinished(() => device.close('lost'));
  return device;
}

const WRITABLE: [string, () => AnyDevice | Promise<AnyDevice>][] = [
  ['memory', () => memoryDevice({ size: SIZE, multiConn: true })],
  ['a file', () => newFile()],
  ['a file with calls of the system', () => newFile(true)],
  ['a cache of a file', async () => cache(await newFile(), { multiConn: true })],
  ['a partition of memory', () => partition(memoryDevice(2 * SIZE), { offset: 12_288, length: SIZE })],
  ['stats of an overlay of a file', async () => stats(overlay(await newFile(), { multiConn: true }))],
];

test.runIf(canCopy).each(WRITABLE)('nbdcopy writes to %s and reads the same back', async (_, make) => {
  const { uri, directory, reportsExtents } = await serve(await make());
  const [source, copy] = [join(directory, 'source'), join(directory, 'copy')];
  const image = Buffer.alloc(SIZE);
  testContent(5 * MIB).copy(image, 1000);
  testContent(2 * MIB).copy(image, 11 * MIB);
  await writeFile(source, image);
  await run('nbdcopy', ['--flush', source, uri]);
  await run('nbdcopy', [uri, copy]);
  expect((await readFile(copy)).equals(image)).toBe(true);
  const map = reportsExtents ? await mapOf(uri) : [{ offset: 0, length: SIZE, type: 0 }];
  expect(map.reduce((end, { offset, length }) => (offset === end ? end + length : NaN), 0)).toBe(SIZE);
});

test.runIf(hasQemu).each(WRITABLE)(
  'qemu-io writes, zeros and discards on %s, and qemu-img compares',
  async (_, make) => {
    const { uri, directory } = await serve(await make());
    const reference = join(directory, 'reference');
    await writeFile(reference, Buffer.alloc(SIZE));
    const commands = [
      'write -P 0x41 0 3M',
      'write -z 512 70k',
      'write -z -u 1M 1M',
      'write -P 7 5000k 3k',
      'write -f -P 9 15M 1M',
    ];
    const flags = commands.flatMap((command) => ['-c', command]);
    for (const target of [uri, reference]) await run('qemu-io', ['-f', 'raw', ...flags, '-c', 'flush', target]);
    await run('qemu-io', ['-f', 'raw', '-c', 'discard 10M 1M', uri]);
    const { stdout } = await run('qemu-img', ['compare', '-f', 'raw', '-F', 'raw', uri, reference]);
    expect(stdout).toContain('Images are identical');
  },
);

test.runIf(canCopy)('nbdinfo maps the holes of memory, and what filters make of them', async () => {
  const memory = [
    { offset: 0, length: 3 * MIB, type: 0 },
    { offset: 3 * MIB, length: 6 * MIB, type: 3 },
    { offset: 9 * MIB, length: 2 * MIB, type: 0 },
    { offset: 11 * MIB, length: 5 * MIB, type: 3 },
  ];
  expect(await mapOf((await serve(await sparseMemory())).uri)).toEqual(memory);
  const layers = cache(readOnly(stats(await sparseMemory())));
  expect(await mapOf((await serve(layers)).uri)).toEqual(memory);
  const part = partition(await sparseMemory(), { offset: 2 * MIB, length: 8 * MIB });
  expect(await mapOf((await serve(part)).uri)).toEqual([
    { offset: 0, length: MIB, type: 0 },
    { offset: MIB, length: 6 * MIB, type: 3 },
    { offset: 7 * MIB, length: MIB, type: 0 },
  ]);
  const changed = overlay(await sparseMemory());
  await changed.write(5 * MIB, Buffer.alloc(4096, 1), false);
  await changed.zero(0, 2 * MIB, { noHole: false, fua: false, fastZero: false });
  expect(await mapOf((await serve(changed)).uri)).toEqual([
    { offset: 0, length: 2 * MIB, type: 3 },
    { offset: 2 * MIB, length: MIB, type: 0 },
    { offset: 3 * MIB, length: 2 * MIB, type: 3 },
    { offset: 5 * MIB, length: 4096, type: 0 },
    { offset: 5 * MIB + 4096, length: 4 * MIB - 4096, type: 3 },
    { offset: 9 * MIB, length: 2 * MIB, type: 0 },
    { offset: 11 * MIB, length: 5 * MIB, type: 3 },
  ]);
});

test.runIf(canCopy)('nbdcopy reads an HTTP resource, through a cache as well', async () => {
  const image = testContent(3 * MIB + 77);
  const http = createServer((request, response) => {
    const [, first = 0, last = 0] = (/^bytes=(\d+)-(\d+)$/.exec(request.headers.range ?? '') ?? []).map(Number);
    response.writeHead(206, { 'content-range': `bytes ${first}-${last}/${image.length}`, etag: '"1"' });
    response.end(image.subarray(first, last + 1));
  });
  await new Promise<void>((resolve) => http.listen(0, '127.0.0.1', resolve));
  onTestFinished(() => {
    http.closeAllConnections();
    http.close();
  });
  const url = `http://127.0.0.1:${(http.address() as AddressInfo).port}/disk`;
  for (const device of [await httpRangeDevice(url), cache(await httpRangeDevice(url), { multiConn: true })]) {
    const { uri, directory } = await serve(device);
    const copy = join(directory, 'copy');
    await run('nbdcopy', [uri, copy]);
    expect((await readFile(copy)).equals(image)).toBe(true);
  }
});

test.runIf(hasQemu)('a client sees the errors that the filter makes, and that a device is read-only', async () => {
  const full = errors(memoryDevice(MIB), { methods: ['write'], code: 'ENOSPC' });
  const failed = await run('qemu-io', ['-f', 'raw', '-c', 'write 0 4k', (await serve(full)).uri]).then(
    ({ stdout }) => stdout,
    (error: unknown) => JSON.stringify(error),
  );
  expect(failed).toContain('No space left on device');
  const { uri } = await serve(readOnly(memoryDevice(MIB)));
  const refused = run('qemu-io', ['-f', 'raw', '-c', 'write 0 4k', uri]);
  await expect(refused).rejects.toMatchObject({
    stderr: expect.stringMatching(/read.?only|permission denied/i) as unknown,
  });
});
