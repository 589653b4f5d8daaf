/**
 * Whether a control socket can be trusted: the process that answers there claims that disks were snapshotted and deleted, and
 * receives the data of imports. On a machine with other users a path alone proves nothing. Owns the rule about the process at the
 * other end. Never connects.
 *
 * The rule: it runs as this user, as root, or as the owner of the socket's directory, if root has made that directory (so that a
 * group may use the socket of a service). The socket and its directory must belong to one of these users, too.
 */
import fs from 'node:fs';
import path from 'node:path';
import { shellWord } from '../text/shell-word.js';
import { OperationError } from './operations.js';

const ROOT = 0;
const WRITTEN_BY_GROUP_OR_ALL = 0o022;
const WRITTEN_BY_ALL = 0o002;
const ENTERED_BY_ALL = 0o001;
/** In such a directory users cannot rename or remove each other's files: inode(7), S_ISVTX. */
const STICKY = 0o1000;

/** A socket that passed the checks before connecting, and the users that may listen there. */
export interface TrustedSocket {
  /** Without symbolic links: the socket that was checked is the one to connect to. */
  readonly path: string;
  readonly uids: ReadonlySet<number>;
}

/**
 * Check a socket, its directory, and the directory of a link to it, before connecting. Errors: UNTRUSTED; the system's (ENOENT, …)
 * if the socket does not exist.
 */
export function trustedSocket(socketPath: string, self = process.geteuid?.() ?? -1): TrustedSocket {
  const given = path.resolve(socketPath);
  const real = fs.realpathSync(given);
  // A user who can make a link there can choose among all daemons.
  if (real !== given) trustedUids(fs.realpathSync(path.dirname(given)), given, self);
  const directory = path.dirname(real);
  const uids = trustedUids(directory, given, self);
  const { uid, mode } = fs.lstatSync(real);
  if (!uids.has(uid)) throw untrusted(given, `it belongs to uid ${uid}`, uid, self);
  const isOpenToAll = (mode & WRITTEN_BY_ALL) !== 0 && (fs.statSync(directory).mode & ENTERED_BY_ALL) !== 0;
  if (isOpenToAll) {
    throw new OperationError(
      'UNTRUSTED',
      `every user of this machine can send commands to ${given}: 'chmod o-w ${shellWord(real)}' first`,
    );
  }
  return { path: real, uids };
}

/** `uid`: of the process that listens, from the kernel. Errors: UNTRUSTED. */
export function mustBeTrusted(socket: TrustedSocket, uid: number | undefined, self = process.geteuid?.() ?? -1): void {
  if (uid === undefined) {
    throw new OperationError(
      'UNTRUSTED',
      `nothing was sent to the control socket ${socket.path}: the system does not report which user listens there`,
    );
  }
  if (!socket.uids.has(uid)) throw untrusted(socket.path, `uid ${uid} listens there`, uid, self);
}

/** The users that may listen in `directory`, a path without links. Errors: UNTRUSTED. */
function trustedUids(directory: string, socketPath: string, self: number): Set<number> {
  const uids = new Set([self, ROOT]);
  const { uid, mode } = fs.statSync(directory);
  if (isMadeByRoot(directory)) uids.add(uid);
  if (!uids.has(uid)) throw untrusted(socketPath, `its directory belongs to uid ${uid}`, uid, self);
  if ((mode & WRITTEN_BY_ALL) !== 0 && (mode & STICKY) === 0) {
    throw new OperationError(
      'UNTRUSTED',
      `every user of this machine can put a socket in the place of ${socketPath}: 'chmod o-w ${shellWord(directory)}' first`,
    );
  }
  return uids;
}

/** Whether only root can have put a directory of that name there: all above it belongs to root, and only root can change it. */
function isMadeByRoot(directory: string): boolean {
  for (let below = directory; ;) {
    const parent = path.dirname(below);
    if (parent === below) return true;
    const { uid, mode } = fs.statSync(parent);
    // Further up a sticky directory is enough: root's directories in it stay where they are.
    const isSafe = (mode & WRITTEN_BY_GROUP_OR_ALL) === 0 || (below !== directory && (mode & STICKY) !== 0);
    if (uid !== ROOT || !isSafe) return false;
    below = parent;
  }
}

function untrusted(socketPath: string, what: string, uid: number, self: number): OperationError {
  const wayOut =
    self === ROOT
      ? `to use that user's daemon, run 'setpriv --reuid=${uid} --init-groups sheepgate …'`
      : 'if it is not yours, have it removed, and set XDG_RUNTIME_DIR, or give another --control';
  return new OperationError(
    'UNTRUSTED',
    `nothing was sent to the control socket ${socketPath}: ${what}, which is neither this user, nor root, nor the owner of a ` +
      `directory that root has made for the socket; ${wayOut}`,
  );
}
