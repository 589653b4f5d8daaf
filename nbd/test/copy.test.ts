/** copy(): between servers of other projects and devices of this process, compared with their own tools. */

import { execFile, spawn, type ChildProcess } from 'node:child_process';
import { open, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { describe, expect, onTestFinished, test } from 'vitest';
import {
  ALLOCATION_CONTEXT,
  copy,
  NbdClient,
  STATE_HOLE,
  STATE_ZERO,
  type CopyProgress,
  type Device,
} from '../src/index.js';
import { failureOf } from './fake-server.js';
import { TestExport } from './test-device.js';
import { startServer, temporaryDirectory, until } from './test-server.js';

const run = promisify(execFile);
const KIB = 1024;
const MIB = 1024 * KIB;
const BLOCK = 64 * KIB;

/** A device in memory with extents; it records what was asked of it. */
class Ram {
  readonly calls: string[] = [];
  readonly device: Device;

  constructor(
    readonly disk: Buffer,
    more: Partial<Device> = {},
  ) {
    const { calls } = this;
    this.device = {
      size: disk.length,
      read: (offset, into) => {
        calls.push('read');
        disk.copy(into, 0, offset);
      },
      write: (offset, data) => {
        calls.push('write');
        data.copy(disk, offset);
      },
      zero: (offset, length) => {
        calls.push('zero');
        disk.fill(0, offset, offset + length);
      },
      flush: () => void calls.push('flush'),
      extents: (_context, offset, length, sink) => {
        for (let at = offset; at < offset + length;) {
          const next = Math.min(disk.length, (Math.floor(at / BLOCK) + 1) * BLOCK);
          const isZero = disk.subarray(at, next).every((byte) => byte === 0);
          if (!sink(at, next - at, isZero ? STATE_HOLE | STATE_ZERO : 0)) return;
          at = next;
        }
      },
      ...more,
    };
  }

  count(method: string): number {
    return this.calls.filter((call) => call === method).length;
  }
}

/** Data and zeros in turns, of odd lengths. */
function patterned(size: number): Buffer {
  const disk = Buffer.alloc(size);
  for (let at = 0, length = 4096; at < size; at += 2 * length, length = 4096 + ((length * 7) % (300 * KIB))) {
    disk.fill(`from ${at}.`, at, Math.min(size, at + length));
  }
  return disk;
}

describe('between devices', () => {
  test('every byte is there; zeros are zeroed, not read; the destination is flushed once, at the end', async () => {
    const from = new Ram(patterned(9 * MIB + 512));
    from.disk.fill(0, 3 * MIB, 8 * MIB);
    const to = new Ram(Buffer.alloc(from.disk.length, 0xff));
    const seen: CopyProgress[] = [];
    const done = await copy(from.device, to.device, { onProgress: (progress) => seen.push(progress) });
    expect(to.disk.equals(from.disk)).toBe(true);
    expect(done.copied + done.zeroed).toBe(from.disk.length);
    expect(done.zeroed).toBeGreaterThanOrEqual(5 * MIB - 2 * BLOCK);
    expect(seen.at(-1)).toEqual(done);
    expect(to.count('zero')).toBeGreaterThan(0);
    expect(to.calls.indexOf('flush')).toBe(to.calls.length - 1);
    expect(to.count('flush')).toBe(1);
  });

  test('nothing is sent for zeros if the destination is zeros', async () => {
    const from = new Ram(patterned(2 * MIB));
    const to = new Ram(Buffer.alloc(2 * MIB));
    await copy(from.device, to.device, { destinationIsZero: true });
    expect(to.disk.equals(from.disk)).toBe(true);
    expect(to.count('zero')).toBe(0);
  });

  test('a destination that cannot zero gets zeros written, a source without extents is read whole', async () => {
    const from = new Ram(patterned(2 * MIB));
    const to = new Ram(Buffer.alloc(2 * MIB, 0xff), { zero: undefined, flush: undefined });
    await copy(from.device, to.device, { requestBytes: 100 * KIB, parallel: 3 });
    expect(to.disk.equals(from.disk)).toBe(true);
    const plain = new Ram(from.disk, { extents: undefined });
    const second = new Ram(Buffer.alloc(2 * MIB, 0xff));
    expect(await copy(plain.device, second.device)).toEqual({ copied: 2 * MIB, zeroed: 0, total: 2 * MIB });
    expect(second.disk.equals(from.disk)).toBe(true);
  });

  test('requests keep to the block sizes of both ends, and the rest of the last block is kept', async () => {
    const from = new Ram(patterned(300_032), { minimumBlockSize: 512 });
    const to = new Ram(Buffer.alloc(320 * 1024, 0xee));
    const inner = to.device;
    const aligned = (offset: number, length: number): void => {
      expect([offset % 4096, length % 4096]).toEqual([0, 0]);
    };
    const device: Device = {
      ...inner,
      minimumBlockSize: 4096,
      read: (offset, into) => (aligned(offset, into.length), inner.read(offset, into)),
      write: (offset, data, fua) => (aligned(offset, data.length), inner.write?.(offset, data, fua)),
      zero: (offset, length, mode) => (aligned(offset, length), inner.zero?.(offset, length, mode)),
    };
    await copy(from.device, device, { requestBytes: 10_000 });
    expect(to.disk.subarray(0, 300_032).equals(from.disk)).toBe(true);
    expect(to.disk.subarray(300_032).every((byte) => byte === 0xee)).toBe(true);
  });

  test('a bounded number of requests is in flight, of bounded size', async () => {
    let now = 0;
    let most = 0;
    const from = new Ram(Buffer.alloc(4 * MIB, 1), {
      extents: undefined,
      read: async (_, into) => {
        most = Math.max(most, ++now);
        expect(into.length).toBeLessThanOrEqual(64 * KIB);
        await new Promise(setImmediate);
        now--;
      },
    });
    await copy(from.device, new Ram(Buffer.alloc(4 * MIB)).device, { parallel: 5, requestBytes: 64 * KIB });
    expect(most).toBe(5);
  });

  test('a request may be as large as the source, or larger', async () => {
    const source = new Ram(patterned(300 * KIB + 7));
    for (const requestBytes of [Infinity, 2 ** 50, 300 * KIB + 7]) {
      const target = new Ram(Buffer.alloc(source.disk.length, 0xee));
      const { copied, zeroed, total } = await copy(source.device, target.device, { requestBytes });
      expect(copied + zeroed).toBe(total);
      expect(target.disk.equals(source.disk)).toBe(true);
    }
  });

  const CARELESS: [what: string, extents: readonly (readonly [number, number, number])[]][] = [
    ['a gap', [[0, 4096, STATE_ZERO], [8192, 4096, STATE_ZERO]]], // prettier-ignore
    ['only its holes', [[8192, 4096, STATE_ZERO]]],
    ['what it has reported before', [[0, 8192, 0], [4096, 4096, STATE_ZERO]]], // prettier-ignore
    ['no length', [[0, NaN, STATE_ZERO]]],
    ['a negative length', [[0, -1, STATE_ZERO]]],
    ['nothing', []],
  ];
  for (const [what, extents] of CARELESS) {
    test(`a device that reports ${what} as extents loses no data`, async () => {
      const disk = Buffer.alloc(16 * KIB, 'data');
      disk.fill(0, 0, 4096);
      // It reports the same whatever it is asked for.
      const source = new Ram(disk, {
        extents: (_context, _offset, _length, sink) => {
          for (const [offset, length, flags] of extents) sink(offset, length, flags);
        },
      });
      const target = new Ram(Buffer.alloc(disk.length, 0xee));
      const failure = await copy(source.device, target.device).then(
        () => undefined,
        (error: unknown) => error,
      );
      if (failure === undefined) expect(target.disk.equals(disk)).toBe(true);
      else
        expect(failure).toMatchObject({
          code: 'EIO',
          message: expect.stringMatching(/^the device reported /) as string,
        });
    });
  }

  test('a device whose geometry is nonsense is refused, and not taken for an empty one', async () => {
    const target = new Ram(Buffer.alloc(MIB));
    const wrong: object[] = [{ size: NaN }, { size: '4096' }, { size: -1 }, { size: 0.5 }, { minimumBlockSize: NaN }];
    for (const more of wrong) {
      const source = { ...new Ram(Buffer.alloc(4096)).device, ...more };
      await expect(copy(source, target.device)).rejects.toBeInstanceOf(TypeError);
    }
    const { device } = new Ram(Buffer.alloc(4096));
    await expect(copy(device, target.device, null as never)).rejects.toThrow('the options of copy() must be an object');
    await expect(copy(device, target.device, { onProgress: 5 as never })).rejects.toThrow(
      'onProgress must be a function',
    );
    expect(target.calls).toEqual([]);
  });

  test('a failure, a short read or a throwing onProgress fails the copy, once nothing is in flight', async () => {
    let unfinished = 0;
    const slow = new Ram(Buffer.alloc(4 * MIB, 1), {
      extents: undefined,
      read: async (offset) => {
        unfinished++;
        await new Promise(setImmediate);
        unfinished--;
        if (offset === MIB) throw new Error('the device is broken');
      },
    });
    const to = new Ram(Buffer.alloc(4 * MIB));
    await expect(copy(slow.device, to.device)).rejects.toThrow('the device is broken');
    expect(unfinished).toBe(0);
    expect(to.count('flush')).toBe(0);
    const short = new Ram(Buffer.alloc(MIB), { extents: undefined, read: () => 17 });
    expect((await failureOf(copy(short.device, to.device))).code).toBe('EIO');
    const onProgress = (): void => {
      throw new Error('my callback is broken');
    };
    await expect(copy(new Ram(patterned(MIB)).device, to.device, { onProgress })).rejects.toThrow('my callback');
  });

  test('an abort ends it with ABORTED', async () => {
    const controller = new AbortController();
    const from = new Ram(Buffer.alloc(16 * MIB, 1), { extents: undefined });
    const work = copy(from.device, new Ram(Buffer.alloc(16 * MIB)).device, {
      signal: controller.signal,
      onProgress: ({ copied }) => {
        if (copied > 4 * MIB) controller.abort('enough');
      },
    });
    expect(await failureOf(work)).toMatchObject({ code: 'ABORTED', cause: 'enough' });
    expect(from.count('read')).toBeLessThan(16);
  });

  test('a smaller or read-only destination, a client without an export and nonsense are refused', async () => {
    const ram = (size: number, more: Partial<Device> = {}): Device => new Ram(Buffer.alloc(size), more).device;
    expect((await failureOf(copy(ram(8192), ram(4096)))).code).toBe('ENOSPC');
    expect((await failureOf(copy(ram(4096), ram(4096, { readOnly: true })))).code).toBe('EPERM');
    const client = await NbdClient.connect({ path: (await startServer()).path });
    expect((await failureOf(copy(client, ram(4096)))).code).toBe('CLOSED');
    client.destroy();
    await expect(copy({} as never, ram(4096))).rejects.toBeInstanceOf(TypeError);
    await expect(copy(null as never, ram(4096))).rejects.toBeInstanceOf(TypeError);
    await expect(copy(ram(1), ram(1), { parallel: 0 })).rejects.toBeInstanceOf(RangeError);
    await expect(copy(ram(1), ram(1), { requestBytes: NaN })).rejects.toBeInstanceOf(RangeError);
    expect(await copy(ram(0), ram(0))).toEqual({ copied: 0, zeroed: 0, total: 0 });
  });
});

describe('with servers', () => {
  function started(command: string, args: readonly string[]): ChildProcess {
    const child = spawn(command, args, { stdio: 'ignore' });
    onTestFinished(() => void child.kill());
    return child;
  }

  async function opened(path: string): Promise<NbdClient> {
    for (let client: NbdClient | undefined; ;) {
      client = await NbdClient.connect({ path, timeoutMs: 20_000 }).catch(() => undefined);
      if (client === undefined) {
        await new Promise((resolve) => setTimeout(resolve, 10));
        continue;
      }
      const made = client;
      onTestFinished(() => made.destroy());
      await client.go('');
      return client;
    }
  }

  async function imageFile(path: string, data: Buffer): Promise<void> {
    const file = await open(path, 'w');
    await file.truncate(data.length);
    for (let at = 0; at < data.length; at += BLOCK) {
      const block = data.subarray(at, at + BLOCK);
      if (!block.every((byte) => byte === 0)) await file.write(block, 0, block.length, at);
    }
    await file.close();
  }

  for (const server of ['qemu-nbd', 'nbdkit'] as const) {
    test(`a sparse image of ${server} is copied to another ${server}, and from there into a device`, async () => {
      const directory = await temporaryDirectory();
      const data = patterned(24 * MIB);
      data.fill(0, 5 * MIB, 20 * MIB);
      const [from, to] = [join(directory, 'from.raw'), join(directory, 'to.raw')];
      await imageFile(from, data);
      await writeFile(to, Buffer.alloc(data.length, 0xff));
      for (const image of [from, to]) {
        if (server === 'qemu-nbd')
          started('qemu-nbd', ['-f', 'raw', '-t', '-k', `${image}.sock`, '--discard=unmap', image]);
        else started('nbdkit', ['-f', '-U', `${image}.sock`, 'file', image]);
      }
      const [source, target] = [await opened(`${from}.sock`), await opened(`${to}.sock`)];
      expect(source.contexts).toContain(ALLOCATION_CONTEXT);
      const done = await copy(source, target);
      expect(done.zeroed).toBeGreaterThanOrEqual(14 * MIB);
      const ram = new Ram(Buffer.alloc(data.length, 0xee));
      await copy(target, ram.device);
      expect(ram.disk.equals(data)).toBe(true);
      await Promise.all([source.disconnect(), target.disconnect()]);
      await run('qemu-img', ['compare', '-f', 'raw', '-F', 'raw', from, to]);
    });
  }

  test('what copy() writes to our server is what nbdcopy reads from it, and the other way round', async () => {
    const directory = await temporaryDirectory();
    const data = patterned(6 * MIB);
    const [image, back] = [join(directory, 'image.raw'), join(directory, 'back.raw')];
    await writeFile(image, data);
    const { path, client: open } = await startServer({ exports: [new TestExport('disk', { size: data.length })] });
    const client = await open();
    await copy(new Ram(data).device, client);
    await run('nbdcopy', [`nbd+unix:///disk?socket=${path}`, back]);
    await run('cmp', [image, back]);
    const other = new TestExport('disk', { size: data.length });
    const second = await startServer({ exports: [other] });
    await run('nbdcopy', [image, `nbd+unix:///disk?socket=${second.path}`]);
    const ram = new Ram(Buffer.alloc(data.length, 0xaa));
    await copy(await second.client(), ram.device);
    expect(ram.disk.equals(data)).toBe(true);
  });

  test('a server that is lost in the middle fails the copy', async () => {
    const {
      client: open,
      server,
      provider,
    } = await startServer({
      exports: [new TestExport('disk', { size: 8 * MIB })],
    });
    const client = await open();
    const work = failureOf(copy(client, new Ram(Buffer.alloc(8 * MIB)).device));
    await until(() => provider.calls.length > 2, 'it has begun');
    server.destroy();
    expect((await work).code).toBe('CLOSED');
  });
});
