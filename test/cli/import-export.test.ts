/** Import and export of images: sparse both ways, through files and pipes, interrupted, and with readers that go away. */
import type { ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import fs from 'node:fs';
import path from 'node:path';
import { describe, expect, test } from 'vitest';
import {
  BIN,
  cli,
  ended,
  haveCommand,
  run,
  skipBecause,
  startDaemon,
  temporaryDirectory,
  waitUntil,
  spawn,
} from '../harness/daemon.js';
import {
  attach,
  diskUsage,
  expectBytes,
  MIB,
  oneLineOf,
  patterned,
  sharedStore,
  storeWith,
  testStore,
  WAYS,
} from './both-ways.js';

const PAUSED_IO = path.resolve(import.meta.dirname, 'paused-io.mjs');
/** Space that a filesystem may need beyond the data itself. */
const SLACK = MIB;

/** 24 MiB with data at 1 MiB, at 13 MiB, and in its last 4 KiB; holes elsewhere. */
function sparseImage(directory: string): { file: string; content: Buffer; dataBytes: number } {
  const file = path.join(directory, 'sparse.img');
  const content = Buffer.alloc(24 * MIB);
  const parts: [number, number][] = [
    [MIB, MIB],
    [13 * MIB, 2 * MIB],
    [24 * MIB - 4096, 4096],
  ];
  const fd = fs.openSync(file, 'w');
  fs.ftruncateSync(fd, content.length);
  for (const [at, length] of parts) {
    patterned(length, at).copy(content, at);
    fs.writeSync(fd, content, at, length, at);
  }
  fs.closeSync(fd);
  return { file, content, dataBytes: parts.reduce((sum, [, length]) => sum + length, 0) };
}

/** A sheepgate that is still running when this returns. */
function start(store: string, args: readonly string[], stdio: ('ignore' | 'pipe')[]): ChildProcess {
  const child = spawn(process.execPath, [BIN, ...args], { env: { ...process.env, SHEEPGATE_STORE: store }, stdio });
  child.stdin?.on('error', () => undefined);
  return child;
}

function collected(child: ChildProcess): () => string {
  let text = '';
  child.stderr?.setEncoding('utf8').on('data', (chunk: string) => (text += chunk));
  return () => text;
}

describe.each(WAYS)('%s', (way) => {
  const store = sharedStore(way);

  test('an import carries only data, and an export makes holes again', async () => {
    const target = store();
    const directory = temporaryDirectory();
    const { file, content, dataBytes } = sparseImage(directory);
    const out = path.join(directory, 'out.img');
    const objects = path.join(target.store, 'objects');
    const imported = await target.json('import', file, 'vm');
    expect(imported).toMatchObject({ name: 'vm', size: 24 * MIB });
    const before = diskUsage(objects);
    expect(before).toBeLessThan(dataBytes + 3 * SLACK);
    const exported = await target.json('export', 'vm', out);
    expect(exported).toMatchObject({ vdi: 'vm', file: out, size: 24 * MIB, dataBytes: imported.dataBytes });
    expectBytes(fs.readFileSync(out), content);
    expect(diskUsage(out)).toBeLessThan(dataBytes + SLACK);
    expect(fs.statSync(out).mode & 0o777).toBe(0o600);
    expect(fs.readdirSync(directory).sort()).toEqual(['out.img', 'sparse.img']);
  });

  test('zeros in the image use no space either', async () => {
    const target = store();
    const file = path.join(temporaryDirectory(), 'full.img');
    const content = Buffer.alloc(16 * MIB);
    patterned(65536, 1).copy(content, 8 * MIB);
    fs.writeFileSync(file, content);
    expect(await target.json('import', file, 'vm')).toMatchObject({ dataBytes: 65536, zeroBytes: 16 * MIB - 65536 });
    expect(await target.json('vdi', 'show', 'vm')).toMatchObject({ allocatedBytes: 4 * MIB });
  });

  test('an import from stdin makes a VDI of its length, an export to stdout gives all its bytes', async () => {
    const target = store();
    const { content } = sparseImage(temporaryDirectory());
    const result = await target.run(['import', '-', 'vm'], { input: content });
    expect(result.code, result.stderr).toBe(0);
    expect(result.stdout).toMatch(/^imported 24 MiB into vm in \d+\.\d s: 3[.\d]* MiB of data, the rest is zeros\n$/);
    expect(await target.json('vdi', 'show', 'vm')).toMatchObject({ size: 24 * MIB });
    const back = await target.run(['export', 'vm', '-']);
    expect(back.code, back.stderr).toBe(0);
    expect(back.stderr).toMatch(/^exported 24 MiB of vm in \d+\.\d s: [\d.]+ MiB of data\n$/);
    expectBytes(back.stdoutBytes, content);
  });

  // A daemon gets the same requests for every length.
  test.each(way === 'through a daemon' ? [511, 4 * MIB + 77] : [1, 511, 512, 513, MIB + 1, 4 * MIB + 77])(
    'an image of %d bytes is filled up to a whole sector',
    async (size) => {
      const target = store();
      const file = path.join(temporaryDirectory(), 'odd.img');
      const content = patterned(size, size);
      fs.writeFileSync(file, content);
      const whole = Buffer.alloc(Math.ceil(size / 512) * 512);
      content.copy(whole);
      await target.ok('import', file, 'vm', '--raw');
      expect(await target.json('vdi', 'show', 'vm')).toMatchObject({ size: whole.length });
      expectBytes(await target.contentOf('vm'), whole);
      expect((await target.run(['import', '-', 'piped', '--raw'], { input: content })).code).toBe(0);
      expectBytes((await target.run(['export', 'piped', '-'])).stdoutBytes, whole);
    },
  );

  test('--size makes the VDI larger than the image, --block-size-shift its objects', async () => {
    const target = store();
    const { file, content } = sparseImage(temporaryDirectory());
    await target.ok('import', file, 'vm', '--size', '30M', '--block-size-shift', '20');
    expect(await target.json('vdi', 'show', 'vm')).toMatchObject({ size: 30 * MIB, blockSizeShift: 20 });
    const out = path.join(temporaryDirectory(), 'out');
    await target.run(['export', 'vm', out]);
    expectBytes(fs.readFileSync(out).subarray(0, content.length), content);
  });

  test('--overwrite leaves no old data, not even beyond the end of the image', async () => {
    const target = store();
    const { file, content } = sparseImage(temporaryDirectory());
    const old = patterned(30 * MIB, 9);
    await target.fill('vm', old);
    await target.ok('vdi', 'snapshot', 'vm', 'kept');
    await target.ok('import', file, 'vm', '--overwrite');
    expectBytes(await target.contentOf('vm'), Buffer.concat([content, Buffer.alloc(6 * MIB)]));
    expectBytes(await target.contentOf('vm@kept'), old);
    const big = await target.run(['import', '-', 'vm', '--overwrite', '--raw'], {
      input: Buffer.alloc(30 * MIB + 1, 1),
    });
    expect(oneLineOf(big, 1, 'import')).toMatch(/longer than the 31457280 bytes/);
    expect(await target.names()).toEqual(['vm@kept', 'vm']);
  });

  test('--force replaces a file only when the new one is complete', async () => {
    const target = store();
    const directory = temporaryDirectory();
    const out = path.join(directory, 'out.img');
    fs.writeFileSync(out, 'precious');
    await target.fill('vm', patterned(MIB, 5));
    expect(oneLineOf(await target.run(['export', 'vm@nope', out, '--force']), 1, 'export')).toMatch(/no snapshot/);
    expect(fs.readFileSync(out, 'utf8')).toBe('precious');
    expect((await target.run(['export', 'vm', out, '--force'])).code).toBe(0);
    expectBytes(fs.readFileSync(out), patterned(MIB, 5));
    expect(fs.readdirSync(directory)).toEqual(['out.img']);
  });

  test.each([
    ['SIGINT', 130],
    ['SIGTERM', 143],
  ] as const)('%s during an import removes the half VDI and exits with %d', async (signal, code) => {
    const target = store();
    const child = start(target.store, ['import', '-', 'half', '--raw'], ['pipe', 'ignore', 'pipe']);
    const stderr = collected(child);
    // It has read 8 MiB and waits for more, which never comes.
    await new Promise((resolve) => child.stdin?.write(patterned(8 * MIB, 1), resolve));
    if (target.daemon) await waitUntil(async () => (await target.names()).includes('half'), 'the import has begun');
    child.kill(signal);
    expect(await ended(child)).toEqual({ code, signal: null });
    expect(stderr()).toBe(`sheepgate: interrupted by ${signal}\n`);
    await target.ok('vdi', 'create', 'other', '1M');
    expect(await target.names()).toEqual(['other']);
    expect(await target.ok('check')).toMatch(/ 0 objects, 0 problems/);
  });

  test('SIGINT during an import --overwrite does not remove the VDI', async () => {
    const target = store();
    await target.ok('vdi', 'create', 'vm', '64M');
    const child = start(target.store, ['import', '-', 'vm', '--overwrite', '--raw'], ['pipe', 'ignore', 'pipe']);
    await new Promise((resolve) => child.stdin?.write(patterned(8 * MIB, 1), resolve));
    child.kill('SIGINT');
    expect((await ended(child)).code).toBe(130);
    expect(await target.names()).toEqual(['vm']);
  });

  test('SIGINT during an export removes the .partial file, keeps the old file, and exits with 130', async () => {
    const target = store();
    const directory = temporaryDirectory();
    const out = path.join(directory, 'out.img');
    fs.writeFileSync(out, 'precious');
    await target.fill('vm', patterned(24 * MIB, 1));
    // Its third write waits until the signal is sent.
    const until = path.join(temporaryDirectory(), 'until');
    const child = spawn(process.execPath, ['--import', PAUSED_IO, BIN, 'export', 'vm@now', out, '--force'], {
      env: { ...process.env, SHEEPGATE_STORE: target.store, PAUSED_CALL: 'write', PAUSED_UNTIL: until },
      stdio: ['ignore', 'ignore', 'pipe'],
    });
    const stderr = collected(child);
    const isCopying = (): boolean => (fs.statSync(`${out}.partial`, { throwIfNoEntry: false })?.blocks ?? 0) > 0;
    await waitUntil(() => isCopying() || child.exitCode !== null, 'the export copies');
    child.kill('SIGINT');
    fs.writeFileSync(until, '');
    expect((await ended(child)).code).toBe(130);
    expect(stderr()).toBe('sheepgate: interrupted by SIGINT\n');
    expect(fs.readFileSync(out, 'utf8')).toBe('precious');
    expect(fs.readdirSync(directory)).toEqual(['out.img']);
    expect(await target.names()).toEqual(['vm']);
  });

  test('SIGINT while nobody reads the image ends the export, and its temporary snapshot', async () => {
    const target = store();
    await target.fill('vm', patterned(16 * MIB, 1));
    const child = start(target.store, ['export', 'vm@now', '-'], ['ignore', 'pipe', 'pipe']);
    const stderr = collected(child);
    // The first bytes have arrived; then the pipe fills up.
    await once(child.stdout as NodeJS.ReadableStream, 'readable');
    child.kill('SIGINT');
    expect(await ended(child)).toEqual({ code: 130, signal: null });
    expect(stderr()).toBe('sheepgate: interrupted by SIGINT\n');
    expect(await target.names()).toEqual(['vm']);
  });

  test('a reader that goes away makes `export -` fail: the image is not complete', async () => {
    const target = store();
    await target.fill('vm', patterned(16 * MIB, 1));
    const child = start(target.store, ['export', 'vm@now', '-'], ['ignore', 'pipe', 'pipe']);
    const stderr = collected(child);
    await once(child.stdout as NodeJS.ReadableStream, 'readable');
    child.stdout?.destroy();
    expect(await ended(child)).toEqual({ code: 1, signal: null });
    expect(stderr()).toBe('sheepgate: the image on stdout is not complete: its reader is gone\n');
    // The store was closed properly, and the snapshot dropped.
    expect(await target.names()).toEqual(['vm']);
  });

  test('a full device makes an export fail with the reason', async (context) => {
    if (!fs.existsSync('/dev/full')) return skipBecause(context, 'no /dev/full here');
    const target = store();
    await target.fill('vm', patterned(4 * MIB, 1));
    const result = await target.run(['export', 'vm', '/dev/full']);
    expect(oneLineOf(result, 1, 'export')).toMatch(
      /image on \/dev\/full is not complete: no space left on device \(ENOSPC\)/,
    );
    const child = spawn(process.execPath, [BIN, 'export', 'vm', '-'], {
      env: { ...process.env, SHEEPGATE_STORE: target.store },
      stdio: ['ignore', fs.openSync('/dev/full', 'w'), 'pipe'],
    });
    const stderr = collected(child);
    expect(await ended(child)).toEqual({ code: 1, signal: null });
    expect(stderr()).toMatch(
      /^sheepgate: the image on stdout is not complete: no space left on device \(ENOSPC\)[^\n]*\n$/,
    );
  });

  test('an export to a named pipe writes the image in order', async (context) => {
    if (!haveCommand('mkfifo')) return skipBecause(context, 'no mkfifo here');
    const target = store();
    const content = patterned(5 * MIB, 3);
    await target.fill('vm', content);
    const fifo = path.join(temporaryDirectory(), 'fifo');
    await run('mkfifo', [fifo]);
    const [read, exported] = await Promise.all([run('cat', [fifo]), target.run(['export', 'vm', fifo])]);
    expect(exported.code, exported.stderr).toBe(0);
    expectBytes(read.stdoutBytes, content);
    const [, imported] = await Promise.all([
      run('sh', ['-c', `cat > ${fifo}`], { input: content }),
      target.run(['import', fifo, 'back']),
    ]);
    expect(imported.code, imported.stderr).toBe(0);
    expectBytes(await target.contentOf('back'), content);
  });
});

test('an export to a fifo fails when its reader leaves, and ends by a signal while it has none', async (context) => {
  if (!haveCommand('mkfifo')) return skipBecause(context, 'no mkfifo here');
  const target = await testStore('directly on the store');
  await target.fill('vm', patterned(4 * MIB, 1));
  const fifo = path.join(temporaryDirectory(), 'fifo');
  await run('mkfifo', [fifo]);
  const [exported] = await Promise.all([
    target.run(['export', 'vm', fifo], { timeoutMs: 20_000 }),
    run('head', ['-c', '100', fifo]),
  ]);
  expect({ code: exported.code, stdout: exported.stdout }).toEqual({ code: 1, stdout: '' });
  expect(exported.stderr).toContain(`the image on ${fifo} is not complete: its reader is gone`);
  const child = start(target.store, ['export', 'vm', fifo], ['ignore', 'ignore', 'pipe']);
  const stderr = collected(child);
  await waitUntil(() => stderr().includes(`waiting for a reader of ${fifo}`), 'it waits');
  child.kill('SIGTERM');
  expect((await ended(child)).code).toBe(143);
});

test('`vdi list | head`: a reader that stops reading is not an error', async () => {
  const target = storeWith(path.join(temporaryDirectory(), 'store'), undefined);
  await target.ok('vdi', 'create', 'vm', '1M');
  const child = start(target.store, ['vdi', 'list'], ['ignore', 'pipe', 'pipe']);
  const stderr = collected(child);
  child.stdout?.destroy();
  expect(await ended(child)).toEqual({ code: 0, signal: null });
  expect(stderr()).toBe('');
});

test('the daemon refuses an import under a name that a client has open', async () => {
  const daemon = await startDaemon({ args: ['--create', 'vm:16M'] });
  const client = await attach(daemon, 'vm');
  const result = await cli(['import', '-', 'vm'], { store: daemon.store, input: patterned(MIB, 1) });
  expect(oneLineOf(result, 1, 'import')).toMatch(/"vm" exists already/);
  await client.disconnect();
});

test('progress is drawn only on a terminal', async (context) => {
  if (!haveCommand('script'))
    return skipBecause(context, 'script (util-linux) is not installed, so there is no terminal');
  const store = path.join(temporaryDirectory(), 'store');
  const image = path.join(temporaryDirectory(), 'vm.img');
  fs.writeFileSync(image, patterned(4 * MIB, 2));
  const command = (args: string): string => `'${process.execPath}' '${BIN}' ${args}`;
  const env = { SHEEPGATE_STORE: store };
  // stdin stays open for longer than the progress takes to be drawn for the first time.
  const typed = `(cat '${image}'; sleep 1; cat '${image}') | ${command('import - vm')}`;
  const shown = await run('script', ['-qec', typed, '/dev/null'], { env });
  expect(shown.code, shown.stdout).toBe(0);
  expect(shown.stdout).toMatch(/\r\x1b\[Kimporting vm: [\d.]+ MiB, [\d.]+ [KM]iB\/s/);
  expect(shown.stdout).toMatch(/\r\x1b\[Kimported 8 MiB into vm in/);
  const piped = await run(
    'sh',
    ['-c', `(cat '${image}'; sleep 1; cat '${image}') | ${command('import - vm2 --size 8M')}`],
    {
      env,
    },
  );
  expect({ code: piped.code, stderr: piped.stderr }).toEqual({ code: 0, stderr: '' });
  expect(piped.stdout).not.toMatch(/\x1b|\r/);
  const refused = await run('script', ['-qec', command('export vm -'), '/dev/null'], { env });
  expect(refused.code).toBe(2);
  expect(refused.stdout).toMatch(/a disk image does not belong on a terminal; redirect stdout or name a file/);
});
