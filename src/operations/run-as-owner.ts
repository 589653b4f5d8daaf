/**
 * Root on a store of another user, such as a service's: that user could not open files that root makes there. A command of root
 * that opens such a store directly therefore takes the uid and gid of the store's directory for as long as the store is open.
 * Owns the identity of this process. Never chowns: another user controls the directory.
 */
import fs from 'node:fs';
import path from 'node:path';
import { shellWord } from '../text/shell-word.js';
import { isSystemError, whatFailed } from '../system/system-error.js';
import { OperationError } from './operations.js';

/** Missing in @types/node. */
type WithGroups = typeof process & { initgroups?(user: number | string, extraGroup: number | string): void };

interface Identity {
  readonly uid: number;
  readonly gid: number;
}

/** The identity that this process has taken, and for how many open stores. */
let taken: (Identity & { readonly store: string; users: number }) | undefined;
/** Number of stores that root has open as root. */
let asRoot = 0;

/** Whether this process is root, and the directory belongs to another user, or will when it is made. */
export function isOthersStore(directory: string): boolean {
  return process.geteuid?.() === 0 && ownerOf(directory).uid !== 0;
}

/**
 * Call before anything in `directory` is touched; call the returned function when the store is closed. Does nothing unless this
 * process is root and the directory belongs, or will belong, to another user. Errors: OWNER (this process has a store of a third
 * user open), PERMISSION.
 */
export function takeOwner(directory: string): () => void {
  if (taken === undefined && process.geteuid?.() !== 0) return () => undefined;
  const owner = ownerOf(directory);
  const { uid } = owner;
  if (taken !== undefined ? taken.uid !== uid : uid !== 0 && asRoot > 0) {
    throw new OperationError(
      'OWNER',
      twoOwners(directory, owner, taken ?? { uid: 0, gid: 0, store: 'the other store' }),
    );
  }
  if (uid === 0) {
    asRoot++;
    return once(() => void asRoot--);
  }
  taken ??= become(owner, directory);
  taken.users++;
  return once(giveBack);
}

/** The owner of a directory. If it does not exist: the owner that it will get, which is that of the nearest directory above. */
function ownerOf(directory: string): Identity & { readonly isThere: boolean } {
  for (let entry = path.resolve(directory); ; entry = path.dirname(entry)) {
    const status = fs.statSync(entry, { throwIfNoEntry: false });
    if (status) return { uid: status.uid, gid: status.gid, isThere: entry === path.resolve(directory) };
  }
}

function twoOwners(
  directory: string,
  { uid, isThere }: Identity & { readonly isThere: boolean },
  other: Identity & { readonly store: string },
): string {
  const both = `${other.store} to uid ${other.uid}, and one command cannot run as both`;
  if (isThere) {
    const others = shellWord(uid === 0 ? other.store : directory);
    return `${directory} belongs to uid ${uid}, ${both}: start the daemon of ${others}, which then does the work there`;
  }
  return (
    `${directory} does not exist and would belong to uid ${uid}, like its parent directory, ${both}: ` +
    `'install -d -m 700 -o ${other.uid} -g ${other.gid} ${shellWord(directory)}' makes a directory of that user`
  );
}

/** Whether this process is root working as another user. */
export function hasTakenOwner(): boolean {
  return taken !== undefined;
}

/** A permission error while root works as another user: the same error, with the reason. Other errors unchanged. */
export function explainIdentity(error: unknown): unknown {
  if (taken === undefined || !isDenied(error)) return error;
  const store = shellWord(taken.store);
  const what = isSystemError(error) ? whatFailed(error) : (error as Error).message;
  return new OperationError(
    'PERMISSION',
    `${what}: while the store ${taken.store} is open, this command works as its owner, uid ${taken.uid}; use a path that ` +
      `this user can access, or start the daemon of ${store}, which then opens the store itself`,
    { cause: error },
  );
}

/** Denied by the system, also while connecting to a daemon. Errors of a store about its own files do not count. */
function isDenied(error: unknown): boolean {
  const { code, cause } = (error ?? {}) as { readonly code?: unknown; readonly cause?: unknown };
  if (code === 'EACCES' || code === 'EPERM') return true;
  if (code === 'UNREACHABLE') return isDenied(cause);
  return code === 'PERMISSION' && error instanceof OperationError && cause === undefined;
}

/** For a daemon, which keeps its user, as its listeners do. Errors: OWNER (root, and the store belongs to another user). */
export function refuseOthersStore(directory: string): void {
  if (process.geteuid?.() !== 0) return;
  const { uid, gid } = ownerOf(directory);
  if (uid === 0) return;
  const own = fs.existsSync(directory)
    ? `to make it root's store: 'chown -hR 0:0 ${shellWord(directory)}'`
    : `to make a store of root: 'mkdir -m 700 ${shellWord(directory)}'`;
  throw new OperationError(
    'OWNER',
    `${directory} belongs to uid ${uid}, who could not open the files that a daemon of root makes there: start the service, ` +
      `or use 'setpriv --reuid=${uid} --regid=${gid} --init-groups sheepgate serve …'; ${own}`,
  );
}

function become({ uid, gid }: Identity, store: string): NonNullable<typeof taken> {
  const groups = process.getgroups?.() ?? [];
  const before = process.getegid?.() ?? 0;
  try {
    try {
      (process as WithGroups).initgroups?.(uid, gid);
    } catch {
      process.setgroups?.([gid]); // a uid without a name
    }
    // libc changes all threads of the process, also those of the thread pool and of lmdb (nptl(7)).
    process.setegid?.(gid);
    process.seteuid?.(uid);
  } catch (error) {
    throw new OperationError(
      'PERMISSION',
      `${store} belongs to uid ${uid}, and this process may not become that user (${(error as Error).message}): use ` +
        `'setpriv --reuid=${uid} --regid=${gid} --init-groups sheepgate …'`,
    );
  }
  restore = () => {
    process.seteuid?.(0);
    process.setegid?.(before);
    process.setgroups?.(groups);
  };
  return { uid, gid, store, users: 0 };
}

let restore: () => void = () => undefined;

function giveBack(): void {
  if (taken === undefined || --taken.users > 0) return;
  taken = undefined;
  restore();
}

function once(work: () => void): () => void {
  let isDone = false;
  return () => {
    if (!isDone) work();
    isDone = true;
  };
}
