/** Long reads and writes are done in pieces of what the server takes; extents of whole disks are iterated. */

import { setTimeout as sleep } from 'node:timers/promises';
import { describe, expect, onTestFinished, test } from 'vitest';
import {
  DeviceError,
  MAX_PAYLOAD,
  NbdClient,
  STATE_HOLE,
  STATE_ZERO,
  type ChangedRange,
  type Extent,
  type ReplyLevel,
} from '../src/index.js';
import { CMD, NBD_ERRNO } from '../src/protocol/wire.js';
import { failureOf, fakeServer, hear, letIn, reply, type Heard } from './fake-server.js';
import { TestExport } from './test-device.js';
import { startServer, until } from './test-server.js';

const KIB = 1024;
const MIB = 1024 * KIB;
const ZERO_HOLE = STATE_HOLE | STATE_ZERO;

async function opened(path: string, options: { replies?: ReplyLevel; contexts?: string[] } = {}): Promise<NbdClient> {
  const client = await NbdClient.connect({ path, replies: options.replies });
  onTestFinished(() => client.destroy());
  if (options.contexts !== undefined) await client.selectContexts('disk', options.contexts);
  await client.go('disk');
  return client;
}

/** A disk of `size` bytes whose server takes `most` at a time, in blocks of `block`; and what it was asked for. */
async function smallPayloads(
  { size = 64 * KIB, block = 512, most = 4096 },
  fail: (request: Heard) => number = () => 0,
): Promise<{ path: string; disk: Buffer; heard: Heard[] }> {
  const disk = Buffer.alloc(size);
  for (let at = 0; at < size; at += 4) disk.writeUInt32BE(at, at);
  const heard: Heard[] = [];
  const path = await fakeServer(async (peer) => {
    await letIn(peer, { size, blockSizes: [block, block, most] });
    for (;;) {
      const request = await hear(peer);
      if (request.type === CMD.DISC) break;
      heard.push(request);
      const errno = fail(request);
      const { offset, length, data } = request;
      if (errno === 0 && request.type === CMD.WRITE) data.copy(disk, offset);
      reply(
        peer,
        request,
        errno === 0 && request.type === CMD.READ ? disk.subarray(offset, offset + length) : undefined,
        errno,
      );
    }
    peer.halfClose();
  });
  return { path, disk, heard };
}

describe('reads and writes longer than the server takes', () => {
  test('are split at multiples of its block size, at most 16 at once, and put together', async () => {
    // 4100 is no multiple of the block.
    const { path, disk, heard } = await smallPayloads({ most: 4100 });
    const client = await opened(path);
    expect(await client.read(512, 60 * KIB)).toEqual(disk.subarray(512, 512 + 60 * KIB));
    expect(heard.every(({ offset, length }) => length <= 4096 && offset % 512 === 0 && length % 512 === 0)).toBe(true);
    expect(heard.reduce((sum, { length }) => sum + length, 0)).toBe(60 * KIB);
    heard.length = 0;
    const data = new Uint8Array(33 * KIB).map((_, index) => index % 251);
    await client.write(1024, data, { fua: true });
    expect(disk.subarray(1024, 1024 + data.length).equals(data)).toBe(true);
    expect(heard.map(({ length }) => length)).toEqual([4096, 4096, 4096, 4096, 4096, 4096, 4096, 4096, 1024]);
    expect(heard.every(({ flags }) => flags === 1)).toBe(true);
    await client.disconnect();
  });

  for (const replies of ['simple', 'structured', 'extended'] as const) {
    test(`are answered whole by the library's own server, with ${replies} replies`, async () => {
      const size = 2 * MAX_PAYLOAD + 12345;
      const { path } = await startServer({ exports: [new TestExport('disk', { size: size + 1 })] });
      const client = await opened(path, { replies });
      const data = Buffer.alloc(size, 'all work and no play');
      await client.write(1, data);
      expect((await client.read(1, size)).equals(data)).toBe(true);
    });
  }

  test('a failure of one piece fails the whole, once nothing is in flight any more', async () => {
    const { path, disk, heard } = await smallPayloads({ size: MIB }, ({ offset, type }) =>
      type === CMD.READ && offset === 8192 ? NBD_ERRNO.EIO : 0,
    );
    const client = await opened(path);
    const into = Buffer.alloc(MIB);
    const failure = await failureOf(client.readInto(0, into));
    expect(failure).toMatchObject({ code: 'EIO', message: 'read of 4096 bytes at 8192: the server answered EIO' });
    // No further pieces were begun.
    expect(heard.length).toBeLessThan(40);
    into.fill(0xee);
    expect(await client.read(4096, 4096)).toEqual(disk.subarray(4096, 8192));
    expect(into).toEqual(Buffer.alloc(MIB, 0xee));
  });

  test('an abort ends all pieces, and disconnect() lets a long read finish', async () => {
    const { path, disk } = await smallPayloads({ size: MIB });
    const client = await opened(path);
    const controller = new AbortController();
    const aborted = failureOf(client.read(0, MIB, { signal: controller.signal }));
    controller.abort();
    expect((await aborted).code).toBe('ABORTED');
    const read = client.read(0, MIB);
    await client.disconnect();
    expect((await read).equals(disk)).toBe(true);
  });

  test('a read with df is not split', async () => {
    const { path } = await smallPayloads({});
    const client = await opened(path);
    expect((await failureOf(client.read(0, 8192, { df: true }))).code).toBe('EINVAL');
  });

  for (const blockSizes of [
    [0, 4096, 4096],
    [3, 4096, 4096],
    [131072, 131072, 2 ** 25],
    [4096, 4096, 512],
    [1, 4096, 0],
  ] as const) {
    test(`block sizes of ${blockSizes.join(', ')} are refused`, async () => {
      const path = await fakeServer((peer) => letIn(peer, { blockSizes }));
      const client = await NbdClient.connect({ path });
      expect((await failureOf(client.go('disk'))).code).toBe('PROTOCOL');
    });
  }
});

describe('extents()', () => {
  /** Blocks of 4 KiB: data, hole, hole, data, ... by the pattern. */
  function patterned(pattern: string): TestExport {
    const exported = new TestExport('disk', {
      size: pattern.length * 4096,
      contexts: ['base:allocation', 'x-t:dirty'],
    });
    exported.disk.fill(0xda);
    Array.from(pattern).forEach((kind, index) => {
      if (kind === '.') exported.disk.fill(0, index * 4096, (index + 1) * 4096);
    });
    const own = exported.extents.bind(exported);
    exported.extents = (context, offset, length, sink) => {
      if (context === 'base:allocation') return own(context, offset, length, sink);
      own('base:allocation', offset, length, (at, count, flags) => sink(at, count, flags === 0 ? 1 : 2));
    };
    return exported;
  }

  async function all<T>(items: AsyncIterable<T>): Promise<T[]> {
    const found: T[] = [];
    for await (const item of items) found.push(item);
    return found;
  }

  for (const replies of ['structured', 'extended'] as const) {
    for (const chunkBytes of [undefined, 4096, 5000, 12 * KIB]) {
      test(`are joined over the whole disk (${replies}, chunks of ${chunkBytes ?? 'any size'})`, async () => {
        const { path } = await startServer({ exports: [patterned('dd..d....dd')] });
        const client = await opened(path, { replies });
        const found: Extent[] = await all(client.extents(undefined, { chunkBytes }));
        expect(found.map(({ offset, length, flags }) => [offset / 4096, length / 4096, flags])).toEqual([
          [0, 2, 0],
          [2, 2, ZERO_HOLE],
          [4, 1, 0],
          [5, 4, ZERO_HOLE],
          [9, 2, 0],
        ]);
      });
    }
  }

  test('of a part are of that part only', async () => {
    const { path } = await startServer({ exports: [patterned('dd..dd')] });
    const client = await opened(path);
    const part = await all(client.extents('base:allocation', { offset: 4096 + 512, length: 8192 }));
    expect(part).toEqual([
      { offset: 4608, length: 3584, flags: 0 },
      { offset: 8192, length: 4608, flags: ZERO_HOLE },
    ]);
    expect(await all(client.extents('base:allocation', { offset: 4096 * 6 }))).toEqual([]);
    expect(await all(client.extents('base:allocation', { offset: 1, length: 0 }))).toEqual([]);
  });

  test('changed() yields the changed ranges only, joined', async () => {
    const { path } = await startServer({ exports: [patterned('d..dd.d')] });
    const client = await opened(path, { contexts: ['base:allocation', 'x-t:dirty'] });
    const found: ChangedRange[] = await all(client.changed('x-t:dirty', { chunkBytes: 4096 }));
    expect(found).toEqual([
      { offset: 0, length: 4096 },
      { offset: 3 * 4096, length: 2 * 4096 },
      { offset: 6 * 4096, length: 4096 },
    ]);
  });

  test('a caller that breaks off leaves nothing pending', async () => {
    const { path, provider } = await startServer({ exports: [patterned('d.'.repeat(100))] });
    const client = await opened(path);
    for await (const { offset } of client.extents(undefined, { chunkBytes: 8192 })) if (offset > 40_000) break;
    const asked = provider.calls.filter(({ method }) => method === 'extents').length;
    expect(asked).toBeGreaterThan(4);
    await client.flush();
    await sleep(1);
    expect(provider.calls.filter(({ method }) => method === 'extents')).toHaveLength(asked);
    expect(provider.unfinished).toBe(0);
    await client.disconnect();
  });

  test('chunkBytes is rounded up to the block size, which the server demands', async () => {
    const disk = new TestExport('disk', { minimumBlockSize: 4096, preferredBlockSize: 4096 });
    const client = await opened((await startServer({ exports: [disk] })).path);
    let end = 0;
    for await (const { offset, length } of client.extents('base:allocation', { chunkBytes: 1000 }))
      end = offset + length;
    expect(end).toBe(client.details?.size);
  });

  test('a signal, a failure, an unknown context and a wrong range end the iteration with their errors', async () => {
    const { path, provider } = await startServer({ exports: [patterned('dd..')] });
    const client = await opened(path);
    expect((await failureOf(all(client.extents('x-no:such')))).code).toBe('UNSUPPORTED');
    expect((await failureOf(all(client.extents(undefined, { offset: 5 * 4096 })))).code).toBe('EINVAL');
    expect((await failureOf(all(client.extents(undefined, { offset: -1 })))).code).toBe('EINVAL');
    await expect(all(client.extents(undefined, { chunkBytes: 0 }))).rejects.toBeInstanceOf(RangeError);
    await expect(all(client.extents(undefined, { offset: '0' as never }))).rejects.toBeInstanceOf(TypeError);
    provider.hook = () => new Promise<void>(() => undefined);
    const controller = new AbortController();
    const aborted = failureOf(all(client.extents(undefined, { signal: controller.signal })));
    await until(() => provider.unfinished === 1, 'the server was asked');
    controller.abort();
    expect((await aborted).code).toBe('ABORTED');
    provider.hook = () => {
      throw new DeviceError('EIO', 'as told');
    };
    expect((await failureOf(all(client.extents()))).code).toBe('EIO');
  });

  test('before go() there is no export', async () => {
    const client = await NbdClient.connect({ path: (await startServer()).path });
    expect((await failureOf(all(client.extents()))).code).toBe('CLOSED');
    client.destroy();
  });
});
