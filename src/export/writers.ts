/**
 * The claims to write disks: each connection that may write a disk has one, and while one is exclusive no other connection's
 * may write. Owns the claims, and the rule that an old claim has ended, with every request that was received under it, before
 * a new one takes its place. The server knows how to cut a connection off, and whether a client is still there (Connected).
 */
import type { Peer } from 'nbd-server-ts/block-device';
import type { CatalogError } from '../vdi/catalog-error.js';
import type { Log, LogOften } from '../vdi/log.js';
import type { Exclusive, Otherwise } from './exclusive.js';
import { KeptOutClients } from './kept-out.js';
import { TwoWritersWarning, type TwoWriters } from './two-writers.js';
import { busy, Claim, endWithin, labelOfClaimant, type Claimant } from './writer-claim.js';

/**
 * How long a claim waits for old ones to end: longer than most requests take, and less than the 30 s that a client has to
 * choose its export. A client that is refused then tries again.
 */
const END_WAIT_MS = 20_000;
/** Of that, how long a connection that has ended may take its last replies before a take-over cuts it off: the server's linger. */
const LAST_REPLIES_MS = 5_000;

/** The server's connections. Each is known by the peer that its export was opened for. */
export interface Connected {
  /** Its client has said goodbye, or closed its side of the connection: no more requests will come. */
  isEnding(peer: Peer): boolean;
  /** No request of it is in flight, and none will come; only its socket is left. */
  hasEnded(peer: Peer): boolean;
  /** Ask the machine at the other end whether the client is still there. Takes some seconds at most. */
  isThere(peer: Peer): Promise<boolean>;
  /** Resolves when the connection is over: no request of it has an effect from then on. */
  cutOff(peer: Peer, reason: string): Promise<void>;
}

/** Without a server there are only this process's own connections. */
export const NOBODY_CONNECTED: Connected = {
  isEnding: () => false,
  hasEnded: () => false,
  isThere: () => Promise.resolve(true),
  cutOff: () => Promise.resolve(),
};

/** For people: one connection that may write. */
export interface WriterInfo {
  readonly client: string;
  readonly isExclusive: boolean;
  /** Null if it has only opened the disk. */
  readonly firstWriteAt: number | null;
}

export class Writers {
  readonly #log: Log;
  readonly #logOften: LogOften;
  readonly #disks = new Map<string, Set<Claim>>();
  readonly #byPeer = new Map<Peer, Claim>();
  readonly #twoWriters: TwoWritersWarning;
  readonly #keptOut = new KeptOutClients();
  connected: Connected = NOBODY_CONNECTED;

  constructor(log: Log, logOften: LogOften) {
    this.#log = log;
    this.#logOften = logOften;
    this.#twoWriters = new TwoWritersWarning(log);
  }

  /**
   * A connection opens `disk` to write; `exclusive`: as the only writer. Resolves with a claim that may write or, if another
   * client has the disk and latecomers may read, with one that may not. Waits for claims that are about to end; those it takes
   * over from have ended. Errors: CatalogError BUSY.
   */
  async claim(disk: string, claimant: Claimant, exclusive: Exclusive | undefined): Promise<Claim> {
    const deadline = performance.now() + END_WAIT_MS;
    let hasAskedOwn = false;
    for (;;) {
      this.#keptOut.mustNotHave(disk, claimant.client);
      const obstacles = this.#obstacles(disk, claimant, exclusive);
      if (obstacles.length === 0) return this.#begin(disk, claimant, exclusive, true);
      const first = obstacles.find(this.#isStaying);
      if (first !== undefined) {
        const otherwise = this.#otherwise(exclusive, obstacles);
        // A guest comes back after a network outage before its old connection is seen to end. It would get the disk read-only
        // for good (qemu with auto-read-only, which libvirt sets). Asked, its machine says that the old connection is gone.
        const own = hasAskedOwn ? [] : obstacles.filter((claim) => isOf(claim, claimant) && this.#isStaying(claim));
        if (otherwise !== 'take-over' && own.length > 0) {
          hasAskedOwn = true;
          await Promise.all(own.map(({ peer }) => this.connected.isThere(peer)));
          continue;
        }
        if (otherwise === 'read-only') {
          this.#logReadOnly(disk, claimant, first);
          return this.#begin(disk, claimant, exclusive, false);
        }
        if (otherwise === 'refuse') throw inUse(disk, first, obstacles.length - 1);
        await this.#takeOver(disk, claimant, obstacles.filter(this.#isStaying), deadline);
      }
      // It sends no more requests, but may never take its last replies.
      if (exclusive === 'take-over' && !(await endWithin(obstacles, performance.now() + LAST_REPLIES_MS))) {
        this.#cutOff(disk, claimant, obstacles, 'has ended, does not take its last replies');
      }
      // Claims that have come meanwhile are looked at in the next round.
      if (!(await endWithin(obstacles, deadline))) throw stillEnding(disk, obstacles);
    }
  }

  /**
   * Whether `claim` would give the right to write, as far as is known without asking any machine. A client that would be
   * refused learns that when it opens the disk: tools that list all exports ask about each (qemu-nbd --list), and would fail
   * at the first that is in use.
   */
  look(disk: string, claimant: Claimant, exclusive: Exclusive | undefined): boolean {
    if (this.#keptOut.has(disk, claimant.client)) return false;
    const obstacles = this.#obstacles(disk, claimant, exclusive);
    const first = obstacles.find(this.#isStaying);
    if (first === undefined) return true;
    return this.#otherwise(exclusive, obstacles) === 'take-over';
  }

  /** Makes system calls: with a thousand claims, call it for no more than needed. */
  readonly #isStaying = (claim: Claim): boolean => !claim.isFenced && !this.connected.isEnding(claim.peer);

  /** As the later client says; if it says nothing, as the clients say that have the disk. */
  #otherwise(exclusive: Exclusive | undefined, obstacles: readonly Claim[]): Otherwise {
    if (exclusive !== undefined && exclusive !== 'unsaid') return exclusive;
    const refuses = obstacles
      .filter(({ otherwise }) => otherwise === 'refuse' || otherwise === 'take-over')
      .some(this.#isStaying);
    return refuses ? 'refuse' : 'read-only';
  }

  of(disk: string): readonly WriterInfo[] {
    return this.#claimsOf(disk)
      .filter(({ mayWrite, client }) => mayWrite && client !== undefined)
      .map(({ label, isExclusive, firstWriteAt }) => ({ client: label, isExclusive, firstWriteAt }));
  }

  /** The last time that two clients wrote the disk, in this process. */
  twoWritersOf(disk: string): TwoWriters | undefined {
    return this.#twoWriters.last(disk);
  }

  /** The disk was deleted or created again. */
  forget(disk: string): void {
    this.#twoWriters.forget(disk);
  }

  /** The connection's claim; undefined if it has opened no disk to write. */
  claimOf(peer: Peer): Claim | undefined {
    return this.#byPeer.get(peer);
  }

  /**
   * The connection is about to be cut off: fence it, so that no request that reaches its disk from now on is written, and do
   * not let its client write the disk for `ms`, by whatever connection.
   */
  keepOut(peer: Peer, ms: number): void {
    const claim = this.#byPeer.get(peer);
    if (claim?.client === undefined || !claim.mayWrite) return;
    claim.fence();
    if (ms > 0) this.#keptOut.add(claim.disk, claim.client, ms);
  }

  /** For Claim only. Errors: CatalogError BUSY (it must not write). */
  beginWriting(claim: Claim): void {
    const { disk, client } = claim;
    if (!claim.mayWrite) throw busy(`${disk} is open by another client, and only that client may write it`);
    if (claim.isFenced) throw busy(`${disk} cannot be written any more: this connection was cut off`);
    const others = this.#claimsOf(disk).filter((other) => other !== claim && other.mayWrite);
    const owner = others.find(({ isExclusive }) => isExclusive);
    // Only a command comes here: it is let in beside an exclusive writer, since commands mean to read.
    if (owner) throw busy(`${disk} is open exclusively by ${owner.label}: no other client may write it`);
    claim.firstWriteAt ??= Date.now();
    if (client === undefined) return;
    const first = others.find(
      (other) =>
        other.client !== undefined &&
        other.client.id !== client.id &&
        other.firstWriteAt !== null &&
        !this.connected.hasEnded(other.peer),
    );
    if (first) this.#twoWriters.warn(first, claim);
  }

  /** For Claim only. */
  end(claim: Claim): void {
    if (this.#byPeer.get(claim.peer) === claim) this.#byPeer.delete(claim.peer);
    const disk = this.#disks.get(claim.disk);
    disk?.delete(claim);
    if (disk?.size === 0) this.#disks.delete(claim.disk);
  }

  #begin(disk: string, claimant: Claimant, exclusive: Exclusive | undefined, mayWrite: boolean): Claim {
    // A client that met an exclusive writer may have several connections that rely on multi-conn; they must not here.
    const isExclusive = claimant.client !== undefined && (exclusive !== undefined || !mayWrite);
    const otherwise = exclusive === 'unsaid' ? undefined : exclusive;
    const claim = new Claim(this, disk, claimant, { mayWrite, isExclusive, otherwise });
    let claims = this.#disks.get(disk);
    if (claims === undefined) this.#disks.set(disk, (claims = new Set()));
    claims.add(claim);
    this.#byPeer.set(claimant.peer, claim);
    return claim;
  }

  #claimsOf(disk: string): Claim[] {
    return [...(this.#disks.get(disk) ?? [])];
  }

  /** The claims that must end before the claimant may write. */
  #obstacles(disk: string, { client }: Claimant, exclusive: Exclusive | undefined): Claim[] {
    // Our own commands mean to read. If one writes after all, it is refused then (beginWriting).
    if (client === undefined) return [];
    return this.#claimsOf(disk).filter((other) => {
      if (!other.mayWrite || (other.client === undefined && other.firstWriteAt === null)) return false;
      // A fenced claim ends before any other begins, exclusive or not.
      return exclusive !== undefined || other.isExclusive || other.isFenced;
    });
  }

  /** Cut off the clients of `staying`, if none of them is there any more. Errors: CatalogError BUSY. */
  async #takeOver(disk: string, claimant: Claimant, staying: readonly Claim[], deadline: number): Promise<void> {
    const isThere = await Promise.all(staying.map(({ peer }) => this.connected.isThere(peer)));
    // Some may have ended by themselves meanwhile.
    const there = staying.filter((claim, i) => isThere[i] && this.#byPeer.get(claim.peer) === claim);
    const [first] = there;
    if (first !== undefined) throw inUse(disk, first, there.length - 1, 'still answers');
    this.#cutOff(disk, claimant, staying, 'did not answer');
    if (!(await endWithin(staying, deadline))) throw stillEnding(disk, staying);
  }

  #cutOff(disk: string, claimant: Claimant, claims: readonly Claim[], why: string): void {
    for (const claim of claims) {
      if (this.#byPeer.get(claim.peer) !== claim || claim.isFenced) continue;
      claim.fence();
      const newcomer = labelOfClaimant(claimant);
      this.#log(`${disk}: ${claim.label} ${why} and is cut off; ${newcomer} takes the disk over`, {
        ...{ vdi: disk, peer: claim.peer.address, client: claim.label, newcomer },
      });
      void this.connected.cutOff(claim.peer, `${newcomer} has taken ${disk} over`);
    }
  }

  #logReadOnly(disk: string, claimant: Claimant, first: Claim): void {
    const label = labelOfClaimant(claimant);
    const line = `${disk} is read-only for ${label}: only one client may write it, and ${first.label} has it open for writing`;
    this.#logOften(`disk ${disk}`, line, { vdi: disk, peer: claimant.peer.address, client: label });
  }
}

function isOf(claim: Claim, { client }: Claimant): boolean {
  return client !== undefined && claim.client?.id === client.id;
}

function inUse(disk: string, first: Claim, others: number, how = ''): CatalogError {
  const more = others > 0 ? `, and by ${others} more` : '';
  const asked = how === '' ? '' : `, which ${how}`;
  const words = `${disk} is open for writing by ${first.label}${asked}${more}, and only one client may write it`;
  return busy(words, "; disconnect that client, for example with 'sheepgate client disconnect'");
}

function stillEnding(disk: string, claims: readonly Claim[]): CatalogError {
  return busy(
    `${disk}: the connection of ${claims[0]?.label ?? 'another client'} has ended, but its last requests are not finished ` +
      `after ${END_WAIT_MS / 1000} s, and no other client may write before that; try again`,
  );
}
