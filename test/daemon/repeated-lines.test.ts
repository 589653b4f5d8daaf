/** Repeated lines of the log: the first at once, then at intervals with the count, and always bounded. */
import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import {
  causeOf,
  FIRST_INTERVAL_MS,
  LONGEST_INTERVAL_MS,
  MAX_CAUSES,
  MAX_SUBJECTS,
  RepeatedLines,
  times,
} from '../../src/daemon/log/repeated-lines.js';
import { StoreError } from '../../src/store/store-error.js';

/** A line may be a check's interval late. */
const LATE_MS = 1_000;

let lines: RepeatedLines;
let written: string[];

beforeEach(() => {
  vi.useFakeTimers();
  lines = new RepeatedLines();
  written = [];
});

afterEach(() => {
  lines.close();
  vi.useRealTimers();
});

function tell(subject: string, cause: string, detail = ''): void {
  lines.tell(subject, cause, (repetition) => written.push(`${subject} ${cause}${detail}${times(repetition)}`));
}

function taken(): string[] {
  return written.splice(0);
}

test('the first line of a cause is written at once; later ones are counted and written with the latest of them', () => {
  for (let n = 1; n <= 100; n++) tell('disk', 'EIO', ` ${n}`);
  expect(taken()).toEqual(['disk EIO 1']);
  vi.advanceTimersByTime(FIRST_INTERVAL_MS + LATE_MS);
  expect(taken()).toEqual(['disk EIO 100 (the last of 99 in 10 s)']);
  expect(vi.getTimerCount()).toBe(1);
});

test('a lasting cause is logged less and less often, but never stops; a cause that ended is new when it recurs', () => {
  const advance = (ms: number): void => {
    for (let at = 0; at < ms; at += LATE_MS) {
      tell('disk', 'EIO');
      vi.advanceTimersByTime(LATE_MS);
    }
  };
  advance(60 * 60_000);
  const inAnHour = taken().length;
  expect(inAnHour).toBeGreaterThan(6);
  expect(inAnHour).toBeLessThan(14);
  vi.advanceTimersByTime(2 * LONGEST_INTERVAL_MS + 2 * LATE_MS);
  expect(taken()).toHaveLength(1);
  expect(vi.getTimerCount()).toBe(0);
  tell('disk', 'EIO');
  expect(taken()).toEqual(['disk EIO']);
});

test('causes and subjects do not hide each other', () => {
  for (let n = 0; n < 3; n++) {
    tell('one', 'EIO');
    tell('one', 'ENOSPC');
    tell('two', 'EIO');
  }
  expect(taken()).toEqual(['one EIO', 'one ENOSPC', 'two EIO']);
});

test('a thousand causes, and a thousand subjects, cause a bounded number of lines, and all are counted', () => {
  for (let n = 0; n < 1000; n++) tell('one', `cause ${n}`);
  expect(taken()).toHaveLength(MAX_CAUSES + 1);
  for (let n = 0; n < 1000; n++) tell(`subject ${n}`, 'EIO');
  expect(taken()).toHaveLength(MAX_SUBJECTS);
  lines.close();
  expect(taken()).toEqual([
    `one cause 999 (the last of ${1000 - MAX_CAUSES - 1} in 0 s)`,
    `subject 999 EIO (the last of ${1000 - MAX_SUBJECTS} in 0 s)`,
  ]);
  expect(vi.getTimerCount()).toBe(0);
});

test('a cause is the same for all objects, and two causes with the same code are different', () => {
  const full = (object: string): StoreError =>
    new StoreError('NO_SPACE', `writing ${object}`, { cause: Object.assign(new Error('x'), { code: 'ENOSPC' }) });
  expect(causeOf(full('a'))).toBe(causeOf(full('b')));
  expect(causeOf(full('a'))).not.toBe(causeOf(new StoreError('NO_SPACE', 'the cluster answers NO_SPACE')));
  expect(causeOf('a')).toBe('string');
  const endless = new Error('x');
  endless.cause = endless;
  expect(causeOf(endless).length).toBeLessThan(200);
});
