/**
 * Opens a store in this process: for the daemon, or for a command if no daemon has it. Owns the steps between opening a store and
 * its first use. Loads only the kind of store that is asked for.
 */
import { directoryOf, kindOf, type StoreKind } from '../store/locations.js';
import type { ObjectStore } from '../store/object-store.js';
import { VdiCatalog } from '../vdi/catalog.js';
import type { Exclusive } from '../export/exclusive.js';
import { VdiExports, type ExportsOptions } from '../export/vdi-exports.js';
import { DirectOperations } from './direct-operations.js';
import { loadEverything, type StoreLocation } from './open-operations.js';
import { OperationError } from './operations.js';
import { stateDirectory } from './default-paths.js';
import { hasTakenOwner, isOthersStore, refuseOthersStore, takeOwner } from './run-as-owner.js';

export interface DirectLocation extends Pick<StoreLocation, 'store' | 'log' | 'options' | 'mayCreate'> {
  /** This process is the store's daemon on this machine. */
  readonly isDaemon?: boolean;
  /** How long requests to a cluster are repeated while it cannot serve them. */
  readonly retryMs?: number;
  /** How long NAME@now is kept for a client that was cut off. */
  readonly keepMs?: number;
  /** How many may be kept for such clients, over all VDIs. */
  readonly maxKept?: number;
  /** How long such a client counts as a user of a VDI. */
  readonly inUseMs?: number;
  /** When aborted, the cluster is not waited for any more: all requests to it fail. */
  readonly signal?: AbortSignal;
  /** At most so many files of objects are open at a time; by default as many as the process's limit allows. */
  readonly maxDescriptors?: number;
  /** Only one connection at a time may write a disk. */
  readonly exclusive?: Exclusive | undefined;
  /** As `log`, where nothing is wrong. */
  readonly note?: (line: string, details?: object) => void;
  /** As `log`, for lines that clients can cause again and again. */
  readonly logOften?: ExportsOptions['logOften'];
}

export type OpenedStore = DirectOperations & {
  readonly exports: VdiExports;
  readonly isReadOnly: boolean;
  readonly announceStop: () => void;
};

/**
 * Open the store in this process; root opens another user's store as that user (run-as-owner.ts). Errors: those of StoreError;
 * OWNER, PERMISSION, BAD_USAGE.
 */
export async function openDirectly(location: DirectLocation): Promise<OpenedStore> {
  const kind = kindOf(location.store);
  refuseOptionsOfOthers(location, kind);
  const directory = kind.directoryOf(location.store);
  if (directory !== undefined && location.isDaemon) refuseOthersStore(directory);
  // Before this process changes its user: the new one may not be able to read this program.
  await kind.load();
  if (directory !== undefined && !location.isDaemon && isOthersStore(directory)) await loadEverything();
  const leave = directory === undefined || location.isDaemon ? () => undefined : takeOwner(directory);
  const { log, note, retryMs, mayCreate, maxDescriptors, signal, options } = location;
  try {
    const store = await kind.open(location.store, {
      log,
      note,
      role: location.isDaemon ? 'daemon' : 'command',
      mayCreate,
      maxDescriptors,
      retryMs,
      signal,
      stateDirectory: stateDirectory(),
      isStateOutOfReach: hasTakenOwner,
      store: options,
    });
    return await operationsOn(store, location, leave);
  } catch (error) {
    leave();
    throw error;
  }
}

/** Errors: BAD_USAGE. */
function refuseOptionsOfOthers({ store, options }: DirectLocation, kind: StoreKind): void {
  if (options?.missing === undefined || kind.options.includes('missing')) return;
  throw new OperationError(
    'BAD_USAGE',
    `--missing=zero is for clusters, which lose objects with their nodes; ${store} is a local store`,
  );
}

/** `closed` is called when the store is closed. */
async function operationsOn(
  store: ObjectStore,
  location: DirectLocation,
  closed: () => void = () => undefined,
): Promise<OpenedStore> {
  const isOursAlone = directoryOf(location.store) !== undefined;
  const { keepMs, maxKept, inUseMs, log, logOften, exclusive, isDaemon: serves } = location;
  const catalog = new VdiCatalog(store, { inUseMs, log });
  const takeBackCreation = (): void => void store.takeBackCreation?.();
  // Other processes may have temporary snapshots in a cluster. Our leftovers are dropped before their disks are written.
  if (!catalog.isReadOnly && (isOursAlone || location.isDaemon)) {
    try {
      const leftovers = await catalog.dropLeftovers();
      if (leftovers > 0)
        location.log?.(`dropped ${leftovers} temporary snapshot(s) that an earlier process left behind`);
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
    announceStop: () => void store.announceStop?.(),
  });
}
