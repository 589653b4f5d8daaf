/**
 * Write runs: small writes of one turn of the event loop that are adjacent in an object go to the nodes as one request, because
 * most of what a small write costs a node is the request. Owns the writes collected in this turn; no write waits longer than
 * that.
 */

/** Larger writes are not worth the copying. */
const MAX_PART_BYTES = 16 * 1024;
/** Most bytes of a run: the usual queue depth of 32 in writes of 4 KiB. */
const MAX_RUN_BYTES = 128 * 1024;

interface Part {
  readonly idx: number;
  readonly offset: number;
  readonly data: Buffer;
  readonly resolve: (done: Promise<void>) => void;
}

export class WriteRuns {
  readonly #write: (idx: number, offset: number, data: Buffer) => Promise<void>;
  #parts: Part[] = [];

  constructor(write: (idx: number, offset: number, data: Buffer) => Promise<void>) {
    this.#write = write;
  }

  /** Resolves when it is written. All writes of a run succeed or fail together. */
  write(idx: number, offset: number, data: Buffer): Promise<void> {
    if (data.length > MAX_PART_BYTES) {
      this.#send(); // earlier writes go first
      return this.#write(idx, offset, data);
    }
    if (this.#parts.length === 0) process.nextTick(this.#send);
    return new Promise((resolve) => this.#parts.push({ idx, offset, data, resolve }));
  }

  readonly #send = (): void => {
    const parts = this.#parts;
    if (parts.length === 0) return;
    this.#parts = [];
    if (parts.length === 1) return this.#sendRun(parts);
    const sorted = [...parts].sort((a, b) => a.idx - b.idx || a.offset - b.offset);
    // Of overlapping writes the last must win: keep their order.
    if (sorted.some((part, n) => n > 0 && overlaps(sorted[n - 1] as Part, part))) {
      for (const part of parts) this.#sendRun([part]);
      return;
    }
    let run: Part[] = [];
    let bytes = 0;
    for (const part of sorted) {
      const last = run.at(-1);
      if (last && (part.idx !== last.idx || part.offset !== endOf(last) || bytes + part.data.length > MAX_RUN_BYTES)) {
        this.#sendRun(run);
        run = [];
        bytes = 0;
      }
      run.push(part);
      bytes += part.data.length;
    }
    this.#sendRun(run);
  };

  #sendRun(run: readonly Part[]): void {
    const [first] = run as [Part];
    const data = run.length === 1 ? first.data : Buffer.concat(run.map((part) => part.data));
    const done = this.#write(first.idx, first.offset, data);
    for (const { resolve } of run) resolve(done);
  }
}

function endOf({ offset, data }: Part): number {
  return offset + data.length;
}

/** `a` begins before `b`, or where it does. */
function overlaps(a: Part, b: Part): boolean {
  return a.idx === b.idx && b.offset < endOf(a);
}
