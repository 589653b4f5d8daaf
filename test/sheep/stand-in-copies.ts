/**
 * The copies of each node of the stand-in, as nodes read them from each other (READ_PEER), and whether a node recovers. All
 * nodes have the same copies unless a test changes them. As in sheep/request.c, a request of another epoch is refused, and a
 * request without the flag RECOVERY would begin a recovery, which a client must not do.
 */
import type { Answer, Seen, StandIn } from './stand-in.js';

export const PeerOp = { STAT_RECOVERY: 0x97, READ_PEER: 0xa4 } as const;
const OLD_NODE_VER = 0x81;
const NO_OBJ = 2;
const FLAG_RECOVERY = 0x80;
const RECOVERY_STATE_BYTES = 24;

/** The copy of an object that a node has, at every request; undefined: no copy. */
type Content = () => Buffer | undefined;

export class StandInCopies {
  readonly #standIn: StandIn;
  readonly #own = new Map<string, Content>();
  epoch = 1;
  /** Objects recovered, and their total number; undefined if no node recovers. */
  recovering: { readonly finished: number; readonly total: number } | undefined;

  constructor(standIn: StandIn) {
    this.#standIn = standIn;
  }

  /** From now on this node has a different copy. */
  set(node: number, oid: bigint, content: Content): void {
    this.#own.set(`${node} ${oid}`, content);
  }

  /** From now on all nodes have the same copy. */
  reset(): void {
    this.#own.clear();
    this.recovering = undefined;
  }

  /** Undefined if it is no request between peers. */
  answer({ opcode, oid, offset, length, flags, node }: Seen, header: Buffer): Answer | undefined {
    const fill = (h: Buffer): void => void h.writeUInt32LE(this.epoch, 4);
    if (opcode === PeerOp.STAT_RECOVERY && this.recovering) {
      const data = Buffer.alloc(RECOVERY_STATE_BYTES);
      data.writeUInt8(1);
      data.writeBigUInt64LE(BigInt(this.recovering.finished), 8);
      data.writeBigUInt64LE(BigInt(this.recovering.total), 16);
      return { result: 0, data, fill };
    }
    if (opcode !== PeerOp.READ_PEER) return undefined;
    if ((flags & FLAG_RECOVERY) === 0) this.#standIn.violations.push('a read by a peer that begins a recovery');
    if (this.recovering) this.#standIn.violations.push('a read by a peer while nodes recover');
    if (header.readUInt32LE(4) !== this.epoch) return { result: OLD_NODE_VER, fill };
    const own = this.#own.get(`${node} ${oid}`);
    const content = own ? own() : this.#standIn.objects.get(oid);
    if (!content) return { result: NO_OBJ, fill };
    const data = Buffer.alloc(length);
    content.copy(data, 0, offset, offset + length);
    return { result: 0, data, fill };
  }
}
