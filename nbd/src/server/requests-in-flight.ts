/**
 * The requests of one connection that its device works on: their number, their memory, and the results of those that are done.
 * It owns these counts, and tells the observer of results and errors; it calls no device.
 */

import { CMD, commandName, errorName, NBD_ERRNO } from '../protocol/wire.js';
import { failureOf, type Asked, type Failure } from './failure.js';
import type { TransmissionHost } from './transmission-host.js';

const GIVEN_UP: Failure = Object.freeze({ errno: NBD_ERRNO.EIO, message: 'the client seemed to be gone' });

export class RequestsInFlight {
  count = 0;
  /** Bytes of memory that they hold: data read or written, extents of block statuses. */
  bytes = 0;
  /** Requests answered with an error. */
  errors = 0;
  /** Data of reads and writes that succeeded, bytes. */
  bytesRead = 0;
  bytesWritten = 0;
  /** Whether somebody wants to know of each request that is done: only then their times are taken. */
  readonly areObserved: boolean;

  readonly #host: TransmissionHost;

  constructor(
    host: TransmissionHost,
    /** To be called when a request has ended: replies are to be sent, and there is room for others. */
    readonly settled: () => void,
  ) {
    this.#host = host;
    this.areObserved = host.observer.onRequestDone !== undefined;
  }

  begin(bytes: number): void {
    this.count++;
    this.bytes += bytes;
  }

  end(bytes: number): void {
    this.count--;
    this.bytes -= bytes;
  }

  /** The failure to send for an error of the device, which is reported. Never throws. */
  failureOf(error: unknown, asked: Asked): Failure {
    // Work that is given up for a client that is gone is no error, and nobody gets the answer.
    if (this.#host.clientSignal.isCauseOf(error)) return GIVEN_UP;
    const failure = failureOf(error, asked);
    const { id, peer, exportName, observer } = this.#host;
    // ENOTSUP goes out only to a client that asks whether zeroing is fast: it is an answer.
    if (failure.errno !== NBD_ERRNO.ENOTSUP) {
      const hasRange = asked.type !== CMD.FLUSH;
      observer.onError(error, {
        ...{ id, peer, exportName, source: 'device', command: commandName(asked.type) },
        ...(hasRange && { offset: asked.offset, length: asked.length }),
        expected: failure.isExpected,
      });
    }
    return failure;
  }

  /** When a request begins, for `done`. */
  get now(): number {
    return this.areObserved ? performance.now() : 0;
  }

  /** A request is answered. Only to be called if `areObserved`. `errno`: 0 for success. */
  done(asked: Asked, startedAt: number, errno: number): void {
    this.#tell(asked, performance.now() - startedAt, errno, false);
  }

  /** A request is answered without the device: refused with `errno`, or one of no bytes. */
  answered(asked: Asked, errno: number): void {
    if (errno !== 0) this.errors++;
    if (this.areObserved) this.#tell(asked, 0, errno, errno !== 0);
  }

  #tell({ type, flags, offset, length }: Asked, durationMs: number, errno: number, isRefused: boolean): void {
    const error = errno === 0 ? undefined : errorName(errno);
    const range = { offset, length };
    this.#host.observer.onRequestDone?.({
      ...{ id: this.#host.id, command: commandName(type), flags, ...range, durationMs, error, isRefused },
    });
  }
}
