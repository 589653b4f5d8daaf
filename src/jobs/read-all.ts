/** Reading files that must not end early: one that does was changed while it was read. */
import { OperationError } from '../operations/operations.js';
import type { OpenFile } from '../system/open-file.js';

/** Fill `into`. Errors: CHANGED (the file ends before). */
export async function readAll(file: OpenFile, into: Buffer, offset: number): Promise<void> {
  const count = await file.readToEnd(into, offset);
  if (count === into.length) return;
  throw new OperationError('CHANGED', `the file became shorter while it was read: it ends at ${offset + count}`);
}
