/**
 * Root on a store of another user, a service's: what root would make there that user could not open. So a command that
 * opens such a store itself takes the uid and gid of the store's directory for as long as it has it open. Owns the identity
 * of this process. Nothing is ever chowned: the directory is controlled by somebody else.
 */
import fs from 'node:fs';
import path from 'node:path';
import { shellWord } from '../store/shell-word.js';
import { OperationError } from './operations.js';

/** What @types/node does not know. */
type WithGroups = typeof process & { initgroups?(user: number | string, extraGroup: number | string): void };

interface Identity {
  readonly uid: number;
  readonly gid: number;
}

/** Whose identity this process has taken, and for how many open stores. */
let taken: (Identity & { readonly store: string; users: number }) | undefined;
/** Stores that root has open as root. */
let asRoot = 0;

/** Who has the directory; if it is still to be made, who has the nearest one above that is there, and will look for it. */
function ownerOf(directory: string): Identity {
  for (let at = path.resolve(directory); ; at = path.dirname(at)) {
    const status = fs.statSync(at, { throwIfNoEntry: false });
    if (status !== undefined) return { uid: status.uid, gid: status.gid };
    if (at === path.dirname(at)) return { uid: 0, gid: 0 };
  }
}

/**
 * To be called before anything in `directory` is touched; returns what to call when it is closed. Does nothing unless this is
 * root and the directory is, or will be, another user's. Errors: OWNER if this process has a store of a third user open; PERMISSION.
 */
export function takeOwner(directory: string): () => void {
  if (taken === undefined && process.geteuid?.() !== 0) return () => undefined;
  const { uid, gid } = ownerOf(directory);
  if (taken !== undefined ? taken.uid !== uid : uid !== 0 && asRoot > 0) {
    throw new OperationError(
      'OWNER',
      `${directory} belongs to another user than ${taken?.store ?? 'the other store'}, and this command would have to be ` +
        'both: start a daemon for one of them, which then does the work on it',
    );
  }
  if (uid === 0) {
    asRoot++;
    return once(() => void asRoot--);
  }
  taken ??= become({ uid, gid }, directory);
  taken.users++;
  return once(giveBack);
}

/** Who lacks a permission that root has is told why it is not root at that moment. */
export function explainIdentity(error: unknown): unknown {
  const { code, message } = error as NodeJS.ErrnoException;
  if (taken === undefined || (code !== 'EACCES' && code !== 'EPERM')) return error;
  return new OperationError(
    'PERMISSION',
    `${message}: this command works as uid ${taken.uid}, the owner of the store ${taken.store}, while it has that open; ` +
      'use a place that this user may write to, or start the daemon, which then has the store',
    { cause: error },
  );
}

/** A daemon stays what it is, and its listeners with it. Errors: OWNER if it is root and the store another user's. */
export function refuseOthersStore(directory: string): void {
  if (process.geteuid?.() !== 0) return;
  const { uid, gid } = ownerOf(directory);
  if (uid === 0) return;
  const own = fs.existsSync(directory)
    ? `if it is to be root's store from now on: 'chown -hR 0:0 ${shellWord(directory)}'`
    : `if it is to be root's store: 'mkdir -m 700 ${shellWord(directory)}'`;
  throw new OperationError(
    'OWNER',
    `${directory} belongs to the user with uid ${uid}, who could not open what a daemon of root makes there: ` +
      `start the service, or say 'setpriv --reuid=${uid} --regid=${gid} --init-groups sheepgate serve …'; ${own}`,
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
    // libc tells every thread of the process, those of the thread pool and of lmdb among them (nptl(7)).
    process.setegid?.(gid);
    process.seteuid?.(uid);
  } catch (error) {
    throw new OperationError(
      'PERMISSION',
      `${store} belongs to the user with uid ${uid}, and this process may not become that (${(error as Error).message}): ` +
        `say 'setpriv --reuid=${uid} --regid=${gid} --init-groups sheepgate …'`,
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
