/**
 * Decides who works on a store: the daemon that has it, or this process. Owns the order in which that is tried, and
 * what is said if neither is possible.
 */
import fs from 'node:fs';
import { LocalStore } from '../store/local/local-store.js';
import { StoreLockedError, type Holder } from '../store/local/store-lock.js';
import { StoreError } from '../store/object-store.js';
import { isClusterLocation } from '../store/sheep/cluster-address.js';
import { SheepStore } from '../store/sheep/sheep-store.js';
import { VdiCatalog } from '../vdi/catalog.js';
import { VdiExports } from '../export/vdi-exports.js';
import { ControlClient } from './control-client.js';
import type { StatusAnswer } from './control-protocol.js';
import { DirectOperations } from './direct-operations.js';
import { OperationError, type Operations } from './operations.js';
import { controlSocketOf, stateDirectory } from './places.js';
import { RemoteOperations } from './remote-operations.js';
import { socketState } from './stale-socket.js';
import { refuseOthersStore, takeOwner } from './store-owner.js';

/**
 * How long to wait for a store that somebody has who does not listen: another command that is done in a moment, or a
 * daemon that is starting or stopping.
 */
const LOCK_WAIT_MS = 3_000;
const LOCK_POLL_MS = 50;

export interface StorePlace {
  /** The store's directory, or a cluster's location. */
  readonly store: string;
  /** The store was asked for by name: a daemon of another store will not do. */
  readonly isStoreGiven: boolean;
  /** Whether a store may be made where there is none. */
  readonly mayCreate: boolean;
  /** The daemon's control socket, if it is not in the store. */
  readonly control: string | undefined;
  /** Of a cluster: read zeros in place of lost objects, and write nothing. No daemon is asked then. */
  readonly missingIsZero?: boolean;
  /** Told what an operator should know and no caller waits for. */
  readonly log?: (line: string, details?: object) => void;
}

export interface DirectPlace extends Pick<StorePlace, 'store' | 'log' | 'missingIsZero' | 'mayCreate'> {
  /** This process serves the store, and nobody else on this machine does. */
  readonly isDaemon?: boolean;
  /** How long requests to a cluster are repeated while it cannot serve them. */
  readonly retryMs?: number;
  /** How long NAME@now is kept for a client that was cut off. */
  readonly keepMs?: number;
  /** How long such a client counts as a user of a VDI. */
  readonly inUseMs?: number;
  /** Aborted when nobody waits for a cluster any more: all that is asked of it fails then. */
  readonly signal?: AbortSignal;
}

/**
 * Operations on a store: through its daemon if one listens, else directly. A control socket that was asked for by name
 * must answer. Errors: UNREACHABLE, LOCKED, and whatever opening the store says.
 */
export async function openOperations(place: StorePlace): Promise<Operations> {
  const socketPath = place.control ?? controlSocketOf(place.store);
  // Whoever serves the cluster as it should be need not serve it with zeros, and nothing is written that could disturb.
  if (place.missingIsZero) return openDirectly(place);
  return whileLocked(async () => {
    const state = await socketState(socketPath);
    if (state === 'alive') return connect(place, socketPath);
    if (place.control !== undefined) {
      throw new OperationError(
        'UNREACHABLE',
        state === 'absent'
          ? `no daemon: there is no control socket ${socketPath}; leave --control out to open the store itself`
          : `no daemon listens on ${socketPath} (${state}); leave --control out to open the store itself`,
      );
    }
    return openDirectly(place);
  }, socketPath);
}

type OpenedStore = DirectOperations & {
  readonly exports: VdiExports;
  readonly isReadOnly: boolean;
  readonly announceStop: () => void;
};

/**
 * The store, opened by this process; one of another user's by root as that user (store-owner.ts). Errors: StoreError;
 * OWNER, PERMISSION.
 */
export async function openDirectly(place: DirectPlace): Promise<OpenedStore> {
  const isCluster = isClusterLocation(place.store);
  if (place.missingIsZero && !isCluster) {
    throw new OperationError(
      'BAD_USAGE',
      `--missing=zero is for clusters, which lose objects with their nodes; ${place.store} is a local store`,
    );
  }
  const { log, retryMs, missingIsZero, mayCreate, signal } = place;
  if (isCluster) {
    const options = { log, retryMs, missingIsZero, signal, stateDirectory: stateDirectory() };
    return operationsOn(await SheepStore.open(place.store, options), place);
  }
  if (place.isDaemon) refuseOthersStore(place.store);
  const leave = place.isDaemon ? () => undefined : takeOwner(place.store);
  try {
    const role = place.isDaemon ? 'daemon' : 'command';
    return await operationsOn(await LocalStore.open(place.store, { log, role, mayCreate }), place, leave);
  } catch (error) {
    leave();
    throw error;
  }
}

/** `closed` is called when the store is closed. */
async function operationsOn(
  store: LocalStore | SheepStore,
  place: DirectPlace,
  closed: () => void = () => undefined,
): Promise<OpenedStore> {
  const isCluster = store instanceof SheepStore;
  const { keepMs, inUseMs, log, isDaemon: serves } = place;
  const catalog = new VdiCatalog(store, { inUseMs, log });
  // A cluster has other users, and temporary snapshots of theirs; what is left of ours goes before its disk is written.
  if (!catalog.isReadOnly && (!isCluster || place.isDaemon)) {
    try {
      const leftovers = await catalog.dropLeftovers();
      if (leftovers > 0) place.log?.(`dropped ${leftovers} temporary snapshot(s) that an earlier process left behind`);
    } catch (error) {
      await store.close().catch(() => undefined);
      throw error;
    }
  }
  const exports = new VdiExports(catalog, { keepMs, serves, log });
  return Object.assign(new DirectOperations(catalog, exports, closed), {
    exports,
    isReadOnly: catalog.isReadOnly,
    // Nobody waits for a cluster: it has no lock.
    announceStop: () => void (store instanceof LocalStore && store.announceStop()),
  });
}

/** Try again for a while if the store is locked, and then say who may have it. */
export async function whileLocked<T>(attempt: () => Promise<T>, socketPath: string): Promise<T> {
  const deadline = performance.now() + LOCK_WAIT_MS;
  for (;;) {
    try {
      return await attempt();
    } catch (error) {
      if (!(error instanceof StoreError) || error.code !== 'LOCKED') throw error;
      if (performance.now() >= deadline) {
        const holder = error instanceof StoreLockedError ? error.holder : undefined;
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
  place: Pick<StorePlace, 'store' | 'isStoreGiven' | 'control'>,
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
  const client = new ControlClient(socketPath);
  await statusOf(place, client, socketPath);
  return client;
}

async function connect(place: StorePlace, socketPath: string): Promise<Operations> {
  const client = new ControlClient(socketPath);
  return new RemoteOperations(await statusOf(place, client, socketPath), client);
}

/** Errors: UNREACHABLE, OTHER_STORE. */
async function statusOf(
  place: Pick<StorePlace, 'store' | 'isStoreGiven'>,
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
  if (isClusterLocation(a) || isClusterLocation(b)) return a === b;
  const first = fs.statSync(a, { throwIfNoEntry: false });
  const second = fs.statSync(b, { throwIfNoEntry: false });
  return first !== undefined && second !== undefined && first.dev === second.dev && first.ino === second.ino;
}
