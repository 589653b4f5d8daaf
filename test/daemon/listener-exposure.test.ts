/** Which users can connect by default, and the warning when others can. */
import fs from 'node:fs';
import path from 'node:path';
import { expect, test } from 'vitest';
import { NbdClient } from 'nbd-server-ts';
import { exposureOf } from '../../src/daemon/security/listener-exposure.js';
import type { ListenAddress } from '../../src/daemon/listen-address.js';
import { BIN, ended, run, start, temporaryDirectory, waitUntil } from '../harness/daemon.js';

/** `serve` on a store of its own, as on a terminal, until it is ready. */
async function serving(env: Readonly<Record<string, string>>, ...args: string[]) {
  const store = path.join(temporaryDirectory(), 'store');
  const settings = Object.entries(env).map(([name, value]) => `${name}=${value}`);
  const command = [process.execPath, BIN, 'serve', '--store', store, '--create', 'disk:1M', ...args];
  const child = start('env', [...settings, ...command]);
  let out = '';
  let log = '';
  child.stdout.setEncoding('utf8').on('data', (text: string) => (out += text));
  child.stderr.setEncoding('utf8').on('data', (text: string) => (log += text));
  await waitUntil(() => out.includes('Ctrl-C') || child.exitCode !== null, 'it is ready');
  const stop = async () => {
    child.kill('SIGTERM');
    expect(await ended(child)).toEqual({ code: 0, signal: null });
  };
  return { pid: child.pid, stop, out: () => out, log: () => log };
}

/** The TCP sockets of a process, in any state. */
function tcpSocketsOf(pid: number | undefined): string[] {
  const own = new Set<string>();
  for (const fd of fs.readdirSync(`/proc/${pid}/fd`)) own.add(fs.readlinkSync(`/proc/${pid}/fd/${fd}`));
  return ['tcp', 'tcp6'].flatMap((kind) =>
    fs
      .readFileSync(`/proc/${pid}/net/${kind}`, 'utf8')
      .split('\n')
      .filter((line) => own.has(`socket:[${line.trim().split(/\s+/)[9]}]`)),
  );
}

test('by default serve listens on a unix socket that only this user can connect to, and on nothing else', async () => {
  const runtime = temporaryDirectory();
  const daemon = await serving({ XDG_RUNTIME_DIR: runtime });
  const socket = path.join(runtime, 'sheepgate', 'nbd.sock');
  expect(daemon.out()).toMatch(/^serving .*\n {2}nbd\+unix:.*\n'sheepgate vdi list' shows the VDIs, Ctrl-C stops\n$/);
  expect(fs.statSync(socket).mode & 0o777).toBe(0o600);
  expect(fs.statSync(path.dirname(socket)).mode & 0o777).toBe(0o700);
  expect(tcpSocketsOf(daemon.pid)).toEqual([]);
  const client = await NbdClient.connect({ path: socket });
  expect(await client.go('disk')).toMatchObject({ size: 2 ** 20 });
  await client.disconnect();
  expect(daemon.log()).not.toMatch(/"level":[456]0/);
  const help = await run(process.execPath, [BIN, 'serve', '--help'], { env: { XDG_RUNTIME_DIR: runtime } });
  expect(help.stdout.replace(/\s+/g, ' ')).toContain(`(default: unix:${socket}, and no TCP)`);
  await daemon.stop();
});

test('TCP is served on request, with a warning on the terminal and in the log', async () => {
  const daemon = await serving({}, '--listen', 'tcp:127.0.0.1:0');
  const warning =
    /tcp:127\.0\.0\.1:\d+: every user of this machine can read and write every VDI there, because it has neither TLS/;
  expect(daemon.out()).toMatch(new RegExp(`\\nnote: ${warning.source}`));
  const line = daemon
    .log()
    .split('\n')
    .find((each) => warning.test(each));
  expect(JSON.parse(line ?? '{}')).toMatchObject({ level: 40, listener: expect.stringMatching(/^tcp:/) as unknown });
  expect(tcpSocketsOf(daemon.pid)).toHaveLength(1);
  await daemon.stop();
});

test('the warning names the users who can connect if there is neither TLS nor an access file', () => {
  const directory = temporaryDirectory();
  fs.chmodSync(directory, 0o755);
  const file = (mode: number): ListenAddress => {
    const name = path.join(directory, mode.toString(8));
    fs.writeFileSync(name, '');
    fs.chmodSync(name, mode);
    return { transport: 'unix', path: name };
  };
  const tcp = (host: string): ListenAddress => ({ transport: 'tcp', host, port: 1 });
  const users = /every user of this machine can read and write every VDI there/;
  for (const host of ['127.0.0.1', '127.3.2.1', '::1', 'localhost']) expect(exposureOf(tcp(host))).toMatch(users);
  for (const host of ['0.0.0.0', '::', '192.0.2.1']) expect(exposureOf(tcp(host))).toMatch(/everybody who can reach/);
  expect(exposureOf({ transport: 'unix', path: '@abstract' })).toMatch(users);
  expect(exposureOf(file(0o666))).toMatch(users);
  for (const mode of [0o600, 0o660, 0o644]) expect(exposureOf(file(mode))).toBeUndefined();
  // A user who may not enter the directory cannot connect.
  fs.chmodSync(directory, 0o750);
  expect(exposureOf({ transport: 'unix', path: path.join(directory, '666') })).toBeUndefined();

  const everywhere = tcp('0.0.0.0');
  expect(exposureOf(everywhere, { access: '/etc/access' })).toBeUndefined();
  expect(exposureOf(everywhere, { tls: { mode: 'require', verifyPeer: true, certificates: '/c' } })).toBeUndefined();
  expect(exposureOf(everywhere, { tls: { mode: 'require', verifyPeer: false, psk: '/k' } })).toBeUndefined();
  expect(exposureOf(everywhere, { tls: { mode: 'require', verifyPeer: false, certificates: '/c' } })).toMatch(
    /clients need no certificate \(--tls-verify-peer\)/,
  );
  const tls = { verifyPeer: true, certificates: '/c' };
  expect(exposureOf(everywhere, { tls: { mode: 'off', ...tls } })).toMatch(/neither TLS nor/);
  expect(exposureOf(everywhere, { tls: { mode: 'on', ...tls } })).toMatch(
    /clients may connect without TLS \(unless --tls require is given\)/,
  );
});

test('the socket unit listens where only the service’s group can connect', () => {
  const unit = fs.readFileSync(path.resolve(import.meta.dirname, '../../examples/systemd/sheepgate.socket'), 'utf8');
  expect(unit.match(/^ListenStream=.*$/gm)).toEqual(['ListenStream=/run/sheepgate/nbd.sock']);
  expect(unit).toMatch(/^SocketMode=0660$/m);
});
