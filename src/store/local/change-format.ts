/**
 * The lines of the change record (FORMAT.md, copies/): what has changed since a copy of the metadata, so that after a loss the
 * owner of each object is known although the copy is older. Owns their form. Text, so that people can read it.
 */
import zlib from 'node:zlib';
import type { VdiRecord } from '../vdi-record.js';

/**
 * What a line says; `at` in milliseconds since 1970.
 * put: the record of a new or changed VDI or snapshot. The map of a new one begins as its parent's.
 * removed: these vids have no record any more.
 * map: the map of this vid has changed since the last copy.
 * overlays: the records of overlays of this vid have changed since the last copy. The vid may have no record itself.
 * merged: overlays of this vid may have given blocks to the objects below since the last copy.
 * names, for: new objects of the working VDI `for` get the vid `names` from here on.
 * gap: changes were not recorded.
 */
export type RecordedChange =
  | { readonly put: VdiRecord }
  | { readonly removed: readonly number[] }
  | { readonly map: number }
  | { readonly overlays: number }
  | { readonly merged: number }
  | { readonly names: number; readonly for: number }
  | { readonly gap: string };

/** A line that was read. */
export interface NumberedChange {
  /** Counts all changes of the store from 1. */
  readonly number: number;
  readonly at: number;
  readonly change: RecordedChange;
}

export interface ChangesHeader {
  readonly store: string;
  readonly session: string;
}

const MAGIC = 'sheepgate changes 1';
/** A change record is not longer: a copy makes it short. Reading stops there. */
export const MAX_CHANGES_BYTES = 256 * 2 ** 20;

function withCheck(text: string): string {
  return `${(zlib.crc32(text) >>> 0).toString(16).padStart(8, '0')} ${text}\n`;
}

/** Undefined if the line is damaged. */
function checked(line: string): string | undefined {
  const text = line.slice(9);
  return withCheck(text) === `${line}\n` ? text : undefined;
}

export function changesHeader({ store, session }: ChangesHeader): Buffer {
  return Buffer.from(withCheck(`${MAGIC} ${store} ${session}`));
}

export function changeLine({ number, at, change }: NumberedChange): Buffer {
  return Buffer.from(withCheck(JSON.stringify({ number, at, ...change })));
}

/** The content of one file of the record. `problem`: what is wrong with it; a line without its end was not answered, and is none. */
export function parseChanges(bytes: Buffer): {
  readonly header: ChangesHeader | undefined;
  readonly changes: readonly NumberedChange[];
  readonly problem: string | undefined;
} {
  const lines = bytes.toString('utf8').split('\n').slice(0, -1);
  const head = /^sheepgate changes 1 (\S*) (\S*)$/.exec(checked(lines[0] ?? '') ?? '');
  if (!head)
    return { header: undefined, changes: [], problem: lines.length === 0 ? undefined : 'its first line is damaged' };
  const changes: NumberedChange[] = [];
  let problem: string | undefined;
  for (const [n, line] of lines.entries()) {
    if (n === 0) continue;
    const change = parseLine(line);
    if (change) changes.push(change);
    else problem ??= `line ${n + 1} of it is damaged`;
  }
  return { header: { store: head[1] ?? '', session: head[2] ?? '' }, changes, problem };
}

function parseLine(line: string): NumberedChange | undefined {
  const text = checked(line);
  if (text === undefined) return undefined;
  const { number, at, ...change } = JSON.parse(text) as { number: number; at: number } & RecordedChange;
  return { number, at, change };
}
