/**
 * An open VDI of a cluster: its map, and the rules in which order objects, table entries and inodes may be written so
 * that nobody's data and no reference is lost, also while somebody else takes a snapshot of it. Owns the queue of table
 * changes and the move to a new vid. Nothing is kept back: what was answered is in the cluster.
 */
import type { ExtentSink, ObjectVdi, ReadCount, Switch } from '../open-vdi.js';
import { behindEndError, StoreError } from '../store-error.js';
import type { Unfinished, VdiRecord } from '../vdi-record.js';
import type { Cluster } from './cluster-client.js';
import type { ObjectReading } from './cluster-reads.js';
import { HyperIndex } from './hyper-index.js';
import { recordOf, type Inode } from '../../sheepdog/layouts.js';
import { BLOCK_BYTES, inPieces, MAX_PIECE_BYTES } from './pieces.js';
import { OldParity } from './parity.js';
import type { Shadow } from './shadow.js';
import { GREF_BYTES } from '../../sheepdog/protocol.js';
import type { Locks } from './locks.js';
import { isDeleted, isSameVdi, removeLeftObjects } from './deleted-vdi.js';
import { writeUnit, writeWholeStripes } from './stripes.js';
import { InDoubt } from './stalled-nodes.js';
import { inParallel, inRuns, isRemoved, objectCount, objectKey, sleep } from './table.js';
import type { WriteOrder } from './write-order.js';
import { WriteRuns } from './write-runs.js';

/** A VDI may be snapshotted this many times between two of our writes before we stop to look for our way. */
const MAX_GENERATIONS = 4096;
const FOLLOW_POLL_MS = 20;
/** Objects of a hyper volume that one batch removes at a time. */
const PARALLEL_REMOVALS = 16;
/** For asking whether a disk that is closed is still there. */
const CLOSING_LOOK_MS = 2_000;
const NONE = new Uint32Array(0);
/** Zeros are written in pieces of this. */
const ZEROS = Buffer.alloc(1024 * 1024);

/** What a SheepVdi needs of its store. */
export interface SheepVdiHost {
  readonly cluster: Cluster;
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
  /** Temporary snapshots of this name that no living process keeps up to date must go before it is written. */
  dropStaleShadows(name: string): Promise<void>;
  /** The vid of the working VDI that goes on under this name; 0 if there is none. */
  workingVid(name: string): Promise<number>;
  /** Do it again while objects seem to be missing because nodes come and go. */
  unlessGone(request: () => Promise<void>): Promise<void>;
  /** The cluster's epoch, which every change of members raises, as far as is known, and now. */
  readonly knownEpoch: number;
  readEpoch(): Promise<number>;
  /** The VDI goes on under another vid. */
  moved(vdi: SheepVdi, from: number): Promise<void>;
  log(line: string, details?: object): void;
}

/** An object of ours, or none. */
interface Made {
  readonly idx: number;
  readonly owner: number;
}

interface TableChange extends Made {
  readonly resolve: () => void;
  readonly reject: (error: unknown) => void;
}

export class SheepVdi implements ObjectVdi {
  readonly kind = 'objects';
  readonly objectsMove = true;
  readonly gathersFirstWrites = true;
  record: VdiRecord;
  map: Uint32Array;
  inode: Inode;
  /** Temporary snapshots that share objects with us and get their copy before we write one. */
  shadows: readonly Shadow[] = [];
  readonly #host: SheepVdiHost;
  readonly #onClose: (vdi: SheepVdi) => Promise<void>;
  #queue: TableChange[] = [];
  #writingTable = false;
  #following: Promise<void> | undefined;
  /** A snapshot of ours is being taken: it is us who go on under another vid. Never fails. */
  #switching: Promise<void> | undefined;
  #isClosed = false;
  #ready: Promise<void> | undefined;
  #isReady = false;
  /** Objects of ours that we let go and whose removal may not be done. */
  readonly #reclaiming = new Set<number>();
  /** In place of a table, in a hyper volume. */
  readonly #index: HyperIndex | undefined;
  readonly #runs = new WriteRuns((idx, offset, data) => this.#writeNow(idx, offset, data));
  /** Entries of which nobody knows yet whether they become what was asked last. */
  readonly #doubtful = new Set<number>();
  /** Why it cannot be used any more: it was deleted or replaced by somebody else, or its lock is somebody else's. */
  #failure: StoreError | undefined;
  /** How often we have changed what its inode says: a look from before tells nothing. */
  #changes = 0;
  /** Objects were made: if somebody deletes it at the same time, one of them may be left over. */
  #hasCreated = false;
  /** When it was opened, or before. */
  readonly #firstEpoch: number;
  readonly #parity: OldParity;

  constructor(host: SheepVdiHost, inode: Inode, map: Uint32Array, onClose: (vdi: SheepVdi) => Promise<void>) {
    this.#host = host;
    this.#firstEpoch = host.knownEpoch;
    this.inode = inode;
    this.record = recordOf(inode);
    this.map = map;
    this.#onClose = onClose;
    this.#parity = new OldParity(host, this);
    this.#index = inode.storePolicy === 0 ? undefined : new HyperIndex(host, inode.vid);
  }

  get creationVid(): number {
    return this.record.vid;
  }

  get failure(): StoreError | undefined {
    return this.#failure;
  }

  noteRead(offset: number, length: number): ReadCount {
    return this.#host.cluster.readAhead.note(this, offset, length);
  }

  readObject(vid: number, idx: number, offset: number, into: Buffer): Promise<void> {
    return this.#host.reading.readObject(vid, idx, offset, into);
  }

  /** Nodes have caches of their own. */
  cacheObject(): void {}

  /** All that is known without reading is which objects there are. */
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

  /** Objects with our own vid are nobody else's to rely on: with a snapshot we get a new one. */
  exclusive(idx: number): boolean {
    return this.map[idx] === this.record.vid;
  }

  isKeptAside(idx: number): boolean {
    return this.shadows.some((shadow) => shadow.isLive && shadow.map[idx] === this.record.vid);
  }

  /** Resolves when the entry is in the inode, and the inode still the working VDI's. Errors: MOVED, and the cluster's. */
  setOwner(idx: number, owner: number): Promise<void> {
    if (this.#doubtful.has(idx)) return Promise.reject(doubtfulError(this.record, idx));
    if (this.map[idx] === owner) return Promise.resolve(); // an entry that is rewritten loses its count
    return new Promise((resolve, reject) => {
      this.#queue.push({ idx, owner, resolve, reject });
      if (!this.#writingTable) void this.#writeTable();
    });
  }

  /** What was answered is on the nodes already. */
  flush(): Promise<void> {
    return Promise.resolve();
  }

  flushObject(_idx: number): Promise<void> {
    return Promise.resolve();
  }

  /** What was on its way to another vid gets there first, or is given up: what is closed must not be opened by that again. */
  async close(): Promise<void> {
    this.#isClosed = true;
    await this.#following?.catch(() => undefined);
    await this.#parity.close();
    try {
      if ((this.#hasCreated || this.#reclaiming.size > 0) && !this.#failure) await this.#leaveNothingBehind();
    } finally {
      await this.#onClose(this);
    }
  }

  /**
   * What was made while somebody deleted it goes as well, and so does what nodes have kept. A hint: what cannot be asked now is
   * left over at worst.
   */
  async #leaveNothingBehind(): Promise<void> {
    const { cluster } = this.#host;
    const { vid } = this.record;
    try {
      // Nodes that do not answer at all are not waited for.
      await cluster.readInode(vid, { retryMs: CLOSING_LOOK_MS, isApart: true });
      if (!(await cluster.vids()).isLive(vid)) await removeLeftObjects(cluster, this.inode);
      else if (this.#reclaiming.size > 0 && (await this.#host.readEpoch()) !== this.#firstEpoch)
        await this.#removeLetGo();
    } catch (error) {
      this.#host.log(`whether ${this.record.name} is still there could not be asked when it was closed`, {
        err: error,
      });
    }
  }

  /**
   * Nodes repeat a table entry when members change meanwhile, take it for nothing new then, and forget to remove the object
   * (sheep/gateway.c, prepare_obj_refcnt). Objects of ours that we let go are in no other table.
   */
  async #removeLetGo(): Promise<void> {
    const left = [...this.#reclaiming].filter((idx) => this.map[idx] === 0 && !this.#doubtful.has(idx));
    await inParallel(PARALLEL_REMOVALS, left, (idx) => this.#remove(this.record.vid, idx));
  }

  /**
   * See what somebody else has made of it: its size and copies are what its inode says now, after a snapshot it goes on under
   * another vid, and what was deleted fails from now on. Errors: that, and the cluster's.
   */
  look(): Promise<void> {
    if (this.#failure) return Promise.reject(this.#failure);
    return this.#look();
  }

  async #look(): Promise<void> {
    while (this.#switching) await this.#switching;
    const { vid, isSnapshot } = this.record;
    if (isSnapshot || this.#isClosed) return;
    const changes = this.#changes;
    const inode = await this.#readInode(vid);
    if (this.record.vid !== vid || this.#changes !== changes) return;
    if (!inode || inode.isSnapshot) return this.follow(vid);
    await this.#adopt(inode);
  }

  /** Of what we are; undefined if the vid is not ours any more. */
  async #readInode(vid: number): Promise<Inode | undefined> {
    try {
      const inode = await this.#host.cluster.readInode(vid);
      return isSameVdi(inode, this.inode) ? inode : undefined;
    } catch (error) {
      // Nodes that use vids again remove the inode, too. Elsewhere it is lost, and that is no reason to give a disk up.
      if ((error as StoreError).code === 'GONE' && this.#host.recyclesVids) return undefined;
      throw error;
    }
  }

  /** The same VDI with another size, or another number of copies. */
  async #adopt(inode: Inode): Promise<void> {
    if (inode.size !== this.inode.size) {
      const count = objectCount(inode.size, inode.blockSizeShift);
      const before = this.map.length;
      const changes = this.#changes;
      // What somebody has cut off and added again is not what it was.
      const added =
        count > before && !this.#index ? await this.#host.cluster.readTable(inode.vid, count - before, before) : NONE;
      if (this.#changes !== changes || this.record.vid !== inode.vid) return;
      const { name, size } = this.record;
      this.#host.log(`${name} has ${inode.size} bytes now, and had ${size}: somebody else has resized it`);
      this.resized(inode);
      for (const [n, owner] of added.entries()) this.map[before + n] = owner;
      return;
    }
    if (inode.copies === this.inode.copies && inode.copyPolicy === this.inode.copyPolicy) return;
    this.inode = inode;
    this.record = recordOf(inode);
  }

  /** All nodes are there again, and have recovered. */
  nodesAreBack(): void {
    // Who has not written it may not be the only one who has it open.
    if (this.#isReady) void this.#parity.renew();
  }

  /** `work` makes a snapshot of this: nobody follows it before it has become what it is then. */
  async switching<T>(work: () => Promise<T>): Promise<T> {
    const done = work();
    const settled = done.then(nothing, nothing);
    this.#switching = settled;
    try {
      return await done;
    } finally {
      if (this.#switching === settled) this.#switching = undefined;
    }
  }

  /** In place, into an object of ours. Errors: MOVED, GONE, NO_SPACE. */
  writeObject(idx: number, offset: number, data: Buffer): Promise<void> {
    return this.#runs.write(idx, offset, data);
  }

  #writeNow(idx: number, offset: number, data: Buffer): Promise<void> {
    if (!this.#isReady || this.shadows.length > 0) return this.#preserveThenWrite(idx, offset, data);
    return inPieces(offset, data, (at, part) => this.#write(idx, at, part));
  }

  async #preserveThenWrite(idx: number, offset: number, data: Buffer): Promise<void> {
    await this.#getReady();
    await this.#preserve(idx);
    await inPieces(offset, data, (at, part) => this.#write(idx, at, part));
  }

  async #write(idx: number, offset: number, data: Buffer): Promise<void> {
    const { vid } = this.record;
    if (this.#doubtful.has(idx)) throw doubtfulError(this.record, idx);
    if (this.map[idx] !== vid) throw movedError(this.record);
    const { cluster, order } = this.#host;
    const unit = writeUnit(this.inode.copyPolicy);
    this.#parity.note(idx);
    try {
      if (offset % unit === 0 && data.length % unit === 0) {
        await order.run(objectKey(vid, idx), offset, data.length, () => this.#writeUnits(vid, idx, offset, data));
      } else {
        const from = offset - (offset % unit);
        const length = Math.ceil((offset + data.length) / unit) * unit - from;
        await order.run(objectKey(vid, idx), from, length, () =>
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

  /** Nodes know no zeroing but writing zeros. */
  canZeroFast(): boolean {
    return false;
  }

  async zeroObject(idx: number, offset: number, length: number): Promise<void> {
    for (let done = 0; done < length; done += ZEROS.length) {
      await this.writeObject(idx, offset + done, ZEROS.subarray(0, Math.min(ZEROS.length, length - done)));
    }
  }

  /**
   * Make our object at idx; the entry is the caller's to set, and nobody looks at the object before that. What is large goes
   * into it in pieces once it is there. Errors: MOVED, NO_SPACE, GONE.
   */
  async createObject(idx: number, offset: number, data: Buffer, copyOf: number): Promise<void> {
    const { vid } = this.record;
    await this.#getReady();
    if (this.#failure) throw this.#failure;
    if (this.#doubtful.has(idx)) throw doubtfulError(this.record, idx);
    if (this.#reclaiming.has(idx)) await this.#waitForRemoval(vid, idx);
    if (this.record.vid !== vid) throw movedError(this.record);
    const { cluster, order } = this.#host;
    const key = objectKey(vid, idx);
    // Pieces begin and end where stripes do.
    const isInBlocks = offset % BLOCK_BYTES === 0 && data.length % BLOCK_BYTES === 0;
    const first = isInBlocks ? data.subarray(0, MAX_PIECE_BYTES) : data;
    let isMade = false;
    this.#hasCreated = true;
    try {
      // All of the object: one that comes late would replace the whole of it.
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
        if (isMade && this.record.vid !== vid) await this.#removeOrphans([{ idx, owner: vid }]);
      }
    }
  }

  /**
   * Go on as the working VDI that has taken our place: somebody has made `from`, what we were, a snapshot. Errors: IO if
   * there is none, or if it does not descend from us.
   */
  async follow(from: number): Promise<void> {
    while (this.#switching) await this.#switching;
    if (this.#failure) throw this.#failure;
    if (this.#isClosed || this.record.vid !== from) return;
    if (this.#index) {
      if (await isDeleted(this.#host.cluster, this.inode)) throw await this.#wasDeleted();
      const what = `${this.record.name} is a hyper volume, and has become read-only in the cluster`;
      throw new StoreError('IO', `${what}: nothing more is written to it`);
    }
    this.#following ??= this.#move(from).finally(() => (this.#following = undefined));
    await this.#following;
  }

  /** The VDI goes on as `inode`, whose table is `map`. */
  async become(inode: Inode, map: Uint32Array): Promise<void> {
    const from = this.record.vid;
    try {
      await this.#host.locks.takeNext(inode);
    } catch (error) {
      if ((error as StoreError).code !== 'LOCKED') throw error;
      const { name } = this.record;
      throw this.#fail(
        new StoreError(
          'LOCKED',
          `${name} was snapshotted by somebody else, and somebody else has opened it since: nothing more is written to it ` +
            'from here; disconnect and connect again',
          {
            forClients: `${name} was taken over by somebody else while it was in use; disconnect and connect again`,
            cause: error,
          },
        ),
      );
    }
    this.#changes++;
    this.inode = inode;
    this.record = recordOf(inode);
    this.map = map;
    this.#reclaiming.clear();
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

  /** Nothing is read or written any more: what its vid names is not ours. Returns the error for whoever asks for it. */
  #fail(error: StoreError): StoreError {
    if (this.#failure) return this.#failure;
    this.#failure = error;
    this.#changes++;
    this.record = { ...this.record, size: 0 };
    this.map = new Uint32Array(0);
    this.#host.log(error.message);
    return error;
  }

  /** Its inode has another tag now. */
  retagged(tag: string): void {
    this.#changes++;
    this.inode = { ...this.inode, tag };
    this.record = recordOf(this.inode);
  }

  /** A write has failed: because the VDI goes on as another, or is gone, or for what `error` says. */
  async #goOnAfter(error: unknown, vid: number): Promise<never> {
    const { code } = error as StoreError;
    if (code === 'GONE') {
      // A part of what somebody is deleting, or has cut off.
      await this.look();
      if (this.record.vid !== vid) throw movedError(this.record);
    }
    if (code !== 'READONLY') throw error;
    await this.follow(vid);
    throw movedError(this.record);
  }

  async #move(from: number): Promise<void> {
    const { cluster } = this.#host;
    const { name } = this.record;
    const deadline = performance.now() + cluster.gateway.retryMs;
    for (;;) {
      const vid = await this.#host.workingVid(name);
      if (vid !== 0 && vid !== from) {
        const inode = await cluster.readInode(vid);
        if (inode.name === name && !inode.isSnapshot) {
          await this.#checkDescent(inode, from);
          const map = await cluster.readTable(vid, objectCount(inode.size, inode.blockSizeShift));
          if (this.#isClosed) return;
          try {
            await this.become(inode, map);
          } catch (error) {
            if ((error as StoreError).code === 'MOVED') continue; // snapshotted again
            throw error;
          }
          this.#host.log(`${name} was snapshotted by somebody else; going on as vid ${vid.toString(16)}`);
          return;
        }
      }
      if (this.#isClosed) return;
      if (await isDeleted(cluster, this.inode)) throw await this.#wasDeleted();
      if (performance.now() >= deadline) {
        throw new StoreError(
          'IO',
          `${name} (vid ${from.toString(16)}) has become read-only in the cluster and no working VDI has taken its place; ` +
            'was it deleted, or cloned from while it was in use?',
          { forClients: `${name} is read-only by now: it was deleted, or cloned from, while it was in use` },
        );
      }
      await sleep(FOLLOW_POLL_MS);
    }
  }

  /** Somebody else has deleted what we are: what was made meanwhile goes as well. */
  async #wasDeleted(): Promise<StoreError> {
    const { name, vid } = this.record;
    const failure = this.#fail(
      new StoreError('IO', `${name} (vid ${vid.toString(16)}) was deleted by somebody else while it was in use`, {
        forClients: `${name} was deleted while it was in use`,
      }),
    );
    await removeLeftObjects(this.#host.cluster, this.inode).catch((error: unknown) => {
      this.#host.log(`objects of ${name}, which was deleted, may be left over`, { err: error });
    });
    return failure;
  }

  /** Somebody may also have rolled it back, or made another VDI of that name: writing on into that would mix two disks. */
  async #checkDescent(inode: Inode, from: number): Promise<void> {
    let { parentVid } = inode;
    for (let n = 0; parentVid !== from; n++) {
      if (parentVid === 0 || n === MAX_GENERATIONS) {
        const failure = this.#fail(
          new StoreError(
            'IO',
            `${inode.name} is another disk now (vid ${inode.vid.toString(16)} does not descend from ${from.toString(16)}): ` +
              'it was rolled back or replaced while it was in use; disconnect and connect again',
            {
              forClients: `${inode.name} was rolled back or replaced while it was in use; disconnect and connect again`,
            },
          ),
        );
        await removeLeftObjects(this.#host.cluster, this.inode).catch(() => undefined);
        throw failure;
      }
      ({ parentVid } = await this.#host.cluster.readInode(parentVid));
    }
  }

  /** Before the first change: what a process that died left behind must not see it. */
  async #getReady(): Promise<void> {
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

  /** Temporary snapshots that share our object at idx get a copy of it. */
  async #preserve(idx: number): Promise<void> {
    const { vid } = this.record;
    for (const shadow of this.shadows) await shadow.preserve(vid, idx);
  }

  /** Write what is queued, in one go; what comes meanwhile goes into the next batch. */
  async #writeTable(): Promise<void> {
    this.#writingTable = true;
    // Creations that finish in the same turn of the loop go together.
    await Promise.resolve();
    while (this.#queue.length > 0) {
      const batch = this.#queue;
      this.#queue = [];
      try {
        if (this.#index) await this.#writeIndex(this.#index, batch);
        else await this.#writeBatch(batch);
        for (const { resolve } of batch) resolve();
      } catch (error) {
        if ((error as StoreError).code === 'GONE') await this.look().catch(() => undefined);
        if (this.#failure) await this.#removeDeleted(batch);
        else if ((error as StoreError).code === 'MOVED' || batch.some(({ idx }) => idx >= this.map.length)) {
          await this.#removeOrphans(batch);
        }
        for (const { reject } of batch) reject(this.#failure ?? error);
      }
    }
    this.#writingTable = false;
  }

  /**
   * Whether what is open is this vid still, and no snapshot. Errors: NO_SPACE for entries behind the end of what somebody else
   * has cut off, where nothing is looked for when the VDI is deleted.
   */
  async #mayChange(vid: number, batch: readonly TableChange[]): Promise<boolean> {
    const [isReadOnly, inode] = await Promise.all([
      this.#host.cluster.isReadOnly(vid, (batch[0] as TableChange).idx),
      this.#readInode(vid),
    ]);
    if (isReadOnly || !inode) return false;
    if (inode.size !== this.inode.size) await this.#adopt(inode);
    if (batch.some(({ idx, owner }) => owner !== 0 && idx >= this.map.length))
      throw behindEndError(this.record, 'NO_SPACE');
    return true;
  }

  async #writeBatch(batch: readonly TableChange[]): Promise<void> {
    const { cluster } = this.#host;
    const { vid } = this.record;
    await this.#getReady();
    if (this.#failure) throw this.#failure;
    if (this.record.vid !== vid) throw movedError(this.record);
    if (batch.some(({ owner }) => owner !== 0 && owner !== vid)) throw movedError(this.record);
    for (const { idx, owner } of batch) if (owner === 0 && this.map[idx] === vid) await this.#preserve(idx);
    // The inode of a snapshot can be written as well, and what the nodes do while they make it one is read, change, write
    // back: an entry that comes in between is undone, but the reference it replaced stays given up.
    if (!(await this.#mayChange(vid, batch))) return this.#leave(vid);
    const { epoch } = cluster.recovery;
    try {
      await inRuns(batch, (idx, owners) => cluster.writeTable(vid, idx, owners));
    } catch (error) {
      // A part of it may be there, and must not be written a second time.
      await this.#lookAgain(batch, error);
      throw error;
    }
    // Before it is asked whether somebody has taken a snapshot: the counts of one that is taken meanwhile are set right then.
    if (cluster.recovery.epoch !== epoch) await this.#confirm(vid, batch);
    if (await this.#wasSnapshotted(vid)) {
      await this.follow(vid);
      await this.#carryOver(vid, batch);
      return;
    }
    const { map } = this;
    for (const { idx, owner } of batch) {
      if (map[idx] === vid && owner === 0) this.#reclaiming.add(idx);
      map[idx] = owner;
    }
  }

  /**
   * Entries were changed while the members of the cluster changed, and a copy of the inode may have missed them. Written
   * once more as plain bytes, of which no node gives up a reference a second time: entries, and the counts of new ones.
   */
  async #confirm(vid: number, batch: readonly TableChange[]): Promise<void> {
    const { cluster } = this.#host;
    const last = batch.reduce((highest, { idx }) => Math.max(highest, idx), 0);
    const table = this.map.slice(0, last + 1);
    for (const { idx, owner } of batch) table[idx] = owner;
    await cluster.fillTable(vid, table);
    for (const { idx } of batch) await cluster.writeReferences(vid, idx, Buffer.alloc(GREF_BYTES));
  }

  /**
   * The same in a hyper volume. Nodes count no references there: an object that is let go is ours to remove, after its
   * entry. Killed in between we leave it behind, until the same place is written again.
   */
  async #writeIndex(index: HyperIndex, batch: readonly TableChange[]): Promise<void> {
    const { vid } = this.record;
    await this.#getReady();
    if (this.#failure) throw this.#failure;
    if (!(await this.#mayChange(vid, batch))) return this.#leave(vid);
    try {
      await index.set(batch, this.map);
    } catch (error) {
      await this.#lookAgain(batch, error);
      throw error;
    }
    const { map } = this;
    const removed = batch.filter(({ idx, owner }) => owner === 0 && map[idx] === vid);
    for (const { idx, owner } of batch) map[idx] = owner;
    await inParallel(PARALLEL_REMOVALS, removed, ({ idx }) => this.#remove(vid, idx));
  }

  #remove(vid: number, idx: number): Promise<void> {
    const { cluster, order } = this.#host;
    const length = 2 ** this.record.blockSizeShift;
    return order.run(objectKey(vid, idx), 0, length, () => cluster.removeData(vid, idx));
  }

  /** An entry of ours was cleared after all: in a table the nodes remove the object, in an index that is left to us. */
  async #letGo(idx: number): Promise<void> {
    const { vid, name } = this.record;
    if (!this.#index) this.#reclaiming.add(idx);
    else {
      await this.#remove(vid, idx).catch((error: unknown) => {
        this.#host.log(`object ${idx} of ${name} may be left over`, { err: error });
      });
    }
  }

  /** What has become of entries whose change failed, now, and once a node that may still change them cannot any more. */
  async #lookAgain(batch: readonly TableChange[], error: unknown): Promise<void> {
    const { cluster } = this.#host;
    const { inode } = this;
    const look = async (): Promise<void> => {
      const owners = this.#index && (await cluster.readOwners(inode).catch(() => this.map));
      for (const { idx } of batch) {
        const before = this.map[idx];
        const found = owners ? owners[idx] : await cluster.readEntry(inode.vid, idx).catch(() => before);
        const { map } = this;
        map[idx] = found as number;
        if (before === inode.vid && map[idx] === 0) await this.#letGo(idx);
      }
    };
    if (error instanceof InDoubt) {
      for (const { idx } of batch) this.#doubtful.add(idx);
      void error.settled.then(look).finally(() => {
        for (const { idx } of batch) this.#doubtful.delete(idx);
      });
    }
    await look();
  }

  /**
   * Whether somebody has made `vid` a snapshot, or began to before this was called. A node may hear of it a moment after
   * the one that does it. A look-up waits in the same queue as the making of a snapshot, whichever node is asked; only on
   * clusters that use vids again it is too dear for this: there the nodes read every inode for it.
   */
  async #wasSnapshotted(vid: number): Promise<boolean> {
    const { cluster } = this.#host;
    if (this.#host.recyclesVids) return (await cluster.isReadOnly(vid, 0)) || !(await this.#readInode(vid));
    return (await cluster.lookup(this.record.name)) !== vid;
  }

  /**
   * Our entries were written while the nodes made `from` a snapshot, which they do by reading its whole inode and writing
   * it back: they may be in it or not, in what was derived from it or not, with any count. The old references are given up
   * in any case, so the one state that is right is made by hand: the change came before the snapshot, in all of them.
   */
  async #carryOver(from: number, batch: readonly TableChange[]): Promise<void> {
    const { cluster } = this.#host;
    const lineage = await this.#lineage(from);
    const last = batch.reduce((highest, { idx }) => Math.max(highest, idx), 0);
    for (const [generation, vid] of lineage.entries()) {
      const table = await cluster.readTable(vid, last + 1);
      for (const { idx, owner } of batch) {
        table[idx] = owner;
        if (owner === 0) continue;
        const counts = Buffer.alloc(GREF_BYTES);
        counts.writeInt32LE(generation, 0);
        counts.writeInt32LE(generation < lineage.length - 1 ? 1 : 0, 4);
        await cluster.writeReferences(vid, idx, counts);
      }
      await cluster.fillTable(vid, table);
    }
    for (const { idx, owner } of batch) this.map[idx] = owner;
  }

  /** The vids from `from`, which we were, to what we are. */
  async #lineage(from: number): Promise<number[]> {
    const vids: number[] = [];
    for (let { vid } = this.record; vid !== from; vid = (await this.#host.cluster.readInode(vid)).parentVid) {
      if (vid === 0 || vids.length === MAX_GENERATIONS) throw new Error('invariant: followed a VDI of another family');
      vids.push(vid);
    }
    return [...vids, from].reverse();
  }

  /** Objects that were made under a vid that is a snapshot's now, or behind the end, and that its table does not know. */
  async #removeOrphans(batch: readonly Made[]): Promise<void> {
    const { cluster } = this.#host;
    for (const { idx, owner } of batch) {
      if (owner === 0 || (owner === this.record.vid && idx < this.map.length)) continue;
      try {
        if ((await cluster.readEntry(owner, idx)) !== owner) await cluster.removeData(owner, idx);
      } catch (error) {
        this.#host.log(`object ${idx} of vid ${owner.toString(16)} may be left over`, { err: error });
      }
    }
  }

  /** The same of what was made when the VDI had been deleted; unless the vid is another VDI's by now. */
  async #removeDeleted(batch: readonly TableChange[]): Promise<void> {
    const made = batch.filter(({ owner }) => owner !== 0);
    try {
      await removeLeftObjects(this.#host.cluster, this.inode, made);
    } catch (error) {
      this.#host.log(`objects of ${this.record.name}, which was deleted, may be left over`, { err: error });
    }
  }

  async #leave(vid: number): Promise<never> {
    await this.follow(vid);
    throw movedError(this.record);
  }

  /**
   * A node answers the clearing of an entry before the object is gone. One that is created meanwhile under the same id
   * would be removed in its place.
   */
  async #waitForRemoval(vid: number, idx: number): Promise<void> {
    if (!(await isRemoved(this.#host.cluster, vid, idx, this.inode.copyPolicy))) {
      this.#host.log(`object ${idx} of ${this.record.name} was let go and is still there; it is replaced`);
    }
    this.#reclaiming.delete(idx);
  }
}

function nothing(): void {}

function doubtfulError(record: VdiRecord, idx: number): StoreError {
  return new StoreError(
    'IO',
    `where object ${idx} of ${record.name} is was to be changed before; that was given up and may still be carried out by its node`,
  );
}

function movedError(record: VdiRecord): StoreError {
  return new StoreError('MOVED', `${record.name} goes on as vid ${record.vid.toString(16)}`);
}
