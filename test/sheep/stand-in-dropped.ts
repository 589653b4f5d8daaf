/**
 * Nodes of the stand-in that were stopped, or cut off, for so long that the others have dropped them, and that do not know it
 * yet: they answer what is asked of their own disk and memory as it was, with the epoch of before. What they would have to ask
 * others for waits until they know, for those refuse what comes from an earlier epoch (sheep/request.c, check_request_epoch).
 * An answer bears the epoch of when it is sent, not of when its request was carried out (tx_work).
 */
import type { StandIn } from './stand-in.js';

interface Past {
  readonly epoch: number;
  readonly objects: ReadonlyMap<bigint, Buffer>;
  /** What READ_VDIS and READ_DEL_VDIS answer. */
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

  /** From now on this node is none of the others' any more, whose epoch is the next one. */
  drop(node: number): void {
    const { epoch, objects } = this.#standIn;
    let tell: () => void = () => undefined;
    const knows = new Promise<void>((resolve) => (tell = resolve));
    const past = new Map([...objects].map(([oid, bytes]) => [oid, Buffer.from(bytes)]));
    this.#pasts.set(node, { epoch, objects: past, vids: this.#standIn.vidsNow(), knows, tell });
    this.#standIn.epoch++;
  }

  /** It has heard of it, is a member again, and has what the others have. */
  rejoin(node: number): void {
    const past = this.#pasts.get(node);
    this.#pasts.delete(node);
    past?.tell();
  }

  of(node: number): Past | undefined {
    return this.#pasts.get(node);
  }
}
