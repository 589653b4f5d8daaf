/** The small pure functions of the command line: sizes, zero runs, trees. */
import { describe, expect, test } from 'vitest';
import { runsOf } from '../../src/jobs/buffer-runs.js';
import { differences } from '../../src/jobs/disk-difference.js';
import { table } from '../../src/cli/output.js';
import { printable, printableJson } from '../../src/text/printable.js';
import { formatSize, parseSize, SizeError } from '../../src/text/size.js';
import { treeLines, treeOf } from '../../src/cli/vdi-tree.js';
import type { VdiRecord } from '../../src/operations/operations.js';

describe('text from outside', () => {
  test('is printed without control characters, and otherwise unchanged', () => {
    expect(printable('\x1b[2J\x07\x9b\x7f\u202eab\u2066\u2028\ud800')).toBe(
      '\\x1b[2J\\x07\\x9b\\x7f\\u202eab\\u2066\\u2028\\ud800',
    );
    expect(printable('Grüße, 磁盘, 👩\u200d💻 \\ │')).toBe('Grüße, 磁盘, 👩\u200d💻 \\ │');
    const value = { name: '\x1b\x9b\u202e' };
    expect(printableJson(JSON.stringify(value))).toBe('{"name":"\\u001b\\u009b\\u202e"}');
    expect(JSON.parse(printableJson(JSON.stringify(value)))).toEqual(value);
  });

  test('is aligned by its printed form, in a table of any length', () => {
    expect(table(['A', 'B'], [['\x1b', '1']])).toBe('A     B\n\\x1b  1\n');
    const rows = Array.from({ length: 300_000 }, (_, n) => [String(n)]);
    expect(table(['N'], rows, ['N']).split('\n')).toHaveLength(300_002);
  });
});

describe('sizes', () => {
  test.each([
    ['4096', 4096],
    ['4096B', 4096],
    ['512k', 512 * 1024],
    ['10G', 10 * 2 ** 30],
    ['10 GiB', 10 * 2 ** 30],
    ['1.5T', 1.5 * 2 ** 40],
    ['0.5K', 512],
    ['1P', 2 ** 50],
    [' 3M ', 3 * 2 ** 20],
  ])('%j is %d bytes', (text, bytes) => expect(parseSize(text)).toBe(bytes));

  test.each([
    '',
    'x',
    '0',
    '0G',
    '-1',
    '-5G',
    '1KB',
    '1e3',
    '0x10',
    '1.5',
    '1..5G',
    '1,5G',
    '1.3333K',
    '9P9',
    '9999999P',
    '٣G',
    'G',
    '1 0G',
    '1BiB',
  ])('%j is refused', (text) => expect(() => parseSize(text)).toThrow(SizeError));

  test.each([
    [0, '0 B'],
    [1023, '1023 B'],
    [1024, '1 KiB'],
    [1536, '1.5 KiB'],
    [10 * 2 ** 30, '10 GiB'],
    [123 * 2 ** 30 + 5, '123 GiB'],
    [2 ** 50, '1 PiB'],
  ])('%d bytes are written %j', (bytes, text) => expect(formatSize(bytes)).toBe(text));
});

describe('zero runs', () => {
  const UNIT = 64 * 1024;

  test('neighbouring units of the same kind are one run, and a tail shorter than a unit counts', () => {
    const buffer = Buffer.alloc(4 * UNIT + 100);
    buffer[2 * UNIT] = 1;
    buffer[3 * UNIT - 1] = 1;
    expect(runsOf(buffer, UNIT)).toEqual([
      { from: 0, to: 2 * UNIT, kind: 'zeros' },
      { from: 2 * UNIT, to: 3 * UNIT, kind: 'data' },
      { from: 3 * UNIT, to: 4 * UNIT + 100, kind: 'zeros' },
    ]);
  });

  test('a single byte at the very end is data', () => {
    const buffer = Buffer.alloc(UNIT + 1);
    buffer[UNIT] = 1;
    expect(runsOf(buffer, UNIT)).toEqual([
      { from: 0, to: UNIT, kind: 'zeros' },
      { from: UNIT, to: UNIT + 1, kind: 'data' },
    ]);
  });

  test('compared with another buffer, equal ranges are distinguished from differing ones', () => {
    const have = Buffer.alloc(4 * UNIT, 7);
    const want = Buffer.from(have);
    want.fill(0, UNIT, 2 * UNIT);
    want[2 * UNIT] = 1;
    expect(runsOf(want, UNIT, have)).toEqual([
      { from: 0, to: UNIT, kind: 'same' },
      { from: UNIT, to: 2 * UNIT, kind: 'zeros' },
      { from: 2 * UNIT, to: 3 * UNIT, kind: 'data' },
      { from: 3 * UNIT, to: 4 * UNIT, kind: 'same' },
    ]);
    // Ranges of data close to each other are written as one, with the zeros between them; without another buffer there are zeros.
    expect(differences(want.subarray(0, 2 * UNIT), undefined)).toEqual([{ from: 0, to: UNIT, kind: 'data' }]);
    const gaps = Buffer.alloc(UNIT);
    gaps[0] = gaps[8 * 1024] = 1;
    expect(differences(gaps, Buffer.alloc(UNIT, 1))).toEqual([
      { from: 0, to: 12 * 1024, kind: 'data' },
      { from: 12 * 1024, to: UNIT, kind: 'zeros' },
    ]);
  });
});

describe('the tree', () => {
  let clock = 0;
  const vdi = (vid: number, parentVid: number, name: string, tag = ''): VdiRecord => ({
    vid,
    name,
    tag,
    isSnapshot: tag !== '',
    snapId: 1,
    size: 512,
    blockSizeShift: 22,
    parentVid,
    createdAt: ++clock,
    snapshotAt: tag === '' ? 0 : clock,
  });
  const drawn = (vdis: VdiRecord[]): string[] =>
    treeLines(treeOf(vdis)).map((line) => line.replace(/ {2}\[.*\]$/, '').replace('  (you are here)', ' *'));

  test('the history is a straight line, and clones branch off their snapshots', () => {
    const vdis = [vdi(1, 0, 'a', 'one'), vdi(2, 1, 'a', 'two'), vdi(3, 2, 'a'), vdi(4, 1, 'b'), vdi(5, 1, 'c')];
    expect(drawn(vdis)).toEqual(['a@one', '│  ├─ b *', '│  └─ c *', 'a@two', 'a *']);
  });

  test('a hundred snapshots in a row are not indented deeper than one', () => {
    const vdis = Array.from({ length: 100 }, (_, i) => vdi(i + 1, i, 'a', `t${i}`));
    expect(drawn([...vdis, vdi(101, 100, 'a')]).every((line) => line.startsWith('a'))).toBe(true);
  });

  test('a VDI whose parent is gone, or is itself, is a root, and no VDI is missing', () => {
    expect(drawn([vdi(7, 3, 'orphan'), vdi(8, 8, 'self')])).toEqual(['orphan *', 'self *']);
  });
});
