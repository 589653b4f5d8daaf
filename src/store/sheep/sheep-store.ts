/**
 * A Sheepdog cluster as an ObjectStore. Owns the gateway to it, the VDIs that are open and the temporary snapshots that
 * are alive; the rules for writing are in sheep-vdi.ts, the catalog's operations in sheep-catalog.ts.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import {
  behindEndError,
  DEFAULT_BLOCK_SIZE_SHIFT,
  StoreError,
  type Awaitable,
  type ObjectStore,
  type OpenVdi,
  type Owner,
  type ReadCount,
  type ZeroOptions,
} from '../object-store.js';
import { ClusterClient } from './cluster-client.js';
import { clusterLocation, parseClusterAddress } from './cluster-address.js';
import { clusterState } from './cluster-state.js';
import { NodePool, type NodePoolOptions } from './node-pool.js';
import { HostState } from './host-state.js';
import { Locks } from './locks.js';
import { ownerMark } from './shadow-owner.js';
import { ClusterFlag, STATUS_RUNNING } from '../../sheepdog/protocol.js';
import { ReadTracker } from './read-tracker.js';
import { isLost, lostError } from './lost-owner.js';
import { ObjectGone } from './result-errors.js';
import { SheepCatalog } from './sheep-catalog.js';
import type { CatalogHost } from './catalog-host.js';
import type { SheepVdi } from './sheep-vdi.js';
import { oidKey } from '../../sheepdog/object-ids.js';
import { WriteOrder } from './write-order.js';
import type { ClusterInfo } from '../../sheepdog/cluster-info.js';
import type { ClusterNode } from '../../sheepdog/nodes.js';
import { vidOf } from '../../sheepdog/object-ids.js';
import { inParallel } from '../../system/in-parallel.js';

/** A cluster that does not answer at all is told at once: most often it is the address that is wrong. */
const FIRST_CONTACT_MS = 3_000;
/** For closing what is open, and dropping temporary snapshots. */
const CLOSE_MS = 15_000;
/** A missing object is asked for again this many times at least, and for as long as nodes have just come or gone. */
const GONE_TRIES = 2;
const GONE_BACKOFF_MS = 10;
const SETTLING_MS = 60_000;
/** How often open VDIs are looked at where it matters what others make of them while nobody writes; and how many at a time. */
const LOOK_MS = 2_000;
const PARALLEL_LOOKS = 16;
/** Of an object that is waited for, named in the log. */
const MAX_USERS = 3;

export interface SheepStoreOptions extends NodePoolOptions {
  /** Read zeros in place of objects that are lost, and write nothing. */
  readonly missingIsZero?: boolean;
  /** Aborted when nobody waits for the cluster any more: all that is asked of it fails then. */
  readonly signal?: AbortSignal;
  /** Where this machine remembers the cluster's clients; without it nothing of them outlives this process. */
  readonly stateDirectory?: string;
  /** While it says so this process may not use that directory: what is to be stored there waits. */
  readonly isStateOutOfReach?: () => boolean;
}

export class SheepStore implements ObjectStore, CatalogHost {
  readonly location: string;
  readonly identity: string;
  readonly readOnlyBecause: string | undefined;
  readonly objectsMove = true;
  readonly gathersFirstWrites = true;
  readonly cluster: ClusterClient;
  readonly catalog: SheepCatalog;
  readonly order = new WriteOrder();
  readonly reads = new ReadTracker();
  readonly open = new Map<number, SheepVdi>();
  readonly locks: Locks;
  readonly enforcesLocks: boolean;
  readonly recyclesVids: boolean;
  readonly defaultBlockSizeShift: number;
  readonly version: ClusterInfo['version'];
  readonly state: HostState | undefined;
  /** On what this process keeps in the cluster. */
  readonly owner: Buffer;
  readonly #options: SheepStoreOptions;
  /** Objects that are read as zeros. */
  readonly #lost = new Set<number>();
  #epoch: number;
  #epochChangedAt = -Infinity;
  #looking: NodeJS.Timeout | undefined;
  #isClosed = false;

  private constructor(location: string, cluster: ClusterClient, info: ClusterInfo, options: SheepStoreOptions) {
    this.location = location;
    this.identity = `sheepdog cluster of ${info.createdAt}`;
    this.readOnlyBecause = whyReadOnly(location, info, options);
    this.version = info.version;
    this.cluster = cluster;
    this.recyclesVids = (info.flags & ClusterFlag.RECYCLE_VID) !== 0;
    cluster.recyclesVids = this.recyclesVids;
    this.enforcesLocks = (info.flags & ClusterFlag.USE_LOCK) !== 0;
    const isEnforced = this.enforcesLocks && this.readOnlyBecause === undefined;
    this.locks = new Locks(cluster, { isEnforced, recyclesVids: this.recyclesVids });
    this.defaultBlockSizeShift = info.blockSizeShift || DEFAULT_BLOCK_SIZE_SHIFT;
    this.owner = ownerMark(info.createdAt);
    this.#options = options;
    this.state = this.#openState();
    this.#epoch = info.epoch;
    this.catalog = new SheepCatalog(this);
    if ((info.flags & ClusterFlag.DISK_MODE) !== 0) cluster.pool.placeByDisk();
    cluster.pool.diskOf = (high, low) => this.#diskOf(high, low);
    cluster.recovery.copiesOf = (vid) => {
      const vdi = this.open.get(vid);
      // Where nothing is written nothing may be asked for by a write of nothing either.
      if (vdi === undefined || vdi.record.isSnapshot || this.readOnlyBecause !== undefined) return 0;
      return vdi.inode.copies;
    };
    cluster.recovery.isCoded = (vid) => (this.open.get(vid)?.inode.copyPolicy ?? 0) !== 0;
    cluster.recovery.onSteady = () => {
      for (const vdi of this.open.values()) vdi.nodesAreBack();
    };
    if (this.readOnlyBecause === undefined && (this.enforcesLocks || this.recyclesVids)) this.#keepLooking();
  }

  /** `nodes`: HOST[:PORT], several separated by commas. Errors (StoreError): ADDRESS, IO if no node can serve. */
  static async open(nodes: string, options: SheepStoreOptions = {}): Promise<SheepStore> {
    const addresses = parseClusterAddress(nodes);
    const pool = new NodePool(addresses, options);
    const cluster = new ClusterClient(pool);
    options.signal?.addEventListener('abort', () => pool.close(), { once: true });
    try {
      options.signal?.throwIfAborted();
      const info = await cluster.info({ retryMs: FIRST_CONTACT_MS });
      if (info.status !== STATUS_RUNNING) {
        throw new StoreError('IO', `the cluster at ${nodes} does not serve: it is ${clusterState(info)}`);
      }
      return new SheepStore(clusterLocation(nodes), cluster, info, options);
    } catch (error) {
      pool.close();
      throw error;
    }
  }

  #openState(): HostState | undefined {
    const { stateDirectory, isStateOutOfReach } = this.#options;
    if (stateDirectory === undefined || this.readOnlyBecause !== undefined) return undefined;
    try {
      return HostState.open(stateDirectory, this.identity, isStateOutOfReach);
    } catch (error) {
      this.log(
        `who has what open is forgotten with this process, and NAME@now:LABEL is refused: ${(error as Error).message}; ` +
          'SHEEPGATE_STATE names another directory',
      );
      return undefined;
    }
  }

  info(): Promise<ClusterInfo> {
    return this.cluster.info();
  }

  nodes(): Promise<ClusterNode[]> {
    return this.cluster.pool.listNodes();
  }

  readObject(vid: number, idx: number, offset: number, into: Buffer): Promise<void> {
    if (isLost(vid)) return Promise.reject(lostError(idx));
    const read = this.#read(vid, idx, offset, into);
    return this.reads.users > 0 ? this.reads.track(oidKey(vid, idx), read) : read;
  }

  noteRead(vdi: OpenVdi, offset: number, length: number): ReadCount {
    return this.cluster.readAhead.note(vdi, offset, length);
  }

  async #read(vid: number, idx: number, offset: number, into: Buffer): Promise<void> {
    try {
      const ahead = this.cluster.readAhead.read(vid, idx, offset, into);
      if (ahead && (await ahead)) return;
      await this.cluster.readData(vid, idx, offset, into);
    } catch (error) {
      if ((error as StoreError).code !== 'GONE') throw error;
      await this.#readGone(vid, idx, offset, into, error as StoreError);
    }
  }

  async #readGone(vid: number, idx: number, offset: number, into: Buffer, first: StoreError): Promise<void> {
    const key = oidKey(vid, idx);
    try {
      // What was looked for thoroughly once is not there the next moment either.
      if (this.#lost.has(key)) throw first;
      await this.#retryGone(first, () => this.cluster.readData(vid, idx, offset, into));
    } catch (error) {
      if (!this.#options.missingIsZero || (error as StoreError).code !== 'GONE') throw error;
      into.fill(0);
      if (this.#lost.has(key)) return;
      this.#lost.add(key);
      this.#logLost(vid, idx);
    }
  }

  /** Of an object, by the halves of its oid: who is open and has it. Undefined if nobody has. */
  #diskOf(high: number, low: number): string | undefined {
    const vid = vidOf(high);
    const own = this.open.get(vid);
    if (own) return labelOf(own);
    // A shared one, or one that is being made.
    const users: string[] = [];
    for (const vdi of this.open.values()) {
      if (vdi.creationVid === vid || vdi.map[low] === vid) users.push(labelOf(vdi));
      if (users.length > MAX_USERS) return `${users.slice(0, MAX_USERS).join(', ')} and others`;
    }
    return users.length === 0 ? undefined : users.join(', ');
  }

  /** Which bytes of what, as check says it. */
  #logLost(vid: number, idx: number): void {
    const ranges: string[] = [];
    for (const { record, map } of this.open.values()) {
      if (map[idx] !== vid) continue;
      const from = idx * 2 ** record.blockSizeShift;
      const to = Math.min(from + 2 ** record.blockSizeShift, record.size) - 1;
      ranges.push(`${labelOf({ record })} bytes ${from} to ${to}`);
    }
    this.log(`lost: ${ranges.join(', ')} (object ${idx} of vid ${vid.toString(16)}); read as zeros`);
  }

  async unlessGone(request: () => Promise<void>): Promise<void> {
    try {
      await request();
    } catch (error) {
      if ((error as StoreError).code !== 'GONE') throw error;
      await this.#retryGone(error as StoreError, request);
    }
  }

  /**
   * While nodes leave and join, one that has not recovered an object yet may say that there is none. One that is missing
   * with all nodes in their places is lost.
   */
  #retryGone(first: StoreError, request: () => Promise<void>): Promise<void> {
    const disk = first instanceof ObjectGone ? this.#diskOf(first.high, first.low) : undefined;
    const { pool } = this.cluster;
    return pool.whileAwaited(disk ?? 'a disk', first.message, () => this.#askAgain(first, request));
  }

  async #askAgain(first: StoreError, request: () => Promise<void>): Promise<void> {
    const deadline = performance.now() + this.cluster.pool.retryMs;
    let backoff = GONE_BACKOFF_MS;
    let failure = first;
    for (let tries = 0; tries < GONE_TRIES || (await this.#isUnsettled(deadline)); tries++) {
      if (performance.now() >= deadline) break;
      await sleep(backoff);
      backoff = Math.min(backoff * 2, 1000);
      try {
        return void (await request());
      } catch (error) {
        if ((error as StoreError).code !== 'GONE') throw error;
        failure = error as StoreError;
      }
    }
    throw failure;
  }

  get knownEpoch(): number {
    return this.#epoch;
  }

  async readEpoch(retryMs?: number): Promise<number> {
    const { epoch } = await this.cluster.info(retryMs === undefined ? {} : { retryMs, isApart: true });
    if (epoch !== this.#epoch) {
      this.#epoch = epoch;
      this.#epochChangedAt = performance.now();
    }
    return epoch;
  }

  /** Whether nodes have come or gone lately. */
  async #isUnsettled(deadline: number): Promise<boolean> {
    const retryMs = Math.max(0, deadline - performance.now());
    await this.readEpoch(retryMs);
    return performance.now() - this.#epochChangedAt < SETTLING_MS;
  }

  writeObject(vdi: OpenVdi, idx: number, offset: number, data: Buffer): Promise<void> {
    this.#checkRange(vdi, idx, offset, data.length);
    return (vdi as SheepVdi).write(idx, offset, data);
  }

  createObject(vdi: OpenVdi, idx: number, offset: number, data: Buffer, copyOf?: Owner): Promise<void> {
    this.#checkRange(vdi, idx, offset, data.length);
    if (copyOf && copyOf.idx !== idx) throw new Error('invariant: an object is copied to another place');
    return (vdi as SheepVdi).create(idx, offset, data, copyOf?.vid ?? 0);
  }

  zeroObject(vdi: OpenVdi, idx: number, offset: number, length: number, _options: ZeroOptions): Promise<void> {
    this.#checkRange(vdi, idx, offset, length);
    return (vdi as SheepVdi).zero(idx, offset, length);
  }

  /** Nodes know no zeroing but writing zeros. */
  canZeroFast(_options: ZeroOptions): boolean {
    return false;
  }

  /** Nodes have caches of their own. */
  cacheObject(): void {}

  /** All that is known without reading is which objects there are. */
  objectExtents(
    _vid: number,
    _idx: number,
    offset: number,
    length: number,
    sink: (offset: number, length: number, hole: boolean) => boolean,
  ): Awaitable<void> {
    sink(offset, length, false);
  }

  dropStaleShadows(name: string): Promise<void> {
    return this.catalog.dropStaleShadows(name);
  }

  workingVid(name: string): Promise<number> {
    return this.catalog.workingVid(name);
  }

  async moved(vdi: SheepVdi, from: number): Promise<void> {
    if (this.open.get(from) === vdi) this.open.delete(from);
    this.open.set(vdi.record.vid, vdi);
    try {
      await this.locks.release(from);
    } catch (error) {
      this.log(`the lock on vid ${from.toString(16)}, a snapshot of ${vdi.record.name} by now, is still there`, {
        err: error,
      });
    }
  }

  /**
   * Locks stay with the vid when somebody takes a snapshot, and a vid that is used again is another VDI: an idle disk that
   * did not notice would be open for others, or have another's objects.
   */
  #keepLooking(): void {
    this.#looking = setTimeout(() => {
      const working = [...this.open.values()].filter(({ record, failure }) => !record.isSnapshot && !failure);
      // With the patience of any request: a node that is taken for silent loses the connection, and what others asked on it.
      const look = (vdi: SheepVdi): Promise<void> => vdi.look().catch(nothing);
      void inParallel(PARALLEL_LOOKS, working, look).then(() => {
        if (!this.#isClosed) this.#keepLooking();
      });
    }, LOOK_MS).unref();
  }

  log(line: string, details?: object): void {
    this.#options.log?.(line, details);
  }

  /** Whatever of it fails, nothing is connected after it. */
  async close(): Promise<void> {
    this.#isClosed = true;
    clearTimeout(this.#looking);
    // Nodes that do not answer are not waited for as long as requests of clients wait.
    const timer = setTimeout(() => this.cluster.pool.close(), CLOSE_MS);
    const steps = await Promise.allSettled([...this.open.values()].map((vdi) => vdi.close()));
    steps.push(...(await Promise.allSettled([this.catalog.dropOwnShadows()])));
    clearTimeout(timer);
    this.cluster.pool.close();
    // Whatever the nodes say.
    if (this.state) steps.push(...(await Promise.allSettled([this.state.close()])));
    for (const each of steps) if (each.status === 'rejected') throw each.reason;
  }

  /** Nodes take writes behind the end of an object, and behind the end of a disk. */
  #checkRange(vdi: OpenVdi, idx: number, offset: number, length: number): void {
    const { map, record } = vdi;
    if (record.isSnapshot) throw new StoreError('PERMISSION', `${record.name}@${record.tag} is a snapshot`);
    if (this.readOnlyBecause !== undefined) {
      throw new StoreError('PERMISSION', `nothing is written: ${this.readOnlyBecause}`);
    }
    if (idx >= map.length) throw vdi.failure ?? behindEndError(record, 'NO_SPACE');
    if (idx < 0 || offset < 0 || offset + length > 2 ** record.blockSizeShift) {
      throw new Error(`invariant: ${length} bytes at ${offset} of object ${idx} are outside the disk ${record.name}`);
    }
  }
}

function whyReadOnly(
  location: string,
  { version }: ClusterInfo,
  { missingIsZero }: SheepStoreOptions,
): string | undefined {
  if (missingIsZero)
    return `${location} is served with zeros in place of what it has lost, and therefore only to be read`;
  if (version === '1.0') return undefined;
  return (
    `${location} is a cluster of Sheepdog ${version}, which is only read here; 'sheepgate migrate', without a daemon that ` +
    'serves it, brings its disks into a local store or a cluster of 1.0'
  );
}

function labelOf({ record }: Pick<OpenVdi, 'record'>): string {
  return record.isSnapshot ? `${record.name}@${record.tag}` : record.name;
}

/** Whoever uses the disk is told. */
function nothing(): void {}
