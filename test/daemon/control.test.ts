/**
 * The control API with raw requests: a malformed one gets a clear error and does not harm the daemon; well-formed ones work on VDIs
 * that are in use.
 */
import fs from 'node:fs';
import http from 'node:http';
import net from 'node:net';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { NbdClient } from 'nbd-server-ts';
import { ControlClient } from '../../src/operations/control-client.js';
import { MAX_REQUEST_BODY_BYTES } from '../../src/operations/control-protocol.js';
import { RemoteOperations } from '../../src/operations/remote-operations.js';
import { cli, startDaemon, temporaryDirectory, waitUntil, type Daemon } from '../harness/daemon.js';

const MIB = 2 ** 20;

interface Answer {
  readonly status: number;
  readonly body: { readonly error?: { readonly code: string; readonly message: string } } & Record<string, unknown>;
}

function call(daemon: Daemon, method: string, url: string, body?: string | Buffer): Promise<Answer> {
  return new Promise((resolve, reject) => {
    const request = http.request({ socketPath: daemon.control, method, path: url, agent: false }, (response) => {
      let text = '';
      response.setEncoding('utf8').on('data', (chunk: string) => (text += chunk));
      response.on('end', () => resolve({ status: response.statusCode ?? 0, body: JSON.parse(text) as Answer['body'] }));
    });
    request.on('error', reject);
    request.end(body);
  });
}

/** Send bytes as they are and collect what comes back until the daemon closes. */
function raw(socketPath: string, bytes: string | Buffer): Promise<string> {
  return new Promise((resolve) => {
    let text = '';
    const socket = net.connect(socketPath, () => socket.write(bytes));
    socket.setEncoding('latin1').on('data', (chunk: string) => (text += chunk));
    socket.on('error', () => undefined);
    socket.on('close', () => resolve(text));
  });
}

describe('malformed', () => {
  let daemon: Daemon;

  beforeAll(async () => {
    daemon = await startDaemon({ args: ['--create', 'vm:64M'] });
  });

  afterAll(async () => {
    // The daemon has survived all of it, and logged no fault of its own.
    expect((await call(daemon, 'GET', '/status')).status).toBe(200);
    expect(daemon.log()).not.toMatch(/"level":[56]0/);
    expect((await daemon.stop()).code, daemon.log()).toBe(0);
  });

  test.each([
    ['no JSON', 'POST', '/vdis', '{name: vm', 400, /the body is not JSON/],
    ['an empty body', 'POST', '/vdis', '', 400, /"name" must be a string, not undefined/],
    ['JSON that is no object', 'POST', '/vdis', '[1]', 400, /must be a JSON object/],
    ['null', 'POST', '/vdis', 'null', 400, /must be a JSON object/],
    [
      'an offset that is no number',
      'GET',
      '/vdis/vm/changes?since=vm&offset=-1',
      undefined,
      400,
      /"offset" must be a whole/,
    ],
    ['nothing to compare with', 'GET', '/vdis/vm/changes', undefined, 400, /must not be empty/],
    [
      'a time before time',
      'POST',
      '/vdis/vm/snapshots',
      '{"tag":"t","takenAt":-1}',
      400,
      /cannot have been taken at -1/,
    ],
    ['a missing field', 'POST', '/vdis', '{"name":"x"}', 400, /"size" must be a whole number, not undefined/],
    [
      'a string for a number',
      'POST',
      '/vdis',
      '{"name":"x","size":"1G"}',
      400,
      /"size" must be a whole number, not "1G"/,
    ],
    ['a fraction', 'POST', '/vdis', '{"name":"x","size":1.5}', 400, /whole number/],
    ['a number beyond 2^53', 'POST', '/vdis', '{"name":"x","size":1e300}', 400, /whole number/],
    ['a negative size', 'POST', '/vdis', '{"name":"x","size":-512}', 400, /positive multiple of 512/],
    ['an object for a name', 'POST', '/vdis', '{"name":{},"size":512}', 400, /"name" must be a string, not \{\}/],
    [
      'a block size shift of 99',
      'POST',
      '/vdis',
      '{"name":"x","size":512,"blockSizeShift":99}',
      400,
      /must be 20 to 26/,
    ],
    ['NUL in a name', 'POST', '/vdis', '{"name":"a\\u0000b","size":512}', 400, /must not contain NUL/],
    ['half a surrogate in a name', 'POST', '/vdis', '{"name":"\\ud800","size":512}', 400, /not valid Unicode/],
    ['an existing name', 'POST', '/vdis', '{"name":"vm","size":512}', 409, /exists already/],
    [
      'a flag that is none',
      'POST',
      '/vdis/vm/resize',
      '{"size":512,"force":1}',
      400,
      /"force" must be true or false, not 1/,
    ],
    ['shrinking without force', 'POST', '/vdis/vm/resize', '{"size":512}', 409, /--force/],
    ['a reserved tag', 'POST', '/vdis/vm/snapshots', '{"tag":"now"}', 400, /reserved/],
    ['a tag that is a list', 'POST', '/vdis/vm/snapshots', '{"tag":["a"]}', 400, /"tag" must be a string/],
    ['an unknown VDI', 'GET', '/vdis/nope', undefined, 404, /no VDI named "nope"/],
    ['an unknown tag', 'DELETE', '/vdis/vm%40nope', undefined, 404, /no snapshot "nope"/],
    ['a clone of a working VDI', 'POST', '/vdis/vm/clone', '{"name":"x"}', 400, /can only clone a snapshot/],
    ['an unknown export', 'GET', '/exports/nope%40now', undefined, 404, /no VDI named "nope"/],
    ['an unknown route', 'GET', '/nope', undefined, 404, /does not know GET \/nope/],
    ['the root', 'GET', '/', undefined, 404, /does not know GET \//],
    ['the wrong method', 'PUT', '/vdis/vm', '{}', 404, /does not know PUT/],
    ['a path that is badly encoded', 'GET', '/vdis/%ff', undefined, 400, /not well encoded/],
    ['an empty name', 'GET', '/vdis/', undefined, 400, /must not be empty/],
    ['another method', 'OPTIONS', '/vdis', undefined, 404, /does not know OPTIONS/],
  ] as const)('%s is answered with a clear error', async (_what, method, url, body, status, says) => {
    const answer = await call(daemon, method, url, body);
    expect(answer).toMatchObject({ status, body: { error: { code: expect.stringMatching(/^[A-Z_]+$/) as string } } });
    expect(answer.body.error?.message).toMatch(says);
    expect(JSON.stringify(answer.body)).not.toMatch(/INTERNAL| at .*\.js/);
  });

  test('a body that is too large is refused without being read to its end', async () => {
    const answer = await call(daemon, 'POST', '/vdis', Buffer.alloc(MAX_REQUEST_BODY_BYTES + 1, 0x20)).catch(
      (error: unknown) => (error as NodeJS.ErrnoException).code,
    );
    // Either the answer, or a connection that was cut while we were still sending.
    if (typeof answer !== 'object') expect(['EPIPE', 'ECONNRESET']).toContain(answer);
    else
      expect(answer).toMatchObject({
        status: 400,
        body: { error: { message: expect.stringMatching(/longer than/) as string } },
      });
  });

  test('anything but HTTP is answered with 400 and closed', async () => {
    for (const bytes of [
      '\0\0\0\0\r\n\r\n',
      'NBDMAGICIHAVEOPT\r\n\r\n',
      `GET /${'x'.repeat(100_000)} HTTP/1.1\r\n\r\n`,
    ]) {
      expect(await raw(daemon.control, bytes)).toMatch(/^HTTP\/1\.1 4\d\d /);
    }
  });

  test('an upgrade to another protocol, or a client that then does not speak NBD, ends that connection only', async () => {
    expect(
      await raw(daemon.control, 'GET /nbd HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n'),
    ).toMatch(/^HTTP\/1\.1 400/);
    const upgrade = 'GET /nbd HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: nbd\r\n\r\n';
    const answer = await raw(daemon.control, upgrade + 'what?'.repeat(100));
    expect(answer).toMatch(/^HTTP\/1\.1 101 [\s\S]*\r\n\r\nNBDMAGIC/);
  });

  test('a hundred silent connections do not disturb others', async () => {
    const idle = Array.from({ length: 100 }, () => net.connect(daemon.control).on('error', () => undefined));
    await Promise.all(idle.map((socket) => new Promise((resolve) => socket.once('connect', resolve))));
    expect((await call(daemon, 'GET', '/status')).status).toBe(200);
    for (const socket of idle) socket.destroy();
  });

  test('names pass unchanged through a URL', async () => {
    for (const name of ['a b', 'a%2Fb', 'ü€😀', 'a?b=c&d', 'a#b', "it's", '+', '...']) {
      expect(await call(daemon, 'POST', '/vdis', JSON.stringify({ name, size: 512 }))).toMatchObject({ status: 200 });
      expect(await call(daemon, 'GET', `/vdis/${encodeURIComponent(name)}`)).toMatchObject({ body: { name } });
      expect(await call(daemon, 'DELETE', `/vdis/${encodeURIComponent(name)}`)).toEqual({ status: 200, body: null });
    }
  });
});

test('only this user may connect: the socket is 0600 from its first moment, its directory 0700', async () => {
  const control = path.join(temporaryDirectory(), 'run', 'control.sock');
  const daemon = await startDaemon({ args: ['--control', control] });
  expect(fs.statSync(control).mode & 0o777).toBe(0o600);
  expect(fs.statSync(path.dirname(control)).mode & 0o777).toBe(0o700);
  expect(fs.statSync(daemon.store).mode & 0o777).toBe(0o700);
});

test('a control socket outside the store is found from the store, and its link is removed when the daemon stops', async () => {
  const control = path.join(temporaryDirectory(), 'c.sock');
  const daemon = await startDaemon({ args: ['--control', control, '--create', 'vm:1M'] });
  const link = path.join(daemon.store, 'control.sock');
  expect(daemon.control).toBe(control);
  expect(fs.readlinkSync(link)).toBe(control);
  // Opened directly, this would fail: the daemon has the store locked.
  expect(await cli(['vdi', 'list'], { store: daemon.store })).toMatchObject({ code: 0 });
  expect(await cli(['vdi', 'list'], { env: { SHEEPGATE_CONTROL: control } })).toMatchObject({ code: 0 });
  expect((await daemon.stop()).code).toBe(0);
  expect(fs.lstatSync(link, { throwIfNoEntry: false })).toBe(undefined);
  expect(fs.existsSync(control)).toBe(false);
});

test('a link to a socket that is gone is replaced', async () => {
  const directory = temporaryDirectory();
  const first = await startDaemon({ args: ['--control', path.join(directory, 'one.sock')] });
  await first.kill();
  fs.rmSync(path.join(directory, 'one.sock'));
  const second = await startDaemon({ store: first.store, args: ['--control', path.join(directory, 'two.sock')] });
  expect(fs.readlinkSync(path.join(first.store, 'control.sock'))).toBe(path.join(directory, 'two.sock'));
  expect(await cli(['vdi', 'list'], { store: second.store })).toMatchObject({ code: 0 });
});

test('a daemon serves a store whose path is too long for a socket address', async () => {
  const store = path.join(temporaryDirectory(), 'x'.repeat(100), 'y'.repeat(100));
  const daemon = await startDaemon({ store, args: ['--create', 'vm:1M'] });
  expect(JSON.parse((await cli(['vdi', 'list', '--json'], { store })).stdout)).toMatchObject([{ name: 'vm' }]);
  expect((await daemon.stop()).code).toBe(0);
});

test('the status has each connection with its peer, its export and its transferred bytes', async () => {
  const daemon = await startDaemon({ args: ['--create', 'vm:1M'] });
  const client = await NbdClient.connect({ path: daemon.socket });
  await client.go('vm');
  await client.write(0, Buffer.alloc(8192, 1));
  await client.read(0, 4096);
  expect(await new ControlClient(daemon.control).status()).toMatchObject({
    pid: daemon.child.pid,
    store: daemon.store,
    listeners: [`unix:${daemon.socket}`],
    connections: [{ peer: `unix ${daemon.socket}`, export: 'vm', bytesRead: 4096, bytesWritten: 8192, requests: 2 }],
  });
  await client.disconnect();
  await waitUntil(
    async () => (await new ControlClient(daemon.control).status()).connections.length === 0,
    'the connection has left the list',
  );
});

test('snapshots, clones, growing and deleting do not disturb a writer', async () => {
  const daemon = await startDaemon({ args: ['--create', 'vm:64M'] });
  const operations = new RemoteOperations(daemon, new ControlClient(daemon.control));
  const writer = await NbdClient.connect({ path: daemon.socket });
  await writer.go('vm');
  const stopWriting = new AbortController();
  let generation = 0;
  const blocks = 16;
  const writing = (async () => {
    while (!stopWriting.signal.aborted) {
      generation++;
      for (let block = 0; block < blocks; block++) {
        const data = Buffer.alloc(4096);
        data.writeUInt32LE(generation);
        await writer.write(block * 4 * MIB, data);
      }
    }
  })();
  const seen: number[] = [];
  for (let round = 0; round < 8; round++) {
    const tag = `t${round}`;
    const begun = generation;
    await waitUntil(() => generation > begun, 'the writer has finished another round');
    await operations.snapshot('vm', tag);
    await operations.clone(`vm@${tag}`, `clone${round}`);
    await operations.resize('vm', (65 + round) * MIB, {});
    await expect(operations.remove('vm')).rejects.toMatchObject({ code: 'BUSY' });
    await expect(operations.rollback(`vm@${tag}`)).rejects.toMatchObject({ code: 'BUSY' });
    await expect(operations.check({ repair: false })).rejects.toMatchObject({ code: 'BUSY' });
    const disk = await operations.openDisk(`vm@${tag}`);
    const first = Buffer.alloc(4);
    const stamps: number[] = [];
    for (let block = 0; block < blocks; block++) {
      await disk.read(block * 4 * MIB, first);
      stamps.push(first.readUInt32LE());
    }
    await disk.close();
    // One writer, in order: the snapshot has the beginning of one generation, and the rest of the one before.
    const [newest = 0] = stamps;
    const cut = stamps.findIndex((stamp) => stamp !== newest);
    expect(stamps).toEqual(stamps.map((_, i) => (cut >= 0 && i >= cut ? newest - 1 : newest)));
    seen.push(newest);
    if (round % 2 === 1) {
      await operations.remove(`vm@t${round - 1}`);
      await operations.remove(`clone${round - 1}`);
    }
  }
  stopWriting.abort();
  await writing;
  await writer.disconnect();
  expect(seen).toEqual([...seen].sort((a, b) => a - b));
  expect((await operations.list()).map(({ name, tag }) => `${name}@${tag}`)).toHaveLength(1 + 4 + 4);
  await waitUntil(async () => (await operations.show('vm')).open === 0, 'the writer is gone');
  expect(await operations.check({ repair: false })).toMatchObject({ problems: [], orphans: 0 });
  expect((await daemon.stop()).code, daemon.log()).toBe(0);
});

test('many catalog operations at once are done one after the other, each of them whole', async () => {
  const daemon = await startDaemon();
  const operations = new RemoteOperations(daemon, new ControlClient(daemon.control));
  const outcomes = await Promise.allSettled(
    Array.from({ length: 40 }, (_, i) => operations.create(`vm${i % 20}`, MIB, {})),
  );
  expect(outcomes.filter(({ status }) => status === 'fulfilled')).toHaveLength(20);
  for (const outcome of outcomes)
    if (outcome.status === 'rejected') expect(outcome.reason).toMatchObject({ code: 'EXISTS' });
  await Promise.all(Array.from({ length: 20 }, (_, i) => operations.remove(`vm${i}`)));
  expect(await operations.list()).toEqual([]);
});
