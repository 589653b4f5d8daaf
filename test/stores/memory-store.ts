/**
 * A store in memory whose disks do copy-on-write themselves (DiskVdi): the model for a store that leaves snapshots and clones to
 * what is below it. Every snapshot is a copy of the whole disk. Nothing survives its end.
 */
import { setImmediate as nextTurn } from 'node:timers/promises';
import type { Catalog, ObjectStore, Usage } from '../../src/store/object-store.js';
import type { DiskVdi, Switch } from '../../src/store/open-vdi.js';
import { StoreError } from '../../src/store/store-error.js';
import { inOrder, type Unfinished, type VdiRecord } from '../../src/store/vdi-record.js';

const BLOCK = 4096;
const ZEROS = Buffer.alloc(BLOCK);

/** A disk as one buffer. It counts the requests it got. */
export class MemoryDisk implements DiskVdi {
  readonly kind = 'disk';
  isOpen = true;
  requests = 0;
  diskChanges: DiskVdi['diskChanges'];
  diskExtents: DiskVdi['diskExtents'];

  constructor(
    readonly store: MemoryStore,
    public record: VdiRecord,
    public bytes: Buffer,
  ) {}

  readDisk(offset: number, into: Buffer): void {
    this.requests++;
    this.bytes.copy(into, 0, offset, offset + into.length);
  }

  async writeDisk(offset: number, data: Buffer): Promise<void> {
    this.requests++;
    // As with a device, others get their turn of the event loop meanwhile.
    await nextTurn();
    data.copy(this.bytes, offset);
  }

  zeroDisk(offset: number, length: number): void {
    this.requests++;
    this.bytes.fill(0, offset, offset + length);
  }

  flushDisk(): void {
    this.requests++;
  }

  mark(unfinished: Unfinished | undefined): Promise<VdiRecord> {
    return Promise.resolve((this.record = { ...this.record, unfinished }));
  }

  /** Blocks with data. */
  get usage(): number {
    let blocks = 0;
    for (let at = 0; at < this.bytes.length; at += BLOCK) {
      if (!this.bytes.subarray(at, at + BLOCK).equals(ZEROS.subarray(0, this.bytes.length - at))) blocks++;
    }
    return blocks * BLOCK;
  }

  resize(size: number): Promise<VdiRecord> {
    this.bytes = Buffer.concat([this.bytes, Buffer.alloc(size)], size);
    return Promise.resolve((this.record = { ...this.record, size }));
  }

  prepareSwitch(tag: string): Switch {
    return this.#switchTo({ tag });
  }

  prepareTemporary(tag: string): Switch {
    return this.#switchTo({ tag, isTemporary: true });
  }

  #switchTo(given: { readonly tag: string; readonly isTemporary?: true }): Switch {
    const { record } = this;
    const snapshot = { ...record, ...given, vid: ++this.store.lastVid, isSnapshot: true, snapshotAt: Date.now() };
    return {
      switchOver: async () => {
        await Promise.resolve();
        this.store.disks.set(snapshot.vid, new MemoryDisk(this.store, snapshot, Buffer.from(this.bytes)));
        this.record = { ...record, snapId: record.snapId + 1 };
      },
      finish: () => Promise.resolve(snapshot),
    };
  }

  close(): Promise<void> {
    this.isOpen = false;
    return Promise.resolve();
  }
}

export class MemoryStore implements ObjectStore {
  readonly location = 'memory';
  readonly identity = 'memory';
  readOnlyBecause: string | undefined;
  readonly state = undefined;
  readonly disks = new Map<number, MemoryDisk>();
  lastVid = 0;

  readonly catalog: Catalog = {
    list: () => [...this.disks.values()].map(({ record }) => record).sort(inOrder),
    named: (name) => [...this.disks.values()].map(({ record }) => record).filter((record) => record.name === name),
    record: (vid) => this.disks.get(vid)?.record,
    create: (name, size, blockSizeShift, unfinished) => {
      const vid = ++this.lastVid;
      const times = { createdAt: 1, snapshotAt: 0 };
      const record = {
        vid,
        name,
        tag: '',
        isSnapshot: false,
        snapId: 1,
        size,
        blockSizeShift,
        parentVid: 0,
        unfinished,
        ...times,
      };
      this.disks.set(vid, new MemoryDisk(this, record, Buffer.alloc(size)));
      return Promise.resolve(record);
    },
    open: (vid) => {
      const disk = this.disks.get(vid);
      if (!disk) throw new StoreError('IO', 'no such disk');
      disk.isOpen = true;
      return Promise.resolve(disk);
    },
    clone: (vid, name) => this.#copyOf(vid, { name, tag: '', isSnapshot: false, snapshotAt: 0 }),
    rollback: (vid, snapshotVid) => {
      const { name } = this.disks.get(vid)?.record ?? { name: '' };
      this.disks.delete(vid);
      return this.#copyOf(snapshotVid, { name, tag: '', isSnapshot: false, snapshotAt: 0 });
    },
    remove: (vid) => Promise.resolve(void this.disks.delete(vid)),
    reclaimed: () => Promise.resolve(),
    usage: (vid) => this.#usageOf(this.disks.get(vid)),
    usages: () => new Map([...this.disks].map(([vid, disk]) => [vid, this.#usageOf(disk)])),
    check: () =>
      Promise.resolve({ objects: 0, vdis: this.disks.size, problems: [], orphans: 0, orphanBytes: 0, repaired: 0 }),
  };

  /** Every disk has bytes of its own: nothing is shared. */
  #usageOf(disk: MemoryDisk | undefined): Usage {
    const allocated = disk?.usage ?? 0;
    return { allocated, exclusive: allocated };
  }

  #copyOf(vid: number, change: Partial<VdiRecord>): Promise<VdiRecord> {
    const from = this.disks.get(vid);
    if (!from) throw new StoreError('IO', 'no such disk');
    const record = { ...from.record, ...change, vid: ++this.lastVid, parentVid: vid };
    this.disks.set(record.vid, new MemoryDisk(this, record, Buffer.from(from.bytes)));
    return Promise.resolve(record);
  }

  close(): Promise<void> {
    return Promise.resolve();
  }
}
