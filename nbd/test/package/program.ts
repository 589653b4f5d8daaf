/**
 * A small program of a user, which packed.test.ts compiles, bundles and runs with the packed library in every form: it serves a
 * disk in memory, uses it with the library's client, prints `ready`, and ends when its input ends. Its only imports are Node's
 * and the package, and no `await` is at the top: the same text is also a CommonJS module.
 *
 *     node program.mjs /tmp/ram.sock
 */
import { strict as assert } from 'node:assert';
import { DeviceError, ExportError, NbdServer, type BlockDevice, type ExportProvider } from 'nbd-server-ts';
import { ALLOCATION_CONTEXT } from 'nbd-server-ts/block-device';
import { NbdClient, NbdClientError } from 'nbd-server-ts/client';
import { DEFAULT_LIMITS, type Limits } from 'nbd-server-ts/limits';

const MEBIBYTE = 1024 * 1024;

class RamDisk implements BlockDevice {
  readonly geometry = { size: 4 * MEBIBYTE, canTrim: true };
  readonly #bytes = Buffer.alloc(this.geometry.size);

  read(offset: number, into: Buffer): void {
    this.#bytes.copy(into, 0, offset);
  }

  write(offset: number, data: Buffer): void {
    data.copy(this.#bytes, offset);
  }

  flush(): void {
    // Memory is all that there is.
  }

  trim(): void {
    throw new DeviceError('ENOSPC', 'no space to forget anything');
  }

  close(): void {
    // The next connection finds the disk as it is.
  }
}

const device = new RamDisk();
const info = { name: 'ram', description: 'a disk in memory' };

function find(name: string): { device: BlockDevice; geometry: BlockDevice['geometry']; info: typeof info } {
  if (name !== 'ram' && name !== '') throw new ExportError('UNKNOWN', `no export "${name}"`);
  return { device, geometry: device.geometry, info };
}

async function useAsClient(path: string): Promise<void> {
  const client = await NbdClient.connect({ path });
  const isUnknown = (error: unknown): boolean => error instanceof NbdClientError && error.code === 'UNKNOWN_EXPORT';
  await assert.rejects(client.info('absent'), isUnknown);
  const details = await client.go('ram');
  assert.equal(details.size, device.geometry.size);
  await client.write(MEBIBYTE - 2, Buffer.from('kept'));
  assert.equal((await client.read(MEBIBYTE - 2, 4)).toString(), 'kept');
  const isFull = (error: unknown): boolean => error instanceof NbdClientError && error.code === 'ENOSPC';
  await assert.rejects(client.trim(0, 4096), isFull);
  await client.disconnect();
}

async function main(path: string): Promise<void> {
  const provider: ExportProvider = { list: () => [info], describe: find, open: find };
  const limits: Partial<Limits> = { maxConnections: DEFAULT_LIMITS.maxConnections };
  const server = new NbdServer({ provider, limits });
  await server.listen({ path, mode: 0o600 });
  assert.equal(ALLOCATION_CONTEXT, 'base:allocation');
  await useAsClient(path);
  process.stdin.resume().once('end', () => void server.close());
  console.log('ready');
}

void main(process.argv[2] ?? 'ram.sock');
