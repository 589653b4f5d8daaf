/**
 * Default paths: the store, the runtime directory, the NBD and control sockets. Owns the defaults, and the rules for the directories
 * of sockets. The daemon and the commands both use them, and so find each other.
 */
import { createHash } from 'node:crypto';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { makeDirectory } from '../system/make-directory.js';
import { directoryOf, kindOf } from '../store/locations.js';
import { nodeFiles } from '../system/node-files.js';
import { reasonOf } from '../system/system-error.js';
import { OperationError } from './operations.js';

type Environment = Readonly<Record<string, string | undefined>>;

const CONTROL_SOCKET = 'control.sock';

/** The local store if neither --store nor SHEEPGATE_STORE is given. */
export function defaultStore(env: Environment = process.env, uid = process.getuid?.() ?? -1): string {
  if (env.XDG_DATA_HOME) return path.join(env.XDG_DATA_HOME, 'sheepgate');
  if (uid === 0) return '/var/lib/sheepgate';
  return path.join(env.HOME || os.homedir(), '.local/share/sheepgate');
}

/** Where the clients of clusters are remembered: $SHEEPGATE_STATE, systemd's StateDirectory=, or this user's state directory. */
export function stateDirectory(env: Environment = process.env, uid = process.getuid?.() ?? -1): string {
  if (env.SHEEPGATE_STATE) return env.SHEEPGATE_STATE;
  // systemd.exec(5): several directories are separated by colons.
  const ofUnit = env.STATE_DIRECTORY?.split(':')[0];
  if (ofUnit) return path.join(ofUnit, 'clusters');
  if (env.XDG_STATE_HOME) return path.join(env.XDG_STATE_HOME, 'sheepgate');
  // Not in /var/lib/sheepgate: that is a store.
  if (uid === 0) return '/var/lib/sheepgate-clusters';
  return path.join(env.HOME || os.homedir(), '.local/state/sheepgate');
}

/**
 * The directory for this user's sockets: in $XDG_RUNTIME_DIR; for root in /run; for others in /run/user/UID, which systemd makes and
 * which cron jobs and `su` do not have in their environment; else below the temporary directory.
 */
export function runtimeDirectory(env: Environment = process.env, uid = process.getuid?.() ?? -1): string {
  return path.join(runtimeBase(env, uid), 'sheepgate');
}

function runtimeBase(env: Environment = process.env, uid = process.getuid?.() ?? -1): string {
  if (env.XDG_RUNTIME_DIR) return env.XDG_RUNTIME_DIR;
  if (uid === 0) return '/run';
  const ofSession = `/run/user/${uid}`;
  if (fs.lstatSync(ofSession, { throwIfNoEntry: false })?.uid === uid) return ofSession;
  return path.join(os.tmpdir(), `sheepgate-${uid}`);
}

/** Where `serve` listens for NBD clients without --listen: where other users cannot connect. */
export function defaultListeners(env: Environment = process.env, uid = process.getuid?.() ?? -1): string[] {
  return [`unix:${path.join(runtimeDirectory(env, uid), 'nbd.sock')}`];
}

/**
 * The control socket of a store: in a local store itself, so that its path is known from the store's; for a cluster in the runtime
 * directory, named after the nodes as they were given.
 */
export function controlSocketOf(store: string): string {
  const directory = directoryOf(store);
  if (directory === undefined) return path.join(runtimeDirectory(), `${kindOf(store).name}-${idOf(store)}.sock`);
  return path.join(path.resolve(directory), CONTROL_SOCKET);
}

/** The control socket of a local store in which no socket can be made (read-only filesystem). */
export function controlSocketElsewhere(store: string): string {
  return path.join(runtimeDirectory(), `store-${idOf(store)}.sock`);
}

function idOf(store: string): string {
  return createHash('sha256').update(store).digest('hex').slice(0, 16);
}

/**
 * Make the directory for a socket, for this user only. An existing directory is not changed; but the runtime directory must belong to
 * us: another user may have made it first, or be able to replace our socket. Errors: PERMISSION.
 */
export function makeSocketDirectory(directory: string, uid = process.geteuid?.() ?? -1): void {
  const runtime = runtimeDirectory();
  const isOurs = directory === runtime || directory.startsWith(`${runtime}/`);
  // Checked before anything is made in it.
  if (isOurs) mustBeOurs(runtimeBase(), uid);
  try {
    makeDirectory(nodeFiles, directory, 0o700);
  } catch (error) {
    throw new OperationError(
      'PERMISSION',
      `cannot make the directory ${directory} for a socket: ${reasonOf(error as Error)}`,
    );
  }
  if (!isOurs) return;
  mustBeOurs(runtimeBase(), uid);
  mustBeOurs(runtime, uid);
}

/** A directory that does not exist passes. Errors: PERMISSION. */
function mustBeOurs(directory: string, uid: number): void {
  // A link that the environment names is followed; another user may have put any other link there.
  const isGiven = directory === process.env.XDG_RUNTIME_DIR;
  const status = (isGiven ? fs.statSync : fs.lstatSync)(directory, { throwIfNoEntry: false });
  if (!status) return;
  // In root's /run, and in a sticky directory such as /tmp, no other user can remove or rename our files.
  const isRoots = status.uid === 0 && ((status.mode & 0o022) === 0 || (status.mode & 0o1000) !== 0);
  if (status.isDirectory() && (isRoots || (status.uid === uid && (status.mode & 0o022) === 0))) return;
  throw new OperationError(
    'PERMISSION',
    `${directory} is not a directory that only this user can write to; remove it, or set XDG_RUNTIME_DIR, or --listen and ` +
      '--control, to have the sockets elsewhere',
  );
}
