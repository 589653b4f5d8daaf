/**
 * What each node of the stand-in has for itself, as nodes ask each other for it (READ_PEER), and whether it recovers. All have
 * the same as long as a test says nothing else. As sheep/request.c has it: a request of another epoch is refused, and one
 * without the flag RECOVERY would begin a recovery, which a client must not.
 */
import type { Answer, Seen, StandIn } from './stand-in.js';

export const PeerOp = { STAT_RECOVERY: 0x97, READ_PEER: 0xa4 } as const;
const OLD_NODE_VER = 0x81;
const NO_OBJ = 2;
const FLAG_RECOVERY = 0x80;
const RECOVERY_STATE_BYTES = 24;

/** What a node has of an object, at every request; undefined: no copy. */
type Content = () => Buffer | undefined;

export class StandInCopies {
  readonly #standIn: StandIn;
  readonly #own = new Map<string, Content>();
  epoch = 1;
  /** Objects recovered, and of how many; undefined when none recovers. */
  recovering: { readonly finished: number; readonly total: number } | undefined;

  constructor(standIn: StandIn) {
    this.#standIn = standIn;
  }

  /** From now on this node has something else. */
  set(node: number, oid: bigint, content: Content): void {
    this.#own.set(`${node} ${oid}`, content);
  }

  /** From now on all have the same. */
  reset(): void {
    this.#own.clear();
    this.recovering = undefined;
  }

  /** Undefined of what is no request of a peer. */
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
