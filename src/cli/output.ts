/**
 * The form of results: aligned tables and local times for people, one JSON value with stable fields for programs. Owns the field
 * names of `--json`, and that names and tags reach the terminal without control sequences.
 */
import { labelOfVdi } from '../store/vdi-record.js';
import { io } from './command-io.js';
import { redundancyJson } from './redundancy-output.js';
import { printable, printableJson } from '../text/printable.js';
import { specOf } from '../vdi/names.js';
import type { DamagedVdi, Ended, KeptSnapshot, ShownVdi, VdiDetails, VdiRecord } from '../operations/operations.js';

/** One JSON value and a newline on stdout. */
export function printJson(value: unknown): void {
  io().stdout.write(`${printableJson(JSON.stringify(value))}\n`);
}

export function printLine(line: string): void {
  io().stdout.write(`${printable(line)}\n`);
}

/** One line on stderr that is not an error. */
export function printNote(line: string): void {
  io().stderr.write(`sheepgate: note: ${printable(line)}\n`);
}

/** A table with columns as wide as their widest cell; `right` names the columns that are aligned to the right. */
export function table(
  header: readonly string[],
  cells: readonly (readonly string[])[],
  right: readonly string[] = [],
): string {
  const rows = cells.map((row) => row.map(printable));
  // Not Math.max(...): there may be more rows than a call can have arguments.
  const widths = header.map((title, i) =>
    rows.reduce((width, row) => Math.max(width, row[i]?.length ?? 0), title.length),
  );
  const line = (cells: readonly string[]): string =>
    cells
      .map((cell, i) => (right.includes(header[i] ?? '') ? cell.padStart(widths[i] ?? 0) : cell.padEnd(widths[i] ?? 0)))
      .join('  ')
      .trimEnd();
  return [header, ...rows].map((row) => `${line(row)}\n`).join('');
}

/** "2026-03-01T12:34:56+01:00", in this machine's time zone. */
export function formatTime(timeMs: number): string {
  const offsetMinutes = -new Date(timeMs).getTimezoneOffset();
  const local = new Date(timeMs + offsetMinutes * 60_000).toISOString().slice(0, 19);
  const hours = String(Math.floor(Math.abs(offsetMinutes) / 60)).padStart(2, '0');
  const minutes = String(Math.abs(offsetMinutes) % 60).padStart(2, '0');
  return `${local}${offsetMinutes < 0 ? '-' : '+'}${hours}:${minutes}`;
}

/** A vid as Sheepdog's own tools write it. */
export function formatVid(vid: number): string {
  return vid.toString(16);
}

/** The spec to use, @ID or @=NAME, if name and tag do not identify it. */
export function otherSpec(record: VdiRecord): string | undefined {
  const spec = specOf(record);
  return spec === labelOfVdi(record) ? undefined : spec;
}

/** The clients of a VDI, and the temporary snapshots kept for clients. Earlier daemons do not report them. */
export function usersOf({ clients = [], kept = [] }: Partial<VdiDetails>): Pick<VdiDetails, 'clients' | 'kept'> {
  return { clients, kept };
}

/** A VDI in JSON. Times are ISO 8601 in UTC; null for what does not apply. */
export function vdiJson(record: VdiRecord | VdiDetails | ShownVdi): object {
  return {
    name: record.name,
    tag: record.isSnapshot ? record.tag : null,
    vid: record.vid,
    isSnapshot: record.isSnapshot,
    snapId: record.snapId,
    size: record.size,
    blockSizeShift: record.blockSizeShift,
    redundancy: redundancyJson(record.redundancy),
    parentVid: record.parentVid || null,
    createdAt: new Date(record.createdAt).toISOString(),
    snapshotAt: record.snapshotAt ? new Date(record.snapshotAt).toISOString() : null,
    spec: specOf(record),
    unfinished: unfinishedJson(record.unfinished),
    ...('allocatedBytes' in record && {
      allocatedBytes: record.allocatedBytes,
      exclusiveBytes: record.exclusiveBytes,
      ...(record.damage !== undefined && { damage: record.damage }),
      ...(record.merging !== undefined && { merging: record.merging }),
      open: record.open,
      clients: usersOf(record).clients.map(({ client, since, lostAt, until }) => ({
        client,
        since: isoTime(since),
        lostAt: lostAt === null ? null : isoTime(lostAt),
        until: until === null ? null : isoTime(until),
      })),
      kept: usersOf(record).kept.map(keptJson),
    }),
    ...('writers' in record && {
      writers: (record.writers ?? []).map(({ client, isExclusive, firstWriteAt }) => ({
        ...{ client, isExclusive, firstWriteAt: firstWriteAt === null ? null : isoTime(firstWriteAt) },
      })),
      twoWriters: record.twoWriters ? { clients: record.twoWriters.clients, at: isoTime(record.twoWriters.at) } : null,
    }),
  };
}

/** The fields of vdiJson, with null for those that are lost. */
export function damagedJson({ vid, likelyName, isSnapshot, why }: DamagedVdi): object {
  const lost = { snapId: null, size: null, blockSizeShift: null, parentVid: null, createdAt: null, snapshotAt: null };
  return {
    name: null,
    tag: null,
    vid,
    isSnapshot: isSnapshot ?? null,
    ...lost,
    likelyName: likelyName ?? null,
    damage: why,
  };
}

/** The command that fills the VDI, and when it began. */
export function unfinishedJson(unfinished: VdiRecord['unfinished']): object | null {
  return unfinished ? { by: unfinished.by, since: isoTime(unfinished.since) } : null;
}

/** `ended`: the temporary snapshots that the operation ended, if any. Earlier daemons do not report them. */
export function endedJson({ ended }: Partial<Ended>): object {
  return ended?.length ? { ended: ended.map(keptJson) } : {};
}

export function endedLines({ ended }: Partial<Ended>): string[] {
  return (ended ?? []).map(
    ({ spec, takenAt, client, until }) =>
      `ended ${spec} of ${formatTime(takenAt)}, kept for ${client} until ${formatTime(until)}`,
  );
}

function keptJson({ spec, takenAt, client, until }: KeptSnapshot): object {
  return { snapshot: spec, takenAt: isoTime(takenAt), client, until: isoTime(until) };
}

function isoTime(timeMs: number): string {
  return new Date(timeMs).toISOString();
}
