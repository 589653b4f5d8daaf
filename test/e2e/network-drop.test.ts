/**
 * A network that fails silently: the client is in its own network namespace, and its end of the virtual cable is taken down.
 * The daemon must detect that by itself, whether it waits for the client or the client for the daemon. Needs root; owns the
 * namespaces and the cable between them.
 */
import { execFileSync, spawn, type ChildProcess } from 'node:child_process';
import { afterEach, expect, test } from 'vitest';
import { clientSet, inSet } from '../harness/client-set.js';
import { ended, haveNbdsh, skipBecause, startDaemon, waitUntil } from '../harness/daemon.js';
import { attach, MIB, storeWith } from '../cli/both-ways.js';

const SERVER_SIDE = `sheepgate-a-${process.pid}`;
const CLIENT_SIDE = `sheepgate-b-${process.pid}`;
const CABLE = 'sg0';
/** An address of the documentation range, in use nowhere. */
const SERVER = '192.0.2.1';
const CLIENT = '192.0.2.2';

const ip = (...args: string[]): void => void execFileSync('ip', args, { stdio: ['ignore', 'ignore', 'pipe'] });
const clients: ChildProcess[] = [];

afterEach(async () => {
  for (const client of clients) client.kill('SIGKILL');
  await Promise.all(clients.splice(0).map(ended));
  for (const side of [SERVER_SIDE, CLIENT_SIDE]) {
    try {
      ip('netns', 'del', side); // and its end of the cable
    } catch {
      // was never made
    }
  }
});

/** libnbd's shell in the namespace: runs `script`, then waits. Resolves when the script has printed a line. */
async function shellInNamespace(script: string): Promise<ChildProcess> {
  const code = `import nbd, sys; h = nbd.NBD(); ${script}; print("open", flush=True); sys.stdin.read()`;
  const shell = spawn('ip', ['netns', 'exec', CLIENT_SIDE, ...inSet(clientSet, '/usr/bin/python3', ['-c', code])], {
    stdio: ['pipe', 'pipe', 'inherit'],
  });
  clients.push(shell);
  await new Promise((resolve, reject) => {
    shell.stdout.once('data', resolve);
    shell.once('exit', () => reject(new Error('the shell ended')));
  });
  return shell;
}

test('NAME@now is dropped when the network of its reader fails silently, also while replies are being sent', async (context) => {
  if (!haveNbdsh()) return skipBecause(context, 'python3-libnbd is not installed');
  try {
    for (const side of [SERVER_SIDE, CLIENT_SIDE]) ip('netns', 'add', side);
    ip('link', 'add', CABLE, 'netns', SERVER_SIDE, 'type', 'veth', 'peer', 'name', CABLE, 'netns', CLIENT_SIDE);
    for (const [side, address] of [
      [SERVER_SIDE, SERVER],
      [CLIENT_SIDE, CLIENT],
    ] as const) {
      ip('-n', side, 'addr', 'add', `${address}/30`, 'dev', CABLE);
      ip('-n', side, 'link', 'set', CABLE, 'up');
    }
  } catch (error) {
    return skipBecause(context, `no network namespaces here: ${(error as Error).message.trim()}`);
  }
  const daemon = await startDaemon({
    under: ['ip', 'netns', 'exec', SERVER_SIDE],
    args: [
      '--listen',
      `tcp:${SERVER}:0`,
      '--allow-plaintext',
      '--create',
      'disk:256M',
      '--keep-alive',
      '1',
      '--keep-now',
      '1',
    ],
  });
  const target = storeWith(daemon.store, daemon);
  const uri = (name: string): string =>
    (daemon.ready.uris.find((one) => one.startsWith('nbd://')) as string).replace(/[^/]*$/, encodeURIComponent(name));
  const writer = await attach(daemon, 'disk');
  for (let at = 0; at < 64 * MIB; at += 4 * MIB) await writer.write(at, Buffer.alloc(4 * MIB, 1));
  await writer.disconnect();
  await shellInNamespace(`h.connect_uri("${uri('disk@now:quiet')}")`);
  // Requests more than the sockets hold and reads nothing: the daemon is in the middle of sending.
  await shellInNamespace(
    `h.connect_uri("${uri('disk@now:busy')}"); [h.aio_pread(nbd.Buffer(2**24), n * 2**24) for n in range(4)]`,
  );
  expect((await target.names()).sort()).toEqual(['disk', 'disk@now:busy', 'disk@now:quiet']);
  // An exclusive writer that is gone loses the disk to a client that takes over.
  await shellInNamespace(`h.connect_uri("${uri('disk/exclusive')}"); h.pwrite(b"1" * 4096, 0)`);
  await expect(attach(daemon, 'disk/exclusive=take-over')).rejects.toThrow(/tcp 192.0.2.2, which still answers/);
  ip('-n', CLIENT_SIDE, 'link', 'set', CABLE, 'down');
  const newcomer = await attach(daemon, 'disk/exclusive=take-over');
  await daemon.logged('disk: tcp 192.0.2.2 did not answer and is cut off');
  await newcomer.write(0, Buffer.alloc(MIB, 2));
  await newcomer.disconnect();
  await waitUntil(async () => (await target.names()).length === 1, 'both are gone', 60_000);
  expect(await target.names()).toEqual(['disk']);
}, 120_000);
