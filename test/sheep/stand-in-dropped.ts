/**
 * Nodes of the stand-in that were stopped or cut off until the others dropped them, and that do not know it yet. They answer
 * requests about their own disk and memory with old data and the old epoch. Requests that need other nodes wait until they
 * learn of it, as the others refuse requests of an earlier epoch (sheep/request.c, check_request_epoch). An answer has the
 * epoch of the moment it is sent, not of the moment its request was carried out (tx_work).
 */
import { copyOf } from './stand-in-bytes.js';
import type { StandIn } from './stand-in.js';

interface Past {
  readonly epoch: number;
  readonly objects: ReadonlyMap<bigint, Buffer>;
  /** The answers to READ_VDIS and READ_DEL_VDIS. */
  readonly vids: readonly [used: ReadonlySet<number>, deleted: ReadonlySet<number>];
  readonly knows: Promise<void>;
  readonly tell: () => void;
}

export class StandInDropped {
  readonly #standIn: StandIn;
  readonly #pasts = new Map<number, Past>();

  constructor(standIn: StandIn) {
    this.#standIn = standIn;
  }

  /** From now on the others, in the next epoch, no longer count this node as a member. */
  drop(node: number): void {
    const { epoch, objects } = this.#standIn;
    let tell: () => void = () => undefined;
    const knows = new Promise<void>((resolve) => (tell = resolve));
    const past = new Map([...objects].map(([oid, bytes]) => [oid, copyOf(bytes)]));
    this.#pasts.set(node, { epoch, objects: past, vids: this.#standIn.vidsNow(), knows, tell });
    this.#standIn.epoch++;
  }

  /** The node has learnt of it, is a member again, and has the data of the others. */
  rejoin(node: number): void {
    const past = this.#pasts.get(node);
    this.#pasts.delete(node);
    past?.tell();
  }

  of(node: number): Past | undefined {
    return this.#pasts.get(node);
  }
}
