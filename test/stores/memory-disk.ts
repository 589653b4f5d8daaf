/**
 * A disk of the store in memory: blocks that are never changed, so that a snapshot or a clone may have the same ones. A block
 * that is absent reads as zeros and costs nothing. Owns what the disk reads as now; what is durable is the store's medium.
 */
import { setImmediate as nextTurn } from 'node:timers/promises';
import type { DiskVdi, ExtentSink, Switch, ZeroOptions } from '../../src/store/open-vdi.js';
import { StoreError } from '../../src/store/store-error.js';
import type { Unfinished, VdiRecord } from '../../src/store/vdi-record.js';
import { isZeros } from '../../src/system/zeros.js';
import type { MemoryStore } from './memory-store.js';

/** Larger than the blocks of most requests, so that many of them change only a part. */
const BLOCK = 64 * 1024;
const ZEROS = Buffer.alloc(BLOCK);

/** By their number within the disk, in no order. */
export type Blocks = ReadonlyMap<number, Buffer>;

/** It counts the requests it got. */
export class MemoryDisk implements DiskVdi {
  readonly kind = 'disk';
  isOpen = false;
  requests = 0;
  readonly #store: MemoryStore;
  #record: VdiRecord;
  readonly #blocks: Map<number, Buffer>;

  /** Properties, so that a test can have a disk that cannot tell, or tells something else. */
  diskExtents: DiskVdi['diskExtents'] = (offset, length, sink) => this.#extents(offset, length, sink);
  diskChanges: DiskVdi['diskChanges'] = (base, offset, length, sink) => this.#changes(base, offset, length, sink);

  constructor(store: MemoryStore, record: VdiRecord, blocks: Blocks) {
    this.#store = store;
    this.#record = record;
    this.#blocks = new Map(blocks);
  }

  get record(): VdiRecord {
    return this.#record;
  }

  get blocks(): Blocks {
    return this.#blocks;
  }

  /** The number of the object that the block is in. */
  objectOf(index: number): number {
    return Math.floor((index * BLOCK) / 2 ** this.#record.blockSizeShift);
  }

  readDisk(offset: number, into: Buffer): void {
    this.requests++;
    const end = offset + into.length;
    for (let at = offset; at < end;) {
      const { index, from, to } = partOf(at, end);
      (this.#blocks.get(index) ?? ZEROS).copy(into, at - offset, from, to);
      at += to - from;
    }
  }

  async writeDisk(offset: number, data: Buffer, fua: boolean): Promise<void> {
    this.requests++;
    // As with a device, others get their turn of the event loop meanwhile.
    await nextTurn();
    const end = offset + data.length;
    for (let at = offset; at < end;) {
      const { index, from, to } = partOf(at, end);
      const part = data.subarray(at - offset, at - offset + to - from);
      this.#replace(index, (block) => part.copy(block, from));
      at += to - from;
    }
    if (fua) this.#makeDurable(offset, end);
  }

  /**
   * Whole blocks are given back. In a part of a block that is there, and with `noHole`, zeros are written. Zeros that another disk
   * shares stay as they are.
   */
  async zeroDisk(
    offset: number,
    length: number,
    { noHole, fua, fastZero = false }: ZeroOptions & { readonly fua: boolean; readonly fastZero?: boolean },
  ): Promise<void> {
    this.requests++;
    await nextTurn();
    const end = offset + length;
    const touched = noHole
      ? blocksOf(offset, end)
      : indicesIn(this.#blocks, offset, end).filter((index) => !this.#sharesZeros(index, offset, end));
    const writes = (index: number): boolean => noHole || !this.#isWhole(index, offset, end);
    if (fastZero && touched.some(writes)) {
      throw new StoreError('SLOW', `zeroing ${length} bytes at ${offset} needs zeros to be written`);
    }
    for (const index of touched) {
      if (writes(index)) this.#replace(index, (block) => rangeIn(block, index, offset, end).fill(0));
      else this.#blocks.delete(index);
    }
    if (fua) this.#makeDurable(offset, end);
  }

  async flushDisk(): Promise<void> {
    this.requests++;
    await nextTurn();
    this.#keepAll();
  }

  cacheDisk(): void {
    this.requests++;
  }

  mark(unfinished: Unfinished | undefined): Promise<VdiRecord> {
    return Promise.resolve(this.change({ unfinished }));
  }

  resize(size: number): Promise<VdiRecord> {
    for (const index of indicesIn(this.#blocks, size, this.#record.size)) {
      const keeps = size - index * BLOCK;
      if (keeps > 0) this.#replace(index, (block) => block.fill(0, keeps));
      else this.#blocks.delete(index);
    }
    this.change({ size });
    this.#keepAll();
    return Promise.resolve(this.#record);
  }

  prepareSwitch(tag: string, takenAt?: number): Switch {
    return this.#switchTo({ tag, snapshotAt: takenAt ?? Date.now() });
  }

  /** No cheaper than any other snapshot. */
  prepareTemporary(tag: string): Switch {
    return this.#switchTo({ tag, snapshotAt: Date.now(), isTemporary: true });
  }

  #switchTo(given: Pick<VdiRecord, 'tag' | 'snapshotAt' | 'isTemporary'>): Switch {
    const vid = this.#store.nextVid();
    let snapshot: MemoryDisk | undefined;
    return {
      switchOver: async () => {
        await nextTurn();
        const record = { ...this.#record, ...given, vid, isSnapshot: true, unfinished: undefined };
        snapshot = new MemoryDisk(this.#store, record, this.#blocks);
      },
      finish: async () => {
        if (!snapshot) throw new Error('invariant: a snapshot is finished that was not taken');
        await nextTurn();
        this.#store.keep(snapshot);
        this.change({ snapId: this.#record.snapId + 1, parentVid: vid });
        return snapshot.record;
      },
    };
  }

  close(): Promise<void> {
    this.isOpen = false;
    this.#keepAll();
    return Promise.resolve();
  }

  /** Change the record; durable at once. */
  change(change: Partial<VdiRecord>): VdiRecord {
    this.#record = { ...this.#record, ...change };
    const { disks } = this.#store.medium;
    const { vid } = this.#record;
    const kept = disks.get(vid);
    if (!kept) throw new Error(`invariant: ${this.#record.name} is changed and was not kept`);
    disks.set(vid, { record: this.#record, blocks: kept.blocks });
    return this.#record;
  }

  hasDataBehindEnd(): boolean {
    const { size } = this.#record;
    return [...this.#blocks].some(([index, block]) => {
      const own = size - index * BLOCK;
      return own <= 0 || !isZeros(block.subarray(own));
    });
  }

  async #extents(offset: number, length: number, sink: ExtentSink): Promise<void> {
    this.requests++;
    await nextTurn();
    const end = offset + length;
    let reached = offset;
    for (const index of indicesIn(this.#blocks, offset, end)) {
      const at = Math.max(offset, index * BLOCK);
      if (at > reached && !sink(reached, at - reached, true)) return;
      reached = Math.min(end, (index + 1) * BLOCK);
      if (!sink(at, reached - at, false)) return;
    }
    if (reached < end) sink(reached, end - reached, true);
  }

  /** Object by object, by their bytes. */
  async #changes({ vid }: VdiRecord, offset: number, length: number, sink: ExtentSink): Promise<void> {
    this.requests++;
    await nextTurn();
    const base = this.#store.disks.get(vid)?.blocks;
    if (!base) return; // all of it counts as changed
    const changed = new Set<number>();
    for (const index of [...this.#blocks.keys(), ...base.keys()]) {
      if (!isSame(this.#blocks.get(index), base.get(index))) changed.add(this.objectOf(index));
    }
    const objectSize = 2 ** this.#record.blockSizeShift;
    const end = offset + length;
    for (let at = offset; at < end;) {
      const idx = Math.floor(at / objectSize);
      const part = Math.min(end, (idx + 1) * objectSize) - at;
      if (!sink(at, part, changed.has(idx))) return;
      at += part;
    }
  }

  /** A block with the change in place of the present one, which others may have as well. */
  #replace(index: number, change: (block: Buffer) => void): void {
    const block = Buffer.from(this.#blocks.get(index) ?? ZEROS);
    change(block);
    this.#blocks.set(index, block);
  }

  /** The bytes of the block that are in [offset, end) are zeros, and another disk has the block as well. */
  #sharesZeros(index: number, offset: number, end: number): boolean {
    const block = this.#blocks.get(index);
    if (block === undefined || !isZeros(rangeIn(block, index, offset, end))) return false;
    return [...this.#store.disks.values()].some((other) => other !== this && other.#blocks.get(index) === block);
  }

  /** All bytes of the block that are the disk's are in [offset, end). */
  #isWhole(index: number, offset: number, end: number): boolean {
    return offset <= index * BLOCK && end >= Math.min((index + 1) * BLOCK, this.#record.size);
  }

  /** The blocks that have bytes in [offset, end), as they are now. */
  #makeDurable(offset: number, end: number): void {
    const kept = this.#store.medium.disks.get(this.#record.vid);
    if (!kept) return; // deleted meanwhile
    const blocks = new Map(kept.blocks);
    for (const index of indicesIn(blocks, offset, end)) if (!this.#blocks.has(index)) blocks.delete(index);
    for (const index of indicesIn(this.#blocks, offset, end)) blocks.set(index, this.#blocks.get(index) as Buffer);
    this.#store.medium.disks.set(this.#record.vid, { record: kept.record, blocks });
  }

  #keepAll(): void {
    if (this.#store.disks.get(this.#record.vid) === this) this.#store.keep(this);
  }
}

/** The part of [offset, end) that is in the block of `offset`; `from` and `to` are within the block. */
function partOf(offset: number, end: number): { readonly index: number; readonly from: number; readonly to: number } {
  const index = Math.floor(offset / BLOCK);
  return { index, from: offset - index * BLOCK, to: Math.min(BLOCK, end - index * BLOCK) };
}

/** The bytes of the block that are in [offset, end) of the disk. */
function rangeIn(block: Buffer, index: number, offset: number, end: number): Buffer {
  const at = index * BLOCK;
  return block.subarray(Math.max(0, offset - at), Math.min(BLOCK, end - at));
}

/** The blocks that are there and have bytes in [offset, end), in order. Its cost does not grow with the range. */
function indicesIn(blocks: Blocks, offset: number, end: number): number[] {
  const touches = (index: number): boolean => (index + 1) * BLOCK > offset && index * BLOCK < end;
  return [...blocks.keys()].filter(touches).sort((a, b) => a - b);
}

/** All blocks that have bytes in [offset, end), there or not. */
function blocksOf(offset: number, end: number): number[] {
  const first = Math.floor(offset / BLOCK);
  return Array.from({ length: Math.ceil(end / BLOCK) - first }, (_, n) => first + n);
}

function isSame(a: Buffer | undefined, b: Buffer | undefined): boolean {
  return a === b || (a ?? ZEROS).equals(b ?? ZEROS);
}
