/**
 * The rules for VDI names and tags, and the specs that name a VDI or snapshot: NAME, NAME@TAG, and two forms for VDIs of other
 * tools, whose names and tags may have any character: @=NAME@TAG with percent signs, and @ID. None of our names begins with an
 * @, so these two forms cannot be names. Looks nothing up.
 */
import { randomBytes } from 'node:crypto';
import { bytesOfText, percentOf, textOfBytes } from '../text/name-bytes.js';
import type { VdiRecord } from '../store/vdi-record.js';
import { CatalogError } from './catalog-error.js';

/** sheepdog_proto.h: SD_MAX_VDI_LEN and SD_MAX_VDI_TAG_LEN are 256 bytes including the terminating NUL. */
const MAX_NAME_BYTES = 255;
const MAX_TAG_BYTES = 255;
/** Tags with a meaning of their own: NAME@now is a temporary snapshot. */
const RESERVED_TAG = 'now';

/** The end of the labels of labelOfRun. */
const RUN_MARK = '.run-';
const LABEL_OF_RUN = /\.run-[0-9a-f]{16}$/;

/** Follows the first @ if a name with percent signs comes, and no id. */
const ENCODED = '=';
/** Ids have 24 bits (sheepdog_proto.h, SD_NR_VDIS), in hex as `vdi list` and `dog` show them. */
const ID = /^[0-9a-f]{1,6}$/i;
/** A byte in a name with percent signs. */
const PERCENT = /(%[0-9a-f]{2})/i;

export interface VdiSpec {
  /** Empty if the spec is an id. */
  readonly name: string;
  /** undefined: the working VDI. */
  readonly tag: string | undefined;
  /** The VDI or snapshot with this id. */
  readonly vid?: number;
}

/** Parse "NAME", "NAME@TAG", "@ID" or "@=NAME[@TAG]". Errors: BAD_NAME. */
export function parseSpec(spec: string): VdiSpec {
  const at = spec.indexOf('@');
  if (at === 0) return parseForeign(spec);
  if (at < 0) return { name: checkName(spec), tag: undefined };
  const tag = spec.slice(at + 1);
  if (tag === '') throw new CatalogError('BAD_NAME', `"${spec}": a tag must follow the @`);
  return { name: checkName(spec.slice(0, at)), tag };
}

function parseForeign(spec: string): VdiSpec {
  const text = spec.slice(1);
  if (ID.test(text) && Number.parseInt(text, 16) > 0) {
    return { name: '', tag: undefined, vid: Number.parseInt(text, 16) };
  }
  const bad = (why: string): CatalogError => new CatalogError('BAD_NAME', `${JSON.stringify(spec)}: ${why}`);
  if (!text.startsWith(ENCODED)) {
    throw bad('there must be a name before the @, or a hexadecimal ID after it');
  }
  const [name, tag] = splitAt(text.slice(ENCODED.length)).map((part) => part && decodePercent(part, bad));
  if (!name || tag === '') throw bad('a name, or NAME@TAG, must follow "@=", and neither part may be empty');
  return { name, tag };
}

/** The text before and after the first @; [text, undefined] if there is none. */
function splitAt(text: string): [string, string | undefined] {
  const at = text.indexOf('@');
  return at < 0 ? [text, undefined] : [text.slice(0, at), text.slice(at + 1)];
}

/** %2F is a slash, %2C a comma, %40 an @, %25 a percent sign, %FF a byte that is no text; every other character stands for itself. */
export function decodePercent(text: string, bad: (why: string) => Error): string {
  if (!text.includes('%')) return text;
  const parts = text.split(PERCENT);
  const plain = parts.filter((_, n) => n % 2 === 0);
  if (plain.some((part) => part.includes('%'))) {
    throw bad('a % must be followed by two hexadecimal digits; %25 is a % itself');
  }
  const bytes = parts.map((part, n) => (n % 2 === 0 ? bytesOfText(part) : Buffer.from(part.slice(1), 'hex')));
  return textOfBytes(Buffer.concat(bytes));
}

/** The inverse of decodePercent, with as few percent signs as possible. */
export function encodePercent(text: string): string {
  return text.replace(/[%@/,\p{Cc}\p{Zl}\p{Zp}\p{Cs}]|^\s|\s$/gu, percentOf);
}

/**
 * The spec of a VDI or snapshot, for `parseSpec`: NAME or NAME@TAG if that is possible, else with percent signs. Never the id,
 * since a working VDI gets another one with every snapshot.
 */
export function formatSpec({ name, tag }: Pick<VdiSpec, 'name' | 'tag'>): string {
  const plain = tag === undefined ? name : `${name}@${tag}`;
  try {
    checkName(name);
    if (tag !== undefined) check('tag', tag, MAX_TAG_BYTES);
    return plain;
  } catch {
    // Only another tool can have made this name.
  }
  return `@=${encodePercent(name)}${tag === undefined ? '' : `@${encodePercent(tag)}`}`;
}

/**
 * The spec of a record. A snapshot to which another tool gave the tag of a temporary one, or whose tag may mean another snapshot
 * too, is named by its id, which a snapshot keeps.
 */
export function specOf(record: Named): string {
  const { vid, name, tag, isSnapshot, isTemporary, isDoubtful } = record;
  if (!isSnapshot) return formatSpec({ name, tag: undefined });
  const isById = isDoubtful === true || (isTemporaryTag(tag) && !isTemporary);
  return isById ? `@${vid.toString(16)}` : formatSpec({ name, tag });
}

type Named = Pick<VdiRecord, 'vid' | 'name' | 'tag' | 'isSnapshot' | 'isTemporary' | 'isDoubtful'>;

/** Whether NAME@`tag` names a temporary snapshot: "now" or "now:LABEL". Whether a snapshot is one, its record says (isTemporary). */
export function isTemporaryTag(tag: string): boolean {
  return tag === RESERVED_TAG || tag.startsWith(`${RESERVED_TAG}:`);
}

/** Whether a temporary snapshot's tag has a label: "now:LABEL". */
export function isLabelled(tag: string): boolean {
  return tag !== RESERVED_TAG;
}

/** A random label for one run of a command, which no other run has. `of`: what it is for, as a prefix. */
export function labelOfRun(of: string): string {
  return `${of}${RUN_MARK}${randomBytes(8).toString('hex')}`;
}

/** Whether the tag has a label of labelOfRun. */
export function isLabelOfRun(tag: string): boolean {
  return LABEL_OF_RUN.test(tag);
}

/** Check the tag of a temporary snapshot. Errors: BAD_NAME. */
export function checkTemporaryTag(tag: string): string {
  check('tag', tag, MAX_TAG_BYTES);
  if (!isTemporaryTag(tag) || tag === `${RESERVED_TAG}:`) {
    throw new CatalogError('BAD_NAME', `"${tag}" names no temporary snapshot: give NAME@now or NAME@now:LABEL`);
  }
  return tag;
}

/**
 * A name for a new VDI: 1 to 255 bytes of UTF-8, no "/", "@" or control characters, no space at either end, not "." or "..".
 * Errors: BAD_NAME.
 */
export function checkName(name: string): string {
  check('VDI name', name, MAX_NAME_BYTES);
  return name;
}

/** A tag for a new snapshot: as a name, and not "now" or "now:..." (those are temporary snapshots). Errors: BAD_NAME. */
export function checkTag(tag: string): string {
  check('tag', tag, MAX_TAG_BYTES);
  if (isTemporaryTag(tag)) {
    throw new CatalogError('BAD_NAME', `tag "${tag}" is reserved: NAME@now names a temporary snapshot`);
  }
  return tag;
}

function check(what: string, text: string, maxBytes: number): void {
  const bad = (why: string): CatalogError => new CatalogError('BAD_NAME', `${what} ${JSON.stringify(text)}: ${why}`);
  if (text === '') throw bad('must not be empty');
  if (text.includes('/') || text.includes('@')) throw bad('must not contain "/" or "@"');
  if (/\p{Cc}|\p{Zl}|\p{Zp}/u.test(text))
    throw bad('must not contain NUL or other control characters, nor line separators');
  if (!text.isWellFormed()) throw bad('is not valid Unicode');
  if (text === '.' || text === '..') throw bad('is the name of a directory on every system');
  if (text !== text.trim()) throw bad('must not begin or end with a space');
  if (Buffer.byteLength(text) > maxBytes) throw bad(`is longer than ${maxBytes} bytes`);
}
