/**
 * The catalog people work with: VDIs and snapshots by name, whether they are being served or not. Owns which VDIs are
 * open and by how many, and runs one catalog operation at a time on each name; reads and writes of open VDIs go on
 * meanwhile, and what may take long (a flush) is done before a name is taken or after it is given back.
 */
import {
  DEFAULT_BLOCK_SIZE_SHIFT,
  MAX_BLOCK_SIZE_SHIFT,
  MAX_DATA_OBJECTS,
  MIN_BLOCK_SIZE_SHIFT,
  StoreError,
  type Awaitable,
  type CheckReport,
  type DamagedVdi,
  type ObjectStore,
  type OpenVdi,
  type Redundancy,
  type Switch,
  type Usage,
  type VdiLock,
  type VdiRecord,
} from '../store/object-store.js';
import { describeRedundancy, formatRedundancy, isSameRedundancy } from '../store/redundancy.js';
import { CatalogError } from './catalog-error.js';
import { DEFAULT_IN_USE_MS, InUse, type ClientUse } from './in-use.js';
import { locksOf, mayUnlock, ofVid, type LockReport, type LockStatus, type UnlockOptions } from './locks.js';
import { Memory } from './memory.js';
import { checkName, checkTag, checkTemporaryTag, isTemporaryTag, parseSpec, specOf, type VdiSpec } from './names.js';
import { openAsVdi } from './open-as-vdi.js';
import { Turns } from './turns.js';
import {
  describeUnfinished,
  isHeldBy,
  isOfSame,
  notHeldBy,
  type Beginning,
  type Circumstances,
  type Filling,
} from './unfinished.js';
import type { Vdi } from './vdi.js';

/** Sizes are multiples of this, so that every client's block size fits. */
const SIZE_UNIT = 512;
/** Times are stored as seconds in 32 bits by a cluster. */
const MAX_TIME_MS = 2 ** 32 * 1000;
/** For a command that could be told to write over what is there; unless it cannot. */
const OVERWRITE = ', and --overwrite writes over it';
const NO_HINT = '';
/** Clients that a message names. */
const MAX_NAMED = 4;
/** Records that are worked on in one turn of the loop when there are very many. */
const RECORDS_PER_TURN = 500;

export interface VdiDetails extends VdiRecord {
  /** Space of its allocated objects, full objects counted, whether shared or not. */
  readonly allocatedBytes: number;
  /** ... of those that no other VDI or snapshot refers to. */
  readonly exclusiveBytes: number;
  /** Why neither can be told. */
  readonly damage?: string;
  /** How many have it open. */
  readonly open: number;
  /** Who has it open, or was cut off from it and may come back. Commands of ours are not among them. */
  readonly clients: readonly ClientUse[];
  /** Temporary snapshots of it, or this one, that nobody has open and that are kept for clients that may come back. */
  readonly kept: readonly KeptSnapshot[];
}

/** A temporary snapshot that waits for its client. Times are Date.now(). */
export interface KeptSnapshot {
  readonly spec: string;
  readonly takenAt: number;
  readonly client: string;
  readonly until: number;
}

/** Who keeps temporary snapshots when nobody has them open (src/export/temporary-snapshots.ts). */
export interface TemporaryKeeper {
  /** For whom this one is kept; undefined if somebody has it open, or nobody comes back to it. */
  kept(vid: number): { readonly client: string; readonly until: number } | undefined;
  /** It was dropped, for the sake of something else: whoever comes back to it gets an error that says `why`. */
  dropped(vid: number, why: string): void;
}

export interface CatalogOptions {
  /** How long a client that was cut off counts as a user. */
  readonly inUseMs?: number | undefined;
  /** Told what an operator should know and no caller waits for. */
  readonly log?: ((line: string, details?: object) => void) | undefined;
}

/** What may not be done to something that is in use. */
export interface ForceOption {
  /** Whoever was cut off will not come back. Whoever is connected is not overruled. */
  readonly force?: boolean | undefined;
}

/** For results: temporary snapshots that were kept for clients that may come back, and have ended with this. */
export interface Ended {
  readonly ended: readonly KeptSnapshot[];
}

type NewVdi = Pick<Beginning, 'size' | 'blockSizeShift' | 'likeShift' | 'largestSize' | 'isOpenEnded'>;

interface OpenEntry {
  readonly vdi: Vdi;
  /** 0: its last user has left, it is being flushed, and whoever comes before it is closed takes it over. */
  users: number;
  /** The flush after the last user. Never fails: closing does it again. */
  leaving?: Promise<unknown>;
  closed?: Promise<void>;
}

export class VdiCatalog {
  readonly #store: ObjectStore;
  /** By current vid; a working VDI changes its vid with every snapshot. */
  readonly #open = new Set<OpenEntry>();
  readonly #log: (line: string, details?: object) => void;
  readonly #turns = new Turns();
  #isClosed = false;
  /** What outlives this process. */
  readonly memory: Memory;
  readonly inUse: InUse;
  keeper: TemporaryKeeper | undefined;

  constructor(store: ObjectStore, options: CatalogOptions = {}) {
    this.#store = store;
    const { inUseMs = DEFAULT_IN_USE_MS, log = () => undefined } = options;
    this.#log = log;
    this.memory = new Memory(store.state, log);
    this.inUse = new InUse(this.memory, { forMs: inUseMs, log });
  }

  get location(): string {
    return this.#store.location;
  }

  get identity(): string {
    return this.#store.identity;
  }

  /** Nothing can be changed, and working VDIs are read-only as well. */
  get isReadOnly(): boolean {
    return this.#store.readOnlyBecause !== undefined;
  }

  /** Errors: READ_ONLY. */
  mustBeWritable(): void {
    const why = this.#store.readOnlyBecause;
    if (why !== undefined) throw new CatalogError('READ_ONLY', why);
  }

  /** Temporary snapshots that are in memory can be taken of a store that cannot be changed, too. Errors: READ_ONLY. */
  mustTakeTemporaries(): void {
    if (!this.#store.catalog.temporariesStoreNothing) this.mustBeWritable();
  }

  /** VDIs and their snapshots: by name, snapshots in the order they were taken, the working VDI last. */
  async list(): Promise<readonly VdiRecord[]> {
    return this.#store.catalog.list();
  }

  /** What cannot be listed, because it cannot be read. */
  async damaged(): Promise<readonly DamagedVdi[]> {
    return (await this.#store.catalog.damaged?.()) ?? [];
  }

  /** Those of one name, in the same order; nothing of the others is looked at. */
  async named(name: string): Promise<readonly VdiRecord[]> {
    return this.#store.catalog.named(name);
  }

  /** "NAME", "NAME@TAG" or another form of names.ts. Errors: BAD_NAME, NO_VDI, NO_TAG. */
  async find(spec: string): Promise<VdiRecord> {
    return this.#find(parseSpec(spec));
  }

  show(spec: string): Promise<VdiDetails> {
    return this.#on(spec, async () => {
      const record = await this.find(spec);
      const kept = (await this.named(record.name)).filter(({ vid }) => vid === record.vid || !record.isSnapshot);
      const usage = await this.#store.catalog.usage(record.vid);
      const clients = this.inUse.of(record.name, record.tag);
      const open = this.#entryOf(record.vid)?.users ?? 0;
      return detailsOf(record, usage, { open, clients, kept: kept.flatMap((each) => this.#keptOf(each) ?? []) });
    });
  }

  /** The same of all, in one pass; who comes or goes meanwhile is in it or not. */
  async details(): Promise<VdiDetails[]> {
    const records = await this.list();
    const usages = await this.#store.catalog.usages();
    const clients = this.inUse.all();
    const open = new Map(Array.from(this.#open, ({ vdi, users }) => [vdi.record.vid, users]));
    const kept = new Map<string, KeptSnapshot[]>();
    for (const record of records) {
      const one = this.#keptOf(record);
      if (one) kept.set(record.name, [...(kept.get(record.name) ?? []), one]);
    }
    const all: VdiDetails[] = [];
    for (const [n, record] of records.entries()) {
      if (n % RECORDS_PER_TURN === RECORDS_PER_TURN - 1) await new Promise((resolve) => setImmediate(resolve));
      const usage = usages.get(record.vid);
      if (usage === undefined) continue; // deleted since
      const ofName = kept.get(record.name) ?? [];
      const label = specOf(record);
      all.push(
        detailsOf(record, usage, {
          open: open.get(record.vid) ?? 0,
          clients: clients.of(record.name, record.tag),
          kept: record.isSnapshot ? ofName.filter(({ spec }) => record.isTemporary && spec === label) : ofName,
        }),
      );
    }
    return all;
  }

  /** An empty VDI of `size` bytes. `forceHint`: what stands for --force where that cannot be given. Errors: BAD_NAME, BAD_SIZE, EXISTS. */
  create(
    name: string,
    size: number,
    options: {
      readonly blockSizeShift?: number | undefined;
      readonly redundancy?: Redundancy | undefined;
      readonly forceHint?: string;
    } & ForceOption = {},
  ): Promise<VdiRecord> {
    return this.#changeOn([name], async () => {
      const { redundancy } = options;
      const shift = this.#shiftOf(name, { size, blockSizeShift: options.blockSizeShift });
      await this.#mustHold(redundancy);
      await this.#mustNotExist(name);
      this.#mustBeUnused({ name, tag: '' }, 'made anew', options, options.forceHint);
      return this.#store.catalog.create(name, size, shift, undefined, redundancy);
    });
  }

  /** Errors: UNSUPPORTED, LIMIT. */
  async #mustHold(redundancy: Redundancy | undefined): Promise<void> {
    if (redundancy === undefined) return;
    const { catalog } = this.#store;
    if (catalog.mustHold) return catalog.mustHold(redundancy);
    throw new CatalogError(
      'UNSUPPORTED',
      `--copies ${formatRedundancy(redundancy)} is for Sheepdog clusters (--cluster); ${this.location} is a local store, ` +
        'which keeps every object once',
    );
  }

  /**
   * Make the VDI `name`, or take one that is there, to be filled by one run of a command. From here on until `finish` it
   * is unfinished: only who names that run can open or change it. Errors: EXISTS unless what is there was left unfinished
   * by the same command, or it overwrites; BUSY; those of `create`.
   */
  begin(name: string, beginning: Beginning): Promise<VdiRecord> {
    return this.#changeOn([name], async () => {
      const { by, of, run, redundancy, overwrites, goesOn, force } = beginning;
      checkName(name);
      await this.#mustHold(redundancy);
      const named = await this.named(name);
      const found = named.find(({ isSnapshot }) => !isSnapshot);
      if (found) await this.#settle(found);
      const isKept = (record: VdiRecord): boolean => !this.#isUsed(record.vid) && this.#keptOf(record) !== undefined;
      const before = found?.unfinished;
      const isNobodys = found !== undefined && ((await this.#store.catalog.isBarelyMade?.(found)) ?? false);
      const isSame = isOfSame(before, beginning);
      if (found && !isNobodys && !isSame && !overwrites)
        throw await this.#existing(found, by === 'migrate' ? NO_HINT : OVERWRITE);
      if (found) this.#mustBeFree(found, 'overwritten', { force });
      if (found && !isNobodys && (!before?.isNew || (isSame && goesOn))) {
        mustBeKept(found, redundancy);
        const unfinished = { by, of, run, since: before?.since ?? Date.now(), isNew: before?.isNew ?? false };
        return this.#using(found, (vdi) => vdi.opened.mark(unfinished));
      }
      const shift = this.#shiftOf(name, beginning);
      // Looked at before anything goes: what a migration has carried over so far are the snapshots.
      const [other] = named.filter((record) => record !== found && !isKept(record));
      if (other) throw await this.#existing(found ?? other, NO_HINT);
      const ended = await this.#endKept(named, `${name} was made anew`);
      for (const { spec, client } of ended)
        this.#log(`ended ${spec}, which was kept for ${client}: ${name} was made anew`);
      // What a command has made and not finished holds nothing that was there before it.
      if (found) await this.#store.catalog.remove(found.vid);
      this.#mustBeUnused({ name, tag: '' }, 'made anew', { force });
      const size = beginning.isOpenEnded ? MAX_DATA_OBJECTS * 2 ** shift : beginning.size;
      const unfinished = { by, of, run, since: Date.now(), isNew: true };
      return this.#store.catalog.create(name, size, shift, unfinished, redundancy);
    });
  }

  /** What `begin` began is complete: make it durable, and an ordinary VDI. Errors: UNFINISHED if it is not that run's. */
  async finish(name: string, run: string): Promise<VdiRecord> {
    await this.#flushAhead(name);
    return this.#change(name, async () => {
      const record = await this.#findWorking(name);
      await this.mustBeHeldBy(record, run);
      return this.#using(record, async (vdi) => {
        await vdi.flush();
        return vdi.opened.mark(undefined);
      });
    });
  }

  /**
   * Freeze the VDI's present content as NAME@TAG. It may be in use: its writers go on without noticing. `takenAt`
   * (milliseconds since the epoch): when it was taken in the store that it is a copy from. `run`: of a VDI that is being
   * filled, which stays unfinished; the snapshot is not.
   */
  async snapshot(
    name: string,
    tag: string,
    { takenAt, run, force }: { readonly takenAt?: number | undefined } & Filling & ForceOption = {},
  ): Promise<VdiRecord> {
    await this.#flushAhead(name);
    return this.#change(name, async () => {
      checkTag(tag);
      const why = this.#store.catalog.whyNoTag?.(tag);
      if (why !== undefined) throw new CatalogError('BAD_NAME', `tag "${tag}" ${why}`);
      const { name: own } = await this.#findWorking(name);
      this.#mustBeUnused({ name: own, tag }, 'taken anew', { force });
      if (takenAt !== undefined && !(Number.isSafeInteger(takenAt) && takenAt > 0 && takenAt < MAX_TIME_MS)) {
        throw new CatalogError('BAD_TIME', `a snapshot cannot have been taken at ${takenAt} ms since 1970`);
      }
      return this.#snapshot(name, tag, (vdi) => vdi.prepareSwitch(tag, takenAt), run);
    });
  }

  /**
   * The same under a reserved tag ("now", "now:LABEL"), to be dropped with `dropTemporary` when its last reader is gone. There
   * may be several of a tag; they are told apart by their vid.
   */
  snapshotTemporary(name: string, tag: string): Promise<VdiRecord> {
    return this.#changeTemporaries(name, async () => {
      checkTemporaryTag(tag);
      return this.#snapshot(name, tag, (vdi) => vdi.prepareTemporary?.(tag) ?? vdi.prepareSwitch(tag));
    });
  }

  /** Drop a temporary snapshot, as if it had never been; of several of a tag, this `vid`. */
  dropTemporary(name: string, tag: string, vid?: number): Promise<void> {
    return this.#changeTemporaries(name, async () => {
      checkTemporaryTag(tag);
      const { name: own } = parseSpec(name);
      const record = (await this.named(own)).find(
        (other) => other.isTemporary && other.tag === tag && (vid === undefined || other.vid === vid),
      );
      if (!record) return; // by somebody else
      await this.#settle(record);
      this.#mustBeClosed(record, 'dropped');
      await this.#store.catalog.remove(record.vid);
    });
  }

  /** As openVdi. Errors: NO_TAG if it is not there any more. */
  openTemporary(vid: number): Promise<Vdi> {
    return this.#onVid(vid, async () => {
      const record = await this.#store.catalog.record(vid);
      if (!record?.isTemporary) throw new CatalogError('NO_TAG', 'this temporary snapshot has ended');
      return this.#acquire(record);
    });
  }

  /** Drop the temporary snapshots of a process that did not live to do it. Returns how many. */
  dropLeftovers(): Promise<number> {
    return this.#turns.takeAll(async () => {
      // Earlier versions stored them in a local store, where nobody else gives a tag.
      const isOurs = this.#store.catalog.temporariesStoreNothing === true;
      const leftovers = (await this.list()).filter(
        ({ isSnapshot, isTemporary, tag }) => isTemporary || (isOurs && isSnapshot && isTemporaryTag(tag)),
      );
      for (const { vid } of leftovers) await this.#store.catalog.remove(vid);
      return leftovers.length;
    });
  }

  async #snapshot(
    name: string,
    tag: string,
    prepare: (vdi: OpenVdi) => Awaitable<Switch>,
    run?: string,
  ): Promise<VdiRecord> {
    const record = await this.#findWorking(name);
    await this.mustBeHeldBy(record, run);
    const isTaken = (await this.named(record.name)).some((other) => other.tag === tag);
    if (isTaken && !isTemporaryTag(tag)) {
      throw new CatalogError('EXISTS', `${name} has a snapshot "${tag}" already; choose another tag or delete it`);
    }
    return this.#using(record, async (vdi) => vdi.take(await prepare(vdi.opened)));
  }

  /** A new VDI that starts as the snapshot. Errors: IS_SNAPSHOT if `spec` is not one, EXISTS. */
  clone(spec: string, newName: string, options: ForceOption = {}): Promise<VdiRecord> {
    return this.#change(spec, async () => {
      checkName(newName);
      const base = await this.#findSnapshot(spec, 'clone');
      await this.#mustNotExist(newName);
      this.#mustBeUnused({ name: newName, tag: '' }, 'made anew', options);
      return this.#store.catalog.clone(base.vid, newName);
    }, [newName]);
  }

  /**
   * The working VDI becomes what the snapshot is; what was written since is gone, and that it was unfinished: with `run`,
   * by whoever fills it, it stays so. Not while it is in use. Temporary snapshots that are kept for somebody end with it.
   */
  rollback(spec: string, { run, ...options }: Filling & ForceOption = {}): Promise<VdiRecord & Ended> {
    return this.#change(spec, async () => {
      const base = await this.#findSnapshot(spec, 'roll back to');
      const working = await this.#find({ name: base.name, tag: undefined });
      if (run !== undefined) await this.mustBeHeldBy(working, run);
      await this.#settle(working);
      this.#mustBeFree(working, 'rolled back', options);
      const ended = await this.#endKept(await this.named(base.name), `${base.name} was rolled back`);
      const unfinished = run === undefined ? undefined : working.unfinished;
      return { ...(await this.#store.catalog.rollback(working.vid, base.vid, unfinished)), ended };
    });
  }

  /**
   * Grow, also while it is open (connections made later see the new size), or shrink with `force`, which cuts off what
   * is behind the new end, and not while it is open. Errors: NEEDS_FORCE, BUSY, BAD_SIZE, UNFINISHED.
   */
  async resize(
    name: string,
    size: number,
    options: ForceOption &
      Filling & {
        /** Also if somebody was cut off from it and may come back. */
        readonly forceInUse?: boolean | undefined;
      } = {},
  ): Promise<VdiRecord> {
    await this.#flushAhead(name);
    return this.#change(name, async () => {
      const record = await this.#findWorking(name);
      await this.mustBeHeldBy(record, options.run);
      checkSize(size, record.blockSizeShift, record.maxObjects);
      if (size === record.size) return record;
      if (size < record.size) {
        if (!options.force) {
          throw new CatalogError(
            'NEEDS_FORCE',
            `${name} has ${record.size} bytes; shrinking it to ${size} destroys the rest: say --force if that is meant`,
          );
        }
        await this.#settle(record);
        this.#mustBeFree(record, 'shrunk', { force: options.forceInUse }, '--force-in-use');
      }
      return this.#using(record, async (vdi) => {
        // Growing again must not bring back what was cut off.
        if (size < record.size) await vdi.zero(size, record.size - size, { noHole: false, fua: true });
        await vdi.flush();
        return vdi.withWritersHeld(() => vdi.opened.resize(size));
      });
    });
  }

  /** Delete a snapshot or a working VDI that nobody has open; snapshots of a deleted VDI stay. With `run` only what it fills. */
  async remove(spec: string, { run, ...options }: Filling & ForceOption = {}): Promise<Ended> {
    const ended = await this.#removing(spec, async (record) => {
      if (run !== undefined) await this.mustBeHeldBy(record, run);
      const named = await this.named(record.name);
      if (record.isTemporary) {
        const same = named.filter(({ tag }) => tag === record.tag);
        const gone = await this.#endKept(same, `${spec} was deleted`);
        if (gone.length > 0) return gone;
      }
      await this.#settle(record);
      this.#mustBeFree(record, 'deleted', options);
      const gone = record.isSnapshot ? [] : await this.#endKept(named, `${record.name} was deleted`);
      await this.#store.catalog.remove(record.vid);
      // Somebody may be about to come back to it.
      if (record.isTemporary) this.keeper?.dropped(record.vid, `${spec} was deleted`);
      return gone;
    });
    // Others need not wait for this.
    await this.#store.catalog.reclaimed();
    return { ended };
  }

  /** A turn on its name, and on those of other VDIs that are changed along with it. */
  async #removing<T>(spec: string, work: (record: VdiRecord) => Promise<T>): Promise<T> {
    const more = new Set<string>();
    for (;;) {
      const known = more.size;
      const done = await this.#change(spec, async () => {
        const record = await this.find(spec);
        for (const name of this.#store.catalog.touchedBy?.(record.vid) ?? []) {
          if (name !== record.name) more.add(name);
        }
        return more.size > known ? undefined : { result: await work(record) };
      }, [...more]);
      if (done) return done.result;
    }
  }

  /**
   * Temporary snapshots that are kept for somebody end with it: they are a part of what moves. Everything else waits until
   * it is done.
   */
  async check(options: { repair: boolean }): Promise<CheckReport & Ended> {
    if (options.repair) this.mustBeWritable();
    // Before everybody has to wait for it: that it cannot be done now, and what may take long.
    this.#mustAllBeLeft();
    for (const { leaving } of [...this.#open]) await leaving;
    return this.#turns.takeAll(async () => {
      this.#mustAllBeLeft();
      for (const { vdi } of [...this.#open]) await this.#settle(vdi.record);
      const ended = await this.#endKept(await this.list(), 'the store was checked');
      return { ...(await this.#store.catalog.check(options)), ended };
    });
  }

  /** The locks that the nodes of a cluster keep. Errors: UNSUPPORTED of a local store. */
  async locks(): Promise<LockReport> {
    const locks = locksOf(this.#store);
    const list = await locks.list();
    const records = list.length === 0 ? [] : await this.#recordsOf(list);
    return { areEnforced: locks.areEnforced, locks: list.map((lock) => this.#lockStatus(lock, records)) };
  }

  /** What is locked is told, whether all that it is can be read or not. */
  async #recordsOf(locks: readonly VdiLock[]): Promise<readonly VdiRecord[]> {
    try {
      return await this.list();
    } catch {
      const each = locks.map(async ({ vid }) => this.#store.catalog.record(vid));
      const read = await Promise.allSettled(each);
      return read.flatMap((record) => (record.status === 'fulfilled' ? (record.value ?? []) : []));
    }
  }

  #lockStatus(lock: VdiLock, records: readonly VdiRecord[]): LockStatus {
    const record = records.find(({ vid }) => vid === lock.vid);
    return { ...lock, ...ofVid(record), usedBy: record === undefined ? [] : this.#usersHere(record) };
  }

  /** Who has the VDI of this name open through daemons of this machine, as far as that is known. */
  #usersHere({ vid, name }: VdiRecord): readonly string[] {
    const uses = this.inUse.of(name, '').filter(({ lostAt }) => lostAt === null);
    if (uses.length === 0 && this.#isUsed(vid)) return ['a command through this daemon'];
    return uses.map(({ client }) => client);
  }

  /**
   * Take a lock away that somebody has left behind. What is meant is looked at again in the moment before, and told to the
   * nodes by its id. Errors: UNSUPPORTED, NOT_LOCKED, BUSY if this machine's daemons have it open, NEEDS_FORCE if somebody
   * may rely on it and `heldBy` does not say the node whose lock it is.
   */
  unlock(spec: string, options: UnlockOptions = {}): Promise<LockStatus> {
    return this.#change(spec, async () => {
      const locks = locksOf(this.#store);
      const { vid } = parseSpec(spec);
      // An id may be that of a deleted VDI, whose lock is in the way of the next one that gets this id.
      const find = async (): Promise<VdiRecord | undefined> =>
        vid === undefined ? await this.find(spec) : await this.#store.catalog.record(vid);
      const record = await find();
      if (record) {
        await this.#settle(record);
        this.#mustBeClosed(record, 'unlocked');
        const [elsewhere] = this.inUse.of(record.name, '').filter(({ isElsewhere }) => isElsewhere);
        if (elsewhere) throw openElsewhere(spec, elsewhere, 'unlocked');
      }
      const found = (await locks.list()).find((other) => other.vid === (vid ?? record?.vid));
      const status = found && this.#lockStatus(found, record ? [record] : []);
      const { lock, holder } = mayUnlock(spec, { areEnforced: locks.areEnforced, status, record, options });
      if ((await find())?.vid !== record?.vid) {
        throw new CatalogError(
          'NOT_LOCKED',
          `${spec} has changed at this moment (a snapshot?); nothing was done, look again`,
        );
      }
      await locks.unlock(lock, holder);
      return lock;
    });
  }

  /** Errors: BUSY. */
  #mustAllBeLeft(): void {
    for (const { vdi, users } of this.#open) {
      if (users === 0) continue;
      const who = this.#whoHas(vdi.record);
      throw new CatalogError('BUSY', `${specOf(vdi.record)} is open; a check needs all clients disconnected${who}`);
    }
  }

  /**
   * Open "NAME" or "NAME@TAG"; every open needs one `release`. All who have it open share one Vdi. Errors: UNFINISHED if
   * it is, unless by its own `run`, or for who says that its map is all that is looked at.
   */
  openVdi(spec: string, options: { readonly run?: string; readonly mapOnly?: boolean } = {}): Promise<Vdi> {
    return this.#on(spec, async () => {
      const record = await this.find(spec);
      if (!options.mapOnly) await this.mustBeHeldBy(record, options.run);
      return this.#acquire(record);
    });
  }

  /**
   * The counterpart of openVdi; with the last one the VDI is flushed and closed. Nobody waits for that flush but who asks for
   * what needs the VDI closed: who opens it meanwhile has it as it is.
   */
  async release(vdi: Vdi): Promise<void> {
    const entry = [...this.#open].find((each) => each.vdi === vdi);
    if (!entry || entry.users === 0) throw new Error('invariant: released a VDI that is not open');
    if (--entry.users > 0) return;
    const { name } = vdi.record;
    entry.leaving = flushQuietly(vdi);
    await entry.leaving;
    await this.#turns.take([name], () => this.#closeUnused(entry));
  }

  /** Finish the operation under way, flush and close everything, and the store with it. */
  close(): Promise<void> {
    return this.#turns.takeAll(async () => {
      this.#isClosed = true;
      try {
        await this.memory.close();
      } finally {
        await this.#store.close();
      }
    });
  }

  async #find({ name, tag, vid }: VdiSpec): Promise<VdiRecord> {
    if (vid !== undefined) return this.#findById(vid);
    const named = await this.named(name);
    const tagged = named.filter((record) =>
      tag === undefined ? !record.isSnapshot : record.isSnapshot && record.tag === tag,
    );
    // What another tool has given such a tag is not what the tag says, and is not dropped as if it were.
    const saysTemporary = isTemporaryTag(tag ?? '');
    const fitting = saysTemporary ? tagged.filter(({ isTemporary }) => isTemporary) : tagged;
    // Of temporary snapshots of one tag, the newest that somebody reads.
    const newest = fitting.length > 1 && saysTemporary ? fitting.reverse() : fitting;
    const found = newest.find(({ vid }) => this.#isUsed(vid)) ?? newest[0];
    if (found && tag !== undefined && !saysTemporary && (found.isDoubtful || fitting.length > 1)) {
      throw ambiguous(found, named);
    }
    if (found) return found;
    await this.#mustNotBeDamaged(name, named);
    if (named.length === 0) {
      throw new CatalogError(
        'NO_VDI',
        `no VDI named "${name}" in ${this.location}; 'sheepgate vdi list' shows what is there`,
      );
    }
    if (tag === undefined) {
      throw new CatalogError('NO_VDI', `"${name}" has snapshots only, no working VDI; clone one to go on writing`);
    }
    const [other] = tagged;
    if (other) {
      throw new CatalogError(
        'NO_TAG',
        `"${name}" has no temporary snapshot "${tag}"; the one that another tool has given this tag is ${specOf(other)}`,
      );
    }
    throw new CatalogError('NO_TAG', `"${name}" has no snapshot "${tag}"; 'sheepgate vdi list' shows what is there`);
  }

  /** What is asked for is not among `named`: maybe it is there, and cannot be read. Errors: StoreError DAMAGED. */
  async #mustNotBeDamaged(name: string, named: readonly VdiRecord[]): Promise<void> {
    const [damaged] = (await this.#store.catalog.damaged?.(name)) ?? [];
    if (!damaged) return;
    const rest = named.length === 0 ? '' : `; what there is of it: ${named.map(specOf).join(', ')}`;
    throw new StoreError(
      'DAMAGED',
      `of "${name}" in ${this.location}, what has the id ${damaged.vid.toString(16)} cannot be read: ${damaged.why}${rest}`,
    );
  }

  /** Temporary snapshots come and go with those who have them open: they are nobody else's to open or delete. */
  async #findById(vid: number): Promise<VdiRecord> {
    const found = await this.#store.catalog.record(vid);
    if (found && !found.isTemporary) return found;
    const damaged = (await this.damaged()).find((other) => other.vid === vid);
    if (damaged) throw new StoreError('DAMAGED', `${vid.toString(16)} in ${this.location}: ${damaged.why}`);
    throw new CatalogError(
      'NO_VDI',
      `nothing has the id ${vid.toString(16)} in ${this.location}; 'sheepgate vdi list' shows the ids, and a VDI gets ` +
        'another one with every snapshot',
    );
  }

  async #findWorking(name: string): Promise<VdiRecord> {
    const spec = parseSpec(name);
    const found = spec.tag === undefined ? await this.#find(spec) : undefined;
    if (found === undefined || found.isSnapshot)
      throw new CatalogError('IS_SNAPSHOT', `${name} is a snapshot; give the VDI's name alone`);
    return found;
  }

  async #findSnapshot(text: string, purpose: string): Promise<VdiRecord> {
    const spec = parseSpec(text);
    const found = spec.tag !== undefined || spec.vid !== undefined ? await this.#find(spec) : undefined;
    if (!found?.isSnapshot) {
      throw new CatalogError('IS_SNAPSHOT', `can only ${purpose} a snapshot: give NAME@TAG, not "${text}"`);
    }
    return found;
  }

  /**
   * The object size of a VDI that is to be made: what was asked for; else the store's own, if it has one that is large enough;
   * else that of what is copied. Errors: BAD_NAME, BAD_SIZE.
   */
  #shiftOf(name: string, { size, blockSizeShift, likeShift, largestSize = size, isOpenEnded = false }: NewVdi): number {
    const own = this.#store.defaultBlockSizeShift;
    if (blockSizeShift !== undefined || own === undefined) {
      const shift = blockSizeShift ?? likeShift;
      return isOpenEnded ? checkNewVdi(name, SIZE_UNIT, shift) : checkNewVdi(name, size, shift);
    }
    if (likeShift !== undefined && largestSize > MAX_DATA_OBJECTS * 2 ** own) return checkNewVdi(name, size, likeShift);
    // What a cluster was formatted with may be more than can be asked for.
    checkName(name);
    if (!isOpenEnded) checkSize(size, own);
    return own;
  }

  /** Snapshots outlive their VDI, and a name stands for all of them. */
  async #mustNotExist(name: string): Promise<void> {
    const named = await this.named(name);
    const [first] = named;
    if (first) throw await this.#existing(named.find(({ isSnapshot }) => !isSnapshot) ?? first, NO_HINT);
  }

  async #existing(record: VdiRecord, hint: string): Promise<CatalogError> {
    const exists = `a VDI or snapshot named "${record.name}" exists already in ${this.location}`;
    if (!record.unfinished) return new CatalogError('EXISTS', exists);
    const circumstances = await this.#circumstancesOf(record);
    const left = describeUnfinished(record, circumstances);
    return new CatalogError('EXISTS', `${exists}: ${left}${circumstances.isAtWork ? '' : hint}`);
  }

  /**
   * Errors: UNFINISHED unless `run` is the run that is at work on the VDI, or there is no run and nothing to be at work on.
   */
  async mustBeHeldBy(record: VdiRecord, run: string | undefined): Promise<void> {
    if (!isHeldBy(record, run)) throw notHeldBy(record, run, await this.#circumstancesOf(record));
  }

  async #circumstancesOf({ name, vid }: VdiRecord): Promise<Circumstances> {
    const isOpen = (this.#entryOf(vid)?.users ?? 0) > 0;
    const hasSnapshots = (await this.named(name)).some((other) => other.isSnapshot && !other.isTemporary);
    // Only of this store's own clients is it known that there are none.
    return { isAtWork: isOpen || (this.#store.state?.isShared ? undefined : false), hasSnapshots };
  }

  /** Those who have open what somebody else has deleted keep it to themselves. */
  #entryOf(vid: number): OpenEntry | undefined {
    for (const entry of this.#open) {
      if (entry.vdi.record.vid === vid && !(entry.vdi.failure && entry.vdi.opened.look)) return entry;
    }
    return undefined;
  }

  #isUsed(vid: number): boolean {
    return (this.#entryOf(vid)?.users ?? 0) > 0;
  }

  #mustBeClosed(record: VdiRecord, what: string): void {
    const users = this.#entryOf(record.vid)?.users ?? 0;
    if (users === 0) return;
    throw new CatalogError(
      'BUSY',
      `${specOf(record)} is open by ${users} connection${users === 1 ? '' : 's'} and cannot be ${what} now; ` +
        `disconnect first${this.#whoHas(record)}`,
    );
  }

  /** Who is connected, behind a colon, as far as is known: commands of ours are not named. */
  #whoHas({ name, tag }: VdiRecord): string {
    const uses = this.inUse.of(name, tag).filter(({ lostAt }) => lostAt === null);
    if (uses.length === 0) return '';
    const named = uses.slice(0, MAX_NAMED).map(({ client, since }) => `${client}, since ${timeOf(since)}`);
    if (uses.length > MAX_NAMED) named.push(`and ${uses.length - MAX_NAMED} more`);
    return `: ${named.join('; ')}`;
  }

  /** The one check for all that replaces content, or takes it away. Errors: BUSY. */
  #mustBeFree(record: VdiRecord, what: string, { force }: ForceOption, forceOption?: string): void {
    this.#mustBeClosed(record, what);
    this.#mustBeUnused(record, what, { force }, forceOption);
  }

  /** Nobody was cut off from this who may come back and take it for what it was. It need not exist. Errors: BUSY. */
  #mustBeUnused(
    record: Pick<VdiRecord, 'name' | 'tag'>,
    what: string,
    { force }: ForceOption,
    forceOption = '--force',
  ): void {
    const { name, tag } = record;
    const spec = tag === '' ? name : `${name}@${tag}`;
    const uses = this.inUse.of(name, tag);
    const elsewhere = uses.find(({ isElsewhere }) => isElsewhere);
    if (elsewhere) throw openElsewhere(spec, elsewhere, what);
    if (force) {
      this.inUse.forgetLost(name, tag);
      return;
    }
    const [first, ...others] = uses.filter(({ lostAt }) => lostAt !== null);
    if (!first) return;
    const more = others.length === 0 ? '' : `, and by ${others.length} more`;
    throw new CatalogError(
      'BUSY',
      `${spec} is in use by ${first.client}${more}, whose connection was cut off at ${timeOf(first.lostAt ?? 0)} and who may ` +
        `come back until ${timeOf(first.until ?? 0)}: it cannot be ${what}, unless ${forceOption} says that nobody will`,
    );
  }

  #keptOf(record: VdiRecord): KeptSnapshot | undefined {
    if (!record.isTemporary) return undefined;
    const kept = this.keeper?.kept(record.vid);
    return kept && { spec: specOf(record), takenAt: record.snapshotAt, ...kept };
  }

  /** Drop those of these that are temporary snapshots and that nobody has open, though somebody may come back to them. */
  async #endKept(records: readonly VdiRecord[], why: string): Promise<KeptSnapshot[]> {
    const ended: KeptSnapshot[] = [];
    if (this.isReadOnly) return ended;
    for (const record of records) {
      const kept = this.#isUsed(record.vid) ? undefined : this.#keptOf(record);
      if (!kept) continue;
      await this.#settle(record);
      await this.#store.catalog.remove(record.vid);
      this.keeper?.dropped(record.vid, why);
      ended.push(kept);
    }
    return ended;
  }

  async #acquire(record: VdiRecord): Promise<Vdi> {
    let entry = this.#entryOf(record.vid);
    if (entry && isOutdated(entry.vdi.record, record)) {
      // Why it cannot be used any more is for those who have it open.
      await entry.vdi.opened.look?.().catch((error: unknown) => {
        if (!entry?.vdi.failure) throw error;
      });
      entry = this.#entryOf(record.vid);
    }
    if (!entry) {
      const opened = await this.#store.catalog.open(record.vid);
      entry = { vdi: openAsVdi(opened, this.#store.readOnlyBecause), users: 0 };
      this.#open.add(entry);
    }
    entry.users++;
    return entry.vdi;
  }

  /** If nobody has come meanwhile. Only in a turn on its name. */
  async #closeUnused(entry: OpenEntry): Promise<void> {
    if (entry.users > 0 || this.#isClosed) return;
    if (this.#open.delete(entry)) {
      // If this fails the store keeps what could not be flushed, and the next open or close tries again.
      entry.closed = entry.vdi.close();
    }
    await entry.closed;
  }

  /** Whoever has left this has really gone: it is closed, or is in use. Only in a turn on its name. */
  async #settle({ vid }: VdiRecord): Promise<void> {
    const entry = this.#entryOf(vid);
    if (!entry || entry.users > 0) return;
    await entry.leaving;
    // Who has left is told of it.
    await this.#closeUnused(entry).catch(() => undefined);
  }

  async #using<T>(record: VdiRecord, work: (vdi: Vdi) => Promise<T>): Promise<T> {
    const wasLeft = this.#entryOf(record.vid)?.users === 0;
    const vdi = await this.#acquire(record);
    try {
      return await work(vdi);
    } finally {
      const entry = [...this.#open].find((each) => each.vdi === vdi);
      // What was being left when we came is closed by those who left it.
      if (entry && --entry.users === 0 && !wasLeft) await this.#closeUnused(entry);
    }
  }

  /**
   * Before a turn in which a working VDI is flushed: most of what is dirty goes to disk while nobody waits for that turn. What
   * goes wrong here the operation itself will meet, and tell.
   */
  async #flushAhead(name: string): Promise<void> {
    let meant: VdiSpec;
    try {
      meant = parseSpec(name);
    } catch {
      return;
    }
    for (const { vdi } of [...this.#open]) {
      const { isSnapshot, ...record } = vdi.record;
      if (!isSnapshot && (meant.vid ?? record.vid) === record.vid && (meant.name || record.name) === record.name) {
        await flushQuietly(vdi);
      }
    }
  }

  /** #on, for what changes something. Errors: READ_ONLY. */
  async #change<T>(spec: string, work: () => Promise<T>, more: readonly string[] = []): Promise<T> {
    this.mustBeWritable();
    return this.#on(spec, work, more);
  }

  /** The same for plain names, of what need not exist. */
  async #changeOn<T>(names: readonly string[], work: () => Promise<T>): Promise<T> {
    this.mustBeWritable();
    return this.#turns.take(names, work);
  }

  /** #on, for what takes or drops temporary snapshots. Errors: READ_ONLY. */
  async #changeTemporaries<T>(spec: string, work: () => Promise<T>): Promise<T> {
    this.mustTakeTemporaries();
    return this.#on(spec, work);
  }

  /** A turn on the name that `spec` is about, and on `more`. Errors: BAD_NAME. */
  async #on<T>(spec: string, work: () => Promise<T>, more: readonly string[] = []): Promise<T> {
    const { name, vid } = parseSpec(spec);
    return vid === undefined ? this.#turns.take([name, ...more], work) : this.#onVid(vid, work, more);
  }

  async #onVid<T>(vid: number, work: () => Promise<T>, more: readonly string[] = []): Promise<T> {
    const record = await this.#store.catalog.record(vid);
    return this.#turns.take(record === undefined ? more : [record.name, ...more], work);
  }
}

function openElsewhere(spec: string, { client }: ClientUse, what: string): CatalogError {
  return new CatalogError(
    'BUSY',
    `${spec} is open by ${client} through another daemon of this machine and cannot be ${what} now; disconnect first`,
  );
}

/** Errors: UNSUPPORTED if what is there would have to be made anew for this. */
function mustBeKept({ name, redundancy }: VdiRecord, wanted: Redundancy | undefined): void {
  if (wanted === undefined || isSameRedundancy(wanted, redundancy)) return;
  const has = redundancy === undefined ? 'what it has' : describeRedundancy(redundancy);
  throw new CatalogError(
    'UNSUPPORTED',
    `${name} exists and keeps ${has}; leave --copies ${formatRedundancy(wanted)} out, or delete it first`,
  );
}

/** Whether somebody else has made something else of what is open: `found` is what the store says now. */
function isOutdated(open: VdiRecord, found: VdiRecord): boolean {
  return open.size !== found.size || open.name !== found.name || open.createdAt !== found.createdAt;
}

async function flushQuietly(vdi: Vdi): Promise<void> {
  try {
    await vdi.flush();
  } catch {
    // Closing, or whatever needs it durable, flushes again.
  }
}

function detailsOf(
  record: VdiRecord,
  { allocated, exclusive, damage }: Usage,
  more: Pick<VdiDetails, 'open' | 'clients' | 'kept'>,
): VdiDetails {
  const objectSize = 2 ** record.blockSizeShift;
  const bytes = { allocatedBytes: allocated * objectSize, exclusiveBytes: exclusive * objectSize };
  return { ...record, ...bytes, ...more, ...(damage !== undefined && { damage }) };
}

/** Errors: AMBIGUOUS: which ones `record` and its tag may say, and how each is said. */
function ambiguous({ name, tag }: VdiRecord, named: readonly VdiRecord[]): CatalogError {
  const meant = named.filter(
    (other) =>
      other.isSnapshot && !other.isTemporary && (other.tag === tag || String(other.snapId) === String(Number(tag))),
  );
  const list = meant.map((other) => `@${other.vid.toString(16)} (tag "${other.tag}", number ${other.snapId})`);
  return new CatalogError(
    'AMBIGUOUS',
    `"${name}@${tag}" is not clear: several snapshots have this tag or number; say by its ID which one is meant: ` +
      list.join(', '),
  );
}

/** Errors: BAD_NAME, BAD_SIZE. Returns its block size shift. */
export function checkNewVdi(name: string, size: number, shift = DEFAULT_BLOCK_SIZE_SHIFT): number {
  if (!Number.isInteger(shift) || shift < MIN_BLOCK_SIZE_SHIFT || shift > MAX_BLOCK_SIZE_SHIFT) {
    throw new CatalogError(
      'BAD_SIZE',
      `block size shift ${shift}: must be ${MIN_BLOCK_SIZE_SHIFT} to ${MAX_BLOCK_SIZE_SHIFT}`,
    );
  }
  checkName(name);
  checkSize(size, shift);
  return shift;
}

function timeOf(ms: number): string {
  return new Date(ms).toISOString().replace(/\.\d+/, '');
}

function checkSize(size: number, blockSizeShift: number, maxObjects = MAX_DATA_OBJECTS): void {
  const limit = maxObjects * 2 ** blockSizeShift;
  if (!Number.isSafeInteger(size) || size <= 0 || size % SIZE_UNIT !== 0) {
    throw new CatalogError('BAD_SIZE', `size ${size}: must be a positive multiple of ${SIZE_UNIT} bytes`);
  }
  if (size > limit) {
    const advice = blockSizeShift < MAX_BLOCK_SIZE_SHIFT ? '; a larger --block-size-shift allows more' : '';
    throw new CatalogError(
      'BAD_SIZE',
      `size ${size}: a VDI with block size shift ${blockSizeShift} has at most ${limit} bytes${advice}`,
    );
  }
}
