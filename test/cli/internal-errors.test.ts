/** Faults of the program itself: their messages, and that none looks like success. A preload injects the faults. */
import fs from 'node:fs';
import path from 'node:path';
import { expect, test } from 'vitest';
import { BIN, run, temporaryDirectory, type RunResult } from '../harness/daemon.js';
import { oneLineOf } from './both-ways.js';

const directory = temporaryDirectory();
const store = path.join(directory, 'store');

function sheepgateWith(preload: string, ...args: string[]): Promise<RunResult> {
  const file = path.join(directory, 'preload.cjs');
  fs.writeFileSync(file, preload);
  return run(process.execPath, ['--require', file, BIN, ...args, '--store', store]);
}

test('the stack trace of an internal error names the lines of the sources', async () => {
  const preload = `
    const fs = require('node:fs');
    const { statSync } = fs;
    fs.statSync = (file, ...rest) => {
      if (String(file).startsWith(${JSON.stringify(store)})) throw new TypeError('made up');
      return statSync(file, ...rest);
    };`;
  const { code, stderr } = await sheepgateWith(preload, 'vdi', 'list');
  expect(code).toBe(1);
  expect(stderr).toMatch(/^sheepgate: internal error, please report it: TypeError: made up\n/);
  const places = [...stderr.matchAll(/(\S+\/src\/[\w/-]+\.ts):(\d+):\d+/g)];
  expect(places.length).toBeGreaterThan(2);
  for (const [, file = '', line] of places) {
    const text = fs.readFileSync(file.replace(/^\(/, ''), 'utf8').split('\n')[Number(line) - 1];
    expect(text, `${file}:${line}`).toMatch(/\w\(/);
  }
  expect(stderr).not.toContain('dist/bundle');
});

test('a command that stops before it is done fails with an error', async () => {
  // As if a callback got lost: nothing keeps the process alive.
  const preload = `require('node:fs').read = () => undefined;`;
  const image = path.join(directory, 'image');
  fs.writeFileSync(image, Buffer.alloc(65_536, 1));
  const line = oneLineOfFault(await sheepgateWith(preload, 'import', image, 'vm'));
  expect(line).toContain('the command stopped before it was done');
});

test('a missing native library is an error in one line, with the way out', async () => {
  for (const [what, preload] of [
    [
      'koffi',
      `require('node:module')._load = fault('koffi', new Error('Cannot find the native Koffi module; did you bundle it correctly?'))`,
    ],
    [
      'lmdb',
      `require('node:module')._load = fault('lmdb', new Error('No native build was found for platform=linux arch=x64\\n  attempted'))`,
    ],
    [
      'lmdb',
      `require('node:module')._load = fault('lmdb', Object.assign(new Error('x.node: file too short'), { code: 'ERR_DLOPEN_FAILED' }))`,
    ],
  ] as const) {
    const fault = `const { _load } = require('node:module');
      const fault = (name, error) => function (...args) { if (args[0] === name) throw error; return _load.apply(this, args); };`;
    const line = oneLineOf(await sheepgateWith(`${fault}\n${preload};`, 'vdi', 'list'), 1, what);
    expect(line, what).toMatch(
      /a native library cannot be loaded \(.+\); .*install it again with npm, without --omit=optional/,
    );
  }
});

test('a missing file of the program, as after an upgrade, is an error in one line, with the way out', async () => {
  const preload = `const module_ = require('node:module');
    const { _load } = module_;
    module_._load = function (...args) { return _load.call(this, args[0].replace(/^(\\.\\/vdi)-.*/, '$1-gone.js'), ...args.slice(1)); };`;
  const line = oneLineOf(await sheepgateWith(preload, 'vdi', 'list'), 1, 'gone');
  expect(line).toMatch(
    /a part of this program is missing \(Cannot find module '.\/vdi-gone.js'\); .*run the command again/,
  );
});

function oneLineOfFault({ code, stderr }: RunResult): string {
  expect(code, stderr).toBe(1);
  expect(stderr.trimEnd().split('\n'), stderr).toHaveLength(1);
  return stderr;
}
