/** Errors of the operating system about a file that the operator has named, as the expected failures that they are. */
import { isSystemError, systemMessage } from '../system/system-error.js';
import { OperationError } from '../operations/operations.js';

const SPACE_CODES = new Set(['ENOSPC', 'EDQUOT']);
const PERMISSION_CODES = new Set(['EACCES', 'EPERM', 'EROFS']);

/** `file`: where the call does not say it. What is no error of the system stays as it is. */
export function asFileError(error: unknown, file?: string): unknown {
  if (!isSystemError(error)) return error;
  const { code } = error;
  const kind = SPACE_CODES.has(code) ? 'NO_SPACE' : PERMISSION_CODES.has(code) ? 'PERMISSION' : 'BAD_FILE';
  return new OperationError(kind, systemMessage(error, file), { cause: error });
}
