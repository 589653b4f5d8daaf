/**
 * Failures of LMDB and lmdb-js that differ from those of files: errors with a number, a cause that arrives later, a
 * transaction that never begins, an environment that must not be closed. Owns the knowledge of these; metadata-file.ts decides
 * what to do.
 */
import { randomBytes } from 'node:crypto';
import os from 'node:os';
import timers from 'node:timers/promises';
import { StoreError } from '../store-error.js';
import type { Environment } from './lmdb-environment.js';
import { asStoreError } from './store-errors.js';

/** lmdb.h. */
const MDB_MAP_FULL = -30792;
/** lmdb.h: the page that makes a commit valid could not be written; LMDB must be opened again. */
const MDB_PANIC = -30795;
/** lmdb-js reports the cause of a failed commit after the failure itself: immediately, but without a guarantee. */
const COMMIT_ERROR_MS = 5000;
/**
 * lmdb-js does not report that a transaction could not begin (ENOMEM, a broken lock): its promise never settles. Normally a
 * transaction begins when a thread starts on it, or a few seconds later (lmdb-js tries a lock again four times). The limit is
 * counted in steps of a timer: a process that was stopped for a while loses one step, not the whole time.
 */
const BEGIN_STEPS = 6;
const BEGIN_STEP_MS = 1000;

/** A handler of 'exit': skips the rest of Node's exit, which would make lmdb-js close the environment. */
export function endWithoutClosing(): void {
  process.exit();
}

/** Call `late` if a transaction has not begun although a thread must have started on it. Returns a function that stops watching. */
export function watchBegin(hasBegun: () => boolean, late: () => void): () => void {
  let steps = 0;
  let isTakenUp = false;
  const timer = setInterval(() => {
    // Threads start on work in order, and may all be busy with a slow disk: this work comes after the transaction's.
    if (steps === 0) randomBytes(1, () => (isTakenUp = true));
    if (hasBegun()) return clearInterval(timer);
    if (steps === 0 || isTakenUp) steps++;
    if (steps <= BEGIN_STEPS) return;
    clearInterval(timer);
    late();
  }, BEGIN_STEP_MS);
  return () => clearInterval(timer);
}

/** The cause of a failed commit: lmdb-js rejects with an error without it, and with a promise that rejects with it later. */
export async function commitErrorOf(error: unknown): Promise<unknown> {
  const { commitError } = error as { commitError?: Promise<unknown> };
  if (commitError === undefined) return error;
  try {
    return await Promise.race([commitError, timers.setTimeout(COMMIT_ERROR_MS, error, { ref: false })]);
  } catch (cause) {
    return cause;
  }
}

/** MDB_PANIC: a new transaction would never begin, and a later close would never end. */
export function hasPanicked(env: Environment): boolean {
  try {
    env.get('format');
    return false;
  } catch (error) {
    return (error as { code?: unknown }).code === MDB_PANIC;
  }
}

/** An error of LMDB, which has the errno as a number, or of files, as a StoreError. `doing`: for the message. */
export function asMetadataError(error: unknown, doing: string): StoreError {
  const { code, message } = error as { code?: unknown; message?: string };
  if (error instanceof StoreError || typeof code !== 'number') return asStoreError(error, doing);
  if (code === MDB_MAP_FULL) return new StoreError('NO_SPACE', `${doing}: ${message}`, { cause: error });
  const name = Object.entries(os.constants.errno).find(([, errno]) => errno === code)?.[0];
  return asStoreError(Object.assign(new Error(message, { cause: error }), { code: name }), doing);
}
