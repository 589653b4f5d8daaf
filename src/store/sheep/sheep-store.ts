/**
 * A Sheepdog cluster as an ObjectStore. Owns the gateway to it, the VDIs that are open and the temporary snapshots that
 * are alive; the rules for writing are in sheep-vdi.ts, the catalog's operations in sheep-catalog.ts.
 */
import { createHash } from 'node:crypto';
import os from 'node:os';
import {
  StoreError,
  type Awaitable,
  type ObjectStore,
  type OpenVdi,
  type Owner,
  type ZeroOptions,
} from '../object-store.js';
import { Cluster } from './cluster.js';
import { clusterLocation, parseClusterAddress } from './cluster-address.js';
import { Gateway, type GatewayOptions } from './gateway.js';
import type { ClusterInfo, ClusterNode } from './layouts.js';
import { ClusterFlag } from './protocol.js';
import { ReadTracker } from './read-tracker.js';
import { isLost, lostError } from './shadow.js';
import { SheepCatalog } from './sheep-catalog.js';
import type { SheepVdi, SheepVdiHost } from './sheep-vdi.js';
import { objectKey } from './table.js';
import { WriteOrder } from './write-order.js';

/** enum sd_status. */
const STATUS_RUNNING = 1;
/** A cluster that does not answer at all is told at once: most often it is the address that is wrong. */
const FIRST_CONTACT_MS = 3_000;

export interface SheepStoreOptions extends GatewayOptions {
  /** Read zeros in place of objects that are lost, and write nothing. */
  readonly missingIsZero?: boolean;
}

export class SheepStore implements ObjectStore, SheepVdiHost {
  readonly location: string;
  readonly objectsMove = true;
  readonly cluster: Cluster;
  readonly catalog: SheepCatalog;
  readonly order = new WriteOrder();
  readonly reads = new ReadTracker();
  readonly open = new Map<number, SheepVdi>();
  readonly enforcesLocks: boolean;
  /** The same for every process that may clean up after this one: whoever serves this cluster on this machine. */
  readonly owner: Buffer;
  readonly #options: SheepStoreOptions;

  private constructor(location: string, cluster: Cluster, info: ClusterInfo, options: SheepStoreOptions) {
    this.location = location;
    this.cluster = cluster;
    this.enforcesLocks = (info.flags & ClusterFlag.USE_LOCK) !== 0;
    this.owner = createHash('sha256').update(`${os.hostname()}\0${info.createdAt}`).digest().subarray(0, 8);
    this.#options = options;
    this.catalog = new SheepCatalog(this);
  }

  /** `nodes`: HOST[:PORT], several separated by commas. Errors (StoreError): ADDRESS, IO if no node can serve. */
  static async open(nodes: string, options: SheepStoreOptions = {}): Promise<SheepStore> {
    const addresses = parseClusterAddress(nodes);
    const gateway = new Gateway(addresses, options);
    const cluster = new Cluster(gateway);
    try {
      const info = await cluster.info({ retryMs: FIRST_CONTACT_MS });
      if (info.status !== STATUS_RUNNING) {
        throw new StoreError(
          'IO',
          `the cluster at ${nodes} does not serve: it waits for nodes or for 'dog cluster format'`,
        );
      }
      return new SheepStore(clusterLocation(nodes), cluster, info, options);
    } catch (error) {
      gateway.close();
      throw error;
    }
  }

  info(): Promise<ClusterInfo> {
    return this.cluster.info();
  }

  nodes(): Promise<ClusterNode[]> {
    return this.cluster.gateway.listNodes();
  }

  readObject(vid: number, idx: number, offset: number, into: Buffer): Promise<void> {
    if (isLost(vid)) return Promise.reject(lostError(idx));
    const read = this.cluster.readData(vid, idx, offset, into);
    if (this.reads.users > 0) return this.reads.track(objectKey(vid, idx), read);
    return this.#options.missingIsZero ? zerosIfGone(read, into) : read;
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

  async moved(vdi: SheepVdi, from: number): Promise<void> {
    this.open.delete(from);
    this.open.set(vdi.record.vid, vdi);
    if (!this.enforcesLocks) return;
    await this.cluster.lock(vdi.record.name);
    await this.cluster.release(from);
  }

  log(line: string, details?: object): void {
    this.#options.log?.(line, details);
  }

  async close(): Promise<void> {
    for (const vdi of [...this.open.values()]) await vdi.close();
    await this.catalog.dropOwnShadows();
    this.cluster.gateway.close();
  }

  /** Nodes take writes behind the end of an object, and behind the end of a disk. */
  #checkRange(vdi: OpenVdi, idx: number, offset: number, length: number): void {
    const { map, record } = vdi;
    if (record.isSnapshot) throw new StoreError('PERMISSION', `${record.name}@${record.tag} is a snapshot`);
    if (this.#options.missingIsZero)
      throw new StoreError('PERMISSION', 'lost objects read as zeros: nothing is written');
    if (idx < 0 || idx >= map.length || offset < 0 || offset + length > 2 ** record.blockSizeShift) {
      throw new Error(`invariant: ${length} bytes at ${offset} of object ${idx} are outside the disk ${record.name}`);
    }
  }
}

async function zerosIfGone(read: Promise<void>, into: Buffer): Promise<void> {
  try {
    await read;
  } catch (error) {
    if ((error as StoreError).code !== 'GONE') throw error;
    into.fill(0);
  }
}
