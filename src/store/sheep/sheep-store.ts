/**
 * A Sheepdog cluster as an ObjectStore. Owns the client of the cluster (cluster-client.ts), the open VDIs and this process's state
 * on the machine. The rules for writing are in sheep-vdi.ts, the catalog's operations in sheep-catalog.ts.
 */
import type { ObjectStore } from '../object-store.js';
import { StoreError } from '../store-error.js';
import { DEFAULT_BLOCK_SIZE_SHIFT, labelOfVdi } from '../vdi-record.js';
import { ClusterClient } from './cluster-client.js';
import { clusterLocation, parseClusterAddress } from './cluster-address.js';
import { ClusterReads, type ObjectReading, type ReadingStore } from './cluster-reads.js';
import { clusterState } from './cluster-state.js';
import { GoneRetries } from './gone-retries.js';
import { NodePool } from './node-pool.js';
import type { NodePoolOptions } from './pool-options.js';
import { HostState } from './host-state.js';
import { Locks } from './locks.js';
import { ownerMark } from './shadow-owner.js';
import { ClusterFlag, STATUS_RUNNING } from '../../sheepdog/protocol.js';
import type { ClusterInfo } from '../../sheepdog/cluster-info.js';
import type { ClusterNode } from '../../sheepdog/nodes.js';
import { vidOf } from '../../sheepdog/object-ids.js';
import type { CatalogHost } from './catalog-host.js';
import { ReadTracker } from './read-tracker.js';
import { SheepCatalog } from './sheep-catalog.js';
import type { SheepVdi } from './sheep-vdi.js';
import { inParallel } from '../../system/in-parallel.js';
import { WriteOrder } from './write-order.js';

/** A cluster that does not answer at all is reported soon: most often the address is wrong. */
const FIRST_CONTACT_MS = 3_000;
/** For closing the open VDIs, and dropping temporary snapshots. */
const CLOSE_MS = 15_000;
/** Between two looks at the open VDIs, where idle VDIs must notice changes by other clients; and how many looks at a time. */
const LOOK_MS = 2_000;
const PARALLEL_LOOKS = 16;
/** Disks that the log names for one object that is waited for. */
const MAX_USERS = 3;

export interface SheepStoreOptions extends NodePoolOptions {
  /** The caller's reason why nothing may be changed; undefined for none. */
  readonly readOnlyBecause?: string;
  /** A decorator of the store's reading of objects (zeros-for-missing.ts). */
  readonly readingOver?: (reads: ClusterReads, store: ReadingStore) => ObjectReading;
  /** Aborted when no caller waits for the cluster any more: all requests fail from then on. */
  readonly signal?: AbortSignal;
  /** Where this machine remembers the cluster's clients. Absent: they are forgotten with this process. */
  readonly stateDirectory?: string;
  /** While true this process may not use that directory, and changes of it wait. */
  readonly isStateOutOfReach?: () => boolean;
}

export class SheepStore implements ObjectStore, CatalogHost {
  readonly location: string;
  readonly identity: string;
  readonly readOnlyBecause: string | undefined;
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
  /** Marks what this process keeps in the cluster. */
  readonly owner: Buffer;
  readonly #options: SheepStoreOptions;
  readonly reading: ObjectReading;
  readonly #retries: GoneRetries;
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
    this.#retries = new GoneRetries(cluster, info.epoch, (high, low) => this.#diskOf(high, low));
    const reads = new ClusterReads(cluster, this.reads, this.#retries);
    this.reading = options.readingOver?.(reads, this) ?? reads;
    this.catalog = new SheepCatalog(this);
    if ((info.flags & ClusterFlag.DISK_MODE) !== 0) cluster.pool.placeByDisk();
    cluster.pool.diskOf = (high, low) => this.#diskOf(high, low);
    cluster.recovery.copiesOf = (vid) => {
      const vdi = this.open.get(vid);
      // Settling an object takes a write of no bytes. None is sent for a VDI that is only read.
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
        `which clients have which disks open cannot be stored, and NAME@now:LABEL is refused: ${(error as Error).message}; ` +
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

  /** The open VDIs that have the object with this oid, for the log. Undefined if none has. */
  #diskOf(high: number, low: number): string | undefined {
    const vid = vidOf(high);
    const own = this.open.get(vid);
    if (own) return labelOfVdi(own.record);
    // The object is shared, or is being made.
    const users: string[] = [];
    for (const vdi of this.open.values()) {
      if (vdi.creationVid === vid || vdi.map[low] === vid) users.push(labelOfVdi(vdi.record));
      if (users.length > MAX_USERS) return `${users.slice(0, MAX_USERS).join(', ')} and others`;
    }
    return users.length === 0 ? undefined : users.join(', ');
  }

  unlessGone(request: () => Promise<void>): Promise<void> {
    return this.#retries.unlessGone(request);
  }

  get knownEpoch(): number {
    return this.#retries.knownEpoch;
  }

  readEpoch(): Promise<number> {
    return this.#retries.readEpoch();
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
      this.log(
        `the lock on vid ${from.toString(16)}, which is a snapshot of ${vdi.record.name} now, could not be released`,
        {
          err: error,
        },
      );
    }
  }

  /**
   * Looks at the working VDIs again and again. When another client takes a snapshot the lock stays with the old vid, and a vid
   * may be reused for another VDI: an idle disk that did not notice would have no lock, or another disk's objects.
   */
  #keepLooking(): void {
    this.#looking = setTimeout(() => {
      const working = [...this.open.values()].filter(({ record, failure }) => !record.isSnapshot && !failure);
      // As long as any request waits: a shorter limit would close the connection, with the requests of others on it.
      const look = (vdi: SheepVdi): Promise<void> => vdi.look().catch(nothing);
      void inParallel(PARALLEL_LOOKS, working, look).then(() => {
        if (!this.#isClosed) this.#keepLooking();
      });
    }, LOOK_MS).unref();
  }

  log(line: string, details?: object): void {
    this.#options.log?.(line, details);
  }

  /** Closes all connections, also if a step fails. Errors: the first failure. */
  async close(): Promise<void> {
    this.#isClosed = true;
    clearTimeout(this.#looking);
    // Shorter than requests of clients wait for a node that does not answer.
    const timer = setTimeout(() => this.cluster.pool.close(), CLOSE_MS);
    const steps = await Promise.allSettled([...this.open.values()].map((vdi) => vdi.close()));
    steps.push(...(await Promise.allSettled([this.catalog.dropOwnShadows()])));
    clearTimeout(timer);
    this.cluster.pool.close();
    // Also if nodes have failed.
    if (this.state) steps.push(...(await Promise.allSettled([this.state.close()])));
    for (const each of steps) if (each.status === 'rejected') throw each.reason;
  }
}

function whyReadOnly(
  location: string,
  { version }: ClusterInfo,
  { readOnlyBecause }: SheepStoreOptions,
): string | undefined {
  if (readOnlyBecause !== undefined) return readOnlyBecause;
  if (version === '1.0') return undefined;
  return (
    `${location} is a cluster of Sheepdog ${version}, which can only be read; stop its daemon, and copy its disks into a ` +
    "local store or a cluster of 1.0 with 'sheepgate migrate'"
  );
}

/** For `catch`: the disk's own requests report the failure. */
function nothing(): void {}
