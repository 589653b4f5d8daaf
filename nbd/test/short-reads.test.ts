/**
 * Devices that read too little, or into another buffer: a client gets an error or zeros, never what another client has read
 * before into the same memory.
 */

import { setImmediate as turn } from 'node:timers/promises';
import { describe, expect, onTestFinished, test } from 'vitest';
import { ALLOCATION_CONTEXT, completeDevice, STATE_HOLE, NbdClient, STATE_ZERO, type Device } from '../src/index.js';
import { careless, INFO } from './careless.js';
import { until } from './test-server.js';

const KIB = 1024;
const MIB = 1024 * KIB;
const SIZE = 64 * MIB;
/** What the other client reads, everywhere. */
const SECRET = 0xa5;

type Read = (offset: number, into: Buffer) => unknown;

/** Devices that do not fill `into`. `short`: they say so. */
const CARELESS: readonly { readonly what: string; readonly read: Read; readonly fails: boolean }[] = [
  { what: 'does nothing', read: () => undefined, fails: false },
  { what: 'fills half and returns nothing', read: (_, into) => void into.fill(1, 0, into.length >> 1), fails: false },
  { what: 'returns a count that is too small', read: (_, into) => into.fill(1, 0, 3).length - 1, fails: true },
  { what: 'returns 0', read: () => 0, fails: true },
  {
    what: 'returns { bytesRead } of less',
    read: (_, into) => ({ bytesRead: into.length >> 1, buffer: into }),
    fails: true,
  },
  { what: 'returns a Buffer of its own', read: (_, into) => Buffer.alloc(into.length, 1), fails: true },
  { what: 'returns NaN', read: () => NaN, fails: true },
];

const LEVELS = ['simple', 'structured', 'extended'] as const;
const LENGTHS = [512, 64 * KIB, 300 * KIB, 2 * MIB];

/** A server with the export "other", which fills all it is asked for with SECRET, and the careless "disk". */
async function start(read: Read, extra: Partial<Device> = {}) {
  const other: Device = { size: SIZE, read: (_, into) => void into.fill(SECRET) };
  const disk = { size: SIZE, read, ...extra };
  const find = (name: string): unknown => ({ device: name === 'other' ? other : disk, info: { ...INFO, name } });
  return careless({
    list: () => [],
    describe: (name: string) => ({ geometry: name === 'other' ? other : disk, info: { ...INFO, name } }),
    open: find,
  });
}

async function useMemory(other: NbdClient, length: number): Promise<void> {
  const all = await Promise.all(Array.from({ length: 2 }, (_, n) => other.read((n * length) % (SIZE / 2), length)));
  for (const data of all) expect(data[length - 1]).toBe(SECRET);
}

for (const replies of LEVELS) {
  describe(`with ${replies} replies`, () => {
    for (const { what, read, fails } of CARELESS) {
      for (const isLate of [false, true]) {
        test(`a device that ${what}${isLate ? ', later,' : ''} shows no data of another client`, async () => {
          const late: Read = async (offset, into) => {
            await turn();
            return read(offset, into);
          };
          const { client } = await start(isLate ? late : read);
          const other = await client({ replies }, 'other');
          const victim = await client({ replies });
          for (const length of LENGTHS) {
            await useMemory(other, length);
            for (let offset = 0; offset < 2 * length; offset += length) {
              const reading = victim.read(offset, length);
              if (fails) await expect(reading).rejects.toMatchObject({ code: 'EIO' });
              else expect((await reading).includes(SECRET)).toBe(false);
            }
          }
        });
      }
    }
  });
}

test('the longest reads show none either', async () => {
  for (const { read, fails } of [CARELESS[0], CARELESS[5]] as typeof CARELESS) {
    const { client } = await start(read);
    const other = await client({}, 'other');
    const victim = await client({ replies: 'simple' });
    await useMemory(other, 32 * MIB);
    const reading = victim.read(0, 32 * MIB);
    if (fails) await expect(reading).rejects.toMatchObject({ code: 'EIO' });
    else expect((await reading).includes(SECRET)).toBe(false);
  }
});

test('neither does one that reports holes, in the parts that are data', async () => {
  const MORE = 256 * KIB;
  for (const isLate of [false, true]) {
    const report: Device['extents'] = (_context, offset, length, sink) => {
      for (let at = offset; at < offset + length; at += MORE) {
        if (!sink(at, MORE, (at / MORE) % 2 === 0 ? 0 : STATE_HOLE | STATE_ZERO)) return;
      }
    };
    const extents: Device['extents'] = async (...given) => {
      await turn();
      return report(...given);
    };
    for (const { read, fails } of CARELESS) {
      const { client } = await start(read, { extents: isLate ? extents : report, contexts: [ALLOCATION_CONTEXT] });
      const other = await client({ replies: 'structured' }, 'other');
      const victim = await client({ replies: 'structured' });
      await useMemory(other, 2 * MIB);
      const reading = victim.read(0, 2 * MIB);
      if (fails) await expect(reading).rejects.toMatchObject({ code: 'EIO' });
      else expect((await reading).includes(SECRET)).toBe(false);
    }
  }
});

test('a read that fails part of the way shows nothing either', async () => {
  const read: Read = (_, into) => {
    into.fill(1, 0, 10);
    throw new Error('a bad block');
  };
  for (const replies of LEVELS) {
    const { raw, client } = await start(read);
    const other = await client({ replies }, 'other');
    await useMemory(other, 4096);
    const one = await raw();
    if (replies === 'simple') await one.open('disk');
    else await one.openWith(replies);
    const before = one.available;
    if (replies === 'extended') one.extendedRequest({ type: 0, length: 4096 });
    else one.request({ type: 0, length: 4096 });
    await until(() => one.available > before, 'the error has arrived');
    expect((await one.read(one.available)).includes(SECRET)).toBe(false);
  }
});

test('a shortfall is reported with its count', async () => {
  const { client, errors, messages } = await start((_, into) => into.length - 1, {
    write: () => 1,
    flush: () => undefined,
  });
  const one = await client();
  await expect(one.read(8192, 4096)).rejects.toMatchObject({ code: 'EIO' });
  await expect(one.write(0, Buffer.alloc(512))).rejects.toMatchObject({ code: 'EIO' });
  expect(messages()).toEqual(['read returned 4095 for 4096 bytes', 'write returned 1 for 512 bytes']);
  expect(errors[0]?.context).toMatchObject({
    ...{ exportName: 'disk', source: 'device', command: 'READ', offset: 8192, length: 4096, expected: false },
  });
});

test('a whole transfer may be told in any of the ways in which Node tells it', async () => {
  const disk = Buffer.alloc(SIZE, 7);
  const ways: Read[] = [
    (offset, into) => disk.copy(into, 0, offset),
    (offset, into) => ({ bytesRead: disk.copy(into, 0, offset), buffer: into }),
    (offset, into) => Promise.resolve(disk.copy(into, 0, offset)),
    (_, into) => into.fill(7),
    (_, into) => new Uint8Array(into.buffer, into.byteOffset, into.length).fill(7),
    (_, into) => (into.fill(7), null),
  ];
  for (const read of ways) {
    const { client, errors } = await start(read, {
      write: (_, data) => Promise.resolve({ bytesWritten: data.length }),
    });
    const one = await client();
    expect((await one.read(0, 4096)).equals(Buffer.alloc(4096, 7))).toBe(true);
    await one.write(0, Buffer.alloc(512));
    expect(errors).toEqual([]);
  }
});

test('memory is cleared, unless the device says that it fills it', async () => {
  const seen: number[] = [];
  const read: Read = (_, into) => {
    seen.push(into[100] ?? -1);
    into.fill(1);
  };
  for (const fillsBuffer of [undefined, false, 'yes', true]) {
    const { client } = await start(read, { fillsBuffer: fillsBuffer as boolean });
    const other = await client({ replies: 'simple' }, 'other');
    const one = await client({ replies: 'simple' });
    seen.length = 0;
    for (let round = 0; round < 20; round++) {
      await useMemory(other, 64 * KIB);
      await one.read(0, 64 * KIB);
    }
    if (fillsBuffer === true) expect(seen).toContain(SECRET);
    else expect(new Set(seen)).toEqual(new Set([0]));
  }
});

test('a provider may give a device of either interface', async () => {
  const small: Device = { size: MIB, read: (_, into) => void into.fill(3) };
  for (const device of [small, completeDevice(small)]) {
    const { path, errors } = await careless({
      list: () => [INFO],
      describe: () => ({ geometry: device, info: INFO }),
      open: () => ({ device, info: INFO }),
    });
    const one = await NbdClient.connect({ path });
    onTestFinished(() => one.destroy());
    const told = { size: MIB, readOnly: true, canFlush: false };
    expect(await one.info('disk')).toMatchObject(told);
    expect(await one.go('disk')).toMatchObject(told);
    expect((await one.read(0, 16)).equals(Buffer.alloc(16, 3))).toBe(true);
    expect(errors).toEqual([]);
  }
});
