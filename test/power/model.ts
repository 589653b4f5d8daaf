/**
 * What a store may show after a crash at any moment of a run: for each block of each disk every content since creation, with
 * the moments at which it was written and answered; for each name what had it when. Owns the rules:
 *
 * - After a power loss a block is what it was at the last flush that was answered, or has been since.
 * - After the death of the process nothing that was answered is lost.
 * - An operation that was not answered has happened or not.
 *
 * Knows nothing of the store.
 */
import { BLOCK } from './blocks.js';
import type { Loss } from './crash-state.js';

/** Moments (Journal.now). `answered` is Infinity until then. */
interface Step {
  readonly begun: number;
  answered: number;
  /** The process died before it was answered, and the next one did not find it. */
  lost: number;
}

interface Version extends Step {
  readonly bytes: Buffer;
  /** Durable when it is answered. */
  isDurable: boolean;
}

interface Size extends Step {
  readonly size: number;
}

export interface Range {
  readonly offset: number;
  readonly length: number;
}

const ZEROS = Buffer.alloc(BLOCK);
const SCRATCH = { bytes: Buffer.alloc(0) };

/** Of a history: the steps that a crash at `at` may leave as the last one. `floor`: steps answered by then are not undone. */
export function legalAt<T extends Step>(steps: readonly T[], at: number, floor: (step: T) => boolean): readonly T[] {
  const there = steps.filter((step) => step.begun <= at && step.lost > at);
  const first = there.findLastIndex(floor);
  return there.slice(Math.max(0, first));
}

/** One writable disk, from its creation to its end. */
export class DiskModel {
  /** What its data says. */
  readonly name: string;
  readonly #blocks = new Map<number, Version[]>();
  readonly #sizes: Size[];
  readonly #flushes: Step[] = [];
  /** What it began with; zeros without. */
  readonly #base: Buffer | undefined;

  constructor(name: string, size: number, base?: Buffer) {
    this.name = name;
    this.#base = base;
    this.#sizes = [{ size, begun: 0, answered: 0, lost: Infinity }];
  }

  get size(): number {
    return this.#sizes.findLast(({ lost }) => lost === Infinity)?.size ?? 0;
  }

  /** Call the result when it is answered. `data` undefined: zeros. */
  write({ offset, length }: Range, data: Buffer | undefined, now: number, isDurable: boolean): (at: number) => void {
    const versions: Version[] = [];
    const first = Math.floor(offset / BLOCK);
    const last = Math.floor((offset + length - 1) / BLOCK);
    for (let block = first; block <= last; block++) {
      const from = Math.max(offset, block * BLOCK);
      const to = Math.min(offset + length, (block + 1) * BLOCK);
      const history = this.#historyOf(block);
      let bytes: Buffer;
      if (to - from === BLOCK) bytes = data ? data.subarray(from - offset, to - offset) : ZEROS;
      else {
        bytes = Buffer.from((history.findLast(({ lost }) => lost === Infinity) as Version).bytes);
        if (data) data.copy(bytes, from % BLOCK, from - offset, to - offset);
        else bytes.fill(0, from % BLOCK, (from % BLOCK) + (to - from));
      }
      const version: Version = { bytes, begun: now, answered: Infinity, lost: Infinity, isDurable };
      history.push(version);
      versions.push(version);
    }
    return (at) => {
      for (const version of versions) version.answered = at;
    };
  }

  #historyOf(block: number): Version[] {
    let history = this.#blocks.get(block);
    if (!history) {
      const bytes = Buffer.alloc(BLOCK);
      this.#base?.subarray(block * BLOCK, (block + 1) * BLOCK).copy(bytes);
      history = [{ bytes, begun: 0, answered: 0, lost: Infinity, isDurable: true }];
      this.#blocks.set(block, history);
    }
    return history;
  }

  flush(now: number): (at: number) => void {
    return this.#step(this.#flushes, { begun: now, answered: Infinity, lost: Infinity });
  }

  resize(size: number, now: number): (at: number) => void {
    return this.#step(this.#sizes, { size, begun: now, answered: Infinity, lost: Infinity });
  }

  #step<T extends Step>(steps: T[], step: T): (at: number) => void {
    steps.push(step);
    return (at) => (step.answered = at);
  }

  sizesAt(at: number): readonly number[] {
    return legalAt(this.#sizes, at, ({ answered }) => answered <= at).map(({ size }) => size);
  }

  /** The newest content. */
  bytes(): Buffer {
    return Buffer.from(this.#newest(this.size, Number.MAX_SAFE_INTEGER));
  }

  /** Undefined if `found` is legal after a crash at `at`; else the first block that is not, and what it may be. */
  wrongBlock(found: Buffer, at: number, loss: Loss): WrongBlock | undefined {
    const flushed = Math.max(0, ...this.#flushes.filter(({ answered }) => answered <= at).map(({ begun }) => begun));
    return this.#wrong(
      found,
      at,
      ({ answered, isDurable }) => answered <= at && (loss === 'death' || isDurable || answered <= flushed),
    );
  }

  /** The same for a snapshot that was taken at some moment from `from` to `to`. */
  wrongInSnapshot(found: Buffer, from: number, to: number): WrongBlock | undefined {
    return this.#wrong(found, to, ({ answered }) => answered <= from);
  }

  #wrong(found: Buffer, at: number, isFloor: (version: Version) => boolean): WrongBlock | undefined {
    const expected = this.#newest(found.length, at);
    if (expected.equals(found)) return undefined;
    for (let from = 0; from < found.length; from += BLOCK) {
      const is = found.subarray(from, from + BLOCK);
      if (is.equals(expected.subarray(from, from + BLOCK))) continue;
      const legal = legalAt(this.#historyOf(from / BLOCK), at, isFloor);
      if (legal.some(({ bytes }) => bytes.subarray(0, is.length).equals(is))) continue;
      return { offset: from, is, legal: legal.map(({ bytes }) => bytes) };
    }
    return undefined;
  }

  /** Valid until the next call: a buffer of megabytes for each would cost more than all the rest of a check. */
  #newest(size: number, at: number): Buffer {
    if (SCRATCH.bytes.length < size) SCRATCH.bytes = Buffer.alloc(size);
    const all = SCRATCH.bytes.subarray(0, size);
    all.fill(0, this.#base?.copy(all, 0, 0, size) ?? 0);
    for (const [block, history] of this.#blocks) {
      if (block * BLOCK >= size) continue;
      let last = history.length - 1;
      while (last > 0 && ((history[last] as Version).begun > at || (history[last] as Version).lost <= at)) last--;
      (history[last] as Version).bytes.copy(all, block * BLOCK);
    }
    return all;
  }

  /**
   * A new process has found `found`, at `at`: what it did not find never happened. `isDurable`: the machine had lost power, so
   * that all of it is on the disk.
   */
  settle(found: Buffer, at: number, isDurable: boolean): void {
    for (const [block, history] of this.#blocks) {
      const is = found.subarray(block * BLOCK, (block + 1) * BLOCK);
      const there = history.findLastIndex(({ bytes, lost }) => lost > at && bytes.subarray(0, is.length).equals(is));
      for (const version of history.slice(there + 1)) version.lost = Math.min(version.lost, at);
      const version = history[there];
      if (!version || version.answered <= at) continue;
      // It is there, but its FUA was not answered.
      version.answered = at;
      version.isDurable = false;
    }
    this.#settleSize(found.length, at);
    for (const flush of this.#flushes) if (flush.answered > at) flush.lost = at;
    if (isDurable) this.#flushes.push({ begun: at, answered: at, lost: Infinity });
  }

  #settleSize(size: number, at: number): void {
    const there = this.#sizes.findLastIndex((each) => each.lost > at && each.size === size);
    for (const each of this.#sizes.slice(there + 1)) each.lost = Math.min(each.lost, at);
    const found = this.#sizes[there];
    if (found && found.answered > at) found.answered = at;
  }
}

export interface WrongBlock {
  readonly offset: number;
  readonly is: Buffer;
  readonly legal: readonly Buffer[];
}

/** What has a name: a writable disk, or a snapshot with its content; being filled, it has no content that can be compared. */
export type Thing =
  | { readonly kind: 'disk'; readonly disk: DiskModel }
  | { readonly kind: 'filling'; readonly run: string }
  | SnapshotThing;

export interface SnapshotThing {
  readonly kind: 'snapshot';
  readonly of: DiskModel;
  readonly begun: number;
  /** Undefined if the disk was written meanwhile, until it is read. */
  bytes: Buffer | undefined;
}

interface Held extends Step {
  /** Undefined: nothing has the name. */
  readonly thing: Thing | undefined;
}

/** A backup of a disk. */
export interface BackupModel extends Step {
  readonly bytes: Buffer;
  /** 0 until it is answered. */
  id: number;
}

export class Model {
  readonly #names = new Map<string, Held[]>();
  /** By the name of the disk. */
  readonly backups = new Map<string, BackupModel[]>();

  /** From `now` on, `name` is going to be `thing`. Call the result when that is answered. */
  put(name: string, thing: Thing | undefined, now: number): (at: number) => void {
    let history = this.#names.get(name);
    if (!history) {
      this.#names.set(name, (history = []));
      history.push({ thing: undefined, begun: 0, answered: 0, lost: Infinity });
    }
    const held: Held = { thing, begun: now, answered: Infinity, lost: Infinity };
    history.push(held);
    return (at) => (held.answered = at);
  }

  /** A backup of the disk `name` is going to be taken. Call the result with its number when that is answered. */
  backUp(name: string, bytes: Buffer, now: number): (id: number, at: number) => void {
    const backup: BackupModel = { bytes, id: 0, begun: now, answered: Infinity, lost: Infinity };
    const taken = this.backups.get(name);
    if (taken) taken.push(backup);
    else this.backups.set(name, [backup]);
    return (id, at) => Object.assign(backup, { id, answered: at });
  }

  /** The run ended at `at`, before what it did later. */
  forgetBackupsAfter(at: number): void {
    for (const [name, all] of this.backups) {
      const begun = all.filter((backup) => backup.begun <= at);
      for (const backup of begun) if (backup.answered > at) Object.assign(backup, { id: 0, answered: Infinity });
      this.backups.set(name, begun);
    }
  }

  /** The last known. */
  get(name: string): Thing | undefined {
    return this.#names.get(name)?.findLast(({ lost }) => lost === Infinity)?.thing;
  }

  /** All names that something ever had. */
  names(): string[] {
    return [...this.#names.keys()];
  }

  /** Names that something has now. */
  present(): string[] {
    return this.names().filter((name) => this.get(name) !== undefined);
  }

  legalThings(name: string, at: number): readonly (Thing | undefined)[] {
    return legalAt(this.#names.get(name) ?? [], at, ({ answered }) => answered <= at).map(({ thing }) => thing);
  }

  /** A new process has found `thing`, or nothing, at `at`. */
  settle(name: string, thing: Thing | undefined, at: number): void {
    const history = this.#names.get(name) ?? [];
    const there = history.findLastIndex((held) => held.lost > at && held.thing === thing);
    for (const held of history.slice(there + 1)) held.lost = Math.min(held.lost, at);
    const found = history[there];
    if (found && found.answered > at) found.answered = at;
  }
}
