/**
 * Other users of the machine at the control socket: a command sends nothing before it knows the user of the listener. Needs root,
 * to act as several users.
 */
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import net from 'node:net';
import path from 'node:path';
import { describe, expect, test } from 'vitest';
import { ControlClient } from '../../src/operations/control-client.js';
import { controlSocketOf } from '../../src/operations/default-paths.js';
import { mustBeTrusted, trustedSocket } from '../../src/operations/socket-trust.js';
import { clusterLocation } from '../../src/store/sheep/cluster-address.js';
import { cli, haveCommand, start, startDaemon, temporaryDirectory, waitUntil } from '../harness/daemon.js';
import { oneLineOf } from '../cli/both-ways.js';

/** User ids without names, unused on any machine. */
const MALLORY = 54_321;
const ALICE = 54_323;

const isRoot = process.geteuid?.() === 0 && haveCommand('setpriv');
if (!isRoot) console.log('skipped: other users at the control socket need root and setpriv');

/** Answers every request with success, and records what it was sent. */
const IMPOSTOR = `
const fs = require('node:fs');
const [socketPath, mode] = process.argv.slice(1);
const server = require('node:net').createServer((socket) => {
  socket.on('error', () => undefined);
  socket.on('data', (data) => {
    fs.appendFileSync(socketPath + '.heard', data);
    socket.end('HTTP/1.1 200 OK\\r\\ncontent-type: application/json\\r\\ncontent-length: 2\\r\\n\\r\\n{}');
  });
});
server.listen(socketPath, () => {
  fs.chmodSync(socketPath, parseInt(mode, 8));
  console.log('listening');
});
`;

/** `mode`: of the socket, in octal. Returns the bytes received so far. */
async function impostor(socket: string, uid: number, mode = '666'): Promise<() => string> {
  const identity = [`--reuid=${uid}`, `--regid=${uid}`, '--clear-groups'];
  const child = start('setpriv', [...identity, process.execPath, '-e', IMPOSTOR, socket, mode]);
  let out = '';
  child.stdout.setEncoding('utf8').on('data', (text: string) => (out += text));
  await waitUntil(() => out.includes('listening'), 'the impostor listens');
  return () => (fs.existsSync(`${socket}.heard`) ? fs.readFileSync(`${socket}.heard`, 'utf8') : '');
}

function directoryOf(uid: number, parent = temporaryDirectory(), mode = 0o755): string {
  fs.chmodSync(parent, 0o755);
  const directory = path.join(parent, 'd');
  fs.mkdirSync(directory);
  fs.chownSync(directory, uid, uid);
  fs.chmodSync(directory, mode);
  return directory;
}

/** A socket that no process listens on any more. */
function socketIn(directory: string, uid: number, mode = 0o600): string {
  const socket = path.join(directory, 'control.sock');
  // Killed: closing in order would remove the file.
  execFileSync(process.execPath, [
    '-e',
    "require('net').createServer().listen(process.argv[1], () => process.reallyExit(0))",
    socket,
  ]);
  fs.chownSync(socket, uid, uid);
  fs.chmodSync(socket, mode);
  return socket;
}

const uidsAt = (socket: string, self: number): number[] => [...trustedSocket(socket, self).uids].sort((a, b) => a - b);

describe.skipIf(!isRoot)('the control socket', () => {
  test('of a cluster’s daemon is not trusted where another user has made it first: nothing is sent there', async () => {
    const runtime = temporaryDirectory();
    fs.chmodSync(runtime, 0o1777);
    const env = { XDG_RUNTIME_DIR: runtime };
    fs.mkdirSync(path.join(runtime, 'sheepgate'));
    fs.chownSync(path.join(runtime, 'sheepgate'), MALLORY, MALLORY);
    const name = path.basename(controlSocketOf(clusterLocation('127.0.0.1:1')));
    const heard = await impostor(path.join(runtime, 'sheepgate', name), MALLORY);
    const image = path.join(temporaryDirectory(), 'image');
    fs.writeFileSync(image, 'secret'.repeat(1000));
    for (const args of [
      ['vdi', 'list'],
      ['vdi', 'snapshot', 'vm1', 't'],
      ['vdi', 'delete', 'vm1'],
      ['import', image, 'vm1'],
    ]) {
      const refused = oneLineOf(await cli([...args, '--cluster', '127.0.0.1:1'], { env }), 1, args.join(' '));
      expect(refused).toMatch(
        /nothing was sent to the control socket .*its directory belongs to uid 54321, which is neither/,
      );
    }
    // A daemon does not make its sockets there either.
    const served = await cli(['serve', '--store', path.join(temporaryDirectory(), 'store')], { env });
    expect(oneLineOf(served, 1, 'serve')).toMatch(/sheepgate is not a directory that only this user can write to/);
    expect(heard()).toBe('');
    // It would have received any request.
    net
      .connect(path.join(runtime, 'sheepgate', name))
      .on('error', () => undefined)
      .end('hello');
    await waitUntil(() => heard() === 'hello', 'the impostor hears');
  });

  test('is not trusted where another user has put it into a directory of ours, or has taken it over', async () => {
    const directory = directoryOf(0, undefined, 0o1777);
    const socket = path.join(directory, 'control.sock');
    const heard = await impostor(socket, MALLORY);
    const client = new ControlClient(socket);
    const why = { code: 'UNTRUSTED', message: expect.stringContaining('it belongs to uid 54321') as unknown };
    await expect(client.status()).rejects.toMatchObject(why);
    await expect(client.upgrade()).rejects.toMatchObject(why);
    // The file looks right: only the kernel knows the user of the listener.
    fs.chownSync(socket, 0, 0);
    fs.chmodSync(socket, 0o600);
    const listens = { code: 'UNTRUSTED', message: expect.stringContaining('uid 54321 listens there') as unknown };
    await expect(client.status()).rejects.toMatchObject(listens);
    await expect(client.upgrade()).rejects.toMatchObject(listens);
    expect(heard()).toBe('');
  });

  test('may belong to this user, to root, or to the user for whom root has made its directory', () => {
    const service = socketIn(directoryOf(ALICE), ALICE, 0o660);
    expect(uidsAt(service, 1)).toEqual([0, 1, ALICE]);
    expect(uidsAt(service, 0)).toEqual([0, ALICE]);
    expect(() => mustBeTrusted(trustedSocket(service, 1), ALICE, 1)).not.toThrow();
    expect(() => mustBeTrusted(trustedSocket(service, 1), MALLORY, 1)).toThrow(/uid 54321 listens there/);
    expect(() => mustBeTrusted(trustedSocket(service, 1), undefined, 1)).toThrow(/does not report which user listens/);
    // Below a directory of that user the owner of a directory proves nothing: only that user herself trusts it.
    const own = socketIn(directoryOf(ALICE, directoryOf(ALICE)), ALICE);
    expect(uidsAt(own, ALICE)).toEqual([0, ALICE]);
    expect(() => trustedSocket(own, 1)).toThrow(/its directory belongs to uid 54323/);
    expect(() => trustedSocket(own, 0)).toThrow(/setpriv --reuid=54323/);
    // As in /tmp, where the first user to come makes it.
    const shared = temporaryDirectory();
    const first = socketIn(directoryOf(ALICE, shared), ALICE);
    fs.chmodSync(shared, 0o1777);
    expect(() => trustedSocket(first, 1)).toThrow(/its directory belongs to uid 54323/);
    fs.chmodSync(shared, 0o775);
    expect(() => trustedSocket(first, 1)).toThrow(/its directory belongs to uid 54323/);
  });

  test('is not used where every user can replace it or send commands to it, nor through a link of another user', () => {
    const open = socketIn(directoryOf(0, undefined, 0o777), 0);
    expect(() => trustedSocket(open)).toThrow(
      /every user of this machine can put a socket in the place of .*'chmod o-w /,
    );
    fs.chmodSync(path.dirname(open), 0o1777);
    expect(uidsAt(open, 0)).toEqual([0]);
    const loose = socketIn(directoryOf(0), 0, 0o666);
    expect(() => trustedSocket(loose)).toThrow(/every user of this machine can send commands to .*'chmod o-w /);
    fs.chmodSync(path.dirname(loose), 0o750);
    expect(uidsAt(loose, 0)).toEqual([0]);

    const link = path.join(directoryOf(MALLORY, directoryOf(MALLORY)), 'control.sock');
    fs.symlinkSync(loose, link);
    expect(() => trustedSocket(link)).toThrow(/its directory belongs to uid 54321/);
    const own = path.join(directoryOf(0), 'control.sock');
    fs.symlinkSync(loose, own);
    expect(trustedSocket(own)).toMatchObject({ path: loose });
  });

  test('of a daemon whose directory every user can write to is refused to commands, and the daemon’s log says so', async () => {
    const directory = directoryOf(0, undefined, 0o777);
    const control = path.join(directory, 'control.sock');
    const daemon = await startDaemon({ args: ['--control', control] });
    await daemon.logged(/"level":40.*every user of this machine can put a socket in the place of/);
    const refused = await cli(['vdi', 'list', '--control', control]);
    expect(oneLineOf(refused, 1, 'vdi list')).toMatch(/'chmod o-w .*' first/);
    fs.chmodSync(directory, 0o755);
    expect(await cli(['vdi', 'list', '--control', control])).toMatchObject({ code: 0, stderr: '' });
    expect((await daemon.stop()).code).toBe(0);
  });
});
