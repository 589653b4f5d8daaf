/** Counts of references: many to one object, objects far from each other, and vids that come and go. */
import { expect, test } from 'vitest';
import { localObjectKey, ReferenceCounts } from '../../src/store/local/reference-counts.js';

test('an object may have any number of references; its neighbours keep theirs', () => {
  const counts = new ReferenceCounts();
  counts.add(7, 11);
  for (let n = 1; n <= 1000; n++) {
    counts.add(7, 10);
    expect(counts.of(7, 10)).toBe(n);
  }
  counts.add(7, 12);
  expect([counts.of(7, 9), counts.of(7, 11), counts.of(7, 12)]).toEqual([0, 1, 1]);
  for (let n = 999; n >= 0; n--) expect(counts.drop(7, 10)).toBe(n);
  expect(() => counts.drop(7, 10)).toThrow('invariant');
  expect([...counts.keys()]).toEqual([localObjectKey(7, 11), localObjectKey(7, 12)]);
});

test('counts are the same as those of a plain map', () => {
  const counts = new ReferenceCounts();
  const model = new Map<number, number>();
  let state = 1;
  const random = (below: number): number => {
    state = (Math.imul(state, 1103515245) + 12345) >>> 0;
    return (state >>> 8) % below;
  };
  for (let n = 0; n < 20_000; n++) {
    const vid = 1 + random(5);
    const idx = random(4) * 300_000 + random(6) * 200;
    const key = localObjectKey(vid, idx);
    const before = model.get(key) ?? 0;
    if (before > 0 && random(2) === 0) {
      expect(counts.drop(vid, idx)).toBe(before - 1);
      model.set(key, before - 1);
    } else {
      counts.add(vid, idx);
      model.set(key, before + 1);
    }
    expect(counts.of(vid, idx)).toBe(model.get(key));
  }
  const left = [...model].filter(([, count]) => count > 0).map(([key]) => key);
  expect([...counts.keys()].sort((a, b) => a - b)).toEqual(left.sort((a, b) => a - b));
  for (const vid of [1, 2, 3, 4, 5, 6])
    expect(counts.uses(vid)).toBe(
      left.some((key) => key >= localObjectKey(vid, 0) && key < localObjectKey(vid + 1, 0)),
    );
});
