/**
 * The operations on a store and its VDIs that commands, jobs and the daemon share. This process does them on the store itself
 * (direct-operations.ts), or a daemon does them over its control socket (remote-operations.ts); callers need not know which.
 * Owns the interface, the types of its answers, and OperationError: it has the code and the message of the layer that refused,
 * the same both ways. Implements nothing.
 */
import type { CheckReport, DamagedVdi, MergeState } from '../store/object-store.js';
import type { Redundancy, VdiRecord } from '../store/vdi-record.js';
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
export type { Beginning, CheckReport, DamagedVdi, Ended, Filling, ForceOption, KeptSnapshot, MergeState };
export type { VdiDetails, VdiRecord };

/**
 * From `dataPage`: the ranges that may hold something other than zeros; all else reads as zeros. From `changes`: the ranges that
 * may differ; all else is the same. Ascending, in bytes.
 */
export interface DataPage {
  readonly ranges: readonly { readonly offset: number; readonly length: number }[];
  /** Where the next page begins; null after the last. */
  readonly next: number | null;
}

/** Bounds of one page: neither its size nor the time to make it depends on the size of the disk. */
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
  /** Make the range read as zeros and free its space. Any length. */
  zero(offset: number, length: number): Promise<void>;
  /** When it resolves, all writes that had completed before the call are durable. */
  flush(): Promise<void>;
  /** The ranges that may hold something other than zeros, from `offset` on. */
  dataPage(offset: number): Promise<DataPage>;
  /** Resolves when the export is closed: a delete or rollback, which is refused for open VDIs, is possible then. */
  close(): Promise<void>;
}

/** The answer of `show`. Daemons of earlier versions leave these fields out. */
export interface ShownVdi extends VdiDetails {
  /** Connections that may write the VDI. */
  readonly writers?: readonly WriterInfo[];
  /** The last time that two independent clients wrote the VDI at once, since the daemon started. */
  readonly twoWriters?: TwoWriters | null;
}

export interface ExportDescription {
  readonly size: number;
  readonly isReadOnly: boolean;
}

export interface CreateOptions extends ForceOption {
  readonly blockSizeShift?: number;
  /** Clusters only; without it the cluster's default. */
  readonly redundancy?: Redundancy;
  readonly forceHint?: string;
}

export interface Operations {
  /** The store's directory or location, for messages. */
  readonly store: string;
  /** Identifies the store, however it is reached. */
  readonly identity: string;
  /** A daemon does the work; else this process. */
  readonly isDaemon: boolean;
  list(): Promise<readonly VdiRecord[]>;
  listDetails(): Promise<readonly VdiDetails[]>;
  /** VDIs that are in neither list, because their records cannot be read. */
  listDamaged(): Promise<readonly DamagedVdi[]>;
  show(spec: string): Promise<ShownVdi>;
  create(name: string, size: number, options: CreateOptions): Promise<VdiRecord>;
  /**
   * Create a VDI, or take an existing one, to fill it from elsewhere. Until `finish` it is marked as unfinished, and only calls
   * with its `run` open or change it. Errors: EXISTS, BUSY.
   */
  begin(name: string, beginning: Beginning): Promise<VdiRecord>;
  /** The VDI is complete: make it durable and remove its mark. Errors: UNFINISHED (another run's). */
  finish(name: string, run: string): Promise<VdiRecord>;
  /** `takenAt`: the time that the snapshot shows, for one that is copied from another store; by default now. */
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
  /** With `run`: only if the VDI still belongs to that run. */
  remove(spec: string, options?: Filling & ForceOption): Promise<Ended>;
  check(options: { readonly repair: boolean }): Promise<CheckReport & Ended>;
  /**
   * What the store has to merge in the background; `paused` pauses or resumes that, until the daemon ends. Errors: UNSUPPORTED (the
   * store is not a local one, or there is no daemon to pause).
   */
  merging(options?: { readonly paused?: boolean }): Promise<MergeState>;
  /** The locks that a cluster's nodes keep. Errors: UNSUPPORTED (local store). */
  locks(): Promise<LockReport>;
  /** Remove a lock that was left behind; see VdiCatalog. Errors: UNSUPPORTED, NOT_LOCKED, BUSY, NEEDS_FORCE. */
  unlock(spec: string, options?: UnlockOptions): Promise<LockStatus>;
  /**
   * Where two VDIs or snapshots of one name may differ, from `offset` to the end of `spec`: from their maps, exact to the
   * data object, or to what the store knows of an object. A page has at most MAX_PAGE_RANGES ranges, and covers any number of
   * bytes. Errors: BAD_SIZE (their data objects are of different sizes).
   */
  changes(spec: string, since: string, offset: number): Promise<DataPage>;
  /** The connections of NBD clients; none without a daemon. */
  clients(): Promise<readonly ConnectionStatus[]>;
  /** Cut a connection off. For `keepOutMs` its client cannot open the same disk to write, over any connection. Errors: NO_CLIENT. */
  disconnect(id: number, options: { readonly keepOutMs: number }): Promise<Disconnected>;
  /** Open an export by its name, in any form of docs/exports.md. */
  openDisk(exportName: string, options?: Filling): Promise<Disk>;
  /**
   * The command has failed: a store that was created for it and is still empty is removed on close. Absent with a daemon, whose
   * store stays.
   */
  takeBackCreation?(): void;
  close(): Promise<void>;
}

/** An expected failure, with the code of the layer that refused (CatalogErrorCode, StoreErrorCode, or one of this layer). */
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

/** Error classes of the layers below; any other error is a fault of this program or of the operating system. */
const LAYER_ERRORS = new Set(['CatalogError', 'StoreError', 'DeviceError', 'ExportError', 'NbdClientError']);

/**
 * The expected failure behind `error`; undefined if it is not one. Of an ExportError the cause is returned: the catalog's error says
 * more than NBD can.
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
