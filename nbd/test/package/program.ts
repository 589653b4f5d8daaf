/**
 * A small program of a user, which packed.test.ts compiles, bundles and runs with the packed library in every form: it serves a
 * disk in memory, uses it with the library's client, prints `ready`, and ends when its input ends. Its only imports are Node's
 * and the package, and no `await` is at the top: the same text is also a CommonJS module.
 *
 *     node program.mjs /tmp/ram.sock
 */
import { strict as assert } from 'node:assert';
import { DeviceError, serve, type Device } from 'nbd-server-ts';
import { ALLOCATION_CONTEXT } from 'nbd-server-ts/block-device';
import { NbdClient, NbdClientError } from 'nbd-server-ts/client';
import { DEFAULT_LIMITS, type Limits } from 'nbd-server-ts/limits';
import { memoryDevice } from 'nbd-server-ts/memory';
import { stats } from 'nbd-server-ts/stats';

const MEBIBYTE = 1024 * 1024;

const disk = Buffer.alloc(4 * MEBIBYTE);
const device: Device = {
  size: disk.length,
  read: (offset, into) => disk.copy(into, 0, offset),
  write: (offset, data) => {
    disk.set(data, offset);
  },
  trim: () => {
    throw new DeviceError('ENOSPC', 'no space to forget anything');
  },
};

async function useAsClient(path: string): Promise<void> {
  const client = await NbdClient.connect({ path });
  const isUnknown = (error: unknown): boolean => error instanceof NbdClientError && error.code === 'UNKNOWN_EXPORT';
  await assert.rejects(client.info('absent'), isUnknown);
  const details = await client.go('ram');
  assert.equal(details.size, disk.length);
  await client.write(MEBIBYTE - 2, Buffer.from('kept'));
  assert.equal((await client.read(MEBIBYTE - 2, 4)).toString(), 'kept');
  const isFull = (error: unknown): boolean => error instanceof NbdClientError && error.code === 'ENOSPC';
  await assert.rejects(client.trim(0, 4096), isFull);
  await client.disconnect();
}

async function main(path: string): Promise<void> {
  const limits: Partial<Limits> = { maxConnections: DEFAULT_LIMITS.maxConnections };
  const counted = stats(device);
  const server = await serve({ path }, counted, { name: 'ram', mode: 0o600, limits });
  assert.ok(memoryDevice(MEBIBYTE).geometry.contexts.includes(ALLOCATION_CONTEXT));
  await useAsClient(path);
  assert.equal(counted.counters.write.requests, 1);
  process.stdin.resume().once('end', () => void server.close());
  console.log('ready');
}

void main(process.argv[2] ?? 'ram.sock');
