/**
 * Temporary snapshots by copy-before-write: a VDI of our own, the shadow, takes over the table of the VDI it is a
 * snapshot of, and gets its own copy of an object before that is written. The writer keeps its vid, and nothing is left
 * to be copied afterwards. Owns the shadow's table and counts; one shadow per disk and label is used again and again.
 *
 * Counts. An object lives until all references to it are given up; per table entry an inode says how many others were
 * derived from it (count) and how far it is derived itself (generation). Taking a shadow is what the nodes do for a
 * snapshot: one more for the VDI's counts, the next generation for the shadow.
 */
import { createHash } from 'node:crypto';
import { bytesOfText } from '../../text/name-bytes.js';
import { StoreError } from '../object-store.js';
import type { Cluster } from './cluster-client.js';
import { encodeTime, type Inode } from '../../sheepdog/layouts.js';
import {
  GREF_BYTES,
  INODE_SNAP_CTIME_OFFSET,
  INODE_TAG_OFFSET,
  INODE_VDI_SIZE_OFFSET,
  MAX_VID,
  TAG_BYTES,
} from '../../sheepdog/protocol.js';
import type { ReadTracker } from './read-tracker.js';
import { InDoubt } from './stalled-nodes.js';
import { clearTable, isRemoved, objectCount, objectKey } from './table.js';
import { TableWriter } from './table-writer.js';

const PREFIX = 'sheepgate-now-';
const HASH_DIGITS = 24;
/** Others may have VDIs whose names begin like that. */
const SHADOW_NAME = new RegExp(`^${PREFIX}[0-9a-f]{${HASH_DIGITS}}-\\d{1,2}$`);
/** Temporary snapshots of one disk at a time. */
export const MAX_SHADOWS = 16;
/** Unchanged counts that are written along, so as not to have a request per entry of a fragmented disk. */
const MAX_GAP = 512;
/** Stands in a shadow's table for an object that could not be copied in time. No vid is that large. */
const LOST = MAX_VID + 1;
const NOTHING = Buffer.alloc(0);
const NO_OWNER = Buffer.alloc(8);

/** The name of the VDI that is a disk's shadow. Names may be as long as a VDI's may be: hence the hash. */
export function shadowName(name: string, slot: number): string {
  return `${shadowPrefix(name)}${slot}`;
}

/** All that a disk may have. */
export function shadowNames(name: string): string[] {
  const prefix = shadowPrefix(name);
  return Array.from({ length: MAX_SHADOWS }, (_, slot) => `${prefix}${slot}`);
}

export function shadowPrefix(name: string): string {
  return `${PREFIX}${createHash('sha256').update(bytesOfText(name)).digest('hex').slice(0, HASH_DIGITS)}-`;
}

export function isShadowName(name: string): boolean {
  return SHADOW_NAME.test(name);
}

/** Not what somebody has made of one with the cluster's own tools: such a snapshot has no mark. */
export function isShadow({ name, isSnapshot, mark }: Inode): boolean {
  return isShadowName(name) && (!isSnapshot || mark.some((byte) => byte !== 0));
}

/** For reads: this owner is no object. */
export function isLost(owner: number): boolean {
  return owner === LOST;
}

export class Shadow {
  readonly vid: number;
  readonly name: string;
  /** The VDI this is a snapshot of, and the tag it has there. */
  sourceName: string;
  tag = '';
  takenAt = 0;
  /** Its table, read by whoever has it open. */
  map = new Uint32Array(0);
  #table: TableWriter | undefined;
  inode: Inode;
  readonly #cluster: Cluster;
  readonly #reads: ReadTracker;
  readonly #log: (line: string, details?: object) => void;
  readonly #copying = new Map<number, Promise<void>>();
  readonly #reclaiming = new Set<number>();
  #isLive = false;
  /** The counts that taking it has written: those of the source, and its own. */
  #taken: { readonly ranges: [number, number][]; readonly ours: Buffer; readonly theirs: Buffer } | undefined;
  /** Objects copied since it was taken. */
  copies = 0;

  constructor(
    cluster: Cluster,
    reads: ReadTracker,
    inode: Inode,
    sourceName: string,
    log: (line: string, details?: object) => void,
  ) {
    this.#cluster = cluster;
    this.#reads = reads;
    this.#log = log;
    this.inode = inode;
    this.vid = inode.vid;
    this.name = inode.name;
    this.sourceName = sourceName;
  }

  get isLive(): boolean {
    return this.#isLive;
  }

  /**
   * Become a snapshot of `source`, whose table is `map`, kept by `owner`. Its writers must be held. The order is such that a crash at any
   * point leaves nothing that could take away an object of the source: counts first, references last.
   */
  async take(source: Inode, map: Uint32Array, tag: string, owner: Buffer): Promise<void> {
    const cluster = this.#cluster;
    const references = await cluster.readReferences(source.vid, map.length);
    const ours = Buffer.alloc(references.length);
    const theirs = Buffer.from(references);
    for (let idx = 0; idx < map.length; idx++) {
      if (map[idx] === 0) continue;
      const at = idx * GREF_BYTES;
      ours.writeInt32LE(references.readInt32LE(at) + 1, at);
      theirs.writeInt32LE(references.readInt32LE(at + 4) + 1, at + 4);
    }
    const ranges = rangesOf(map);
    this.takenAt = Date.now();
    this.tag = tag;
    await cluster.writeInodeBytes(this.vid, INODE_VDI_SIZE_OFFSET, sizeBytes(source.size));
    for (const [from, to] of ranges) {
      await cluster.writeReferences(this.vid, from, ours.subarray(from * GREF_BYTES, to * GREF_BYTES));
    }
    try {
      for (const [from, to] of ranges) {
        await cluster.writeReferences(source.vid, from, theirs.subarray(from * GREF_BYTES, to * GREF_BYTES));
      }
      // Others see what it is from here on, and that it must be dropped if we do not live to do it.
      await this.#mark(tag, this.takenAt, owner);
      await cluster.fillTable(this.vid, map);
    } catch (error) {
      // Counts go back only if no reference is left and none can still come: too high ones leak, too low ones lose objects.
      const isEmpty =
        !(error instanceof InDoubt) &&
        (await cluster.fillTable(this.vid, new Uint32Array(map.length)).then(
          () => true,
          () => false,
        ));
      if (isEmpty) {
        for (const [from, to] of ranges) {
          const before = references.subarray(from * GREF_BYTES, to * GREF_BYTES);
          await cluster.writeReferences(source.vid, from, before).catch(() => undefined);
        }
        await this.#mark('', 0).catch(() => undefined);
      }
      throw error;
    }
    this.inode = { ...this.inode, size: source.size };
    this.map = map.slice();
    // With a table of its own: `map` says of what is lost something else than the inode.
    this.#table = new TableWriter(cluster, this.vid, map.slice());
    this.copies = 0;
    this.#isLive = true;
    this.#taken = { ranges, ours, theirs };
  }

  /**
   * Take it back, because somebody made the source a snapshot, which `next` goes on from, while it was taken: the counts of
   * both may be anything. What they must be is known: those of a snapshot are what taking the shadow makes of them, too.
   */
  async retract(source: Inode, next: Inode): Promise<void> {
    const cluster = this.#cluster;
    if (!this.#taken || next.parentVid !== source.vid) {
      throw new StoreError(
        'IO',
        `${source.name} is being snapshotted again and again; no temporary snapshot was taken`,
      );
    }
    this.#isLive = false;
    const { ranges, ours, theirs } = this.#taken;
    await cluster.fillTable(this.vid, new Uint32Array(this.map.length));
    for (const [from, to] of ranges) {
      const part = (bytes: Buffer): Buffer => bytes.subarray(from * GREF_BYTES, to * GREF_BYTES);
      await cluster.writeReferences(source.vid, from, part(theirs));
      await cluster.writeReferences(next.vid, from, part(ours));
    }
    await this.#mark('', 0);
    this.map = new Uint32Array(0);
  }

  /** (vid, idx) is about to be written: copy it if this shares it. Never fails: the writer comes first. */
  async preserve(vid: number, idx: number): Promise<void> {
    if (!this.#isLive || this.map[idx] !== vid) return;
    let copying = this.#copying.get(idx);
    if (!copying) {
      copying = this.#copy(vid, idx).finally(() => this.#copying.delete(idx));
      this.#copying.set(idx, copying);
    }
    await copying;
  }

  async #copy(vid: number, idx: number): Promise<void> {
    try {
      if (this.#reclaiming.has(idx)) {
        await isRemoved(this.#cluster, this.vid, idx, this.inode.copyPolicy);
        this.#reclaiming.delete(idx);
      }
      // The nodes copy it; nothing of it travels here.
      await this.#cluster.createData(this.vid, idx, 0, NOTHING, vid);
      await this.#table?.set(idx, [this.vid]);
      this.map[idx] = this.vid;
      this.copies++;
    } catch (error) {
      this.map[idx] = LOST;
      this.#log(`${this.sourceName}@${this.tag} has lost an object that is being overwritten: it could not be copied`, {
        err: error,
      });
    }
    // Readers that were told before where it is must have it before it changes.
    await this.#reads.whenDone(objectKey(vid, idx));
  }

  /** Give up everything: no copies any more, all references back, ready to be used again. */
  async drop(): Promise<void> {
    this.#isLive = false;
    this.#taken = undefined;
    await Promise.all(this.#copying.values());
    const count = objectCount(this.inode.size, this.inode.blockSizeShift);
    // From the inode, not from memory: it may be another process's that we clean up after.
    const table = await this.#cluster.readTable(this.vid, count);
    await clearTable(this.#cluster, this.vid, table);
    for (let idx = 0; idx < table.length; idx++) if (table[idx] === this.vid) this.#reclaiming.add(idx);
    await this.#mark('', 0);
    this.map = new Uint32Array(0);
  }

  /** The tag and the time that make it a snapshot for everybody who lists VDIs. */
  async #mark(tag: string, takenAt: number, owner: Buffer = NO_OWNER): Promise<void> {
    const bytes = Buffer.alloc(TAG_BYTES);
    bytesOfText(tag).copy(bytes, 0, 0, TAG_BYTES - 1);
    await this.#cluster.writeInodeBytes(this.vid, INODE_TAG_OFFSET, bytes);
    const time = takenAt === 0 ? Buffer.alloc(8) : encodeTime(takenAt);
    // The field behind the time says whose it is.
    await this.#cluster.writeInodeBytes(this.vid, INODE_SNAP_CTIME_OFFSET, Buffer.concat([time, owner]));
  }
}

/** An owner that a reader of a shadow may meet. */
export function lostError(idx: number): StoreError {
  const forClients = 'a part of this temporary snapshot is lost: it was overwritten and could not be copied before';
  return new StoreError(
    'IO',
    `object ${idx} of this temporary snapshot is lost: it was overwritten and could not be copied before (is the cluster full?)`,
    { forClients },
  );
}

/** Ranges [from, to) that cover all allocated entries; what lies in a gap is written along unchanged. */
function rangesOf(map: Uint32Array): [number, number][] {
  const ranges: [number, number][] = [];
  for (let idx = 0; idx < map.length; idx++) {
    if (map[idx] === 0) continue;
    const last = ranges.at(-1);
    if (last && idx - last[1] <= MAX_GAP) last[1] = idx + 1;
    else ranges.push([idx, idx + 1]);
  }
  return ranges;
}

function sizeBytes(size: number): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64LE(BigInt(size));
  return bytes;
}
