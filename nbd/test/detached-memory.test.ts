/** Devices that transfer the memory of a request to somebody else, as `worker.postMessage(data, [data.buffer])` does. */

import { MessageChannel } from 'node:worker_threads';
import { describe, expect, onTestFinished, test } from 'vitest';
import { STATE_HOLE, STATE_ZERO, type Device, type ServerOptions } from '../src/index.js';
import { careless, only, strays, turns } from './careless.js';

const SIZE = 8 * 2 ** 20;

type When = 'before it answers' | 'before it answers later' | 'while it answers later' | 'and fails';

/** A disk that transfers the memory of its next read or write. */
function disk(method: 'read' | 'write', when: When): Device & { armed: boolean } {
  const bytes = Buffer.alloc(SIZE);
  const { port1, port2 } = new MessageChannel();
  port2.on('message', () => undefined);
  onTestFinished(() => port1.close());
  const transfer = (memory: Buffer): void | Promise<void> => {
    if (!device.armed) return undefined;
    device.armed = false;
    const give = (): void => port1.postMessage(memory, [memory.buffer as ArrayBuffer]);
    if (when === 'while it answers later') return Promise.resolve().then(give);
    give();
    if (when === 'and fails') throw new Error('failed');
    return when === 'before it answers later' ? Promise.resolve() : undefined;
  };
  const device: Device & { armed: boolean } = {
    armed: false,
    size: SIZE,
    read: (offset, into) => {
      bytes.copy(into, 0, offset);
      return method === 'read' ? transfer(into) : undefined;
    },
    write: (offset, data) => {
      bytes.set(data, offset);
      return method === 'write' ? transfer(data) : undefined;
    },
  };
  return device;
}

async function served(device: Device & { armed: boolean }, options: Partial<ServerOptions> = {}) {
  const stray = strays();
  const { client, messages } = await careless(only(device), options);
  return { stray, client, messages };
}

describe.each(['read', 'write'] as const)('the memory of a %s', (method) => {
  const whens: When[] = ['before it answers', 'before it answers later', 'while it answers later', 'and fails'];
  for (const when of whens) {
    test.each([512, 70_000, 2 ** 20])(
      `is transferred ${when}: only this connection ends (%i bytes)`,
      async (length) => {
        const device = disk(method, when);
        const { stray, client, messages } = await served(device);
        const [one, other] = [await client(), await client()];
        const data = Buffer.alloc(length, 7);
        await Promise.all(Array.from({ length: 16 }, () => one.write(0, data)));
        device.armed = true;
        // Many at once: their memory is the same block.
        const results = await Promise.allSettled(
          Array.from({ length: 16 }, () => (method === 'read' ? one.read(0, length) : one.write(0, data))),
        );
        await turns();
        expect(stray).toEqual([]);
        for (const result of results) {
          if (result.status === 'fulfilled' && result.value !== undefined) expect(result.value.equals(data)).toBe(true);
        }
        if (messages().length > 0) {
          expect(messages().join()).toMatch(/detached/);
          expect((await one.closed).code).toBe('CLOSED');
        }
        for (let i = 0; i < 4; i++) {
          await Promise.all(Array.from({ length: 16 }, () => other.write(0, data)));
          expect((await other.read(0, length)).equals(data)).toBe(true);
        }
        const third = await client();
        expect((await third.read(0, length)).equals(data)).toBe(true);
      },
    );
  }
});

test('the memory of a read with holes is transferred: only this read fails', async () => {
  const device: Device & { armed: boolean } = {
    ...disk('read', 'before it answers'),
    extents: (_context, offset, length, sink) => {
      sink(offset, 65536, 0);
      sink(offset + 65536, length - 65536, STATE_HOLE | STATE_ZERO);
    },
  };
  const plain = device.read.bind(device);
  const { port1, port2 } = new MessageChannel();
  port2.on('message', () => undefined);
  onTestFinished(() => port1.close());
  device.read = (offset, into) => {
    if (device.armed) port1.postMessage(into, [into.buffer as ArrayBuffer]);
    else return plain(offset, into);
    device.armed = false;
    return undefined;
  };
  const { stray, client, messages } = await served(device);
  const one = await client();
  device.armed = true;
  await expect(one.read(0, 2 ** 20)).rejects.toMatchObject({ code: 'EIO' });
  expect(messages().join()).toMatch(/detached/);
  expect((await one.read(0, 2 ** 20)).equals(Buffer.alloc(2 ** 20))).toBe(true);
  expect(stray).toEqual([]);
});

test.each(['read', 'write'] as const)('with poisonBuffers the transfer of the memory of a %s fails', async (method) => {
  const device = disk(method, 'before it answers');
  const { client, messages } = await served(device, { poisonBuffers: true });
  const one = await client();
  device.armed = true;
  await expect(method === 'read' ? one.read(0, 512) : one.write(0, Buffer.alloc(512))).rejects.toMatchObject({
    code: 'EIO',
  });
  expect(messages().join()).toMatch(/detached/);
  expect((await one.read(0, 512)).equals(Buffer.alloc(512))).toBe(true);
});
