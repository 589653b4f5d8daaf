/** `sheepgate serve` and its clients: identity, numbers, time-outs, and their lines in the log. */
import fs from 'node:fs';
import net from 'node:net';
import path from 'node:path';
import { describe, expect, onTestFinished, test } from 'vitest';
import { NbdClient, type ClientOptions } from 'nbd-server-ts';
import { CMD } from '../../nbd/src/protocol/wire.js';
import { RawClient } from '../../nbd/test/raw-client.js';
import { BIN, cli, ended, startDaemon, temporaryDirectory, waitUntil, type Daemon, spawn } from '../harness/daemon.js';

const UID = process.getuid?.() ?? -1;
const GID = process.getgid?.() ?? -1;
/** No process has it in these tests. */
const OTHER_ID = 4_000_000;

async function connect(options: ClientOptions): Promise<NbdClient> {
  const client = await NbdClient.connect(options);
  onTestFinished(() => client.destroy());
  return client;
}

function portOf(daemon: Daemon): number {
  return Number(/:(\d+)$/.exec(daemon.ready.listeners.find((each) => each.startsWith('tcp:')) ?? '')?.[1]);
}

function access(text: string): string {
  const file = path.join(temporaryDirectory(), 'access');
  fs.writeFileSync(file, text);
  return file;
}

/** The log lines with this message. */
function lines(daemon: Daemon, message: string): Record<string, unknown>[] {
  return daemon
    .log()
    .split('\n')
    .filter((line) => line.endsWith('}'))
    .map((line) => JSON.parse(line) as Record<string, unknown>)
    .filter(({ msg }) => msg === message);
}

describe('rules', () => {
  test('for users, groups and addresses hold for the process at the other end', async () => {
    const daemon = await startDaemon({
      args: [
        ...['--listen', 'tcp:127.0.0.1:0', '--create', 'mine:1M', '--create', 'other:1M', '--create', 'lan:1M'],
        '--access',
        access(
          `allow mine from uid:${UID}+gid:${GID}\nallow other from uid:${OTHER_ID}\nallow lan ro from addr:127.0.0.0/8\n`,
        ),
      ],
    });
    const local = await connect({ path: daemon.socket });
    expect((await local.list()).map(({ name }) => name)).toEqual(['mine']);
    for (const name of ['other', 'lan', 'missing'])
      await expect(local.go(name)).rejects.toMatchObject({ code: 'POLICY' });
    expect((await local.go('mine')).readOnly).toBe(false);
    await local.write(0, Buffer.from('x'));

    const remote = await connect({ host: '127.0.0.1', port: portOf(daemon) });
    expect((await remote.list()).map(({ name }) => name)).toEqual(['lan']);
    await expect(remote.info('mine')).rejects.toMatchObject({ code: 'POLICY' });
    expect((await remote.go('lan')).readOnly).toBe(true);
    await expect(remote.write(0, Buffer.from('x'))).rejects.toMatchObject({ code: 'EPERM' });
    // The control socket is not subject to rules.
    expect((await cli(['vdi', 'list', '--json'], { store: daemon.store })).stdout).toContain('other');
    expect((await daemon.stop()).code).toBe(0);
  });

  test('a temporary snapshot that may only be read is dropped when its last reader leaves', async () => {
    const daemon = await startDaemon({
      args: ['--create', 'disk:1M', '--access', access('allow *@now ro from any\n')],
    });
    const client = await connect({ path: daemon.socket });
    expect((await client.go('disk@now')).readOnly).toBe(true);
    await client.read(0, 512);
    await client.disconnect();
    await waitUntil(() => lines(daemon, 'connection closed').length === 1, 'it is over');
    expect(JSON.parse((await cli(['vdi', 'list', '--json'], { store: daemon.store })).stdout)).toHaveLength(1);
    expect((await daemon.stop()).code).toBe(0);
  });
});

describe('limits', () => {
  test('a connection beyond the limit in all, or per user, is closed and logged', async () => {
    const daemon = await startDaemon({
      args: [
        ...['--listen', 'tcp:127.0.0.1:0', '--create', 'disk:1M'],
        ...['--max-connections', '2', '--max-connections-per-peer', '1'],
      ],
    });
    const tcp = { host: '127.0.0.1', port: portOf(daemon) };
    await (await connect({ path: daemon.socket })).go('disk');
    for (let i = 0; i < 3; i++) await expect(NbdClient.connect({ path: daemon.socket })).rejects.toBeDefined();
    await (await connect(tcp)).go('disk');
    const fromElsewhere = net.connect({ ...tcp, localAddress: '127.0.0.2' });
    await expect(NbdClient.connect({ socket: fromElsewhere })).rejects.toBeDefined();
    await waitUntil(() => lines(daemon, 'connection refused').length === 2, 'both are logged, each once');
    expect(lines(daemon, 'connection refused').map(({ reason }) => reason)).toEqual([
      '1 connections of this peer are open, as many as allowed',
      '2 connections are open, as many as allowed',
    ]);
    // Commands still get in.
    expect((await cli(['vdi', 'list', '--json'], { store: daemon.store })).code).toBe(0);
    expect(daemon.log()).not.toContain('"level":50');
    expect((await daemon.stop()).code).toBe(0);
  });

  test('clients that choose no export, or send no requests, are closed after their time', async () => {
    const daemon = await startDaemon({
      args: ['--create', 'disk:1M', '--handshake-timeout', '1', '--idle-timeout', '1'],
    });
    await connect({ path: daemon.socket });
    await (await connect({ path: daemon.socket })).go('disk');
    await waitUntil(() => lines(daemon, 'connection closed').length === 2, 'both are closed');
    expect(
      lines(daemon, 'connection closed')
        .map(({ reason }) => reason)
        .sort(),
    ).toEqual(['idle for 1000 ms', 'no export chosen within 1000 ms']);
    expect((await daemon.stop()).code).toBe(0);
  });

  test('invalid numbers are wrong usage', async () => {
    for (const [option, value] of [
      ['--max-connections', '0'],
      ['--max-connections-per-peer', 'x'],
      ['--handshake-timeout', '-1'],
      ['--idle-timeout', '9999999'],
      ['--stall-timeout', 'x'],
      ['--max-memory', '1K'],
      ['--tls', 'maybe'],
    ] as const) {
      const result = await cli(['serve', option, value], { store: path.join(temporaryDirectory(), 'store') });
      expect([option, result.code]).toEqual([option, 2]);
      expect(result.stderr).toContain(option);
    }
  });
});

test('the line at the end of a connection has the client, its requests, and why it ended', async () => {
  const daemon = await startDaemon({ args: ['--create', 'disk:1M'] });
  const client = await RawClient.connect({ path: daemon.socket });
  await client.open('disk');
  client.request({ type: CMD.WRITE, length: 1000 }, Buffer.alloc(1000));
  expect((await client.readReply()).errno).toBe(0);
  client.request({ type: CMD.READ, length: 500 });
  expect((await client.readReply(500)).errno).toBe(0);
  // The library's client would not send this one.
  client.request({ type: CMD.READ, offset: 2 ** 30, length: 1 });
  expect((await client.readReply()).errno).not.toBe(0);
  client.request({ type: CMD.DISC });
  await waitUntil(() => lines(daemon, 'connection closed').length === 1, 'it is over');
  expect(lines(daemon, 'connection closed')[0]).toMatchObject({
    ...{ peer: `unix ${daemon.socket}`, pid: process.pid, uid: UID, export: 'disk', reason: 'the client disconnected' },
    ...{ bytesWritten: 1000, bytesRead: 500, requests: 3, errors: 1, durationMs: expect.any(Number) as unknown },
  });
  expect((await daemon.stop()).code).toBe(0);
});

test('a resize while the disk is open is what the next connection sees', async () => {
  const daemon = await startDaemon({ args: ['--create', 'disk:1M'] });
  const before = await connect({ path: daemon.socket });
  expect((await before.go('disk')).size).toBe(2 ** 20);
  const resized = await cli(['vdi', 'resize', 'disk', '3M'], { store: daemon.store });
  expect(resized.stderr).toBe('');
  const after = await connect({ path: daemon.socket });
  expect((await after.go('disk')).size).toBe(3 * 2 ** 20);
  await after.write(2 * 2 ** 20, Buffer.from('new'));
  expect((await after.read(2 * 2 ** 20, 3)).toString()).toBe('new');
  await before.write(0, Buffer.from('old'));
  await expect(before.read(2 * 2 ** 20, 3)).rejects.toMatchObject({ code: 'EINVAL' });
  expect((await after.read(0, 3)).toString()).toBe('old');
  expect((await daemon.stop()).code).toBe(0);
});

test('SIGHUP does not end a daemon that has nothing to reload', async () => {
  const daemon = await startDaemon({ args: ['--create', 'disk:1M'] });
  const client = await connect({ path: daemon.socket });
  await client.go('disk');
  daemon.child.kill('SIGHUP');
  await waitUntil(() => lines(daemon, 'reloaded').length === 1, 'it says that it has');
  await client.read(0, 512);
  expect((await daemon.stop()).code).toBe(0);
});

describe('a client that breaks the protocol', () => {
  /** Opens `disk` and sends an invalid request, again and again, as soon as it can. */
  function offender(daemon: Daemon, isOver: () => boolean): { readonly times: number; readonly over: Promise<void> } {
    const state = { times: 0, over: Promise.resolve() };
    const once = async (): Promise<void> => {
      const socket = net.connect({ path: daemon.socket });
      const closed = new Promise((resolve) => socket.on('error', () => undefined).once('close', resolve));
      const option = Buffer.from(
        '49484156454f5054' + '00000007' + '0000000a' + '00000004' + '6469736b' + '0000',
        'hex',
      );
      // Client flags, GO, and a block of 5s where a request should be, as qemu 10 sent it once.
      socket.write(Buffer.concat([Buffer.from([0, 0, 0, 3]), option, Buffer.alloc(4096, 5)]));
      socket.resume();
      await closed;
      state.times++;
    };
    const loop = async (): Promise<void> => {
      while (!isOver()) await once();
    };
    state.over = loop();
    return state;
  }

  test('is slowed down, logged with a warning at intervals, and does not disturb others', async () => {
    const daemon = await startDaemon({ args: ['--create', 'disk:1M', '--create', 'other:1M'] });
    const neighbour = await connect({ path: daemon.socket });
    await neighbour.go('disk');
    let isOver = false;
    const began = performance.now();
    const bad = offender(daemon, () => isOver);
    await waitUntil(() => bad.times >= 6, 'it has come six times');
    // 0 + 100 + 200 + 400 + 800 + 1600 ms; each timer may fire up to a millisecond early.
    expect(performance.now() - began).toBeGreaterThan(3_000);
    isOver = true;
    await neighbour.write(0, Buffer.from('undisturbed'));
    const closes = daemon
      .log()
      .split('\n')
      .filter((line) => line.includes('protocol violation: bad request magic 0x5050505'))
      .map((line) => JSON.parse(line) as { level: number; violations: number; export: string });
    // pino's level of a warning is 40. The third, fifth and sixth are not logged.
    expect(closes.slice(0, 3)).toMatchObject([
      { level: 40, violations: 1, export: 'disk' },
      { level: 40, violations: 2, export: 'disk' },
      { level: 40, violations: 4, export: 'disk' },
    ]);
    expect(closes.length).toBe(3);
    // Its openings are logged only until it is known as an offender; all openings of other clients are logged.
    const told = (): number => lines(daemon, 'connection open').filter((line) => line.export === 'disk').length;
    expect(told()).toBe(3);
    const good = await connect({ path: daemon.socket });
    await good.go('disk');
    await waitUntil(() => told() === 4, 'the good one is told of while it is open');
    const short = await connect({ path: daemon.socket });
    await short.go('disk');
    await short.disconnect();
    await waitUntil(() => told() === 5, 'and one that has left already');
    const stopped = performance.now();
    expect((await daemon.stop()).code).toBe(0);
    await bad.over;
    // Neither the connection that waits for its end nor any other delays the daemon's.
    expect(performance.now() - stopped).toBeLessThan(10_000);
  });
});

describe('a command that finds the store taken', () => {
  test('reports that a daemon is stopping', async () => {
    const daemon = await startDaemon({ args: ['--create', 'disk:64M'] });
    const pid = daemon.child.pid;
    // The client reads no replies: the daemon waits for it a while, its control socket closed, the store still open.
    const socket = net.connect({ path: daemon.socket });
    onTestFinished(() => void socket.destroy());
    const option = Buffer.from('49484156454f5054' + '00000007' + '0000000a' + '00000004' + '6469736b' + '0000', 'hex');
    const read = Buffer.from('25609513' + '00000000' + '0'.repeat(16) + '0'.repeat(16) + '01000000', 'hex');
    socket.write(Buffer.concat([Buffer.from([0, 0, 0, 3]), option, read, read, read]));
    await waitUntil(() => lines(daemon, 'connection open').length === 1, 'it has the disk open');
    daemon.child.kill('SIGTERM');
    await waitUntil(() => lines(daemon, 'stopping').length === 1, 'the daemon is stopping');
    const lock = path.join(daemon.store, 'lock');
    await waitUntil(() => fs.readFileSync(lock, 'utf8') === `${pid} stopping daemon\n`, 'it has said so');
    await waitUntil(() => !fs.existsSync(daemon.control), 'it takes no more commands');
    // However slow this machine is now: it does not end meanwhile.
    daemon.child.kill('SIGSTOP');
    const { code, stderr } = await cli(['vdi', 'list'], { store: daemon.store });
    daemon.child.kill('SIGCONT');
    expect([code, stderr]).toEqual([
      1,
      `sheepgate: a daemon that is stopping (process ${pid}) holds the store: it finishes the requests in flight and flushes; ` +
        'wait for it to end, then try again\n',
    ]);
    expect((await ended(daemon.child)).code).toBe(0);
    expect((await cli(['vdi', 'list'], { store: daemon.store })).code).toBe(0);
  });

  test('reports a daemon that cannot be reached, and another command', async () => {
    const control = path.join(temporaryDirectory(), 'elsewhere.sock');
    const daemon = await startDaemon({ args: ['--create', 'disk:1M', '--control', control] });
    // The link from the store to the control socket.
    fs.unlinkSync(path.join(daemon.store, 'control.sock'));
    const refused = await cli(['vdi', 'list'], { store: daemon.store });
    expect(refused.code).toBe(1);
    expect(refused.stderr).toMatch(
      /a daemon \(process \d+\) holds the store, and no daemon answers on .*--control PATH/,
    );
    expect((await cli(['vdi', 'list', '--control', control], { store: daemon.store })).code).toBe(0);
    expect((await daemon.stop()).code).toBe(0);

    // The import waits for the rest of its input, with the store open.
    const child = spawn(process.execPath, [BIN, 'import', '-', 'new', '--size', '64M', '--store', daemon.store], {
      stdio: ['pipe', 'ignore', 'ignore'],
    });
    onTestFinished(() => void child.kill('SIGKILL'));
    // It opens the store when the first bytes have come.
    child.stdin.on('error', () => undefined).write(Buffer.alloc(2 ** 20, 1));
    const lock = path.join(daemon.store, 'lock');
    await waitUntil(() => fs.readFileSync(lock, 'utf8') === `${child.pid} command\n`, 'the command has the store');
    const beside = await cli(['vdi', 'list'], { store: daemon.store });
    expect(beside.stderr).toMatch(
      /another command \(process \d+\) holds the store, .*: wait for that command to end\n$/,
    );
    child.kill('SIGTERM');
    await ended(child);
  });
});
