/**
 * Output that must never block the daemon: the log, and the lines of `serve` on its terminal. The descriptor may be a file, a pipe, a
 * terminal or the journal's socket. Writing neither waits nor fails: lines that the descriptor does not accept now are kept in
 * bounded memory; lines beyond that are dropped and counted, and the count is written as soon as there is room. Never changes the
 * mode of a descriptor, which other processes may share.
 */
import fs from 'node:fs';
import { isWritable, sendNow } from '../../system/socket-calls.js';

/** Bound of the lines that wait to be written. A line has some 200 bytes. */
export const WAITING_BYTES = 2 ** 20;
/** After a drop, lines are accepted again when no more than this waits: so one note counts many lines, not many notes one each. */
const RESUME_BYTES = WAITING_BYTES / 2;
/** At most, in one write. */
const WRITE_BYTES = 64 * 1024;
/** A writable pipe accepts this much without blocking (pipe(7), PIPE_BUF). */
const SURE_BYTES = 4096;
/** Between two attempts; doubled each time. */
const FIRST_RETRY_MS = 1;
const LONGEST_RETRY_MS = 500;

/** The text of the note in place of dropped lines. */
export type DroppedNote = (count: number, why: string) => string;

/**
 * Writes as many bytes as possible without waiting and returns their number; or writes in the background and calls `done`. Errors
 * are thrown, or passed to `done`.
 */
type Outlet = (bytes: Buffer, done: (error: NodeJS.ErrnoException | null, written: number) => void) => number | 'later';

export class LogOutput {
  readonly #fd: number;
  readonly #outlet: Outlet;
  readonly #note: DroppedNote;
  #waiting: Buffer[] = [];
  #waitingBytes = 0;
  #dropped = 0;
  #failure: string | undefined;
  #isWriting = false;
  #timer: NodeJS.Timeout | undefined;
  #retryMs = FIRST_RETRY_MS;
  #drained: (() => void)[] = [];

  constructor(fd: number, note: DroppedNote) {
    this.#fd = fd;
    this.#outlet = outletOf(fd);
    this.#note = note;
  }

  /** Whole lines. Never waits, never throws. */
  write(text: string): void {
    const bytes = Buffer.from(text);
    if (bytes.length > WAITING_BYTES) this.#failure ??= `it was longer than ${WAITING_BYTES} bytes`;
    if (this.#dropped > 0 || this.#waitingBytes + bytes.length > WAITING_BYTES) {
      this.#dropped++;
      // While a write is under way, its end writes the note.
      if (!this.#isDrained()) return;
      this.#tellDropped();
    } else this.#keep(bytes);
    if (this.#timer === undefined) this.#writeOut();
  }

  /** A last attempt before the process ends. pino calls it after a line of level fatal. */
  flushSync(): void {
    this.#writeOut();
    if (!this.#isWriting) return;
    // A background write has the first piece; the others would not follow any more.
    const rest = this.#waiting.splice(1);
    if (rest.length === 0) return;
    this.#waitingBytes = this.#waiting[0]?.length ?? 0;
    try {
      fs.writeSync(this.#fd, Buffer.concat(rest));
    } catch {
      // Dropped, like lines without room.
    }
  }

  /** Wait until all lines are written, at most `ms`; returns whether they are. */
  async drain(ms: number): Promise<boolean> {
    this.#retryMs = FIRST_RETRY_MS;
    this.#writeOut();
    if (this.#isDrained()) return true;
    let timer: NodeJS.Timeout | undefined;
    const late = new Promise<boolean>((resolve) => (timer = setTimeout(resolve, ms, false)));
    const drained = new Promise<boolean>((resolve) => this.#drained.push(() => resolve(true)));
    const isDrained = await Promise.race([late, drained]);
    clearTimeout(timer);
    return isDrained;
  }

  #keep(bytes: Buffer): void {
    this.#waiting.push(bytes);
    this.#waitingBytes += bytes.length;
  }

  #isDrained(): boolean {
    return this.#waitingBytes === 0 && !this.#isWriting;
  }

  #writeOut(): void {
    while (this.#waitingBytes > 0 && !this.#isWriting) {
      const bytes = this.#next();
      this.#isWriting = true;
      try {
        const written = this.#outlet(bytes, (error, count) => {
          this.#written(bytes, error, count);
          if (this.#timer === undefined) this.#writeOut();
        });
        if (written === 'later') return;
        this.#written(bytes, null, written);
      } catch (error) {
        this.#written(bytes, error as Error, 0);
      }
      if (this.#timer !== undefined) return;
    }
  }

  /** The bytes of the next write, as one buffer; they stay first in the queue until they are written. */
  #next(): Buffer {
    let length = 0;
    let count = 0;
    for (const line of this.#waiting) {
      if (count > 0 && length + line.length > WRITE_BYTES) break;
      length += line.length;
      count++;
    }
    const [only] = this.#waiting;
    const bytes = count === 1 && only !== undefined ? only : Buffer.concat(this.#waiting.slice(0, count), length);
    this.#waiting.splice(0, count, bytes);
    return bytes;
  }

  #written(bytes: Buffer, error: NodeJS.ErrnoException | null, count: number): void {
    this.#isWriting = false;
    if (count > 0) {
      this.#waitingBytes -= count;
      if (count === bytes.length) this.#waiting.shift();
      else this.#waiting[0] = bytes.subarray(count);
      this.#retryMs = FIRST_RETRY_MS;
    }
    const code = error?.code;
    const hasFailed = code !== undefined && code !== 'EAGAIN' && code !== 'EINTR';
    if (hasFailed) this.#failure = code;
    if (this.#dropped > 0 && count > 0 && this.#waitingBytes <= RESUME_BYTES) this.#tellDropped();
    if (error !== null || count === 0) this.#retryLater();
    if (!this.#isDrained()) return;
    for (const resolve of this.#drained) resolve();
    this.#drained = [];
  }

  #tellDropped(): void {
    this.#keep(Buffer.from(this.#note(this.#dropped, this.#failure ?? 'nobody read it')));
    this.#dropped = 0;
    this.#failure = undefined;
  }

  #retryLater(): void {
    this.#timer ??= setTimeout(() => {
      this.#timer = undefined;
      this.#writeOut();
    }, this.#retryMs).unref();
    this.#retryMs = Math.min(this.#retryMs * 2, LONGEST_RETRY_MS);
  }
}

function outletOf(fd: number): Outlet {
  let status: fs.Stats;
  try {
    status = fs.fstatSync(fd);
  } catch {
    return () => {
      throw Object.assign(new Error('EBADF: the descriptor is closed'), { code: 'EBADF' });
    };
  }
  if (status.isSocket()) return (bytes) => sendNow(fd, bytes);
  // A write to a file goes to the page cache, but waits when the disk is too slow.
  if (status.isFile()) return (bytes, done) => writeInBackground(fd, bytes, done);
  const own = reopened(fd);
  if (own !== undefined) return (bytes) => fs.writeSync(own, bytes);
  return (bytes, done) => {
    if (!isWritable(fd)) return 0;
    return writeInBackground(fd, bytes.subarray(0, SURE_BYTES), done);
  };
}

/**
 * The pipe or terminal behind a descriptor, opened again as non-blocking: the mode of `fd` itself is shared with all processes that
 * have inherited it. Undefined where that is not allowed, for example after `su`.
 */
function reopened(fd: number): number | undefined {
  const { O_WRONLY, O_NONBLOCK, O_NOCTTY } = fs.constants;
  try {
    return fs.openSync(`/proc/self/fd/${fd}`, O_WRONLY | O_NONBLOCK | O_NOCTTY);
  } catch {
    return undefined;
  }
}

function writeInBackground(
  fd: number,
  bytes: Buffer,
  done: (error: NodeJS.ErrnoException | null, written: number) => void,
): 'later' {
  fs.write(fd, bytes, (error, written) => done(error, written));
  return 'later';
}
