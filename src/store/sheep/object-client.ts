/**
 * Objects of a cluster: one method per operation on an object. Turns results into StoreErrors. While nodes recover, a request
 * on an object that is written here waits until the object is in its places (recovery-watch.ts); and a request that was in
 * flight when the members changed is made once more. Owns no state of VDIs.
 */
import { encodeObjectRequest, encodeVdiRequest, opcodeOf } from '../../sheepdog/headers.js';
import { vidOf } from '../../sheepdog/object-ids.js';
import { Flag, Opcode, Result } from '../../sheepdog/protocol.js';
import type { StoreError } from '../store-error.js';
import type { Answer, WireRequest } from './connection.js';
import type { NodePool } from './node-pool.js';
import type { ExecuteOptions } from './pool-options.js';
import { inPieces } from './pieces.js';
import { ReadAhead } from './read-ahead.js';
import { RecoveryWatch } from './recovery-watch.js';
import { objectError } from './result-errors.js';

const NOTHING = Buffer.alloc(0);
/** Answers of a node that was started and has not joined the cluster yet. */
const NOT_JOINED: ReadonlySet<number> = new Set([Result.STARTUP, Result.WAIT_FOR_FORMAT, Result.WAIT_FOR_JOIN]);
const SECTOR_BYTES = 512;
/** VDIs whose number of copies is remembered. */
const MAX_REMEMBERED = 2 ** 16;
/** For the log. */
const SETTLING = 'nodes have joined or left, and move objects to their places';

export class ObjectClient {
  readonly pool: NodePool;
  /** Changing an object invalidates its read-ahead data, and anything fetched during the change. */
  readonly readAhead = new ReadAhead((vid, idx, offset, into) => this.readData(vid, idx, offset, into));
  /** Whether nodes recover, and which objects must wait for that. */
  readonly recovery: RecoveryWatch;
  /** By vid, of inodes that were read: copies of each object. */
  readonly #copies = new Map<number, number>();
  /** By vid: erasure-coded objects that are to be written again (parity.ts). */
  readonly oldParity = new Map<number, Set<number>>();

  constructor(pool: NodePool) {
    this.pool = pool;
    this.recovery = new RecoveryWatch(pool);
    pool.onEpoch = (epoch) => this.recovery.saw(epoch);
    pool.knownEpoch = () => this.recovery.epoch;
    pool.onClose = () => this.recovery.close();
  }

  /** Copies, or strips, of each object of the VDI. */
  noteCopies(vid: number, copies: number): void {
    if (this.#copies.size >= MAX_REMEMBERED) this.#copies.clear();
    this.#copies.set(vid, copies);
  }

  /** Reads from the data object (vid, idx). Errors: GONE. */
  readData(vid: number, idx: number, offset: number, into: Buffer): Promise<void> {
    return inPieces(offset, into, (at, part) => this.#readNear(vid, idx, at, part));
  }

  async #readNear(vid: number, idx: number, offset: number, into: Buffer): Promise<void> {
    const { recovery } = this;
    for (;;) {
      if (!recovery.isSteady) await this.#settle(vid, idx);
      const { epoch } = recovery;
      const header = encodeObjectRequest(Opcode.READ_OBJ, 0, vid, idx, offset, into.length);
      const { result } = await this.pool.executeNear({ header, receive: into }, vid, idx);
      if (recovery.epoch !== epoch) continue;
      if (result !== Result.SUCCESS) throw objectError(result, 'reading', vid, idx);
      return;
    }
  }

  /** Waits until the object takes requests, if its VDI is open here for writing. */
  #settle(high: number, low: number): Promise<void> {
    return this.#settleCopies(high, low, this.recovery.copiesOf(vidOf(high)));
  }

  /** The same before a write, whether its VDI is open or not: it may be a temporary snapshot, or be deleted. */
  #settleToWrite(high: number, low: number): Promise<void> {
    const vid = vidOf(high);
    return this.#settleCopies(high, low, this.recovery.copiesOf(vid) || (this.#copies.get(vid) ?? 0));
  }

  async #settleCopies(high: number, low: number, copies: number): Promise<void> {
    if (copies === 0) return;
    const vid = vidOf(high);
    const disk = this.pool.diskOf(high, low) ?? `vid ${vid.toString(16)}`;
    await this.pool.whileAwaited(disk, SETTLING, () => this.recovery.settle(high, low, copies));
  }

  async #read(high: number, low: number, offset: number, into: Buffer, options?: ExecuteOptions): Promise<void> {
    const { recovery } = this;
    for (;;) {
      if (!recovery.isSteady) await this.#settle(high, low);
      const { epoch } = recovery;
      const header = encodeObjectRequest(Opcode.READ_OBJ, 0, high, low, offset, into.length);
      const { result } = await this.pool.execute({ header, receive: into }, options);
      if (recovery.epoch !== epoch) continue;
      if (result !== Result.SUCCESS) throw objectError(result, 'reading', high, low);
      return;
    }
  }

  /** In place. Errors: READONLY (the vid has become a snapshot), GONE, NO_SPACE. */
  async writeData(vid: number, idx: number, offset: number, data: Buffer): Promise<void> {
    if (!this.recovery.isSteady) await this.#settleToWrite(vid, idx);
    const header = encodeObjectRequest(Opcode.WRITE_OBJ, Flag.WRITE, vid, idx, offset, data.length);
    const { result } = await this.#change(vid, idx, { header, data });
    if (result !== Result.SUCCESS) throw objectError(result, 'writing', vid, idx);
  }

  /**
   * Makes the data object: zeros, or a copy of (copyOf, idx), with `data` written over it. Replaces an existing object.
   * `copyOf`: 0 for none. Errors: READONLY, NO_SPACE, GONE (the object to copy is missing).
   */
  async createData(vid: number, idx: number, offset: number, data: Buffer, copyOf: number): Promise<void> {
    if (copyOf !== 0 && !this.recovery.isSteady) await this.#settle(copyOf, idx);
    const flags = copyOf === 0 ? Flag.WRITE : Flag.WRITE | Flag.COW;
    const low = copyOf === 0 ? 0 : idx;
    const header = encodeObjectRequest(Opcode.CREATE_AND_WRITE_OBJ, flags, vid, idx, offset, data.length, copyOf, low);
    const { result } = await this.#change(vid, idx, { header, data });
    if (result !== Result.SUCCESS) throw objectError(result, 'creating', vid, idx);
  }

  /** Whether any node has a copy or a strip of the data object. Errors: IO (also if one node cannot be asked). */
  async isAnywhere(vid: number, idx: number): Promise<boolean> {
    // A node that has not joined must not be asked (recovery-watch.ts), and may have it.
    const states = await this.pool.executeOnAll(() => encodeVdiRequest(Opcode.STAT_SHEEP, 0, 0));
    if (states.some(({ result }) => NOT_JOINED.has(result))) return true;
    const exist = (): Buffer => encodeObjectRequest(Opcode.EXIST, 0, vid, idx, 0, 0);
    const answers = await this.pool.executeOnAll(exist);
    return answers.some(({ result }) => result !== Result.NO_OBJ);
  }

  /** Whether the data object can be read. An erasure-coded object needs all its data strips for that. */
  async isFound(vid: number, idx: number): Promise<boolean> {
    try {
      await this.#readNear(vid, idx, 0, Buffer.alloc(SECTOR_BYTES));
      return true;
    } catch (error) {
      if ((error as StoreError).code !== 'GONE') throw error;
      return false;
    }
  }

  /** Whether the vid has become a snapshot in the memory of the nodes, which is earlier than in its inode. */
  async isReadOnly(vid: number, idx: number): Promise<boolean> {
    // A write of no bytes changes nothing, whether the object exists or not.
    const header = encodeObjectRequest(Opcode.WRITE_OBJ, Flag.WRITE, vid, idx, 0, 0);
    const { result } = await this.pool.execute({ header, data: NOTHING });
    if (result === Result.READONLY) return true;
    if (result === Result.SUCCESS || result === Result.NO_OBJ) return false;
    throw objectError(result, 'looking at', vid, idx);
  }

  /** Succeeds if the object does not exist. */
  async removeData(vid: number, idx: number): Promise<void> {
    const header = encodeObjectRequest(Opcode.REMOVE_OBJ, 0, vid, idx, 0, 0);
    const { result } = await this.#change(vid, idx, { header });
    if (result !== Result.SUCCESS && result !== Result.NO_OBJ) throw objectError(result, 'removing', vid, idx);
  }

  /** Repeats the request if the members changed meanwhile: a copy that was being recovered may have missed it. */
  async #change(vid: number, idx: number, request: WireRequest): Promise<Answer> {
    const { recovery } = this;
    this.readAhead.forget(vid, idx);
    try {
      for (;;) {
        const { epoch } = recovery;
        const answer = await this.pool.execute(request);
        if (opcodeOf(request.header) !== Opcode.WRITE_OBJ) recovery.forget(vid, idx);
        if (recovery.epoch === epoch || answer.result !== Result.SUCCESS) return answer;
        await this.#settleToWrite(vid, idx);
      }
    } finally {
      this.readAhead.forget(vid, idx);
    }
  }

  /** Of any object, by the halves of its oid. Errors: GONE. */
  readObject(high: number, low: number, offset: number, into: Buffer, options?: ExecuteOptions): Promise<void> {
    return inPieces(offset, into, (at, part) => this.#read(high, low, at, part, options));
  }

  /** In place. Errors: GONE, NO_SPACE. */
  async writeObject(high: number, low: number, offset: number, data: Buffer, options?: ExecuteOptions): Promise<void> {
    const { recovery } = this;
    const header = encodeObjectRequest(Opcode.WRITE_OBJ, Flag.WRITE, high, low, offset, data.length);
    for (;;) {
      if (!recovery.isSteady) await this.#settleToWrite(high, low);
      const { epoch } = recovery;
      const { result } = await this.pool.execute({ header, data }, options);
      if (result !== Result.SUCCESS) throw objectError(result, 'writing', high, low);
      // With beforeRetry the caller decides about repetitions.
      if (recovery.epoch === epoch || options?.beforeRetry !== undefined) return;
    }
  }

  /** With `data` at its beginning. Replaces an existing object. Errors: NO_SPACE. */
  async createObject(high: number, low: number, data: Buffer): Promise<void> {
    const { recovery } = this;
    const header = encodeObjectRequest(Opcode.CREATE_AND_WRITE_OBJ, Flag.WRITE, high, low, 0, data.length);
    for (;;) {
      const { epoch } = recovery;
      const { result } = await this.pool.execute({ header, data });
      if (result !== Result.SUCCESS) throw objectError(result, 'creating', high, low);
      recovery.forget(high, low);
      if (recovery.epoch === epoch) return;
      await this.#settleToWrite(high, low);
    }
  }

  /** Succeeds if the object does not exist. */
  async removeObject(high: number, low: number): Promise<void> {
    const { recovery } = this;
    const header = encodeObjectRequest(Opcode.REMOVE_OBJ, 0, high, low, 0, 0);
    for (;;) {
      const { epoch } = recovery;
      const { result } = await this.pool.execute({ header });
      if (result !== Result.SUCCESS && result !== Result.NO_OBJ) throw objectError(result, 'removing', high, low);
      if (recovery.epoch === epoch) return;
    }
  }
}
