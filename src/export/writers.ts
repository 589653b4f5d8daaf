/**
 * Who may write which disk, and who does. A claim is one connection's; while one is exclusive nobody else's may write. Owns the
 * claims, and that an old one has ended, with every request that was received under it, before a new one takes its place;
 * and the warning when two clients that know nothing of each other write one disk. How connections are cut off, and whether
 * anybody is at their other end, the server knows (Connected).
 */
import type { Peer } from 'nbd-server-ts/block-device';
import { CatalogError } from '../vdi/catalog-error.js';
import type { Client } from '../vdi/client-use.js';
import type { Exclusive, Otherwise } from './exclusive.js';

/**
 * For an old connection to end: longer than most requests take, and short of the 30 s that a client has to choose its export.
 * Who is refused then tries again.
 */
const END_WAIT_MS = 20_000;
/** Of those, for one that has ended to take its last replies, before who takes over cuts it off: as long as the server's linger. */
const LAST_REPLIES_MS = 5_000;
/** Of one disk two writers are told of no more often, however often they come back. */
const WARNING_INTERVAL_MS = 60_000;
/** Disks whose last two writers are remembered for `vdi show`, until this process ends. */
const MAX_WARNINGS = 1024;
/** Disks and clients that are kept out. */
const MAX_KEPT_OUT = 1024;

type Log = (line: string, details?: object) => void;
type LogOften = (subject: string, line: string, details: object) => void;

/** The server's connections, known by the very peer that an export was opened for. */
export interface Connected {
  /** Its client has said goodbye, or the end of what it sends was seen: it asks nothing more. */
  isEnding(peer: Peer): boolean;
  /** Nothing that was received from it is under way, and nothing more of it will be: only its socket is left. */
  hasEnded(peer: Peer): boolean;
  /** Ask the machine at the other end, which takes some seconds at most, whether the client is still there. */
  isThere(peer: Peer): Promise<boolean>;
  /** Resolves when the connection is over: nothing that was received from it has an effect from then on. */
  cutOff(peer: Peer, reason: string): Promise<void>;
}

/** Without a server there are no connections but those of this process. */
export const NOBODY_CONNECTED: Connected = {
  isEnding: () => false,
  hasEnded: () => false,
  isThere: () => Promise.resolve(true),
  cutOff: () => Promise.resolve(),
};

/** Who asks to write. */
export interface Claimant {
  readonly peer: Peer;
  /** Undefined for commands of ours, which write only what nobody else can open. */
  readonly client: Client | undefined;
}

/** Two clients that have written one disk while both were connected. Times are Date.now(). */
export interface TwoWriters {
  readonly at: number;
  readonly clients: readonly string[];
}

/** For people: one connection that may write. */
export interface WriterInfo {
  readonly client: string;
  readonly isExclusive: boolean;
  /** Null if it has only opened the disk. */
  readonly firstWriteAt: number | null;
}

export class Claim {
  readonly disk: string;
  readonly peer: Peer;
  readonly client: Client | undefined;
  readonly mayWrite: boolean;
  /** As it was asked for, or as the other one has it: no further connection writes beside this. */
  readonly isExclusive: boolean;
  /** For those who come while this is held, and say nothing themselves. */
  readonly otherwise: Otherwise | undefined;
  firstWriteAt: number | null = null;
  isFenced = false;
  /** Set by the device: from now on it asks `beginWriting` again. */
  onFenced: (() => void) | undefined;
  readonly ended: Promise<void>;
  #end: () => void = () => undefined;
  readonly #writers: Writers;

  constructor(
    writers: Writers,
    disk: string,
    { peer, client }: Claimant,
    may: { readonly mayWrite: boolean; readonly isExclusive: boolean; readonly otherwise: Otherwise | undefined },
  ) {
    this.#writers = writers;
    this.disk = disk;
    this.peer = peer;
    this.client = client;
    this.mayWrite = may.mayWrite;
    this.isExclusive = may.isExclusive;
    this.otherwise = may.otherwise;
    this.ended = new Promise((resolve) => (this.#end = resolve));
  }

  get label(): string {
    return this.client?.label ?? 'a command';
  }

  /** Asked before the first write, and again by one that was fenced. Errors: CatalogError BUSY, for who may not. */
  beginWriting(): void {
    this.#writers.beginsWriting(this);
  }

  /** Nothing of it is under way, and nothing more will come. */
  end(): void {
    this.#writers.ended(this);
    this.#end();
  }

  /** Of what reaches the device from now on nothing is written. */
  fence(): void {
    this.isFenced = true;
    this.onFenced?.();
  }
}

interface KeptOut {
  readonly label: string;
  readonly since: number;
  readonly forMs: number;
  /** By performance.now(). */
  readonly until: number;
}

export class Writers {
  readonly #log: Log;
  readonly #logOften: LogOften;
  readonly #disks = new Map<string, Set<Claim>>();
  readonly #byPeer = new Map<Peer, Claim>();
  readonly #warnings = new Map<string, TwoWriters & { readonly toldAt: number }>();
  readonly #keptOut = new Map<string, KeptOut>();
  connected: Connected = NOBODY_CONNECTED;

  constructor(log: Log, logOften: LogOften) {
    this.#log = log;
    this.#logOften = logOften;
  }

  /**
   * A connection opens `disk` to write, `exclusive` if nobody else shall. Resolves with a claim that may write, or with one that
   * may not, by what is to become of those who come late. Whoever is about to end is waited for, and who is taken over
   * from has ended. Errors: CatalogError BUSY.
   */
  async claim(disk: string, claimant: Claimant, exclusive: Exclusive | undefined): Promise<Claim> {
    const deadline = performance.now() + END_WAIT_MS;
    let hasAskedOwn = false;
    for (;;) {
      this.#mustNotBeKeptOut(disk, claimant.client);
      const obstacles = this.#obstacles(disk, claimant, exclusive);
      if (obstacles.length === 0) return this.#begin(disk, claimant, exclusive, true);
      const first = obstacles.find(this.#isStaying);
      if (first !== undefined) {
        const otherwise = this.#whatOtherwise(exclusive, obstacles);
        // A guest whose network was gone comes back before its old connection is seen to end, and would read only from then on
        // (qemu with auto-read-only, which libvirt sets). Its machine, being asked, says that nobody has that connection.
        const own = hasAskedOwn ? [] : obstacles.filter((claim) => isOf(claim, claimant) && this.#isStaying(claim));
        if (otherwise !== 'take-over' && own.length > 0) {
          hasAskedOwn = true;
          await Promise.all(own.map(({ peer }) => this.connected.isThere(peer)));
          continue;
        }
        if (otherwise === 'read-only') {
          this.#tellReadOnly(disk, claimant, first);
          return this.#begin(disk, claimant, exclusive, false);
        }
        if (otherwise === 'refuse') throw inUse(disk, first, obstacles.length - 1);
        await this.#takeOver(disk, claimant, obstacles.filter(this.#isStaying), deadline);
      }
      // It asks nothing more, but may never take its last replies.
      if (exclusive === 'take-over' && !(await endWithin(obstacles, performance.now() + LAST_REPLIES_MS))) {
        this.#cutOff(disk, claimant, obstacles, 'has ended, does not take its last replies');
      }
      // Not of one that has come since: that is looked at anew.
      if (!(await endWithin(obstacles, deadline))) throw stillEnding(disk, obstacles);
    }
  }

  /**
   * Whether `claim` would give the right to write, as far as is known without asking anybody. Who would be refused is told that
   * when it opens: tools that list all exports ask about each (qemu-nbd --list), and would fail at the first that is in use.
   */
  look(disk: string, claimant: Claimant, exclusive: Exclusive | undefined): boolean {
    if (this.#keptOutNow(disk, claimant.client) !== undefined) return false;
    const obstacles = this.#obstacles(disk, claimant, exclusive);
    const first = obstacles.find(this.#isStaying);
    if (first === undefined) return true;
    return this.#whatOtherwise(exclusive, obstacles) === 'take-over';
  }

  /** Asks the system, so of a thousand no more are asked than must be. */
  readonly #isStaying = (claim: Claim): boolean => !claim.isFenced && !this.connected.isEnding(claim.peer);

  /** What the newcomer's own side says, or else the side of those who have the disk. */
  #whatOtherwise(exclusive: Exclusive | undefined, obstacles: readonly Claim[]): Otherwise {
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
    const found = this.#warnings.get(disk);
    return found && { at: found.at, clients: found.clients };
  }

  /** What was written under this name is gone: it was deleted, or is made anew. */
  forget(disk: string): void {
    this.#warnings.delete(disk);
  }

  /** What the connection may do with the disk that it has opened; undefined if it has opened none to write. */
  claimOf(peer: Peer): Claim | undefined {
    return this.#byPeer.get(peer);
  }

  /**
   * Somebody is about to cut the connection off: nothing that reaches its disk from now on is written, and its client does not
   * get it to write again for `ms`, by whatever connection.
   */
  keepOut(peer: Peer, ms: number): void {
    const claim = this.#byPeer.get(peer);
    if (claim?.client === undefined || !claim.mayWrite) return;
    claim.fence();
    if (ms <= 0) return;
    const now = performance.now();
    if (this.#keptOut.size >= MAX_KEPT_OUT) {
      for (const [key, { until }] of [...this.#keptOut]) if (until <= now) this.#keptOut.delete(key);
    }
    const [oldest] = this.#keptOut.keys();
    if (this.#keptOut.size >= MAX_KEPT_OUT && oldest !== undefined) this.#keptOut.delete(oldest);
    this.#keptOut.set(keyOf(claim.disk, claim.client), {
      ...{ label: claim.label, since: Date.now(), forMs: ms, until: now + ms },
    });
  }

  /** For Claim only. */
  beginsWriting(claim: Claim): void {
    const { disk, client } = claim;
    if (!claim.mayWrite) throw busy(`${disk} is open by another client that alone may write it`);
    if (claim.isFenced) throw busy(`${disk} is not yours any more: this connection was cut off`);
    const others = this.#claimsOf(disk).filter((other) => other !== claim && other.mayWrite);
    const owner = others.find(({ isExclusive }) => isExclusive);
    // Only a command's: it is let in beside an exclusive writer, since it means to read.
    if (owner) throw busy(`${disk} is open exclusively by ${owner.label}: nobody else writes it`);
    claim.firstWriteAt ??= Date.now();
    if (client === undefined) return;
    const first = others.find(
      (other) =>
        other.client !== undefined &&
        other.client.id !== client.id &&
        other.firstWriteAt !== null &&
        !this.connected.hasEnded(other.peer),
    );
    if (first) this.#warn(first, claim);
  }

  /** For Claim only. */
  ended(claim: Claim): void {
    if (this.#byPeer.get(claim.peer) === claim) this.#byPeer.delete(claim.peer);
    const disk = this.#disks.get(claim.disk);
    disk?.delete(claim);
    if (disk?.size === 0) this.#disks.delete(claim.disk);
  }

  #begin(disk: string, claimant: Claimant, exclusive: Exclusive | undefined, mayWrite: boolean): Claim {
    // Who has found an exclusive writer may be one of several connections that believe in each other: not here.
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

  /** Whose right to write must end before the claimant has one. */
  #obstacles(disk: string, { client }: Claimant, exclusive: Exclusive | undefined): Claim[] {
    // A command of ours only means to read; should it write after all, it is stopped then (beginsWriting).
    if (client === undefined) return [];
    return this.#claimsOf(disk).filter((other) => {
      if (!other.mayWrite || (other.client === undefined && other.firstWriteAt === null)) return false;
      // What was cut off is over before anybody else begins, exclusively or not.
      return exclusive !== undefined || other.isExclusive || other.isFenced;
    });
  }

  /** Cut off those that are in the way, if none of them is there any more. Errors: CatalogError BUSY. */
  async #takeOver(disk: string, claimant: Claimant, staying: readonly Claim[], deadline: number): Promise<void> {
    const isThere = await Promise.all(staying.map(({ peer }) => this.connected.isThere(peer)));
    // Some may have ended by themselves meanwhile.
    const there = staying.filter((claim, i) => isThere[i] && this.#byPeer.get(claim.peer) === claim);
    const [first] = there;
    if (first !== undefined) throw inUse(disk, first, there.length - 1, 'was asked, and is there');
    this.#cutOff(disk, claimant, staying, 'did not answer');
    if (!(await endWithin(staying, deadline))) throw stillEnding(disk, staying);
  }

  #cutOff(disk: string, { client }: Claimant, claims: readonly Claim[], why: string): void {
    for (const claim of claims) {
      if (this.#byPeer.get(claim.peer) !== claim || claim.isFenced) continue;
      claim.fence();
      const newcomer = client?.label ?? 'a command';
      this.#log(`${disk}: ${claim.label} ${why} and is cut off; ${newcomer} takes the disk over`, {
        ...{ vdi: disk, peer: claim.peer.address, client: claim.label, newcomer },
      });
      void this.connected.cutOff(claim.peer, `${newcomer} has taken ${disk} over`);
    }
  }

  #keptOutNow(disk: string, client: Client | undefined): KeptOut | undefined {
    const key = client && keyOf(disk, client);
    const found = key === undefined ? undefined : this.#keptOut.get(key);
    if (key === undefined || found === undefined || found.until > performance.now()) return found;
    this.#keptOut.delete(key);
    return undefined;
  }

  #mustNotBeKeptOut(disk: string, client: Client | undefined): void {
    const found = this.#keptOutNow(disk, client);
    if (found === undefined) return;
    // The same words as long as it lasts: the log has a line for each.
    throw busy(
      `${found.label} was disconnected from ${disk} at ${timeOf(found.since)} by the operator and is kept out for ` +
        `${Math.ceil(found.forMs / 1000)} s`,
    );
  }

  #tellReadOnly(disk: string, { peer, client }: Claimant, first: Claim): void {
    const label = client?.label ?? 'a command';
    const line = `${disk} is read-only for ${label}: only one may write it, and ${first.label} has it open for that`;
    this.#logOften(`disk ${disk}`, line, { vdi: disk, peer: peer.address, client: label });
  }

  /** `first` has written, and now `second` does: once for each connection at most. */
  #warn(first: Claim, second: Claim): void {
    const { disk } = second;
    const clients = [first.label, second.label];
    const before = this.#warnings.get(disk);
    const now = performance.now();
    const isQuiet = before !== undefined && now - before.toldAt < WARNING_INTERVAL_MS;
    if (!isQuiet) {
      this.#log(
        `${disk} is written by two clients at once, ${first.label} and ${second.label}: unless they know of each other ` +
          "(a cluster filesystem, a live migration) its filesystem is being damaged; 'sheepgate client list' shows both, " +
          'serve --exclusive lets only one of them write',
        { vdi: disk, peers: [first.peer.address, second.peer.address], clients },
      );
    }
    this.#warnings.delete(disk);
    const [oldest] = this.#warnings.keys();
    if (this.#warnings.size >= MAX_WARNINGS && oldest !== undefined) this.#warnings.delete(oldest);
    this.#warnings.set(disk, { at: Date.now(), clients, toldAt: isQuiet ? before.toldAt : now });
  }
}

function isOf(claim: Claim, { client }: Claimant): boolean {
  return client !== undefined && claim.client?.id === client.id;
}

/** Whom it concerns is told who the other one is; what the operator can do about it (`more`) is for the log. */
function busy(words: string, more = ''): CatalogError {
  return new CatalogError('BUSY', words + more, { forClients: words });
}

function inUse(disk: string, first: Claim, others: number, how = ''): CatalogError {
  const more = others > 0 ? `, and by ${others} more` : '';
  const asked = how === '' ? '' : `, which ${how}`;
  const words = `${disk} is open for writing by ${first.label}${asked}${more}, and only one may write it`;
  return busy(words, ": disconnect that, or 'sheepgate client disconnect' does");
}

function stillEnding(disk: string, claims: readonly Claim[]): CatalogError {
  return busy(
    `${disk}: the connection of ${claims[0]?.label ?? 'another client'} has ended, but its last requests are not finished ` +
      `after ${END_WAIT_MS / 1000} s, and nobody may write before; try again`,
  );
}

async function endWithin(claims: readonly Claim[], deadline: number): Promise<boolean> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<boolean>((resolve) => {
    timer = setTimeout(() => resolve(false), Math.max(0, deadline - performance.now()));
  });
  const isOver = await Promise.race([Promise.all(claims.map(({ ended }) => ended)).then(() => true), late]);
  clearTimeout(timer);
  return isOver;
}

function keyOf(disk: string, { id }: Client): string {
  return `${disk}\n${id}`;
}

function timeOf(ms: number): string {
  return new Date(ms).toISOString().replace(/\.\d+/, '');
}
