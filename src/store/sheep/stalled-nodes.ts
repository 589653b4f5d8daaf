/**
 * Stalled nodes: they have not answered a write in time, and may still carry it out, because they are stopped, swapping, or
 * waiting. If the write is repeated through another node, the stalled node could undo it much later, together with what was
 * written since. Finds out when a stalled node is harmless; sends and repeats no writes.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { StoreError } from '../store-error.js';
import { addressLabel, type NodeAddress } from './cluster-address.js';
import { NodeConnection, NoAnswer } from './connection.js';
import { MAX_NODES, NODE_BYTES, Opcode } from '../../sheepdog/protocol.js';
import { encodeVdiRequest } from '../../sheepdog/headers.js';

const POLL_MS = 500;
const PROBE_MS = 2_000;
/** A node that answers again has finished its old work after this time. */
const FINISHING_MS = 1_000;

/** The write was given up (IO), and may still take effect until `settled` resolves. */
export class InDoubt extends StoreError {
  constructor(
    message: string,
    readonly settled: Promise<void>,
  ) {
    super('IO', message);
    this.name = 'InDoubt';
  }
}

export class StalledNodes {
  readonly #members: () => Promise<readonly NodeAddress[]>;
  readonly #isClosed: () => boolean;
  /** Labels of all nodes that have ever been members. A node may also be reached by an address that the cluster does not list. */
  readonly #seen = new Set<string>();
  readonly #waiting = new Map<string, Promise<void>>();

  /** `members`: lists the nodes of the cluster without asking a stalled one. */
  constructor(members: () => Promise<readonly NodeAddress[]>, isClosed: () => boolean) {
    this.#members = members;
    this.#isClosed = isClosed;
  }

  /** These are members now. */
  saw(members: readonly NodeAddress[]): void {
    for (const member of members) this.#seen.add(addressLabel(member));
  }

  /**
   * Resolves when no earlier request to the node can take effect any more. The connection must have been reset: a node that finds
   * a reset reads no more requests from it (sheep/request.c, client_handler).
   */
  whenHarmless(address: NodeAddress): Promise<void> {
    const label = addressLabel(address);
    let waiting = this.#waiting.get(label);
    if (!waiting) {
      waiting = this.#wait(address).finally(() => this.#waiting.delete(label));
      this.#waiting.set(label, waiting);
    }
    return waiting;
  }

  async #wait(address: NodeAddress): Promise<void> {
    while (!this.#isClosed()) {
      if (!(await this.#isMember(address))) return;
      const state = await probe(address);
      if (state === 'gone') return;
      if (state === 'answers') {
        await sleep(FINISHING_MS, undefined, { ref: false });
        return;
      }
      await sleep(POLL_MS, undefined, { ref: false });
    }
  }

  /**
   * Every change of members raises the epoch, and nodes refuse requests of an earlier epoch: a dropped node can do nothing any
   * more.
   */
  async #isMember(address: NodeAddress): Promise<boolean> {
    const label = addressLabel(address);
    if (!this.#seen.has(label)) return true;
    try {
      const members = await this.#members();
      return members.length === 0 || members.some((member) => addressLabel(member) === label);
    } catch {
      return true;
    }
  }
}

/**
 * A node whose process is stopped still takes connections: its kernel does that. A node that takes none has ended ("gone"), or is
 * cut off from us; then it has long finished what it had received.
 */
export async function probe(address: NodeAddress, connectMs?: number): Promise<'answers' | 'silent' | 'gone'> {
  let connection: NodeConnection;
  try {
    connection = await NodeConnection.connect(address, () => undefined, connectMs);
  } catch {
    return 'gone';
  }
  try {
    const receive = Buffer.alloc(MAX_NODES * NODE_BYTES);
    await connection.send({ header: encodeVdiRequest(Opcode.GET_NODE_LIST, 0, receive.length), receive }, PROBE_MS);
    return 'answers';
  } catch (error) {
    return error instanceof NoAnswer ? 'silent' : 'gone';
  } finally {
    connection.destroy();
  }
}
