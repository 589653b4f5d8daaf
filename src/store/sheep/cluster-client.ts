/**
 * What a cluster can be asked, one method per operation: objects, inodes, tables of objects, VDIs. Turns results into
 * StoreErrors. Owns no state of VDIs; the order in which these may be called is sheep-vdi.ts's and sheep-catalog.ts's.
 */
import { StoreError } from '../object-store.js';
import { readIndex, type ReadObject } from '../../sheepdog/btree.js';
import type { Answer, WireRequest } from './connection.js';
import type { ExecuteOptions, NodePool } from './node-pool.js';
import {
  decodeClusterInfo,
  decodeInode,
  decodeOldClusterInfo,
  encodeName,
  encodeObjectRequest,
  encodeVdiRequest,
  vdiResponse,
  type ClusterInfo,
  type Inode,
} from '../../sheepdog/layouts.js';
import { lookupAround } from './lost-inodes.js';
import { formerName, formerNameAt, INODE_FORMER_NAME_OFFSET } from '../../sheepdog/own-name.js';
import { inPieces } from './pieces.js';
import {
  CLUSTER_INFO_ROOM,
  Flag,
  GREF_BYTES,
  INODE_ENTRY_BYTES,
  INODE_GREF_OFFSET,
  INODE_HEADER_BYTES,
  INODE_TABLE_OFFSET,
  inodeHigh,
  LOCK_TYPE_NORMAL,
  MAX_HYPER_OBJECTS,
  NAME_BYTES,
  Opcode,
  Result,
  resultName,
  VDI_BITMAP_BYTES,
  vidOf as vidOfHigh,
} from '../../sheepdog/protocol.js';
import { ReadAhead } from './read-ahead.js';
import { RecoveryWatch } from './recovery-watch.js';
import { decodeVdiStates, LockState, VDI_STATE_BYTES, type VdiState } from '../../sheepdog/state-layouts.js';
import { objectCount } from './table.js';
import { VidsInUse } from '../../sheepdog/vids-in-use.js';

/** NEW_VDI and DEL_VDI write inodes of 12 MB on every node that has a copy, one VDI after the other. */
const CATALOG_ATTEMPT_MS = 120_000;
/** A request for the vids in use that takes longer is not waited for by others. */
const LONG_VIDS_MS = 1_000;
/** Room for the states of so many VDIs, deleted ones included, is given at first, and at most. */
const FIRST_STATES = 512;
const MAX_STATES = 2 ** 15;
const NOTHING = Buffer.alloc(0);
/** What a node answers that has been started and has not joined. */
const NOT_JOINED: ReadonlySet<number> = new Set([Result.STARTUP, Result.WAIT_FOR_FORMAT, Result.WAIT_FOR_JOIN]);

/** `high` and `low` are the halves of its oid. */
export class ObjectGone extends StoreError {
  constructor(
    asked: string,
    readonly high: number,
    readonly low: number,
  ) {
    super('GONE', `${asked}: the cluster answers ${resultName(Result.NO_OBJ)}: the object is missing`);
  }
}
const SECTOR_BYTES = 512;
/** VDIs whose number of copies is remembered. */
const MAX_REMEMBERED = 2 ** 16;
/** Whether there is such a VDI does not matter. */
const NOBODYS_NAME = 'sheepgate-nobody';
/** For the log. */
const SETTLING = 'nodes have come or gone, and bring objects to their places';

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

export class Cluster {
  readonly gateway: NodePool;
  /** What the nodes last said of which vids are in use. */
  #vids: { readonly askedAt: number; readonly answer: Promise<VidsInUse> } | undefined;
  /** What the next request for them will answer, for all who wait for it: an answer is 4 MiB. */
  #nextVids: Promise<VidsInUse> | undefined;
  #vidsAsked: Promise<unknown> | undefined;
  /** Nodes look through all inodes for a name (ClusterFlag.RECYCLE_VID). */
  recyclesVids = false;
  /** VDIs that we have made or deleted, or tried to. */
  changes = 0;
  /** What was read ahead of an object is not true any more once it is changed; and what is read meanwhile is not either. */
  readonly readAhead = new ReadAhead((vid, idx, offset, into) => this.readData(vid, idx, offset, into));

  /** Whether nodes recover, and which objects must wait for that. */
  readonly recovery: RecoveryWatch;
  /** By vid, of inodes that were read here: how many copies there are of what belongs to the VDI. */
  readonly #copies = new Map<number, number>();
  /** By vid: erasure-coded objects that are to be written again (parity.ts). */
  readonly oldParity = new Map<number, Set<number>>();

  constructor(gateway: NodePool) {
    this.gateway = gateway;
    this.recovery = new RecoveryWatch(gateway);
    gateway.onEpoch = (epoch) => this.recovery.saw(epoch);
    gateway.knownEpoch = () => this.recovery.epoch;
    gateway.onClose = () => this.recovery.close();
  }

  /** Bytes of the data object (vid, idx). Errors: GONE if there is no such object. */
  readData(vid: number, idx: number, offset: number, into: Buffer): Promise<void> {
    return inPieces(offset, into, (at, part) => this.#readNear(vid, idx, at, part));
  }

  async #readNear(vid: number, idx: number, offset: number, into: Buffer): Promise<void> {
    const { recovery } = this;
    for (;;) {
      if (!recovery.isSteady) await this.#settle(vid, idx);
      const { epoch } = recovery;
      const header = encodeObjectRequest(Opcode.READ_OBJ, 0, vid, idx, offset, into.length);
      const { result } = await this.gateway.executeNear({ header, receive: into }, vid, idx);
      if (recovery.epoch !== epoch) continue;
      if (result !== Result.SUCCESS) throw objectError(result, 'reading', vid, idx);
      return;
    }
  }

  /** Wait until the object takes requests, if it is one that somebody here writes. */
  #settle(high: number, low: number): Promise<void> {
    return this.#settleCopies(high, low, this.recovery.copiesOf(vidOfHigh(high)));
  }

  /** The same of one that is about to be written, whether its disk is open or not: it may be a temporary snapshot, or deleted. */
  #settleToWrite(high: number, low: number): Promise<void> {
    const vid = vidOfHigh(high);
    return this.#settleCopies(high, low, this.recovery.copiesOf(vid) || (this.#copies.get(vid) ?? 0));
  }

  async #settleCopies(high: number, low: number, copies: number): Promise<void> {
    if (copies === 0) return;
    const vid = vidOfHigh(high);
    const disk = this.gateway.diskOf(high, low) ?? `vid ${vid.toString(16)}`;
    await this.gateway.whileAwaited(disk, SETTLING, () => this.recovery.settle(high, low, copies));
  }

  async #read(high: number, low: number, offset: number, into: Buffer, options?: ExecuteOptions): Promise<void> {
    const { recovery } = this;
    for (;;) {
      if (!recovery.isSteady) await this.#settle(high, low);
      const { epoch } = recovery;
      const header = encodeObjectRequest(Opcode.READ_OBJ, 0, high, low, offset, into.length);
      const { result } = await this.gateway.execute({ header, receive: into }, options);
      if (recovery.epoch !== epoch) continue;
      if (result !== Result.SUCCESS) throw objectError(result, 'reading', high, low);
      return;
    }
  }

  /** In place. Errors: READONLY if the vid has become a snapshot, GONE, NO_SPACE. */
  async writeData(vid: number, idx: number, offset: number, data: Buffer): Promise<void> {
    if (!this.recovery.isSteady) await this.#settleToWrite(vid, idx);
    const header = encodeObjectRequest(Opcode.WRITE_OBJ, Flag.WRITE, vid, idx, offset, data.length);
    const { result } = await this.#change(vid, idx, { header, data });
    if (result !== Result.SUCCESS) throw objectError(result, 'writing', vid, idx);
  }

  /**
   * Make the data object, zeros or a copy of (copyOf, idx), with `data` laid over it; one that exists is replaced whole.
   * Errors: READONLY, NO_SPACE, GONE if what is to be copied is not there.
   */
  async createData(vid: number, idx: number, offset: number, data: Buffer, copyOf: number): Promise<void> {
    if (copyOf !== 0 && !this.recovery.isSteady) await this.#settle(copyOf, idx);
    const flags = copyOf === 0 ? Flag.WRITE : Flag.WRITE | Flag.COW;
    const low = copyOf === 0 ? 0 : idx;
    const header = encodeObjectRequest(Opcode.CREATE_AND_WRITE_OBJ, flags, vid, idx, offset, data.length, copyOf, low);
    const { result } = await this.#change(vid, idx, { header, data });
    if (result !== Result.SUCCESS) throw objectError(result, 'creating', vid, idx);
  }

  /** Whether any node has a copy of the data object, or a strip. Errors: StoreError IO, also if one cannot be asked. */
  async isAnywhere(vid: number, idx: number): Promise<boolean> {
    // One that has not joined (yet) is not asked for it (recovery-watch.ts), and may have it.
    const states = await this.gateway.executeOnAll(() => encodeVdiRequest(Opcode.STAT_SHEEP, 0, 0));
    if (states.some(({ result }) => NOT_JOINED.has(result))) return true;
    const exist = (): Buffer => encodeObjectRequest(Opcode.EXIST, 0, vid, idx, 0, 0);
    const answers = await this.gateway.executeOnAll(exist);
    return answers.some(({ result }) => result !== Result.NO_OBJ);
  }

  /** Whether the data object can be read. Of an erasure-coded one all strips with data are needed for that. */
  async isFound(vid: number, idx: number): Promise<boolean> {
    try {
      await this.#readNear(vid, idx, 0, Buffer.alloc(SECTOR_BYTES));
      return true;
    } catch (error) {
      if ((error as StoreError).code !== 'GONE') throw error;
      return false;
    }
  }

  /** Whether the vid has become a snapshot in the memory of the nodes: they say so before its inode does. */
  async isReadOnly(vid: number, idx: number): Promise<boolean> {
    // Of no bytes: changes nothing whether the object exists or not.
    const header = encodeObjectRequest(Opcode.WRITE_OBJ, Flag.WRITE, vid, idx, 0, 0);
    const { result } = await this.gateway.execute({ header, data: NOTHING });
    if (result === Result.READONLY) return true;
    if (result === Result.SUCCESS || result === Result.NO_OBJ) return false;
    throw objectError(result, 'looking at', vid, idx);
  }

  async removeData(vid: number, idx: number): Promise<void> {
    const header = encodeObjectRequest(Opcode.REMOVE_OBJ, 0, vid, idx, 0, 0);
    const { result } = await this.#change(vid, idx, { header });
    if (result !== Result.SUCCESS && result !== Result.NO_OBJ) throw objectError(result, 'removing', vid, idx);
  }

  /** Once more when the members have changed meanwhile: a copy that was being recovered may have missed it. */
  async #change(vid: number, idx: number, request: WireRequest): Promise<Answer> {
    const { recovery } = this;
    this.readAhead.forget(vid, idx);
    try {
      for (;;) {
        const { epoch } = recovery;
        const answer = await this.gateway.execute(request);
        if (request.header[1] !== Opcode.WRITE_OBJ) recovery.forget(vid, idx);
        if (recovery.epoch === epoch || answer.result !== Result.SUCCESS) return answer;
        await this.#settleToWrite(vid, idx);
      }
    } finally {
      this.readAhead.forget(vid, idx);
    }
  }

  /** Of any object, by the halves of its oid. Errors: GONE. */
  readonly readObject: ReadObject = (high, low, offset, into) =>
    inPieces(offset, into, (at, part) => this.#read(high, low, at, part));

  /** In place. Errors: GONE, NO_SPACE. */
  async writeObject(high: number, low: number, offset: number, data: Buffer, options?: ExecuteOptions): Promise<void> {
    const { recovery } = this;
    const header = encodeObjectRequest(Opcode.WRITE_OBJ, Flag.WRITE, high, low, offset, data.length);
    for (;;) {
      if (!recovery.isSteady) await this.#settleToWrite(high, low);
      const { epoch } = recovery;
      const { result } = await this.gateway.execute({ header, data }, options);
      if (result !== Result.SUCCESS) throw objectError(result, 'writing', high, low);
      // What must not be done twice its caller looks after.
      if (recovery.epoch === epoch || options?.beforeRetry !== undefined) return;
    }
  }

  /** With `data` at its beginning; one that exists is replaced whole. Errors: NO_SPACE. */
  async createObject(high: number, low: number, data: Buffer): Promise<void> {
    const { recovery } = this;
    const header = encodeObjectRequest(Opcode.CREATE_AND_WRITE_OBJ, Flag.WRITE, high, low, 0, data.length);
    for (;;) {
      const { epoch } = recovery;
      const { result } = await this.gateway.execute({ header, data });
      if (result !== Result.SUCCESS) throw objectError(result, 'creating', high, low);
      recovery.forget(high, low);
      if (recovery.epoch === epoch) return;
      await this.#settleToWrite(high, low);
    }
  }

  /** It need not be there. */
  async removeObject(high: number, low: number): Promise<void> {
    const { recovery } = this;
    const header = encodeObjectRequest(Opcode.REMOVE_OBJ, 0, high, low, 0, 0);
    for (;;) {
      const { epoch } = recovery;
      const { result } = await this.gateway.execute({ header });
      if (result !== Result.SUCCESS && result !== Result.NO_OBJ) throw objectError(result, 'removing', high, low);
      if (recovery.epoch === epoch) return;
    }
  }

  async readInode(vid: number, options?: ExecuteOptions): Promise<Inode> {
    const bytes = Buffer.allocUnsafe(INODE_HEADER_BYTES);
    await this.readInodeBytes(vid, 0, bytes, options);
    const inode = decodeInode(bytes);
    if (this.#copies.size >= MAX_REMEMBERED) this.#copies.clear();
    this.#copies.set(vid, inode.copies);
    const at = formerNameAt(inode.name);
    return at === undefined ? inode : { ...inode, name: (await this.#formerName(at)) || inode.name };
  }

  /** Empty if there is none. */
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
    return inPieces(offset, into, (at, part) => this.#read(inodeHigh(vid), 0, at, part, options));
  }

  writeInodeBytes(vid: number, offset: number, data: Buffer, options: ExecuteOptions = {}): Promise<void> {
    return this.writeObject(inodeHigh(vid), 0, offset, data, options);
  }

  /** Owners of all objects, whichever way the inode keeps them. Errors: UNSUPPORTED if there may be too many. */
  async readOwners(inode: Inode): Promise<Uint32Array> {
    const count = objectCount(inode.size, inode.blockSizeShift);
    if (count > MAX_HYPER_OBJECTS) {
      throw new StoreError(
        'UNSUPPORTED',
        `${inode.name} has ${count} objects, and no more than ${MAX_HYPER_OBJECTS} are read`,
      );
    }
    if (inode.storePolicy === 0) return this.readTable(inode.vid, count);
    if (this.gateway.version === '0.8') {
      throw new StoreError(
        'UNSUPPORTED',
        `${inode.name} is a hyper volume, whose index Sheepdog 0.8 keeps in another way`,
      );
    }
    return readIndex(this.readObject, inode.vid, count);
  }

  /** Owners of `count` objects, from `first` on. */
  async readTable(vid: number, count: number, first = 0): Promise<Uint32Array> {
    const table = new Uint32Array(count);
    const bytes = Buffer.from(table.buffer, table.byteOffset, table.byteLength);
    await this.readInodeBytes(vid, INODE_TABLE_OFFSET + first * INODE_ENTRY_BYTES, bytes);
    if (!IS_LITTLE_ENDIAN) bytes.swap32();
    return table;
  }

  async readEntry(vid: number, idx: number): Promise<number> {
    const bytes = Buffer.alloc(INODE_ENTRY_BYTES);
    await this.readInodeBytes(vid, INODE_TABLE_OFFSET + idx * INODE_ENTRY_BYTES, bytes);
    return bytes.readUInt32LE();
  }

  /**
   * Set the entries from `idx` on. Each must differ from what it is: the node gives up the old owner's reference and
   * forgets the entry's count. For the same reason it is looked at before it is repeated, and not done once more when the
   * members have changed meanwhile: that is for who knows the whole table (TableWriter).
   */
  writeTable(vid: number, idx: number, owners: readonly number[]): Promise<void> {
    const data = Buffer.allocUnsafe(owners.length * INODE_ENTRY_BYTES);
    for (const [n, owner] of owners.entries()) data.writeUInt32LE(owner, n * INODE_ENTRY_BYTES);
    const offset = INODE_TABLE_OFFSET + idx * INODE_ENTRY_BYTES;
    const beforeRetry = async (retryMs: number): Promise<boolean> => {
      const found = Buffer.alloc(data.length);
      await this.readInodeBytes(vid, offset, found, { retryMs, isApart: true });
      return found.equals(data);
    };
    return this.writeInodeBytes(vid, offset, data, { beforeRetry });
  }

  /** Set the table from its beginning as plain bytes: no reference is given up and no count forgotten. */
  async fillTable(vid: number, table: Uint32Array): Promise<void> {
    const data = Buffer.alloc(table.length * INODE_ENTRY_BYTES);
    for (const [idx, owner] of table.entries()) data.writeUInt32LE(owner, idx * INODE_ENTRY_BYTES);
    await this.writeTableBytes(vid, data);
  }

  /**
   * From the beginning of where the table is, or the index of a hyper volume. Nodes take a write for a change of the table
   * only if it lies within the table; this one begins in the unused bytes before it (sheep_priv.h, is_data_vid_update).
   */
  writeTableBytes(vid: number, bytes: Buffer): Promise<void> {
    const data = Buffer.concat([Buffer.alloc(INODE_ENTRY_BYTES), bytes]);
    return this.writeInodeBytes(vid, INODE_TABLE_OFFSET - INODE_ENTRY_BYTES, data);
  }

  /** Pairs of generation and count of the first `count` entries, as they are stored. */
  async readReferences(vid: number, count: number): Promise<Buffer> {
    const bytes = Buffer.alloc(count * GREF_BYTES);
    if (count > 0) await this.readInodeBytes(vid, INODE_GREF_OFFSET, bytes);
    return bytes;
  }

  writeReferences(vid: number, idx: number, bytes: Buffer): Promise<void> {
    return this.writeInodeBytes(vid, INODE_GREF_OFFSET + idx * GREF_BYTES, bytes);
  }

  /** The vid of a name's working VDI, or of its snapshot with that id; 0 if there is none. */
  async lookup(name: string, snapId = 0): Promise<number> {
    const answer = await this.#lookUp(name, snapId);
    if (answer.result === Result.NO_VDI || answer.result === Result.NO_TAG) return 0;
    // An inode is lost, maybe another one's than of whom is meant.
    if (answer.result === Result.NO_OBJ) return lookupAround(this, name, snapId);
    return vidOf(succeeded(answer, `looking up "${name}"`));
  }

  #lookUp(name: string, snapId: number): Promise<Answer> {
    const data = encodeName(name, '');
    const header = encodeVdiRequest(Opcode.GET_VDI_INFO, Flag.WRITE, data.length, { snapId });
    return this.gateway.execute({ header, data });
  }

  /** Before something is changed by its name: the nodes find it. Errors: DAMAGED if a lost inode keeps them from it. */
  async mustBeFoundByNodes(name: string, snapId: number): Promise<void> {
    const { result } = await this.#lookUp(name, snapId);
    if (result === Result.NO_OBJ) throw errorOf(result, `looking up "${name}"`);
  }

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
    return vidOf(succeeded(await this.#catalogRequest({ header, data }), `creating "${vdi.name}"`));
  }

  /** The record only: its table must have been cleared, or every object leaks. Its vid; 0 if there was none. */
  async deleteVdi(name: string, snapId: number): Promise<number> {
    const data = encodeName(name, '');
    const header = encodeVdiRequest(Opcode.DEL_VDI, Flag.WRITE, data.length, { snapId });
    const answer = await this.#catalogRequest({ header, data });
    if (answer.result === Result.NO_VDI || answer.result === Result.NO_TAG) return 0;
    return vidOf(succeeded(answer, `deleting "${name}"`));
  }

  /** `label`: what people call it. Errors: LOCKED. Where the cluster does not enforce locks this always succeeds. */
  async lock(name: string, label = name): Promise<number> {
    const data = encodeName(name, '');
    const header = encodeVdiRequest(Opcode.LOCK_VDI, Flag.WRITE, data.length, { type: LOCK_TYPE_NORMAL });
    const answer = await this.gateway.execute({ header, data }, { once: true });
    if (answer.result === Result.VDI_LOCKED) {
      throw new StoreError(
        'LOCKED',
        `"${label}" is locked by somebody else in the cluster; 'sheepgate vdi lock list' shows through which node, and 'vdi lock unlock' ends a lock that was left behind`,
      );
    }
    return vidOf(succeeded(answer, `locking "${label}"`));
  }

  async release(vid: number): Promise<void> {
    const header = encodeVdiRequest(Opcode.RELEASE_VDI, 0, 0, { baseVid: vid, type: LOCK_TYPE_NORMAL });
    succeeded(await this.gateway.execute({ header }, { once: true }), `releasing the lock on ${vid.toString(16)}`);
  }

  /** What nodes keep in memory of every VDI, deleted ones included. Undefined if they tell it in another form. Errors: LIMIT. */
  async vdiStates(): Promise<readonly VdiState[] | undefined> {
    const what = 'asking for locks';
    for (let room = FIRST_STATES; room <= MAX_STATES; room *= 4) {
      const receive = Buffer.alloc(room * VDI_STATE_BYTES);
      const header = encodeVdiRequest(Opcode.GET_VDI_COPIES, 0, receive.length);
      const answer = await this.gateway.execute({ header, receive });
      if (answer.result === Result.BUFFER_SMALL) continue;
      return decodeVdiStates(receive.subarray(0, succeeded(answer, what).length));
    }
    throw new StoreError('LIMIT', `${what}: the cluster has the states of more than ${MAX_STATES} VDIs`);
  }

  /**
   * Vids that are locked, by whomever, those of snapshots and of deleted VDIs among them. Errors: LIMIT if there are more VDIs
   * than can be asked about.
   */
  async lockedVids(): Promise<number[]> {
    const states = (await this.vdiStates()) ?? [];
    return states.filter(({ lockState }) => lockState !== LockState.UNLOCKED).map(({ vid }) => vid);
  }

  /** Which vids are in use; not older than `maxAgeMs`, nor than what we have made or deleted since. */
  vids(maxAgeMs = 0): Promise<VidsInUse> {
    const known = this.#vids;
    if (known !== undefined && performance.now() - known.askedAt < maxAgeMs) return known.answer;
    const underWay = this.#vidsAsked;
    if (underWay === undefined) return this.#askForVids();
    this.#nextVids ??= this.#askForVidsAfter(underWay);
    return this.#nextVids;
  }

  /** When the request under way is answered, or takes long: what comes until then has one answer. */
  async #askForVidsAfter(underWay: Promise<unknown>): Promise<VidsInUse> {
    await Promise.race([underWay, timeOut(LONG_VIDS_MS)]);
    this.#nextVids = undefined;
    return this.#askForVids();
  }

  #askForVids(): Promise<VidsInUse> {
    const answer = this.#vidsOfOneNode();
    const asked = { askedAt: performance.now(), answer };
    this.#vids = asked;
    const forget = (): void => {
      if (this.#vids === asked) this.#vids = undefined;
    };
    const settled = answer
      .then(() => undefined, forget)
      .then(() => {
        if (this.#vidsAsked === settled) this.#vidsAsked = undefined;
      });
    this.#vidsAsked = settled;
    return answer;
  }

  async info(options: ExecuteOptions = {}): Promise<ClusterInfo> {
    const receive = Buffer.alloc(CLUSTER_INFO_ROOM);
    await this.gateway.whenConnected(options);
    const opcode = this.gateway.version === '0.8' ? Opcode.STAT_CLUSTER : Opcode.CLUSTER_INFO;
    const header = encodeVdiRequest(opcode, 0, receive.length);
    succeeded(await this.gateway.execute({ header, receive }, options), 'asking for the state of the cluster');
    return opcode === Opcode.STAT_CLUSTER
      ? decodeOldClusterInfo(receive)
      : decodeClusterInfo(receive, this.gateway.version);
  }

  /**
   * A node that has just started knows the vids of its own disk until it has those of the others, and answers meanwhile. It
   * fetches them in the queue in which it also looks names up (sheep/group.c, block_wqueue): who has had an answer to that is
   * told all of them.
   */
  async #vidsOfOneNode(): Promise<VidsInUse> {
    for (;;) {
      const { peer } = this.gateway;
      if (!peer.knowsVids && this.gateway.version !== '0.8') {
        await this.#lookUp(NOBODYS_NAME, 0);
        if (this.gateway.peer !== peer) continue;
        peer.knowsVids = true;
      }
      const [used, deleted] = await Promise.all([this.#bitmap(Opcode.READ_VDIS), this.#deleted()]);
      const isSame = this.gateway.peer === peer && peer.knowsVids;
      if (isSame || this.gateway.version === '0.8') return new VidsInUse(used, deleted);
    }
  }

  /** Before 1.0 not all versions can say: those vids count as used, and inodes without a name tell. */
  async #deleted(): Promise<Buffer> {
    return this.gateway.version === '1.0' ? this.#bitmap(Opcode.READ_DEL_VDIS) : Buffer.alloc(VDI_BITMAP_BYTES);
  }

  async #bitmap(opcode: number): Promise<Buffer> {
    const receive = Buffer.alloc(VDI_BITMAP_BYTES);
    const header = encodeVdiRequest(opcode, 0, receive.length);
    succeeded(await this.gateway.execute({ header, receive }), 'listing VDIs');
    return receive;
  }

  async #catalogRequest(request: WireRequest): Promise<Answer> {
    try {
      return await this.gateway.execute(request, { once: true, slowMs: CATALOG_ATTEMPT_MS });
    } finally {
      // Also what was asked for meanwhile: it may be from before.
      this.#vids = undefined;
      this.changes++;
    }
  }
}

const IS_LITTLE_ENDIAN = new Uint8Array(new Uint16Array([1]).buffer)[0] === 1;

function timeOut(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms).unref());
}

function vidOf(answer: Answer): number {
  return vdiResponse.decode(answer.header).vid;
}

function succeeded(answer: Answer, what: string): Answer {
  if (answer.result === Result.SUCCESS) return answer;
  throw errorOf(answer.result, what);
}

function objectError(result: number, what: string, high: number, low: number): StoreError {
  const oid = high.toString(16).padStart(8, '0') + low.toString(16).padStart(8, '0');
  const asked = `${what} object ${oid}`;
  return result === Result.NO_OBJ ? new ObjectGone(asked, high, low) : errorOf(result, asked);
}

function errorOf(result: number, what: string): StoreError {
  const says = `${what}: the cluster answers ${resultName(result)}`;
  switch (result) {
    case Result.NO_SPACE:
      return new StoreError('NO_SPACE', `${says}: it is full`);
    case Result.NO_OBJ:
      return new StoreError(
        'DAMAGED',
        `${says}: nodes look for a name in the inodes of VDIs, and one that they had to look into is lost; 'sheepgate vdi ` +
          "list' shows it as damaged",
      );
    case Result.READONLY:
      return new StoreError('READONLY', `${says}: the VDI has become a snapshot`);
    case Result.FULL_VDI:
      return new StoreError('LIMIT', `${says}: all VDI ids are in use`);
    default:
      return new StoreError('IO', says);
  }
}
