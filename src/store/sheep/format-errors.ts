/** What bytes that Sheepdog does not write (FormatError) mean to users of a store. */
import { FormatError } from '../../sheepdog/format-error.js';
import { StoreError, type StoreErrorCode } from '../store-error.js';

/** Errors: StoreError `code` in place of FormatError; any other as it is. */
export function decodedOr<T>(code: StoreErrorCode, decode: () => T): T {
  try {
    return decode();
  } catch (error) {
    throw inStoreTerms(code, error);
  }
}

/** The same for what is read while it is decoded. */
export async function readOr<T>(code: StoreErrorCode, read: () => Promise<T>): Promise<T> {
  try {
    return await read();
  } catch (error) {
    throw inStoreTerms(code, error);
  }
}

function inStoreTerms(code: StoreErrorCode, error: unknown): unknown {
  return error instanceof FormatError ? new StoreError(code, error.message, { cause: error }) : error;
}
