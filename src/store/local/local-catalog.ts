/**
 * The catalog of the local store: VDIs and snapshots are made, removed, cloned and rolled back here, each by one LMDB
 * transaction. Owns which vid is given next and the temporary snapshots that are alive. Objects are given up only after
 * the transaction that made them unreachable.
 */
import type { Catalog, CheckReport, Usage } from '../object-store.js';
import type { Switch } from '../open-vdi.js';
import { StoreError } from '../store-error.js';
import { inOrder, type Unfinished, type VdiRecord } from '../vdi-record.js';
import { LocalVdi, type LocalVdiHost } from './local-vdi.js';
import type { MapLogs } from './map-logs.js';
import { pagesOf } from './map-pages.js';
import { loadLayers } from './overlay-loading.js';
import type { OverlayMerger } from './overlay-merger.js';
import { isPlanted } from './planted-faults.js';
import { MAX_VID } from '../../sheepdog/object-ids.js';
import { checkStore, type CheckedStore } from './store-check.js';
import { TemporaryVdi, type TemporaryVdiHost } from './temporary-vdi.js';
import { TimeSlice } from './time-slice.js';

const NOTHING_USED: Usage = { allocated: 0, exclusive: 0 };

/** What the catalog needs of its store. */
export interface CatalogHost extends LocalVdiHost, TemporaryVdiHost, CheckedStore {
  readonly references: LocalVdiHost['references'];
  readonly logs: MapLogs;
  readonly open: Map<number, LocalVdi>;
  /** For the change record: new objects of the working VDI `of` get the vid `vid`, which has no record. */
  readonly copies: CheckedStore['copies'] & { names(vid: number, of: number): void };
  releaseMap(map: Uint32Array, only?: Uint8Array): void;
  backgroundError(error: unknown): void;
  readonly merger: OverlayMerger;
  /** A VDI was opened. */
  opened(): void;
}

/** src/vdi makes the calls for one name one at a time. */
export class LocalCatalog implements Catalog {
  readonly temporariesStoreNothing = true;
  readonly #store: CatalogHost;
  readonly #temporaries = new Map<number, { readonly temporary: TemporaryVdi; readonly source: LocalVdi }>();
  #lastVid = 0;

  constructor(store: CatalogHost) {
    this.#store = store;
  }

  list(): readonly VdiRecord[] {
    return this.#withUnstored(this.#store.metadata.records());
  }

  named(name: string): readonly VdiRecord[] {
    return this.#withUnstored(this.#store.metadata.recordsNamed(name), name);
  }

  record(vid: number): VdiRecord | undefined {
    const temporary = this.#temporaries.get(vid)?.temporary.record;
    if (temporary) return temporary;
    for (const vdi of this.#store.open.values()) {
      if (vdi.record.vid === vid && vdi.supersededVids.length > 0) return vdi.record;
      if (vdi.supersededVids.includes(vid)) return undefined;
    }
    return this.#store.metadata.record(vid);
  }

  /** `stored`, of all names or of one, with what is in memory only: temporary snapshots, and newer records of open VDIs. */
  #withUnstored(stored: readonly VdiRecord[], name?: string): readonly VdiRecord[] {
    const isMeant = (record: VdiRecord): boolean => name === undefined || record.name === name;
    const gone = new Set<number>();
    const added: VdiRecord[] = [];
    for (const { temporary } of this.#temporaries.values()) if (isMeant(temporary.record)) added.push(temporary.record);
    for (const vdi of this.#store.open.values()) {
      if (vdi.supersededVids.length === 0 || !isMeant(vdi.record)) continue;
      for (const vid of [...vdi.supersededVids, vdi.record.vid]) gone.add(vid);
      added.push(vdi.record);
    }
    if (added.length === 0) return stored;
    const left = gone.size === 0 ? stored : stored.filter(({ vid }) => !gone.has(vid));
    // The sort is stable: temporary snapshots come before their working VDI, in the order they were taken.
    return [...added, ...left].sort(inOrder);
  }

  touchedBy(vid: number): readonly string[] {
    return this.#store.metadata.childrenOf(vid).map(({ name }) => name);
  }

  async create(name: string, size: number, blockSizeShift: number, unfinished?: Unfinished): Promise<VdiRecord> {
    this.#store.metadata.mustHaveRoom();
    const record = { ...this.#working(this.#nextVid(), name, size, blockSizeShift, 0, 1), unfinished };
    // `removed`: an operation that failed may have left pages under this vid.
    await this.#store.metadata.commit({ removed: [record.vid], records: [record] });
    return record;
  }

  async open(vid: number): Promise<LocalVdi | TemporaryVdi> {
    const temporary = this.#temporaries.get(vid);
    if (temporary) {
      temporary.temporary.resume();
      return temporary.temporary;
    }
    const opened = this.#store.open.get(vid);
    if (opened) {
      opened.resume();
      return opened;
    }
    const record = this.#recordOf(vid);
    const { metadata, logs } = this.#store;
    await metadata.settled();
    const generation = metadata.flushedGeneration(vid) + 1;
    const map = await metadata.loadMap(record);
    await loadLayers(this.#store, map);
    const vdi = new LocalVdi(this.#store, record, map, generation, logs.logOf(vid, generation), () =>
      this.#store.open.delete(vdi.record.vid),
    );
    // After a VDI was discarded its temporary snapshots still have objects of its vid in their maps. Kept files may have the vid, too.
    if (this.#temporaries.size > 0 || this.#store.keptVids.has(vid)) {
      vdi.nameAnew(this.#nextVid());
      this.#store.copies.names(vdi.creationVid, vid);
    }
    this.#store.open.set(vid, vdi);
    this.#store.opened();
    return vdi;
  }

  /** By copy-before-write (temporary-vdi.ts). The snapshot is never stored, so nothing needs to be durable before it. */
  prepareTemporary(source: LocalVdi, tag: string): Switch {
    const vid = this.#nextVid();
    const creationVid = this.#nextVid();
    let temporary: TemporaryVdi | undefined;
    return {
      needsNoPause: true,
      switchOver: () => {
        const record: VdiRecord = {
          ...source.record,
          vid,
          tag,
          isSnapshot: true,
          isTemporary: true,
          snapshotAt: Date.now(),
        };
        temporary = new TemporaryVdi(this.#store, record, source.map);
        source.takeTemporary(temporary, creationVid);
        this.#store.copies.names(creationVid, source.record.vid);
        this.#temporaries.set(vid, { temporary, source });
      },
      finish: async () => {
        if (!temporary) throw new Error('invariant: a snapshot is finished that was not taken');
        await temporary.frozen();
        return temporary.record;
      },
    };
  }

  /** The disk is full: temporary snapshots without readers give their space back. */
  makeRoom(): void {
    for (const { temporary } of this.#temporaries.values()) temporary.makeRoom();
  }

  async dropTemporaries(): Promise<void> {
    for (const vid of this.#temporaries.keys()) await this.#dropTemporary(vid);
  }

  async #dropTemporary(vid: number): Promise<void> {
    const found = this.#temporaries.get(vid);
    if (!found) return;
    this.#temporaries.delete(vid);
    await found.source.dropTemporary(found.temporary);
  }

  prepareSwitch(vdi: LocalVdi, tag: string, takenAt?: number): Switch {
    this.#store.metadata.mustHaveRoom(vdi.map);
    const vid = this.#nextVid();
    let finish: (() => Promise<void>) | undefined;
    let snapshot: VdiRecord | undefined;
    return {
      switchOver: () => {
        const before = vdi.record;
        const now = Date.now();
        const taken: VdiRecord = {
          ...before,
          tag,
          isSnapshot: true,
          snapshotAt: takenAt ?? now,
          unfinished: undefined,
        };
        const record: VdiRecord = {
          ...before,
          vid,
          snapId: before.snapId + 1,
          parentVid: before.vid,
          createdAt: now,
        };
        finish = vdi.moveTo(record, taken);
        snapshot = taken;
        this.#store.open.delete(before.vid);
        this.#store.open.set(vid, vdi);
      },
      finish: async () => {
        if (!finish || !snapshot) throw new Error('invariant: a snapshot is finished that was not taken');
        if (isPlanted('snapshot before its commit')) void finish().catch(() => undefined);
        else await finish();
        return snapshot;
      },
    };
  }

  async clone(vid: number, name: string): Promise<VdiRecord> {
    const base = this.#recordOf(vid);
    const record = this.#working(this.#nextVid(), name, base.size, base.blockSizeShift, base.vid, 1);
    await this.#storeCopy(base, record, []);
    return record;
  }

  async rollback(vid: number, snapshotVid: number, unfinished?: Unfinished): Promise<VdiRecord> {
    const { map, releases, vids, record: working } = await this.#held(vid);
    const base = this.#recordOf(snapshotVid);
    const record = {
      ...this.#working(this.#nextVid(), working.name, base.size, base.blockSizeShift, base.vid, working.snapId),
      unfinished,
    };
    await this.#storeCopy(base, record, vids);
    this.#store.open.get(vid)?.abandon();
    this.#store.release(releases);
    this.#store.releaseMap(map);
    return record;
  }

  async remove(vid: number): Promise<void> {
    if (this.#temporaries.has(vid)) return this.#dropTemporary(vid);
    const { map, releases, vids, record } = await this.#held(vid);
    const relinked = this.#childrenOf(vid).map((child) => adopted(child, record));
    await this.#store.metadata.commit({ records: relinked, removed: vids });
    for (const child of relinked) {
      const open = this.#store.open.get(child.vid);
      if (open) open.record = child;
    }
    this.#store.open.get(vid)?.abandon();
    this.#store.release(releases);
    this.#store.releaseMap(map);
  }

  /** The records of the VDIs and snapshots whose parent is `vid`, newer ones of open VDIs included. */
  #childrenOf(vid: number): VdiRecord[] {
    const children = new Map(this.#store.metadata.childrenOf(vid).map((child) => [child.vid, child]));
    for (const vdi of this.#store.open.values()) {
      if (vdi.supersededVids.length === 0) continue;
      for (const superseded of vdi.supersededVids) children.delete(superseded);
      if (vdi.record.parentVid === vid) children.set(vdi.record.vid, vdi.record);
    }
    return [...children.values()];
  }

  reclaimed(): Promise<void> {
    return this.#store.reclaimed();
  }

  /** All that the removal of an unused VDI gives up. A VDI is still open if its flush failed when it was closed. */
  async #held(
    vid: number,
  ): Promise<{ map: Uint32Array; releases: readonly number[]; vids: number[]; record: VdiRecord }> {
    const open = this.#store.open.get(vid);
    if (open) {
      for (const temporary of open.temporaries) await temporary.leaveAll();
      return { map: open.map, releases: open.releases, vids: [vid, ...open.supersededVids], record: open.record };
    }
    const record = this.#recordOf(vid);
    return { map: await this.#store.metadata.loadMap(record), releases: [], vids: [vid], record };
  }

  async usage(vid: number): Promise<Usage> {
    const opened = this.#temporaries.get(vid)?.temporary ?? this.#store.open.get(vid);
    const map = opened?.map ?? (await this.#store.metadata.loadMap(this.#recordOf(vid)));
    const usage = await this.#usageOf(map);
    const { overlays, bytes } = await this.#store.merger.state(map);
    return overlays === 0 ? usage : { ...usage, merging: { overlays, bytes } };
  }

  async usages(): Promise<ReadonlyMap<number, Usage>> {
    const { metadata, references, open } = this.#store;
    const usages = await metadata.countEntries((owner, idx) => references.of(owner, idx) === 1);
    for (const record of metadata.records()) if (!usages.has(record.vid)) usages.set(record.vid, NOTHING_USED);
    // The map of an open VDI is newer than the stored one.
    const maps = Array.from(this.#temporaries.values(), ({ temporary }) => temporary);
    for (const { record, map } of [...maps, ...open.values()]) usages.set(record.vid, await this.#usageOf(map));
    return usages;
  }

  async #usageOf(map: Uint32Array): Promise<Usage> {
    const slice = new TimeSlice();
    let allocated = 0;
    let exclusive = 0;
    for (let idx = 0; idx < map.length; idx++) {
      if (slice.isOver(idx)) await slice.next();
      const owner = map[idx] as number;
      if (owner === 0) continue;
      allocated++;
      if (this.#store.references.of(owner, idx) === 1) exclusive++;
    }
    return { allocated, exclusive };
  }

  check(options: { readonly repair: boolean }): Promise<CheckReport> {
    return this.#store.merger.still(() => checkStore(this.#store, options));
  }

  #working(
    vid: number,
    name: string,
    size: number,
    blockSizeShift: number,
    parentVid: number,
    snapId: number,
  ): VdiRecord {
    const createdAt = Date.now();
    return { vid, name, tag: '', isSnapshot: false, snapId, size, blockSizeShift, parentVid, createdAt, snapshotAt: 0 };
  }

  #recordOf(vid: number): VdiRecord {
    const record = this.#store.metadata.record(vid);
    if (!record) throw new StoreError('DAMAGED', `no record of vid ${vid.toString(16)} in ${this.#store.location}`);
    return record;
  }

  /** Stores `record` with the map of `base`. Counts the references before the transaction, so that no object is removed meanwhile. */
  async #storeCopy(base: VdiRecord, record: VdiRecord, removed: readonly number[]): Promise<void> {
    const { metadata, references } = this.#store;
    const map = await metadata.loadMap(base);
    metadata.mustHaveRoom(map);
    const slice = new TimeSlice();
    for (let idx = 0; idx < map.length; idx++) {
      if (slice.isOver(idx)) await slice.next();
      const owner = map[idx] as number;
      if (owner !== 0) references.add(owner, idx);
    }
    try {
      await metadata.preparePages(pagesOf(record.vid, map));
      await metadata.commit({ records: [record], removed });
    } catch (error) {
      this.#store.releaseMap(map);
      // Best effort: the next open removes pages without a record, or the next use of the vid does.
      await metadata.commit({ removed: [record.vid] }).catch(() => undefined);
      throw error;
    }
  }

  #nextVid(): number {
    const { metadata, references } = this.#store;
    if (this.#lastVid === 0) {
      this.#lastVid = references.highestVid;
      for (const { vid } of metadata.records()) this.#lastVid = Math.max(this.#lastVid, vid);
    }
    for (let tries = 0; tries < MAX_VID; tries++) {
      this.#lastVid = (this.#lastVid % MAX_VID) + 1;
      const vid = this.#lastVid;
      if (metadata.record(vid) || references.uses(vid) || this.#temporaries.has(vid)) continue;
      if (this.#store.overlays.uses(vid)) continue;
      if (this.#store.keptVids.has(vid)) continue;
      if (this.#store.open.has(vid) || this.#namesNow(vid)) continue;
      return vid;
    }
    throw new StoreError('LIMIT', `all ${MAX_VID} VDI ids of ${this.#store.location} are in use`);
  }

  /** An open VDI uses the vid for new objects, although it may have made none yet. */
  #namesNow(vid: number): boolean {
    for (const open of this.#store.open.values()) if (open.creationVid === vid) return true;
    return false;
  }
}

/**
 * The record of `child` after its parent is removed: its parent is now the parent's parent. A working VDI that continued from the
 * removed snapshot gets back the creation time that it had before the snapshot.
 */
function adopted(child: VdiRecord, parent: VdiRecord): VdiRecord {
  const { parentVid } = parent;
  if (!parent.isSnapshot || child.isSnapshot || child.name !== parent.name) return { ...child, parentVid };
  return { ...child, parentVid, createdAt: parent.createdAt };
}
