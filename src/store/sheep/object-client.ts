/**
 * Objects of a cluster: one method per operation on an object. Turns results into StoreErrors. While nodes recover, a request
 * on an object that is written here waits until the object is in its places (recovery-watch.ts); and a request that was in
 * flight when the members changed is made once more. Owns no state of VDIs.
 */
import { encodeObjectRequest, encodeVdiRequest, opcodeOf } from '../../sheepdog/headers.js';
import { vidOf } from '../../sheepdog/object-ids.js';
import { Flag, Opcode, Result } from '../../sheepdog/protocol.js';
import type { StoreError } from '../object-store.js';
import type { Answer, WireRequest } from './connection.js';
import type { ExecuteOptions, NodePool } from './node-pool.js';
import { inPieces } from './pieces.js';
import { ReadAhead } from './read-ahead.js';
import { RecoveryWatch } from './recovery-watch.js';
import { objectError } from './result-errors.js';

const NOTHING = Buffer.alloc(0);
/** What a node answers that has been started and has not joined. */
const NOT_JOINED: ReadonlySet<number> = new Set([Result.STARTUP, Result.WAIT_FOR_FORMAT, Result.WAIT_FOR_JOIN]);
const SECTOR_BYTES = 512;
/** VDIs whose number of copies is remembered. */
const MAX_REMEMBERED = 2 ** 16;
/** For the log. */
const SETTLING = 'nodes have come or gone, and bring objects to their places';

export class ObjectClient {
  readonly pool: NodePool;
  /** Changing an object invalidates its read-ahead data, and anything fetched during the change. */
  readonly readAhead = new ReadAhead((vid, idx, offset, into) => this.readData(vid, idx, offset, into));
  /** Whether nodes recover, and which objects must wait for that. */
  readonly recovery: RecoveryWatch;
  /** By vid, of inodes that were read here: how many copies there are of what belongs to the VDI. */
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

  /** So many copies, or strips, has each object of the VDI. */
  noteCopies(vid: number, copies: number): void {
    if (this.#copies.size >= MAX_REMEMBERED) this.#copies.clear();
    this.#copies.set(vid, copies);
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
      const { result } = await this.pool.executeNear({ header, receive: into }, vid, idx);
      if (recovery.epoch !== epoch) continue;
      if (result !== Result.SUCCESS) throw objectError(result, 'reading', vid, idx);
      return;
    }
  }

  /** Wait until the object takes requests, if it is one that somebody here writes. */
  #settle(high: number, low: number): Promise<void> {
    return this.#settleCopies(high, low, this.recovery.copiesOf(vidOf(high)));
  }

  /** The same of one that is about to be written, whether its disk is open or not: it may be a temporary snapshot, or deleted. */
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
    const states = await this.pool.executeOnAll(() => encodeVdiRequest(Opcode.STAT_SHEEP, 0, 0));
    if (states.some(({ result }) => NOT_JOINED.has(result))) return true;
    const exist = (): Buffer => encodeObjectRequest(Opcode.EXIST, 0, vid, idx, 0, 0);
    const answers = await this.pool.executeOnAll(exist);
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
    const { result } = await this.pool.execute({ header, data: NOTHING });
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
      const { result } = await this.pool.execute({ header, data });
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
      const { result } = await this.pool.execute({ header });
      if (result !== Result.SUCCESS && result !== Result.NO_OBJ) throw objectError(result, 'removing', high, low);
      if (recovery.epoch === epoch) return;
    }
  }
}
