/**
 * Stores under load, through the catalog and open VDIs: every block carries a sequence number, and a snapshot holds, per block,
 * at least what was acknowledged before it was asked for, nothing issued after it was there, and the same at every reading.
 */
import { expect, test } from 'vitest';
import type { Vdi } from '../../src/vdi/vdi.js';
import { byLength } from '../harness/length.js';
import { bytesOf, checkContent, codeOf, Disk, type Session } from './session.js';

const BLOCK = 4096;
const WRITERS = 4;
const OBJECTS = 4;

const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve));

export function concurrency(session: Session): void {
  const { objectSize: OBJECT, abilities } = session;
  const blocks = (OBJECTS * OBJECT) / BLOCK;
  const snapshots = session.repeats(byLength({ quick: 4, full: 8, long: 50 }));

  const load = async (vdi: Vdi, during: (load: Load) => Promise<void>): Promise<void> => {
    const load = new Load(vdi, blocks);
    const writers = Promise.all(Array.from({ length: WRITERS }, (_, n) => load.writer(n)));
    // If a writer fails, what waits for its writes must end.
    writers.catch(() => (load.stop = true));
    try {
      await during(load);
    } finally {
      load.stop = true;
      await writers;
    }
  };
  const readSpec = async (spec: string): Promise<Buffer> => {
    const vdi = await session.openVdi(spec);
    const all = Buffer.alloc(vdi.size);
    // Not all at once, so that writers come between.
    for (let at = 0; at < all.length; at += 61 * BLOCK) {
      await vdi.read(at, all.subarray(at, Math.min(at + 61 * BLOCK, all.length)));
    }
    await session.release(vdi);
    return all;
  };

  test('snapshots under four writers are points in time and never change', async (context) => {
    if (!abilities.canSnapshot) return context.skip();
    const { name, disk } = await session.newDisk(OBJECTS);
    const frozen = new Map<string, Buffer>();
    await load(disk.vdi, async (load) => {
      for (let n = 0; n < snapshots; n++) {
        await load.writes(100);
        const before = load.acknowledged.slice();
        await session.catalog.snapshot(name, `s${n}`);
        const after = load.issued.slice();
        const seen = await readSpec(`${name}@s${n}`);
        expectMoment(seen, before, after);
        frozen.set(`s${n}`, seen);
        if (n % 3 === 2) {
          await session.catalog.remove(`${name}@s${n - 1}`);
          frozen.delete(`s${n - 1}`);
        }
      }
    });
    for (const [tag, content] of frozen) expect((await readSpec(`${name}@${tag}`)).equals(content), tag).toBe(true);
    if (abilities.countsCopies) expect(disk.vdi.copies).toBeGreaterThan(0);
    for (const tag of frozen.keys()) await session.catalog.remove(`${name}@${tag}`);
    const { copies } = disk.vdi;
    for (let block = 0; block < blocks; block += 16) await disk.vdi.write(block * BLOCK, Buffer.alloc(BLOCK), false);
    if (abilities.copiesEndWithSnapshots) expect(disk.vdi.copies).toBe(copies);
    await session.release(disk.vdi);
    expect((await session.catalog.check({ repair: false })).problems).toEqual([]);
  });

  test('temporary snapshots under four writers are points in time, never change, and cost no copies', async (context) => {
    if (!abilities.canSnapshotTemporarily) return context.skip();
    const { name, disk } = await session.newDisk(OBJECTS);
    await disk.write(0, OBJECTS * OBJECT, 0);
    await load(disk.vdi, async (load) => {
      const frozen = new Map<string, Buffer>();
      for (let n = 0; n < snapshots; n++) {
        await load.writes(50);
        const before = load.acknowledged.slice();
        await session.catalog.snapshotTemporary(name, `now:${n}`);
        const after = load.issued.slice();
        const seen = await readSpec(`${name}@now:${n}`);
        expectMoment(seen, before, after);
        frozen.set(`now:${n}`, seen);
        if (frozen.size <= 2) continue;
        for (const [tag, content] of frozen) {
          expect((await readSpec(`${name}@${tag}`)).equals(content), `${tag} has changed`).toBe(true);
        }
        const [oldest = ''] = frozen.keys();
        await session.catalog.dropTemporary(name, oldest);
        frozen.delete(oldest);
      }
      for (const tag of frozen.keys()) await session.catalog.dropTemporary(name, tag);
    });
    const { copies } = disk.vdi;
    await disk.vdi.write(0, Buffer.alloc(OBJECTS * OBJECT, 1), false);
    expect(disk.vdi.copies).toBe(copies);
    await session.release(disk.vdi);
    expect((await session.catalog.check({ repair: false })).problems).toEqual([]);
  });

  test('snapshots that somebody else takes while we write are points in time, and no write is lost', async (context) => {
    const { snapshotFromOutside } = session.store;
    if (!abilities.canSnapshot || snapshotFromOutside === undefined) return context.skip();
    const { name, disk } = await session.newDisk(8);
    // Every block holds the number of its write; writes go round in order, each answered before the next.
    let written = 0;
    const ending = { stop: false };
    const writer = (async () => {
      while (!ending.stop) {
        written++;
        const at = ((written * 37) % (8 * (OBJECT / BLOCK))) * BLOCK;
        const data = Buffer.alloc(BLOCK);
        data.writeUInt32LE(written);
        data.copy(disk.content, at);
        await disk.vdi.write(at, data, false);
        if (written % 50 === 0) await disk.trim((written % 8) * OBJECT, OBJECT);
      }
    })();
    writer.catch(() => (ending.stop = true));
    const until = async (target: number): Promise<void> => {
      while (written < target && !ending.stop) await turn();
    };
    const bounds: { tag: string; before: number; after: number }[] = [];
    for (let n = 0; n < session.repeats(10); n++) {
      await until(written + 30);
      const before = written - 1;
      await snapshotFromOutside.call(session.store, name, `ext${n}`);
      bounds.push({ tag: `ext${n}`, before, after: written });
    }
    await until(written + 100);
    ending.stop = true;
    await writer;
    await disk.check();
    for (const { tag, before, after } of bounds) {
      const data = await readSpec(`${name}@${tag}`);
      let newest = 0;
      for (let at = 0; at < data.length; at += BLOCK) newest = Math.max(newest, data.readUInt32LE(at));
      expect(newest).toBeGreaterThanOrEqual(before - 1);
      expect(newest).toBeLessThanOrEqual(after + 1);
    }
    await session.release(disk.vdi);
  });

  test('first writes to one object that come together are all there, beside those to its neighbours', async () => {
    const { name, disk } = await session.newDisk(3);
    for (let round = 1; round <= session.repeats(4); round++) {
      const parts = Array.from({ length: 24 }, (_, n) => n * ((3 * OBJECT) / 24));
      await Promise.all(parts.map((at, n) => disk.write(at + 100, BLOCK, round * 30 + n)));
      await disk.check();
      if (abilities.canSnapshot) await session.catalog.snapshot(name, `s${round}`);
      else await disk.trim(0, 3 * OBJECT);
    }
    await session.release(disk.vdi);
  });

  test('of writes to the same block that overlap, the block is one of them, for every reader alike', async () => {
    const { disk } = await session.newDisk(1);
    for (let round = 0; round < 10; round++) {
      const fills = [1, 2, 3, 4].map((n) => round * 4 + n);
      await Promise.all(fills.map(async (fill) => disk.vdi.write(BLOCK, Buffer.alloc(BLOCK, fill), false)));
      const block = Buffer.alloc(BLOCK);
      await disk.vdi.read(BLOCK, block);
      const [fill = 0] = block;
      expect(fills).toContain(fill);
      expect(block.equals(Buffer.alloc(BLOCK, fill))).toBe(true);
    }
    await session.release(disk.vdi);
  });

  test('trims beside writes, in the same objects, under snapshots: no write is lost, what is trimmed is zeros', async () => {
    const { name, disk } = await session.newDisk(4);
    const { vdi } = disk;
    const half = OBJECT / 2;
    const ending = { stop: false };
    /** Owns the first half of each object: writes it, reads it back. */
    const writer = async (): Promise<void> => {
      for (let n = 1; !ending.stop; n++) {
        const at = (n % 4) * OBJECT + ((n * 7) % 32) * 4 * BLOCK;
        const data = Buffer.alloc(4 * BLOCK, (n % 254) + 1);
        await vdi.write(at, data, false);
        const back = Buffer.alloc(data.length);
        await vdi.read(at, back);
        expect(back.equals(data), `what write ${n} left at ${at}`).toBe(true);
        // What is done at once would keep the event loop from everybody else.
        await turn();
      }
    };
    /** Owns the second: writes, trims once or twice, reads zeros. */
    const trimmer = async (): Promise<void> => {
      for (let n = 1; !ending.stop; n++) {
        const at = (n % 4) * OBJECT + half;
        if (n % 3 === 0) await vdi.write(at + ((n * 5) % 64) * BLOCK, Buffer.alloc(BLOCK, 1), false);
        const once = vdi.trim(at, half, false);
        if (n % 2 === 0) await vdi.trim(at, half / 2, true);
        await once;
        const back = Buffer.alloc(half, 1);
        await vdi.read(at, back);
        expect(back.equals(Buffer.alloc(half)), `what trim ${n} left at ${at}`).toBe(true);
        await turn();
      }
    };
    const work = Promise.all([writer(), trimmer()]).finally(() => (ending.stop = true));
    work.catch(() => undefined);
    for (let n = 0; n < snapshots && !ending.stop; n++) {
      for (let turns = 0; turns < 20; turns++) await turn();
      if (abilities.canSnapshot) {
        await session.catalog.snapshot(name, `s${n}`);
        await sameTwice(`${name}@s${n}`);
        if (n % 2 === 0) await session.catalog.remove(`${name}@s${n}`);
      }
      if (abilities.canSnapshotTemporarily) {
        await session.catalog.snapshotTemporary(name, 'now');
        await sameTwice(`${name}@now`);
        await session.catalog.dropTemporary(name, 'now');
      }
    }
    ending.stop = true;
    await work;
    await session.release(vdi);
    expect((await session.catalog.check({ repair: false })).problems).toEqual([]);
  });
  const sameTwice = async (spec: string): Promise<void> => {
    const vdi = await session.openVdi(spec);
    const first = await bytesOf(vdi);
    expect((await bytesOf(vdi)).equals(first), spec).toBe(true);
    await session.release(vdi);
  };

  test('a disk that grows while four writers write it loses no write', async (context) => {
    if (!abilities.canResize) return context.skip();
    const { name, disk } = await session.newDisk(OBJECTS);
    await load(disk.vdi, async (load) => {
      for (let n = 1; n <= 3; n++) {
        await load.writes(50);
        const before = load.acknowledged.slice();
        await session.catalog.resize(name, (OBJECTS + n) * OBJECT);
        const seen = await bytesOf(disk.vdi);
        expectMoment(seen, before, load.issued.slice());
        expect(seen.subarray(OBJECTS * OBJECT).equals(Buffer.alloc(n * OBJECT)), 'what it has grown by').toBe(true);
      }
    });
    expect((await session.catalog.find(name)).size).toBe((OBJECTS + 3) * OBJECT);
    await session.release(disk.vdi);
  });

  test('a VDI that is opened and released again and again, by several at a time, keeps all that was written', async () => {
    const { name, disk } = await session.newDisk(2);
    await session.release(disk.vdi);
    const lane = async (n: number): Promise<void> => {
      for (let round = 1; round <= 10; round++) {
        const vdi = await session.catalog.openVdi(name);
        const at = (n * 10 + round) * BLOCK;
        await vdi.write(at, Buffer.alloc(BLOCK, n * 10 + round), false);
        disk.content.fill(n * 10 + round, at, at + BLOCK);
        await session.catalog.release(vdi);
      }
    };
    await Promise.all([0, 1, 2, 3].map(lane));
    await session.checkSpec(name, disk.content);
    expect((await session.catalog.show(name)).open).toBe(0);
  });

  test('of several who make one name only one succeeds; different names are made beside each other', async () => {
    const name = session.newName();
    const codes = await Promise.all([1, 2, 3, 4].map(() => codeOf(() => session.create(name, OBJECT))));
    expect(codes.sort()).toEqual(['EXISTS', 'EXISTS', 'EXISTS', 'no error']);
    const others = Array.from({ length: 6 }, () => session.newName());
    await Promise.all(others.map((each) => session.create(each, OBJECT)));
    expect((await session.names()).sort()).toEqual([name, ...others].sort());
    await Promise.all(others.map((each) => session.catalog.remove(each)));
    expect(await session.names()).toEqual([name]);
  });

  test('a VDI is deleted and made anew while another one is written, snapshotted and read', async (context) => {
    if (!abilities.canSnapshot) return context.skip();
    const { name, disk } = await session.newDisk(3);
    const churn = async (): Promise<void> => {
      for (let n = 1; n <= session.repeats(5); n++) {
        const { name: other, disk: short } = await session.newDisk(1);
        await short.write(n * 100, BLOCK, n);
        await session.catalog.snapshot(other, 's');
        await short.check();
        await session.release(short.vdi);
        await session.catalog.remove(other);
        await session.checkSpec(`${other}@s`, short.content);
        await session.catalog.remove(`${other}@s`);
      }
    };
    const work = async (): Promise<void> => {
      for (let n = 1; n <= session.repeats(5); n++) {
        await disk.write((n % 3) * OBJECT + 5, BLOCK, n);
        await session.catalog.snapshot(name, `t${n}`);
        const frozen = disk.now();
        await disk.write(0, OBJECT + 1, n + 10);
        await session.checkSpec(`${name}@t${n}`, frozen);
      }
    };
    await Promise.all([churn(), work()]);
    await checkContent(disk.vdi, disk.content);
    await session.release(disk.vdi);
  });

  test('a clone that is changed while its snapshot is deleted keeps both changes', async (context) => {
    if (!abilities.canClone || !abilities.canResize) return context.skip();
    for (let n = 0; n < session.repeats(4); n++) {
      const { name, disk } = await session.newDisk(2);
      await disk.write(0, 100, 1);
      await session.release(disk.vdi);
      await session.catalog.snapshot(name, 's');
      const clone = `${name}-clone`;
      await session.catalog.clone(`${name}@s`, clone);
      const open = new Disk(await session.openVdi(clone), disk.now());
      await open.write(50, 100, 2);
      await session.release(open.vdi);
      await Promise.all([
        session.catalog.snapshot(clone, 'a'),
        session.catalog.remove(`${name}@s`),
        session.catalog.resize(clone, 3 * OBJECT),
      ]);
      expect(await session.catalog.find(clone)).toMatchObject({ size: 3 * OBJECT });
      await session.checkSpec(clone, Buffer.concat([open.content, Buffer.alloc(OBJECT)]));
    }
  });
}

/** Four writers, each with blocks of its own, that stamp each block with a number at its beginning and end. */
class Load {
  readonly issued: Float64Array;
  readonly acknowledged: Float64Array;
  stop = false;
  #count = 0;
  #sequence = 0;

  constructor(
    readonly vdi: Vdi,
    readonly blocks: number,
  ) {
    this.issued = new Float64Array(blocks);
    this.acknowledged = new Float64Array(blocks);
  }

  /** Wait for so many more. */
  async writes(count: number): Promise<void> {
    const target = this.#count + count;
    while (this.#count < target && !this.stop) await turn();
  }

  /** Runs of 1 to 64 blocks, so that some go through the loop and some through the thread pool. */
  async writer(n: number): Promise<void> {
    const share = this.blocks / WRITERS;
    let state = 12345 + n;
    const random = (below: number): number => {
      state = (Math.imul(state, 1103515245) + 12345) >>> 0;
      return (state >>> 8) % below;
    };
    while (!this.stop) {
      const count = random(8) === 0 ? 33 + random(32) : 1 + random(3);
      const first = n * share + random(share - count);
      const sequence = ++this.#sequence;
      const isZeros = random(16) === 0;
      const data = Buffer.alloc(count * BLOCK);
      for (let k = 0; k < count; k++) {
        // What is zeroed may be in a snapshot as zeros, which is as old as can be told: not looked at from below.
        this.issued[first + k] = sequence;
        if (isZeros) this.acknowledged[first + k] = 0;
        data.writeDoubleLE(sequence, k * BLOCK);
        data.writeDoubleLE(sequence, (k + 1) * BLOCK - 8);
      }
      const [at, length] = [first * BLOCK, count * BLOCK];
      if (isZeros) await this.vdi.zero(at, length, { noHole: random(2) === 0, fua: false });
      else await this.vdi.write(at, data, random(64) === 0);
      if (!isZeros) for (let k = 0; k < count; k++) this.acknowledged[first + k] = sequence;
      this.#count++;
      if (random(4) === 0) await turn();
    }
  }
}

/** Errors: a block that is torn, older than what was acknowledged before, or newer than what was issued until after. */
function expectMoment(all: Buffer, before: Float64Array, after: Float64Array): void {
  for (const [block, oldest] of before.entries()) {
    const seen = all.readDoubleLE(block * BLOCK);
    expect(all.readDoubleLE((block + 1) * BLOCK - 8), `block ${block} is torn`).toBe(seen);
    if (seen !== 0) expect(seen, `block ${block} from below`).toBeGreaterThanOrEqual(oldest);
    expect(seen, `block ${block} from above`).toBeLessThanOrEqual(after[block] ?? 0);
  }
}
