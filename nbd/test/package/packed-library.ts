/**
 * Packs the library from a copy of its folder, as in a fresh clone, and installs the file in fresh projects of users. Owns the
 * running of programs there, each with its own time limit; nothing is downloaded.
 */
import { execFile, spawn } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';

/** The folder of the library, and the one above it, whose packages compile it. */
export const LIBRARY = fileURLToPath(new URL('../..', import.meta.url));
export const ROOT = path.resolve(LIBRARY, '..');
const MODULES = path.join(ROOT, 'node_modules');

const RUN_TIMEOUT_MS = 120_000;
const MAX_OUTPUT_BYTES = 64 * 1024 * 1024;

/** Standard output. Errors: the program fails; the message has all that it printed. */
export function run(command: string, args: readonly string[], options: RunOptions): Promise<string> {
  const limits = { timeout: RUN_TIMEOUT_MS, maxBuffer: MAX_OUTPUT_BYTES };
  const env = { ...environment(), ...options.env };
  return new Promise((resolve, reject) => {
    execFile(command, args, { ...limits, cwd: options.cwd, env }, (error, stdout, stderr) => {
      if (error === null) resolve(stdout);
      else reject(new Error(`${command} ${args.join(' ')}: ${error.message}\n${stdout}${stderr}`));
    }).stdin?.end();
  });
}

export interface RunOptions {
  readonly cwd: string;
  readonly env?: Readonly<Record<string, string>>;
}

/** Ours without what `npm run` sets, which would lead a second npm to our own folder. */
function environment(): NodeJS.ProcessEnv {
  const inherited = Object.entries(process.env).filter(
    ([name]) => !/^npm_(?:config_(?:local|global)_prefix|lifecycle_|package_|command$|execpath$)/.test(name),
  );
  return Object.fromEntries(inherited);
}

export interface PackedLibrary {
  /** The file that `npm pack` has written. */
  readonly tarball: string;
  /** The folder in which it was packed: `nbd` of a clone. */
  readonly source: string;
  /** The unpacked file. */
  readonly unpacked: string;
  /** What is in it, as paths from `unpacked`. */
  readonly files: readonly string[];
}

/** Packs in `directory`: the test's own build in nbd/dist is in use, and may be older than the sources. */
export async function packLibrary(directory: string): Promise<PackedLibrary> {
  const clone = path.join(directory, 'clone');
  const source = path.join(clone, 'nbd');
  const isTracked = (file: string): boolean =>
    !/^(?:dist|test|node_modules)(?:\/|$)/.test(path.relative(LIBRARY, file));
  fs.cpSync(LIBRARY, source, { recursive: true, filter: isTracked });
  fs.copyFileSync(path.join(ROOT, 'tsconfig.base.json'), path.join(clone, 'tsconfig.base.json'));
  fs.symlinkSync(MODULES, path.join(clone, 'node_modules'));
  await run('npm', ['pack', '--pack-destination', directory], { cwd: source });
  const { name, version } = readManifest(source);
  const tarball = path.join(directory, `${name}-${version}.tgz`);
  const unpacked = path.join(directory, 'package');
  await run('tar', ['-x', '-z', '-f', tarball, '-C', directory], { cwd: directory });
  const files = fs
    .readdirSync(unpacked, { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .map((entry) => path.relative(unpacked, path.join(entry.parentPath, entry.name)));
  return { tarball, source, unpacked, files };
}

export interface Manifest {
  readonly name: string;
  readonly version: string;
  readonly exports: Readonly<Record<string, Readonly<Record<string, string>>>>;
}

export function readManifest(directory: string): Manifest {
  return JSON.parse(fs.readFileSync(path.join(directory, 'package.json'), 'utf8')) as Manifest;
}

/**
 * A new project in `directory` in which npm has installed the packed library. Its only dependency, Node's declarations, comes
 * from the packages of this repository: no registry is asked.
 */
export async function installLibrary(directory: string, { tarball }: PackedLibrary): Promise<void> {
  const types = path.join(directory, 'types');
  fs.mkdirSync(types, { recursive: true });
  const quiet = ['--offline', '--no-audit', '--no-fund', '--no-package-lock', '--loglevel=error'];
  const cache = ['--cache', path.join(directory, 'cache')];
  const pack = ['pack', '--ignore-scripts', '--json', '--pack-destination', types, ...cache];
  const packages = ['@types/node', 'undici-types'].map(ownModule);
  const written = JSON.parse(await run('npm', [...pack, ...packages], { cwd: types })) as { filename: string }[];
  const files = written.map(({ filename }) => path.join(types, filename));
  fs.writeFileSync(path.join(directory, 'package.json'), '{ "private": true }');
  await run('npm', ['install', ...quiet, ...cache, '--prefix', directory, tarball, ...files], { cwd: directory });
}

/** Another project in `directory`, with the packages of `installed`, and a package.json of its own. */
export function copyProject(installed: string, directory: string, manifest: object = {}): string {
  fs.cpSync(path.join(installed, 'node_modules'), path.join(directory, 'node_modules'), { recursive: true });
  fs.writeFileSync(path.join(directory, 'package.json'), JSON.stringify({ private: true, ...manifest }));
  return directory;
}

/** A package that this repository has installed. */
export function ownModule(name: string): string {
  return path.join(MODULES, name);
}

/**
 * Starts program.ts in one of its forms: `command` with the path of a socket added. Waits until it is ready, lets `use` do its
 * work, and ends it. Errors: it fails, or does not end by itself.
 */
export async function whileServing(
  [command, ...args]: readonly [string, ...string[]],
  options: RunOptions,
  use: (uri: string) => Promise<void>,
): Promise<void> {
  const socket = path.join(options.cwd, 'ram.sock');
  const child = spawn(command, [...args, socket], {
    cwd: options.cwd,
    env: { ...environment(), ...options.env },
    stdio: ['pipe', 'pipe', 'pipe'],
  });
  const deadline = setTimeout(() => child.kill('SIGKILL'), RUN_TIMEOUT_MS);
  let said = '';
  const ended = new Promise<number | null>((resolve, reject) => {
    child.once('error', reject);
    child.once('close', (code) => resolve(code));
  });
  const ready = new Promise<boolean>((resolve) => {
    child.stderr.on('data', (text: Buffer) => (said += text.toString()));
    child.stdout.on('data', (text: Buffer) => {
      said += text.toString();
      if (said.includes('ready')) resolve(true);
    });
  });
  try {
    if ((await Promise.race([ready, ended])) === true) await use(`nbd+unix:///ram?socket=${socket}`);
    child.stdin.end();
    const code = await ended;
    if (code !== 0) throw new Error(`${[command, ...args].join(' ')}: exit ${code ?? 'by a signal'}\n${said}`);
  } finally {
    clearTimeout(deadline);
    child.kill('SIGKILL');
  }
}
