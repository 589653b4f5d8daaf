/**
 * What a cluster can be asked beside its objects, one method per operation: inodes, their tables, the catalog, locks. Turns
 * results into StoreErrors. Owns no state of VDIs; the order in which these may be called is sheep-vdi.ts's and
 * sheep-catalog.ts's.
 */
import {
  readIndex,
  readLeaf,
  readRoot,
  type IndexRoot,
  type LeafPointer,
  type ReadObject,
} from '../../sheepdog/btree.js';
import { decodeClusterInfo, decodeOldClusterInfo, type ClusterInfo } from '../../sheepdog/cluster-info.js';
import { encodeVdiRequest, vdiResponse } from '../../sheepdog/headers.js';
import {
  bytesOfTable,
  decodeEntry,
  decodeTable,
  encodeTable,
  ENTRY_BYTES,
  entryOffset,
  objectCount,
  REFERENCE_BYTES,
  referenceOffset,
  TABLE_OFFSET,
} from '../../sheepdog/inode-table.js';
import { decodeInode, INODE_HEADER_BYTES, type Inode } from '../../sheepdog/inode.js';
import { inodeHigh } from '../../sheepdog/object-ids.js';
import { formerName, formerNameAt, INODE_FORMER_NAME_OFFSET } from '../../sheepdog/own-name.js';
import {
  CLUSTER_INFO_ROOM,
  Flag,
  LOCK_TYPE_NORMAL,
  MAX_HYPER_OBJECTS,
  NAME_BYTES,
  Opcode,
  Result,
} from '../../sheepdog/protocol.js';
import { decodeVdiStates, LockState, VDI_STATE_BYTES, type VdiState } from '../../sheepdog/state-layouts.js';
import { encodeName } from '../../sheepdog/text-fields.js';
import type { VidsInUse } from '../../sheepdog/vids-in-use.js';
import { StoreError } from '../store-error.js';
import type { Answer, WireRequest } from './connection.js';
import { readOr } from './format-errors.js';
import { lookupAround } from './lost-inodes.js';
import type { NodePool } from './node-pool.js';
import type { ExecuteOptions } from './pool-options.js';
import { ObjectClient } from './object-client.js';
import { resultError, succeeded } from './result-errors.js';
import { VidsKnown } from './vids-known.js';

/** NEW_VDI and DEL_VDI write inodes of 12 MB on every node that has a copy, one VDI after the other. */
const CATALOG_ATTEMPT_MS = 120_000;
/** Room in a request for the states of VDIs, deleted ones included: at first, and at most. */
const FIRST_STATES = 512;
const MAX_STATES = 2 ** 15;
/** Looked up only for the side effect; it need not exist. */
const NOBODYS_NAME = 'sheepgate-nobody';

export interface NewVdi {
  readonly name: string;
  readonly size: number;
  /** 0: the cluster's default. */
  readonly copies: number;
  readonly copyPolicy: number;
  readonly blockSizeShift: number;
  /** The snapshot to start from; 0 for an empty VDI. */
  readonly baseVid: number;
  /** The working VDI of this name becomes a snapshot. */
  readonly replacesWorking: boolean;
}

export class ClusterClient extends ObjectClient {
  readonly #vids: VidsKnown;
  /** The cluster reuses vids (ClusterFlag.RECYCLE_VID): nodes read all inodes to look up a name. */
  recyclesVids = false;
  /** Counts requests that make or delete a VDI, failed ones included. */
  changes = 0;
  readonly #reader: ReadObject = (high, low, offset, into) => this.readObject(high, low, offset, into);

  constructor(pool: NodePool) {
    super(pool);
    this.#vids = new VidsKnown(pool, () => this.#lookUp(NOBODYS_NAME, 0));
  }

  /** Errors: GONE, IO. */
  async readInode(vid: number, options?: ExecuteOptions): Promise<Inode> {
    const bytes = Buffer.allocUnsafe(INODE_HEADER_BYTES);
    await this.readInodeBytes(vid, 0, bytes, options);
    const inode = decodeInode(bytes);
    this.noteCopies(vid, inode.copies);
    const at = formerNameAt(inode.name);
    return at === undefined ? inode : { ...inode, name: (await this.#formerName(at)) || inode.name };
  }

  /** The real name of a VDI that has a name for one request (own-name.ts); empty if there is none. */
  async #formerName(vid: number): Promise<string> {
    const bytes = Buffer.alloc(NAME_BYTES);
    try {
      await this.readInodeBytes(vid, INODE_FORMER_NAME_OFFSET, bytes);
    } catch (error) {
      if ((error as StoreError).code !== 'GONE') throw error;
    }
    return formerName(bytes);
  }

  readInodeBytes(vid: number, offset: number, into: Buffer, options?: ExecuteOptions): Promise<void> {
    return this.readObject(inodeHigh(vid), 0, offset, into, options);
  }

  writeInodeBytes(vid: number, offset: number, data: Buffer, options: ExecuteOptions = {}): Promise<void> {
    return this.writeObject(inodeHigh(vid), 0, offset, data, options);
  }

  /**
   * The table of the VDI, from its inode or its index. Errors: UNSUPPORTED (too many objects, or an index of 0.8), DAMAGED,
   * GONE.
   */
  async readOwners(inode: Inode): Promise<Uint32Array> {
    const count = objectCount(inode.size, inode.blockSizeShift);
    if (count > MAX_HYPER_OBJECTS) {
      throw new StoreError(
        'UNSUPPORTED',
        `${inode.name} has ${count} objects, and no more than ${MAX_HYPER_OBJECTS} are read`,
      );
    }
    if (inode.storePolicy === 0) return this.readTable(inode.vid, count);
    if (this.pool.version === '0.8') {
      throw new StoreError(
        'UNSUPPORTED',
        `${inode.name} is a hyper volume, whose index has another format in Sheepdog 0.8`,
      );
    }
    return readOr('DAMAGED', () => readIndex(this.#reader, inode.vid, count));
  }

  /** Of a hyper volume. Errors: DAMAGED, and as readObject. */
  readIndexRoot(vid: number): Promise<IndexRoot> {
    return readOr('DAMAGED', () => readRoot(this.#reader, vid));
  }

  /** Errors: DAMAGED, and as readObject. */
  readIndexLeaf(vid: number, leaf: LeafPointer): Promise<Buffer> {
    return readOr('DAMAGED', () => readLeaf(this.#reader, vid, leaf));
  }

  /** `count` entries of the table, from `first` on. Errors: GONE. */
  async readTable(vid: number, count: number, first = 0): Promise<Uint32Array> {
    const table = new Uint32Array(count);
    const bytes = bytesOfTable(table);
    await this.readInodeBytes(vid, entryOffset(first), bytes);
    decodeTable(bytes);
    return table;
  }

  async readEntry(vid: number, idx: number): Promise<number> {
    const bytes = Buffer.alloc(ENTRY_BYTES);
    await this.readInodeBytes(vid, entryOffset(idx), bytes);
    return decodeEntry(bytes);
  }

  /**
   * Sets the entries from `idx` on. Each must differ from its present value: the node gives up the old owner's reference and
   * resets the entry's count. So before a repetition the entries are read, and a change of members does not repeat the request:
   * only the owner of the whole table can do that (TableWriter).
   */
  writeTable(vid: number, idx: number, owners: readonly number[]): Promise<void> {
    const data = encodeTable(owners);
    const offset = entryOffset(idx);
    const beforeRetry = async (retryMs: number): Promise<boolean> => {
      const found = Buffer.alloc(data.length);
      await this.readInodeBytes(vid, offset, found, { retryMs, isApart: true });
      return found.equals(data);
    };
    return this.writeInodeBytes(vid, offset, data, { beforeRetry });
  }

  /** Sets the table from its beginning as plain bytes: nodes give up no reference and reset no count. */
  async fillTable(vid: number, table: Uint32Array): Promise<void> {
    await this.writeTableBytes(vid, encodeTable(table));
  }

  /**
   * Writes from the beginning of the table, or of the index of a hyper volume. Nodes treat a write as a change of the table
   * only if it lies within the table; this one begins in the unused bytes before it (sheep_priv.h, is_data_vid_update).
   */
  writeTableBytes(vid: number, bytes: Buffer): Promise<void> {
    const data = Buffer.concat([Buffer.alloc(ENTRY_BYTES), bytes]);
    return this.writeInodeBytes(vid, TABLE_OFFSET - ENTRY_BYTES, data);
  }

  /** References of the first `count` entries, as they are stored (inode-table.ts). */
  async readReferences(vid: number, count: number): Promise<Buffer> {
    const bytes = Buffer.alloc(count * REFERENCE_BYTES);
    if (count > 0) await this.readInodeBytes(vid, referenceOffset(0), bytes);
    return bytes;
  }

  writeReferences(vid: number, idx: number, bytes: Buffer): Promise<void> {
    return this.writeInodeBytes(vid, referenceOffset(idx), bytes);
  }

  /** The vid of the working VDI of this name, or of its snapshot with this id; 0 if there is none. Errors: IO. */
  async lookup(name: string, snapId = 0): Promise<number> {
    const answer = await this.#lookUp(name, snapId);
    if (answer.result === Result.NO_VDI || answer.result === Result.NO_TAG) return 0;
    // An inode that the nodes read during the look-up is lost; it may be another VDI's.
    if (answer.result === Result.NO_OBJ) return lookupAround(this, name, snapId);
    return answeredVid(succeeded(answer, `looking up "${name}"`));
  }

  #lookUp(name: string, snapId: number): Promise<Answer> {
    const data = encodeName(name, '');
    const header = encodeVdiRequest(Opcode.GET_VDI_INFO, Flag.WRITE, data.length, { snapId });
    return this.pool.execute({ header, data });
  }

  /** Call before a change by name. Errors: DAMAGED (a lost inode keeps the nodes from finding the name). */
  async mustBeFoundByNodes(name: string, snapId: number): Promise<void> {
    const { result } = await this.#lookUp(name, snapId);
    if (result === Result.NO_OBJ) throw resultError(result, `looking up "${name}"`);
  }

  /** The vid that the nodes gave it. Errors: NO_SPACE, LIMIT, DAMAGED, IO (also: whether it was made is not known). */
  async newVdi(vdi: NewVdi): Promise<number> {
    const data = encodeName(vdi.name);
    const header = encodeVdiRequest(Opcode.NEW_VDI, Flag.WRITE, data.length, {
      vdiSize: vdi.size,
      baseVid: vdi.baseVid,
      copies: vdi.copies,
      copyPolicy: vdi.copyPolicy,
      blockSizeShift: vdi.blockSizeShift,
      snapId: vdi.replacesWorking ? 1 : 0,
    });
    return answeredVid(succeeded(await this.#catalogRequest({ header, data }), `creating "${vdi.name}"`));
  }

  /**
   * Deletes the inode only: its table must be clear, or every object leaks. The vid that the nodes deleted; 0 if there was none.
   * Errors: DAMAGED, IO.
   */
  async deleteVdi(name: string, snapId: number): Promise<number> {
    const data = encodeName(name, '');
    const header = encodeVdiRequest(Opcode.DEL_VDI, Flag.WRITE, data.length, { snapId });
    const answer = await this.#catalogRequest({ header, data });
    if (answer.result === Result.NO_VDI || answer.result === Result.NO_TAG) return 0;
    return answeredVid(succeeded(answer, `deleting "${name}"`));
  }

  /**
   * The vid that the nodes locked. `label`: the name for messages. Errors: LOCKED. Succeeds always where locks are not
   * enforced.
   */
  async lock(name: string, label = name): Promise<number> {
    const data = encodeName(name, '');
    const header = encodeVdiRequest(Opcode.LOCK_VDI, Flag.WRITE, data.length, { type: LOCK_TYPE_NORMAL });
    const answer = await this.pool.execute({ header, data }, { once: true });
    if (answer.result === Result.VDI_LOCKED) {
      throw new StoreError(
        'LOCKED',
        `"${label}" is locked by another client of the cluster; 'sheepgate vdi lock list' shows through which node, and 'vdi lock unlock' ends a lock that was left behind`,
      );
    }
    return answeredVid(succeeded(answer, `locking "${label}"`));
  }

  /** Errors: IO. */
  async release(vid: number): Promise<void> {
    const header = encodeVdiRequest(Opcode.RELEASE_VDI, 0, 0, { baseVid: vid, type: LOCK_TYPE_NORMAL });
    succeeded(await this.pool.execute({ header }, { once: true }), `releasing the lock on ${vid.toString(16)}`);
  }

  /** The state of every VDI, deleted ones included. Undefined if the nodes answer in another form. Errors: LIMIT. */
  async vdiStates(): Promise<readonly VdiState[] | undefined> {
    const what = 'asking for locks';
    for (let room = FIRST_STATES; room <= MAX_STATES; room *= 4) {
      const receive = Buffer.alloc(room * VDI_STATE_BYTES);
      const header = encodeVdiRequest(Opcode.GET_VDI_COPIES, 0, receive.length);
      const answer = await this.pool.execute({ header, receive });
      if (answer.result === Result.BUFFER_SMALL) continue;
      return decodeVdiStates(receive.subarray(0, succeeded(answer, what).length));
    }
    throw new StoreError('LIMIT', `${what}: the cluster has the states of more than ${MAX_STATES} VDIs`);
  }

  /**
   * All locked vids, snapshots and deleted VDIs included. Errors: LIMIT (too many VDIs to ask for).
   */
  async lockedVids(): Promise<number[]> {
    const states = (await this.vdiStates()) ?? [];
    return states.filter(({ lockState }) => lockState !== LockState.UNLOCKED).map(({ vid }) => vid);
  }

  /** Which vids are in use. Not older than `maxAgeMs`, nor than our last request that makes or deletes a VDI. Errors: IO. */
  vids(maxAgeMs = 0): Promise<VidsInUse> {
    return this.#vids.get(maxAgeMs);
  }

  /** Errors: IO. */
  async info(options: ExecuteOptions = {}): Promise<ClusterInfo> {
    const receive = Buffer.alloc(CLUSTER_INFO_ROOM);
    await this.pool.whenConnected(options);
    const opcode = this.pool.version === '0.8' ? Opcode.STAT_CLUSTER : Opcode.CLUSTER_INFO;
    const header = encodeVdiRequest(opcode, 0, receive.length);
    succeeded(await this.pool.execute({ header, receive }, options), 'asking for the state of the cluster');
    return opcode === Opcode.STAT_CLUSTER
      ? decodeOldClusterInfo(receive)
      : decodeClusterInfo(receive, this.pool.version);
  }

  async #catalogRequest(request: WireRequest): Promise<Answer> {
    try {
      return await this.pool.execute(request, { once: true, slowMs: CATALOG_ATTEMPT_MS });
    } finally {
      this.#vids.forget();
      this.changes++;
    }
  }
}

function answeredVid(answer: Answer): number {
  return vdiResponse.decode(answer.header).vid;
}
