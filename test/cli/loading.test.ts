/** The modules that a command loads: loading takes most of the time of a short command, and thousands run per day. */
import fs from 'node:fs';
import path from 'node:path';
import { expect, test } from 'vitest';
import { BIN, run, startDaemon, temporaryDirectory } from '../harness/daemon.js';
import { storeWith } from './both-ways.js';

const LIST_MODULES = path.resolve(import.meta.dirname, 'list-modules.mjs');
const BUNDLE = path.resolve(import.meta.dirname, '../../dist/bundle');

/** Bytes of JavaScript that Node parses for `vdi list`, those of other packages not counted. */
const MAX_PARSED_BYTES = 595_000;

/**
 * The files of the program that `sheepgate ARGS` loads on a store, by the names that tools/bundle.mjs gives them, and the
 * packages beside it.
 */
async function loadedBy(store: string, code: number, ...args: string[]): Promise<{ names: string[]; bytes: number }> {
  const modules = path.join(temporaryDirectory(), 'modules');
  const env = { SHEEPGATE_STORE: store, MODULES: modules };
  const result = await run(process.execPath, ['--import', LIST_MODULES, BIN, ...args], { env });
  expect(result.code, result.stderr).toBe(code);
  const files = fs.readFileSync(modules, 'utf8').split('\n');
  const ours = files.filter((file) => file.startsWith(BUNDLE));
  const packages = files.flatMap((file) => /\/node_modules\/((?:@[^/]+\/)?[^/]+)\//.exec(file)?.[1] ?? []);
  const names = ours.map((file) => path.basename(file).replace(/(?:-[\w-]{8})?\.js$/, ''));
  const bytes = ours.reduce((sum, file) => sum + fs.statSync(file).size, 0);
  return { names: [...new Set([...names, ...packages])].filter((name) => name !== BUNDLER).sort(), bytes };
}

/** The bundler's own helper code: a separate file, or part of another one. */
const BUNDLER = 'rolldown-runtime';
/** Packages that koffi and lmdb load. */
const NATIVE = /^@|^(?:detect-libc|msgpackr|node-gyp-build-optional-packages|ordered-binary|weak-lru-cache)$/;

test('a command loads neither the other commands, nor the kind of store that it does not open, nor the server', async () => {
  const store = path.join(temporaryDirectory(), 'store');
  const target = storeWith(store, undefined);
  await target.ok('vdi', 'create', 'vm', '1M');
  const withoutNative = ({ names }: { names: readonly string[] }): string[] =>
    names.filter((name) => !NATIVE.test(name));

  expect((await loadedBy(store, 0, '--version')).names).toEqual(['sheepgate']);
  expect((await loadedBy(store, 2, 'vdi', 'list', '--nope')).names).toEqual(['sheepgate']);
  const directly = await loadedBy(store, 0, 'vdi', 'list');
  expect(withoutNative(directly)).toEqual(['koffi', 'lmdb', 'local-store', 'sheepgate', 'system', 'vdi']);
  expect(directly.bytes).toBeLessThan(MAX_PARSED_BYTES);

  const daemon = await startDaemon({ store });
  // koffi, for the credentials of the daemon (SO_PEERCRED).
  expect(withoutNative(await loadedBy(store, 0, 'vdi', 'list'))).toEqual(['koffi', 'remote', 'sheepgate']);
  // A backup may have to continue without the daemon, and with this version of the program, even if another one is installed then.
  const backup = await loadedBy(store, 0, 'backup', 'vm', '--to', path.join(temporaryDirectory(), 'to'));
  expect(backup.names).toEqual(expect.arrayContaining(['cluster', 'local-store', 'nbd', 'remote', 'vdi']));
  expect(backup.names).not.toContain('serve');
  await daemon.stop();
});

test('every file of the program is in strict mode, like its source modules', () => {
  const files = fs.readdirSync(BUNDLE).filter((file) => file.endsWith('.js'));
  expect(files).toContain('sheepgate.js');
  const lax = files.filter((file) => !/^["']use strict["'];/.test(fs.readFileSync(path.join(BUNDLE, file), 'utf8')));
  expect(lax).toEqual([]);
});

test('the help still lists all commands, and the error for a mistyped name suggests the right one', async () => {
  const store = path.join(temporaryDirectory(), 'store');
  const { run: runs } = storeWith(store, undefined);
  const commandsIn = (help: string): string[] =>
    [...help.replace(/^[\s\S]*Commands:/, '').matchAll(/^ {2}([a-z]+) /gm)].map(([, name]) => name as string);
  const all = [
    ...[
      'serve',
      'reload',
      'vdi',
      'client',
      'import',
      'export',
      'backup',
      'restore',
      'migrate',
      'store',
      'check',
      'cluster',
      'node',
    ],
    'help',
  ];
  expect(commandsIn((await runs(['--help'])).stdout).slice(0, all.length)).toEqual(all);
  const ofVdi = ['create', 'list', 'show', 'tree', 'delete', 'resize', 'snapshot', 'clone', 'rollback', 'lock', 'help'];
  for (const args of [
    ['vdi', '--help'],
    ['help', 'vdi'],
  ]) {
    expect(commandsIn((await runs(args)).stdout).slice(0, ofVdi.length), args.join(' ')).toEqual(ofVdi);
  }
  expect((await runs(['help', 'vdi'])).stdout).toMatch(/^Usage: sheepgate vdi /);
  expect((await runs(['bakup'])).stderr).toMatch(/unknown command 'bakup'.*Did you mean backup\?/);
});
