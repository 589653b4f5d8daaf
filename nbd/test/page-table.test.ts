/** The table of pages and the set of ranges against plain sets of numbers. */

import fc from 'fast-check';
import { expect, test } from 'vitest';
import { RangeSet } from '../src/filters/range-set.js';
import { PageTable } from '../src/page-table.js';

/** Larger than two directories. */
const PAGES = 3000;

const range = fc
  .tuple(
    fc.integer({ min: 0, max: PAGES }),
    fc.oneof(fc.integer({ min: 0, max: 5 }), fc.integer({ min: 0, max: PAGES })),
  )
  .map(([from, length]) => ({ from, to: Math.min(PAGES, from + length) }));

test('a table of pages has what was set and not deleted', () => {
  const operation = fc.record({ isSet: fc.boolean(), range });
  fc.assert(
    fc.property(fc.array(operation, { maxLength: 12 }), range, (operations, { from, to }) => {
      const table = new PageTable<{ readonly index: number }>();
      const model = new Set<number>();
      for (const { isSet, range: changed } of operations) {
        if (!isSet) table.deleteRange(changed.from, changed.to);
        for (let index = changed.from; index < changed.to; index++) {
          if (isSet) table.set(index, { index });
          if (isSet) model.add(index);
          else model.delete(index);
        }
      }
      expect(table.count).toBe(model.size);
      for (let index = from; index < to; index += 7)
        expect(table.get(index)?.index).toBe(model.has(index) ? index : undefined);
      const first = (isThere: boolean): number => {
        for (let index = from; index < to; index++) if (model.has(index) === isThere) return index;
        return to;
      };
      expect(table.firstPresent(from, to)).toBe(first(true));
      expect(table.firstAbsent(from, to)).toBe(first(false));
    }),
    { numRuns: 200 },
  );
});

test('a table of few pages far apart is passed over quickly', () => {
  const table = new PageTable<object>();
  const far = 2 ** 40;
  table.set(5, {});
  table.set(far, {});
  expect(table.firstPresent(6, 2 ** 41)).toBe(far);
  table.deleteRange(0, 2 ** 41);
  expect(table.count).toBe(0);
  expect(table.firstPresent(0, 2 ** 41)).toBe(2 ** 41);
});

test('pages far apart cost much less than a page each, also after their neighbours are gone', () => {
  const table = new PageTable<object>();
  const page = {};
  const before = process.memoryUsage().heapUsed;
  for (let index = 0; index < 10_000 * 1024; index += 1024) {
    for (let beside = index; beside < index + 1024; beside += 32) table.set(beside, page);
    table.deleteRange(index + 1, index + 1024);
  }
  expect(table.count).toBe(10_000);
  // 8 KiB each would be 80 MB, and so is what would stay of the neighbours. There may be garbage in it.
  expect(process.memoryUsage().heapUsed - before).toBeLessThan(50e6);
});

test('a set of ranges has what was added, in as few ranges as there can be', () => {
  fc.assert(
    fc.property(fc.array(range, { maxLength: 20 }), range, (added, { from, to }) => {
      const set = new RangeSet();
      const model = new Uint8Array(PAGES + 1);
      for (const each of added) {
        set.add(each.from, each.to);
        model.fill(1, each.from, each.to);
      }
      expect(set.has(from)).toBe(model[from] === 1);
      let end = from;
      while (model[end] === 1) end++;
      expect(set.endAt(from)).toBe(end);
      let next = from;
      while (next < to && model[next] === 0) next++;
      expect(set.nextFrom(from, to)).toBe(Math.max(from, next) > to ? to : next);
      expect(set.count).toBe(
        model.reduce((count, value, at) => count + (value === 1 && model[at - 1] !== 1 ? 1 : 0), 0),
      );
    }),
    { numRuns: 500 },
  );
});
