/**
 * When the members of a cluster change, nodes fetch the objects that are theirs now from each other, and do not keep that
 * apart from writes. Every request that meets a missing object starts a recovery of its own, beside the one on the node's
 * list (sheep/recovery.c, oid_in_recovery). The first to finish lets writes in; each later one replaces the object by what
 * it has read before them, and the copies differ from then on. That takes several requests under way for one object, reads
 * among them, or a single one at the same time as the list.
 *
 * So while nodes recover, an object is left alone until it is in all its places and whoever else was recovering it must
 * have finished. From then on it takes any number of requests again. What was under way when the members changed is done
 * once more after that. The change is noticed by the epoch, which is in every answer.
 *
 * Owns what is known of the epoch, which nodes recover, and which objects have settled. Sends no reads and writes of data.
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
/** Looks in a row that must find no recovery: one that a request has started may outlive the list. */
const QUIET_LOOKS = 3;
/** Looks in a row at which all members must be of one earlier epoch for it to be theirs: a node may be late by a moment. */
const EARLIER_LOOKS = 8;
/** The same if some cannot be asked: about 20 s, so that what waits for it has time left to be repeated. */
const EARLIER_LOOKS_OF_SOME = 80;
/** Nodes that cannot be asked are not waited for longer than this after the last change of members. */
const BLIND_MS = 60_000;
/** For the node's own recovery to reach the object, before one is asked for. */
const PATIENCE_MS = 500;
/**
 * Of erasure-coded ones. A recovery that a request has started goes on when the node begins the next one, or has finished, and
 * reads then what is freed (1.0.1, sheep/recovery.c: direct_queue_recovery_work keeps no reference to its recovery_info):
 * the node ends. With whole copies it hardly ever looks there.
 */
const CODED_PATIENCE_MS = 5_000;
const LOOK_MS = 20;
/**
 * Recoveries of one object at one time share what the node can do, and the slowest should be done when once and a half the
 * time of the first has passed again. Measured: docs/cluster.md, "When nodes come and go".
 */
const HOLD_SHARE = 1.5;
const LEAST_HOLD_MS = 300;
const LONGEST_HOLD_MS = 3_000;
const NOTHING = Buffer.alloc(0);

/** What is asked of the gateway. */
export interface WatchedNodes {
  members(): Promise<{ readonly epoch: number; readonly nodes: readonly ClusterNode[] }>;
  /** Each node its own request, once; undefined of one that does not answer soon. */
  askEach(nodes: readonly ClusterNode[], requests: readonly WireRequest[]): Promise<readonly (Answer | undefined)[]>;
  execute(request: WireRequest): Promise<Answer>;
}

export class RecoveryWatch {
  /** Of the members, as the latest answer had it; 0 while nothing is known. */
  epoch = 0;
  /** No node recovers anything, as far as is known. */
  isSteady = true;
  /** How many copies or strips the objects of a VDI have; 0 if nobody here writes it, and its objects need no care. */
  copiesOf: (vid: number) => number = () => 0;
  /** Whether its objects are erasure-coded. */
  isCoded: (vid: number) => boolean = () => false;
  /** Called when no node recovers anything any more. */
  onSteady: () => void = () => undefined;
  readonly #nodes: WatchedNodes;
  #changedAt = -Infinity;
  /** `zones`: no two copies of an object are in one. */
  #members: { readonly epoch: number; readonly nodes: readonly ClusterNode[]; readonly zones: number } | undefined;
  /** Objects, by oid, that are where they belong since the last change. */
  readonly #settled = new Set<string>();
  readonly #settling = new Map<string, Promise<void>>();
  #isWatching = false;
  /** Looks in a row that have found no recovery. */
  #quietLooks = 0;
  /** What all members that answered said their epoch was at the last looks, when it was earlier than the one known. */
  #earlier = 0;
  #earlierLooks = 0;
  /** How many such looks are enough, by how many of them have answered. */
  #earlierLooksNeeded = EARLIER_LOOKS;
  readonly #pauses = new Pauses();
  #isClosed = false;

  constructor(nodes: WatchedNodes) {
    this.#nodes = nodes;
  }

  /** An answer says so. */
  saw(epoch: number): void {
    if (epoch < this.epoch && !this.#isClosed && !this.#isWatching) {
      // Of a node that does not know better, or what was known is not theirs: the nodes are looked at.
      void this.#watch();
    }
    if (epoch <= this.epoch) return;
    const isFirst = this.epoch === 0;
    this.epoch = epoch;
    if (this.#isClosed) return;
    if (isFirst) void this.#lookFirst();
    else this.#unsettle();
  }

  /** Whether all nodes are there, and at rest, that an object with so many copies or strips needs. */
  isComplete(copies: number): boolean {
    if (!this.isSteady) return false;
    return this.#members === undefined || this.#members.zones >= copies;
  }

  close(): void {
    this.#isClosed = true;
    this.#pauses.end();
  }

  /**
   * Resolves when requests may be made on the object, halves of its oid given. Errors: StoreError, when the cluster does not
   * bring the object to its places.
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

  /** It is made anew, or removed. */
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

  /** Have its nodes recover it, which a write of nothing waits for. It need not be there at all. */
  async #fetch(high: number, low: number): Promise<void> {
    const header = encodeObjectRequest(Opcode.WRITE_OBJ, Flag.WRITE, high, low, 0, 0);
    await this.#nodes.execute({ header, data: NOTHING });
  }

  /** Whether as many nodes have it as should. */
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
   * Those that carry out requests. One that has been started again and has not joined yet ends itself when it is asked for an
   * object with EXIST (1.0.1, sheep/ops.c: local_oid_exist without a vnode_info); STAT_RECOVERY it refuses.
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

  /** Nodes may be recovering already. Nobody waits for the answer, and without one nothing is supposed. */
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
   * All members are of one earlier epoch, again and again: the later one was that of a node which had lost the others, or of a
   * cluster that was formatted anew since, and is not theirs. Else nothing that they answer would be believed until they have
   * caught up with it.
   */
  #goBack(): void {
    if (this.#earlierLooks < this.#earlierLooksNeeded) return;
    this.epoch = this.#earlier;
    this.#earlierLooks = 0;
  }

  /** `listedAt`: the epoch of who says which nodes there are; it need not be reached in the way that they know. */
  #noteEarlier(listedAt: number, answers: readonly (Answer | undefined)[]): void {
    const isTheirs = listedAt > 0 && answers.every((answer) => answer === undefined || answer.epoch === listedAt);
    const isEarlier = isTheirs && listedAt < this.epoch;
    this.#earlierLooks = isEarlier ? (listedAt === this.#earlier ? this.#earlierLooks + 1 : 1) : 0;
    this.#earlierLooksNeeded = answers.includes(undefined) ? EARLIER_LOOKS_OF_SOME : EARLIER_LOOKS;
    this.#earlier = listedAt;
  }

  /** Whether no node recovers anything in this epoch; undefined if they could not be asked. */
  async #look(): Promise<boolean | undefined> {
    try {
      const { epoch } = this;
      const { epoch: listedAt, nodes } = await this.#nodes.members();
      const requests = nodes.map(recoveryRequest);
      const answers = await this.#nodes.askEach(nodes, requests);
      if (this.epoch !== epoch) return false;
      this.#noteEarlier(listedAt, answers);
      // Who they are is for those to say who know it.
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
