/** Reload of TLS keys and access rules: the daemon continues with any file in their place, and the caller gets the result. */
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { NbdClient } from 'nbd-server-ts';
import { cli, cliJson, startDaemon, temporaryDirectory, waitUntil, type Daemon } from '../harness/daemon.js';

const KEY = 'ab'.repeat(32);
const GOOD = 'allow disk from any\n';

let daemon: Daemon;
let access: string;
let psk: string;

const reload = (...args: string[]): ReturnType<typeof cli> => cli(['reload', ...args], { store: daemon.store });

async function mayOpen(name: string): Promise<boolean> {
  const client = await NbdClient.connect({ path: daemon.socket });
  try {
    await client.go(name);
    return true;
  } catch {
    return false;
  } finally {
    client.destroy();
  }
}

/** Put a file of this kind in place of `file`. */
const IN_PLACE: readonly (readonly [string, (file: string) => void, RegExp])[] = [
  ['a fifo', (file) => execFileSync('mkfifo', [file]), /cannot be read: it is a fifo, not a file/],
  ['a directory', (file) => fs.mkdirSync(file), /cannot be read: it is a directory, not a file/],
  ['a device', (file) => fs.symlinkSync('/dev/zero', file), /cannot be read: it is a device, not a file/],
  ['nothing', () => undefined, /does not exist/],
  [
    'a huge file',
    (file) => {
      fs.writeFileSync(file, '');
      fs.truncateSync(file, 2 ** 40);
    },
    /it has 1099511627776 bytes; at most/,
  ],
  [
    'a file that is not UTF-8',
    (file) => fs.writeFileSync(file, Buffer.from('# one\nallow disk from psk:\xe9 any\n', 'latin1')),
    /cannot be read: line 2 is not UTF-8/,
  ],
  ['an endless file', (file) => fs.symlinkSync('/proc/self/pagemap', file), /it has more than \d+ bytes; at most/],
  ['a file of one long word', (file) => fs.writeFileSync(file, 'x'.repeat(2 ** 22)), /:1: /],
];

beforeAll(async () => {
  const directory = temporaryDirectory();
  access = path.join(directory, 'access');
  psk = path.join(directory, 'psk');
  fs.writeFileSync(access, GOOD);
  fs.writeFileSync(psk, `alice:${KEY}\n`, { mode: 0o600 });
  daemon = await startDaemon({
    args: ['--create', 'disk:1M', '--create', 'other:1M', '--access', access, '--tls', 'on', '--tls-psk', psk],
  });
});

afterAll(async () => {
  expect((await daemon.stop()).code, daemon.log()).toBe(0);
});

function restore(): void {
  for (const [file, text] of [
    [access, GOOD],
    [psk, `alice:${KEY}\n`],
  ] as const) {
    fs.rmSync(file, { recursive: true, force: true });
    fs.writeFileSync(file, text, { mode: 0o600 });
  }
}

test('the answer to a reload has the settings in force, and comes when they are', async () => {
  expect(await mayOpen('other')).toBe(false);
  fs.writeFileSync(access, `${GOOD}allow other from any\n`);
  expect(await reload()).toMatchObject({ code: 0, stdout: 'reloaded: TLS keys, 2 access rules\n', stderr: '' });
  expect(await mayOpen('other')).toBe(true);
  restore();
  expect(await cliJson(['reload'], { store: daemon.store })).toEqual({
    reloaded: ['TLS keys', 'access rules'],
    rules: 1,
    failures: [],
    warnings: [],
  });
  expect(await mayOpen('other')).toBe(false);
});

describe.each(IN_PLACE)('%s in place of a file', (_, put, says) => {
  test.each(['access', 'psk'] as const)(
    '(%s) is an error for the caller, and the old settings stay in force',
    async (which) => {
      const file = which === 'access' ? access : psk;
      fs.rmSync(file);
      put(file);
      const result = await reload();
      restore();
      expect(result).toMatchObject({ code: 1, stdout: '' });
      expect(result.stderr).toMatch(/^sheepgate: not reloaded, the old settings stay in force: .*\n$/);
      expect(result.stderr).toMatch(says);
      expect(result.stderr).toContain(file);
      expect(result.stderr.length).toBeLessThan(2_000);
      expect(result.stderr).toContain(`; reloaded: ${which === 'access' ? 'TLS keys' : '1 access rule'}`);
      expect(await mayOpen('disk')).toBe(true);
    },
  );

  test('ends a start with that error', async () => {
    const file = path.join(temporaryDirectory(), 'access');
    put(file);
    const result = await cli(['serve', '--access', file, '--listen', `unix:${file}.sock`], {
      store: path.join(temporaryDirectory(), 's'),
      timeoutMs: 30_000,
    });
    expect(result.code).toBe(1);
    expect(result.stderr).toMatch(says);
  });
});

test('a file that every user may write causes a warning, in the answer and in the log', async () => {
  fs.chmodSync(access, 0o666);
  fs.chmodSync(psk, 0o602);
  const result = await reload();
  restore();
  expect(result.code).toBe(0);
  expect(result.stderr).toContain(`note: ${access} can be written by every user of this machine`);
  expect(result.stderr).toContain(`note: ${psk} can be`);
  await daemon.logged(`${access} can be written by every user`);
});

test('SIGHUP with a fifo in place of the access file blocks nothing', async () => {
  fs.rmSync(access);
  execFileSync('mkfifo', [access]);
  daemon.child.kill('SIGHUP');
  await waitUntil(() => /access rules not reloaded/.test(daemon.log()), 'it is logged');
  expect(await mayOpen('disk')).toBe(true);
  restore();
});

test('many reloads at once are done one after the other', async () => {
  const results = await Promise.all(Array.from({ length: 4 }, () => reload()));
  for (const { code } of results) expect(code).toBe(0);
});

test('a reload without a daemon is an error, and one without files to read says so', async () => {
  const store = path.join(temporaryDirectory(), 's');
  const none = await cli(['reload'], { store });
  expect(none.code).toBe(1);
  expect(none.stderr).toMatch(/^sheepgate: no daemon: there is no control socket/);
  const plain = await startDaemon();
  expect((await cli(['reload'], { store: plain.store })).stdout).toMatch(/^nothing to reload/);
  await plain.stop();
});
