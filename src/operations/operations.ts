/**
 * Everything that can be asked of a store, whoever does it: this process on the store itself (direct-operations.ts), or
 * a daemon over its control socket (remote-operations.ts). The command line knows only this. Errors are OperationErrors
 * with the code and the message of the layer that refused, the same both ways.
 */
import type { CheckReport, DamagedVdi, Redundancy, VdiRecord } from '../store/object-store.js';
import type { ForceOption } from '../vdi/busy-checks.js';
import type { VdiDetails } from '../vdi/details.js';
import type { Ended, KeptSnapshot } from '../vdi/kept-snapshots.js';
import type { LockReport, LockStatus, UnlockOptions } from '../vdi/cluster-locks.js';
import type { TwoWriters } from '../export/two-writers.js';
import type { WriterInfo } from '../export/writers.js';
import type { ConnectionStatus, Disconnected } from './control-protocol.js';
import type { Beginning, Filling } from '../vdi/unfinished.js';

export { formatSpec, labelOfRun } from '../vdi/names.js';
export type { ConnectionStatus, Disconnected };
export type { LockReport, LockStatus, Redundancy, UnlockOptions };
export type { Beginning, CheckReport, DamagedVdi, Ended, Filling, ForceOption, KeptSnapshot, VdiDetails, VdiRecord };

/**
 * Ranges that may hold something other than zeros, in ascending order, all else reading as zeros; or, of `changes`, that
 * may differ, all else being the same.
 */
export interface DataPage {
  readonly ranges: readonly { readonly offset: number; readonly length: number }[];
  /** Where the next page begins; null after the last. */
  readonly next: number | null;
}

/** Bounds of one page, so that neither its answer nor the time to make it depends on the size of the disk. */
export const MAX_PAGE_RANGES = 4096;
export const MAX_PAGE_BYTES = 16 * 2 ** 30;

/** An export, opened for copying in or out. Offsets and lengths in bytes; several requests may be in flight. */
export interface Disk {
  readonly size: number;
  readonly isReadOnly: boolean;
  /** The largest `read` or `write`. */
  readonly maxRequestBytes: number;
  read(offset: number, into: Buffer): Promise<void>;
  /** `data` must stay as it is until the promise settles. */
  write(offset: number, data: Buffer): Promise<void>;
  /** Make the range read as zeros, giving its space back. Any length. */
  zero(offset: number, length: number): Promise<void>;
  /** What was written before is durable when it resolves. */
  flush(): Promise<void>;
  /** What may hold something other than zeros, from `offset` on. */
  dataPage(offset: number): Promise<DataPage>;
  /** Resolves when the export is really closed: what is refused for open VDIs is possible then. */
  close(): Promise<void>;
}

/** What `show` knows besides; a daemon of an earlier version does not say. */
export interface ShownVdi extends VdiDetails {
  /** Connections that may write it. */
  readonly writers?: readonly WriterInfo[];
  /** The last time that two clients which know nothing of each other wrote it at once, since the daemon began. */
  readonly twoWriters?: TwoWriters | null;
}

export interface ExportDescription {
  readonly size: number;
  readonly isReadOnly: boolean;
}

export interface CreateOptions extends ForceOption {
  readonly blockSizeShift?: number;
  /** Of a cluster: if it is not to be the cluster's default. */
  readonly redundancy?: Redundancy;
  readonly forceHint?: string;
}

export interface Operations {
  /** How this reaches the store, for messages: its directory. */
  readonly store: string;
  /** Tells the store from all others, however it is reached. */
  readonly identity: string;
  /** A daemon does it; else this process. */
  readonly isDaemon: boolean;
  list(): Promise<readonly VdiRecord[]>;
  listDetails(): Promise<readonly VdiDetails[]>;
  /** What neither list has, because it cannot be read. */
  listDamaged(): Promise<readonly DamagedVdi[]>;
  show(spec: string): Promise<ShownVdi>;
  create(name: string, size: number, options: CreateOptions): Promise<VdiRecord>;
  /**
   * Make or take a VDI that is filled from elsewhere: until `finish` it is marked as unfinished, and only calls with its
   * `run` open or change it. Errors: EXISTS, BUSY.
   */
  begin(name: string, beginning: Beginning): Promise<VdiRecord>;
  /** All of it is there: it is made durable, and its mark is taken away. Errors: UNFINISHED if it is not that run's. */
  finish(name: string, run: string): Promise<VdiRecord>;
  /** `takenAt`: when it says it was taken, if that is not now; of snapshots that are copied from another store. */
  snapshot(
    name: string,
    tag: string,
    options?: { readonly takenAt?: number } & Filling & ForceOption,
  ): Promise<VdiRecord>;
  clone(spec: string, newName: string, options?: ForceOption): Promise<VdiRecord>;
  rollback(spec: string, options?: Filling & ForceOption): Promise<VdiRecord & Ended>;
  resize(
    name: string,
    size: number,
    options: Filling & ForceOption & { readonly forceInUse?: boolean },
  ): Promise<VdiRecord>;
  /** With `run`: only if it is still that run's. */
  remove(spec: string, options?: Filling & ForceOption): Promise<Ended>;
  check(options: { readonly repair: boolean }): Promise<CheckReport & Ended>;
  /** Locks that a cluster's nodes keep. Errors: UNSUPPORTED. */
  locks(): Promise<LockReport>;
  /** Take one away that was left behind; see VdiCatalog. Errors: UNSUPPORTED, NOT_LOCKED, BUSY, NEEDS_FORCE. */
  unlock(spec: string, options?: UnlockOptions): Promise<LockStatus>;
  /**
   * Where two VDIs or snapshots of one name may differ, from `offset` on to the end of `spec`: exact to the data object,
   * from their maps alone. A page has MAX_PAGE_RANGES at most, and no bound on its bytes. Errors: BAD_SIZE if their
   * objects are not of one size.
   */
  changes(spec: string, since: string, offset: number): Promise<DataPage>;
  /** The connections of NBD clients. Without a daemon there are none. */
  clients(): Promise<readonly ConnectionStatus[]>;
  /**
   * Cut a connection off. Its client does not get the same disk to write for `keepOutMs`, by whatever connection. Errors:
   * NO_CLIENT.
   */
  disconnect(id: number, options: { readonly keepOutMs: number }): Promise<Disconnected>;
  /** Open an export by its name: NAME, NAME@TAG, and whatever else the exports layer knows. */
  openDisk(exportName: string, options?: Filling): Promise<Disk>;
  /**
   * What this was opened for has failed: a store that was made for it and that holds nothing is removed when it is closed.
   * A daemon's store is the daemon's.
   */
  takeBackCreation?(): void;
  close(): Promise<void>;
}

/** An expected failure, with the code of whichever layer refused (CatalogErrorCode, StoreErrorCode, or one of these). */
export class OperationError extends Error {
  constructor(
    readonly code: string,
    message: string,
    options?: ErrorOptions,
  ) {
    super(message, options);
    this.name = 'OperationError';
  }
}

/** Error classes of the layers below; anything else is a fault of ours, or of the operating system. */
const LAYER_ERRORS = new Set(['CatalogError', 'StoreError', 'DeviceError', 'ExportError', 'NbdClientError']);

/**
 * The expected failure behind `error`, or undefined if it is none. An ExportError is told as what caused it: NBD has
 * fewer words for it than the catalog.
 */
export function asOperationError(error: unknown): OperationError | undefined {
  if (error instanceof OperationError) return error;
  if (!(error instanceof Error)) return undefined;
  if (error.name === 'ExportError' || error.name === 'DeviceError') {
    const cause = asOperationError(error.cause);
    if (cause) return cause;
  }
  if (!LAYER_ERRORS.has(error.name)) return undefined;
  return new OperationError((error as Error & { code: string }).code, error.message, { cause: error });
}
