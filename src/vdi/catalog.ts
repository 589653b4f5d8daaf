/**
 * The catalog: VDIs and snapshots by name, whether they are being served or not. Runs one operation at a time on each name;
 * reads and writes of open VDIs go on meanwhile. Work that may take long (a flush) is done before a name is taken or after it
 * is given back. Owns the parts that the operations share (catalog-parts.ts); each kind of operation is a file of its own.
 */
import type { CheckReport, DamagedVdi, ObjectStore, Merging } from '../store/object-store.js';
import type { VdiRecord } from '../store/vdi-record.js';
import { BusyChecks, type ForceOption } from './busy-checks.js';
import type { CatalogParts } from './catalog-parts.js';
import {
  cloneSnapshot,
  createVdi,
  removeVdi,
  resizeVdi,
  rollBack,
  type CreateOptions,
  type ResizeOptions,
} from './lifecycle.js';
import { detailsOf, detailsOfAll, type VdiDetails } from './details.js';
import { beginFilling, finishFilling } from './filling.js';
import { InUse } from './in-use.js';
import { DEFAULT_IN_USE_MS } from './in-use-time.js';
import { KeptSnapshots, type Ended, type TemporaryKeeper } from './kept-snapshots.js';
import type { LockReport, LockStatus, UnlockOptions } from './cluster-locks.js';
import { Lookup } from './lookup.js';
import { StoredFacts } from './stored-facts.js';
import type { Log } from './log.js';
import { NameQueue } from './name-queue.js';
import { OpenVdis } from './open-vdis.js';
import { OperationQueue } from './operation-queue.js';
import {
  dropLeftovers,
  dropTemporary,
  openTemporary,
  takeSnapshot,
  takeTemporary,
  type SnapshotOptions,
} from './snapshots.js';
import type { Beginning, Filling } from './unfinished.js';
import { listLocks, unlock } from './unlocking.js';
import type { Vdi } from './vdi.js';

export interface CatalogOptions {
  /** How long a client that was cut off counts as a user. */
  readonly inUseMs?: number | undefined;
  readonly log?: Log | undefined;
}

export class VdiCatalog {
  readonly #parts: CatalogParts;
  /** Small facts that outlive this process. */
  readonly facts: StoredFacts;

  constructor(store: ObjectStore, options: CatalogOptions = {}) {
    const { inUseMs = DEFAULT_IN_USE_MS, log = () => undefined } = options;
    this.facts = new StoredFacts(store.state, log);
    const names = new NameQueue();
    const open = new OpenVdis(store, names);
    const inUse = new InUse(this.facts, { forMs: inUseMs, log });
    this.#parts = {
      store,
      queue: new OperationQueue(store, names),
      open,
      lookup: new Lookup(store, open),
      inUse,
      busy: new BusyChecks(open, inUse),
      kept: new KeptSnapshots(store, open),
      log,
    };
  }

  get location(): string {
    return this.#parts.store.location;
  }

  get identity(): string {
    return this.#parts.store.identity;
  }

  get inUse(): InUse {
    return this.#parts.inUse;
  }

  set keeper(keeper: TemporaryKeeper) {
    this.#parts.kept.keeper = keeper;
  }

  /** Nothing can be changed, and working VDIs are read-only as well. */
  get isReadOnly(): boolean {
    return this.#parts.queue.isReadOnly;
  }

  /** Errors: READ_ONLY. */
  mustBeWritable(): void {
    this.#parts.queue.mustBeWritable();
  }

  /** Where temporary snapshots are in memory only, a read-only store has them too. Errors: READ_ONLY. */
  mustTakeTemporaries(): void {
    this.#parts.queue.mustTakeTemporaries();
  }

  /** VDIs and their snapshots: by name, snapshots in the order they were taken, the working VDI last. */
  async list(): Promise<readonly VdiRecord[]> {
    return this.#parts.store.catalog.list();
  }

  /** VDIs and snapshots that cannot be listed, because they cannot be read. */
  damaged(): Promise<readonly DamagedVdi[]> {
    return this.#parts.lookup.damaged();
  }

  /** The VDI and snapshots of one name, in the order of `list`. Its cost does not grow with other names. */
  named(name: string): Promise<readonly VdiRecord[]> {
    return this.#parts.lookup.named(name);
  }

  /** "NAME", "NAME@TAG" or another form of names.ts. Errors: BAD_NAME, NO_VDI, NO_TAG, AMBIGUOUS. */
  find(spec: string): Promise<VdiRecord> {
    return this.#parts.lookup.findText(spec);
  }

  /** Errors: those of `find`. */
  show(spec: string): Promise<VdiDetails> {
    return detailsOf(this.#parts, spec);
  }

  /** The same of all, in one pass. A client or VDI that comes or goes meanwhile may be in it or not. */
  details(): Promise<VdiDetails[]> {
    return detailsOfAll(this.#parts);
  }

  /** An empty VDI of `size` bytes. Errors: BAD_NAME, BAD_SIZE, EXISTS, BUSY, UNSUPPORTED, LIMIT, READ_ONLY. */
  create(name: string, size: number, options: CreateOptions = {}): Promise<VdiRecord> {
    return createVdi(this.#parts, name, size, options);
  }

  /**
   * Make the VDI `name`, or take the existing one, to be filled by one run of a command. From here until `finish` it is
   * unfinished: only a caller that gives that run can open or change it. Errors: EXISTS (unless the same command left it
   * unfinished, or it is to be overwritten), those of `create`.
   */
  begin(name: string, beginning: Beginning): Promise<VdiRecord> {
    return beginFilling(this.#parts, name, beginning);
  }

  /** The VDI that `begin` began is complete: make it durable, and an ordinary VDI. Errors: UNFINISHED (another run's). */
  finish(name: string, run: string): Promise<VdiRecord> {
    return finishFilling(this.#parts, name, run);
  }

  /** Errors: UNFINISHED (`run` is not the run that fills the VDI, or it is being filled and there is no `run`). */
  mustBeHeldBy(record: VdiRecord, run: string | undefined): Promise<void> {
    return this.#parts.lookup.mustBeHeldBy(record, run);
  }

  /**
   * Freeze the VDI's present content as NAME@TAG, also while it is written. With `run`, of a VDI that is being filled: the
   * VDI stays unfinished, the snapshot is not. Errors: BAD_NAME, BAD_TIME, EXISTS, BUSY, UNFINISHED, READ_ONLY, those of
   * `find`.
   */
  snapshot(name: string, tag: string, options: SnapshotOptions = {}): Promise<VdiRecord> {
    return takeSnapshot(this.#parts, name, tag, options);
  }

  /**
   * A snapshot under a reserved tag ("now", "now:LABEL"), to be dropped with `dropTemporary` when its last reader is gone.
   * Several may have one tag; their vids differ. Errors: BAD_NAME, UNFINISHED, READ_ONLY, those of `find`.
   */
  snapshotTemporary(name: string, tag: string): Promise<VdiRecord> {
    return takeTemporary(this.#parts, name, tag);
  }

  /** Drop a temporary snapshot without a trace; of several with one tag, this `vid`. Errors: BAD_NAME, BUSY, READ_ONLY. */
  dropTemporary(name: string, tag: string, vid?: number): Promise<void> {
    return dropTemporary(this.#parts, name, tag, vid);
  }

  /** As openVdi. Errors: NO_TAG (it has ended). */
  openTemporary(vid: number): Promise<Vdi> {
    return openTemporary(this.#parts, vid);
  }

  /** Drop the temporary snapshots that an earlier process was killed with. Returns how many. */
  dropLeftovers(): Promise<number> {
    return dropLeftovers(this.#parts);
  }

  /**
   * A new VDI that starts as the snapshot. Errors: IS_SNAPSHOT (`spec` is none), UNSUPPORTED (it is temporary), BAD_NAME,
   * EXISTS, BUSY, READ_ONLY.
   */
  clone(spec: string, newName: string, options: ForceOption = {}): Promise<VdiRecord> {
    return cloneSnapshot(this.#parts, spec, newName, options);
  }

  /**
   * The working VDI gets the content of the snapshot. What was written since is gone, and so is the mark "unfinished", unless
   * the run that fills the VDI calls with its `run`. Kept temporary snapshots of it end. Errors: IS_SNAPSHOT (`spec` is
   * none), UNSUPPORTED (it is temporary), BUSY, UNFINISHED, READ_ONLY, those of `find`.
   */
  rollback(spec: string, options: Filling & ForceOption = {}): Promise<VdiRecord & Ended> {
    return rollBack(this.#parts, spec, options);
  }

  /**
   * Grow, also while it is open (connections made later see the new size); or shrink with `force`, which destroys the data
   * behind the new end, and not while it is open. Errors: NEEDS_FORCE, BUSY, BAD_SIZE, UNFINISHED, READ_ONLY, those of
   * `find`.
   */
  resize(name: string, size: number, options: ResizeOptions = {}): Promise<VdiRecord> {
    return resizeVdi(this.#parts, name, size, options);
  }

  /**
   * Delete a snapshot or a working VDI that nobody has open; snapshots of a deleted VDI stay. With `run`, only a VDI that
   * this run fills. Errors: BUSY, UNFINISHED, READ_ONLY, those of `find`.
   */
  remove(spec: string, options: Filling & ForceOption = {}): Promise<Ended> {
    return removeVdi(this.#parts, spec, options);
  }

  /**
   * Check the whole store; all other operations wait until it is done. Kept temporary snapshots end first: a check needs a
   * store in which nothing changes. Errors: BUSY (a VDI is open), READ_ONLY (with `repair`).
   */
  async check(options: { repair: boolean }): Promise<CheckReport & Ended> {
    const { store, queue, open, busy, kept } = this.#parts;
    if (options.repair) queue.mustBeWritable();
    // Refuse, and wait for flushes, before the check makes all others wait.
    busy.mustAllBeClosed();
    await open.lastFlushes();
    return queue.alone(async () => {
      busy.mustAllBeClosed();
      await open.settleAll();
      const ended = await kept.end(await store.catalog.list(), 'the store was checked');
      return { ...(await store.catalog.check(options)), ended };
    });
  }

  /** What is to be merged in the background; undefined if the store has nothing like that. */
  get merging(): Merging | undefined {
    return this.#parts.store.merging;
  }

  /** The locks that the nodes of a cluster keep. Errors: UNSUPPORTED (a local store). */
  locks(): Promise<LockReport> {
    return listLocks(this.#parts);
  }

  /**
   * Take a lock away that a client has left behind. Errors: UNSUPPORTED, NOT_LOCKED, BUSY (daemons of this machine have it
   * open), NEEDS_FORCE (a client may rely on it, and `heldBy` does not name the node whose lock it is), READ_ONLY.
   */
  unlock(spec: string, options: UnlockOptions = {}): Promise<LockStatus> {
    return unlock(this.#parts, spec, options);
  }

  /**
   * Open "NAME" or "NAME@TAG"; every open needs one `release`. All users share one Vdi. `mapOnly`: its object map is read and
   * not its data, so it may be unfinished. Errors: UNFINISHED (unless by its own `run`), those of `find`.
   */
  openVdi(spec: string, options: { readonly run?: string; readonly mapOnly?: boolean } = {}): Promise<Vdi> {
    const { queue, open, lookup } = this.#parts;
    return queue.on(spec, async () => {
      const record = await lookup.findText(spec);
      if (!options.mapOnly) await lookup.mustBeHeldBy(record, options.run);
      return open.acquire(record);
    });
  }

  /**
   * The counterpart of openVdi. The last user's VDI is flushed and closed. Only operations that need it closed wait for that;
   * a user who opens it meanwhile gets it as it is.
   */
  release(vdi: Vdi): Promise<void> {
    return this.#parts.open.release(vdi);
  }

  /** Wait for the operations in flight, flush and close all VDIs, and close the store. */
  close(): Promise<void> {
    const { store, queue, open } = this.#parts;
    return queue.alone(async () => {
      open.stop();
      try {
        await this.facts.close();
      } finally {
        await store.close();
      }
    });
  }
}
