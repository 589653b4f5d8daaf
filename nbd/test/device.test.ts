/** The required and optional methods of a device, and the transmission flags that follow from them. */

import { join } from 'node:path';
import { expect, onTestFinished, test } from 'vitest';
import { NbdClient, NbdServer, type BlockDevice, type DeviceGeometry } from '../src/index.js';
import { temporaryDirectory } from './test-server.js';

const SIZE = 1024 * 1024;

/** A device with the four required methods only. */
function memory(geometry: Partial<DeviceGeometry> = {}): BlockDevice {
  const disk = Buffer.alloc(SIZE);
  return {
    geometry: { size: SIZE, ...geometry },
    read: (offset, into) => void disk.copy(into, 0, offset),
    write: (offset, data) => void data.copy(disk, offset),
    flush: () => undefined,
    close: () => undefined,
  };
}

async function connect(device: BlockDevice): Promise<{ client: NbdClient; errors: string[] }> {
  const path = join(await temporaryDirectory(), 'nbd.sock');
  const info = { name: 'disk', description: '' };
  const errors: string[] = [];
  const server = new NbdServer({
    provider: {
      list: () => [info],
      describe: () => ({ geometry: device.geometry, info }),
      open: () => ({ device, info }),
    },
    observer: { onError: (error) => errors.push((error as Error).message) },
  });
  onTestFinished(() => server.destroy());
  await server.listen({ path });
  const client = await NbdClient.connect({ path });
  onTestFinished(() => client.destroy());
  return { client, errors };
}

test('a device with a size and four methods is a writable disk that can flush', async () => {
  const { client } = await connect(memory());
  const told = {
    ...{
      size: SIZE,
      readOnly: false,
      minimumBlockSize: 1,
      preferredBlockSize: 4096,
      canFlush: true,
      rotational: false,
    },
    ...{ canFua: false, canTrim: false, canZero: false, canFastZero: false, canCache: false, multiConn: false },
  };
  expect(await client.info('disk')).toMatchObject(told);
  expect(await client.go('disk')).toMatchObject(told);
  await client.write(4095, Buffer.from('kept'));
  await client.flush();
  expect((await client.read(4095, 4)).toString()).toBe('kept');
  expect(client.contexts).toEqual([]);
  for (const refused of [client.trim(0, 4096), client.zero(0, 4096), client.cache(0, 4096)]) {
    await expect(refused).rejects.toMatchObject({ code: 'EINVAL' });
  }
});

test('a long read from a device without extents is one read', async () => {
  const { client } = await connect(memory());
  await client.go('disk');
  await client.write(0, Buffer.alloc(SIZE, 7));
  expect((await client.read(0, SIZE)).equals(Buffer.alloc(SIZE, 7))).toBe(true);
});

test('the preferred block size is at least the minimum block size of the device', async () => {
  const { client } = await connect(memory({ minimumBlockSize: 8192 }));
  expect(await client.go('disk')).toMatchObject({ minimumBlockSize: 8192, preferredBlockSize: 8192 });
});

test.each([
  [{ canTrim: true }, 'canTrim without a method trim'],
  [{ canZero: true }, 'canZero without a method zero'],
  [{ canCache: true }, 'canCache without a method cache'],
  [{ contexts: ['base:allocation'] }, 'contexts without a method extents'],
])('a device that announces %o and has no method for it is not served', async (geometry, problem) => {
  const { client, errors } = await connect(memory(geometry));
  await expect(client.go('disk')).rejects.toMatchObject({ code: 'UNKNOWN_EXPORT' });
  expect(errors).toEqual([`export "disk" cannot be served: ${problem}`]);
});
