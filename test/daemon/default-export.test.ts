/** `serve --default NAME`: the export of real clients that name none, and the answer to clients that may not open it. */
import { once } from 'node:events';
import fs from 'node:fs';
import net from 'node:net';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { NbdClient } from 'nbd-server-ts';
import { BIN, cli, needs, ok, run, startDaemon, temporaryDirectory, type Daemon } from '../harness/daemon.js';
import { oneLineOf, patterned } from '../cli/both-ways.js';

const MIB = 2 ** 20;
const unnamed = (daemon: Daemon): string => `nbd+unix:///?socket=${daemon.socket}`;

/** NBD_OPT_EXPORT_NAME with the empty name: size and flags, or nothing if the server hangs up. */
async function askedTheOldWay(daemon: Daemon): Promise<Buffer> {
  const socket = net.connect(daemon.socket);
  const received: Buffer[] = [];
  socket.on('data', (chunk) => received.push(chunk));
  const length = (): number => received.reduce((sum, { length: bytes }) => sum + bytes, 0);
  while (length() < 18) await once(socket, 'data');
  // Client flags (fixed newstyle, no zeroes), "IHAVEOPT", NBD_OPT_EXPORT_NAME, no bytes of name.
  socket.write(Buffer.from('00000003' + '49484156454f5054' + '00000001' + '00000000', 'hex'));
  const closed = once(socket, 'close').then(() => true);
  while (length() < 28) if ((await Promise.race([once(socket, 'data'), closed])) === true) break;
  socket.destroy();
  return Buffer.concat(received).subarray(18);
}

async function refusal(daemon: Daemon, name: string): Promise<string> {
  const client = await NbdClient.connect({ path: daemon.socket });
  const error = await client.go(name).then(
    () => undefined,
    (failure: unknown) => failure,
  );
  await client.disconnect().catch(() => undefined);
  expect(error, name).toBeInstanceOf(Error);
  return (error as Error).message;
}

describe('with --default', () => {
  let daemon: Daemon;
  beforeAll(async () => {
    daemon = await startDaemon({ args: ['--create', 'a:1M', '--create', 'disk:8M', '--default', 'disk'] });
  });
  afterAll(() => daemon.stop());

  needs(
    'qemu-img',
    'nbdinfo',
    'nbdcopy',
  )('qemu-img, nbdinfo and nbdcopy get it when they name no export', async () => {
    expect(await ok('qemu-img', ['info', `nbd:unix:${daemon.socket}`])).toMatch(/virtual size: 8 MiB/);
    expect(await ok('nbdinfo', ['--size', unnamed(daemon)])).toBe(`${8 * MIB}\n`);
    const image = path.join(temporaryDirectory(), 'image');
    fs.writeFileSync(image, patterned(8 * MIB, 1));
    await ok('nbdcopy', [image, unnamed(daemon)]);
    await ok('nbdcopy', [daemon.uri('disk'), `${image}.copy`]);
    expect(fs.readFileSync(`${image}.copy`).equals(fs.readFileSync(image))).toBe(true);
  });

  test('NBD_OPT_EXPORT_NAME opens it, too, and it is listed once, under its own name', async () => {
    const reply = await askedTheOldWay(daemon);
    expect(Number(reply.readBigUInt64BE(0))).toBe(8 * MIB);
    const client = await NbdClient.connect({ path: daemon.socket });
    expect((await client.list()).map(({ name }) => name).sort()).toEqual(['a', 'disk']);
    await client.disconnect();
  });

  test('our own commands do not accept an empty name', async () => {
    const out = path.join(temporaryDirectory(), 'out');
    expect(oneLineOf(await cli(['export', '', out], { store: daemon.store }), 1, 'export')).toMatch(
      /must not be empty/,
    );
  });
});

needs('nbdcopy')('nbdcopy starts the server itself, by way of socket activation', async () => {
  const directory = temporaryDirectory();
  const store = path.join(directory, 'store');
  const image = path.join(directory, 'image');
  fs.writeFileSync(image, patterned(2 * MIB, 2));
  expect((await cli(['import', image, 'disk'], { store })).code).toBe(0);
  const server = [process.execPath, BIN, 'serve', '--store', store, '--default', 'disk'];
  await ok('nbdcopy', ['--', '[', ...server, ']', `${image}.copy`]);
  expect(fs.readFileSync(`${image}.copy`).equals(fs.readFileSync(image))).toBe(true);
});

test('without --default the refusal says how to name an export, and names none', async () => {
  const daemon = await startDaemon({ args: ['--create', 'hidden:1M'] });
  const words = await refusal(daemon, '');
  expect(words).toMatch(/no export was named.*nbd-client -N NAME.*\(its option "default"\)/);
  expect(words).not.toContain('hidden');
  expect(await askedTheOldWay(daemon)).toHaveLength(0);
  await daemon.stop();
});

describe('access rules', () => {
  const withRules = (rules: string): Promise<Daemon> => {
    const access = path.join(temporaryDirectory(), 'access');
    fs.writeFileSync(access, rules);
    return startDaemon({ args: ['--create', 'disk:1M', '--default', 'disk', '--access', access] });
  };

  test('are those of the default export', async () => {
    const daemon = await withRules('allow disk ro from any\n');
    const client = await NbdClient.connect({ path: daemon.socket });
    await client.go('');
    await expect(client.write(0, Buffer.alloc(512))).rejects.toThrow();
    await client.disconnect();
    await daemon.stop();
  });

  test('that refuse it do not reveal its name', async () => {
    const daemon = await withRules('allow other from any\n');
    const words = await refusal(daemon, '');
    expect(words).toMatch(/you are not allowed to open the default export/);
    expect(words).not.toContain('disk');
    expect(await askedTheOldWay(daemon)).toHaveLength(0);
    await daemon.stop();
  });
});

test('a disk that does not exist yet is a warning at the start, and is served once it exists', async () => {
  const daemon = await startDaemon({ args: ['--default', 'later'] });
  await daemon.logged(/"level":40.*the default export cannot be opened.*no VDI named \\"later\\"/);
  expect(await refusal(daemon, '')).toMatch(/there is no such VDI: ""/);
  expect((await cli(['vdi', 'create', 'later', '1M'], { store: daemon.store })).code).toBe(0);
  const client = await NbdClient.connect({ path: daemon.socket });
  await client.go('');
  await client.disconnect();
  await daemon.stop();
});

needs('nbdinfo')('it may be a snapshot, also a temporary one', async () => {
  const daemon = await startDaemon({ args: ['--create', 'disk:1M', '--default', 'disk@now'] });
  expect(daemon.log()).not.toMatch(/"level":40/);
  expect((await run('nbdinfo', ['--is', 'read-only', unnamed(daemon)])).code).toBe(0);
  await daemon.stop();
});
