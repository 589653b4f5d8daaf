/**
 * Crash states: what can be on the disk after a crash at a moment of a recording. Owns the choice of what was kept, of the
 * things that were not synced, and builds the files. Knows the rules from journal.ts, and nothing of stores.
 */
import { createHash, type Hash } from 'node:crypto';
import { CHUNK, compose, Content, WHOLE_CHUNK, type ChunkChange } from './content.js';
import {
  isInJournal,
  META_PAGES,
  type DataEvent,
  type Event,
  type Ino,
  type Journal,
  type NameEvent,
} from './journal.js';
import { ROOT_INO, type Inode } from './machine.js';
import type { Random } from './random.js';

/**
 * - strict, ext4: the machine loses power (journal.ts has the rules).
 * - away: the disk is gone for a moment and is mounted again, on the same boot; what is lost is as for `strict`.
 * - death: the process is killed. The page cache survives.
 */
export type Loss = 'strict' | 'ext4' | 'away' | 'death';

/** How much of what was not synced has reached the disk; the two ends and their neighbours are where mistakes show. */
const CHOICES = {
  nothing: 3,
  everything: 2,
  allButOne: 3,
  onlyOne: 3,
  namesOnly: 2,
  dataOnly: 2,
  each: 5,
} as const;
type Choice = keyof typeof CHOICES;

/** With `each`: how probable it is that a thing was kept. */
const KEPT = [0.1, 0.5, 0.9] as const;
/** A kept write is torn this often. */
const TORN = 0.3;
/** How a transaction of LMDB in flight was caught. */
const COMMITS = { none: 2, some: 4, allButMeta: 2, all: 2 } as const;

/** Files and directories, by inode. */
export type Files = ReadonlyMap<Ino, Inode>;

/** Whether an event that is not durable was kept; for a write: which of its sectors, and whether its size. */
interface Decision {
  keeps(event: DataEvent | NameEvent): boolean;
  sectors(event: DataEvent, mask: number): number;
}

export interface Recording {
  /** The files when it began, all durable. */
  readonly before: Files;
  /** All files that there were since. */
  readonly inodes: Files;
  readonly journal: Journal;
}

/** The files after a crash at the moment `at`. */
export function crashFiles({ before, inodes, journal }: Recording, at: number, loss: Loss, random: Random): Files {
  const events = journal.events.filter((event) => event.at <= at || (event.type === 'commit' && event.begun <= at));
  const decision = loss === 'death' ? EVERYTHING : decide(events, at, loss, random);
  const states = new FileStates(before, inodes);
  /** Of renames whose new name is lost. */
  const lostRemovals = new Set<Event>();
  for (const event of events) {
    if (event.type === 'commit') {
      if (event.at <= at) states.change(event.ino, event.chunks, undefined, event.sizeAfter);
      else caughtCommit(states, event, loss, random);
    } else if (event.type === 'name') {
      const isSafe = [event, event.removal].some((each) => each && each.at <= at && isDurable(each, at, loss));
      if (!lostRemovals.has(event) && (isSafe || decision.keeps(event))) states.rename(event);
      else if (event.removal) lostRemovals.add(event.removal);
    } else if (isDurable(event, at, loss)) states.change(event.ino, event.chunks, undefined, event.sizeAfter);
    else {
      const isKept = decision.keeps(event);
      const growsWithData = loss === 'ext4' && !event.isMetadata && event.sizeAfter !== undefined;
      const mask = (sectors: number): number => {
        if (event.isMetadata && loss === 'ext4') return isKept ? sectors : 0;
        if (!isKept) return 0;
        return growsWithData ? sectors : decision.sectors(event, sectors);
      };
      states.change(event.ino, event.chunks, mask, isKept ? event.sizeAfter : undefined);
    }
  }
  if (loss === 'death' && random.chance(0.5)) caughtWrite(states, journal, at, random);
  return states.files();
}

/** The process is killed in the middle of its next write: the first pages are written. */
function caughtWrite(states: FileStates, journal: Journal, at: number, random: Random): void {
  const next = journal.events.find((event) => event.at === at + 1);
  if (next?.type !== 'data' || next.isMetadata) return;
  const chunks = next.chunks.slice(0, random.below(next.chunks.length));
  const last = chunks.at(-1);
  const end = last === undefined ? 0 : (last.index + 1) * CHUNK;
  const grows = next.sizeAfter !== undefined && end > states.sizeOf(next.ino);
  states.change(next.ino, chunks, undefined, grows ? Math.min(end, next.sizeAfter) : undefined);
}

function isDurable(event: Event, at: number, loss: Loss): boolean {
  return (loss === 'ext4' ? event.ext4 : event.durable) <= at;
}

const EVERYTHING: Decision = { keeps: () => true, sectors: (_, mask) => mask };

function decide(events: readonly Event[], at: number, loss: Loss, random: Random): Decision {
  const open = events.filter(
    (event): event is DataEvent | NameEvent => event.type !== 'commit' && !isDurable(event, at, loss),
  );
  const choice: Choice = open.length === 0 ? 'nothing' : random.weighted(CHOICES);
  const one = open.length === 0 ? undefined : random.pick(open);
  const probability = random.pick(KEPT);
  // The journal of ext4 is written up to some event, and no further.
  const journaledTo =
    { nothing: 0, everything: at, namesOnly: at, dataOnly: 0 }[choice as string] ?? random.below(at + 1);
  const keeps = (event: DataEvent | NameEvent): boolean => {
    if (loss === 'ext4' && isInJournal(event)) return event.at <= journaledTo;
    switch (choice) {
      case 'nothing':
        return false;
      case 'everything':
        return true;
      case 'allButOne':
        return event !== one;
      case 'onlyOne':
        return event === one;
      case 'namesOnly':
        return event.type === 'name' || event.isMetadata;
      case 'dataOnly':
        return event.type === 'data';
      case 'each':
        return random.chance(probability);
    }
  };
  const isTorn = choice === 'each' || choice === 'onlyOne';
  const sectors = (_: DataEvent, mask: number): number => {
    if (!isTorn || !random.chance(TORN)) return mask;
    return mask & random.below(WHOLE_CHUNK + 1);
  };
  return { keeps, sectors };
}

function caughtCommit(states: FileStates, event: Extract<Event, { type: 'commit' }>, loss: Loss, random: Random): void {
  const how = random.weighted(COMMITS);
  if (how === 'none') return;
  if (how === 'all') return states.change(event.ino, event.chunks, undefined, event.sizeAfter);
  const data = event.chunks.filter(({ index }) => index >= META_PAGES);
  const written = loss === 'death' ? data.slice(0, random.below(data.length + 1)) : data;
  const isSome = how === 'some' && loss !== 'death';
  const mask = (sectors: number): number => (isSome ? sectors & random.below(WHOLE_CHUNK + 1) : sectors);
  const last = Math.max(0, ...written.map(({ index }) => (index + 1) * CHUNK));
  // The file grows only if a page past its end was written.
  states.change(event.ino, written, mask, Math.max(states.sizeOf(event.ino), Math.min(last, event.sizeAfter)));
}

/** The files while events are applied to them. */
class FileStates {
  readonly #files = new Map<Ino, Inode>();
  readonly #now: Files;

  constructor(before: Files, now: Files) {
    this.#now = now;
    for (const [ino, inode] of before)
      this.#files.set(ino, { ...inode, content: inode.content.copy(), entries: new Map(inode.entries) });
  }

  #of(ino: Ino): Inode {
    let inode = this.#files.get(ino);
    if (inode) return inode;
    const now = this.#now.get(ino);
    if (!now) throw new Error(`invariant: inode ${ino} is unknown`);
    inode = { ...now, content: new Content(), entries: new Map() };
    this.#files.set(ino, inode);
    return inode;
  }

  sizeOf(ino: Ino): number {
    return this.#of(ino).content.size;
  }

  rename({ directory, changes }: NameEvent): void {
    const { entries } = this.#of(directory);
    for (const { name, ino } of changes) {
      if (ino === undefined) entries.delete(name);
      else entries.set(name, ino);
    }
  }

  /** `kept`: of the sectors that a change has touched, those that were kept; without it all. */
  change(
    ino: Ino,
    changes: readonly ChunkChange[],
    kept: ((sectors: number) => number) | undefined,
    size: number | undefined,
  ): void {
    const { content } = this.#of(ino);
    const { chunks } = content;
    for (const { index, after, sectors } of changes) {
      const mask = kept === undefined ? sectors : kept(sectors);
      if (mask === 0) continue;
      while (chunks.length <= index) chunks.push(undefined);
      chunks[index] = compose(chunks[index], after, mask);
    }
    if (size !== undefined) content.size = size;
  }

  /** Only what has a name. */
  files(): Map<Ino, Inode> {
    const found = new Map<Ino, Inode>();
    const take = (ino: Ino): void => {
      const inode = this.#of(ino);
      if (found.has(ino)) return;
      found.set(ino, inode);
      cutOff(inode.content);
      for (const child of inode.entries.values()) take(child);
    };
    take(ROOT_INO);
    return found;
  }
}

/** Nothing is behind the end of a file. */
function cutOff(content: Content): void {
  const { size } = content;
  content.chunks.length = Math.min(content.chunks.length, Math.ceil(size / CHUNK));
  const within = size % CHUNK;
  const index = Math.floor(size / CHUNK);
  const last = content.chunks[index];
  if (within > 0 && last) content.chunks[index] = Buffer.from(last).fill(0, within);
}

const DIGESTS = new WeakMap<Buffer, string>();

/** The same for the same names, sizes and bytes. */
export function digestOf(files: Files): string {
  const hash = createHash('sha1');
  walk(files, ROOT_INO, '', hash);
  return hash.digest('hex');
}

function walk(files: Files, ino: Ino, name: string, hash: Hash): void {
  const inode = files.get(ino);
  if (!inode) return;
  const { kind, content, entries, target } = inode;
  const chunks = content.chunks.map((chunk) => (chunk === undefined ? '-' : digestOfChunk(chunk))).join();
  hash.update(`${name}\n${kind} ${content.size} ${target} ${chunks}\n`);
  for (const child of [...entries.keys()].sort()) walk(files, entries.get(child) ?? -1, `${name}/${child}`, hash);
}

function digestOfChunk(chunk: Buffer): string {
  let digest = DIGESTS.get(chunk);
  if (digest === undefined) DIGESTS.set(chunk, (digest = createHash('sha1').update(chunk).digest('base64')));
  return digest;
}
