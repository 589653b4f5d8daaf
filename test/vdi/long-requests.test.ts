/**
 * Requests about very many objects: their answers are those of a walk over every entry, and other requests get their turns of the
 * event loop meanwhile. Maps are made here and the store is a stand-in, so that a million objects cost nothing.
 */
import { afterEach, expect, test, vi } from 'vitest';
import fc from 'fast-check';
import type { ObjectVdi } from '../../src/store/open-vdi.js';
import type { VdiRecord } from '../../src/store/vdi-record.js';
import { CopyOnWriteVdi } from '../../src/vdi/copy-on-write-vdi.js';
import { endOfDifferent, endOfSame, endOfZeros } from '../../src/vdi/map-runs.js';

const SHIFT = 22;
const OBJECT = 2 ** SHIFT;
const MILLION = 2 ** 20;
/** Many times the share of a turn, and far below what a million entries took one by one. */
const LONGEST_TURN_MS = 25;
/** Garbage collection, or other work of the machine, spoils a measurement, but not all of them. */
const TRIES = 5;

afterEach(() => vi.restoreAllMocks());

interface Made {
  readonly vdi: CopyOnWriteVdi;
  readonly open: { map: Uint32Array } & ObjectVdi;
}

function vdiOf(map: Uint32Array, more: Partial<ObjectVdi> = {}): Made {
  const record = { vid: 9, size: map.length * OBJECT, blockSizeShift: SHIFT, isSnapshot: false } as VdiRecord;
  const open = {
    record,
    map,
    kind: 'objects',
    creationVid: 9,
    exclusive: () => true,
    setOwner(this: { map: Uint32Array }, idx: number, owner: number) {
      this.map[idx] = owner;
    },
    flush: () => Promise.resolve(),
    objectsMove: false,
    canZeroFast: () => true,
    objectExtents: (_vid: number, _idx: number, at: number, length: number, sink: (...of: unknown[]) => boolean) => {
      sink(at, length, false);
    },
    cacheObject: () => undefined,
    zeroObject: () => undefined,
    ...more,
  } as unknown as { map: Uint32Array } & ObjectVdi;
  return { vdi: new CopyOnWriteVdi(open, undefined), open };
}

/** Runs of a few lengths, so that pieces of every size occur. */
const mapOf = (length: number): fc.Arbitrary<Uint32Array> =>
  fc
    .array(
      fc.record({
        owner: fc.constantFrom(0, 0, 1, 2, 9),
        run: fc.oneof(fc.integer({ min: 1, max: 5 }), fc.constantFrom(63, 64, 65, 1000, 16_384, 16_385, 20_000)),
      }),
      { maxLength: 12 },
    )
    .map((runs) => {
      const map = new Uint32Array(length);
      let at = 0;
      for (const { owner, run } of runs) {
        map.fill(owner, at, Math.min(at + run, length));
        at += run;
      }
      return map;
    });

const pair = fc.record({ one: mapOf(40_000), other: mapOf(39_000), from: fc.nat(40_000), length: fc.nat(45_000) });

test('the end of a run in a map, or in two, is where a walk over every entry finds it', () => {
  fc.assert(
    fc.property(pair, ({ one, other, from, length }) => {
      const end = from + length;
      const walk = (isOver: (idx: number) => boolean, first = from): number => {
        let idx = first;
        while (idx < end && !isOver(idx)) idx++;
        return idx;
      };
      const differ = (idx: number): boolean => (one[idx] ?? 0) !== (other[idx] ?? 0);
      expect(endOfZeros(one, from, end)).toBe(walk((idx) => (one[idx] ?? 0) !== 0));
      expect(endOfSame(one, other, from, end)).toBe(walk(differ));
      if (length > 0 && differ(from)) {
        expect(endOfDifferent(one, other, from, end)).toBe(walk((idx) => !differ(idx), from + 1));
      }
    }),
    { numRuns: 300 },
  );
});

interface Said {
  readonly at: number;
  readonly length: number;
  readonly is: boolean;
}

/** The answers for each entry of [from, to), in runs. */
function runsOf(offset: number, end: number, is: (idx: number) => boolean): Said[] {
  const runs: Said[] = [];
  for (let at = offset; at < end;) {
    const idx = Math.floor(at / OBJECT);
    const next = Math.min((idx + 1) * OBJECT, end);
    const last = runs.at(-1);
    if (last?.is === is(idx)) runs[runs.length - 1] = { ...last, length: last.length + next - at };
    else runs.push({ at, length: next - at, is: is(idx) });
    at = next;
  }
  return runs;
}

test('extents and changes are those of a walk over every entry, with blocks that are kept aside and ranges of any end', async () => {
  await fc.assert(
    fc.asyncProperty(
      mapOf(3000),
      mapOf(3000),
      fc.uniqueArray(fc.nat(2999), { maxLength: 20 }),
      fc.nat(2999 * OBJECT),
      fc.nat(3000 * OBJECT),
      async (map, before, kept, offset, wanted) => {
        const length = Math.max(1, Math.min(wanted, map.length * OBJECT - offset));
        const nextOverwritten = (idx: number, end: number): number =>
          Math.min(end, ...kept.filter((each) => each >= idx));
        const { vdi } = vdiOf(map);
        const base = vdiOf(before, kept.length > 0 ? { nextOverwritten } : {}).vdi;
        const said: Said[] = [];
        await vdi.extents(offset, length, (at, size, is) => said.push({ at, length: size, is }) > 0);
        expect(said).toEqual(runsOf(offset, offset + length, (idx) => map[idx] === 0));
        said.length = 0;
        await vdi.changedSince(base, offset, length, (at, size, is) => said.push({ at, length: size, is }) > 0);
        const isChanged = (idx: number): boolean => map[idx] !== before[idx] || kept.includes(idx);
        expect(said).toEqual(runsOf(offset, offset + length, isChanged));
      },
    ),
    { numRuns: 100 },
  );
});

/** The longest turn of the loop while `work` runs, in processor time, so that other processes do not count. */
async function longestTurn(work: () => Promise<unknown>): Promise<number> {
  const spent = (): number => {
    const { user, system } = process.cpuUsage();
    return (user + system) / 1000;
  };
  let last = spent();
  let longest = 0;
  let isDone = false;
  const watch = (): void => {
    const now = spent();
    longest = Math.max(longest, now - last);
    last = now;
    if (!isDone) setImmediate(watch);
  };
  setImmediate(watch);
  await work();
  isDone = true;
  await new Promise((resolve) => setImmediate(resolve));
  return longest;
}

async function expectShortTurns(work: () => Promise<unknown>): Promise<void> {
  let shortest = Infinity;
  for (let tries = 0; tries < TRIES && shortest > LONGEST_TURN_MS; tries++) {
    shortest = Math.min(shortest, await longestTurn(work));
  }
  expect(shortest).toBeLessThan(LONGEST_TURN_MS);
}

const alternating = (): Uint32Array => Uint32Array.from({ length: MILLION / 4 }, (_, idx) => idx % 2);
const all = async (count: number, ask: () => unknown): Promise<void> => {
  await Promise.all(Array.from({ length: count }, () => ask()));
};

test('256 requests about an empty disk of 4 TiB leave other requests their turns of the loop', async () => {
  const { vdi } = vdiOf(new Uint32Array(MILLION));
  const { vdi: base } = vdiOf(new Uint32Array(MILLION));
  await expectShortTurns(() => all(256, () => vdi.extents(0, vdi.size, () => true)));
  await expectShortTurns(() => all(256, () => vdi.changedSince(base, 0, vdi.size, () => true)));
  await expectShortTurns(() => all(256, () => vdi.trim(0, vdi.size, false)));
  await expectShortTurns(() => all(256, () => vdi.zero(0, vdi.size, { noHole: false, fua: false, fastZero: true })));
  await expectShortTurns(() => all(256, () => vdi.cache(0, vdi.size)));
});

test('so do requests about a map in which no two neighbouring entries are the same', async () => {
  const { vdi } = vdiOf(alternating());
  const { vdi: base } = vdiOf(new Uint32Array(MILLION / 4));
  await expectShortTurns(() => all(2, () => vdi.extents(0, vdi.size, () => true)));
  await expectShortTurns(() => all(2, () => vdi.changedSince(base, 0, vdi.size, () => true)));
  await expectShortTurns(() => all(2, () => vdi.cache(0, vdi.size)));
});

test('a trim of a full map leaves other requests their turns of the loop, and all of it is done', async () => {
  const { vdi, open } = vdiOf(new Uint32Array(MILLION));
  await expectShortTurns(async () => {
    open.map.fill(9);
    await vdi.trim(OBJECT / 2, vdi.size - OBJECT / 2, false);
  });
  expect(endOfZeros(open.map, 1, MILLION)).toBe(MILLION);
  expect(open.map[0]).toBe(9);
});

test('the long work of one disk does not make another disk wait for all of it', async () => {
  const { vdi: greedy } = vdiOf(alternating());
  const { vdi: other } = vdiOf(alternating());
  let answered = 0;
  const floods = all(6, async () => {
    await greedy.extents(0, greedy.size, () => true);
    answered++;
  });
  await other.extents(0, other.size, () => true);
  expect(answered).toBeLessThan(6);
  await floods;
});

test('a snapshot does not wait for a trim of a million objects: it is taken in between, and the trim continues', async () => {
  const { vdi, open } = vdiOf(new Uint32Array(MILLION).fill(9));
  const trim = Promise.resolve(vdi.trim(0, vdi.size, false));
  await new Promise((resolve) => setImmediate(resolve));
  await vdi.gate.close();
  const frozen = open.map.slice();
  expect(endOfSame(frozen, new Uint32Array(MILLION), 0, MILLION)).toBeLessThan(MILLION);
  for (let turns = 0; turns < 20; turns++) await new Promise((resolve) => setImmediate(resolve));
  expect(endOfSame(open.map, frozen, 0, MILLION)).toBe(MILLION);
  vdi.gate.open();
  await new Promise((resolve) => setImmediate(resolve));
  await vdi.gate.newEpoch();
  expect(endOfZeros(open.map, 0, MILLION)).toBeLessThan(MILLION);
  await trim;
  expect(endOfZeros(open.map, 0, MILLION)).toBe(MILLION);
});

test('a trim that fails at one object reports it, leaves the gate, and has nothing in flight when it is answered', async () => {
  let running = 0;
  const zeroObject = async (idx: number): Promise<void> => {
    running++;
    await new Promise((resolve) => setImmediate(resolve));
    running--;
    if (idx === 70) throw new Error('object 70');
  };
  const { vdi } = vdiOf(new Uint32Array(200).fill(9), { zeroObject });
  await expect(Promise.resolve(vdi.zero(0, vdi.size, { noHole: true, fua: false }))).rejects.toThrow('object 70');
  expect(running).toBe(0);
  await vdi.gate.close();
});

test('all requests of a disk together query the store about four objects at a time, and all are answered', async () => {
  let running = 0;
  let most = 0;
  const ask = async (): Promise<void> => {
    most = Math.max(most, ++running);
    await new Promise((resolve) => setImmediate(resolve));
    running--;
  };
  const objectExtents: ObjectVdi['objectExtents'] = async (_vid, idx, at, length, sink) => {
    await ask();
    if (idx % 3 > 0) sink(at, length / 2, idx % 3 === 1); // the store may report less than requested
  };
  const map = Uint32Array.from({ length: 100 }, (_, idx) => (idx % 4 === 0 ? 0 : 9));
  const { vdi } = vdiOf(map, { objectExtents, cacheObject: ask });
  let reached = 0;
  await Promise.all([
    all(40, async () => {
      let end = 0;
      await vdi.extents(0, vdi.size, (at, length) => {
        expect(at).toBe(end);
        end += length;
        return true;
      });
      if (end === vdi.size) reached++;
    }),
    all(40, () => vdi.extents(0, vdi.size, () => false)),
    all(40, () => vdi.cache(0, vdi.size)),
  ]);
  expect(reached).toBe(40);
  expect(most).toBe(4);
});

test('extents of a disk that is shrunk meanwhile end at the requested offset, without an error', async () => {
  const { vdi, open } = vdiOf(alternating());
  const size = vdi.size;
  let end = 0;
  const said = Promise.resolve(
    vdi.extents(0, size, (at, length) => {
      end = at + length;
      return true;
    }),
  );
  open.map = new Uint32Array(8);
  await said;
  expect(end).toBe(size);
});
