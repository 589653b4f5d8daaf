/** `poisonBuffers`: devices that use memory after their call has settled are found. */

import { describe, expect, test } from 'vitest';
import type { Device } from '../src/index.js';
import { careless, only } from './careless.js';

const SIZE = 2 ** 20;
const POISON = { poisonBuffers: true };

/** A correct disk. */
function memory(): Device {
  const disk = Buffer.alloc(SIZE);
  return {
    size: SIZE,
    read: (offset, into) => disk.copy(into, 0, offset),
    write: (offset, data) => data.copy(disk, offset),
    flush: () => undefined,
  };
}

describe('a device', () => {
  for (const isLate of [false, true]) {
    const when = isLate ? 'answers later' : 'answers at once';
    const answer = (): void | Promise<void> => (isLate ? Promise.resolve() : undefined);

    test(`that keeps the data of a write, and ${when}, reads it back poisoned`, async () => {
      const kept = new Map<number, Buffer>();
      const device: Device = {
        size: SIZE,
        read: (offset, into) => void kept.get(offset)?.copy(into),
        write: (offset, data) => {
          kept.set(offset, data);
          return answer();
        },
      };
      const { client } = await careless(only(device), POISON);
      const one = await client();
      await one.write(4096, Buffer.alloc(512, 7));
      expect((await one.read(4096, 512)).toString()).toBe('POISONED'.repeat(64));
    });

    test(`that fills memory too late, and ${when}, sends none of it`, async () => {
      const later: (() => void)[] = [];
      const device: Device = {
        size: SIZE,
        read: (_, into) => {
          later.push(() => into.fill(7));
          return answer();
        },
      };
      const { client } = await careless(only(device), POISON);
      const one = await client();
      const reading = one.read(0, 512);
      expect((await reading).equals(Buffer.alloc(512))).toBe(true);
      for (const fill of later) fill();
      expect((await one.read(0, 512)).equals(Buffer.alloc(512))).toBe(true);
    });

    test(`that says it fills its memory and does not, and ${when}, shows it`, async () => {
      const { client } = await careless(only({ size: SIZE, fillsBuffer: true, read: answer }), POISON);
      expect((await (await client()).read(0, 16)).toString()).toBe('POISONEDPOISONED');
    });
  }
});

test('a correct device works as before, of either interface and with every count', async () => {
  const small = memory();
  const full = {
    ...{ geometry: { size: SIZE, canZero: true, canTrim: true, canCache: true }, close: () => undefined },
    ...{ read: small.read, write: small.write, flush: small.flush },
    ...{ zero: () => undefined, trim: () => undefined, cache: () => undefined },
  };
  for (const device of [small, full]) {
    const { client, errors } = await careless(only(device), POISON);
    const one = await client();
    for (let at = 0; at < 10; at++) await one.write(at * 4096, Buffer.alloc(4096, at));
    for (let at = 0; at < 10; at++) {
      expect((await one.read(at * 4096, 4096)).equals(Buffer.alloc(4096, at))).toBe(true);
    }
    await one.zero(0, 4096);
    await one.flush();
    expect(errors).toEqual([]);
  }
});

test('a device that transfers too little is found as without it, and its errors pass', async () => {
  const device: Device = {
    size: SIZE,
    read: (offset) => {
      if (offset > 0) throw new Error('boom');
      return 5;
    },
    write: () => Promise.reject(new Error('boom later')),
  };
  const { client, messages } = await careless(only(device), POISON);
  const one = await client();
  for (const request of [one.read(0, 512), one.read(512, 512), one.write(0, Buffer.alloc(8))]) {
    await expect(request).rejects.toMatchObject({ code: 'EIO' });
  }
  expect(messages()).toEqual(['read returned 5 for 512 bytes', 'boom', 'boom later']);
});

test('a provider that gives nonsense is refused as without it', async () => {
  for (const answer of [
    undefined,
    {},
    { device: 5 },
    {
      device: {
        get geometry() {
          throw new Error('x');
        },
      },
    },
  ]) {
    const { client, errors } = await careless({ list: () => [], describe: () => answer, open: () => answer }, POISON);
    await expect(client()).rejects.toMatchObject({ code: 'UNKNOWN_EXPORT' });
    expect(errors.at(-1)?.context).toMatchObject({ source: 'provider', method: 'open', expected: false });
  }
});
