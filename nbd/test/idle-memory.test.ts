/** The memory of connections that are open and quiet, whatever they did before: measured in a process of their server. */
import { fork, type ChildProcess } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import net from 'node:net';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect, onTestFinished, test } from 'vitest';
import { NbdClient, type ClientOptions } from '../src/index.js';
import { temporaryDirectory } from './test-server.js';

const KIB = 1024;
const MIB = 1024 * KIB;
/** Heap and buffers of one quiet connection, bytes. It was 220 KiB after a burst of writes, about 10 KiB now. */
const MOST_BYTES = 64 * KIB;
/** Time limit for a condition, milliseconds. */
const CONDITION_BOUND_MS = 10_000;

interface Usage {
  /** Of the JavaScript heap and of buffers, without blocks kept for the next requests: they belong to no connection. */
  readonly bytes: number;
  readonly rss: number;
  readonly connections: number;
}

interface IdleServer {
  readonly path: string;
  readonly tlsPath: string;
  readonly port: number;
  readonly key: Buffer;
  usage(): Promise<Usage>;
}

async function startIdleServer(): Promise<IdleServer> {
  const directory = await temporaryDirectory();
  const path = join(directory, 'nbd.sock');
  const tlsPath = join(directory, 'tls.sock');
  const key = randomBytes(32);
  const script = fileURLToPath(new URL('idle-server.mjs', import.meta.url));
  const child = fork(script, [path, tlsPath, key.toString('hex')], { execArgv: ['--expose-gc'] });
  onTestFinished(() => void child.kill());
  const { port } = (await answerOf(child)) as { port: number };
  return {
    ...{ path, tlsPath, key, port },
    usage: async () => {
      child.send({});
      return (await answerOf(child)) as Usage;
    },
  };
}

async function answerOf(child: ChildProcess): Promise<unknown> {
  const [answer] = (await once(child, 'message', { signal: AbortSignal.timeout(CONDITION_BOUND_MS) })) as unknown[];
  return answer;
}

/** The usage once `condition` holds of it. */
async function usageWhen(server: IdleServer, condition: (usage: Usage) => boolean, what: string): Promise<Usage> {
  const end = Date.now() + CONDITION_BOUND_MS;
  for (;;) {
    const usage = await server.usage();
    if (condition(usage)) return usage;
    if (Date.now() > end) throw new Error(`waited until ${what}, and found ${JSON.stringify(usage)}`);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

/** What a client does before it is quiet. */
const STATES = {
  'in the handshake': async (to: ClientOptions) => {
    const socket = net.connect(to as net.NetConnectOpts);
    await new Promise((resolve) => socket.once('data', resolve));
    return socket;
  },
  'after it has opened the export': opened,
  'after a burst of 32 small reads and writes': async (to: ClientOptions) => {
    const client = await opened(to);
    const requests = Array.from({ length: 32 }, (_, n) => [
      client.read(4 * KIB * n, 4 * KIB),
      client.write(4 * KIB * n, Buffer.alloc(4 * KIB)),
    ]);
    await Promise.all(requests.flat());
    return client;
  },
  'after a read and a write of 1 MiB': async (to: ClientOptions) => {
    const client = await opened(to);
    await Promise.all([client.read(0, MIB), client.write(0, Buffer.alloc(MIB))]);
    return client;
  },
  'after a read and a write of 32 MiB': async (to: ClientOptions) => {
    const client = await opened(to);
    await client.read(0, 32 * MIB);
    await client.write(0, Buffer.alloc(32 * MIB));
    return client;
  },
};

async function opened(to: ClientOptions): Promise<NbdClient> {
  const client = await NbdClient.connect(to);
  await client.go('disk');
  return client;
}

/** Opens connections, one after the other; they are closed with the test. */
async function open(count: number, one: () => Promise<{ destroy(): void }>): Promise<{ destroy(): void }[]> {
  const all: { destroy(): void }[] = [];
  onTestFinished(() => {
    for (const client of all) client.destroy();
  });
  for (let n = 0; n < count; n++) all.push(await one());
  return all;
}

test.each([
  ['unix', 'in the handshake', 40],
  ['unix', 'after it has opened the export', 40],
  ['unix', 'after a burst of 32 small reads and writes', 40],
  ['tcp', 'after a burst of 32 small reads and writes', 40],
  ['unix', 'after a read and a write of 1 MiB', 40],
  ['tcp', 'after a read and a write of 32 MiB', 16],
] as const)('a connection over %s costs little %s', async (transport, state, count) => {
  const server = await startIdleServer();
  const to = transport === 'unix' ? { path: server.path } : { host: '127.0.0.1', port: server.port };
  const begin = (): Promise<{ destroy(): void }> => STATES[state](to);
  // Code is compiled and tables grow with the first connections.
  for (const client of await open(count >> 2, begin)) client.destroy();
  const base = await usageWhen(server, ({ connections }) => connections === 0, 'the first ones are over');
  await open(count, begin);
  const isLittle = (usage: Usage): boolean => (usage.bytes - base.bytes) / count < MOST_BYTES;
  const used = await usageWhen(server, isLittle, `${count} connections cost less than ${MOST_BYTES} bytes each`);
  expect(used.connections).toBe(count);
});

test('a connection under TLS does not keep what the encryption of a long reply needed', async () => {
  const server = await startIdleServer();
  const to = { path: server.tlsPath, tls: { psk: { user: 'test', key: server.key } } };
  const readLong = async (): Promise<NbdClient> => {
    const client = await opened(to);
    await client.read(0, 8 * MIB);
    return client;
  };
  for (const client of await open(3, readLong)) client.destroy();
  const base = await usageWhen(server, ({ connections }) => connections === 0, 'the first ones are over');
  await open(12, readLong);
  const { rss } = await server.usage();
  // It was 8 MiB. The rest is memory of Node and OpenSSL, and free memory that the C library keeps.
  expect((rss - base.rss) / 12).toBeLessThan(2 * MIB);
});
