/**
 * An open VDI of a cluster: reading and writing of its objects. Owns its record, map and inode, and the order in which an object
 * may be written: temporary snapshots get their copy first, and a write to an object of an older vid is refused (MOVED). Changes
 * of the map are table-changes.ts; what other clients do to the VDI is vdi-following.ts. Nothing is held back: an answered change
 * is on the nodes.
 */
import type { ExtentSink, ObjectVdi, ReadCount, Switch } from '../open-vdi.js';
import { StoreError } from '../store-error.js';
import type { Unfinished, VdiRecord } from '../vdi-record.js';
import type { ClusterClient } from './cluster-client.js';
import type { ObjectReading } from './cluster-reads.js';
import { BLOCK_BYTES, inPieces, MAX_PIECE_BYTES } from './pieces.js';
import { OldParity } from './parity.js';
import type { Shadow } from './shadow.js';
import type { Locks } from './locks.js';
import { removeLeftObjects } from './deleted-vdi.js';
import { writeUnit, writeWholeStripes } from './stripes.js';
import { TableChanges, type TableVdi } from './table-changes.js';
import { movedError, VdiFollowing, type FollowedVdi } from './vdi-following.js';
import { oidKey } from '../../sheepdog/object-ids.js';
import type { WriteOrder } from './write-order.js';
import { WriteRuns } from './write-runs.js';
import { objectCount } from '../../sheepdog/inode-table.js';
import type { Inode } from '../../sheepdog/inode.js';
import { recordOf } from './vdi-record.js';

/** For the question whether a disk that is being closed still exists. */
const CLOSING_LOOK_MS = 2_000;
/** Zeros are written in pieces of this. */
const ZEROS = Buffer.alloc(1024 * 1024);

/** What a SheepVdi needs of its store. */
export interface SheepVdiHost {
  readonly cluster: ClusterClient;
  readonly order: WriteOrder;
  readonly locks: Locks;
  /** Formatted with -R. */
  readonly recyclesVids: boolean;
  readonly catalog: {
    prepareSwitch(vdi: SheepVdi, tag: string, takenAt?: number): Switch;
    prepareTemporary(vdi: SheepVdi, tag: string): Promise<Switch>;
    mark(vdi: SheepVdi, unfinished: Unfinished | undefined): Promise<VdiRecord>;
    resize(vdi: SheepVdi, size: number): Promise<VdiRecord>;
  };
  readonly reading: ObjectReading;
  /** Removes the temporary snapshots of this name whose process has ended: they would miss writes. */
  dropStaleShadows(name: string): Promise<void>;
  /** The vid of the working VDI of this name; 0 if there is none. */
  workingVid(name: string): Promise<number>;
  /** Repeats the request while objects seem to be missing because nodes come and go. */
  unlessGone(request: () => Promise<void>): Promise<void>;
  /** The cluster's epoch, which every change of members raises: the last one known here. */
  readonly knownEpoch: number;
  /** The present epoch, asked of the nodes. */
  readEpoch(): Promise<number>;
  /** The VDI continues under another vid. */
  moved(vdi: SheepVdi, from: number): Promise<void>;
  log(line: string, details?: object): void;
}

export class SheepVdi implements ObjectVdi, FollowedVdi, TableVdi {
  readonly kind = 'objects';
  readonly objectsMove = true;
  readonly gathersFirstWrites = true;
  record: VdiRecord;
  map: Uint32Array;
  inode: Inode;
  /** Temporary snapshots that share objects with the VDI: they get a copy of an object before it is written. */
  shadows: readonly Shadow[] = [];
  readonly #host: SheepVdiHost;
  readonly #onClose: (vdi: SheepVdi) => Promise<void>;
  #ready: Promise<void> | undefined;
  #isReady = false;
  readonly #runs = new WriteRuns((idx, offset, data) => this.#writeNow(idx, offset, data));
  #changes = 0;
  /** The VDI cannot be used any more: another client has deleted or replaced it, or has its lock. */
  #failure: StoreError | undefined;
  /** Objects were made: if another client has deleted the VDI meanwhile, one of them may be left over. */
  #hasCreated = false;
  /** The epoch known when the VDI was opened. */
  readonly #firstEpoch: number;
  readonly #parity: OldParity;
  readonly #following: VdiFollowing;
  readonly #table: TableChanges;

  constructor(host: SheepVdiHost, inode: Inode, map: Uint32Array, onClose: (vdi: SheepVdi) => Promise<void>) {
    this.#host = host;
    this.#firstEpoch = host.knownEpoch;
    this.inode = inode;
    this.record = recordOf(inode);
    this.map = map;
    this.#onClose = onClose;
    this.#parity = new OldParity(host, this);
    this.#following = new VdiFollowing(host, this);
    this.#table = new TableChanges(host, this, this.#following);
  }

  get creationVid(): number {
    return this.record.vid;
  }

  get failure(): StoreError | undefined {
    return this.#failure;
  }

  get changes(): number {
    return this.#changes;
  }

  get isHyper(): boolean {
    return this.inode.storePolicy !== 0;
  }

  noteRead(offset: number, length: number): ReadCount {
    return this.#host.cluster.readAhead.note(this, offset, length);
  }

  readObject(vid: number, idx: number, offset: number, into: Buffer): Promise<void> {
    return this.#host.reading.readObject(vid, idx, offset, into);
  }

  /** Nodes have caches of their own. */
  cacheObject(): void {}

  /** Without reading only whole objects are known: the range is data. */
  objectExtents(_vid: number, _idx: number, offset: number, length: number, sink: ExtentSink): void {
    sink(offset, length, false);
  }

  prepareSwitch(tag: string, takenAt?: number): Switch {
    return this.#host.catalog.prepareSwitch(this, tag, takenAt);
  }

  prepareTemporary(tag: string): Promise<Switch> {
    return this.#host.catalog.prepareTemporary(this, tag);
  }

  mark(unfinished: Unfinished | undefined): Promise<VdiRecord> {
    return this.#host.catalog.mark(this, unfinished);
  }

  resize(size: number): Promise<VdiRecord> {
    return this.#host.catalog.resize(this, size);
  }

  /** No other VDI has objects of this vid: with every snapshot the VDI gets a new one. */
  exclusive(idx: number): boolean {
    return this.map[idx] === this.record.vid;
  }

  isKeptAside(idx: number): boolean {
    return this.shadows.some((shadow) => shadow.isLive && shadow.map[idx] === this.record.vid);
  }

  async setOwner(idx: number, owner: number): Promise<void> {
    try {
      await this.#table.set(idx, owner);
    } catch (error) {
      if (owner === this.record.vid) this.#table.noteUnlisted(idx);
      throw error;
    }
  }

  /** Answered changes are on the nodes already. */
  flush(): Promise<void> {
    return Promise.resolve();
  }

  flushObject(_idx: number): Promise<void> {
    return Promise.resolve();
  }

  /** A move to another vid ends first: it would open the VDI again. */
  async close(): Promise<void> {
    await this.#following.close();
    await this.#parity.close();
    try {
      if ((this.#hasCreated || this.#table.hasDropped) && !this.#failure) await this.#leaveNothingBehind();
    } finally {
      await this.#onClose(this);
    }
  }

  /**
   * Removes objects that were made while another client deleted the VDI, objects of failed writes, and objects that nodes have
   * forgotten to remove. Never fails: if the nodes cannot be asked now, objects are left over.
   */
  async #leaveNothingBehind(): Promise<void> {
    const { cluster } = this.#host;
    const { vid } = this.record;
    try {
      // With a short limit: if nodes do not answer, closing does not wait for them.
      await cluster.readInode(vid, { retryMs: CLOSING_LOOK_MS, isApart: true });
      if (!(await cluster.vids()).isLive(vid)) await removeLeftObjects(cluster, this.inode);
      else {
        if (this.#table.hasUnlisted) await this.#table.removeUnlisted();
        if (this.#table.hasDropped && (await this.#host.readEpoch()) !== this.#firstEpoch)
          await this.#table.removeDropped();
      }
    } catch (error) {
      this.#host.log(`${this.record.name} was closed, and the nodes could not be asked whether it still exists`, {
        err: error,
      });
    }
  }

  look(): Promise<void> {
    return this.#following.look();
  }

  /** See VdiFollowing.follow. */
  follow(from: number): Promise<void> {
    return this.#following.follow(from);
  }

  /** See VdiFollowing.switching. */
  switching<T>(work: () => Promise<T>): Promise<T> {
    return this.#following.switching(work);
  }

  /** Called when all nodes are members again and have recovered. */
  nodesAreBack(): void {
    // A process that has not written the VDI may share it with a process that does.
    if (this.#isReady) void this.#parity.renew();
  }

  /** In place, into an object of the VDI's own vid. Errors: MOVED, GONE, NO_SPACE. */
  writeObject(idx: number, offset: number, data: Buffer): Promise<void> {
    return this.#runs.write(idx, offset, data);
  }

  #writeNow(idx: number, offset: number, data: Buffer): Promise<void> {
    if (!this.#isReady || this.shadows.length > 0) return this.#preserveThenWrite(idx, offset, data);
    return inPieces(offset, data, (at, part) => this.#write(idx, at, part));
  }

  async #preserveThenWrite(idx: number, offset: number, data: Buffer): Promise<void> {
    await this.getReady();
    await this.preserve(idx);
    await inPieces(offset, data, (at, part) => this.#write(idx, at, part));
  }

  async #write(idx: number, offset: number, data: Buffer): Promise<void> {
    const { vid } = this.record;
    this.#table.assertKnown(idx);
    if (this.map[idx] !== vid) throw movedError(this.record);
    const { cluster, order } = this.#host;
    const unit = writeUnit(this.inode.copyPolicy);
    this.#parity.note(idx);
    try {
      if (offset % unit === 0 && data.length % unit === 0) {
        await order.run(oidKey(vid, idx), offset, data.length, () => this.#writeUnits(vid, idx, offset, data));
      } else {
        const from = offset - (offset % unit);
        const length = Math.ceil((offset + data.length) / unit) * unit - from;
        await order.run(oidKey(vid, idx), from, length, () =>
          this.#host.unlessGone(() => writeWholeStripes(cluster, vid, idx, offset, data)),
        );
      }
      this.#parity.note(idx);
    } catch (error) {
      await this.#goOnAfter(error, vid);
    }
  }

  #writeUnits(vid: number, idx: number, offset: number, data: Buffer): Promise<void> {
    return this.#host.unlessGone(() => this.#host.cluster.writeData(vid, idx, offset, data));
  }

  /** Nodes have no request that zeroes. */
  canZeroFast(): boolean {
    return false;
  }

  async zeroObject(idx: number, offset: number, length: number): Promise<void> {
    for (let done = 0; done < length; done += ZEROS.length) {
      await this.writeObject(idx, offset + done, ZEROS.subarray(0, Math.min(ZEROS.length, length - done)));
    }
  }

  /**
   * Makes the object (vid, idx). It is not read before the caller has set its entry, so large data is written in pieces after the
   * object is made. Errors: MOVED, NO_SPACE, GONE.
   */
  async createObject(idx: number, offset: number, data: Buffer, copyOf: number): Promise<void> {
    const { vid } = this.record;
    await this.getReady();
    if (this.#failure) throw this.#failure;
    this.#table.assertKnown(idx);
    if (this.#table.isDropped(idx)) await this.#table.waitForRemoval(vid, idx);
    if (this.record.vid !== vid) throw movedError(this.record);
    const { cluster, order } = this.#host;
    const key = oidKey(vid, idx);
    // Pieces begin and end where stripes do.
    const isInBlocks = offset % BLOCK_BYTES === 0 && data.length % BLOCK_BYTES === 0;
    const first = isInBlocks ? data.subarray(0, MAX_PIECE_BYTES) : data;
    let isMade = false;
    this.#hasCreated = true;
    try {
      // In the order of the whole object: a creation that a node carries out late replaces all of it.
      await order.run(key, 0, 2 ** this.record.blockSizeShift, () =>
        this.#host.unlessGone(() => cluster.createData(vid, idx, offset, first, copyOf)),
      );
      isMade = true;
      if (first.length < data.length) {
        await inPieces(offset + first.length, data.subarray(first.length), (at, part) =>
          order.run(key, at, part.length, () => this.#writeUnits(vid, idx, at, part)),
        );
      }
      this.#parity.note(idx);
    } catch (error) {
      try {
        await this.#goOnAfter(error, vid);
      } finally {
        if (isMade && this.record.vid === vid) this.#table.noteUnlisted(idx);
        else if (isMade) await this.#table.removeOrphans([{ idx, owner: vid }]);
      }
    }
  }

  /** Continue as `inode`, whose table is `map`. Errors: LOCKED (another client has opened it since), MOVED. */
  async become(inode: Inode, map: Uint32Array): Promise<void> {
    const from = this.record.vid;
    try {
      await this.#host.locks.takeNext(inode);
    } catch (error) {
      if ((error as StoreError).code !== 'LOCKED') throw error;
      const { name } = this.record;
      throw this.fail(
        new StoreError(
          'LOCKED',
          `another client has taken a snapshot of ${name}, and another one has opened it since: nothing more is written to ` +
            'it from here; disconnect and connect again',
          {
            forClients: `${name} was taken over by another client while it was in use; disconnect and connect again`,
            cause: error,
          },
        ),
      );
    }
    this.#changes++;
    this.inode = inode;
    this.record = recordOf(inode);
    this.map = map;
    this.#table.forgetDropped();
    await this.#host.moved(this, from);
  }

  resized(inode: Inode): void {
    const map = new Uint32Array(objectCount(inode.size, inode.blockSizeShift));
    map.set(this.map.subarray(0, map.length));
    this.#changes++;
    this.inode = inode;
    this.record = recordOf(inode);
    this.map = map;
  }

  recopied(inode: Inode): void {
    this.inode = inode;
    this.record = recordOf(inode);
  }

  /** Nothing is read or written from now on: the vid may be another VDI's. Returns the first failure. */
  fail(error: StoreError): StoreError {
    if (this.#failure) return this.#failure;
    this.#failure = error;
    this.#changes++;
    this.record = { ...this.record, size: 0 };
    this.map = new Uint32Array(0);
    this.#host.log(error.message);
    return error;
  }

  /** The inode has another tag now. */
  retagged(tag: string): void {
    this.#changes++;
    this.inode = { ...this.inode, tag };
    this.record = recordOf(this.inode);
  }

  /** A write has failed. Errors: MOVED (the VDI continues under another vid), the VDI's failure, or `error`. */
  async #goOnAfter(error: unknown, vid: number): Promise<never> {
    const { code } = error as StoreError;
    if (code === 'GONE') {
      // Another client is deleting the VDI, or has cut off this part.
      await this.look();
      if (this.record.vid !== vid) throw movedError(this.record);
    }
    if (code !== 'READONLY') throw error;
    await this.follow(vid);
    throw movedError(this.record);
  }

  /** Called before the first change: temporary snapshots of a process that died must not see it. */
  async getReady(): Promise<void> {
    if (this.#isReady) return;
    this.#ready ??= this.#host.dropStaleShadows(this.record.name).then(
      () => {
        this.#isReady = true;
        void this.#parity.renew();
      },
      (error: unknown) => {
        this.#ready = undefined;
        throw error;
      },
    );
    await this.#ready;
  }

  /** Temporary snapshots that share the VDI's own object at idx get a copy of it. */
  async preserve(idx: number): Promise<void> {
    const { vid } = this.record;
    for (const shadow of this.shadows) await shadow.preserve(vid, idx);
  }
}
