/**
 * Decides whether the store's daemon or this process does an operation. Owns the order in which the two are tried, and the messages
 * if neither is possible. Loads the code for one of them only when it is chosen: with a daemon a command needs no store, and a
 * short command spends most of its time on loading.
 */
import fs from 'node:fs';
import path from 'node:path';
import type { Holder, StoreLockedError } from '../store/local/store-lock.js';
import { StoreError } from '../store/store-error.js';
import { CLUSTER, directoryOf, LOCAL, type StoreOptions } from '../store/locations.js';
import type { ControlClient } from './control-client.js';
import type { StatusAnswer } from './control-protocol.js';
import { OperationError, type Operations } from './operations.js';
import { controlSocketOf } from './default-paths.js';
import { checkSocketPath } from './socket-address.js';
import { socketState } from './socket-state.js';

/**
 * How long to wait for a store whose holder does not listen on the control socket: a command that is done in a moment, or a
 * daemon that is starting or stopping. The time starts again when another process gets the lock, so that several commands that
 * are started together all succeed.
 */
const LOCK_WAIT_MS = 3_000;
/** In all, however many processes come first. */
const MAX_LOCK_WAIT_MS = 30_000;
const LOCK_POLL_MS = 50;

export interface StoreLocation {
  /** The store's directory, or a cluster's location. */
  readonly store: string;
  /** The operator named the store: a daemon that serves another one is an error. */
  readonly isStoreGiven: boolean;
  /** Whether a missing store may be created. */
  readonly mayCreate: boolean;
  /** The daemon's control socket, if it is not in the store. */
  readonly control: string | undefined;
  /** With any of these the store is opened directly, even if a daemon runs. */
  readonly options?: StoreOptions;
  /** Called with lines for the operator that are not part of any result. */
  readonly log?: (line: string, details?: object) => void;
}

/**
 * Operations on a store: through its daemon if one listens, else directly. With --control a daemon must listen there. Errors:
 * UNREACHABLE (--control without a daemon), LOCKED, OTHER_STORE, UNTRUSTED, BAD_USAGE, and those of opening the store.
 */
export async function openOperations(location: StoreLocation): Promise<Operations> {
  const socketPath = location.control ?? controlSocketOf(location.store);
  checkSocketPath(path.resolve(socketPath));
  // These options only change how this process reads, and are safe beside a daemon.
  if (location.options !== undefined) return directly(location);
  return whileLocked(async () => {
    const state = await socketState(socketPath);
    if (state === 'alive') return connect(location, socketPath);
    if (location.control !== undefined) {
      throw new OperationError(
        'UNREACHABLE',
        state === 'absent'
          ? `no daemon: there is no control socket ${socketPath}; start one, or leave --control out to open the store itself`
          : `no daemon listens on ${socketPath} (${state}); start one, or leave --control out to open the store itself`,
      );
    }
    return directly(location);
  }, socketPath);
}

/**
 * Load all code that openOperations may need later. For a job that opens stores repeatedly, while daemons come and go and perhaps
 * another version of this program is installed; and for a process about to change its user, who may not be able to read this
 * program.
 */
export async function loadEverything(): Promise<void> {
  await Promise.all([
    import('./open-directly.js'),
    LOCAL.load(),
    CLUSTER.load(),
    import('./control-client.js'),
    import('./remote-operations.js'),
    import('nbd-server-ts/client'),
  ]);
}

async function directly(location: StoreLocation): Promise<Operations> {
  const { openDirectly } = await import('./open-directly.js');
  return openDirectly(location);
}

/** Repeat `attempt` for a while if the store is locked (LOCK_WAIT_MS). Errors: LOCKED, with its holder; those of `attempt`. */
export async function whileLocked<T>(attempt: () => Promise<T>, socketPath: string): Promise<T> {
  const end = performance.now() + MAX_LOCK_WAIT_MS;
  let deadline = performance.now() + LOCK_WAIT_MS;
  let heldBy: number | undefined;
  for (;;) {
    try {
      return await attempt();
    } catch (error) {
      if (!(error instanceof StoreError) || error.code !== 'LOCKED') throw error;
      const { holder } = error as Partial<StoreLockedError>;
      if (holder?.pid !== undefined && holder.pid !== heldBy) {
        heldBy = holder.pid;
        deadline = Math.min(performance.now() + LOCK_WAIT_MS, end);
      }
      if (performance.now() >= deadline) {
        throw new OperationError('LOCKED', lockedMessage(holder, socketPath), { cause: error });
      }
    }
    await new Promise((resolve) => setTimeout(resolve, LOCK_POLL_MS));
  }
}

/** Which process has the store, and what to do about it. */
function lockedMessage(holder: Holder | undefined, socketPath: string): string {
  const silent = `no daemon answers on ${socketPath}`;
  switch (holder?.role) {
    case 'stopping daemon':
      return (
        `a daemon that is stopping (process ${holder.pid}) holds the store: it finishes the requests in flight and ` +
        'flushes; wait for it to end, then try again'
      );
    case 'daemon':
      return (
        `a daemon (process ${holder.pid}) holds the store, and ${silent}: it is starting, or has its control socket ` +
        'elsewhere: try again, or give --control PATH'
      );
    case 'command':
      return `another command (process ${holder.pid}) holds the store, and ${silent}: wait for that command to end`;
    default:
      return (
        `another process holds the store, and ${silent}: wait for that command to end, ` +
        'or give --control PATH if a daemon has its control socket elsewhere'
      );
  }
}

/** The control API of the store's daemon, which must be running. Errors: UNREACHABLE, OTHER_STORE, UNTRUSTED. */
export async function controlOfDaemon(
  location: Pick<StoreLocation, 'store' | 'isStoreGiven' | 'control'>,
): Promise<ControlClient> {
  const socketPath = location.control ?? controlSocketOf(location.store);
  const state = await socketState(socketPath);
  if (state !== 'alive') {
    const found =
      state === 'absent' ? `there is no control socket ${socketPath}` : `no process listens on ${socketPath}`;
    throw new OperationError(
      'UNREACHABLE',
      `no daemon: ${found}; give --store if it serves another store, or --control if its socket is elsewhere`,
    );
  }
  const { ControlClient } = await import('./control-client.js');
  const client = new ControlClient(socketPath);
  await statusOf(location, client, socketPath);
  return client;
}

async function connect(location: StoreLocation, socketPath: string): Promise<Operations> {
  const { ControlClient } = await import('./control-client.js');
  const { RemoteOperations } = await import('./remote-operations.js');
  const client = new ControlClient(socketPath);
  return new RemoteOperations(await statusOf(location, client, socketPath), client);
}

/** Errors: UNREACHABLE, OTHER_STORE. */
async function statusOf(
  location: Pick<StoreLocation, 'store' | 'isStoreGiven'>,
  client: ControlClient,
  socketPath: string,
): Promise<StatusAnswer> {
  // Fails if another program listens on the socket.
  const status = await client.status();
  const { store } = status;
  if (location.isStoreGiven && !isSameStore(store, location.store)) {
    throw new OperationError(
      'OTHER_STORE',
      `the daemon on ${socketPath} serves the store ${store}, not ${location.store}; leave out --store or --control`,
    );
  }
  return status;
}

/** Whether two stores are the same one: by directory (device and inode), or by a cluster's location as text. */
export function isSameStore(a: string, b: string): boolean {
  const [directory, other] = [directoryOf(a), directoryOf(b)];
  if (directory === undefined || other === undefined) return a === b;
  const first = fs.statSync(directory, { throwIfNoEntry: false });
  const second = fs.statSync(other, { throwIfNoEntry: false });
  return first !== undefined && second !== undefined && first.dev === second.dev && first.ino === second.ino;
}
