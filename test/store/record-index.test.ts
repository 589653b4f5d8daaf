/** The index of records against a plain list, by random changes. */
import fc from 'fast-check';
import { expect, test } from 'vitest';
import { RecordIndex } from '../../src/store/local/record-index.js';
import { inOrder, type VdiRecord } from '../../src/store/vdi-record.js';

const change = fc.record({
  isDelete: fc.boolean(),
  vid: fc.integer({ min: 1, max: 12 }),
  name: fc.constantFrom('a', 'b', 'ab', 'é'),
  snapId: fc.integer({ min: 1, max: 4 }),
  parentVid: fc.integer({ min: 0, max: 12 }),
});

test('after any changes it has the content of a plain list, in order, and lists handed out earlier stay unchanged', () => {
  fc.assert(
    fc.property(fc.array(change, { maxLength: 60 }), (changes) => {
      const index = new RecordIndex();
      const plain = new Map<number, VdiRecord>();
      const handedOut: { readonly list: readonly VdiRecord[]; readonly copy: readonly VdiRecord[] }[] = [];
      for (const [n, { isDelete, ...fields }] of changes.entries()) {
        if (isDelete) {
          index.delete(fields.vid);
          plain.delete(fields.vid);
        } else {
          const record = {
            ...fields,
            tag: '',
            isSnapshot: false,
            size: 512,
            blockSizeShift: 22,
            createdAt: 0,
            snapshotAt: 0,
          };
          index.set(record);
          plain.set(record.vid, record);
        }
        if (n % 3 === 0) handedOut.push({ list: index.all(), copy: [...index.all()] });
        const wanted = [...plain.values()].sort((a, b) => inOrder(a, b) || a.vid - b.vid);
        expect(index.all()).toEqual(wanted);
        expect(index.named(fields.name)).toEqual(wanted.filter(({ name }) => name === fields.name));
        expect(index.get(fields.vid)).toBe(plain.get(fields.vid));
        const children = index.childrenOf(fields.parentVid).map(({ vid }) => vid);
        const parents = fields.parentVid === 0 ? [] : wanted.filter(({ parentVid }) => parentVid === fields.parentVid);
        expect(new Set(children)).toEqual(new Set(parents.map(({ vid }) => vid)));
      }
      for (const { list, copy } of handedOut) expect(list).toEqual(copy);
    }),
    { numRuns: 200 },
  );
});
