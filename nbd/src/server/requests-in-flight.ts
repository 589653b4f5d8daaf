/**
 * The requests of one connection that its device works on: their number, their memory, and the results of those that are done.
 * It owns these counts and the translation of a device's errors; it calls no device.
 */

import { DeviceError } from '../block-device.js';
import { CMD_FLAG, NBD_ERRNO } from '../protocol/wire.js';
import type { Failure } from './reply-queue.js';
import type { TransmissionHost } from './transmission-host.js';

export class RequestsInFlight {
  count = 0;
  /** Bytes of memory that they hold: data read or written, extents of block statuses. */
  bytes = 0;
  /** Requests answered with an error. */
  errors = 0;
  /** Data of reads and writes that succeeded, bytes. */
  bytesRead = 0;
  bytesWritten = 0;

  readonly #host: TransmissionHost;

  constructor(
    host: TransmissionHost,
    /** To be called when a request has ended: replies are to be sent, and there is room for others. */
    readonly settled: () => void,
  ) {
    this.#host = host;
  }

  begin(bytes: number): void {
    this.count++;
    this.bytes += bytes;
  }

  end(bytes: number): void {
    this.count--;
    this.bytes -= bytes;
  }

  /** The failure to send for an error of the device. Anything but a DeviceError is a bug: it is reported, its text not sent. */
  failureOf(
    error: unknown,
    asked: { readonly flags: number; readonly offset: number; readonly length: number },
  ): Failure {
    if (!(error instanceof DeviceError)) {
      this.#host.observer.onDeviceError?.(error, { id: this.#host.id, exportName: this.#host.exportName });
      return { errno: NBD_ERRNO.EIO, message: 'internal error of the export' };
    }
    const { code, message } = error;
    // "The server SHOULD NOT return ENOTSUP except … when FAST_ZERO is supported"; "MUST NOT" without the flag.
    const isUnexpected = code === 'ENOTSUP' && (asked.flags & CMD_FLAG.FAST_ZERO) === 0;
    // "an offset, which MUST lie within the original offset and length of the request"
    const at = error.offset;
    const isInside = at !== undefined && at >= asked.offset && at - asked.offset < asked.length;
    return { errno: isUnexpected ? NBD_ERRNO.EINVAL : NBD_ERRNO[code], message, offset: isInside ? at : undefined };
  }
}

/** Whether a device answers later. */
export function isPromise(answer: unknown): answer is Promise<unknown> {
  return answer instanceof Promise || (typeof answer === 'object' && answer !== null && 'then' in answer);
}
