/**
 * The rules of the protocol that keep data and references, one test each, against the stand-in: which requests it sees, and
 * how the store handles nodes that fail at the worst moment.
 */
import { spawn } from '../harness/daemon.js';
import fs from 'node:fs';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { MAX_PIECE_BYTES } from '../../src/store/sheep/pieces.js';
import { SheepStore } from '../../src/store/sheep/sheep-store.js';
import { zerosForMissing } from '../../src/store/sheep/zeros-for-missing.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { ObjectCalls } from '../../src/vdi/store-calls.js';
import { objectsOf, type Vdi } from '../../src/vdi/vdi.js';
import { hash, Op, Res, StandIn, type Seen } from './stand-in.js';

const SHIFT = 20;
const OBJECT = 2 ** SHIFT;
const COW = 2;
const TABLE = 4664;
const GREF = 4_198_968;
const VDI_BIT = 1n << 63n;

let cluster: StandIn;
let store: SheepStore;
let catalog: VdiCatalog;
let vdi: Vdi;

async function connect(retryMs = 10_000, attemptMs = 30_000): Promise<void> {
  store = await SheepStore.open(cluster.address, { retryMs, attemptMs });
  catalog = new VdiCatalog(store);
}

beforeEach(async () => {
  cluster = await new StandIn().start();
  await connect();
  await catalog.create('disk', 16 * OBJECT, { blockSizeShift: SHIFT });
  vdi = await catalog.openVdi('disk');
});

afterEach(async () => {
  cluster.fault = () => undefined;
  expect(cluster.violations).toEqual([]);
  await catalog.close();
  await cluster.stop();
});

function isTableWrite({ opcode, oid, offset }: Seen): boolean {
  return opcode === Op.WRITE && (oid & VDI_BIT) !== 0n && offset >= TABLE && offset < GREF;
}

function isDataWrite({ opcode, oid, length }: Seen): boolean {
  return opcode === Op.WRITE && (oid & VDI_BIT) === 0n && length > 0;
}

async function content(of: Vdi = vdi): Promise<Buffer> {
  const data = Buffer.alloc(of.size, 0xaa);
  await of.read(0, data);
  return data;
}

/** Applies `fault` to the first request that `matches`. */
function failOnce(matches: (request: Seen) => boolean, fault: ReturnType<StandIn['fault']>): void {
  let done = false;
  cluster.fault = (request) => {
    if (done || !matches(request)) return undefined;
    done = true;
    return fault;
  };
}

describe('requests on the wire', () => {
  test('a read of a hole sends no request', async () => {
    const before = cluster.seen.length;
    expect((await content()).every((byte) => byte === 0)).toBe(true);
    expect(cluster.seen.length).toBe(before);
  });

  test('the table entries of neighbouring objects created together are written in few requests', async () => {
    cluster.seen.length = 0;
    await vdi.write(0, Buffer.alloc(16 * OBJECT, 1), false);
    expect(cluster.seen.filter(({ opcode }) => opcode === Op.CREATE)).toHaveLength(16);
    expect(cluster.seen.filter(isTableWrite).length).toBeLessThan(12);
  });

  test('a write of a whole shared object does not copy the object first', async () => {
    await vdi.write(0, Buffer.alloc(2 * OBJECT, 1), false);
    await catalog.snapshot('disk', 'a');
    cluster.seen.length = 0;
    await vdi.write(0, Buffer.alloc(OBJECT, 2), false);
    await vdi.write(OBJECT, Buffer.alloc(10, 2), false);
    const created = cluster.seen.filter(({ opcode }) => opcode === Op.CREATE);
    expect(created.map(({ flags }) => (flags & COW) !== 0)).toEqual([false, true]);
  });

  test.each([
    ['a snapshot', () => catalog.snapshot('disk', 's')],
    ['a temporary snapshot', () => catalog.snapshotTemporary('disk', 'now')],
  ])(
    'under %s, a trim of zeros copies and writes nothing, and a trim of data reads only up to the first byte that is not zero',
    async (_, take) => {
      await vdi.write(0, Buffer.alloc(OBJECT), false);
      await vdi.write(OBJECT, Buffer.alloc(2 * OBJECT, 1), false);
      await vdi.write(3 * OBJECT, Buffer.alloc(10, 1), false);
      await take();
      cluster.seen.length = 0;
      await vdi.trim(0, OBJECT, false);
      await vdi.zero(1000, OBJECT / 2, { noHole: false, fua: false });
      await vdi.trim(3 * OBJECT + 4096, OBJECT - 4096, false);
      const changes = [Op.CREATE, Op.WRITE, Op.REMOVE] as readonly number[];
      expect(cluster.seen.filter(({ opcode }) => changes.includes(opcode))).toEqual([]);
      cluster.seen.length = 0;
      await vdi.trim(OBJECT, OBJECT, false);
      await vdi.trim(2 * OBJECT, 8192, false);
      const read = cluster.seen.filter(({ opcode, oid }) => opcode === Op.READ && (oid & VDI_BIT) === 0n);
      expect(read.reduce((sum, { length }) => sum + length, 0)).toBe(2 * 4096);
      const expected = Buffer.alloc(vdi.size);
      expected.fill(1, 2 * OBJECT + 8192, 3 * OBJECT + 10);
      expect((await content()).equals(expected)).toBe(true);
      cluster.seen.length = 0;
      // An object that the disk does not share is not examined.
      await vdi.trim(2 * OBJECT, 8192, false);
      expect(cluster.seen.filter(({ opcode }) => opcode === Op.READ)).toEqual([]);
    },
  );

  test.each([
    ['at blocks', 0],
    ['between blocks', 1000],
  ])('large reads and writes %s are sent in pieces of a size for which nodes keep memory', async (_, from) => {
    const size = 2 * OBJECT - from;
    await vdi.write(0, Buffer.alloc(2 * OBJECT, 1), false);
    cluster.seen.length = 0;
    const data = Buffer.from(Uint8Array.from({ length: size }, (_unused, n) => n % 251));
    await vdi.write(from, data, false);
    const back = Buffer.alloc(size);
    await vdi.read(from, back);
    expect(back.equals(data)).toBe(true);
    const pieces = cluster.seen.filter(
      ({ opcode, length }) => length > 0 && (opcode === Op.READ || opcode === Op.WRITE),
    );
    expect(pieces.length).toBe(12);
    for (const { offset, length } of pieces) {
      expect(length).toBeLessThanOrEqual(MAX_PIECE_BYTES);
      if (offset !== from) expect(offset % 4096).toBe(0);
    }
    cluster.seen.length = 0;
    await vdi.read(from + 4000, Buffer.alloc(20_000));
    expect(cluster.seen.filter(({ opcode }) => opcode === Op.READ)).toHaveLength(1);
  });

  test('adjacent small writes that arrive together are one request, and its error fails each of them', async () => {
    await vdi.write(0, Buffer.alloc(2 * OBJECT, 1), false);
    cluster.seen.length = 0;
    const expected = Buffer.alloc(2 * OBJECT, 1);
    const write = async (at: number, length: number, fill: number): Promise<void> => {
      expected.fill(fill, at, at + length);
      await vdi.write(at, Buffer.alloc(length, fill), false);
    };
    const lengths = (): number[] => {
      const seen = cluster.seen.splice(0).filter(isDataWrite);
      return seen.map(({ length }) => length).sort((x, y) => x - y);
    };
    // Across the end of an object, last ones first; and one that is not adjacent.
    const run = Array.from({ length: 16 }, (_, n) => OBJECT + 7 * 4096 - n * 4096);
    await Promise.all([...run, 0].map((at, n) => write(at, 4096, n + 2)));
    expect(lengths()).toEqual([4096, 8 * 4096, 8 * 4096]);
    // Of two writes to the same bytes the later one wins, also if it is large.
    await Promise.all([write(512, 512, 20), write(256, 512, 21), write(1024, 512, 22)]);
    expect(lengths()).toEqual([512, 512, 512]);
    await Promise.all([write(4096, 512, 23), write(4096, 65_536, 24), write(90_112, 512, 25), write(90_624, 512, 26)]);
    expect(lengths()).toEqual([512, 1024, 65_536]);
    expect((await content()).subarray(0, 2 * OBJECT).equals(expected)).toBe(true);
    failOnce(isDataWrite, { result: Res.NO_SPACE });
    const failed = await Promise.allSettled([write(0, 512, 1), write(512, 512, 1)]);
    expect(failed.map(({ status }) => status)).toEqual(['rejected', 'rejected']);
    await Promise.all([write(0, 512, 3), write(512, 512, 4)]);
    expect((await content()).subarray(0, 2 * OBJECT).equals(expected)).toBe(true);
  });

  test('two writes to the same bytes are never in flight together', async () => {
    await vdi.write(0, Buffer.alloc(OBJECT, 1), false);
    await Promise.all(Array.from({ length: 20 }, async (_, n) => vdi.write(n * 100, Buffer.alloc(4096, n), false)));
    expect((await content())[19 * 100 + 4095]).toBe(19); // the stand-in would have reported a violation
  });

  test('an erasure-coded object is written in whole stripes only, with one write to a stripe at a time', async () => {
    await catalog.close();
    await cluster.stop();
    cluster = await new StandIn({ copyPolicy: 0x11 }).start();
    await connect();
    await catalog.create('disk', 2 * OBJECT, { blockSizeShift: SHIFT });
    vdi = await catalog.openVdi('disk');
    const expected = Buffer.alloc(2 * OBJECT, 1);
    await vdi.write(0, expected, false);
    cluster.seen.length = 0;
    // Beginnings, middles and ends of stripes, several in one stripe, and across stripes.
    const pieces = [0, 100, 200, 412, 500, 512, 1024, 1100, 4000, OBJECT - 3].map((at, n) => ({
      at,
      data: Buffer.alloc(at === 4000 ? 2000 : 12, n + 2),
    }));
    for (const { at, data } of pieces) data.copy(expected, at);
    await Promise.all(pieces.map(async ({ at, data }) => vdi.write(at, data, false)));
    expect((await content()).equals(expected)).toBe(true);
    const written = cluster.seen.filter(isDataWrite);
    expect(written.length).toBeGreaterThan(0);
    expect(written.filter(({ offset, length }) => offset % 512 !== 0 || length % 512 !== 0)).toEqual([]);
  });

  test.each([
    ['is asked', true],
    ['cannot be asked', false],
  ])(
    'an erasure-coded object is created again only when the last strip of the old one is gone, also if a node %s',
    async (_, isThere) => {
      await catalog.close();
      await cluster.stop();
      cluster = await new StandIn({ copyPolicy: 0x11, reclaimMs: 50 }).start();
      await connect();
      await catalog.create('disk', 2 * OBJECT, { blockSizeShift: SHIFT });
      vdi = await catalog.openVdi('disk');
      if (!isThere) await cluster.stopNode(2);
      await vdi.write(0, Buffer.alloc(2 * OBJECT, 1), false);
      await vdi.trim(0, OBJECT, false);
      await vdi.write(9, Buffer.alloc(9, 2), false);
      await cluster.settled();
      const expected = Buffer.alloc(2 * OBJECT, 1)
        .fill(0, 0, OBJECT)
        .fill(2, 9, 18);
      expect((await content()).equals(expected)).toBe(true);
    },
  );

  test('a table entry that already has its value is not written again', async () => {
    await vdi.write(0, Buffer.alloc(10, 1), false);
    cluster.seen.length = 0;
    await objectsOf(vdi).setOwner(0, vdi.record.vid);
    await objectsOf(vdi).setOwner(5, 0);
    expect(cluster.seen).toEqual([]);
  });

  test('zeros that a node leaves out of its answer are read as zeros, whatever the buffer held', async () => {
    const expected = Buffer.alloc(OBJECT);
    expected.fill(7, 2048, 4096);
    await vdi.write(0, expected, false);
    for (const [from, to] of [
      [0, 8192],
      [512, 3072],
      [3072, 8192],
      [8192, 16384],
    ] as const) {
      const data = Buffer.alloc(to - from, 0xaa);
      await vdi.read(from, data);
      expect(data.equals(expected.subarray(from, to))).toBe(true);
    }
  });

  test('ranges outside an object are refused before they are sent', async () => {
    await vdi.write(0, Buffer.alloc(10, 1), false);
    const calls = new ObjectCalls(objectsOf(vdi), undefined);
    const sent = cluster.seen.length;
    expect(() => calls.writeObject(0, OBJECT - 5, Buffer.alloc(10))).toThrow(/invariant/);
    expect(() => calls.makeObject(16, 0, Buffer.alloc(10), 0)).toThrow(/behind its end/);
    expect(cluster.seen.slice(sent)).toEqual([]);
  });
});

describe('nodes that fail', () => {
  test('a table entry whose answer is lost is not written twice', async () => {
    failOnce(isTableWrite, { cut: 'after' });
    await vdi.write(0, Buffer.alloc(10, 1), false);
    expect(cluster.seen.filter(isTableWrite)).toHaveLength(1);
    expect((await content())[9]).toBe(1);
  });

  test('a table entry that did not arrive is written through another node', async () => {
    failOnce(isTableWrite, { cut: 'before' });
    await vdi.write(0, Buffer.alloc(10, 1), false);
    expect(cluster.seen.filter(isTableWrite)).toHaveLength(2);
    expect((await content())[9]).toBe(1);
  });

  test('a write that is repeated does not overtake a later one to the same bytes', async () => {
    await vdi.write(0, Buffer.alloc(OBJECT, 1), false);
    failOnce(isDataWrite, { cut: 'before' });
    const first = vdi.write(0, Buffer.alloc(4096, 2), false);
    const second = vdi.write(100, Buffer.alloc(4096, 3), false);
    await Promise.all([first, second]);
    const data = await content();
    expect([data[0], data[100], data[4195]]).toEqual([2, 3, 3]);
  });

  describe('a node that stops answering', () => {
    let resume: () => void;
    const until = (): Promise<void> => new Promise((resolve) => (resume = resolve));
    /** From now on the first node does nothing, until it is resumed. */
    const stall = (): void => {
      const resumed = until();
      let isStalled = true;
      void resumed.then(() => (isStalled = false));
      cluster.fault = ({ node }) => (node === 0 && isStalled ? { until: resumed } : undefined);
    };
    const written = (value: number): number =>
      cluster.seen.filter(({ opcode, node, length }) => opcode === Op.WRITE && node !== 0 && length === value).length;
    const eventually = async (what: () => boolean): Promise<void> => {
      for (const deadline = Date.now() + 10_000; !what();) {
        if (Date.now() > deadline) throw new Error('waited too long');
        await new Promise((r) => setTimeout(r, 5));
      }
    };
    /** Writes eight bytes as soon as writes to them are allowed again. */
    const settledWrite = async (at: number, fill: number): Promise<void> => {
      for (const deadline = Date.now() + 10_000; ;) {
        try {
          await vdi.write(at, Buffer.alloc(8, fill), false);
          return;
        } catch (error) {
          if (Date.now() > deadline) throw error;
        }
        await new Promise((r) => setTimeout(r, 20));
      }
    };
    afterEach(() => resume());

    beforeEach(async () => {
      await catalog.close();
      await connect(30_000, 1_000);
      vdi = await catalog.openVdi('disk');
      await vdi.write(0, Buffer.alloc(OBJECT, 1), false);
      cluster.seen.length = 0;
    });

    test('may still carry out a write, so the write is not repeated before the node answers again', async () => {
      stall();
      const first = vdi.write(0, Buffer.alloc(4096, 2), false);
      const second = vdi.write(0, Buffer.alloc(4096, 3), false);
      // Reads continue through other nodes; the list of members is requested again and again.
      const lists = (): number =>
        cluster.seen.filter(({ opcode, node }) => opcode === Op.GET_NODE_LIST && node !== 0).length;
      await eventually(() => lists() >= 2);
      expect(written(4096)).toBe(0);
      await eventually(() => cluster.resets > 0); // requests that the node has not read yet are never read then
      resume();
      await Promise.all([first, second]);
      expect((await content())[0]).toBe(3);
    });

    test('is not waited for once it is no longer a member', async () => {
      stall();
      const first = vdi.write(0, Buffer.alloc(4096, 2), false);
      await eventually(() => cluster.seen.some(({ opcode, node }) => opcode === Op.GET_NODE_LIST && node !== 0));
      cluster.left.add(0);
      await first;
      await vdi.write(0, Buffer.alloc(4096, 3), false);
      resume();
      expect((await content())[0]).toBe(3);
    });

    test('fails a write when the time for repeating is over, and no other write goes to its bytes until the outcome is known', async () => {
      await catalog.close();
      await connect(1_500, 1_000);
      vdi = await catalog.openVdi('disk');
      await vdi.write(0, Buffer.alloc(512, 1), false);
      stall();
      await expect((async () => vdi.write(0, Buffer.alloc(4096, 2), false))()).rejects.toThrow(/may still carry out/);
      await expect((async () => vdi.write(100, Buffer.alloc(8, 3), false))()).rejects.toThrow(/given up/);
      await vdi.write(8192, Buffer.alloc(8, 4), false);
      resume();
      for (const deadline = Date.now() + 10_000; ;) {
        try {
          await vdi.write(100, Buffer.alloc(8, 3), false);
          break;
        } catch (error) {
          if (Date.now() > deadline) throw error;
        }
        await new Promise((r) => setTimeout(r, 20));
      }
      const data = await content();
      expect([data[0], data[100], data[8192]]).toEqual([2, 3, 4]);
    });

    test('blocks an object that it may still create, as a late creation would replace all of the object', async () => {
      await catalog.close();
      await connect(1_500, 1_000);
      vdi = await catalog.openVdi('disk');
      await vdi.write(0, Buffer.alloc(512, 1), false);
      stall();
      const at = 3 * OBJECT;
      await expect((async () => vdi.write(at, Buffer.alloc(4096, 2), false))()).rejects.toThrow(/may still carry out/);
      await expect((async () => vdi.write(at + 100, Buffer.alloc(8, 3), false))()).rejects.toThrow(/given up/);
      resume();
      await settledWrite(at + 100, 3);
      expect((await content())[at + 100]).toBe(3);
    });
  });

  test('requests wait while a cluster is halted', async () => {
    const until = Date.now() + 400;
    cluster.fault = ({ opcode }) => (opcode < 0x80 && Date.now() < until ? { result: Res.HALT } : undefined);
    await vdi.write(0, Buffer.alloc(10, 1), false);
    expect(Date.now()).toBeGreaterThanOrEqual(until);
  });

  test('a request that is not answered in time fails with an error that names the nodes tried', async () => {
    store.cluster.pool.close();
    await connect(300);
    const other = await catalog.openVdi('disk');
    cluster.fault = ({ opcode }) => (opcode < 0x80 ? { result: Res.HALT } : undefined);
    await expect(other.write(0, Buffer.alloc(10, 1), false)).rejects.toThrow(
      /HALT .*it is strict.* fewer zones with nodes .* given up after trying 127/,
    );
  });

  test('a full cluster is reported as full', async () => {
    cluster.fault = ({ opcode }) => (opcode === Op.CREATE ? { result: Res.NO_SPACE } : undefined);
    await expect(vdi.write(0, Buffer.alloc(10, 1), false)).rejects.toMatchObject({ code: 'NO_SPACE' });
  });

  test('a read of a lost object fails, and check says where the object is missing', async () => {
    await vdi.write(0, Buffer.alloc(3 * OBJECT, 1), false);
    for (const oid of [...cluster.objects.keys()])
      if (!(oid & VDI_BIT) && (oid & 0xffffffffn) === 1n) cluster.objects.delete(oid);
    await expect(vdi.read(OBJECT, Buffer.alloc(10))).rejects.toMatchObject({ code: 'GONE' });
    await vdi.read(0, Buffer.alloc(10));
    await catalog.release(vdi);
    const report = await catalog.check({ repair: false });
    expect(report.problems).toEqual([`lost: disk bytes ${OBJECT} to ${2 * OBJECT - 1}`]);
  });

  test('with --missing=zero the remaining objects can be read, and writes are refused', async () => {
    await vdi.write(0, Buffer.alloc(2 * OBJECT, 1), false);
    for (const oid of [...cluster.objects.keys()])
      if (!(oid & VDI_BIT) && (oid & 0xffffffffn) === 1n) cluster.objects.delete(oid);
    const rescue = await SheepStore.open(cluster.address, zerosForMissing('the cluster'));
    const rescued = await new VdiCatalog(rescue).openVdi('disk');
    const data = await content(rescued);
    expect([data[OBJECT - 1], data[OBJECT]]).toEqual([1, 0]);
    expect(() => rescued.write(0, Buffer.alloc(1), false)).toThrow(/nothing is written/);
    await rescue.close();
  });
});

describe('snapshots of another client', () => {
  test('between the creation of an object and its entry put the write in the working VDI, and leak no object', async () => {
    await vdi.write(OBJECT, Buffer.alloc(OBJECT, 1), false);
    let taken: number | undefined;
    const fault = ({ opcode, oid }: Seen): undefined => {
      if (taken !== undefined || opcode !== Op.WRITE || oid & VDI_BIT) return undefined;
      // The vid is read right after the object was created, before the entry is written.
      taken = cluster.externalSnapshot('disk', 'theirs');
      return undefined;
    };
    cluster.fault = fault;
    await vdi.write(0, Buffer.alloc(10, 2), false);
    expect(taken).toBeDefined();
    expect((await content())[9]).toBe(2);
    await expectNothingLeaks();
  });

  test('between the pieces of a large write put all of it in the working VDI', async () => {
    await vdi.write(0, Buffer.alloc(OBJECT, 1), false);
    let pieces = 0;
    cluster.fault = (request) => {
      if (isDataWrite(request) && pieces++ === 1) cluster.externalSnapshot('disk', 'theirs');
      return undefined;
    };
    await vdi.write(0, Buffer.alloc(OBJECT, 2), false);
    expect(pieces).toBeGreaterThan(2);
    expect((await content()).subarray(0, OBJECT).every((byte) => byte === 2)).toBe(true);
    await expectNothingLeaks();
  });

  test('while the nodes copy the inode do not lose the new entry, and leak no object', async () => {
    await vdi.write(0, Buffer.alloc(2 * OBJECT, 1), false);
    await catalog.snapshot('disk', 'first'); // so that the entry replaces one that is shared
    let snapshot: Promise<number> | undefined;
    cluster.fault = (request) => {
      if (snapshot === undefined && isTableWrite(request)) {
        // The nodes have read the inode; our entry arrives; they write back the inode as read.
        snapshot = cluster.externalSnapshotSlowly('disk', 'theirs', () => new Promise((r) => setTimeout(r, 60)));
      }
      return undefined;
    };
    await vdi.write(5, Buffer.alloc(10, 2), false);
    await snapshot;
    const data = await content();
    expect([data[4], data[5], data[14], data[15]]).toEqual([1, 2, 2, 1]);
    const theirs = await catalog.openVdi('disk@theirs');
    expect((await content(theirs))[4]).toBe(1);
    await catalog.release(theirs);
    const first = await catalog.openVdi('disk@first');
    expect((await content(first))[5]).toBe(1);
    await catalog.release(first);
    await expectNothingLeaks();
  });

  test('between the creation of an object and its answer leave two writes in the right order', async () => {
    await vdi.write(0, Buffer.alloc(OBJECT, 1), false);
    failOnce(({ opcode }) => opcode === Op.CREATE, { answerDelayMs: 500 });
    const slow = vdi.write(OBJECT, Buffer.alloc(10, 2), false);
    while (!cluster.dataObjects().some((object) => object.endsWith('/1'))) await new Promise((r) => setTimeout(r, 1));
    cluster.externalSnapshot('disk', 'theirs');
    await vdi.write(0, Buffer.alloc(10, 3), false);
    await slow;
    const data = await content();
    expect([data[0], data[10], data[OBJECT + 9]]).toEqual([3, 1, 2]);
    await expectNothingLeaks();
  });

  test('that the node in use does not know of yet do not lose the new entry', async () => {
    await vdi.write(0, Buffer.alloc(2 * OBJECT, 1), false);
    await catalog.snapshot('disk', 'first');
    const { vid } = vdi.record;
    let snapshot: Promise<number> | undefined;
    cluster.fault = (request) => {
      if (snapshot === undefined && isTableWrite(request)) {
        for (let node = 0; node < 3; node++) cluster.late.set(node, new Set([vid]));
        snapshot = cluster.externalSnapshotSlowly('disk', 'theirs', () => new Promise((r) => setTimeout(r, 60)));
      }
      return undefined;
    };
    await vdi.write(5, Buffer.alloc(10, 2), false);
    await snapshot;
    const data = await content();
    expect([data[4], data[5], data[14], data[15]]).toEqual([1, 2, 2, 1]);
    await expectNothingLeaks();
  });

  test('while VDIs are listed do not hide the disk from the list', async () => {
    let isTaken = false;
    cluster.fault = ({ opcode, oid }) => {
      // The vids in use have been read by now, and their inodes are being read.
      if (isTaken || opcode !== Op.READ || !(oid & VDI_BIT)) return undefined;
      isTaken = true;
      cluster.externalSnapshot('disk', 'theirs');
      return undefined;
    };
    const other = await SheepStore.open(cluster.address);
    const listed = await new VdiCatalog(other).list();
    expect(listed.map(({ name, tag }) => `${name}@${tag}`)).toEqual(['disk@theirs', 'disk@']);
    await other.close();
  });

  test('while a temporary snapshot is taken make it start again, and leak no object', async () => {
    await vdi.write(0, Buffer.alloc(3 * OBJECT, 1), false);
    let snapshot: Promise<number> | undefined;
    cluster.fault = ({ opcode, oid, offset }) => {
      // The counts of the source are written; the nodes read them before that and write them back after it.
      if (
        snapshot === undefined &&
        opcode === Op.WRITE &&
        offset === GREF &&
        oid >> 32n === BigInt(hash('disk')) + (VDI_BIT >> 32n)
      ) {
        snapshot = cluster.externalSnapshotSlowly('disk', 'theirs', () => new Promise((r) => setTimeout(r, 60)));
      }
      return undefined;
    };
    await catalog.snapshotTemporary('disk', 'now');
    expect(snapshot).toBeDefined();
    await vdi.write(0, Buffer.alloc(10, 2), false);
    const now = await catalog.openVdi('disk@now');
    expect((await content(now))[0]).toBe(1);
    await catalog.release(now);
    await catalog.dropTemporary('disk', 'now');
    await expectNothingLeaks();
  });

  test('are not changed by a trim long after them', async () => {
    await vdi.write(0, Buffer.alloc(OBJECT, 1), false);
    cluster.externalSnapshot('disk', 'theirs');
    await vdi.trim(0, OBJECT, false);
    const theirs = await catalog.openVdi('disk@theirs');
    expect((await content(theirs))[0]).toBe(1);
    await catalog.release(theirs);
    expect((await content())[0]).toBe(0);
    await expectNothingLeaks();
  });

  test('an open disk that another client rolled back takes no more writes', async () => {
    await vdi.write(0, Buffer.alloc(OBJECT, 1), false);
    await catalog.snapshot('disk', 'a');
    const other = new VdiCatalog(await SheepStore.open(cluster.address));
    await other.rollback('disk@a');
    await expect((async () => vdi.write(0, Buffer.alloc(10, 2), false))()).rejects.toThrow(/rolled back or replaced/);
    const theirs = await other.openVdi('disk');
    expect((await content(theirs))[0]).toBe(1);
    await other.release(theirs);
    await other.close();
  });

  test('an open VDI that was replaced by another of its name takes no more writes', async () => {
    await vdi.write(0, Buffer.alloc(OBJECT, 1), false);
    await catalog.close();
    await connect(500);
    vdi = await catalog.openVdi('disk');
    cluster.readOnly.add(vdi.record.vid); // cloned while in use
    await expect(vdi.write(0, Buffer.alloc(10, 2), false)).rejects.toThrow(/read-only in the cluster/);
  });
});

test('an object that a failed write has made is removed when the VDI is closed', async () => {
  for (const isFailing of [isDataWrite, isTableWrite]) {
    cluster.fault = (seen) => (isFailing(seen) ? { result: Res.NO_SPACE } : undefined);
    await expect(vdi.write(0, Buffer.alloc(OBJECT, 1), false)).rejects.toThrow();
    expect(cluster.dataObjects()).toHaveLength(1);
    cluster.fault = () => undefined;
    await catalog.release(vdi);
    await cluster.settled();
    expect(cluster.dataObjects()).toEqual([]);
    vdi = await catalog.openVdi('disk');
  }
  await vdi.write(0, Buffer.alloc(OBJECT, 2), false);
  expect(cluster.dataObjects()).toHaveLength(1);
});

test('an object whose entry the nodes have set, though the request failed, is not removed', async () => {
  await catalog.close();
  await connect(500);
  vdi = await catalog.openVdi('disk');
  const isTableRead = ({ opcode, oid, offset }: Seen): boolean =>
    opcode === Op.READ && (oid & VDI_BIT) !== 0n && offset >= TABLE;
  cluster.fault = (seen) =>
    isTableWrite(seen) ? { cut: 'after' } : isTableRead(seen) ? { result: Res.EIO } : undefined;
  await expect(vdi.write(0, Buffer.alloc(OBJECT, 1), false)).rejects.toThrow();
  cluster.fault = () => undefined;
  await catalog.release(vdi);
  vdi = await catalog.openVdi('disk');
  expect((await content())[0]).toBe(1);
});

describe('the catalog', () => {
  test('a rollback whose creation fails leaves the working VDI', async () => {
    await vdi.write(0, Buffer.alloc(OBJECT, 1), false);
    await catalog.snapshot('disk', 'a');
    await vdi.write(0, Buffer.alloc(10, 2), false);
    await catalog.release(vdi);
    cluster.fault = ({ opcode }) => (opcode === Op.NEW_VDI ? { result: Res.NO_SPACE } : undefined);
    await expect(catalog.rollback('disk@a')).rejects.toMatchObject({ code: 'NO_SPACE' });
    cluster.fault = () => undefined;
    vdi = await catalog.openVdi('disk');
    expect((await content())[0]).toBe(2);
  });

  test('a disk that is shrunk gives back the objects behind its new end', async () => {
    await vdi.write(0, Buffer.alloc(4 * OBJECT, 1), false);
    await catalog.release(vdi);
    await catalog.resize('disk', 2 * OBJECT, { force: true });
    await cluster.settled();
    expect(cluster.dataObjects()).toHaveLength(2);
    vdi = await catalog.openVdi('disk');
    expect((await content()).every((byte) => byte === 1)).toBe(true);
    // The store itself leaves nothing behind the end either.
    await vdi.opened.resize(OBJECT);
    await cluster.settled();
    expect(cluster.dataObjects()).toHaveLength(1);
    await expectNothingLeaks();
  });

  test('a repair is refused with an error that says which tool can do it', async () => {
    await catalog.release(vdi);
    await expect(catalog.check({ repair: true })).rejects.toThrow(/dog vdi check NAME.*lists what is lost/s);
  });

  test('a working VDI is not cloned: its writer would find it read-only', async () => {
    await expect(Promise.resolve(store.catalog.clone(vdi.record.vid, 'copy'))).rejects.toThrow(/is not a snapshot/);
    await vdi.write(0, Buffer.alloc(10, 1), false);
  });

  test('an object is copied once for a temporary snapshot, and not at all if it was created after the snapshot', async () => {
    await vdi.write(0, Buffer.alloc(2 * OBJECT, 1), false);
    await catalog.snapshotTemporary('disk', 'now');
    cluster.seen.length = 0;
    await Promise.all([0, 4096, 8192].map(async (at) => vdi.write(at, Buffer.alloc(10, 2), false)));
    await vdi.write(0, Buffer.alloc(10, 3), false);
    await vdi.write(5 * OBJECT, Buffer.alloc(10, 4), false);
    await vdi.write(5 * OBJECT + 4096, Buffer.alloc(10, 5), false);
    const copies = cluster.seen.filter(({ opcode, flags }) => opcode === Op.CREATE && (flags & COW) !== 0);
    expect(copies.map(({ length }) => length)).toEqual([0]);
    await catalog.dropTemporary('disk', 'now');
    await expectNothingLeaks();
  });

  test('a snapshot whose answer is lost is taken only once', async () => {
    failOnce(({ opcode }) => opcode === Op.NEW_VDI, { cut: 'after' });
    await catalog.snapshot('disk', 'a');
    expect((await catalog.list()).map(({ tag }) => tag)).toEqual(['a', '']);
    await vdi.write(0, Buffer.alloc(10, 2), false);
  });

  test('vids are where other tools look for them', async () => {
    expect(vdi.record.vid).toBe(hash('disk'));
    expect(hash('')).toBe(Number(0xcbf29ce484222325n & 0xffffffn));
    await Promise.resolve();
  });

  test('a lock of another client is reported, and our lock is released', async () => {
    const locking = await new StandIn({ useLock: true }).start();
    const ours = await SheepStore.open(locking.address);
    const theirs = await SheepStore.open(locking.address);
    const mine = new VdiCatalog(ours);
    const yours = new VdiCatalog(theirs);
    await mine.create('disk', OBJECT, { blockSizeShift: SHIFT });
    const opened = await mine.openVdi('disk');
    await expect(yours.openVdi('disk')).rejects.toMatchObject({ code: 'LOCKED' });
    await mine.snapshot('disk', 'a');
    await expect(yours.openVdi('disk')).rejects.toMatchObject({ code: 'LOCKED' });
    await mine.release(opened);
    await yours.release(await yours.openVdi('disk'));
    await mine.close();
    await yours.close();
    await locking.stop();
  });

  test('a thousand temporary snapshots would need one vid', async () => {
    await vdi.write(0, Buffer.alloc(2 * OBJECT, 1), false);
    const inodes = (): number => [...cluster.objects.keys()].filter((oid) => oid & VDI_BIT).length;
    await catalog.snapshotTemporary('disk', 'now');
    await catalog.dropTemporary('disk', 'now');
    const before = inodes();
    for (let n = 0; n < 5; n++) {
      await catalog.snapshotTemporary('disk', 'now');
      await vdi.write(n * 10, Buffer.alloc(10, n), false);
      await catalog.dropTemporary('disk', 'now');
    }
    expect(inodes()).toBe(before);
    await expectNothingLeaks();
  });

  test('a temporary snapshot of another process on this machine is kept as long as that process runs', async () => {
    await vdi.write(0, Buffer.alloc(OBJECT, 1), false);
    await catalog.snapshotTemporary('disk', 'now');
    const shadow = [...cluster.objects.values()].find(
      (object) => object.toString('utf8', 256, 259) === 'now',
    ) as Buffer;
    const child = spawn('sleep', ['1000']);
    const stat = fs.readFileSync(`/proc/${child.pid}/stat`, 'utf8');
    const started = Number(stat.slice(stat.lastIndexOf(')') + 2).split(' ')[19]);
    shadow.writeUInt32LE((started % 1024) * 2 ** 22 + (child.pid as number), 532);
    const other = new VdiCatalog(await SheepStore.open(cluster.address));
    expect((await other.list()).map(({ tag }) => tag)).toEqual(['']);
    expect(await other.dropLeftovers()).toBe(0);
    const ended = new Promise((resolve) => child.once('exit', resolve));
    child.kill('SIGKILL');
    await ended;
    expect((await other.list()).map(({ tag }) => tag)).toEqual(['now', '']);
    expect(await other.dropLeftovers()).toBe(1);
    await other.close();
    await catalog.dropTemporary('disk', 'now');
    await expectNothingLeaks();
  });

  test('a reader of a temporary snapshot gets the old data, however long its answer takes', async () => {
    await vdi.write(0, Buffer.alloc(OBJECT, 1), false);
    await catalog.snapshotTemporary('disk', 'now');
    const now = await catalog.openVdi('disk@now');
    failOnce(({ opcode, oid }) => opcode === Op.READ && (oid & VDI_BIT) === 0n, { delayMs: 200 });
    const data = Buffer.alloc(4096);
    await Promise.all([now.read(0, data), vdi.write(0, Buffer.alloc(OBJECT, 2), false)]);
    expect(data.equals(Buffer.alloc(4096, 1))).toBe(true);
    await catalog.release(now);
    await catalog.dropTemporary('disk', 'now');
    await expectNothingLeaks();
  });

  test('removing a dropped copy does not remove a new copy made in the same place', async () => {
    await catalog.close();
    await cluster.stop();
    cluster = await new StandIn({ reclaimMs: 700 }).start();
    await connect();
    await catalog.create('disk', 2 * OBJECT, { blockSizeShift: SHIFT });
    vdi = await catalog.openVdi('disk');
    await vdi.write(0, Buffer.alloc(OBJECT, 1), false);
    await catalog.snapshotTemporary('disk', 'now');
    await vdi.write(0, Buffer.alloc(10, 2), false);
    await catalog.dropTemporary('disk', 'now');
    await catalog.snapshotTemporary('disk', 'now');
    await vdi.write(0, Buffer.alloc(10, 3), false);
    await cluster.settled();
    const now = await catalog.openVdi('disk@now');
    expect((await content(now))[0]).toBe(2);
    await catalog.release(now);
    await catalog.dropTemporary('disk', 'now');
    await expectNothingLeaks();
  });

  test('a temporary snapshot whose copy fails loses that object, and the writer gets no error', async () => {
    await vdi.write(0, Buffer.alloc(2 * OBJECT, 1), false);
    await catalog.snapshotTemporary('disk', 'now');
    cluster.fault = ({ opcode }) => (opcode === Op.CREATE ? { result: Res.NO_SPACE } : undefined);
    await vdi.write(0, Buffer.alloc(10, 2), false);
    const now = await catalog.openVdi('disk@now');
    await expect(now.read(0, Buffer.alloc(10))).rejects.toThrow(/lost/);
    await now.read(OBJECT, Buffer.alloc(10));
    await catalog.release(now);
    cluster.fault = () => undefined;
    await catalog.dropTemporary('disk', 'now');
    await expectNothingLeaks();
  });
});

/** Deletes all VDIs, and checks that no object is left. */
async function expectNothingLeaks(): Promise<void> {
  cluster.fault = () => undefined;
  await catalog.release(vdi);
  for (const { name, tag } of await catalog.list()) await catalog.remove(tag === '' ? name : `${name}@${tag}`);
  await cluster.settled();
  expect(cluster.dataObjects()).toEqual([]);
  expect([...cluster.ledgers.keys()]).toEqual([]);
}
