/**
 * Nodes that have not answered a write in time, and may carry it out yet: stopped, swapping, or waiting for something. A
 * write that is repeated elsewhere could be undone by that long after, together with what was written since. Knows when
 * that cannot happen any more; repeats and sends no writes itself.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { StoreError } from '../object-store.js';
import { addressLabel, type NodeAddress } from './cluster-address.js';
import { NodeConnection, NoAnswer } from './connection.js';
import { MAX_NODES, NODE_BYTES, Opcode } from '../../sheepdog/protocol.js';
import { encodeVdiRequest } from '../../sheepdog/headers.js';

const POLL_MS = 500;
const PROBE_MS = 2_000;
/** A node that answers again has finished by then what it was in the middle of. */
const FINISHING_MS = 1_000;

/** The write was given up, and may take effect until `settled` resolves. */
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
  /** Labels of all that have ever been members: a node may be reached under another address than the cluster's own. */
  readonly #seen = new Set<string>();
  readonly #waiting = new Map<string, Promise<void>>();

  /** `members`: the nodes of the cluster, asked of another node than a stalled one. */
  constructor(members: () => Promise<readonly NodeAddress[]>, isClosed: () => boolean) {
    this.#members = members;
    this.#isClosed = isClosed;
  }

  /** These are members now. */
  saw(members: readonly NodeAddress[]): void {
    for (const member of members) this.#seen.add(addressLabel(member));
  }

  /**
   * Resolves when nothing that the node was sent before can have an effect any more. The connection it was sent on must
   * have been reset: a node that finds that does not read on from it (sheep/request.c, client_handler).
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
   * The members of a cluster are counted in epochs, and nodes refuse what comes from an earlier one: what a node that was
   * dropped had still to do is not done.
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
 * A node whose process is stopped takes connections, for its system does that. One that takes none has ended, or is cut
 * off from us: then it has long done what it had received.
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
