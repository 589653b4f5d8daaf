/**
 * Which vids of a cluster are in use: asks the nodes for it, and shares an answer (4 MiB) among all who need one at the time.
 * Owns the latest answer and its age; vids-in-use.ts reads it.
 */
import { encodeVdiRequest } from '../../sheepdog/headers.js';
import { Opcode, VDI_BITMAP_BYTES } from '../../sheepdog/protocol.js';
import { VidsInUse } from '../../sheepdog/vids-in-use.js';
import type { NodePool } from './node-pool.js';
import { succeeded } from './result-errors.js';

/** A request for the vids in use that takes longer is not waited for by others. */
const LONG_VIDS_MS = 1_000;
const NONE_DELETED = Buffer.alloc(0);

export class VidsKnown {
  readonly #pool: NodePool;
  readonly #lookUp: () => Promise<unknown>;
  /** What the nodes last said. */
  #latest: { readonly askedAt: number; readonly answer: Promise<VidsInUse> } | undefined;
  /** What the next request will answer, for all who wait for it. */
  #next: Promise<VidsInUse> | undefined;
  /** The request in flight; resolves when it is answered or has failed. */
  #asked: Promise<unknown> | undefined;
  /** Buffers of the latest request, for the next one. Those of a request that failed are not used again. */
  #spare: Buffer[] = [];

  /** `lookUp` sends a look-up of any name. */
  constructor(pool: NodePool, lookUp: () => Promise<unknown>) {
    this.#pool = pool;
    this.#lookUp = lookUp;
  }

  /** A VDI was made or deleted: the latest answer is stale, and so is one that is being received. */
  forget(): void {
    this.#latest = undefined;
  }

  /** Not older than `maxAgeMs`, nor than the last `forget`. Errors: IO. */
  get(maxAgeMs = 0): Promise<VidsInUse> {
    const known = this.#latest;
    if (known !== undefined && performance.now() - known.askedAt < maxAgeMs) return known.answer;
    const underWay = this.#asked;
    if (underWay === undefined) return this.#ask();
    this.#next ??= this.#askAfter(underWay);
    return this.#next;
  }

  /** Asks when the request in flight is answered, or takes long. All callers until then share the answer. */
  async #askAfter(underWay: Promise<unknown>): Promise<VidsInUse> {
    await Promise.race([underWay, timeOut(LONG_VIDS_MS)]);
    this.#next = undefined;
    return this.#ask();
  }

  #ask(): Promise<VidsInUse> {
    const answer = this.#vidsOfOneNode();
    const asked = { askedAt: performance.now(), answer };
    this.#latest = asked;
    const forget = (): void => {
      if (this.#latest === asked) this.#latest = undefined;
    };
    const settled = answer
      .then(() => undefined, forget)
      .then(() => {
        if (this.#asked === settled) this.#asked = undefined;
      });
    this.#asked = settled;
    return answer;
  }

  /**
   * A node that has just started answers with the vids of its own disk until it has those of the other nodes. It fetches them
   * in the queue in which it also looks up names (sheep/group.c, block_wqueue): once it has answered a look-up, its vids are
   * complete.
   */
  async #vidsOfOneNode(): Promise<VidsInUse> {
    for (;;) {
      const { peer } = this.#pool;
      if (!peer.knowsVids && this.#pool.version !== '0.8') {
        await this.#lookUp();
        if (this.#pool.peer !== peer) continue;
        peer.knowsVids = true;
      }
      const [used, deleted] = await Promise.all([this.#bitmap(Opcode.READ_VDIS), this.#deleted()]);
      const vids = new VidsInUse(used, deleted);
      this.#spare = [used, ...(deleted === NONE_DELETED ? [] : [deleted])];
      const isSame = this.#pool.peer === peer && peer.knowsVids;
      if (isSame || this.#pool.version === '0.8') return vids;
    }
  }

  /** Before 1.0 not all versions can say: deleted vids count as used then, and their inodes have no name. */
  async #deleted(): Promise<Buffer> {
    return this.#pool.version === '1.0' ? this.#bitmap(Opcode.READ_DEL_VDIS) : NONE_DELETED;
  }

  async #bitmap(opcode: number): Promise<Buffer> {
    const receive = this.#spare.pop() ?? Buffer.allocUnsafe(VDI_BITMAP_BYTES);
    const header = encodeVdiRequest(opcode, 0, receive.length);
    succeeded(await this.#pool.execute({ header, receive }), 'listing VDIs');
    return receive;
  }
}

function timeOut(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms).unref());
}
