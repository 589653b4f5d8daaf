/**
 * A systemd service without systemd: one small helper hands over sockets, another receives messages. First, unit tests of the
 * environment variables.
 */
import type { ChildProcess } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { describe, expect, onTestFinished, test } from 'vitest';
import { NbdClient } from 'nbd-server-ts';
import { openNotifier, takeInheritedSockets } from '../../src/daemon/systemd.js';
import { sendDatagram } from '../../src/system/socket-calls.js';
import { BIN, cli, ended, haveCommand, run, temporaryDirectory, waitUntil, spawn } from '../harness/daemon.js';

const EXAMPLES = fileURLToPath(new URL('../../examples/systemd', import.meta.url));

const python = haveCommand('python3');
if (!python) console.log('skipped: python3 not installed, which plays the part of systemd');
const withPython = python ? test : test.skip;

describe('LISTEN_FDS', () => {
  test('names and numbers the sockets from descriptor 3 on, and leaves nothing for children', () => {
    const env = { LISTEN_PID: '42', LISTEN_FDS: '3', LISTEN_FDNAMES: 'nbd::tcp', OTHER: 'x' };
    expect(takeInheritedSockets(env, 42)).toEqual([
      { fd: 3, name: 'nbd' },
      { fd: 4, name: 'unknown' },
      { fd: 5, name: 'tcp' },
    ]);
    expect(env).toEqual({ OTHER: 'x' });
  });

  test('of another process, or missing, means no sockets', () => {
    expect(takeInheritedSockets({ LISTEN_PID: '41', LISTEN_FDS: '1' }, 42)).toEqual([]);
    expect(takeInheritedSockets({ LISTEN_FDS: '1' }, 42)).toEqual([]);
    expect(takeInheritedSockets({}, 42)).toEqual([]);
    expect(takeInheritedSockets({ LISTEN_PID: '42', LISTEN_FDS: '0' }, 42)).toEqual([]);
  });

  test('that is not a number is an error', () => {
    for (const LISTEN_FDS of ['', 'x', '-1', '99999', '1.5']) {
      expect(() => takeInheritedSockets({ LISTEN_PID: '42', LISTEN_FDS }, 42)).toThrow(/LISTEN_FDS is/);
    }
  });
});

describe('the notifier', () => {
  function notifier(env: Record<string, string | undefined>, isTaken = true) {
    const sent: string[] = [];
    const failures: string[] = [];
    const opened = openNotifier({
      env,
      pid: 42,
      send: (address, text) => {
        sent.push(`${address} ${text}`);
        return isTaken;
      },
      onFailure: (message) => failures.push(message),
    });
    onTestFinished(() => opened.close());
    return { opened, sent, failures, env };
  }

  test('sends its messages to NOTIFY_SOCKET, and removes it from the environment', () => {
    const { opened, sent, env } = notifier({ NOTIFY_SOCKET: '@n', WATCHDOG_USEC: '0' });
    opened.ready('one\ntwo');
    opened.reloading();
    opened.stopping();
    expect(sent[0]).toBe('@n READY=1\nSTATUS=one two');
    expect(sent[1]).toMatch(/^@n RELOADING=1\nMONOTONIC_USEC=\d+$/);
    expect(sent[2]).toMatch(/^@n STOPPING=1\n/);
    expect(env).toEqual({});
  });

  test('sends nothing without a service manager', () => {
    const { opened, sent, failures } = notifier({ WATCHDOG_USEC: '1000' });
    opened.ready('x');
    expect([...sent, ...failures]).toEqual([]);
  });

  test('sends keep-alive messages at least twice per watchdog time, unless they are another process’s task', async () => {
    const mine = notifier({ NOTIFY_SOCKET: '/n', WATCHDOG_USEC: '20000', WATCHDOG_PID: '42' });
    await waitUntil(() => mine.sent.length >= 3, 'three signs of life');
    expect(new Set(mine.sent)).toEqual(new Set(['/n WATCHDOG=1']));
    expect(notifier({ NOTIFY_SOCKET: '/n', WATCHDOG_USEC: '20000', WATCHDOG_PID: '41' }).sent).toEqual([]);
  });

  test('reports once that its messages are not accepted', () => {
    const { opened, failures } = notifier({ NOTIFY_SOCKET: '/n' }, false);
    opened.ready('x');
    opened.stopping();
    expect(failures).toHaveLength(1);
    expect(notifier({ NOTIFY_SOCKET: 'vsock:2:1' }).failures[0]).toContain('neither a path nor an abstract');
  });

  test('a datagram to a socket that does not exist, or to a name that is too long, is not accepted', () => {
    expect(sendDatagram(path.join(temporaryDirectory(), 'none'), 'x')).toBe(false);
    expect(sendDatagram('@'.padEnd(200, 'x'), 'x')).toBe(false);
    expect(sendDatagram('', 'x')).toBe(false);
  });
});

const ACTIVATE = `
import fcntl, os, socket, sys
kinds, names, command = sys.argv[1].split(','), sys.argv[2], sys.argv[3:]
high = []
for kind in kinds:
    if kind.startswith('unix:'):
        s = socket.socket(socket.AF_UNIX); s.bind(kind[5:])
    else:
        host = kind[4:]
        s = socket.socket(socket.AF_INET); s.bind((host, 0))
    s.listen(16)
    high.append(fcntl.fcntl(s.fileno(), fcntl.F_DUPFD, 100)); s.detach()
for i, fd in enumerate(high):
    os.dup2(fd, 3 + i, inheritable=True); os.close(fd)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(kinds)), LISTEN_FDNAMES=names)
os.execvp(command[0], command)
`;

const RECEIVE = `
import socket, sys
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
s.bind(sys.argv[1].replace('@', chr(0), 1) if sys.argv[1].startswith('@') else sys.argv[1])
print('listening', flush=True)
while True: print(s.recv(4096).decode().replace(chr(10), ' '), flush=True)
`;

/** A child whose output is kept, and which does not outlive the test. */
function start(command: string, args: readonly string[], env: Record<string, string> = {}) {
  const child: ChildProcess = spawn(command, args, {
    env: { ...process.env, ...env },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  let out = '';
  let log = '';
  child.stdout?.setEncoding('utf8').on('data', (text: string) => (out += text));
  child.stderr?.setEncoding('utf8').on('data', (text: string) => (log += text));
  onTestFinished(async () => {
    child.kill('SIGKILL');
    await ended(child);
  });
  return { child, out: () => out, log: () => log };
}

interface Ready {
  readonly listeners: readonly string[];
}

function serve(kinds: readonly string[], names: string, args: readonly string[] = []): ReturnType<typeof start> {
  const store = path.join(temporaryDirectory(), 'store');
  const helper = ['-c', ACTIVATE, kinds.join(','), names];
  const serving = [process.execPath, BIN, 'serve', '--json', '--store', store, '--create', 'disk:1M', ...args];
  return start('python3', [...helper, ...serving]);
}

async function readyOf(started: ReturnType<typeof start>): Promise<Ready> {
  await waitUntil(
    () => started.out().includes('\n') || started.child.exitCode !== null,
    'the daemon is ready or has ended',
  );
  if (!started.out().includes('\n')) throw new Error(`the daemon ended: ${started.log()}`);
  return JSON.parse(started.out()) as Ready;
}

async function isServed(address: { path: string } | { host: string; port: number }): Promise<void> {
  const client = await NbdClient.connect(address);
  await client.go('disk');
  expect(await client.read(0, 512)).toEqual(Buffer.alloc(512));
  await client.disconnect();
}

describe('socket activation', () => {
  withPython('serves the sockets it was given, unix and TCP, instead of the default ones', async () => {
    const socket = path.join(temporaryDirectory(), 'given.sock');
    const started = serve([`unix:${socket}`, 'tcp:127.0.0.1'], 'local:lan');
    const { listeners } = await readyOf(started);
    expect(listeners).toHaveLength(2);
    expect(listeners[0]).toBe(`unix:${socket}`);
    const port = Number(/^tcp:127\.0\.0\.1:(\d+)$/.exec(listeners[1] ?? '')?.[1]);
    await isServed({ path: socket });
    await isServed({ host: '127.0.0.1', port });
    expect(started.log()).toContain('"name":"lan"');
    expect(started.log()).toContain(`"uid":${process.getuid?.()}`);
    started.child.kill('SIGTERM');
    expect(await ended(started.child)).toEqual({ code: 0, signal: null });
    // It belongs to systemd, which continues to listen for the next start.
    expect(fs.existsSync(socket)).toBe(true);
  });

  withPython('serves addresses of --listen beside them', async () => {
    const directory = temporaryDirectory();
    const own = path.join(directory, 'own.sock');
    const started = serve([`unix:${directory}/given.sock`], 'nbd', ['--listen', `unix:${own}`]);
    expect((await readyOf(started)).listeners).toHaveLength(2);
    await isServed({ path: own });
    await isServed({ path: path.join(directory, 'given.sock') });
  });

  withPython('serves clients that have connected before it was started', async () => {
    // The helper listens before the daemon runs: a client that connects in between waits in the backlog.
    const socket = path.join(temporaryDirectory(), 'given.sock');
    const started = serve([`unix:${socket}`], 'nbd');
    await waitUntil(() => fs.existsSync(socket), 'the socket is there');
    let client: NbdClient | undefined;
    await waitUntil(async () => {
      client = await NbdClient.connect({ path: socket }).catch(() => undefined);
      return client;
    }, 'a client is connected');
    await client?.go('disk');
    await client?.disconnect();
    await readyOf(started);
  });

  withPython('refuses a TCP socket that other machines can reach without TLS', async () => {
    const started = serve(['tcp:0.0.0.0'], 'nbd');
    expect((await ended(started.child)).code).toBe(1);
    await waitUntil(() => started.log().includes('can be reached from other machines'), 'it says why');
  });

  test('of a descriptor that is not a socket is an error', async () => {
    const started = start('sh', [
      '-c',
      'LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=odd exec 3</dev/null "$0" "$@"',
      ...[process.execPath, BIN, 'serve', '--store', path.join(temporaryDirectory(), 'store')],
    ]);
    expect((await ended(started.child)).code).toBe(1);
    await waitUntil(() => started.log().includes('"odd" of the socket unit'), 'it says which');
  });
});

describe('the example units', () => {
  const verify = haveCommand('systemd-analyze');
  if (!verify) console.log('skipped: systemd-analyze not installed, which checks unit files');
  (verify ? test : test.skip)('are what systemd understands', async () => {
    const directory = temporaryDirectory();
    const names = fs.readdirSync(EXAMPLES).filter((name) => /\.(service|socket|timer)$/.test(name));
    const units = names.map((name) => {
      const text = fs.readFileSync(path.join(EXAMPLES, name), 'utf8').replaceAll('/usr/bin/sheepgate', '/bin/true');
      fs.writeFileSync(path.join(directory, name), text);
      return path.join(directory, name);
    });
    const checked = await run('systemd-analyze', ['verify', '--man=no', ...units]);
    expect(checked.stderr.split('\n').filter((line) => line.includes('sheepgate'))).toEqual([]);
  });
});

describe('notification', () => {
  for (const kind of ['a path', 'an abstract name']) {
    withPython(`tells readiness, signs of life, reloads and the stop to ${kind}`, async () => {
      const directory = temporaryDirectory();
      const address =
        kind === 'a path' ? path.join(directory, 'notify') : `@sheepgate-test-${path.basename(directory)}`;
      const store = path.join(directory, 'store');
      const access = path.join(directory, 'access');
      fs.writeFileSync(access, 'allow * from any\n');
      const receiver = start('python3', ['-c', RECEIVE, address]);
      await waitUntil(() => receiver.out().includes('listening'), 'the receiver listens');
      const heard = (line: RegExp): Promise<unknown> =>
        waitUntil(() => line.test(receiver.out()), `${line} is heard in: ${receiver.out()}`);
      const started = start(
        process.execPath,
        [BIN, 'serve', '--store', store, '--listen', `unix:${directory}/s`, '--access', access],
        { NOTIFY_SOCKET: address, WATCHDOG_USEC: '100000' },
      );
      await heard(/^READY=1 STATUS=serving .*nbd|^READY=1 STATUS=serving /m);
      await heard(/^WATCHDOG=1$/m);
      started.child.kill('SIGHUP');
      await heard(/^RELOADING=1 MONOTONIC_USEC=\d+$/m);
      await waitUntil(() => receiver.out().match(/^READY=1/gm)?.length === 2, 'ready again after the reload');
      // The status has the settings in force, after a reload by any means.
      fs.writeFileSync(access, 'nonsense\n');
      expect((await cli(['reload'], { store })).code).toBe(1);
      await heard(/^READY=1 STATUS=serving .*; not reloaded: .*access:1: /m);
      fs.writeFileSync(access, 'allow * from any\n');
      expect((await cli(['reload'], { store })).code).toBe(0);
      await waitUntil(() => receiver.out().match(/^READY=1 (?!.*not reloaded)/gm)?.length === 3, 'all is well again');
      started.child.kill('SIGTERM');
      expect(await ended(started.child)).toEqual({ code: 0, signal: null });
      await heard(/^STOPPING=1/m);
    });
  }
});
