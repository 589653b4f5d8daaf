/**
 * Reads the copy that one node has of an object, with the request that nodes use among each other (READ_PEER). Owns connections
 * of its own, apart from those of clients, and the view of the cluster's members: a read belongs to one epoch, and nothing is
 * read while nodes recover. Changes nothing on the nodes.
 *
 * A plain READ_PEER waits for the recovery of its object, and starts it (request.c, request_in_recovery); with the flag
 * RECOVERY it does neither. Requests that start recoveries are how a node that comes back may keep stale copies.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { StoreError } from '../../store-error.js';
import { addressLabel } from '../cluster-address.js';
import type { ClusterClient } from '../cluster-client.js';
import { ConnectionLost, NodeConnection, type Answer, type WireRequest } from '../connection.js';
import { decodeRecovery, RECOVERY_BYTES } from '../../../sheepdog/state-layouts.js';
import { keepsObjects, Placement } from '../../../sheepdog/hash-ring.js';
import { ClusterFlag, Opcode, Result, resultName } from '../../../sheepdog/protocol.js';
import { encodePeerRead, encodeVdiRequest } from '../../../sheepdog/headers.js';
import type { ClusterNode } from '../../../sheepdog/nodes.js';

/** One request, of at most half a MiB. */
const ATTEMPT_MS = 30_000;
/** How long a node that cannot be reached, or has trouble, is asked again; then the check fails and names it. */
const RETRY_MS = 60_000;
const FIRST_BACKOFF_MS = 50;
const LONGEST_BACKOFF_MS = 2_000;
/** How often nodes that recover are asked whether they have. */
const RECOVERY_POLL_MS = 1_000;
/** How long a view counts as current: the members are the same and none recovers. */
const VIEW_AGE_MS = 1_000;

/** The members of the cluster have changed: data of an object that was read with the old view is useless. */
export class MembersChanged extends Error {}

export interface View {
  readonly epoch: number;
  readonly nodes: readonly ClusterNode[];
  readonly placement: Placement;
  /** Most copies that an object can have. */
  readonly zones: number;
}

/** An object, and the number of its strip; 0 for whole copies. */
export interface PeerObject {
  readonly high: number;
  readonly low: number;
  readonly strip: number;
}

/** `missing`: the node has no copy. `trouble`: any other answer, in words. */
export type PeerAnswer = { readonly missing?: true; readonly trouble?: string };

const FOUND: PeerAnswer = {};
const MISSING: PeerAnswer = { missing: true };

export interface PeersOptions {
  readonly signal?: AbortSignal;
  /** Called when nodes recover, and when they have recovered. */
  readonly note: (line: string) => void;
  readonly retryMs?: number;
}

export class Peers {
  readonly #cluster: ClusterClient;
  readonly #options: PeersOptions;
  readonly #connections = new Map<string, Promise<NodeConnection>>();
  #view: { readonly view: Promise<View>; askedAt: number; seen?: View } | undefined;

  constructor(cluster: ClusterClient, options: PeersOptions) {
    this.#cluster = cluster;
    this.#options = options;
    options.signal?.addEventListener('abort', () => this.close(), { once: true });
  }

  /**
   * The members; waits until none of them recovers. Up to VIEW_AGE_MS old unless `fresh`. Errors: UNSUPPORTED (not Sheepdog
   * 1.0), IO (also: a node cannot be asked).
   */
  view({ fresh = false } = {}): Promise<View> {
    const known = this.#view;
    if (known && (!fresh || performance.now() - known.askedAt < VIEW_AGE_MS)) return known.view;
    const asked: { readonly view: Promise<View>; askedAt: number; seen?: View } = {
      view: this.#look(),
      askedAt: Infinity,
    };
    this.#view = asked;
    asked.view.then(
      (seen) => Object.assign(asked, { seen, askedAt: performance.now() }),
      () => {
        if (this.#view === asked) this.#view = undefined;
      },
    );
    return asked.view;
  }

  /** Discards this view: the next caller of `view` gets a new one. */
  isOver(view: View): void {
    if (this.#view?.seen === view) this.#view = undefined;
  }

  async #look(): Promise<View> {
    const { signal, note } = this.#options;
    const retryMs = this.#options.retryMs ?? RETRY_MS;
    let deadline = performance.now() + retryMs;
    let isTold = false;
    for (;;) {
      signal?.throwIfAborted();
      const { epoch, flags, version } = await this.#cluster.info();
      if (version !== '1.0') {
        throw new StoreError(
          'UNSUPPORTED',
          `this is a cluster of Sheepdog ${version}: copies are compared in clusters of 1.0 only; 'dog vdi check' does it there`,
        );
      }
      const byDisk = (flags & ClusterFlag.DISK_MODE) !== 0;
      const nodes = (await this.#cluster.pool.listNodes()).filter((node) => keepsObjects(node, byDisk));
      if (nodes.length === 0) throw new StoreError('IO', 'the cluster lists no nodes that keep objects');
      const states = await this.#recoveryOf(nodes, epoch, deadline);
      if (states === undefined) {
        if (performance.now() >= deadline) {
          throw new StoreError(
            'IO',
            `the nodes do not agree on the members of the cluster: not all of them are at epoch ${epoch}`,
          );
        }
        await sleep(FIRST_BACKOFF_MS, undefined, { signal });
        continue;
      }
      if (states.total === undefined) {
        if (isTold) note('the nodes have recovered');
        const zones = new Set(nodes.map(({ zone }) => zone)).size;
        return { epoch, nodes, placement: new Placement(nodes, byDisk), zones };
      }
      if (!isTold) {
        note(
          `nodes recover (${states.finished} of ${states.total} objects): the check waits until they have finished; ` +
            "'sheepgate cluster info' shows the progress",
        );
      }
      isTold = true;
      deadline = performance.now() + retryMs;
      await sleep(RECOVERY_POLL_MS, undefined, { signal });
    }
  }

  /** Progress of recovery, without a total if no node recovers; undefined if the nodes do not agree on the epoch yet. */
  async #recoveryOf(
    nodes: readonly ClusterNode[],
    epoch: number,
    deadline: number,
  ): Promise<{ readonly finished: number; readonly total: number | undefined } | undefined> {
    let finished = 0;
    let total: number | undefined;
    for (const node of nodes) {
      const receive = Buffer.alloc(RECOVERY_BYTES);
      const header = encodeVdiRequest(Opcode.STAT_RECOVERY, 0, receive.length);
      let answer: Answer;
      try {
        answer = await this.#send(node, { header, receive });
      } catch (error) {
        if (!(error instanceof ConnectionLost)) throw error;
        if (performance.now() >= deadline) throw unreachable(node, error.message);
        return undefined;
      }
      if (answer.result !== Result.SUCCESS) {
        if (performance.now() >= deadline) throw unreachable(node, `it answers ${resultName(answer.result)}`);
        return undefined;
      }
      if (answer.epoch !== epoch) return undefined;
      const recovery = decodeRecovery(receive);
      if (!recovery) continue;
      finished += recovery.done;
      total = (total ?? 0) + recovery.total;
    }
    return { finished, total };
  }

  /**
   * Reads from the copy or strip that this node of the view has. Errors: MembersChanged; IO (the node cannot be asked).
   */
  async read(view: View, node: ClusterNode, object: PeerObject, offset: number, into: Buffer): Promise<PeerAnswer> {
    const { high, low, strip } = object;
    const header = encodePeerRead(view.epoch, high, low, strip, offset, into.length);
    const { signal } = this.#options;
    const deadline = performance.now() + (this.#options.retryMs ?? RETRY_MS);
    for (let backoff = FIRST_BACKOFF_MS; ; backoff = Math.min(2 * backoff, LONGEST_BACKOFF_MS)) {
      signal?.throwIfAborted();
      let trouble: string;
      let isAnswer = false;
      try {
        const { result } = await this.#send(node, { header, receive: into });
        if (result === Result.SUCCESS) return FOUND;
        if (result === Result.NO_OBJ) return MISSING;
        if (result === Result.OLD_NODE_VER || result === Result.NEW_NODE_VER) throw new MembersChanged();
        trouble = `it answers ${resultName(result)}`;
        isAnswer = true;
      } catch (error) {
        if (!(error instanceof ConnectionLost)) throw error;
        trouble = error.message;
      }
      signal?.throwIfAborted();
      // A node whose disk fails leaves the cluster, and one that has ended is dropped: the epoch tells.
      if ((await this.#cluster.info()).epoch !== view.epoch) throw new MembersChanged();
      if (performance.now() >= deadline) {
        if (isAnswer) return { trouble };
        throw unreachable(node, trouble);
      }
      await sleep(backoff, undefined, { signal });
    }
  }

  /** Errors: ConnectionLost. */
  async #send(node: ClusterNode, request: WireRequest): Promise<Answer> {
    const label = addressLabel(node);
    let connecting = this.#connections.get(label);
    if (!connecting) {
      connecting = NodeConnection.connect(node, () => this.#connections.delete(label));
      this.#connections.set(label, connecting);
      connecting.catch(() => this.#connections.delete(label));
    }
    const connection = await connecting;
    return connection.send(request, ATTEMPT_MS);
  }

  close(): void {
    for (const connecting of this.#connections.values()) {
      connecting.then(
        (connection) => connection.destroy(),
        () => undefined,
      );
    }
  }
}

function unreachable(node: ClusterNode, why: string): StoreError {
  return new StoreError(
    'IO',
    `the node ${addressLabel(node)} cannot be asked: ${why}; check --deep must read the copies of every node`,
  );
}
