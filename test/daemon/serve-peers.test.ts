/** `sheepgate serve` and its clients: who they are, how many, for how long; what the log says of them at the end. */
import fs from 'node:fs';
import path from 'node:path';
import { describe, expect, onTestFinished, test } from 'vitest';
import { NbdClient, type ClientOptions } from 'nbd-server-ts';
import { cli, startDaemon, temporaryDirectory, waitUntil, type Daemon } from '../harness/daemon.js';

const UID = process.getuid?.() ?? -1;
const GID = process.getgid?.() ?? -1;
/** Nobody's, in these tests. */
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
    // The control socket is the user's own.
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
  test('one connection more than allowed in all, or per user, is closed and logged', async () => {
    const daemon = await startDaemon({
      args: [
        ...['--listen', 'tcp:127.0.0.1:0', '--create', 'disk:1M'],
        ...['--max-connections', '2', '--max-connections-per-peer', '1'],
      ],
    });
    await connect({ path: daemon.socket });
    await expect(NbdClient.connect({ path: daemon.socket })).rejects.toMatchObject({ code: 'CLOSED' });
    await connect({ host: '127.0.0.1', port: portOf(daemon) });
    await expect(NbdClient.connect({ host: '127.0.0.1', port: portOf(daemon) })).rejects.toBeDefined();
    await waitUntil(() => lines(daemon, 'connection refused').length === 2, 'both are logged');
    expect(lines(daemon, 'connection refused').map(({ reason }) => reason)).toEqual([
      '1 connections of this peer are open, as many as allowed',
      '2 connections are open, as many as allowed',
    ]);
    expect((await daemon.stop()).code).toBe(0);
  });

  test('clients that choose nothing, or ask nothing, are closed in their time', async () => {
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

  test('numbers that are none are wrong usage', async () => {
    for (const [option, value] of [
      ['--max-connections', '0'],
      ['--max-connections-per-peer', 'x'],
      ['--handshake-timeout', '-1'],
      ['--idle-timeout', '9999999'],
      ['--tls', 'maybe'],
    ] as const) {
      const result = await cli(['serve', option, value], { store: path.join(temporaryDirectory(), 'store') });
      expect([option, result.code]).toEqual([option, 2]);
      expect(result.stderr).toContain(option);
    }
  });
});

test('the line at the end of a connection says who it was, what it did, and why it ended', async () => {
  const daemon = await startDaemon({ args: ['--create', 'disk:1M'] });
  const client = await connect({ path: daemon.socket });
  await client.go('disk');
  await client.write(0, Buffer.alloc(1000));
  await client.read(0, 500);
  await expect(client.read(2 ** 30, 1)).rejects.toBeDefined();
  await client.disconnect();
  await waitUntil(() => lines(daemon, 'connection closed').length === 1, 'it is over');
  expect(lines(daemon, 'connection closed')[0]).toMatchObject({
    ...{ peer: `unix ${daemon.socket}`, pid: process.pid, uid: UID, export: 'disk', reason: 'the client disconnected' },
    ...{ bytesWritten: 1000, bytesRead: 500, requests: 3, errors: 1, durationMs: expect.any(Number) },
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
