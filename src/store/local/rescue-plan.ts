/**
 * What can be rescued of a damaged store, and how certain it is: chooses between meta.mdb, its copies and the names of objects, and
 * compares the result with the objects that are there. Owns the words certain and likely. Changes nothing.
 */
import path from 'node:path';
import type { HostDisk } from '../../system/disk.js';
import { MAX_BLOCK_SIZE_SHIFT, MIN_BLOCK_SIZE_SHIFT, type VdiRecord } from '../vdi-record.js';
import { field, HEADER_BYTES, MADE_WHOLE, OWNER } from './map-log-format.js';
import { MapLogs } from './map-logs.js';
import { idxOf, localObjectKey, vidOf } from './reference-counts.js';
import { Replay, type ReplayedVdi } from './rescue-replay.js';
import {
  isRecord,
  readChangesAbove,
  readMetadata,
  readNewestCopy,
  readObjects,
  type FoundChanges,
  type FoundCopy,
  type FoundMetadata,
  type MetadataState,
  type ObjectFile,
} from './rescue-sources.js';
import { O_RDONLY } from '../../system/disk.js';

/** Bytes [from, to) of a disk. */
export interface DiskRange {
  readonly from: number;
  readonly to: number;
}

/** A VDI or snapshot that can be rescued. */
export interface RescuedVdi {
  readonly record: VdiRecord;
  readonly map: Uint32Array;
  /** Every byte is what was flushed last, or later. Else see `reasons`. */
  readonly isCertain: boolean;
  /** Why it is not certain, for people. */
  readonly reasons: readonly string[];
  /** Objects that were taken by their name, and may be newer or older than the rest. */
  readonly newer: readonly DiskRange[];
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
  /** Objects to copy, by key. */
  readonly objects: ReadonlyMap<number, ObjectFile>;
  readonly bytes: number;
  readonly pathOf: (key: number) => string;
}

/** Errors (StoreError): FORMAT (of a newer version); those of the disk if objects cannot be listed. */
export async function planRescue(disk: HostDisk, directory: string): Promise<RescuePlan> {
  const metadata = await readMetadata(disk, directory);
  const { copy, problems } = await readNewestCopy(disk, directory);
  const changes = readChangesAbove(disk, directory, copy?.header.change ?? 0);
  const { objects, pathOf } = await readObjects(disk, directory);
  return new Planner(disk, directory, { metadata, copy, changes, objects, pathOf, notes: [...problems] }).plan();
}

interface Sources {
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

  plan(): RescuePlan {
    const { metadata, copy, changes, objects } = this.#from;
    const problem = metadata.problem ?? this.#misfit();
    const isWhole = problem === undefined && metadata.state !== undefined;
    if (isWhole) metadata.state.mustBeKnown(metadata.file);
    copy?.state.mustBeKnown(copy.file);
    const replay = new Replay(objects);
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
    for (const record of state?.records.values() ?? []) replay.add(record, state?.mapOf(record) ?? new Uint32Array(0));
    for (const [vid, of] of state?.creationVids ?? []) replay.name(vid, of);
    const applied = base === 'copy' || base === 'changes' ? changes.changes : [];
    for (const { change } of applied) {
      if ('put' in change && !isRecord(change.put)) doubt ??= 'a recorded change cannot be read';
      else replay.apply(change);
    }
    if (doubt !== undefined) for (const vdi of replay.vdis.values()) vdi.isChanged = true;
    replay.settleAll();
    const doubtfulLogs = base === 'nothing' ? undefined : this.#applyLogs(replay, state, base);
    const used = new Set<number>();
    for (const { map } of replay.vdis.values())
      map.forEach((owner, idx) => {
        if (owner !== 0 && objects.has(localObjectKey(owner, idx))) used.add(localObjectKey(owner, idx));
      });
    const unused = base === 'metadata' ? this.#unusedByIdx(used) : undefined;
    const vdis = [...replay.vdis.values()].map((vdi) => this.#judge(vdi, doubt, doubtfulLogs, unused));
    const lost = this.#lostVdis(replay, used, base);
    for (const { record, map } of lost)
      map.forEach((owner, idx) => {
        if (owner !== 0) used.add(localObjectKey(record.vid, idx));
      });
    const leftOut = { objects: 0, bytes: 0 };
    const copied = new Map<number, ObjectFile>();
    let bytes = 0;
    for (const [key, file] of objects) {
      if (used.has(key)) {
        copied.set(key, file);
        bytes += file.bytes;
      } else {
        leftOut.objects++;
        leftOut.bytes += file.bytes;
      }
    }
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
      bytes,
      pathOf: this.#from.pathOf,
    };
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
  #applyLogs(replay: Replay, state: MetadataState | undefined, base: Base): string | undefined {
    try {
      const session = base === 'metadata' ? state?.info.get('session') : this.#sessionOfLogs();
      const stored = {
        record: (vid: number) => replay.vdis.get(vid)?.record,
        flushedGeneration: (vid: number) =>
          replay.removed.has(vid) ? Number.MAX_SAFE_INTEGER : (state?.flushed.get(vid) ?? 0),
      };
      const { changes, doubtful } = new MapLogs(this.#disk, this.#directory, () => undefined).read(session, stored);
      for (const { vid, idx, kind, value: owner } of changes) {
        if (kind !== OWNER && kind !== MADE_WHOLE) continue;
        const vdi = replay.vdis.get(vid);
        if (!vdi || idx >= vdi.map.length) continue;
        vdi.map[idx] = owner;
        vdi.newer.delete(idx);
        vdi.missing.delete(idx);
        if (owner !== 0 && !this.#from.objects.has(localObjectKey(owner, idx))) vdi.missing.add(idx);
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
    doubt: string | undefined,
    doubtfulLogs: string | undefined,
    unused: ReadonlyMap<number, readonly number[]> | undefined,
  ): RescuedVdi {
    const { record, map } = vdi;
    const length = 2 ** record.blockSizeShift;
    const lost: number[] = [];
    const suspect: number[] = [];
    const owners = new Set(map);
    map.forEach((owner, idx) => {
      if (owner === 0) {
        // The entry of a page of meta.mdb that was damaged would be 0.
        if (unused?.get(idx)?.some((vid) => owners.has(vid) || vid === record.vid)) suspect.push(idx);
        return;
      }
      const file = this.#from.objects.get(localObjectKey(owner, idx));
      if (file?.size !== length) lost.push(idx);
    });
    const isLost = new Set(lost);
    const gone = [...vdi.missing].filter((idx) => !isLost.has(idx));
    const reasons: string[] = [];
    if (doubt !== undefined) reasons.push(doubt);
    else if (vdi.isChanged) reasons.push('its map has changed since the copy');
    if (!record.isSnapshot && doubtfulLogs !== undefined)
      reasons.push('answered writes that were not flushed may be missing');
    if (vdi.newer.size > 0) reasons.push(`${vdi.newer.size} objects were taken by their names`);
    if (gone.length > 0) reasons.push(`${gone.length} objects were trimmed since, or are lost`);
    if (lost.length > 0) reasons.push(`${lost.length} objects are lost`);
    if (suspect.length > 0) reasons.push(`${suspect.length} objects that may be its own are in no map`);
    const ranges = (indices: Iterable<number>): DiskRange[] => rangesOf(indices, record);
    return {
      record,
      map,
      isCertain: reasons.length === 0,
      reasons,
      newer: ranges([...vdi.newer, ...suspect]),
      gone: ranges(gone),
      lost: ranges(lost),
    };
  }

  /** Objects whose vid no record, no change and no map knows become VDIs of their own. */
  #lostVdis(replay: Replay, used: ReadonlySet<number>, base: Base): RescuedVdi[] {
    const { objects } = this.#from;
    const byVid = new Map<number, number[]>();
    const owners = new Set<number>();
    for (const { map } of replay.vdis.values()) for (const owner of map) owners.add(owner);
    for (const [key, { size }] of objects) {
      const vid = vidOf(key);
      if (used.has(key) || replay.knows(vid) || owners.has(vid) || !isObjectSize(size)) continue;
      // Without doubt about the maps these are only leftovers: of a deleted VDI, or written and not flushed.
      if (base === 'metadata') continue;
      const found = byVid.get(vid);
      if (found) found.push(idxOf(key));
      else byVid.set(vid, [idxOf(key)]);
    }
    const names = new Set(Array.from(replay.vdis.values(), ({ record }) => record.name));
    return [...byVid].map(([vid, indices]) => lostVdi(vid, indices, objects, names));
  }
}

function refersTo(state: MetadataState, key: number): boolean {
  for (const record of state.records.values()) if (state.mapOf(record)[idxOf(key)] === vidOf(key)) return true;
  return false;
}

function isObjectSize(size: number): boolean {
  const shift = Math.log2(size);
  return Number.isInteger(shift) && shift >= MIN_BLOCK_SIZE_SHIFT && shift <= MAX_BLOCK_SIZE_SHIFT;
}

function lostVdi(
  vid: number,
  indices: readonly number[],
  objects: ReadonlyMap<number, ObjectFile>,
  names: ReadonlySet<string>,
): RescuedVdi {
  let name = `lost-${vid.toString(16)}`;
  for (let n = 2; names.has(name); n++) name = `lost-${vid.toString(16)}-${n}`;
  const sizes = indices.map((idx) => objects.get(localObjectKey(vid, idx))?.size ?? 0);
  const length = sizes.reduce((most, size) => Math.max(most, size), 0);
  const count = indices.reduce((most, idx) => Math.max(most, idx + 1), 0);
  const map = new Uint32Array(count);
  for (const idx of indices) map[idx] = vid;
  const record: VdiRecord = {
    ...{ vid, name, tag: '', isSnapshot: false, snapId: 1, parentVid: 0, snapshotAt: 0 },
    size: count * length,
    blockSizeShift: Math.log2(length),
    createdAt: Date.now(),
  };
  const reasons = [`${indices.length} objects of vid ${vid.toString(16)}, whose disk is not known`];
  return { record, map, isCertain: false, reasons, newer: rangesOf(indices, record), gone: [], lost: [] };
}

/** The ranges of these objects on their disk, neighbours as one. */
function rangesOf(indices: Iterable<number>, { size, blockSizeShift }: VdiRecord): DiskRange[] {
  const ranges: { from: number; to: number }[] = [];
  for (const idx of [...indices].sort((a, b) => a - b)) {
    const from = idx * 2 ** blockSizeShift;
    const to = Math.min(from + 2 ** blockSizeShift, size);
    const last = ranges.at(-1);
    if (last?.to === from) last.to = to;
    else if (last?.from !== from) ranges.push({ from, to });
  }
  return ranges;
}
