/**
 * A network that drops without a word: the client is in a network namespace of its own, and its end of the cable is taken
 * down. The daemon must find out by itself, whether it waits for the client or the client for it. Needs root; owns the
 * namespace and the cable.
 */
import { execFileSync, spawn, type ChildProcess } from 'node:child_process';
import { afterEach, expect, test } from 'vitest';
import { ended, haveNbdsh, skipBecause, startDaemon, waitUntil } from '../harness/daemon.js';
import { storeWith } from '../cli/both-ways.js';

const NAMESPACE = `sheepgate-${process.pid}`;
/** Interface names are 15 bytes at most. */
const HOST_END = `sgh${process.pid}`;
const CLIENT_END = `sgc${process.pid}`;
/** Of the documentation range: nobody's. */
const HOST = '192.0.2.1';
const CLIENT = '192.0.2.2';

const ip = (...args: string[]): void => void execFileSync('ip', args, { stdio: ['ignore', 'ignore', 'pipe'] });
const clients: ChildProcess[] = [];

afterEach(async () => {
  for (const client of clients) client.kill('SIGKILL');
  await Promise.all(clients.splice(0).map(ended));
  for (const args of [
    ['link', 'del', HOST_END],
    ['netns', 'del', NAMESPACE],
  ]) {
    try {
      ip(...args);
    } catch {
      // was never made
    }
  }
});

/** libnbd's shell in the namespace: runs `script`, then waits. Resolves when it has printed a line. */
async function shellInNamespace(script: string): Promise<ChildProcess> {
  const code = `import nbd, sys; h = nbd.NBD(); ${script}; print("open", flush=True); sys.stdin.read()`;
  const shell = spawn('ip', ['netns', 'exec', NAMESPACE, '/usr/bin/python3', '-c', code], {
    stdio: ['pipe', 'pipe', 'inherit'],
  });
  clients.push(shell);
  await new Promise((resolve, reject) => {
    shell.stdout.once('data', resolve);
    shell.once('exit', () => reject(new Error('the shell ended')));
  });
  return shell;
}

test('a network that drops silently lets go of NAME@now, also while answers are on their way', async (context) => {
  if (!haveNbdsh()) return skipBecause(context, 'python3-libnbd is not installed');
  try {
    ip('netns', 'add', NAMESPACE);
    ip('link', 'add', HOST_END, 'type', 'veth', 'peer', 'name', CLIENT_END, 'netns', NAMESPACE);
    ip('addr', 'add', `${HOST}/30`, 'dev', HOST_END);
    ip('link', 'set', HOST_END, 'up');
    ip('netns', 'exec', NAMESPACE, 'ip', 'addr', 'add', `${CLIENT}/30`, 'dev', CLIENT_END);
    ip('netns', 'exec', NAMESPACE, 'ip', 'link', 'set', CLIENT_END, 'up');
  } catch (error) {
    return skipBecause(context, `no network namespaces here: ${(error as Error).message.trim()}`);
  }
  const daemon = await startDaemon({
    args: ['--listen', `tcp:${HOST}:0`, '--allow-plaintext', '--create', 'disk:256M', '--keep-alive', '1'],
  });
  const target = storeWith(daemon.store, daemon);
  const uri = (name: string): string =>
    (daemon.ready.uris.find((one) => one.startsWith('nbd://')) as string).replace(/[^/]*$/, encodeURIComponent(name));
  await shellInNamespace(`h.connect_uri("${uri('disk@now:quiet')}")`);
  // Asks for more than the sockets hold and takes none of it: the daemon is in the middle of sending.
  await shellInNamespace(
    `h.connect_uri("${uri('disk@now:busy')}"); [h.aio_pread(nbd.Buffer(2**24), n * 2**24) for n in range(4)]`,
  );
  expect((await target.names()).sort()).toEqual(['disk', 'disk@now:busy', 'disk@now:quiet']);
  ip('netns', 'exec', NAMESPACE, 'ip', 'link', 'set', CLIENT_END, 'down');
  await waitUntil(async () => (await target.names()).length === 1, 'both are gone', 60_000);
  expect(await target.names()).toEqual(['disk']);
}, 120_000);
