/**
 * Temporary snapshots by copy-before-write: a VDI of our own, the shadow, takes over the table of the VDI it is a
 * snapshot of, and gets its own copy of an object before that is written. The writer keeps its vid, and nothing is left
 * to be copied afterwards. Owns the shadow's table and counts; one shadow per disk and label is used again and again.
 *
 * Counts. An object lives until all references to it are given up; per table entry an inode says how many others were
 * derived from it (count) and how far it is derived itself (generation). Taking a shadow is what the nodes do for a
 * snapshot: one more for the VDI's counts, the next generation for the shadow.
 */
import { deriveReferences, objectCount, sliceReferences } from '../../sheepdog/inode-table.js';
import { oidKey } from '../../sheepdog/object-ids.js';
import { encodeTag } from '../../sheepdog/text-fields.js';
import { encodeSize } from '../../sheepdog/inode.js';
import { LOST } from './lost-owner.js';
import { StoreError } from '../object-store.js';
import type { ClusterClient } from './cluster-client.js';
import type { ReadTracker } from './read-tracker.js';
import { InDoubt } from './stalled-nodes.js';
import { clearTable } from './clear-table.js';
import { isRemoved } from './object-removal.js';
import { TableWriter } from './table-writer.js';
import {
  encodeTime,
  type Inode,
  INODE_SNAP_CTIME_OFFSET,
  INODE_TAG_OFFSET,
  INODE_VDI_SIZE_OFFSET,
} from '../../sheepdog/inode.js';

/** Unchanged counts that are written along, so as not to have a request per entry of a fragmented disk. */
const MAX_GAP = 512;
const NOTHING = Buffer.alloc(0);
const NO_OWNER = Buffer.alloc(8);

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
  readonly #cluster: ClusterClient;
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
    cluster: ClusterClient,
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
    const { source: theirs, derived: ours } = deriveReferences(references, map);
    const ranges = rangesOf(map);
    this.takenAt = Date.now();
    this.tag = tag;
    await cluster.writeInodeBytes(this.vid, INODE_VDI_SIZE_OFFSET, encodeSize(source.size));
    for (const [from, to] of ranges) {
      await cluster.writeReferences(this.vid, from, sliceReferences(ours, from, to));
    }
    try {
      for (const [from, to] of ranges) {
        await cluster.writeReferences(source.vid, from, sliceReferences(theirs, from, to));
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
          const before = sliceReferences(references, from, to);
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
      const part = (bytes: Buffer): Buffer => sliceReferences(bytes, from, to);
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
    await this.#reads.whenDone(oidKey(vid, idx));
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
    await this.#cluster.writeInodeBytes(this.vid, INODE_TAG_OFFSET, encodeTag(tag));
    const time = takenAt === 0 ? Buffer.alloc(8) : encodeTime(takenAt);
    // The field behind the time says whose it is.
    await this.#cluster.writeInodeBytes(this.vid, INODE_SNAP_CTIME_OFFSET, Buffer.concat([time, owner]));
  }
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
