/**
 * What can be rescued of a damaged store, and how certain it is: chooses between meta.mdb, its copies and the names of objects, and
 * compares the result with the objects that are there. Owns the words certain and likely. Changes nothing.
 */
import path from 'node:path';
import { O_RDONLY, type HostDisk } from '../../system/disk.js';
import type { VdiRecord } from '../vdi-record.js';
import type { NumberedChange, RecordedChange } from './change-format.js';
import { field, HEADER_BYTES, OVERLAID } from './map-log-format.js';
import { MapLogs } from './map-logs.js';
import { blocksOf, type OverlayWrite } from './overlay-records.js';
import { idxOf, localObjectKey, vidOf } from './reference-counts.js';
import { DiskRanges, type DiskRange } from './rescue-ranges.js';
import { knownBlocks, RescuedOverlays, type OverlayNews } from './rescue-overlays.js';
import { Replay, type ReplayedVdi } from './rescue-replay.js';
import { SegmentData } from './rescue-segments.js';
import {
  isRecord,
  readChangesAbove,
  readMetadata,
  readNewestCopy,
  readObjects,
  readSegments,
  type FoundChanges,
  type FoundCopy,
  type FoundFiles,
  type FoundMetadata,
  type MetadataState,
  type ObjectFile,
} from './rescue-sources.js';
import { RestoredVdi } from './restored-vdi.js';

/** A VDI or snapshot that can be rescued. */
export interface RescuedVdi {
  readonly record: VdiRecord;
  readonly map: Uint32Array;
  /** Every byte is what was flushed last, or later. Else see `reasons`. */
  readonly isCertain: boolean;
  /** Why it is not certain, for people. */
  readonly reasons: readonly string[];
  /** Objects that were taken by their name, and blocks that overlays have since, by what is in their files. */
  readonly newer: readonly DiskRange[];
  /** Blocks of overlays that were being merged: they may have older content. */
  readonly merged: readonly DiskRange[];
  /** Objects that are gone since the map was copied: trimmed, or lost. They read as zeros. */
  readonly gone: readonly DiskRange[];
  /** Objects that the map has and that are not there, or not whole: reads fail, and 'check' lists them. */
  readonly lost: readonly DiskRange[];
}

/** What the maps were taken from. */
export type Base = 'metadata' | 'copy' | 'changes' | 'damaged metadata' | 'nothing';

export interface RescuePlan {
  readonly directory: string;
  /** What is wrong with meta.mdb; undefined if nothing is. */
  readonly problem: string | undefined;
  readonly base: Base;
  /** The file that `base` is, and the time of its content in milliseconds since 1970, if they apply. */
  readonly basedOn: string | undefined;
  readonly asOf: number | undefined;
  /** Changes recorded after a copy that were applied. */
  readonly changes: number;
  readonly vdis: readonly RescuedVdi[];
  /** VDIs made of objects that belong to nobody known. */
  readonly lost: readonly RescuedVdi[];
  /** Objects that are left out: written and not flushed, or of deleted VDIs and snapshots. */
  readonly leftOut: { readonly objects: number; readonly bytes: number };
  /** For people: what could not be read, and what that means. */
  readonly notes: readonly string[];
  readonly isCertain: boolean;
  /** Object files to copy, by key. */
  readonly objects: ReadonlyMap<number, ObjectFile>;
  /** Overlays to copy and to store. */
  readonly overlays: readonly RescuedOverlay[];
  /** That the copy takes. */
  readonly bytes: number;
  readonly pathOf: (key: number) => string;
  /** Of a segment (segmentOf). */
  readonly segmentPathOf: (segment: number) => string;
}

/** An overlay of the new store. */
export interface RescuedOverlay {
  readonly key: number;
  readonly overlay: OverlayWrite;
}

/** Errors (StoreError): FORMAT (of a newer version); those of the disk if objects cannot be listed. */
export async function planRescue(disk: HostDisk, directory: string): Promise<RescuePlan> {
  const metadata = await readMetadata(disk, directory);
  const { copy, problems } = await readNewestCopy(disk, directory);
  const changes = readChangesAbove(disk, directory, copy?.header.change ?? 0);
  const { files: objects, pathOf } = await readObjects(disk, directory);
  const segments = await readSegments(disk, directory);
  const sources = { metadata, copy, changes, objects, segments, pathOf, notes: [...problems] };
  return new Planner(disk, directory, sources).plan();
}

interface Sources {
  readonly segments: FoundFiles;
  readonly metadata: FoundMetadata;
  readonly copy: FoundCopy | undefined;
  readonly changes: FoundChanges;
  readonly objects: ReadonlyMap<number, ObjectFile>;
  readonly notes: string[];
  readonly pathOf: (key: number) => string;
}

class Planner {
  readonly #disk: HostDisk;
  readonly #directory: string;
  readonly #from: Sources;
  readonly #notes: string[];

  constructor(disk: HostDisk, directory: string, from: Sources) {
    this.#disk = disk;
    this.#directory = directory;
    this.#from = from;
    this.#notes = from.notes;
  }

  async plan(): Promise<RescuePlan> {
    const { metadata, copy, changes, objects } = this.#from;
    const problem = metadata.problem ?? this.#misfit();
    const isWhole = problem === undefined && metadata.state !== undefined;
    if (isWhole) metadata.state.mustBeKnown(metadata.file);
    copy?.state.mustBeKnown(copy.file);
    let base: Base;
    let state: MetadataState | undefined;
    /** Why nothing is certain; undefined if something may be. */
    let doubt: string | undefined;
    if (isWhole) {
      base = 'metadata';
      state = metadata.state;
    } else if (copy) {
      base = 'copy';
      state = copy.state;
      doubt = changes.gap;
    } else if (changes.changes[0]?.number === 1) {
      base = 'changes';
      doubt = 'there is no whole copy of the metadata';
    } else if (metadata.state !== undefined && !this.#isForeign(metadata.state)) {
      base = 'damaged metadata';
      state = metadata.state;
      doubt = `there is no whole copy of the metadata, and ${metadata.file} is damaged`;
    } else {
      base = 'nothing';
    }
    const applied = base === 'copy' || base === 'changes' ? changes.changes : [];
    const isCertainAt = (change: RecordedChange): boolean => !('put' in change) || isRecord(change.put);
    if (!applied.every(({ change }) => isCertainAt(change))) doubt ??= 'a recorded change cannot be read';
    const isUnknown = doubt !== undefined || base === 'nothing';
    const overlays = await this.#overlays(state, isUnknown, applied);
    const replay = new Replay(overlays);
    for (const record of state?.records.values() ?? []) replay.add(record, state?.mapOf(record) ?? new Uint32Array(0));
    for (const [vid, of] of state?.creationVids ?? []) replay.name(vid, of);
    for (const { change } of applied) if (isCertainAt(change)) replay.apply(change);
    if (doubt !== undefined) for (const vdi of replay.vdis.values()) vdi.isChanged = true;
    replay.settleAll();
    const doubtfulLogs = base === 'nothing' ? undefined : this.#applyLogs(replay, overlays, state, base);
    const unused = base === 'metadata' ? this.#unusedByIdx(this.#used(replay, overlays)) : undefined;
    const vdis = [...replay.vdis.values()].map((vdi) => this.#judge(vdi, overlays, doubt, doubtfulLogs, unused));
    const lost = this.#lostVdis(replay, overlays, base);
    const used = this.#used(replay, overlays);
    for (const { map } of lost) addLayers(used, map, overlays);
    const leftOut = { objects: 0, bytes: 0 };
    const copied = new Map<number, ObjectFile>();
    const layers: RescuedOverlay[] = [];
    let bytes = 0;
    for (const [key, file] of objects) {
      // An overlay may have the name of a file that was removed, and is back after a power loss.
      if (used.has(key) && overlays.stored(key) === undefined) {
        copied.set(key, file);
        bytes += file.bytes;
      } else {
        leftOut.objects++;
        leftOut.bytes += file.bytes;
      }
    }
    for (const key of [...used].sort((a, b) => a - b)) {
      const overlay = overlays.stored(key);
      if (overlay) layers.push({ key, overlay });
    }
    for (const { file, keys, size } of overlays.files(layers)) bytes += Math.min(file.bytes, keys * size);
    return {
      directory: this.#directory,
      problem,
      base,
      basedOn: base === 'copy' ? copy?.file : state && metadata.file,
      asOf: base === 'copy' ? copy?.header.takenAt : undefined,
      changes: applied.length,
      vdis: vdis.sort((a, b) =>
        a.record.name < b.record.name ? -1 : a.record.name > b.record.name ? 1 : a.record.snapId - b.record.snapId,
      ),
      lost,
      leftOut,
      notes: this.#notes,
      isCertain: lost.length === 0 && vdis.every(({ isCertain }) => isCertain) && base !== 'nothing',
      objects: copied,
      overlays: layers,
      bytes,
      pathOf: this.#from.pathOf,
      segmentPathOf: this.#from.segments.pathOf,
    };
  }

  /** The overlays of `state`, with what the changes say about them; `isUnknown`: all of them may have changed. */
  async #overlays(
    state: MetadataState | undefined,
    isUnknown: boolean,
    applied: readonly NumberedChange[],
  ): Promise<RescuedOverlays> {
    const { objects, segments } = this.#from;
    const changed = new Set<number>();
    const merged = new Set<number>();
    for (const { change } of applied) {
      if ('overlays' in change) changed.add(change.overlays);
      if ('merged' in change) merged.add(change.merged);
    }
    const news: OverlayNews = {
      hasChanged: (vid) => isUnknown || changed.has(vid),
      hasMerged: (vid) => isUnknown || merged.has(vid),
    };
    const data = new SegmentData(this.#disk, segments);
    await data.scan((vid) => news.hasChanged(vid), knownBlocks(state));
    return new RescuedOverlays(state, news, objects, segments, data);
  }

  /** Keys of all objects that the maps need, with those below them. */
  #used(replay: Replay, overlays: RescuedOverlays): Set<number> {
    const used = new Set<number>();
    for (const { map } of replay.vdis.values()) addLayers(used, map, overlays);
    return used;
  }

  #isForeign(state: MetadataState): boolean {
    const { copy, changes } = this.#from;
    const known = copy?.header.store ?? changes.store;
    return known !== undefined && known !== state.info.get('store');
  }

  /** Why meta.mdb is not this store's, or not its last state, although it is whole. */
  #misfit(): string | undefined {
    const { metadata, copy, changes, objects } = this.#from;
    const { state, transaction } = metadata;
    if (state === undefined) return undefined;
    if (this.#isForeign(state)) return 'it is of another store than the copies';
    if (copy !== undefined) {
      // The last commit before a power loss may be in a copy although it is not in meta.mdb.
      if (transaction < copy.header.transaction - 1) return 'it is older than its own copy';
      return this.#difference(state, copy.state, changes);
    }
    if (state.records.size > 0 && objects.size > 0 && ![...objects.keys()].some((key) => refersTo(state, key)))
      return 'it refers to none of the objects that are there';
    return undefined;
  }

  /** LMDB has no checksums: a map that has not changed since the copy, and differs from it, is damaged. */
  #difference(state: MetadataState, copied: MetadataState, { changes, gap }: FoundChanges): string | undefined {
    if (gap !== undefined) return undefined;
    const changed = new Set<number>();
    for (const { change } of changes) {
      if ('map' in change) changed.add(change.map);
      if ('put' in change) changed.add(change.put.vid);
      if ('removed' in change) for (const vid of change.removed) changed.add(vid);
    }
    for (const record of copied.records.values()) {
      if (changed.has(record.vid)) continue;
      const present = state.records.get(record.vid);
      if (present === undefined) return `it has no record of vid ${record.vid.toString(16)}, and a copy has one`;
      const same = Buffer.from(state.mapOf(present).buffer).equals(Buffer.from(copied.mapOf(record).buffer));
      if (!same)
        return `its map of vid ${record.vid.toString(16)} differs from the copy, and has not been changed since`;
    }
    return undefined;
  }

  /** Answered writes that were not flushed, where they are certain. Returns why others are not, if there are any. */
  #applyLogs(
    replay: Replay,
    overlays: RescuedOverlays,
    state: MetadataState | undefined,
    base: Base,
  ): string | undefined {
    try {
      const session = base === 'metadata' ? state?.info.get('session') : this.#sessionOfLogs();
      const stored = {
        record: (vid: number) => replay.vdis.get(vid)?.record,
        flushedGeneration: (vid: number) =>
          replay.removed.has(vid) ? Number.MAX_SAFE_INTEGER : (state?.flushed.get(vid) ?? 0),
      };
      const { changes, doubtful } = new MapLogs(this.#disk, this.#directory, () => undefined).read(session, stored);
      const restored = new Map<number, RestoredVdi>();
      const host = {
        metadata: { map: ({ vid }: VdiRecord) => replay.vdis.get(vid)?.map ?? new Uint32Array(0) },
        objects: { expectLength: () => undefined },
        overlays: overlays.table,
      };
      for (const change of changes) {
        const vdi = replay.vdis.get(change.vid);
        if (!vdi) continue;
        let of = restored.get(change.vid);
        if (!of) restored.set(change.vid, (of = new RestoredVdi(host, vdi.record)));
        of.apply(change);
        if (of.problem !== undefined) throw new Error(of.problem);
        if (change.kind === OVERLAID) overlays.isTold(localObjectKey(change.value, change.idx));
      }
      for (const [vid, { map, changed }] of restored) {
        const vdi = replay.vdis.get(vid);
        for (const idx of changed) {
          for (const set of [vdi?.newer, vdi?.missing, vdi?.merged]) set?.delete(idx);
          const owner = map[idx] as number;
          if (owner !== 0 && !overlays.has(localObjectKey(owner, idx))) vdi?.missing.add(idx);
        }
      }
      const [first] = doubtful;
      if (first === undefined) return undefined;
      const why = `answered writes since the last flush are left out: ${first.file}: ${first.why}`;
      this.#notes.push(why);
      return why;
    } catch (error) {
      const why = `answered writes since the last flush cannot be read: ${(error as Error).message}`;
      this.#notes.push(why);
      return why;
    }
  }

  /** A session that has changed nothing durably is in no copy: the newest log names it. */
  #sessionOfLogs(): string | undefined {
    const folder = path.join(this.#directory, 'recent');
    if (!this.#disk.existsSync(folder)) return undefined;
    const newest = this.#disk
      .readdirSync(folder)
      .filter((name) => /^\d{1,15}$/.test(name))
      .sort((a, b) => Number(a) - Number(b))
      .at(-1);
    if (newest === undefined) return undefined;
    const fd = this.#disk.openSync(path.join(folder, newest), O_RDONLY);
    try {
      const header = Buffer.alloc(HEADER_BYTES);
      this.#disk.readSync(fd, header, 0);
      return field(header, 'session');
    } finally {
      this.#disk.closeSync(fd);
    }
  }

  /** idx -> vids of objects that no map has. */
  #unusedByIdx(used: ReadonlySet<number>): ReadonlyMap<number, readonly number[]> {
    const unused = new Map<number, number[]>();
    for (const key of this.#from.objects.keys()) {
      if (used.has(key)) continue;
      const vids = unused.get(idxOf(key));
      if (vids) vids.push(vidOf(key));
      else unused.set(idxOf(key), [vidOf(key)]);
    }
    return unused;
  }

  #judge(
    vdi: ReplayedVdi,
    overlays: RescuedOverlays,
    doubt: string | undefined,
    doubtfulLogs: string | undefined,
    unused: ReadonlyMap<number, readonly number[]> | undefined,
  ): RescuedVdi {
    const { record, map } = vdi;
    const size = 2 ** record.blockSizeShift;
    const lost = new DiskRanges(record);
    const newer = new DiskRanges(record);
    const merged = new DiskRanges(record);
    const gone = new DiskRanges(record);
    const suspect: number[] = [];
    const owners = new Set(map);
    const changedObjects = new Set<number>();
    map.forEach((owner, idx) => {
      if (vdi.newer.has(idx)) newer.addObject(idx);
      if (vdi.merged.has(idx)) merged.addObject(idx);
      if (owner === 0) {
        if (vdi.missing.has(idx)) gone.addObject(idx);
        // The entry of a page of meta.mdb that was damaged would be 0.
        if (unused?.get(idx)?.some((vid) => owners.has(vid) || vid === record.vid)) suspect.push(idx);
        return;
      }
      if (overlays.hasChanged(owner, idx)) changedObjects.add(idx);
      for (const run of overlays.layers(owner, idx, blocksOf(size))) {
        if (overlays.isLost(run.vid, idx, size)) lost.addBlocks(idx, run);
        for (const part of overlays.uncertainIn(run, idx, 'taken')) newer.addBlocks(idx, part);
        for (const part of overlays.uncertainIn(run, idx, 'merged')) merged.addBlocks(idx, part);
      }
    });
    for (const idx of suspect) newer.addObject(idx);
    const reasons: string[] = [];
    if (doubt !== undefined) reasons.push(doubt);
    else if (vdi.isChanged) reasons.push('its map has changed since the copy');
    else if (changedObjects.size > 0) reasons.push('blocks of its objects have changed since the copy');
    if (!record.isSnapshot && doubtfulLogs !== undefined)
      reasons.push('answered writes that were not flushed may be missing');
    if (suspect.length > 0) reasons.push(`${suspect.length} objects that may be its own are in no map`);
    if (newer.objects > suspect.length)
      reasons.push(`${newer.objects - suspect.length} objects were taken by their names, all or parts`);
    if (merged.objects > 0) reasons.push(`${merged.objects} objects were being merged`);
    if (gone.objects > 0) reasons.push(`${gone.objects} objects were trimmed since, or are lost`);
    if (lost.objects > 0) reasons.push(`${lost.objects} objects are lost, all or parts`);
    return {
      record,
      map,
      isCertain: reasons.length === 0,
      reasons,
      newer: newer.list(),
      merged: merged.list(),
      gone: gone.list(),
      lost: lost.list(),
    };
  }

  /** Objects whose vid no record, no change and no map knows become VDIs of their own. */
  #lostVdis(replay: Replay, overlays: RescuedOverlays, base: Base): RescuedVdi[] {
    // Without doubt about the maps these are only leftovers: of a deleted VDI, or written and not flushed.
    if (base === 'metadata') return [];
    const used = this.#used(replay, overlays);
    const owners = new Set([...used].map(vidOf));
    const byVid = new Map<number, number[]>();
    for (const key of overlays.keys()) {
      const vid = vidOf(key);
      if (owners.has(vid) || replay.knows(vid) || overlays.sizeOf(key) === undefined) continue;
      const found = byVid.get(vid);
      if (found) found.push(idxOf(key));
      else byVid.set(vid, [idxOf(key)]);
    }
    const names = new Set(Array.from(replay.vdis.values(), ({ record }) => record.name));
    return [...byVid].map(([vid, indices]) => lostVdi(vid, indices, overlays, names));
  }
}

/** Add the keys of all layers of all objects of a map. */
function addLayers(keys: Set<number>, map: Uint32Array, { table }: RescuedOverlays): void {
  map.forEach((owner, idx) => {
    if (owner !== 0) for (const vid of table.layersOf(owner, idx)) keys.add(localObjectKey(vid, idx));
  });
}

function refersTo(state: MetadataState, key: number): boolean {
  for (const record of state.records.values()) if (state.mapOf(record)[idxOf(key)] === vidOf(key)) return true;
  return false;
}

function lostVdi(
  vid: number,
  indices: readonly number[],
  overlays: RescuedOverlays,
  names: ReadonlySet<string>,
): RescuedVdi {
  let name = `lost-${vid.toString(16)}`;
  for (let n = 2; names.has(name); n++) name = `lost-${vid.toString(16)}-${n}`;
  const sizes = indices.map((idx) => overlays.sizeOf(localObjectKey(vid, idx)) ?? 0);
  const length = sizes.reduce((most, size) => Math.max(most, size), 0);
  const count = indices.reduce((most, idx) => Math.max(most, idx + 1), 0);
  const map = new Uint32Array(count);
  for (const idx of indices) {
    map[idx] = vid;
    overlays.take(vid, idx, 0, length);
  }
  const record: VdiRecord = {
    ...{ vid, name, tag: '', isSnapshot: false, snapId: 1, parentVid: 0, snapshotAt: 0 },
    size: count * length,
    blockSizeShift: Math.log2(length),
    createdAt: Date.now(),
  };
  const reasons = [`${indices.length} objects of vid ${vid.toString(16)}, whose disk is not known`];
  const newer = new DiskRanges(record);
  for (const idx of indices) newer.addObject(idx);
  return { record, map, isCertain: false, reasons, newer: newer.list(), merged: [], gone: [], lost: [] };
}
