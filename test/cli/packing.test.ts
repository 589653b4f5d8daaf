/**
 * The package of `npm pack`, installed as on a machine without the sources: its files, the packages that npm fetches for it, and
 * that it serves a disk. The registry runs on loopback and has the packages of node_modules/; no other registry can be reached.
 */
import fs from 'node:fs';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { requireBuild } from '../harness/build.js';
import {
  cleanEnvironment,
  ended,
  haveCommand,
  ok,
  run,
  temporaryDirectory,
  waitUntil,
  spawn,
} from '../harness/daemon.js';
import { startRegistry, type Registry } from '../harness/registry.js';
import { oneLineOf } from './both-ways.js';

const ROOT = path.resolve(import.meta.dirname, '../..');
/** Compressed, without the native libraries, which are separate packages. */
const MAX_PACKED_BYTES = 1_000_000;
const PACKED =
  /^(?:bin\/|dist\/bundle\/|docs\/|examples\/|nbd\/docs\/|(?:bench|nbd)\/\w+\.md$|src\/store\/local\/FORMAT\.md$|\w+\.md$|LICENSE$|package\.json$)/;
const BUILD_LEFTOVER = /\.ts$|\.tsbuildinfo$|(?:^|\/)test\//;

/** Of `npm pack --json`. */
interface Packed {
  readonly filename: string;
}

const missing = ['npm', 'tar', 'gzip', 'qemu-io'].filter((program) => !haveCommand(program));
if (missing.length > 0) console.log(`skipped: what is packed cannot be tried without ${missing.join(', ')}`);

describe.skipIf(missing.length > 0)('the packed program', () => {
  const directory = temporaryDirectory();
  const unpacked = path.join(directory, 'unpacked');
  let registry: Registry;
  let tarball: string;
  let files: string[];

  const npm = (...args: string[]): Promise<string> =>
    ok('npm', args, {
      cwd: directory,
      env: {
        HOME: directory,
        npm_config_cache: path.join(directory, 'cache'),
        npm_config_userconfig: path.join(directory, 'npmrc'),
        npm_config_registry: registry.url,
        npm_config_audit: 'false',
        npm_config_fund: 'false',
        npm_config_update_notifier: 'false',
        npm_config_fetch_retries: '0',
      },
    });
  const prefix = (name: string): string => path.join(directory, 'a prefix', name);
  const install = (name: string, ...args: string[]): Promise<string> =>
    npm('install', '--global', '--prefix', prefix(name), ...args, tarball);
  const program = (name: string): string => path.join(prefix(name), 'bin/sheepgate');
  const packagesOf = (name: string): string => path.join(prefix(name), 'lib/node_modules/sheepgate/node_modules');

  beforeAll(async () => {
    requireBuild();
    registry = await startRegistry();
    const [packed] = JSON.parse(await npm('pack', ROOT, '--json', '--ignore-scripts')) as [Packed];
    tarball = path.join(directory, packed.filename);
    fs.mkdirSync(unpacked);
    await ok('tar', ['-x', '-z', '-f', tarball, '--strip-components', '1', '-C', unpacked]);
    files = fs
      .readdirSync(unpacked, { recursive: true, withFileTypes: true })
      .filter((entry) => entry.isFile())
      .map((entry) => path.relative(unpacked, path.join(entry.parentPath, entry.name)));
  });
  afterAll(() => registry.close());

  test('holds program, documents and examples, and nothing else of the source tree', () => {
    expect(files.filter((file) => !PACKED.test(file) || BUILD_LEFTOVER.test(file))).toEqual([]);
    const wanted = [
      'README.md',
      'CHANGELOG.md',
      'LICENSE',
      'SECURITY.md',
      'docs/backup.md',
      'dist/bundle/LICENSES.txt',
    ];
    expect(files).toEqual(expect.arrayContaining([...wanted, 'examples/systemd/sheepgate.service']));
    expect(fs.statSync(tarball).size).toBeLessThan(MAX_PACKED_BYTES);
  });

  test('has every document that its documents link to', () => {
    const dead = files
      .filter((file) => file.endsWith('.md'))
      .flatMap((file) => {
        const text = fs.readFileSync(path.join(unpacked, file), 'utf8');
        const links = [...text.matchAll(/\]\((?!\w+:)([^)#\s]+)/g)].map(([, link = '']) => link);
        const isThere = (link: string): boolean => fs.existsSync(path.join(unpacked, path.dirname(file), link));
        return links.filter((link) => !isThere(link)).map((link) => `${file}: ${link}`);
      });
    expect(dead).toEqual([]);
  });

  test('is installed with only its native packages, in the tested versions, and without their scripts', async () => {
    await install('plain', '--ignore-scripts');
    const { dependencies } = JSON.parse(fs.readFileSync(path.join(unpacked, 'package.json'), 'utf8')) as {
      dependencies: Record<string, string>;
    };
    expect(Object.keys(dependencies)).toEqual(['koffi', 'lmdb']);
    for (const [name, version] of Object.entries(dependencies)) {
      const tested = JSON.parse(fs.readFileSync(path.join(ROOT, 'node_modules', name, 'package.json'), 'utf8')) as {
        version: string;
      };
      expect(version, name).toBe(tested.version);
    }
    const asked = registry.asked();
    expect(asked).toEqual(expect.arrayContaining(['koffi', 'lmdb']));
    const bundled = ['nbd-server-ts', 'commander', 'pino', 'buffer-layout'];
    expect(asked.filter((name) => bundled.includes(name))).toEqual([]);
    expect(fs.readdirSync(packagesOf('plain'))).not.toEqual(expect.arrayContaining(bundled));
  }, 120_000);

  test('serves a disk that qemu-io writes and reads', async () => {
    const version = (await ok(program('plain'), ['--version'], { cwd: directory })).trim();
    expect(path.basename(tarball)).toBe(`sheepgate-${version}.tgz`);
    const socket = path.join(directory, 'nbd.sock');
    const args = [
      'serve',
      '--create',
      'disk:16M',
      '--store',
      path.join(directory, 'store'),
      '--listen',
      `unix:${socket}`,
    ];
    const daemon = spawn(program('plain'), args, { env: cleanEnvironment(), stdio: ['ignore', 'pipe', 'pipe'] });
    let said = '';
    for (const stream of [daemon.stdout, daemon.stderr]) stream.on('data', (text: Buffer) => (said += text.toString()));
    try {
      await waitUntil(() => said.includes('Ctrl-C') || daemon.exitCode !== null, 'the daemon is ready');
      const uri = `nbd+unix:///disk?socket=${socket}`;
      const work = ['-c', 'write -P 7 1M 1M', '-c', 'read -P 7 1M 1M', '-c', 'read -P 0 2M 1M'];
      expect(await ok('qemu-io', ['-f', 'raw', ...work, uri]), said).not.toMatch(/failed/);
      const list = await ok(program('plain'), ['vdi', 'list', '--store', path.join(directory, 'store')]);
      expect(list).toMatch(/^disk .* 1 MiB|^disk .* 4 MiB/m);
    } finally {
      daemon.kill('SIGTERM');
    }
    expect(await ended(daemon), said).toEqual({ code: 0, signal: null });
  });

  test('reports missing native libraries in one line', async () => {
    const list = (): ReturnType<typeof run> =>
      run(program('plain'), ['vdi', 'list', '--store', path.join(directory, 'store')]);
    for (const scope of ['@lmdb', '@koromix']) {
      fs.rmSync(path.join(packagesOf('plain'), scope), { recursive: true });
      expect(oneLineOf(await list(), 1, scope)).toMatch(/a native library cannot be loaded .*without --omit=optional/);
    }
  });

  test('works as well if npm runs install scripts', async () => {
    await install('with-scripts', '--offline');
    const store = path.join(directory, 'store');
    expect(await ok(program('with-scripts'), ['vdi', 'list', '--store', store])).toMatch(/^disk /m);
  }, 120_000);
});
