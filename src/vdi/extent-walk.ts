/** A walk over a range whose parts are reported one after the other: how far it has come, and the joining of neighbours. */
import type { LongWork } from './loop-share.js';

/** How far a question about a range has come. */
export class Walk {
  /** It counts among the look-ups that are under way. */
  isAdmitted = false;

  constructor(
    readonly joiner: ExtentJoiner,
    public at: number,
    readonly end: number,
    /** Undefined if it is about few objects. */
    readonly work: LongWork | undefined,
  ) {}
}

/** Joins neighbouring extents of a kind and hands them on. */
export class ExtentJoiner {
  isStopped = false;
  #start: number;
  #end: number;
  #hole: boolean | undefined;
  readonly #sink: (offset: number, length: number, hole: boolean) => boolean;

  constructor(offset: number, sink: (offset: number, length: number, hole: boolean) => boolean) {
    this.#start = offset;
    this.#end = offset;
    this.#sink = sink;
  }

  /** The next `length` bytes. Returns false if no more are wanted. */
  add(length: number, hole: boolean): boolean {
    if (length <= 0) return !this.isStopped;
    if (this.#hole !== undefined && hole !== this.#hole) {
      this.isStopped = !this.#sink(this.#start, this.#end - this.#start, this.#hole);
      this.#start = this.#end;
    }
    this.#hole = hole;
    this.#end += length;
    return !this.isStopped;
  }

  /** For a store, whose offsets are within an object: extents come in order and without gaps. */
  readonly addPart = (_offset: number, length: number, hole: boolean): boolean => this.add(length, hole);

  /** What is missing up to `end` counts as `rest`: extents that are short must not move what follows to a wrong place. */
  fillUpTo(end: number, rest = false): void {
    if (!this.isStopped && this.#end < end) this.add(end - this.#end, rest);
  }

  finish(): void {
    if (this.isStopped || this.#hole === undefined || this.#end === this.#start) return;
    this.#sink(this.#start, this.#end - this.#start, this.#hole);
  }
}
