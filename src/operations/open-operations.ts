/**
 * Decides who works on a store: the daemon that has it, or this process. Owns the order in which that is tried, and
 * what is said if neither is possible. Whoever does the work is loaded when that is known: a command that a daemon does
 * needs no store, and most of the time that a short command takes is spent on loading.
 */
import fs from 'node:fs';
import path from 'node:path';
import type { Holder, StoreLockedError } from '../store/local/store-lock.js';
import { StoreError } from '../store/object-store.js';
import { CLUSTER, directoryOf, LOCAL, type StoreOptions } from '../store/locations.js';
import type { ControlClient } from './control-client.js';
import type { StatusAnswer } from './control-protocol.js';
import { OperationError, type Operations } from './operations.js';
import { controlSocketOf } from './default-paths.js';
import { checkSocketPath } from './socket-address.js';
import { socketState } from './socket-state.js';

/**
 * How long to wait for a store that somebody has who does not listen: another command that is done in a moment, or a
 * daemon that is starting or stopping. Counted anew when it is another process that has the store: commands that are started
 * at the same time each have their turn.
 */
const LOCK_WAIT_MS = 3_000;
/** However many are before this one. */
const MAX_LOCK_WAIT_MS = 30_000;
const LOCK_POLL_MS = 50;

export interface StoreLocation {
  /** The store's directory, or a cluster's location. */
  readonly store: string;
  /** The store was asked for by name: a daemon of another store will not do. */
  readonly isStoreGiven: boolean;
  /** Whether a store may be made where there is none. */
  readonly mayCreate: boolean;
  /** The daemon's control socket, if it is not in the store. */
  readonly control: string | undefined;
  /** With any of these no daemon is asked. */
  readonly options?: StoreOptions;
  /** Told what an operator should know and no caller waits for. */
  readonly log?: (line: string, details?: object) => void;
}

/**
 * Operations on a store: through its daemon if one listens, else directly. A control socket that was asked for by name
 * must answer. Errors: UNREACHABLE, LOCKED, and whatever opening the store says.
 */
export async function openOperations(place: StoreLocation): Promise<Operations> {
  const socketPath = place.control ?? controlSocketOf(place.store);
  checkSocketPath(path.resolve(socketPath));
  // A daemon serves the store without them; what they allow disturbs no daemon.
  if (place.options !== undefined) return directly(place);
  return whileLocked(async () => {
    const state = await socketState(socketPath);
    if (state === 'alive') return connect(place, socketPath);
    if (place.control !== undefined) {
      throw new OperationError(
        'UNREACHABLE',
        state === 'absent'
          ? `no daemon: there is no control socket ${socketPath}; start one, or leave --control out to open the store itself`
          : `no daemon listens on ${socketPath} (${state}); start one, or leave --control out to open the store itself`,
      );
    }
    return directly(place);
  }, socketPath);
}

/**
 * Load what openOperations may need later, whatever that is: for who opens stores again and again, while a daemon comes or
 * goes and perhaps another version of this program is installed; and for who is about to be another user, who may not be
 * able to read this program.
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

async function directly(place: StoreLocation): Promise<Operations> {
  const { openDirectly } = await import('./open-directly.js');
  return openDirectly(place);
}

/** Try again for a while if the store is locked (LOCK_WAIT_MS), and then say who may have it. */
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

/** Who has the store, and what to do about it. */
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

/** The control API of the store's daemon, which must run. Errors: UNREACHABLE, OTHER_STORE. */
export async function controlOfDaemon(
  place: Pick<StoreLocation, 'store' | 'isStoreGiven' | 'control'>,
): Promise<ControlClient> {
  const socketPath = place.control ?? controlSocketOf(place.store);
  const state = await socketState(socketPath);
  if (state !== 'alive') {
    const found = state === 'absent' ? `there is no control socket ${socketPath}` : `nobody listens on ${socketPath}`;
    throw new OperationError(
      'UNREACHABLE',
      `no daemon: ${found}; is it another store's (--store), or elsewhere (--control)?`,
    );
  }
  const { ControlClient } = await import('./control-client.js');
  const client = new ControlClient(socketPath);
  await statusOf(place, client, socketPath);
  return client;
}

async function connect(place: StoreLocation, socketPath: string): Promise<Operations> {
  const { ControlClient } = await import('./control-client.js');
  const { RemoteOperations } = await import('./remote-operations.js');
  const client = new ControlClient(socketPath);
  return new RemoteOperations(await statusOf(place, client, socketPath), client);
}

/** Errors: UNREACHABLE, OTHER_STORE. */
async function statusOf(
  place: Pick<StoreLocation, 'store' | 'isStoreGiven'>,
  client: ControlClient,
  socketPath: string,
): Promise<StatusAnswer> {
  // Answers with something else than a daemon's status if the socket is somebody else's.
  const status = await client.status();
  const { store } = status;
  if (place.isStoreGiven && !isSameStore(store, place.store)) {
    throw new OperationError(
      'OTHER_STORE',
      `the daemon on ${socketPath} serves the store ${store}, not ${place.store}; leave out --store or --control`,
    );
  }
  return status;
}

/** Whether two directories or clusters' locations are one, as far as can be told from outside. */
export function isSameStore(a: string, b: string): boolean {
  const [directory, other] = [directoryOf(a), directoryOf(b)];
  if (directory === undefined || other === undefined) return a === b;
  const first = fs.statSync(directory, { throwIfNoEntry: false });
  const second = fs.statSync(other, { throwIfNoEntry: false });
  return first !== undefined && second !== undefined && first.dev === second.dev && first.ino === second.ino;
}
