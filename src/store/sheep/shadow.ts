/**
 * Temporary snapshots by copy-before-write. The shadow is a VDI of our own that gets the table of its source, the VDI it is a
 * snapshot of, and its own copy of each object before that object is written. The source keeps its vid, and needs no copies
 * afterwards. Owns the shadow's table and counts. Shadows are reused.
 *
 * Counts: an object lives until all references to it are given up. For each table entry an inode has a count, of tables derived
 * from it, and a generation, how far it is derived itself. Taking a shadow changes both as nodes do for a snapshot: one more in
 * the counts of the source, the next generation in the shadow.
 */
import { deriveReferences, objectCount, sliceReferences } from '../../sheepdog/inode-table.js';
import { oidKey } from '../../sheepdog/object-ids.js';
import { encodeTag } from '../../sheepdog/text-fields.js';
import { encodeSize } from '../../sheepdog/inode.js';
import { LOST } from './lost-owner.js';
import { StoreError } from '../store-error.js';
import type { ClusterClient } from './cluster-client.js';
import type { ReadTracker } from './read-tracker.js';
import { InDoubt } from './stalled-nodes.js';
import { clearTable } from './clear-table.js';
import { presentIn } from './table-scan.js';
import { isRemoved } from './object-removal.js';
import { TableWriter } from './table-writer.js';
import {
  encodeTime,
  type Inode,
  INODE_SNAP_CTIME_OFFSET,
  INODE_TAG_OFFSET,
  INODE_VDI_SIZE_OFFSET,
} from '../../sheepdog/inode.js';

/** Unchanged counts that are written along between changed ones: otherwise a fragmented disk needs a request per entry. */
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
  /** Its table, with LOST for objects that could not be copied. Read by those who have the snapshot open. */
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
   * Becomes a snapshot of `source`, whose table is `map`. `owner`: the mark of this process. Its writers must be held. Counts are
   * written first, references last: a crash at any point leaves nothing that could remove an object of the source. Errors: as
   * requests on objects; then it is no snapshot.
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
      // From here on other processes recognise it, and drop it if this process dies.
      await this.#mark(tag, this.takenAt, owner);
      await cluster.fillTable(this.vid, map);
    } catch (error) {
      // Restore counts only if no reference is left and none can still arrive: high counts leak objects, low counts lose them.
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
    // The writer has a table of its own: `map` has LOST where the inode has the old owner.
    this.#table = new TableWriter(cluster, this.vid, map.slice());
    this.copies = 0;
    this.#isLive = true;
    this.#taken = { ranges, ours, theirs };
  }

  /**
   * Undoes `take`: another client made the source a snapshot at the same time, and `next` continues from it. The counts of both
   * may be anything. They must be what a snapshot makes of them, which is what `take` has computed. Errors: IO (the source has
   * been snapshotted again), and as requests on objects.
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

  /** Call before (vid, idx) is written: copies it if this snapshot shares it. Never fails: writers have priority. */
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
      // The nodes copy the object themselves.
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
    // Reads that already have the old owner must end before the object changes.
    await this.#reads.whenDone(oidKey(vid, idx));
  }

  /** Gives up all copies and references; ready to be reused. Errors: as requests on objects. */
  async drop(): Promise<void> {
    this.#isLive = false;
    this.#taken = undefined;
    await Promise.all(this.#copying.values());
    const count = objectCount(this.inode.size, this.inode.blockSizeShift);
    // From the inode, not from memory: another process may have made it.
    const table = await this.#cluster.readTable(this.vid, count);
    const own = presentIn(table).filter((idx) => table[idx] === this.vid);
    await clearTable(this.#cluster, this.vid, table);
    for (const idx of own) this.#reclaiming.add(idx);
    await this.#mark('', 0);
    this.map = new Uint32Array(0);
  }

  /** Writes the tag and the time that make it a snapshot in every list of VDIs. */
  async #mark(tag: string, takenAt: number, owner: Buffer = NO_OWNER): Promise<void> {
    await this.#cluster.writeInodeBytes(this.vid, INODE_TAG_OFFSET, encodeTag(tag));
    const time = takenAt === 0 ? Buffer.alloc(8) : encodeTime(takenAt);
    // The field after the time holds the owner mark.
    await this.#cluster.writeInodeBytes(this.vid, INODE_SNAP_CTIME_OFFSET, Buffer.concat([time, owner]));
  }
}

/** Ranges [from, to) that cover all allocated entries; small gaps are included. */
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
