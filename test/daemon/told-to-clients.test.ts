/**
 * Error texts for clients: only about their own disk. Directories, files, nodes and commands of the server are in its log, and in
 * the errors of commands through the control socket.
 */
import fs from 'node:fs';
import net from 'node:net';
import path from 'node:path';
import { describe, expect, test } from 'vitest';
import { NbdClient } from 'nbd-server-ts';
import { ExportError, type Peer } from 'nbd-server-ts/block-device';
import { ExportsWithClientMessages, clientMessage } from '../../src/export/client-messages.js';
import { StoreError } from '../../src/store/store-error.js';
import { CatalogError } from '../../src/vdi/catalog-error.js';
import { oneLineOf } from '../cli/both-ways.js';
import { cli, startDaemon, temporaryDirectory, waitUntil, type Daemon } from '../harness/daemon.js';
import { StandIn } from '../sheep/stand-in.js';

const MIB = 2 ** 20;
/** Words that reveal the server's machine: paths, options, commands. */
const OF_THE_SERVER = /\/tmp\/|objects\/|meta\.mdb|sheepgate |'dog | --[a-z]|127\.0\.0\.1/;

/** A proxy to the daemon's NBD socket that keeps what the server sends. */
async function tapped(daemon: Daemon) {
  const sent: Buffer[] = [];
  const socket = path.join(temporaryDirectory(), 'tap.sock');
  const server = net.createServer((client) => {
    const upstream = net.connect(daemon.socket);
    for (const each of [client, upstream]) each.on('error', () => undefined);
    upstream.on('data', (data: Buffer) => sent.push(data));
    client.pipe(upstream).pipe(client);
  });
  await new Promise<void>((resolve) => server.listen(socket, resolve));
  return { connect: () => NbdClient.connect({ path: socket }), sent: () => Buffer.concat(sent).toString('latin1') };
}

/** The error text that a client gets when it requests an export. */
async function refusalOf(connect: () => Promise<NbdClient>, name: string): Promise<string> {
  const client = await connect();
  const error: unknown = await client.go(name).catch((thrown: unknown) => thrown);
  await client.disconnect().catch(() => undefined);
  expect(error, name).toBeInstanceOf(Error);
  return (error as Error).message;
}

test('a refusal speaks only of the export’s name; for our own commands it says where and what to do', async () => {
  const daemon = await startDaemon({ args: ['--create', 'disk:8M'] });
  expect((await cli(['vdi', 'snapshot', 'disk', 'only'], { store: daemon.store })).code).toBe(0);
  const half = cli(['import', '-', 'half', '--size', '8M'], { store: daemon.store, input: Buffer.alloc(MIB) });
  expect((await half).code).toBe(1);
  const { connect, sent } = await tapped(daemon);
  for (const [name, words] of [
    ['missing', /there is no such VDI: "missing"/],
    ['disk@none', /there is no such snapshot: "disk@none"/],
    ['disk/since=none', /there is no such snapshot: "disk\/since=none"/],
    ['@ffff', /there is no such VDI: "@ffff"/],
    ['@monday', /there must be a name before the @, or a hexadecimal ID/],
    ['disk/x', /"x" after the slash is not an option; there are since=TAG/],
    ['half', /it is unfinished.*: "half"/],
    ['', /no export was named/],
    ['missing@now', /there is no such VDI: "missing@now"/],
  ] as const) {
    expect(await refusalOf(connect, name), name).toMatch(words);
  }
  expect(sent()).toMatch(/there is no such VDI/);
  expect(sent()).not.toMatch(OF_THE_SERVER);

  const told = await cli(['export', 'missing', path.join(temporaryDirectory(), 'out')], { store: daemon.store });
  expect(oneLineOf(told, 1, 'export')).toContain(
    `no VDI named "missing" in ${daemon.store}; 'sheepgate vdi list' shows`,
  );
  await daemon.stop();
});

test('a request that the store fails has a plain error; the file is in the log, and in the errors of our own commands', async () => {
  const daemon = await startDaemon({ args: ['--create', 'disk:8M'] });
  const { connect, sent } = await tapped(daemon);
  const client = await connect();
  await client.go('disk');
  await client.write(0, Buffer.alloc(4096, 1));
  await client.flush();
  await client.disconnect();
  const objects = path.join(daemon.store, 'objects');
  const [object = ''] = fs
    .readdirSync(objects, { recursive: true, encoding: 'utf8' })
    .filter((name) => fs.statSync(path.join(objects, name)).isFile());
  await daemon.stop();
  fs.rmSync(path.join(objects, object));

  const again = await startDaemon({ store: daemon.store });
  const other = await tapped(again);
  const reader = await other.connect();
  await reader.go('disk');
  await expect(reader.read(0, 4096)).rejects.toThrow(/a part of the disk is damaged or missing on the server/);
  await reader.disconnect();
  for (const text of [sent(), other.sent()]) expect(text).not.toMatch(OF_THE_SERVER);
  await waitUntil(() => again.log().includes(object), 'the log names the file');
  const told = await cli(['export', 'disk', path.join(temporaryDirectory(), 'out')], { store: daemon.store });
  expect(oneLineOf(told, 1, 'export')).toContain(object);
  await again.stop();
});

test('of a cluster that does not answer, clients learn no addresses', async () => {
  const cluster = await new StandIn({ jitterMs: 0 }).start();
  const daemon = await startDaemon({
    cluster: cluster.address,
    args: ['--create', 'disk:8M', '--cluster-timeout', '1'],
  });
  const { connect, sent } = await tapped(daemon);
  const client = await connect();
  await client.go('disk');
  await client.write(0, Buffer.alloc(4096, 1));
  await cluster.stop();
  await expect(client.read(0, 4096)).rejects.toThrow(/the server's storage failed; the server's log has the cause/);
  expect(await refusalOf(connect, 'other')).toMatch(/the server's storage failed.*: "other"/);
  await client.disconnect().catch(() => undefined);
  expect(sent()).not.toMatch(OF_THE_SERVER);
  await daemon.logged(/a request failed/);
  await daemon.kill();
});

describe('error texts for clients', () => {
  test('follow from the code, unless the error has a text for clients: text that is not known to be harmless is left out', () => {
    const secret = '/var/lib/secret';
    for (const code of ['NO_STORE', 'NO_SPACE', 'IO', 'LOCKED', 'FORMAT', 'DAMAGED', 'PERMISSION', 'LIMIT'] as const) {
      expect(clientMessage(new StoreError(code, secret)), code).not.toContain(secret);
    }
    for (const code of ['CLOSED', 'SLOW', 'GONE', 'MOVED', 'READONLY', 'UNSUPPORTED', 'ADDRESS'] as const) {
      expect(clientMessage(new StoreError(code, secret)), code).not.toContain(secret);
    }
    for (const code of ['NO_VDI', 'NO_TAG', 'EXISTS', 'BUSY', 'UNFINISHED', 'READ_ONLY', 'IS_SNAPSHOT'] as const) {
      expect(clientMessage(new CatalogError(code, secret)), code).not.toContain(secret);
    }
    for (const thrown of [Object.assign(new Error(secret), { code: 'IO' }), undefined, null, secret]) {
      expect(clientMessage(thrown)).toBe("the server failed; the server's log has the cause");
    }
    expect(clientMessage(new StoreError('IO', secret, { forClients: 'begin anew' }))).toBe('begin anew');
    expect(clientMessage(new StoreError('NO_SPACE', secret))).toBe('no space left on the server');
  });

  test('keep the cause for the log, and are not used for our own commands', async () => {
    const cause = new CatalogError('NO_VDI', 'no VDI named "x" in /store');
    const refused = new ExportError('UNKNOWN', cause.message, { cause });
    const exports = new ExportsWithClientMessages({
      list: () => [],
      describe: () => Promise.reject(refused),
      open: () => {
        throw refused;
      },
    });
    const peer: Peer = { transport: 'unix', address: '/socket' };
    const told = { code: 'UNKNOWN', message: 'there is no such VDI: "x"', cause: refused };
    await expect(exports.open('x', peer)).rejects.toMatchObject(told);
    await expect(exports.describe('x', peer)).rejects.toMatchObject(told);
    const ours: Peer = { transport: 'internal', address: '1' };
    await expect(exports.open('x', ours)).rejects.toBe(refused);
    await expect(exports.describe('x', ours)).rejects.toBe(refused);
  });
});
