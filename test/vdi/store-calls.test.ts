/** The contract that a store may rely on: a call that breaks it is refused before it reaches the store. */
import { describe, expect, test } from 'vitest';
import type { ObjectVdi } from '../../src/store/open-vdi.js';
import type { VdiRecord } from '../../src/store/vdi-record.js';
import { ObjectCalls } from '../../src/vdi/store-calls.js';

const SHIFT = 20;
const OBJECT = 2 ** SHIFT;
/** The vid of the VDI, and one of another. */
const [OWN, OTHERS] = [9, 4];

/** Objects that accept and record every call. Object 0 is exclusive, 1 is shared, 2 and 3 are not allocated. */
class NotingObjects implements Partial<ObjectVdi> {
  readonly kind = 'objects';
  map = Uint32Array.from([OWN, OTHERS, 0, 0]);
  creationVid = OWN;
  record = { vid: OWN, name: 'disk', tag: '', isSnapshot: false, size: 4 * OBJECT, blockSizeShift: SHIFT } as VdiRecord;
  failure: Error | undefined;
  readonly calls: string[] = [];
  whileCreating: () => void = () => undefined;

  exclusive(idx: number): boolean {
    return this.map[idx] === OWN;
  }

  readObject(vid: number, idx: number, offset: number, into: Buffer): void {
    this.calls.push(`read ${vid} ${idx} ${offset} ${into.length}`);
  }

  writeObject(idx: number, offset: number, data: Buffer): void {
    this.calls.push(`write ${idx} ${offset} ${data.length}`);
  }

  zeroObject(idx: number, offset: number, length: number): void {
    this.calls.push(`zero ${idx} ${offset} ${length}`);
  }

  createObject(idx: number, offset: number, data: Buffer, copyOf: number): void {
    this.calls.push(`create ${idx} ${offset} ${data.length} of ${copyOf}`);
    this.whileCreating();
  }

  setOwner(idx: number, owner: number): void {
    this.calls.push(`owner ${idx} ${owner}`);
    this.map[idx] = owner;
  }

  close(): Promise<void> {
    this.calls.push('close');
    return Promise.resolve();
  }
}

function callsOf(readOnlyBecause?: string): { objects: NotingObjects; calls: ObjectCalls } {
  const objects = new NotingObjects();
  return { objects, calls: new ObjectCalls(objects as unknown as ObjectVdi, readOnlyBecause) };
}

const noHole = { noHole: true };

describe('a call that keeps the contract reaches the store', () => {
  test('at both ends of an object', async () => {
    const { objects, calls } = callsOf();
    await calls.readObject(OTHERS, 1, OBJECT - 1, Buffer.alloc(1));
    await calls.writeObject(0, 0, Buffer.alloc(OBJECT));
    await calls.zeroObject(0, OBJECT - 1, 1, noHole);
    await calls.makeObject(1, 5, Buffer.alloc(2), OTHERS);
    await calls.makeEmptyObject(3);
    await calls.dropObject(0);
    expect(objects.calls).toEqual([
      `read ${OTHERS} 1 ${OBJECT - 1} 1`,
      `write 0 0 ${OBJECT}`,
      `zero 0 ${OBJECT - 1} 1`,
      `create 1 5 2 of ${OTHERS}`,
      `owner 1 ${OWN}`,
      'create 3 0 0 of 0',
      `owner 3 ${OWN}`,
      'owner 0 0',
    ]);
  });

  test('an entry of the map gets the vid under which its object was made, also if the VDI has another one by then', async () => {
    const { objects, calls } = callsOf();
    objects.whileCreating = () => (objects.creationVid = 17);
    await calls.makeObject(2, 0, Buffer.alloc(1), 0);
    expect(objects.calls.at(-1)).toBe(`owner 2 ${OWN}`);
  });
});

describe('a call that breaks the contract does not reach the store:', () => {
  test.each<[string, RegExp, (calls: ObjectCalls) => unknown]>([
    ['a read past the end of an object', /outside/, (calls) => calls.readObject(OWN, 0, OBJECT - 1, Buffer.alloc(2))],
    ['a read in front of it', /outside/, (calls) => calls.readObject(OWN, 0, -1, Buffer.alloc(1))],
    ['a read at no number', /outside/, (calls) => calls.readObject(OWN, 0, Number.NaN, Buffer.alloc(1))],
    ['a read of what is not allocated', /outside/, (calls) => calls.readObject(0, 2, 0, Buffer.alloc(1))],
    ['a hint past the end', /outside/, (calls) => calls.cacheObject(OWN, 0, 1, OBJECT)],
    ['extents past the end', /outside/, (calls) => calls.objectExtents(OWN, 0, 1, OBJECT, () => true)],
    ['a write past the end of an object', /outside/, (calls) => calls.writeObject(0, 1, Buffer.alloc(OBJECT))],
    ['a write at no number', /outside/, (calls) => calls.writeObject(0, Number.NaN, Buffer.alloc(1))],
    ['a write at no object', /outside/, (calls) => calls.writeObject(-1, 0, Buffer.alloc(1))],
    ['zeroing past the end of an object', /outside/, (calls) => calls.zeroObject(0, OBJECT, 1, noHole)],
    ['a write into a shared object', /not its alone/, (calls) => calls.writeObject(1, 0, Buffer.alloc(1))],
    ['zeroing a shared object', /not its alone/, (calls) => calls.zeroObject(1, 0, 1, noHole)],
    ['a write into no object', /not its alone/, (calls) => calls.writeObject(2, 0, Buffer.alloc(1))],
    [
      'creating an object behind the end of the disk',
      /behind its end/,
      (calls) => calls.makeObject(4, 0, Buffer.alloc(1), 0),
    ],
    ['creating a larger object', /outside/, (calls) => calls.makeObject(2, 0, Buffer.alloc(OBJECT + 1), 0)],
    ['dropping an object behind the end of the disk', /behind its end/, (calls) => calls.dropObject(4)],
  ])('%s', async (_, message, call) => {
    const { objects, calls } = callsOf();
    await expect(Promise.resolve().then(() => call(calls))).rejects.toThrow(message);
    expect(objects.calls).toEqual([]);
  });

  test('a change of a snapshot or of a read-only store, or any call after the close', async () => {
    const { objects, calls } = callsOf();
    objects.record = { ...objects.record, isSnapshot: true, tag: 'a' };
    expect(() => calls.writeObject(0, 0, Buffer.alloc(1))).toThrow(/disk@a is a snapshot/);
    const readOnly = callsOf('it is on a CD');
    expect(() => readOnly.calls.dropObject(0)).toThrow(/nothing is written: it is on a CD/);
    const closed = callsOf();
    await closed.calls.close();
    expect(() => closed.calls.readObject(OWN, 0, 0, Buffer.alloc(1))).toThrow(/after its close/);
    expect(() => closed.calls.writeObject(0, 0, Buffer.alloc(1))).toThrow(/after its close/);
    expect([...objects.calls, ...readOnly.objects.calls, ...closed.objects.calls]).toEqual(['close']);
  });

  test('a call on a VDI that another client has deleted fails with that reason', () => {
    const { objects, calls } = callsOf();
    objects.failure = new Error('it was deleted');
    objects.map = new Uint32Array(0);
    expect(() => calls.writeObject(0, 0, Buffer.alloc(1))).toThrow('it was deleted');
  });
});
