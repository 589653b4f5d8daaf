/**
 * Errors of the operating system, as Node reports them, and the NBD error that each is answered with. It owns that table and
 * the texts that clients get for it: the system's own texts contain paths.
 */

import { constants } from 'node:os';
import { types } from 'node:util';
import type { DeviceErrorCode } from '../block-device.js';

/**
 * By Node's `code`. Those for NBD_ENOSPC are in proto.md, "Error values" ("It also SHOULD map the EDQUOT and EFBIG errors to
 * NBD_ENOSPC"). All others mean EIO.
 */
const NBD_CODES: ReadonlyMap<unknown, DeviceErrorCode> = new Map<unknown, DeviceErrorCode>([
  ['EPERM', 'EPERM'],
  ['EACCES', 'EPERM'],
  ['EROFS', 'EPERM'],
  ['EIO', 'EIO'],
  ['ENOMEM', 'ENOMEM'],
  ['EINVAL', 'EINVAL'],
  ['ENOSPC', 'ENOSPC'],
  ['EDQUOT', 'ENOSPC'],
  ['EFBIG', 'ENOSPC'],
  ['EOVERFLOW', 'EOVERFLOW'],
  ['ENOTSUP', 'ENOTSUP'],
  ['EOPNOTSUPP', 'ENOTSUP'],
  ['ESHUTDOWN', 'ESHUTDOWN'],
]);

const TEXTS: Readonly<Record<DeviceErrorCode, string>> = {
  EPERM: 'the storage behind the export does not permit it',
  EIO: 'the storage behind the export has failed',
  ENOMEM: 'there is not enough memory',
  EINVAL: 'the storage behind the export does not accept it',
  ENOSPC: 'no space is left in the storage behind the export',
  EOVERFLOW: 'a value is too large for the storage behind the export',
  ENOTSUP: 'the storage behind the export does not support it',
  ESHUTDOWN: 'the storage behind the export is being shut down',
};

/** An error of the system as a client is told of it. */
export interface SystemError {
  readonly code: DeviceErrorCode;
  readonly message: string;
}

/** What `error` means to a client if it is an error of the system; undefined if it is none, or one without a meaning. */
export function systemErrorOf(error: unknown): SystemError | undefined {
  // Of any realm: test runners make their own.
  if (!(error instanceof Error || types.isNativeError(error))) return undefined;
  const { code, errno } = error as { readonly code?: unknown; readonly errno?: unknown };
  // Node has no name for EDQUOT: its `code` is "Unknown system error -122".
  const found = NBD_CODES.get(errno === -constants.errno.EDQUOT ? 'EDQUOT' : code);
  return found && { code: found, message: TEXTS[found] };
}
