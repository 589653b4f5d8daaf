/**
 * Gathers the first writes to an object that a snapshot shares. The first write copies the object, which costs more than the
 * write. A client that overwrites the disk in order will write the rest of the object too, and a write of the whole object
 * needs no copy. So the first write waits a few milliseconds for the next ones. Owns the parts gathered so far, and whether
 * waiting has paid off lately.
 */

/** After a shorter first write the client is not expected to overwrite the whole object. */
const LEAST_BYTES = 64 * 1024;
/** How long to wait for the next part. */
const NEXT_PART_MS = 3;
/** After a wait in which no part came, this many objects are written without waiting. */
const OBJECTS_WITHOUT_WAIT = 15;

/** The writes of one object, each beginning where the one before ends; the first at the object's start. */
export class FirstWrites {
  readonly #epoch: number;
  readonly #objectSize: number;
  readonly #isAwaited: () => boolean;
  readonly #parts: Buffer[];
  #length: number;
  #isComplete = false;
  #complete: () => void = () => undefined;
  #timer: NodeJS.Timeout | undefined;
  /** The outcome of all parts; set by the caller that writes them. */
  done: Promise<void> | undefined;

  constructor(first: Buffer, epoch: number, objectSize: number, isAwaited: () => boolean) {
    this.#parts = [first];
    this.#length = first.length;
    this.#epoch = epoch;
    this.#objectSize = objectSize;
    this.#isAwaited = isAwaited;
  }

  /**
   * Take one more part if it begins where the last one ends and entered the gate in the same epoch as the first: no snapshot
   * may lie between them. Returns whether it was taken; `done` is then its outcome as well.
   */
  join(offset: number, data: Buffer, epoch: number): boolean {
    if (this.#isComplete || offset !== this.#length || epoch !== this.#epoch) return false;
    this.#parts.push(data);
    this.#length += data.length;
    if (this.#length === this.#objectSize) this.#complete();
    else this.#timer?.refresh();
    return true;
  }

  get count(): number {
    return this.#parts.length;
  }

  /** Resolves with all parts joined, as soon as they fill the object or the next one does not come in time. */
  async whole(): Promise<Buffer> {
    await new Promise<void>((resolve) => {
      this.#complete = resolve;
      this.#timer = setTimeout(resolve, NEXT_PART_MS);
      if (this.#length === this.#objectSize || this.#isAwaited()) resolve();
    });
    clearTimeout(this.#timer);
    this.#isComplete = true;
    return this.#parts.length === 1 ? (this.#parts[0] as Buffer) : Buffer.concat(this.#parts, this.#length);
  }
}

export class FirstWritesPolicy {
  #notFor = 0;

  /** Whether this first write to a shared object should wait for more. */
  isWorthIt(offset: number, length: number, objectSize: number): boolean {
    if (offset !== 0 || length < LEAST_BYTES || length === objectSize) return false;
    if (this.#notFor === 0) return true;
    this.#notFor--;
    return false;
  }

  /** Call with the number of parts that were gathered for one object. */
  learn(count: number): void {
    this.#notFor = count > 1 ? 0 : OBJECTS_WITHOUT_WAIT;
  }
}
