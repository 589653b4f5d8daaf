/**
 * Where things are when nobody says otherwise: the store, the runtime directory, the control socket of a store. Owns the
 * defaults and the rules for private directories; the daemon and the command line both ask here, so that they meet.
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

/** The local store that is used if neither --store nor SHEEPGATE_STORE is given. */
export function defaultStore(env: Environment = process.env, uid = process.getuid?.() ?? -1): string {
  if (env.XDG_DATA_HOME) return path.join(env.XDG_DATA_HOME, 'sheepgate');
  if (uid === 0) return '/var/lib/sheepgate';
  return path.join(env.HOME || os.homedir(), '.local/share/sheepgate');
}

/** What is remembered of a cluster's clients: $SHEEPGATE_STATE, systemd's StateDirectory=, or this user's place for state. */
export function stateDirectory(env: Environment = process.env, uid = process.getuid?.() ?? -1): string {
  if (env.SHEEPGATE_STATE) return env.SHEEPGATE_STATE;
  // systemd.exec(5): several are separated by colons.
  const ofUnit = env.STATE_DIRECTORY?.split(':')[0];
  if (ofUnit) return path.join(ofUnit, 'clusters');
  if (env.XDG_STATE_HOME) return path.join(env.XDG_STATE_HOME, 'sheepgate');
  // Not in /var/lib/sheepgate: that is a store.
  if (uid === 0) return '/var/lib/sheepgate-clusters';
  return path.join(env.HOME || os.homedir(), '.local/state/sheepgate');
}

/**
 * The directory for sockets of this user: $XDG_RUNTIME_DIR, /run for root; for others what systemd has made for them, which
 * cron jobs and `su` are not told of, or else one below the temporary directory.
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

/** Where `serve` listens for NBD clients if no --listen is given: where other users cannot connect. */
export function defaultListeners(env: Environment = process.env, uid = process.getuid?.() ?? -1): string[] {
  return [`unix:${path.join(runtimeDirectory(env, uid), 'nbd.sock')}`];
}

/**
 * In the store itself: whoever knows the store finds its daemon, and every store has one of its own. A cluster's is in the
 * runtime directory, under the nodes as they were given.
 */
export function controlSocketOf(store: string): string {
  const directory = directoryOf(store);
  if (directory === undefined) return path.join(runtimeDirectory(), `${kindOf(store).name}-${idOf(store)}.sock`);
  return path.join(path.resolve(directory), CONTROL_SOCKET);
}

/** Of a store that no socket can be made in. */
export function controlSocketElsewhere(store: string): string {
  return path.join(runtimeDirectory(), `store-${idOf(store)}.sock`);
}

function idOf(store: string): string {
  return createHash('sha256').update(store).digest('hex').slice(0, 16);
}

/**
 * Make the directory that a socket goes into, for this user only. What exists stays as it is, except that the runtime
 * directory must really be ours: others may have made it first, or be able to put a socket in the place of ours. Errors:
 * PERMISSION.
 */
export function makeSocketDirectory(directory: string, uid = process.geteuid?.() ?? -1): void {
  const runtime = runtimeDirectory();
  const isOurs = directory === runtime || directory.startsWith(`${runtime}/`);
  // Before anything is made in it.
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

/** Nothing is wrong with a directory that is not there. Errors: PERMISSION. */
function mustBeOurs(directory: string, uid: number): void {
  // A link that we were given is as good as what it leads to; one that somebody else can have put there is not.
  const isGiven = directory === process.env.XDG_RUNTIME_DIR;
  const status = (isGiven ? fs.statSync : fs.lstatSync)(directory, { throwIfNoEntry: false });
  if (!status) return;
  // In root's /run, or in a directory as /tmp is, nobody can touch what is ours.
  const isRoots = status.uid === 0 && ((status.mode & 0o022) === 0 || (status.mode & 0o1000) !== 0);
  if (status.isDirectory() && (isRoots || (status.uid === uid && (status.mode & 0o022) === 0))) return;
  throw new OperationError(
    'PERMISSION',
    `${directory} is not a directory that only this user can write to; remove it, or set XDG_RUNTIME_DIR, or --listen and ` +
      '--control, to have the sockets elsewhere',
  );
}
