/** System errors as StoreErrors: their codes, and whether the disk itself has failed. */
import { StoreError } from '../store-error.js';
import { reasonBeside } from '../../system/system-error.js';

const SPACE_CODES = new Set(['ENOSPC', 'EDQUOT']);
/** The kernel's codes for a disk that fails, is gone, or has invalid content. Node reports EUCLEAN as UNKNOWN. */
const DISK_CODES = new Set(['EIO', 'ENXIO', 'ENODEV', 'ESTALE', 'EBADMSG', 'EUCLEAN', 'UNKNOWN']);
const PERMISSION_CODES = new Set(['EACCES', 'EPERM', 'EROFS']);

/** Whether this error, or its cause, is a failure of the disk: other files may fail next. */
export function isDiskError(error: unknown): boolean {
  const { code, cause } = error as NodeJS.ErrnoException;
  return DISK_CODES.has(code ?? '') || (cause instanceof Error && isDiskError(cause));
}

/** An error of a file operation as a StoreError whose message begins with `doing`: NO_SPACE, PERMISSION or IO. */
export function asStoreError(error: unknown, doing: string): StoreError {
  if (error instanceof StoreError) return error;
  const { code } = error as NodeJS.ErrnoException;
  const kind = code && SPACE_CODES.has(code) ? 'NO_SPACE' : code && PERMISSION_CODES.has(code) ? 'PERMISSION' : 'IO';
  return new StoreError(kind, `${doing}: ${reasonBeside(doing, error as Error)}`, { cause: error });
}
