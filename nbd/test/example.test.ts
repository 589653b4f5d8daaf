/** The first example of the README runs unchanged, and the README shows its exact text. */

import { spawn } from 'node:child_process';
import fs from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect, onTestFinished, test } from 'vitest';
import { NbdClient } from '../src/index.js';
import { temporaryDirectory } from './test-server.js';

const EXAMPLE = fileURLToPath(new URL('../examples/ram-disk.mjs', import.meta.url));
const README = fileURLToPath(new URL('../README.md', import.meta.url));

test('the RAM disk keeps written data, and ends on a signal', async () => {
  const path = join(await temporaryDirectory(), 'ram.sock');
  const child = spawn(process.execPath, [EXAMPLE, path, '2'], { stdio: ['ignore', 'pipe', 'inherit'] });
  onTestFinished(() => void child.kill('SIGKILL'));
  await new Promise((resolve, reject) => {
    child.stdout.once('data', resolve);
    child.once('exit', () => reject(new Error('the example ended')));
  });
  const client = await NbdClient.connect({ path });
  expect(await client.go('ram')).toMatchObject({ size: 2 * 1024 * 1024, description: '2 MiB of memory' });
  await client.write(12345, Buffer.from('kept'));
  await client.zero(12347, 1);
  expect((await client.read(12345, 4)).toString()).toBe('ke\0t');
  await client.disconnect();
  const ended = new Promise((resolve) => child.once('exit', (code) => resolve(code)));
  child.kill('SIGTERM');
  expect(await ended).toBe(0);
});

test('the README shows the exact text of the example', () => {
  const shown = /```js\n([^]*?)```/.exec(fs.readFileSync(README, 'utf8'))?.[1];
  expect(shown).toBe(fs.readFileSync(EXAMPLE, 'utf8'));
});
