/**
 * Every store must refuse invalid names, tags, sizes, times and ranges: each with its code, and nothing has changed. Owns the
 * lists.
 */
import fc from 'fast-check';
import { expect, test } from 'vitest';
import { MAX_DATA_OBJECTS } from '../../src/store/vdi-record.js';
import { byLength } from '../harness/length.js';
import { bytesOf, codeOf, type Session } from './session.js';

const BAD_NAMES = [
  '',
  ' ',
  ' a',
  'a ',
  'a/b',
  '/',
  '.',
  '..',
  'a\0b',
  'a\nb',
  'a\u001b[2J',
  'a\u2028b',
  '\ud800',
  'x'.repeat(256),
  'ä'.repeat(128),
];
const BAD_TAGS = [...BAD_NAMES, 'a@b', 'now', 'now:', 'now:x'];
/** The most peculiar ones first. */
const GOOD_NAMES = ['ä'.repeat(127), '%41', '🐑', 'x'.repeat(255), '-rf', '*', 'now', 'a b', '"', '$HOME', '..a', 'a'];
const [SURROGATES, SURROGATE_COUNT] = [0xd800, 0x800];
/** Any code point that is no surrogate: as fast-check's unit 'binary', which takes a second to be made. */
const CHARACTER = fc
  .integer({ min: 0, max: 0x10ffff - SURROGATE_COUNT })
  .map((n) => String.fromCodePoint(n < SURROGATES ? n : n + SURROGATE_COUNT));
/** Results of requests with random input. */
const EXPECTED = ['no error', 'BAD_NAME', 'BAD_SIZE', 'NO_VDI', 'NO_TAG', 'EXISTS', 'IS_SNAPSHOT', 'NEEDS_FORCE'];

export function badInput(session: Session): void {
  const { objectSize: OBJECT, abilities } = session;
  const shift = Math.log2(OBJECT);

  test('invalid names and tags are refused with BAD_NAME, and nothing is made', async () => {
    const { catalog } = session;
    const name = session.newName();
    await session.create(name, OBJECT);
    for (const bad of BAD_NAMES) {
      expect(await codeOf(() => session.create(bad, OBJECT)), JSON.stringify(bad)).toBe('BAD_NAME');
      expect(await codeOf(() => catalog.find(bad)), JSON.stringify(bad)).toBe('BAD_NAME');
      expect(await codeOf(() => catalog.openVdi(bad)), JSON.stringify(bad)).toBe('BAD_NAME');
    }
    if (abilities.canSnapshot) {
      for (const bad of BAD_TAGS) {
        expect(await codeOf(() => catalog.snapshot(name, bad)), JSON.stringify(bad)).toBe('BAD_NAME');
      }
    }
    if (abilities.canClone) {
      await catalog.snapshot(name, 's');
      for (const bad of BAD_NAMES) {
        expect(await codeOf(() => catalog.clone(`${name}@s`, bad)), JSON.stringify(bad)).toBe('BAD_NAME');
      }
      await catalog.remove(`${name}@s`);
    }
    expect(await session.names()).toEqual([name]);
  });

  test('names with any other character are kept as they are, byte by byte, up to 255 of them', async () => {
    const good = GOOD_NAMES.slice(0, session.repeats(GOOD_NAMES.length));
    for (const name of good) await session.create(name, 512);
    expect((await session.names()).sort()).toEqual([...good].sort());
    if (abilities.keepsState) await session.reopen();
    for (const name of good) expect((await session.catalog.find(name)).name).toBe(name);
  });

  test('invalid sizes are refused with BAD_SIZE, and nothing is made or changed', async () => {
    const { catalog } = session;
    const name = session.newName();
    const most = MAX_DATA_OBJECTS * OBJECT;
    const bad = [0, -512, 1, 511, 513, OBJECT + 1, 0.5, NaN, Infinity, 2 ** 53, most + 512];
    for (const size of bad) expect(await codeOf(() => session.create(name, size)), String(size)).toBe('BAD_SIZE');
    for (const blockSizeShift of [-1, 0, 9, 19, 27, 22.5, NaN]) {
      const create = (): unknown => catalog.create(name, 512, { blockSizeShift });
      expect(await codeOf(create), `shift ${blockSizeShift}`).toBe('BAD_SIZE');
    }
    expect(await session.names()).toEqual([]);
    await session.create(name, OBJECT);
    if (!abilities.canResize) return;
    for (const size of bad) {
      expect(await codeOf(() => catalog.resize(name, size, { force: true })), String(size)).toBe('BAD_SIZE');
    }
    expect((await catalog.find(name)).size).toBe(OBJECT);
  });

  test('a disk of the greatest size is made, told of and written at its end', async () => {
    const name = session.newName();
    const most = MAX_DATA_OBJECTS * OBJECT;
    await session.create(name, most);
    const vdi = await session.openVdi(name);
    await vdi.write(most - 10, Buffer.alloc(10, 1), true);
    const end = Buffer.alloc(20);
    await vdi.read(most - 20, end);
    expect(end).toEqual(Buffer.alloc(20).fill(1, 10));
    await session.release(vdi);
  });

  test('requests behind the end of the disk are refused: reads with BEHIND_END, changes with NO_SPACE', async () => {
    const { disk } = await session.newDisk(2);
    const { vdi } = disk;
    const options = { noHole: false, fua: false };
    for (const [at, length] of [
      [2 * OBJECT, 1],
      [2 * OBJECT - 1, 2],
      [5 * OBJECT, 512],
      [0, 2 * OBJECT + 1],
    ] as const) {
      const what = `${length} bytes at ${at}`;
      expect(await codeOf(() => vdi.read(at, Buffer.alloc(length))), what).toBe('BEHIND_END');
      expect(await codeOf(() => vdi.extents(at, length, () => true)), what).toBe('BEHIND_END');
      expect(await codeOf(() => vdi.write(at, Buffer.alloc(length, 1), false)), what).toBe('NO_SPACE');
      expect(await codeOf(() => vdi.write(at, Buffer.alloc(length, 1), true)), what).toBe('NO_SPACE');
      expect(await codeOf(() => vdi.zero(at, length, options)), what).toBe('NO_SPACE');
      expect(await codeOf(() => vdi.zero(at, length, { ...options, fastZero: true })), what).toBe('NO_SPACE');
      expect(await codeOf(() => vdi.trim(at, length, false)), what).toBe('NO_SPACE');
    }
    expect((await bytesOf(vdi)).equals(Buffer.alloc(2 * OBJECT))).toBe(true);
    // Nobody was left counted as writing: a snapshot, which waits for writers, is taken.
    if (abilities.canSnapshot) await session.catalog.snapshot(vdi.record.name, 's');
    await disk.write(0, 100, 1);
    await disk.check();
    await session.release(vdi);
  });

  test('invalid times are refused with BAD_TIME, and no snapshot is taken', async (context) => {
    if (!abilities.canSnapshot) return context.skip();
    const name = session.newName();
    await session.create(name, OBJECT);
    for (const takenAt of [0, -1, 1.5, NaN, Infinity, 2 ** 42]) {
      expect(await codeOf(() => session.catalog.snapshot(name, 's', { takenAt })), String(takenAt)).toBe('BAD_TIME');
    }
    expect(await session.names()).toEqual([name]);
  });

  test('random names, tags and sizes are done or refused with a code, and leave a sound store', async () => {
    const { catalog } = session;
    const text = fc.oneof(
      fc.string({ unit: 'grapheme', maxLength: 4 }),
      fc.string({ unit: CHARACTER, maxLength: 4 }),
      fc.constantFrom('disk', 'disk@s', 'disk@now', '@1', '@=disk', '@=', 'disk@', '@', ...BAD_NAMES),
    );
    const size = fc.oneof(fc.integer({ min: -512, max: 4096 }), fc.constantFrom(512, OBJECT, 2 ** 60));
    const step = fc.record({ kind: fc.constantFrom(0, 1, 2, 3, 4, 5), name: text, tag: text, size });
    const runs = session.repeats(byLength({ quick: 6, full: 10, long: 300 }));
    await fc.assert(
      fc.asyncProperty(fc.array(step, { minLength: 1, maxLength: 6 }), async (steps) => {
        await session.removeAll();
        await session.create('disk', OBJECT);
        for (const { kind, name, tag, size } of steps) {
          const code = await codeOf(() => {
            if (kind === 0) return catalog.create(name, size, { blockSizeShift: shift });
            if (kind === 1 && abilities.canSnapshot) return catalog.snapshot(name, tag);
            if (kind === 2 && abilities.canClone) return catalog.clone(name, tag);
            if (kind === 3 && abilities.canResize) return catalog.resize(name, size);
            if (kind === 4) return catalog.show(name);
            return name === 'disk' ? undefined : catalog.remove(name);
          });
          expect(EXPECTED).toContain(code);
        }
        expect((await catalog.check({ repair: false })).problems).toEqual([]);
      }),
      { numRuns: runs },
    );
    await session.removeAll();
  });
}
