/**
 * How LMDB and lmdb-js fail, where that is not as files do: errors with a number, causes that come later, a transaction that
 * never begins, an environment that must not be closed. Owns the knowledge of that; what follows from it is decided in
 * metadata-file.ts.
 */
import { randomBytes } from 'node:crypto';
import os from 'node:os';
import timers from 'node:timers/promises';
import { StoreError } from '../object-store.js';
import type { Environment } from './lmdb-environment.js';
import { asStoreError } from './store-errors.js';

/** lmdb.h. */
const MDB_MAP_FULL = -30792;
/** lmdb.h: the page that makes a commit valid could not be written; nothing works any more until it is opened anew. */
const MDB_PANIC = -30795;
/** lmdb-js tells why a commit failed after it has told that it failed: at once, but nobody promises that. */
const COMMIT_ERROR_MS = 5000;
/**
 * lmdb-js tells nobody that a transaction could not begin (ENOMEM, a lock of it that is broken): what waits for it waits for
 * ever. It begins as soon as a thread takes it up, or a few seconds later (lmdb-js tries a lock again four times). Counted in
 * steps: a process that was stopped for a while has lost one of them, and not its time.
 */
const BEGIN_STEPS = 6;
const BEGIN_STEP_MS = 1000;

/** Called while the process ends, this leaves out what Node does then: it would have lmdb-js close the environment. */
export function endWithoutClosing(): void {
  process.exit();
}

/** Calls `late` if what a thread has to begin has not begun, although one must have taken it up. Returns how to stop watching. */
export function watchBegin(hasBegun: () => boolean, late: () => void): () => void {
  let steps = 0;
  let isTakenUp = false;
  const timer = setInterval(() => {
    // Threads take up in order what is handed to them; they may all be busy with a slow disk.
    if (steps === 0) randomBytes(1, () => (isTakenUp = true));
    if (hasBegun()) return clearInterval(timer);
    if (steps === 0 || isTakenUp) steps++;
    if (steps <= BEGIN_STEPS) return;
    clearInterval(timer);
    late();
  }, BEGIN_STEP_MS);
  return () => clearInterval(timer);
}

/** lmdb-js rejects a commit with an error that says nothing, and with a promise that is rejected with the cause later. */
export async function commitErrorOf(error: unknown): Promise<unknown> {
  const { commitError } = error as { commitError?: Promise<unknown> };
  if (commitError === undefined) return error;
  try {
    return await Promise.race([commitError, timers.setTimeout(COMMIT_ERROR_MS, error, { ref: false })]);
  } catch (cause) {
    return cause;
  }
}

/** To begin a transaction then would never end, and neither would closing after that. */
export function hasPanicked(env: Environment): boolean {
  try {
    env.get('format');
    return false;
  } catch (error) {
    return (error as { code?: unknown }).code === MDB_PANIC;
  }
}

/** LMDB's errors, which have the errno as a number, and those of files. */
export function asMetadataError(error: unknown, doing: string): StoreError {
  const { code, message } = error as { code?: unknown; message?: string };
  if (error instanceof StoreError || typeof code !== 'number') return asStoreError(error, doing);
  if (code === MDB_MAP_FULL) return new StoreError('NO_SPACE', `${doing}: ${message}`, { cause: error });
  const name = Object.entries(os.constants.errno).find(([, errno]) => errno === code)?.[0];
  return asStoreError(Object.assign(new Error(message, { cause: error }), { code: name }), doing);
}
