/** What a command loads: most of the time that a short one takes is spent on that, and thousands are run a day. */
import fs from 'node:fs';
import path from 'node:path';
import { expect, test } from 'vitest';
import { BIN, run, startDaemon, temporaryDirectory } from '../harness/daemon.js';
import { storeWith } from './both-ways.js';

const LIST_MODULES = path.resolve(import.meta.dirname, 'list-modules.mjs');

/** The modules that `sheepgate ARGS` loads on a store, without what is before dist/ or node_modules/. */
async function loadedBy(store: string, code: number, ...args: string[]): Promise<string[]> {
  const modules = path.join(temporaryDirectory(), 'modules');
  const env = { SHEEPGATE_STORE: store, MODULES: modules };
  const result = await run(process.execPath, ['--import', LIST_MODULES, BIN, ...args], { env });
  expect(result.code, result.stderr).toBe(code);
  const urls = fs.readFileSync(modules, 'utf8').trim().split('\n');
  return urls.map((url) => url.replace(/^.*\/(?=(nbd\/)?dist\/|node_modules\/)/, ''));
}

const OTHER_COMMANDS = /^dist\/(cli\/(serve|backup|import|export|migrat.*|restore|vdi-create)|backup\/.*)\.js$/;
const CLUSTER = /^dist\/store\/sheep\/(?!cluster-address|protocol)|buffer-layout/;
// Not koffi, which a command needs to ask the kernel who the daemon is: 11 ms.
const STORE = /^dist\/store\/local\/local-store|node_modules\/lmdb\//;
const SERVER = /^nbd\/dist\/(server|connection|transmission|index)\.js|node_modules\/pino\//;

test('a command loads neither the other commands, nor the kind of store that it does not open, nor the server', async () => {
  const store = path.join(temporaryDirectory(), 'store');
  const target = storeWith(store, undefined);
  await target.ok('vdi', 'create', 'vm', '1M');
  const none = (loaded: readonly string[], ...kinds: RegExp[]): void => {
    for (const kind of kinds) expect(loaded.filter((module) => kind.test(module))).toEqual([]);
  };

  none(await loadedBy(store, 2, 'vdi', 'list', '--nope'), OTHER_COMMANDS, CLUSTER, STORE, SERVER);
  const directly = await loadedBy(store, 0, 'vdi', 'list');
  none(directly, OTHER_COMMANDS, CLUSTER, SERVER);
  expect(directly.some((module) => STORE.test(module))).toBe(true);

  const daemon = await startDaemon({ store });
  none(await loadedBy(store, 0, 'vdi', 'list'), OTHER_COMMANDS, CLUSTER, STORE, SERVER);
  // A backup may have to go on without the daemon: with this version of the program, whichever is installed then.
  const backup = await loadedBy(store, 0, 'backup', 'vm', '--to', path.join(temporaryDirectory(), 'to'));
  expect(backup).toEqual(expect.arrayContaining(['dist/store/local/local-store.js', 'dist/daemon/open-directly.js']));
  await daemon.stop();
});

test('the help lists all commands all the same, and a wrong name is told the right one', async () => {
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
