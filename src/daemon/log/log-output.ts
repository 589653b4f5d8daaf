/**
 * Where lines go that nobody may have to wait for: the log, and what `serve` says on its terminal. The descriptor is whatever
 * the daemon was started with: a file, a pipe, a terminal, the journal's socket. Owns that writing to it neither waits nor
 * fails: what it does not take now is kept in bounded memory, what has no room there is counted, and the count is told as soon
 * as there is room. Changes no mode of a descriptor that others share.
 */
import fs from 'node:fs';
import { isWritable, sendNow } from '../../system/socket-calls.js';

/** What may wait to be written. A line has some 200 bytes. */
export const WAITING_BYTES = 2 ** 20;
/** After lines were dropped, none is taken before so much has left: one note of many lines, not many of one. */
const RESUME_BYTES = WAITING_BYTES / 2;
/** In one write. */
const WRITE_BYTES = 64 * 1024;
/** A pipe that is writable takes as much without waiting (pipe(7), PIPE_BUF). */
const SURE_BYTES = 4096;
/** Between two attempts, doubled each time. */
const FIRST_RETRY_MS = 1;
const LONGEST_RETRY_MS = 500;

/** The note in place of lines that were dropped. */
export type DroppedNote = (count: number, why: string) => string;

/**
 * Writes as much as is possible at once and returns how much that was, or writes in the background and says then how that
 * went. Errors are thrown, or handed on.
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
      // Nothing leaves after which it could be told.
      if (!this.#isDrained()) return;
      this.#tellDropped();
    } else this.#keep(bytes);
    if (this.#timer === undefined) this.#writeOut();
  }

  /** A last attempt, for a process that is about to die. pino calls it after a line of level fatal. */
  flushSync(): void {
    this.#writeOut();
    if (!this.#isWriting) return;
    // A file's thread has the first piece already; nobody is left to give it the others.
    const rest = this.#waiting.splice(1);
    if (rest.length === 0) return;
    this.#waitingBytes = this.#waiting[0]?.length ?? 0;
    try {
      fs.writeSync(this.#fd, Buffer.concat(rest));
    } catch {
      // As lines that have no room.
    }
  }

  /** Whether all is written within `ms`. */
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

  /** What is written next, in one piece; it stays the first that waits. */
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
  // The page cache takes what a file gets, but not while its disk is too slow.
  if (status.isFile()) return (bytes, done) => writeInBackground(fd, bytes, done);
  const own = reopened(fd);
  if (own !== undefined) return (bytes) => fs.writeSync(own, bytes);
  return (bytes, done) => {
    if (!isWritable(fd)) return 0;
    return writeInBackground(fd, bytes.subarray(0, SURE_BYTES), done);
  };
}

/**
 * The pipe or terminal behind a descriptor, once more, in a mode of ours: a mode is shared with everybody who has inherited the
 * descriptor. Undefined where that is not allowed, as after `su`.
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
