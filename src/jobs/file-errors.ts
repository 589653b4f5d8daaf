/** Turns errors of the operating system about a file that the operator has named into OperationErrors. */
import { isSystemError, systemMessage } from '../system/system-error.js';
import { OperationError } from '../operations/operations.js';

const SPACE_CODES = new Set(['ENOSPC', 'EDQUOT']);
const PERMISSION_CODES = new Set(['EACCES', 'EPERM', 'EROFS']);

/** `file`: for calls whose error does not name the file. Any other error is returned unchanged. */
export function asFileError(error: unknown, file?: string): unknown {
  if (!isSystemError(error)) return error;
  const { code } = error;
  const kind = SPACE_CODES.has(code) ? 'NO_SPACE' : PERMISSION_CODES.has(code) ? 'PERMISSION' : 'BAD_FILE';
  return new OperationError(kind, systemMessage(error, file), { cause: error });
}
