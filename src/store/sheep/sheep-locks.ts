/**
 * Lists and ends the locks of VDIs that nodes keep in memory, where the cluster is formatted with locks (-l). A lock belongs to
 * the node that was asked for it, not to the client; it stays when the client ends, and when the node ends. Whether a lock may
 * be ended is the caller's decision.
 */
import type { LockHolder, VdiLock, VdiLocks } from '../object-store.js';
import { StoreError } from '../store-error.js';
import { addressLabel, parseClusterAddress } from './cluster-address.js';
import { ConnectionLost, NodeConnection, type Answer } from './connection.js';
import type { ClusterClient } from './cluster-client.js';
import { LOCK_TYPE_NORMAL, LOCK_TYPE_SHARED, Opcode, Result, resultName } from '../../sheepdog/protocol.js';
import { LockState } from '../../sheepdog/state-layouts.js';
import { encodeVdiRequest } from '../../sheepdog/headers.js';

/** For a node that must itself release its part of a shared lock. */
const NODE_MS = 5_000;

export class SheepLocks implements VdiLocks {
  readonly #cluster: ClusterClient;
  readonly areEnforced: boolean;

  constructor(cluster: ClusterClient, areEnforced: boolean) {
    this.#cluster = cluster;
    this.areEnforced = areEnforced;
  }

  async list(): Promise<VdiLock[]> {
    if (!this.areEnforced) return [];
    const states = await this.#cluster.vdiStates();
    if (states === undefined) {
      throw new StoreError(
        'UNSUPPORTED',
        "these nodes report locks in another form than Sheepdog 1.0; use the 'dog' that was built with them",
      );
    }
    const locked = states.filter(({ lockState }) => lockState !== LockState.UNLOCKED);
    if (locked.length === 0) return [];
    const members = new Set((await this.#cluster.pool.listNodes()).map(addressLabel));
    const vids = await this.#cluster.vids();
    return locked.map(({ vid, lockState, owners }) => ({
      vid,
      isDeleted: !vids.isLive(vid),
      kind: lockState === LockState.SHARED ? 'shared' : 'exclusive',
      holders: owners.map((node) => ({ node, isMember: members.has(node) })),
    }));
  }

  async unlock({ vid, kind }: VdiLock, { node }: LockHolder): Promise<void> {
    const what = `ending the lock on ${vid.toString(16)}`;
    const type = kind === 'shared' ? LOCK_TYPE_SHARED : LOCK_TYPE_NORMAL;
    // RELEASE_VDI carries the vid, so no other VDI can be hit.
    const header = encodeVdiRequest(Opcode.RELEASE_VDI, 0, 0, { baseVid: vid, type });
    // Each node releases its own part of a shared lock.
    const answer =
      kind === 'shared' ? await ask(node, header) : await this.#cluster.pool.execute({ header }, { once: true });
    if (answer.result !== Result.SUCCESS)
      throw new StoreError('IO', `${what}: the cluster answers ${resultName(answer.result)}`);
    // Nodes report success even if there was no lock.
    const isLeft = (await this.list()).some((lock) => lock.vid === vid && lock.holders.some((by) => by.node === node));
    if (isLeft) throw new StoreError('IO', `${what}: it is still there, or another client has taken it at this moment`);
  }
}

/** Asks this node and no other. Errors: IO (it cannot be reached, or does not answer). */
async function ask(node: string, header: Buffer): Promise<Answer> {
  const [address] = parseClusterAddress(node);
  if (!address) throw new Error('invariant: a node has an address');
  let connection: NodeConnection | undefined;
  try {
    connection = await NodeConnection.connect(address, () => undefined, NODE_MS);
    return await connection.send({ header }, NODE_MS);
  } catch (error) {
    if (!(error instanceof ConnectionLost)) throw error;
    throw new StoreError('IO', `only ${node} itself can release its part of a shared lock: ${error.message}`, {
      cause: error,
    });
  } finally {
    connection?.destroy();
  }
}
