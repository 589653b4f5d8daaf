/**
 * Keeps requests away from objects that nodes are recovering.
 *
 * When the members of a cluster change, nodes fetch the objects that are theirs now from each other, and do not isolate that from
 * writes. Every request that meets a missing object starts a recovery of its own, beside the one on the node's list
 * (sheep/recovery.c, oid_in_recovery). The first recovery to finish admits writes; each later one replaces the object by what it
 * has read before them, and the copies differ from then on. That happens with several requests in flight for one object, reads
 * included, or with a single request at the same time as the list.
 *
 * So while nodes recover, an object gets no requests until it is in all its places and any other recovery of it must have
 * finished: until it has settled. From then on it takes any number of requests. Requests that were in flight when the members
 * changed are made once more after that. The epoch in every answer shows the change.
 *
 * Owns what is known of the epoch, which nodes recover, and which objects have settled. Sends no reads or writes of data.
 */
import type { Answer, WireRequest } from './connection.js';
import { zonesIn } from '../../sheepdog/copy-policy.js';
import { decodeRecovery, RECOVERY_BYTES } from '../../sheepdog/state-layouts.js';
import { Pauses } from '../../system/pauses.js';
import { Flag, Opcode, Result } from '../../sheepdog/protocol.js';
import { encodeObjectRequest, encodeVdiRequest } from '../../sheepdog/headers.js';
import type { ClusterNode } from '../../sheepdog/nodes.js';
import { oidText, vidOf } from '../../sheepdog/object-ids.js';

/** Between looks at the nodes while any of them recovers. */
const WATCH_MS = 250;
/** Looks in a row that must find no recovery: a recovery that a request has started may outlive the list. */
const QUIET_LOOKS = 3;
/** Looks in a row at which all members must be at the same earlier epoch before it is believed: a node may lag for a moment. */
const EARLIER_LOOKS = 8;
/** The same if some cannot be asked: about 20 s, so that waiting requests have time left to be repeated. */
const EARLIER_LOOKS_OF_SOME = 80;
/** Nodes that cannot be asked are awaited no longer than this after the last change of members. */
const BLIND_MS = 60_000;
/** Time for the node's own recovery to reach the object, before a request starts one. */
const PATIENCE_MS = 500;
/**
 * The same for erasure-coded objects. A recovery that a request has started continues when the node has finished its recovery or
 * begins the next one, and then reads freed memory (1.0.1, sheep/recovery.c: direct_queue_recovery_work keeps no reference to its
 * recovery_info): the node crashes. With whole copies it hardly ever reads there.
 */
const CODED_PATIENCE_MS = 5_000;
const LOOK_MS = 20;
/**
 * Recoveries of one object that run at the same time share the node's capacity; the slowest should be done after another one
 * and a half times the time of the first. Measured: docs/cluster.md, "When nodes come and go".
 */
const HOLD_SHARE = 1.5;
const LEAST_HOLD_MS = 300;
const LONGEST_HOLD_MS = 3_000;
const NOTHING = Buffer.alloc(0);

/** What the watch needs of the pool of nodes. */
export interface WatchedNodes {
  members(): Promise<{ readonly epoch: number; readonly nodes: readonly ClusterNode[] }>;
  /** Each node its own request, once; undefined for a node that does not answer soon. */
  askEach(nodes: readonly ClusterNode[], requests: readonly WireRequest[]): Promise<readonly (Answer | undefined)[]>;
  execute(request: WireRequest): Promise<Answer>;
}

export class RecoveryWatch {
  /** The cluster's epoch, from the latest answer; 0 while it is not known. */
  epoch = 0;
  /** No node recovers anything, as far as is known. */
  isSteady = true;
  /** Copies or strips of each object of a VDI; 0 if it is not open here for writing, so that its objects need no care. */
  copiesOf: (vid: number) => number = () => 0;
  /** Whether its objects are erasure-coded. */
  isCoded: (vid: number) => boolean = () => false;
  /** Called when no node recovers anything any more. */
  onSteady: () => void = () => undefined;
  readonly #nodes: WatchedNodes;
  #changedAt = -Infinity;
  /** `zones`: an object has at most one copy in each. */
  #members: { readonly epoch: number; readonly nodes: readonly ClusterNode[]; readonly zones: number } | undefined;
  /** Oids of objects that have settled since the last change of members. */
  readonly #settled = new Set<string>();
  readonly #settling = new Map<string, Promise<void>>();
  #isWatching = false;
  /** Looks in a row that have found no recovery. */
  #quietLooks = 0;
  /** The epoch of all members that answered at the latest looks, if it was earlier than the known one. */
  #earlier = 0;
  #earlierLooks = 0;
  /** How many such looks are enough; more if some members have not answered. */
  #earlierLooksNeeded = EARLIER_LOOKS;
  readonly #pauses = new Pauses();
  #isClosed = false;

  constructor(nodes: WatchedNodes) {
    this.#nodes = nodes;
  }

  /** The epoch in an answer. */
  saw(epoch: number): void {
    if (epoch < this.epoch && !this.#isClosed && !this.#isWatching) {
      // The node lags, or the known epoch is not this cluster's: look at the nodes.
      void this.#watch();
    }
    if (epoch <= this.epoch) return;
    const isFirst = this.epoch === 0;
    this.epoch = epoch;
    if (this.#isClosed) return;
    if (isFirst) void this.#lookFirst();
    else this.#unsettle();
  }

  /** Whether there are enough nodes for objects with so many copies or strips, and none recovers. */
  isComplete(copies: number): boolean {
    if (!this.isSteady) return false;
    return this.#members === undefined || this.#members.zones >= copies;
  }

  close(): void {
    this.#isClosed = true;
    this.#pauses.end();
  }

  /**
   * Resolves when the object may take requests. `high`, `low`: halves of its oid. Errors: IO (the cluster does not bring the
   * object to its places).
   */
  async settle(high: number, low: number, copies: number): Promise<void> {
    const key = oidText(high, low);
    while (!this.isSteady && !this.#isClosed && !this.#settled.has(key)) {
      let settling = this.#settling.get(key);
      if (!settling) {
        settling = this.#settleNow(high, low, copies).finally(() => this.#settling.delete(key));
        this.#settling.set(key, settling);
      }
      await settling;
    }
  }

  /** The object was created again, or removed: it has not settled. */
  forget(high: number, low: number): void {
    if (!this.isSteady) this.#settled.delete(oidText(high, low));
  }

  async #settleNow(high: number, low: number, copies: number): Promise<void> {
    const { epoch } = this;
    const begun = performance.now();
    const isRecent = begun - this.#changedAt < LONGEST_HOLD_MS;
    if (!(await this.#isInPlace(high, low, copies))) {
      const patienceMs = this.isCoded(vidOf(high)) ? CODED_PATIENCE_MS : PATIENCE_MS;
      while (performance.now() - begun < patienceMs) {
        await this.#pauses.wait(LOOK_MS);
        if (this.epoch !== epoch || this.isSteady || this.#isClosed) return;
        if (await this.#isInPlace(high, low, copies)) break;
      }
      if (!(await this.#isInPlace(high, low, copies))) await this.#fetch(high, low);
    } else if (!isRecent) {
      this.#settled.add(oidText(high, low));
      return;
    }
    const since = isRecent ? this.#changedAt : begun;
    const hold = HOLD_SHARE * (performance.now() - since);
    await this.#pauses.wait(Math.min(LONGEST_HOLD_MS, Math.max(LEAST_HOLD_MS, hold)));
    if (this.epoch === epoch) this.#settled.add(oidText(high, low));
  }

  /** Makes its nodes recover the object: a write of no bytes waits for that. The object need not exist. */
  async #fetch(high: number, low: number): Promise<void> {
    const header = encodeObjectRequest(Opcode.WRITE_OBJ, Flag.WRITE, high, low, 0, 0);
    await this.#nodes.execute({ header, data: NOTHING });
  }

  /** Whether as many nodes have the object as should. */
  async #isInPlace(high: number, low: number, copies: number): Promise<boolean> {
    const { epoch } = this;
    if (this.#members?.epoch !== epoch) return false;
    const { nodes, zones } = this.#members;
    const joined = await this.#joined(nodes);
    if (this.epoch !== epoch || joined.length < Math.min(copies, zones)) return false;
    const requests = joined.map(() => ({ header: encodeObjectRequest(Opcode.EXIST, 0, high, low, 0, 0) }));
    const answers = await this.#nodes.askEach(joined, requests);
    let found = 0;
    for (const answer of answers) {
      if (answer?.result === Result.SUCCESS && answer.epoch === epoch) found++;
    }
    return found >= Math.min(copies, zones);
  }

  /**
   * The nodes that carry out requests. A node that has been restarted and has not joined yet crashes when it is asked for an
   * object with EXIST (1.0.1, sheep/ops.c: local_oid_exist without a vnode_info), but refuses STAT_RECOVERY.
   */
  async #joined(nodes: readonly ClusterNode[]): Promise<ClusterNode[]> {
    const answers = await this.#nodes.askEach(nodes, nodes.map(recoveryRequest));
    return nodes.filter((_, n) => answers[n]?.result === Result.SUCCESS);
  }

  #unsettle(): void {
    this.isSteady = false;
    this.#changedAt = performance.now();
    this.#quietLooks = 0;
    this.#settled.clear();
    if (!this.#isWatching) void this.#watch();
  }

  /** Nodes may be recovering already. Without an answer the cluster counts as steady. */
  async #lookFirst(): Promise<void> {
    if ((await this.#look()) === false) this.#unsettle();
  }

  async #watch(): Promise<void> {
    this.#isWatching = true;
    const begunAt = performance.now();
    this.#quietLooks = 0;
    while (!this.#isClosed) {
      const { epoch } = this;
      const isQuiet = await this.#look();
      this.#goBack();
      this.#quietLooks = isQuiet && this.epoch === epoch ? this.#quietLooks + 1 : 0;
      const isBlind = isQuiet === undefined && performance.now() - Math.max(begunAt, this.#changedAt) > BLIND_MS;
      if (this.#quietLooks >= QUIET_LOOKS || isBlind) break;
      await this.#pauses.wait(WATCH_MS);
    }
    this.#isWatching = false;
    this.isSteady = true;
    this.#settled.clear();
    if (!this.#isClosed) this.onSteady();
  }

  /**
   * All members are at the same earlier epoch at many looks: the later epoch was that of a node which had lost the others, or
   * of a cluster that has been formatted since. Without going back, every answer would count as outdated until they reach that
   * epoch.
   */
  #goBack(): void {
    if (this.#earlierLooks < this.#earlierLooksNeeded) return;
    this.epoch = this.#earlier;
    this.#earlierLooks = 0;
  }

  /** `listedAt`: the epoch of the node that listed the members; that node may be one that they do not know. */
  #noteEarlier(listedAt: number, answers: readonly (Answer | undefined)[]): void {
    const isTheirs = listedAt > 0 && answers.every((answer) => answer === undefined || answer.epoch === listedAt);
    const isEarlier = isTheirs && listedAt < this.epoch;
    this.#earlierLooks = isEarlier ? (listedAt === this.#earlier ? this.#earlierLooks + 1 : 1) : 0;
    this.#earlierLooksNeeded = answers.includes(undefined) ? EARLIER_LOOKS_OF_SOME : EARLIER_LOOKS;
    this.#earlier = listedAt;
  }

  /** Whether no node recovers in this epoch; undefined if not all could be asked. */
  async #look(): Promise<boolean | undefined> {
    try {
      const { epoch } = this;
      const { epoch: listedAt, nodes } = await this.#nodes.members();
      const requests = nodes.map(recoveryRequest);
      const answers = await this.#nodes.askEach(nodes, requests);
      if (this.epoch !== epoch) return false;
      this.#noteEarlier(listedAt, answers);
      // This node lags: its list of members may be old.
      if (listedAt < this.epoch) return false;
      this.#members = { epoch, nodes, zones: zonesIn(nodes) };
      if (answers.length === 0 || answers.some((answer) => answer?.result !== Result.SUCCESS)) return undefined;
      const isQuiet = (answer: Answer | undefined, n: number): boolean =>
        answer?.epoch === epoch && decodeRecovery((requests[n] as RecoveryRequest).receive) === null;
      return answers.every(isQuiet);
    } catch {
      return undefined;
    }
  }
}

type RecoveryRequest = WireRequest & { readonly receive: Buffer };

function recoveryRequest(): RecoveryRequest {
  return {
    header: encodeVdiRequest(Opcode.STAT_RECOVERY, 0, RECOVERY_BYTES),
    receive: Buffer.alloc(RECOVERY_BYTES),
  };
}
