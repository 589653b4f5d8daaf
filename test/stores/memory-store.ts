/**
 * A store in memory whose disks do copy-on-write themselves (DiskVdi): the model for a store that leaves snapshots and clones to
 * what is below it. It passes the store suite. A medium (Medium) outlives the store and has what was made durable; a new
 * store on the same medium finds that and nothing else.
 */
import type { Catalog, CheckReport, ObjectStore, Usage } from '../../src/store/object-store.js';
import { StoreError } from '../../src/store/store-error.js';
import { inOrder, labelOfVdi, type VdiRecord } from '../../src/store/vdi-record.js';
import { MemoryDisk, type Blocks } from './memory-disk.js';

/** What is durable. */
export class Medium {
  readonly disks = new Map<number, { readonly record: VdiRecord; readonly blocks: Blocks }>();
  lastVid = 0;

  /** A copy, which a store that is on this medium does not change any more. */
  copy(): Medium {
    const copy = new Medium();
    for (const [vid, { record, blocks }] of this.disks) copy.disks.set(vid, { record, blocks: new Map(blocks) });
    copy.lastVid = this.lastVid;
    return copy;
  }
}

export class MemoryStore implements ObjectStore {
  readonly location = 'memory';
  readonly identity = 'memory';
  readOnlyBecause: string | undefined;
  readonly state = undefined;
  /** All VDIs and snapshots, open or not, by vid. */
  readonly disks = new Map<number, MemoryDisk>();
  readonly medium: Medium;

  constructor(medium = new Medium()) {
    this.medium = medium;
    for (const [vid, { record, blocks }] of medium.disks) this.disks.set(vid, new MemoryDisk(this, record, blocks));
  }

  readonly catalog: Catalog = {
    list: () => this.#records().sort(inOrder),
    named: (name) =>
      this.#records()
        .filter((record) => record.name === name)
        .sort(inOrder),
    record: (vid) => this.disks.get(vid)?.record,
    touchedBy: (vid) => this.#childrenOf(vid).map(({ record }) => record.name),
    create: (name, size, blockSizeShift, unfinished) =>
      this.#add(working({ name, size, blockSizeShift, parentVid: 0, snapId: 1, unfinished }), new Map()),
    open: (vid) => {
      const disk = this.#disk(vid);
      disk.isOpen = true;
      return Promise.resolve(disk);
    },
    clone: (vid, name) => {
      const { record, blocks } = this.#disk(vid);
      const { size, blockSizeShift } = record;
      return this.#add(working({ name, size, blockSizeShift, parentVid: vid, snapId: 1 }), blocks);
    },
    rollback: (vid, snapshotVid, unfinished) => {
      const { name, snapId } = this.#disk(vid).record;
      const { record, blocks } = this.#disk(snapshotVid);
      const { size, blockSizeShift } = record;
      this.drop(vid);
      return this.#add(working({ name, size, blockSizeShift, parentVid: snapshotVid, snapId, unfinished }), blocks);
    },
    remove: (vid) => {
      const { parentVid } = this.#disk(vid).record;
      for (const child of this.#childrenOf(vid)) child.change({ parentVid });
      this.drop(vid);
      return Promise.resolve();
    },
    reclaimed: () => Promise.resolve(),
    usage: (vid) => this.#usageOf(this.#disk(vid), this.#references()),
    usages: () => {
      const references = this.#references();
      return new Map([...this.disks].map(([vid, disk]) => [vid, this.#usageOf(disk, references)]));
    },
    check: () => Promise.resolve(this.#check()),
  };

  nextVid(): number {
    return ++this.medium.lastVid;
  }

  /** `disk` is durable as it is now. */
  keep(disk: MemoryDisk): void {
    const { record, blocks } = disk;
    this.disks.set(record.vid, disk);
    this.medium.disks.set(record.vid, { record, blocks: new Map(blocks) });
  }

  drop(vid: number): void {
    this.disks.delete(vid);
    this.medium.disks.delete(vid);
  }

  async close(): Promise<void> {
    for (const disk of this.disks.values()) if (disk.isOpen) await disk.close();
  }

  #records(): VdiRecord[] {
    return [...this.disks.values()].map(({ record }) => record);
  }

  #disk(vid: number): MemoryDisk {
    const disk = this.disks.get(vid);
    if (!disk) throw new StoreError('DAMAGED', `no record of vid ${vid.toString(16)} in ${this.location}`);
    return disk;
  }

  #childrenOf(vid: number): MemoryDisk[] {
    return [...this.disks.values()].filter(({ record }) => record.parentVid === vid);
  }

  #add(record: Omit<VdiRecord, 'vid'>, blocks: Blocks): Promise<VdiRecord> {
    const disk = new MemoryDisk(this, { ...record, vid: this.nextVid() }, blocks);
    this.keep(disk);
    return Promise.resolve(disk.record);
  }

  /** How many disks have each block. */
  #references(): Map<Buffer, number> {
    const references = new Map<Buffer, number>();
    for (const { blocks } of this.disks.values()) {
      for (const block of blocks.values()) references.set(block, (references.get(block) ?? 0) + 1);
    }
    return references;
  }

  /** An object is allocated if one of its blocks is, and shared if one of them is. */
  #usageOf(disk: MemoryDisk, references: ReadonlyMap<Buffer, number>): Usage {
    const allocated = new Set<number>();
    const shared = new Set<number>();
    for (const [index, block] of disk.blocks) {
      allocated.add(disk.objectOf(index));
      if ((references.get(block) ?? 0) > 1) shared.add(disk.objectOf(index));
    }
    return { allocated: allocated.size, exclusive: allocated.size - shared.size };
  }

  /** Called while nothing is open: what is there is durable then, and nothing lies behind the end of a disk. */
  #check(): CheckReport {
    const problems: string[] = [];
    let objects = 0;
    for (const [vid, disk] of this.disks) {
      const label = labelOfVdi(disk.record);
      objects += this.#usageOf(disk, new Map()).allocated;
      if (disk.hasDataBehindEnd()) problems.push(`${label} has data behind its end`);
      const kept = this.medium.disks.get(vid);
      const isSame =
        kept?.blocks.size === disk.blocks.size && [...kept.blocks].every(([n, b]) => disk.blocks.get(n) === b);
      if (!isSame || kept.record !== disk.record) problems.push(`${label} is not durable as it is`);
    }
    const lost = [...this.medium.disks].filter(([vid]) => !this.disks.has(vid));
    return { objects, vdis: this.disks.size, problems, orphans: lost.length, orphanBytes: 0, repaired: 0 };
  }
}

/** The record of a new working VDI. */
function working(
  given: Pick<VdiRecord, 'name' | 'size' | 'blockSizeShift' | 'parentVid' | 'snapId' | 'unfinished'>,
): Omit<VdiRecord, 'vid'> {
  return { ...given, tag: '', isSnapshot: false, createdAt: Date.now(), snapshotAt: 0 };
}
