/**
 * The deep check: compares every copy of every object that a VDI or snapshot refers to, and every strip of erasure-coded
 * objects, as each node has it. Runs beside clients: takes no lock, changes nothing, reads at a limited rate, and reports only
 * lasting differences (suspects.ts).
 *
 * Memory: a bit for each object, half a MiB for each copy of the objects being read, and the suspects.
 */
import { oidText } from '../../../sheepdog/object-ids.js';
import type { StoreError } from '../../store-error.js';
import type { ClusterClient } from '../cluster-client.js';
import { labelsOf } from '../labels.js';
import { describe, describeThin, findingsOf, type Finding, type Thin } from './finding.js';
import { Looker } from './look.js';
import { bytesOf, ObjectsInUse, readLiveInodes, type Target } from './objects-in-use.js';
import { Peers } from './peers.js';
import { isWrong, Suspects } from './suspects.js';
import { Throttle } from './throttle.js';
import type { Inode } from '../../../sheepdog/inode.js';
import { inodeHigh, vidOf } from '../../../sheepdog/object-ids.js';

/** Bytes a second, of all nodes together. */
export const DEFAULT_RATE = 64 * 2 ** 20;
export const DEFAULT_SETTLE_MS = 10_000;
/** Objects that are read at a time; so no node has more requests in flight. */
const PARALLEL_OBJECTS = 2;
/** Findings that are listed; the rest is counted. */
const MAX_FINDINGS = 1000;
/** Disks and snapshots that one finding names. */
const MAX_USERS = 100;

export interface DeepCheckOptions {
  /** Bytes a second. */
  readonly rate?: number;
  /** How long a difference must last to be reported. */
  readonly settleMs?: number;
  /** Ends the check; what was found until then is reported. */
  readonly signal?: AbortSignal;
  /** Called with lines for the operator while the check runs. */
  readonly note?: (line: string) => void;
  readonly progress?: {
    /** `total`: bytes to be read. */
    begin(total: number): void;
    advance(bytes: number): void;
  };
  /** How long a node that cannot be asked is asked again. */
  readonly retryMs?: number;
}

export interface DeepReport {
  readonly vdis: number;
  readonly objects: number;
  readonly bytesRead: number;
  /** One line for each problem. */
  readonly problems: readonly string[];
  readonly findings: readonly Finding[];
  /** VDIs and snapshots that should have more copies than there are zones. */
  readonly thin: readonly Thin[];
  /** Why not everything was read; absent if it was. */
  readonly stoppedBy?: Error;
}

export async function deepCheck(cluster: ClusterClient, options: DeepCheckOptions = {}): Promise<DeepReport> {
  return new DeepCheck(cluster, options).run();
}

class DeepCheck {
  readonly #cluster: ClusterClient;
  readonly #options: DeepCheckOptions;
  readonly #objects: ObjectsInUse;
  readonly #peers: Peers;
  readonly #looker: Looker;
  readonly #suspects: Suspects;
  /** Ends all parts of the check when one of them has failed. */
  readonly #ending = new AbortController();
  readonly #findings: { readonly target: Target; readonly finding: Finding }[] = [];
  #hidden = 0;
  #bytesRead = 0;
  #read = 0;

  constructor(cluster: ClusterClient, options: DeepCheckOptions) {
    this.#cluster = cluster;
    this.#options = options;
    this.#objects = new ObjectsInUse(cluster);
    const { signal: asked, note = () => undefined, retryMs, rate = DEFAULT_RATE } = options;
    const signal = asked ? AbortSignal.any([asked, this.#ending.signal]) : this.#ending.signal;
    this.#peers = new Peers(cluster, { signal, note, retryMs });
    this.#looker = new Looker({
      peers: this.#peers,
      throttle: new Throttle(rate, signal),
      didRead: (bytes) => (this.#bytesRead += bytes),
    });
    this.#suspects = new Suspects({
      looker: this.#looker,
      settleMs: options.settleMs ?? DEFAULT_SETTLE_MS,
      signal,
      confirmed: (target, look) => {
        for (const finding of findingsOf(target, look)) {
          if (this.#findings.length < MAX_FINDINGS) this.#findings.push({ target, finding });
          else this.#hidden++;
        }
      },
    });
  }

  async run(): Promise<DeepReport> {
    try {
      // First, before anything is read: fails if a node cannot be asked, and waits for recovery.
      await this.#peers.view();
      await this.#objects.collect();
      this.#options.progress?.begin(this.#objects.bytes);
      const failure = await this.#compareAll();
      return await this.#report(failure);
    } catch (error) {
      this.#options.signal?.throwIfAborted();
      throw error;
    } finally {
      this.#peers.close();
    }
  }

  /** The error that ended it; undefined if everything was compared. */
  async #compareAll(): Promise<Error | undefined> {
    const targets = this.#objects.targets();
    const walk = async (): Promise<void> => {
      for (;;) {
        await this.#suspects.room();
        const next = targets.next();
        if (next.done === true) return;
        const target = next.value;
        const look = await this.#looker.look(target);
        if (isWrong(look)) this.#suspects.add(target, look);
        this.#read++;
        this.#options.progress?.advance(bytesOf(target));
      }
    };
    const walks = Array.from({ length: PARALLEL_OBJECTS }, walk);
    let failure: Error | undefined;
    const failed = (error: unknown): void => {
      failure ??= error as Error;
      this.#ending.abort();
    };
    await Promise.all([
      Promise.all(walks.map((each) => each.catch(failed))).then(() => this.#suspects.last()),
      this.#suspects.run().catch(failed),
    ]);
    const { signal } = this.#options;
    return signal?.aborted ? (signal.reason as Error) : failure;
  }

  async #report(stoppedBy: Error | undefined): Promise<DeepReport> {
    const thin: Thin[] = [];
    if (stoppedBy) this.#nameByOwner();
    else await this.#nameUsers(thin);
    const findings = this.#findings.map(({ finding }) => finding).filter(({ userCount }) => userCount > 0);
    const unread = this.#objects.unread.map((what) => `not compared: ${what}`);
    const problems = [...unread, ...describeThin(thin), ...findings.map(describe)];
    if (this.#hidden > 0) problems.push(`... and ${this.#hidden} more`);
    return {
      vdis: this.#objects.vdis,
      objects: this.#read,
      bytesRead: this.#bytesRead,
      problems,
      findings,
      thin,
      ...(stoppedBy && { stoppedBy }),
    };
  }

  /** Finds the users of each finding. A finding without users is dropped: the last user was deleted meanwhile. */
  async #nameUsers(thin: Thin[]): Promise<void> {
    const { zones } = await this.#peers.view();
    const lost = new Set<number>();
    const inodes = await readLiveInodes(this.#cluster, (vid) => lost.add(vid));
    const labels = labelsOf(inodes);
    await this.#dropAltered();
    const hasData = this.#findings.some(({ target: { part } }) => part === 'data');
    for (const inode of inodes) {
      const label = labels.get(inode.vid) as string;
      if (inode.copies > zones) thin.push({ label, copies: inode.copies, zones });
      const map = hasData ? await this.#unlessGone(() => this.#cluster.readOwners(inode)) : undefined;
      for (const { target, finding } of this.#findings) {
        if (await this.#hasIt(inode, map, target)) addUser(finding, target, label, inode);
      }
    }
    for (const vid of this.#objects.lostInodes) if (lost.has(vid)) this.#findings.push(lostInode(vid));
  }

  async #hasIt(inode: Inode, map: Uint32Array | undefined, { part, high, low }: Target): Promise<boolean> {
    if (part === 'data') return map?.[low] === high;
    if (vidOf(high) !== inode.vid) return false;
    if (part === 'inode') return true;
    const root = await this.#unlessGone(() => this.#cluster.readIndexRoot(inode.vid));
    return root?.leaves?.some((leaf) => leaf.low === low) ?? false;
  }

  /** Undefined if it was deleted, or is lost or damaged, which another finding reports. */
  async #unlessGone<T>(read: () => Promise<T>): Promise<T | undefined> {
    try {
      return await read();
    } catch (error) {
      if (!['GONE', 'DAMAGED', 'UNSUPPORTED'].includes((error as StoreError).code)) throw error;
      return undefined;
    }
  }

  /** Drops findings whose owner got another number of copies meanwhile: their objects were looked for on the wrong nodes. */
  async #dropAltered(): Promise<void> {
    const now = new Map<number, number | undefined>();
    for (const { target } of this.#findings) {
      const vid = vidOf(target.high);
      if (now.has(vid)) continue;
      now.set(vid, (await this.#unlessGone(() => this.#cluster.readInode(vid)))?.copies);
    }
    const kept = this.#findings.filter(({ target }) => {
      const copies = now.get(vidOf(target.high));
      return copies === undefined || copies === target.copies;
    });
    if (kept.length === this.#findings.length) return;
    this.#findings.splice(0, this.#findings.length, ...kept);
    this.#options.note?.('the number of copies of a VDI was changed meanwhile: check again');
  }

  /** Names the owners instead of the users, without requests to the cluster. */
  #nameByOwner(): void {
    for (const { target, finding } of this.#findings) {
      const { part, high, low } = target;
      const size = target.copyBytes * Math.max(1, target.dataStrips);
      const from = part === 'data' ? low * size : 0;
      finding.users.push({ label: `vid ${vidOf(high).toString(16)}`, from, to: from + size - 1 });
      finding.userCount = 1;
    }
  }
}

function addUser(finding: Finding, target: Target, label: string, inode: Inode): void {
  const size = target.copyBytes * Math.max(1, target.dataStrips);
  const from = target.part === 'data' ? target.low * size : 0;
  const to = (target.part === 'data' ? Math.min(from + size, inode.size) : size) - 1;
  // All differences are behind the end of this disk.
  if (finding.kind === 'different' && finding.ranges.every((range) => from + range.from > to)) return;
  finding.userCount++;
  if (finding.users.length < MAX_USERS) finding.users.push({ label, from, to });
}

function lostInode(vid: number): { readonly target: Target; readonly finding: Finding } {
  const target: Target = {
    part: 'inode',
    high: inodeHigh(vid),
    low: 0,
    copies: 0,
    dataStrips: 0,
    copyBytes: 0,
    unitBytes: 0,
    spans: [],
  };
  const finding: Finding = {
    kind: 'lost',
    part: 'inode',
    oid: oidText(inodeHigh(vid), 0),
    isErasureCoded: false,
    users: [{ label: `vid ${vid.toString(16)}`, from: 0, to: 0 }],
    userCount: 1,
    ranges: [],
    rangeCount: 0,
    missingOn: [],
    presentOn: [],
    trouble: [],
  };
  return { target, finding };
}
