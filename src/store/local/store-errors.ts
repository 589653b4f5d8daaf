/** Failures of the disk as errors of the store: which of its codes a system error is, and whether the disk itself has failed. */
import { StoreError } from '../object-store.js';
import { reasonBeside } from '../../system/system-error.js';

const SPACE_CODES = new Set(['ENOSPC', 'EDQUOT']);
/** What the kernel says of a disk that fails, is gone, or holds what makes no sense. UNKNOWN is EUCLEAN as Node has it. */
const DISK_CODES = new Set(['EIO', 'ENXIO', 'ENODEV', 'ESTALE', 'EBADMSG', 'EUCLEAN', 'UNKNOWN']);
const PERMISSION_CODES = new Set(['EACCES', 'EPERM', 'EROFS']);

/** Whether this, or what it was made of, is the disk's failure: others may find out next. */
export function isDiskError(error: unknown): boolean {
  const { code, cause } = error as NodeJS.ErrnoException;
  return DISK_CODES.has(code ?? '') || (cause instanceof Error && isDiskError(cause));
}

/** Turn whatever a file operation threw into this layer's error, saying what was being done. */
export function asStoreError(error: unknown, doing: string): StoreError {
  if (error instanceof StoreError) return error;
  const { code } = error as NodeJS.ErrnoException;
  const kind = code && SPACE_CODES.has(code) ? 'NO_SPACE' : code && PERMISSION_CODES.has(code) ? 'PERMISSION' : 'IO';
  return new StoreError(kind, `${doing}: ${reasonBeside(doing, error as Error)}`, { cause: error });
}
