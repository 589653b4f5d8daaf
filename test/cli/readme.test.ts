/** The tour of README.md, run as it is written there, with the default addresses and the default store. */
import fs from 'node:fs';
import path from 'node:path';
import { expect } from 'vitest';
import { BIN, cli, ended, needs, ok, run, start, temporaryDirectory, waitUntil } from '../harness/daemon.js';

const README = path.resolve(import.meta.dirname, '../../README.md');
/** The disk size of the tour is too large to copy in a test. */
const SMALLER = [
  [/\b10G\b/g, '64M'],
  [/\b20G\b/g, '128M'],
  [/\b10 GiB\b/g, '64 MiB'],
  [/\b20 GiB\b/g, '128 MiB'],
] as const;
/** The version of mkfs.ext4 for which README.md shows the number of objects. */
const MKFS = /mke2fs 1\.47\./;

/** The lines of one chapter that a user types, not those for root. */
function typedIn(chapter: string): string[] {
  const text = fs.readFileSync(README, 'utf8').split(`\n## ${chapter}\n`)[1]?.split('\n## ')[0] ?? '';
  return [...text.matchAll(/^ {4}\$ (.*)$/gm)].map(([, line]) => line as string);
}

/** The output that README.md shows for each of these lines, by line; most have none. */
function shownIn(chapter: string): Map<string, string> {
  const text = fs.readFileSync(README, 'utf8').split(`\n## ${chapter}\n`)[1]?.split('\n## ')[0] ?? '';
  return new Map(
    [...text.matchAll(/^ {4}\$ (.*)\n((?: {4}(?!\$ ).*\n)+)/gm)].map(([, line, shown]) => [line, shown] as never),
  );
}

/** Without values that differ in each run, and with the smaller size. */
function timeless(text: string): string {
  const here = text.replace(/^ {4}/gm, '').replace(/\d{4}-\d\d-\d\dT[\d:]{8}[+-][\d:]{5}/g, 'TIME');
  return SMALLER.reduce((made, [size, smaller]) => made.replace(size, smaller), here).replace(
    /\d+ objects/,
    'N objects',
  );
}

/** The objects that an ext4 filesystem of this size fills. */
async function objectsOfExt4(size: string): Promise<number> {
  const image = path.join(temporaryDirectory(), 'fs.img');
  const store = path.join(temporaryDirectory(), 'store');
  await ok('sh', ['-c', `truncate -s ${size} ${image} && PATH=$PATH:/sbin mkfs.ext4 -q -F ${image}`]);
  expect((await cli(['import', image, 'fs'], { store })).code).toBe(0);
  return objectsIn((await cli(['check'], { store })).stdout);
}

function objectsIn(checked: string): number {
  return Number(/(\d+) objects, 0 problems\n$/.exec(checked)?.[1]);
}

needs(
  'nbdcopy',
  'nbdinfo',
  'qemu-img',
  'mkfs.ext4',
  'zstd',
)('every line of the tour does what it says, on the default socket and store', async () => {
  const directory = temporaryDirectory();
  const runtime = path.join(directory, 'runtime');
  const backups = path.join(directory, 'backups');
  for (const each of [runtime, backups]) fs.mkdirSync(each, { mode: 0o700 });
  const env = {
    XDG_RUNTIME_DIR: runtime,
    XDG_DATA_HOME: path.join(directory, 'data'),
    SHEEPGATE_STORE: undefined,
    SHEEPGATE_CONTROL: undefined,
  };
  const places = [`XDG_RUNTIME_DIR=${runtime}`, `XDG_DATA_HOME=${env.XDG_DATA_HOME}`];
  const daemon = start('env', [...places, process.execPath, BIN, 'serve', '--create', 'disk:64M']);
  let out = '';
  daemon.stdout.setEncoding('utf8').on('data', (text: string) => (out += text));
  await waitUntil(() => out.includes('Ctrl-C'), 'the daemon is ready');

  const typed = typedIn('A tour');
  expect(typed.length).toBeGreaterThan(20);
  expect(typed[1]).toBe('S=/run/user/1000/sheepgate/nbd.sock');
  const socket = /socket=(.*)/.exec(out)?.[1] ?? '';
  const lines = typed.map((line) => {
    const here = line
      .replace('/run/user/1000/sheepgate/nbd.sock', socket)
      .replaceAll('npx sheepgate', 'sheepgate')
      .replaceAll('/backup/', `${backups}/`)
      .replace('--at 2026-11-24', '--at "$(date -u +%FT%TZ)"');
    return SMALLER.reduce((text, [size, smaller]) => text.replace(size, smaller), here);
  });
  const script = [
    'set -e; PATH=$PATH:/usr/sbin:/sbin',
    `sheepgate() { '${process.execPath}' '${BIN}' "$@"; }`,
    ...lines.flatMap((line) => [`echo '$' '${line.replaceAll("'", `'\\''`)}'`, line]),
  ].join('\n');
  const result = await run('sh', ['-c', script], { cwd: directory, env });
  expect(result.code, result.stdout + result.stderr).toBe(0);
  // The output is the one that README.md shows.
  const shown = shownIn('A tour');
  expect(shown.size).toBeGreaterThan(8);
  const printed = result.stdout.split(/^\$ .*\n/m).slice(1);
  for (const [n, line] of typed.entries()) {
    const output = shown.get(line);
    if (output !== undefined) expect(timeless(printed[n] ?? ''), line).toBe(timeless(output));
  }
  // The store of the tour holds the filesystem as many times as here, for any size.
  const count = objectsIn(shown.get('npx sheepgate check') ?? '');
  const times = objectsIn(result.stdout) / (await objectsOfExt4('64M'));
  const { stderr: version } = await run('sh', ['-c', 'PATH=$PATH:/sbin mkfs.ext4 -V']);
  if (MKFS.test(version)) expect(count).toBe(times * (await objectsOfExt4('10G')));
  else
    console.log(
      `the objects in README.md are not compared: they are of another mkfs.ext4 than ${version.split('\n')[0]}`,
    );
  const bytes = (name: string): Buffer => fs.readFileSync(path.join(directory, name));
  expect(
    bytes('copy.img')
      .subarray(0, 64 * 2 ** 20)
      .equals(bytes('fs.img')),
  ).toBe(true);
  expect(bytes('now.img').equals(bytes('fs.img'))).toBe(true);
  daemon.kill('SIGINT');
  expect(await ended(daemon)).toEqual({ code: 0, signal: null });
});
