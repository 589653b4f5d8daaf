/** On a Node that is too old, the error says so, and is not a syntax error. No old Node is needed: the version is faked. */
import fs from 'node:fs';
import path from 'node:path';
import { Linter } from 'eslint';
import { expect, test } from 'vitest';
import { BIN, run, temporaryDirectory } from '../harness/daemon.js';
import { oneLineOf } from './both-ways.js';

const ROOT = path.resolve(import.meta.dirname, '../..');
const preload = path.join(temporaryDirectory(), 'version.cjs');
fs.writeFileSync(preload, "Object.defineProperty(process, 'version', { value: process.env.MADE_UP_VERSION });\n");

const sheepgateOn = (version: string): ReturnType<typeof run> =>
  run(process.execPath, ['--require', preload, BIN, '--version'], { env: { MADE_UP_VERSION: version } });

test('the launcher is in the syntax of ECMAScript 5, which every Node parses', () => {
  const text = fs.readFileSync(BIN, 'utf8');
  const config = { languageOptions: { ecmaVersion: 5, sourceType: 'commonjs' } } as const;
  expect(new Linter().verify(text, config)).toEqual([]);
  // The check above does find newer syntax.
  expect(new Linter().verify("f?.('', );", config)[0]?.fatal).toBe(true);
});

test('on a Node that is too old, one line names the version that is needed, and the exit code is 1', async () => {
  for (const version of ['v0.10.48', 'v8.17.0', 'v18.20.8', 'v20.9.0', 'v20.18.3']) {
    const line = oneLineOf(await sheepgateOn(version), 1, version);
    expect(line).toContain(`this is Node.js ${version} (${process.execPath})`);
    expect(line).toMatch(/needs Node\.js 20\.19 or later: install one \(https:/);
  }
});

test('on a Node that is new enough, the program starts', async () => {
  for (const version of ['v20.19.0', 'v22.0.0', 'v24.1.0-nightly', 'v100.0.0']) {
    expect((await sheepgateOn(version)).stdout, version).toMatch(/^\d+\.\d+\.\d+\n$/);
  }
});

test('both packages declare the same version for npm', () => {
  const of = (file: string): unknown =>
    (JSON.parse(fs.readFileSync(path.join(ROOT, file), 'utf8')) as { engines?: unknown }).engines;
  expect(of('package.json')).toEqual({ node: '>=20.19' });
  expect(of('nbd/package.json')).toEqual(of('package.json'));
});
