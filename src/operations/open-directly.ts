/**
 * Opens a store in this process: the daemon's, or a command's if no daemon has it. Owns what is done with a store before
 * anybody uses it. Of the two kinds of store only the one that is asked for is loaded.
 */
import { directoryOf, kindOf, type AnyStore, type StoreKind } from '../store/locations.js';
import { VdiCatalog } from '../vdi/catalog.js';
import type { Exclusive } from '../export/exclusive.js';
import { VdiExports, type ExportsOptions } from '../export/vdi-exports.js';
import { DirectOperations } from './direct-operations.js';
import { loadEverything, type StoreLocation } from './open-operations.js';
import { OperationError } from './operations.js';
import { stateDirectory } from './default-paths.js';
import { hasTakenOwner, isOthersStore, refuseOthersStore, takeOwner } from './run-as-owner.js';

export interface DirectPlace extends Pick<StoreLocation, 'store' | 'log' | 'options' | 'mayCreate'> {
  /** This process serves the store, and nobody else on this machine does. */
  readonly isDaemon?: boolean;
  /** How long requests to a cluster are repeated while it cannot serve them. */
  readonly retryMs?: number;
  /** How long NAME@now is kept for a client that was cut off. */
  readonly keepMs?: number;
  /** How many may be kept for such clients, of all VDIs. */
  readonly maxKept?: number;
  /** How long such a client counts as a user of a VDI. */
  readonly inUseMs?: number;
  /** Aborted when nobody waits for a cluster any more: all that is asked of it fails then. */
  readonly signal?: AbortSignal;
  /** Files of objects to have open at most; by default what the process's limit allows. */
  readonly maxDescriptors?: number;
  /** Each disk is written by one connection at a time. */
  readonly exclusive?: Exclusive | undefined;
  /** As `log`, for what clients can bring about again and again. */
  readonly logOften?: ExportsOptions['logOften'];
}

export type OpenedStore = DirectOperations & {
  readonly exports: VdiExports;
  readonly isReadOnly: boolean;
  readonly announceStop: () => void;
};

/**
 * The store, opened by this process; one of another user's by root as that user (run-as-owner.ts). Errors: StoreError;
 * OWNER, PERMISSION.
 */
export async function openDirectly(place: DirectPlace): Promise<OpenedStore> {
  const kind = kindOf(place.store);
  refuseOptionsOfOthers(place, kind);
  const directory = kind.directoryOf(place.store);
  if (directory !== undefined && place.isDaemon) refuseOthersStore(directory);
  // Before another user's identity is taken, which may not be able to read this program.
  await kind.load();
  if (directory !== undefined && !place.isDaemon && isOthersStore(directory)) await loadEverything();
  const leave = directory === undefined || place.isDaemon ? () => undefined : takeOwner(directory);
  const { log, retryMs, mayCreate, maxDescriptors, signal, options } = place;
  try {
    const store = await kind.open(place.store, {
      log,
      role: place.isDaemon ? 'daemon' : 'command',
      mayCreate,
      maxDescriptors,
      retryMs,
      signal,
      stateDirectory: stateDirectory(),
      isStateOutOfReach: hasTakenOwner,
      store: options,
    });
    return await operationsOn(store, place, leave);
  } catch (error) {
    leave();
    throw error;
  }
}

/** Errors: BAD_USAGE. */
function refuseOptionsOfOthers({ store, options }: DirectPlace, kind: StoreKind): void {
  if (options?.missing === undefined || kind.options.includes('missing')) return;
  throw new OperationError(
    'BAD_USAGE',
    `--missing=zero is for clusters, which lose objects with their nodes; ${store} is a local store`,
  );
}

/** `closed` is called when the store is closed. */
async function operationsOn(
  store: AnyStore,
  place: DirectPlace,
  closed: () => void = () => undefined,
): Promise<OpenedStore> {
  const isOursAlone = directoryOf(place.store) !== undefined;
  const { keepMs, maxKept, inUseMs, log, logOften, exclusive, isDaemon: serves } = place;
  const catalog = new VdiCatalog(store, { inUseMs, log });
  const takeBackCreation = (): void => void ('takeBackCreation' in store && store.takeBackCreation());
  // Other users of a store have temporary snapshots, too; what is left of ours goes before its disk is written.
  if (!catalog.isReadOnly && (isOursAlone || place.isDaemon)) {
    try {
      const leftovers = await catalog.dropLeftovers();
      if (leftovers > 0) place.log?.(`dropped ${leftovers} temporary snapshot(s) that an earlier process left behind`);
    } catch (error) {
      takeBackCreation();
      await store.close().catch(() => undefined);
      throw error;
    }
  }
  const exports = new VdiExports(catalog, { keepMs, maxKept, serves, exclusive, log, logOften });
  return Object.assign(new DirectOperations(catalog, exports, closed, takeBackCreation), {
    exports,
    isReadOnly: catalog.isReadOnly,
    // Nobody waits for a cluster: it has no lock.
    announceStop: () => void ('announceStop' in store && store.announceStop()),
  });
}
