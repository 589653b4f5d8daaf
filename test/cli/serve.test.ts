/** `sheepgate serve`: its start, its output, its end. */
import fs from 'node:fs';
import net from 'node:net';
import path from 'node:path';
import { expect, test } from 'vitest';
import { NbdClient } from 'nbd-server-ts';
import { LocalStore } from '../../src/store/local/local-store.js';
import { BIN, cli, ended, startDaemon, temporaryDirectory, waitUntil, spawn } from '../harness/daemon.js';
import { attach, expectBytes, MIB, oneLineOf, patterned, storeWith } from './both-ways.js';

interface LogLine {
  readonly level: number;
  readonly msg: string;
  readonly [field: string]: unknown;
}

function logLines(log: string): LogLine[] {
  return log
    .split('\n')
    .filter((line) => line !== '')
    .map((line) => JSON.parse(line) as LogLine);
}

/** A TCP port that was free a moment ago. */
async function freePort(): Promise<number> {
  const server = net.createServer().listen(0, '127.0.0.1');
  await new Promise((resolve) => server.once('listening', resolve));
  const { port } = server.address() as net.AddressInfo;
  await new Promise((resolve) => server.close(resolve));
  return port;
}

test('the ready line of --json names store, sockets and URIs; without --json the output is for people', async () => {
  const port = await freePort();
  const daemon = await startDaemon({ args: ['--create', 'my disk:1G', '--listen', `tcp:127.0.0.1:${port}`] });
  expect(daemon.ready).toEqual({
    event: 'ready',
    store: daemon.store,
    control: path.join(daemon.store, 'control.sock'),
    listeners: [`unix:${daemon.socket}`, `tcp:127.0.0.1:${port}`],
    uris: [`nbd+unix:///my%20disk?socket=${daemon.socket}`, `nbd://127.0.0.1:${port}/my%20disk`],
    warnings: [expect.stringContaining('every user of this machine can read and write every VDI there')],
    kept: [],
  });
  const overTcp = await NbdClient.connect({ host: '127.0.0.1', port });
  expect(await overTcp.go('my disk')).toMatchObject({ size: 2 ** 30 });
  await overTcp.disconnect();

  const directory = temporaryDirectory();
  const socket = path.join(directory, 'nbd.sock');
  const child = spawn(
    process.execPath,
    [BIN, 'serve', '--store', path.join(directory, 's'), '--listen', `unix:${socket}`, '--create', 'disk:10G'],
    { stdio: ['ignore', 'pipe', 'ignore'] },
  );
  let out = '';
  child.stdout.setEncoding('utf8').on('data', (text: string) => (out += text));
  await waitUntil(() => out.includes('Ctrl-C'), 'it is ready');
  expect(out).toBe(
    `serving ${directory}/s\n  nbd+unix:///disk?socket=${socket}\n'sheepgate vdi list' shows the VDIs, Ctrl-C stops\n`,
  );
  child.kill('SIGINT');
  expect(await ended(child)).toEqual({ code: 0, signal: null });
  expect(fs.existsSync(socket)).toBe(false);
});

test('--create creates missing VDIs, leaves existing ones, and may be repeated', async () => {
  const first = await startDaemon({ args: ['--create', 'a:1G', '--create', 'b:2G'] });
  const client = await attach(first, 'a');
  await client.write(0, patterned(4096, 1));
  await client.disconnect();
  expect((await first.stop()).code).toBe(0);
  const second = await startDaemon({ store: first.store, args: ['--create', 'a:5G', '--create', 'c:1G'] });
  const target = storeWith(second.store, second);
  expect(await target.names()).toEqual(['a', 'b', 'c']);
  expect(await target.json('vdi', 'show', 'a')).toMatchObject({ size: 2 ** 30, allocatedBytes: 4 * MIB });
  expect(second.log()).toMatch(/exists already, left as it is/);
});

test('a start that fails leaves no listener, and reports the reason in one line', async () => {
  const directory = temporaryDirectory();
  const store = path.join(directory, 'store');
  const socket = path.join(directory, 'nbd.sock');
  const serve = (...args: string[]) => cli(['serve', '--listen', `unix:${socket}`, ...args], { store });
  expect(oneLineOf(await serve('--create', 'a/b:1G'), 1, 'bad name')).toMatch(/"a\/b"/);
  fs.writeFileSync(path.join(directory, 'file'), 'mine');
  expect((await serve('--listen', `unix:${directory}/file`)).stderr).toMatch(
    /sheepgate: .*file exists and is not a socket/,
  );
  expect(fs.readFileSync(path.join(directory, 'file'), 'utf8')).toBe('mine');
  const busy = net.createServer().listen(0, '127.0.0.1');
  await new Promise((resolve) => busy.once('listening', resolve));
  const { port } = busy.address() as net.AddressInfo;
  const refused = await serve('--listen', `tcp:127.0.0.1:${port}`);
  busy.close();
  expect(refused.code).toBe(1);
  expect(refused.stderr).toMatch(/sheepgate: cannot listen on 127\.0\.0\.1:\d+: .*EADDRINUSE.*--listen\n$/);
  expect((await serve('--listen', 'tcp:192.0.2.1:1', '--allow-plaintext')).stderr).toMatch(
    /cannot listen on 192\.0\.2\.1:1/,
  );
  expect(fs.existsSync(socket)).toBe(false);
  expect(fs.existsSync(path.join(store, 'control.sock'))).toBe(false);
});

test('a control socket whose name is too long is refused with the limit; a long path to a short name is served', async () => {
  const directory = temporaryDirectory();
  const store = path.join(directory, 'new');
  const refused = path.join(directory, `${'x'.repeat(110)}.sock`);
  for (const args of [
    ['serve', '--listen', `unix:${directory}/nbd.sock`],
    ['vdi', 'list'],
  ]) {
    const failed = await cli([...args, '--control', refused], { store });
    expect(oneLineOf(failed, 2, args.join(' '))).toMatch(/at most 107 .*choose a shorter/);
  }
  expect(fs.readdirSync(directory)).toEqual([]);
  const listen = await cli(['serve', '--listen', `unix:${refused}`], { store });
  expect(listen).toMatchObject({ code: 2, stderr: expect.stringMatching(/at most 107/) as string });
  const control = path.join(directory, 'd'.repeat(110), 'control.sock');
  const daemon = await startDaemon({ args: ['--control', control, '--create', 'disk:1M'] });
  expect(fs.statSync(control).isSocket()).toBe(true);
  expect((await cli(['vdi', 'list', '--control', control])).stdout).toContain('disk');
  await daemon.stop();
});

test('a start that fails leaves no new store, and no new VDI in an existing store', async () => {
  const directory = temporaryDirectory();
  const socket = path.join(directory, 'nbd.sock');
  const file = path.join(directory, 'file');
  fs.writeFileSync(file, 'mine');
  const there = path.join(directory, 'there');
  const made = storeWith(there, undefined);
  await made.ok('vdi', 'create', 'old', '1M');
  await made.ok('vdi', 'snapshot', 'old', 's');
  await made.ok('vdi', 'delete', 'old');
  const other = await startDaemon();
  const busy = net.createServer().listen(0, '127.0.0.1');
  await new Promise((resolve) => busy.once('listening', resolve));
  const { port } = busy.address() as net.AddressInfo;
  const failures: readonly (readonly [readonly string[], RegExp])[] = [
    [['--listen', `tcp:127.0.0.1:${port}`], /EADDRINUSE/],
    [['--listen', `unix:${file}`], /is not a socket/],
    [['--listen', `unix:${other.socket}`], /another server is listening/],
    [['--control', file], /is not a socket; choose another path/],
    [['--control', other.control], /another process listens on/],
    [['--control', path.join(file, 'c')], /file/],
    [['--create', 'a/b:1G'], /"a\/b"/],
    [['--create', 'huge:5T'], /at most 4398046511104 bytes/],
    [['--tls-certificates', path.join(directory, 'nowhere')], /nowhere/],
    [['--tls-psk', file], /file/],
    [['--access', file], /file/],
  ];
  for (const [args, says] of failures) {
    for (const store of [path.join(directory, 'new'), there]) {
      const failed = await cli(['serve', '--listen', `unix:${socket}`, '--create', 'vm:1G', ...args], { store });
      expect({ args, code: failed.code }).toEqual({ args, code: 1 });
      expect(failed.stderr).toMatch(says);
      expect(fs.existsSync(socket)).toBe(false);
    }
    expect(fs.existsSync(path.join(directory, 'new')), args.join(' ')).toBe(false);
  }
  busy.close();
  const snapshotsOnly = await cli(['serve', '--listen', `unix:${socket}`, '--create', 'vm:1G', '--create', 'old:1G'], {
    store: there,
  });
  expect(oneLineOf(snapshotsOnly, 1, 'serve')).toMatch(/"old" has only snapshots/);
  // It was closed properly: the log has no recovery.
  expect(await made.names()).toEqual(['old@s']);
});

test('SIGTERM during a start leaves no new store, and no new VDI in an existing store', async () => {
  const directory = temporaryDirectory();
  const there = path.join(directory, 'there');
  await storeWith(there, undefined).ok('vdi', 'create', 'old', '1M');
  const creations = Array.from({ length: 200 }, (_, n) => ['--create', `vm${n}:1M`]).flat();
  for (const store of [path.join(directory, 'new'), there]) {
    const listen = `unix:${path.join(directory, 'nbd.sock')}`;
    const child = spawn(process.execPath, [BIN, 'serve', '--store', store, '--listen', listen, ...creations], {
      stdio: ['ignore', 'ignore', 'pipe'],
    });
    let log = '';
    child.stderr.setEncoding('utf8').on('data', (text: string) => (log += text));
    await waitUntil(() => log.includes('"created"'), 'it makes VDIs', 30_000);
    child.kill('SIGTERM');
    expect(await ended(child)).toEqual({ code: 0, signal: null });
    expect(log).toContain('"stopped before it was ready"');
  }
  expect(fs.readdirSync(directory)).toEqual(['there']);
  expect(await storeWith(there, undefined).names()).toEqual(['old']);
});

test('--create of a VDI with another size is reported on the terminal and in the log', async () => {
  const directory = temporaryDirectory();
  const store = path.join(directory, 'store');
  const target = storeWith(store, undefined);
  await target.ok('vdi', 'create', 'e', '16M');
  await target.ok('vdi', 'create', 'same', '1M');
  const args = ['serve', '--store', store, '--listen', `unix:${directory}/nbd.sock`];
  for (const create of ['e:32M', 'same:1M', 'new:1M', 'e:16777728']) args.push('--create', create);
  const child = spawn(process.execPath, [BIN, ...args], { stdio: ['ignore', 'pipe', 'pipe'] });
  let out = '';
  let log = '';
  child.stdout.setEncoding('utf8').on('data', (text: string) => (out += text));
  child.stderr.setEncoding('utf8').on('data', (text: string) => (log += text));
  await waitUntil(() => out.includes('Ctrl-C'), 'it is ready');
  expect(out.split('\n').filter((line) => line.startsWith('note: '))).toEqual([
    "note: e exists and has 16 MiB, not 32 MiB; its size was not changed ('sheepgate vdi resize' changes it)",
    "note: e exists and has 16777216 bytes, not 16777728 bytes; its size was not changed ('sheepgate vdi resize' changes it)",
  ]);
  child.kill('SIGTERM');
  expect(await ended(child)).toEqual({ code: 0, signal: null });
  const [warning] = logLines(log).filter(({ vdi }) => vdi === 'e');
  expect(warning).toMatchObject({ level: 40, size: 16 * MIB, wantedSize: 32 * MIB });
  const daemon = await startDaemon({ store, args: ['--create', 'e:32M', '--create', 'same:1M'] });
  expect(daemon.ready.kept).toEqual([{ name: 'e', size: 16 * MIB, wantedSize: 32 * MIB, unfinished: null }]);
  await daemon.stop();
});

test('a client that connects while a store is being opened is served when the store is open', async () => {
  const store = path.join(temporaryDirectory(), 'store');
  const socket = path.join(temporaryDirectory(), 'nbd.sock');
  // Another process has the store open for a while.
  const held = await LocalStore.open(store);
  const child = spawn(
    process.execPath,
    [BIN, 'serve', '--json', '--store', store, '--listen', `unix:${socket}`, '--create', 'vm:1M'],
    { stdio: ['ignore', 'pipe', 'ignore'] },
  );
  await waitUntil(() => fs.existsSync(socket), 'it listens');
  const client = await NbdClient.connect({ path: socket });
  const opening = client.go('vm');
  await held.close();
  expect(await opening).toMatchObject({ size: MIB });
  await client.disconnect();
  child.kill('SIGTERM');
  expect(await ended(child)).toEqual({ code: 0, signal: null });
});

test('a second daemon of a store is refused; two stores can have two daemons', async () => {
  const first = await startDaemon({ args: ['--create', 'a:1M'] });
  const elsewhere = path.join(temporaryDirectory(), 'nbd.sock');
  const second = await cli(['serve', '--store', first.store, '--listen', `unix:${elsewhere}`]);
  expect(oneLineOf(second, 1, 'serve')).toMatch(
    /a daemon serves the store .* already .*stop it first, or give another --store/,
  );
  const hidden = await cli([
    'serve',
    '--store',
    first.store,
    '--listen',
    `unix:${elsewhere}`,
    '--control',
    `${elsewhere}.c`,
  ]);
  expect(oneLineOf(hidden, 1, 'serve')).toMatch(/already/);
  const sameSocket = await cli(['serve', '--listen', `unix:${first.socket}`], {
    store: path.join(temporaryDirectory(), 's'),
  });
  expect(sameSocket.code).toBe(1);
  expect(sameSocket.stderr).toMatch(/another server is listening on .*--listen\n$/);
  const other = await startDaemon({ args: ['--create', 'b:1M'] });
  expect(await storeWith(first.store, first).names()).toEqual(['a']);
  expect(await storeWith(other.store, other).names()).toEqual(['b']);
});

test('sockets left behind by a killed daemon are replaced', async () => {
  const first = await startDaemon({ args: ['--create', 'a:1M'] });
  await first.kill();
  expect(fs.lstatSync(first.socket).isSocket()).toBe(true);
  expect(fs.lstatSync(first.control).isSocket()).toBe(true);
  // Commands find no listener, and open the store themselves.
  expect(await storeWith(first.store, undefined).run(['vdi', 'list'])).toMatchObject({ code: 0 });
  const child = spawn(
    process.execPath,
    [BIN, 'serve', '--json', '--store', first.store, '--listen', `unix:${first.socket}`],
    {
      stdio: ['ignore', 'pipe', 'ignore'],
    },
  );
  await new Promise((resolve) => child.stdout.once('data', resolve));
  const client = await NbdClient.connect({ path: first.socket });
  expect(await client.go('a')).toMatchObject({ size: MIB });
  await client.disconnect();
  child.kill('SIGTERM');
  expect(await ended(child)).toEqual({ code: 0, signal: null });
  expect(fs.existsSync(first.socket)).toBe(false);
  expect(fs.existsSync(first.control)).toBe(false);
});

test('NBD sockets have mode 0600, or that of --socket-mode; the control socket still has 0600', async () => {
  // Stopped as soon as it is ready: this must be a normal stop.
  for (const [args, mode] of [
    [[], 0o600],
    [['--socket-mode', '660'], 0o660],
    [['--socket-mode', '0666'], 0o666],
  ] as const) {
    const daemon = await startDaemon({ args });
    expect((fs.statSync(daemon.socket).mode & 0o777).toString(8)).toBe(mode.toString(8));
    expect((fs.statSync(daemon.control).mode & 0o777).toString(8)).toBe('600');
    expect((await daemon.stop()).code).toBe(0);
  }
});

test('one log line when a connection opens and one when it closes, none per request', async () => {
  const daemon = await startDaemon({ args: ['--create', 'disk:64M'] });
  const client = await attach(daemon, 'disk');
  for (let i = 0; i < 50; i++) await client.write(i * 4096, patterned(4096, i + 1));
  for (let i = 0; i < 25; i++) await client.read(i * 4096, 4096);
  await client.disconnect();
  // The daemon flushes the disk before this line.
  await waitUntil(() => daemon.log().includes('"connection closed"'), 'the first close is in the log');
  const nobody = await NbdClient.connect({ path: daemon.socket });
  await expect(nobody.go('missing')).rejects.toMatchObject({ code: 'UNKNOWN_EXPORT' });
  await nobody.disconnect();
  await waitUntil(() => daemon.log().split('"connection closed"').length === 3, 'both closes are in the log');
  expect((await daemon.stop()).code).toBe(0);
  const lines = logLines(daemon.log());
  const messages = lines.map(({ msg }) => msg);
  expect(messages).toEqual([
    'created',
    'ready',
    'connection open',
    'connection closed',
    expect.stringMatching(/^export "missing" refused: no VDI named "missing" in /),
    'connection closed',
    'stopping',
    'stopped',
  ]);
  expect(lines[2]).toMatchObject({ level: 30, export: 'disk', peer: `unix ${daemon.socket}` });
  // The other connection has no disk to close, and may end sooner.
  const connection = lines[2]?.connection;
  expect(lines.find((line) => line.msg === 'connection closed' && line.connection === connection)).toMatchObject({
    level: 30,
    export: 'disk',
    peer: `unix ${daemon.socket}`,
    bytesRead: 25 * 4096,
    bytesWritten: 50 * 4096,
    requests: 75,
    errors: 0,
    reason: expect.any(String) as string,
  });
  for (const line of lines) expect(String(line.time)).toMatch(/^\d{4}-\d\d-\d\dT/);
});

test('--debug logs every request', async () => {
  const daemon = await startDaemon({ args: ['--create', 'disk:64M', '--debug'] });
  const client = await attach(daemon, 'disk');
  await client.write(8192, patterned(4096, 1));
  await client.read(0, 512);
  await client.flush();
  await client.disconnect();
  expect((await daemon.stop()).code).toBe(0);
  const requests = logLines(daemon.log()).filter(({ msg }) => msg === 'request');
  expect(requests.slice(0, 3)).toMatchObject([
    { level: 20, type: 1, offset: 8192, length: 4096 },
    { type: 0, offset: 0, length: 512 },
    { type: 3 },
  ]);
});

test.each(['SIGTERM', 'SIGINT'] as const)(
  '%s answers the requests in flight, makes them durable and exits with 0',
  async (signal) => {
    const daemon = await startDaemon({ args: ['--create', 'disk:64M'] });
    const client = await attach(daemon, 'disk');
    // 64 MiB are in flight, in 256 requests, when the signal comes.
    const data = patterned(256 * 1024, 3);
    const outcomes: Promise<number>[] = [];
    for (let i = 0; i < 256; i++) {
      outcomes.push(
        client.write(i * data.length, data).then(
          () => i,
          () => -1,
        ),
      );
    }
    await Promise.race(outcomes);
    daemon.child.kill(signal);
    const acknowledged = (await Promise.all(outcomes)).filter((i) => i >= 0);
    expect(await ended(daemon.child)).toEqual({ code: 0, signal: null });
    expect(acknowledged.length).toBeGreaterThan(0);
    client.destroy();
    const result = await cli(['export', 'disk', '-'], { store: daemon.store });
    expect(result.stderr).toMatch(/^exported/); // no note about an unclean shutdown
    for (const i of acknowledged) {
      expectBytes(result.stdoutBytes.subarray(i * data.length, (i + 1) * data.length), data);
    }
  },
);

test('a second SIGTERM ends the daemon at once, even if a client does not read its replies', async () => {
  const daemon = await startDaemon({ args: ['--create', 'disk:64M'] });
  const socket = net.connect(daemon.socket).pause();
  await new Promise((resolve) => socket.once('connect', resolve));
  const client = await NbdClient.connect({ socket });
  await client.go('disk');
  await client.write(0, patterned(4 * MIB, 1));
  // The client does not read the replies, so its reads stay in flight.
  for (let i = 0; i < 16; i++) client.read(0, 4 * MIB).catch(() => undefined);
  socket.pause();
  daemon.child.kill('SIGTERM');
  await waitUntil(() => daemon.log().includes('"stopping"'), 'it is stopping');
  expect(daemon.child.exitCode).toBe(null);
  const before = Date.now();
  daemon.child.kill('SIGTERM');
  expect(await ended(daemon.child)).toEqual({ code: null, signal: 'SIGTERM' });
  expect(Date.now() - before).toBeLessThan(5_000);
  client.destroy();
  expect(await storeWith(daemon.store, undefined).run(['check'])).toMatchObject({ code: 0 });
});

test('the daemon keeps running if its output is not read', async () => {
  const directory = temporaryDirectory();
  const socket = path.join(directory, 'nbd.sock');
  const args = [
    BIN,
    'serve',
    '--json',
    '--store',
    path.join(directory, 's'),
    '--listen',
    `unix:${socket}`,
    '--create',
    'd:1M',
  ];
  const child = spawn(process.execPath, args, { stdio: ['ignore', 'pipe', 'ignore'] });
  child.stdout.destroy();
  await waitUntil(() => fs.existsSync(path.join(directory, 's', 'control.sock')), 'it listens');
  const client = await NbdClient.connect({ path: socket });
  await client.go('d');
  await client.disconnect();
  child.kill('SIGTERM');
  expect(await ended(child)).toEqual({ code: 0, signal: null });
});
