/** The examples do what their comments say, and name the missing tools on a machine without them. */
import fs from 'node:fs';
import path from 'node:path';
import { expect, test } from 'vitest';
import { needs, run, temporaryDirectory } from '../harness/daemon.js';

const EXAMPLES = path.resolve(import.meta.dirname, '../../examples');

/** Runs an example from another directory, with a TMPDIR in which it must leave no file. */
async function example(name: string, ...args: string[]): Promise<string> {
  const directory = temporaryDirectory();
  const result = await run('sh', [path.join(EXAMPLES, name), ...args], {
    cwd: '/',
    env: { TMPDIR: directory },
    timeoutMs: 110_000,
  });
  expect(result.code, result.stdout + result.stderr).toBe(0);
  expect(fs.readdirSync(directory)).toEqual([]);
  return result.stdout;
}

needs(
  'nbdinfo',
  'mkfs.ext4',
  'e2fsck',
  'debugfs',
)('ext4-from-folder.sh: every file comes back identical', async () => {
  const folder = path.join(temporaryDirectory(), 'my folder');
  fs.mkdirSync(path.join(folder, 'below'), { recursive: true });
  fs.writeFileSync(path.join(folder, 'hello.txt'), 'hello\n');
  fs.writeFileSync(path.join(folder, 'below', 'big'), Buffer.alloc(3_000_001, 7));
  const out = await example('ext4-from-folder.sh', folder);
  expect(out).toMatch(/Pass 5: Checking group summary information/);
  expect(out).toMatch(/hello\.txt/);
  expect(out).toMatch(/\n2 files, all identical\n$/);
});

needs('qemu-io')('qemu-io-session.sh: disk and snapshot each have their own patterns', async () => {
  const out = await example('qemu-io-session.sh');
  expect(out).toMatch(/took disk@before/);
  expect(out).not.toMatch(/fail/i);
  expect(out).toMatch(/\ndisk +before +\d+ +1 GiB +16 MiB .*\ndisk +\d+ +1 GiB +12 MiB/);
});

needs('nbdcopy')('snapshot-while-writing.sh: the copy is of one moment, and its space is freed', async () => {
  const out = await example('snapshot-while-writing.sh');
  expect(out).toMatch(/the copy is of one moment/);
  expect(out).toMatch(/deleted disk@monday\nthe store has 6\d MiB, and the writer continues\n$/);
});

needs('nbdcopy')('backup-now.sh: three ways of copying each give one moment, and leave nothing behind', async () => {
  const out = await example('backup-now.sh');
  expect(out.match(/the copy is of one moment/g)).toHaveLength(4);
  expect(out.trimEnd().split('\n').at(-2)).toMatch(/^NAME/);
  expect(out.trimEnd().split('\n').at(-1)).toMatch(/^disk +\d+ +64 MiB/);
});

function needsFuse(...commands: string[]): ReturnType<typeof needs> {
  if (fs.existsSync('/dev/fuse')) return needs('fusermount3', ...commands);
  console.log('skipped: there is no /dev/fuse');
  return (name, body) => test.skip(name, body);
}

needsFuse(
  'nbdfuse',
  'fuse2fs',
  'mkfs.ext4',
  'rsync',
)('rsync-from-snapshot.sh: the files of a mounted disk@now are copied, and nothing is left', async () => {
  const out = await example('rsync-from-snapshot.sh');
  expect(out).toMatch(/\ndisk +now +\d+ +256 MiB/);
  expect(out).toMatch(/\n\d+ files, all identical\n/);
  expect(out.trimEnd().split('\n').at(-2)).toMatch(/^NAME/);
  expect(out.trimEnd().split('\n').at(-1)).toMatch(/^disk +\d+ +256 MiB/);
});

test('each example names the missing tools', async () => {
  const bin = temporaryDirectory();
  for (const tool of ['dirname', 'sh']) {
    const found = ['/usr/bin', '/bin'].map((place) => path.join(place, tool)).find((place) => fs.existsSync(place));
    fs.symlinkSync(found ?? '', path.join(bin, tool));
  }
  for (const name of fs.readdirSync(EXAMPLES).filter((each) => each.endsWith('.sh'))) {
    const result = await run(path.join(bin, 'sh'), [path.join(EXAMPLES, name)], { env: { PATH: bin } });
    expect(result.code, name).toBe(3);
    expect(result.stderr, name).toMatch(/: node is missing; 'sh test\/install\.sh' installs what the examples use\n$/);
  }
});

test('an example refuses an argument that is not a folder', async () => {
  const result = await run('sh', [path.join(EXAMPLES, 'ext4-from-folder.sh'), '/nope']);
  expect([2, 3]).toContain(result.code);
  if (result.code === 2) expect(result.stderr).toMatch(/\/nope is not a folder/);
});
