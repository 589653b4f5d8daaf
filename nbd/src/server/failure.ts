/**
 * From what a device threw to what its client is told. It owns the rules of the protocol about error values; whatever is
 * thrown, the answer is an error of the protocol.
 */

import { DeviceError, isDeviceErrorCode, type DeviceErrorCode } from '../block-device.js';
import { systemErrorOf } from '../protocol/system-errors.js';
import { CMD_FLAG, NBD_ERRNO } from '../protocol/wire.js';

/** Why a request failed, for its reply. */
export interface Failure {
  /** NBD error value, not 0. */
  readonly errno: number;
  readonly message: string;
  /** The offset of the failure within the request's range, if known. */
  readonly offset?: number | undefined;
}

/** A request as far as its failure depends on it. */
export interface Asked {
  /** NBD_CMD_* number. */
  readonly type: number;
  readonly flags: number;
  readonly offset: number;
  readonly length: number;
}

/** A failure of the device. */
export interface DeviceFailure extends Failure {
  /** The device said what has happened; otherwise it is a bug, and its text is not sent. */
  readonly isExpected: boolean;
}

const BUG: DeviceFailure = Object.freeze({
  errno: NBD_ERRNO.EIO,
  message: 'internal error of the export',
  isExpected: false,
});

/** The failure to send for what the device threw. Never throws, whatever `error` is. */
export function failureOf(error: unknown, asked: Asked): DeviceFailure {
  try {
    if (error instanceof DeviceError) return deviceFailure(error, asked);
    const told = systemErrorOf(error);
    if (told === undefined) return BUG;
    return { errno: errnoFor(told.code, asked), message: told.message, isExpected: true };
  } catch {
    // A getter or a proxy of the program has thrown.
    return BUG;
  }
}

/** Its fields are checked: it may be of another copy of this package, or have been changed. */
function deviceFailure(error: DeviceError, asked: Asked): DeviceFailure {
  const { code, message, offset }: { code: unknown; message: unknown; offset: unknown } = error;
  const isExpected = isDeviceErrorCode(code);
  // "an offset, which MUST lie within the original offset and length of the request"
  const isInside = isOffset(offset) && offset >= asked.offset && offset - asked.offset < asked.length;
  return {
    errno: isExpected ? errnoFor(code, asked) : NBD_ERRNO.EIO,
    message: typeof message === 'string' ? message : BUG.message,
    offset: isInside ? offset : undefined,
    isExpected,
  };
}

function errnoFor(code: DeviceErrorCode, { flags }: Asked): number {
  // "The server SHOULD NOT return ENOTSUP except … when FAST_ZERO is supported"; "MUST NOT" without the flag.
  if (code === 'ENOTSUP' && (flags & CMD_FLAG.FAST_ZERO) === 0) return NBD_ERRNO.EINVAL;
  return NBD_ERRNO[code];
}

function isOffset(offset: unknown): offset is number {
  return Number.isSafeInteger(offset);
}
