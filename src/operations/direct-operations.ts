/**
 * Operations on a store that this process has open: the catalog for VDIs, the exports for their data. Used by the daemon for its
 * control API, and by commands where no daemon runs. Owns the devices that it has opened; those that the NBD server has opened
 * belong to the server.
 */
import { ALLOCATION_CONTEXT, type CompleteDevice, type ExportProvider, type Peer } from 'nbd-server-ts/block-device';
import type { VdiCatalog } from '../vdi/catalog.js';
import type { Writers } from '../export/writers.js';
import { parseSpec } from '../vdi/names.js';
import { unfinishedExport } from '../export/unfinished-export.js';
import { changesPage, dataPageOf } from './data-page.js';
import {
  asOperationError,
  OperationError,
  type Beginning,
  type CheckReport,
  type MergeState,
  type DamagedVdi,
  type ConnectionStatus,
  type CreateOptions,
  type DataPage,
  type Disconnected,
  type Disk,
  type Ended,
  type ExportDescription,
  type Filling,
  type ForceOption,
  type LockReport,
  type LockStatus,
  type Operations,
  type ShownVdi,
  type UnlockOptions,
  type VdiDetails,
  type VdiRecord,
} from './operations.js';

const PEER: Peer = { transport: 'internal', address: 'command line' };
/** A device takes any length; this bounds the memory and the time of one request. */
const MAX_REQUEST_BYTES = 32 * 2 ** 20;

/** `writers`: where the exports keep account of writers. */
type Exports = ExportProvider<CompleteDevice> & { readonly writers?: Pick<Writers, 'of' | 'twoWritersOf' | 'forget'> };

export class DirectOperations implements Operations {
  readonly store: string;
  readonly identity: string;
  readonly isDaemon = false;
  readonly #catalog: VdiCatalog;
  readonly #exports: Exports;
  readonly #closed: () => void;
  readonly takeBackCreation: () => void;

  /** `closed` is called when the store is closed, or could not be. */
  constructor(
    catalog: VdiCatalog,
    exports: Exports,
    closed: () => void = () => undefined,
    takeBackCreation: () => void = () => undefined,
  ) {
    this.#closed = closed;
    this.takeBackCreation = takeBackCreation;
    this.store = catalog.location;
    this.identity = catalog.identity;
    this.#catalog = catalog;
    this.#exports = exports;
  }

  list(): Promise<readonly VdiRecord[]> {
    return this.#catalog.list();
  }

  listDetails(): Promise<readonly VdiDetails[]> {
    return this.#catalog.details();
  }

  listDamaged(): Promise<readonly DamagedVdi[]> {
    return this.#catalog.damaged();
  }

  async show(spec: string): Promise<ShownVdi> {
    const details = await this.#catalog.show(spec);
    const { writers } = this.#exports;
    if (writers === undefined || details.isSnapshot) return details;
    const { name } = details;
    return { ...details, writers: writers.of(name), twoWriters: writers.twoWritersOf(name) ?? null };
  }

  async merging({ paused }: { readonly paused?: boolean } = {}): Promise<MergeState> {
    const { merging } = this.#catalog;
    if (merging === undefined)
      throw new OperationError('UNSUPPORTED', `${this.store} has nothing to merge: only local stores have overlays`);
    if (paused !== undefined) merging.pause(paused);
    return merging.state();
  }

  /** None: only a daemon has NBD clients, and its control API answers for them (src/daemon/control/). */
  clients(): Promise<readonly ConnectionStatus[]> {
    return Promise.resolve([]);
  }

  disconnect(id: number): Promise<Disconnected> {
    return Promise.reject(
      new OperationError(
        'NO_CLIENT',
        `there is no connection ${id}: no daemon serves ${this.store}, so no client is connected`,
      ),
    );
  }

  create(name: string, size: number, options: CreateOptions): Promise<VdiRecord> {
    return this.#catalog.create(name, size, options);
  }

  async begin(name: string, beginning: Beginning): Promise<VdiRecord> {
    const record = await this.#catalog.begin(name, beginning);
    this.#exports.writers?.forget(name);
    return record;
  }

  finish(name: string, run: string): Promise<VdiRecord> {
    return this.#catalog.finish(name, run);
  }

  snapshot(
    name: string,
    tag: string,
    options?: { readonly takenAt?: number } & Filling & ForceOption,
  ): Promise<VdiRecord> {
    return this.#catalog.snapshot(name, tag, options);
  }

  clone(spec: string, newName: string, options?: ForceOption): Promise<VdiRecord> {
    return this.#catalog.clone(spec, newName, options);
  }

  rollback(spec: string, options?: Filling & ForceOption): Promise<VdiRecord & Ended> {
    return this.#catalog.rollback(spec, options);
  }

  resize(
    name: string,
    size: number,
    options: Filling & ForceOption & { readonly forceInUse?: boolean },
  ): Promise<VdiRecord> {
    return this.#catalog.resize(name, size, options);
  }

  async remove(spec: string, options?: Filling & ForceOption): Promise<Ended> {
    const ended = await this.#catalog.remove(spec, options);
    const { name, tag, vid } = parseSpec(spec);
    if (tag === undefined && vid === undefined) this.#exports.writers?.forget(name);
    return ended;
  }

  check(options: { readonly repair: boolean }): Promise<CheckReport & Ended> {
    return this.#catalog.check(options);
  }

  locks(): Promise<LockReport> {
    return this.#catalog.locks();
  }

  unlock(spec: string, options?: UnlockOptions): Promise<LockStatus> {
    return this.#catalog.unlock(spec, options);
  }

  async changes(spec: string, since: string, offset: number): Promise<DataPage> {
    const vdi = await this.#catalog.openVdi(spec, { mapOnly: true });
    try {
      const base = await this.#catalog.openVdi(since, { mapOnly: true });
      try {
        return await changesPage(vdi, base, offset);
      } finally {
        await this.#catalog.release(base);
      }
    } finally {
      await this.#catalog.release(vdi);
    }
  }

  /** The size and mode that openDisk would find, without opening. */
  async describe(exportName: string): Promise<ExportDescription> {
    const { geometry } = await plainly(this.#exports.describe(exportName, PEER));
    return { size: geometry.size, isReadOnly: geometry.readOnly };
  }

  async openDisk(exportName: string, { run }: Filling = {}): Promise<Disk> {
    const name = run === undefined ? exportName : unfinishedExport(exportName, run);
    const { device } = await plainly(this.#exports.open(name, PEER));
    return diskOf(device);
  }

  async close(): Promise<void> {
    try {
      await this.#catalog.close();
    } finally {
      this.#closed();
    }
  }
}

function diskOf(device: CompleteDevice): Disk {
  const { size, readOnly } = device.geometry;
  return {
    size,
    isReadOnly: readOnly,
    maxRequestBytes: MAX_REQUEST_BYTES,
    // A VDI's device transfers all of it, or fails.
    read: async (offset, into) => void (await device.read(offset, into)),
    write: async (offset, data) => void (await device.write(offset, data, false)),
    zero: async (offset, length) => device.zero(offset, length, { noHole: false, fua: false, fastZero: false }),
    flush: async () => device.flush(),
    dataPage: (offset) =>
      dataPageOf(size, offset, (from, length, sink) => device.extents(ALLOCATION_CONTEXT, from, length, sink)),
    close: async () => device.close('disconnect'),
  };
}

/** Errors of the exports as the errors of the layer that refused. */
async function plainly<T>(result: T | Promise<T>): Promise<T> {
  try {
    return await result;
  } catch (error) {
    throw asOperationError(error) ?? error;
  }
}
