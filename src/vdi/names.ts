/** What VDI names and tags may look like, and how NAME@TAG is taken apart. The same rules as for export names. */
import { CatalogError } from './catalog-error.js';

/** sheepdog_proto.h: SD_MAX_VDI_LEN and SD_MAX_VDI_TAG_LEN are 256 bytes including the terminating NUL. */
const MAX_NAME_BYTES = 255;
const MAX_TAG_BYTES = 255;
/** Tags with a meaning of their own: NAME@now is a temporary snapshot. */
const RESERVED_TAG = 'now';

export interface VdiSpec {
  readonly name: string;
  /** undefined: the working VDI. */
  readonly tag: string | undefined;
}

/** Split "NAME" or "NAME@TAG". Errors: BAD_NAME. */
export function parseSpec(spec: string): VdiSpec {
  const at = spec.indexOf('@');
  if (at < 0) return { name: checkName(spec), tag: undefined };
  const tag = spec.slice(at + 1);
  if (tag === '') throw new CatalogError('BAD_NAME', `"${spec}": a tag must follow the @`);
  return { name: checkName(spec.slice(0, at)), tag };
}

/** Whether `tag` is a temporary snapshot's: "now" or "now:LABEL". */
export function isTemporaryTag(tag: string): boolean {
  return tag === RESERVED_TAG || tag.startsWith(`${RESERVED_TAG}:`);
}

/** Whether a temporary snapshot's tag has a label: "now:LABEL". */
export function isLabelled(tag: string): boolean {
  return tag !== RESERVED_TAG;
}

/** Check what follows the @ of a temporary snapshot's name. Errors: BAD_NAME. */
export function checkTemporaryTag(tag: string): string {
  check('tag', tag, MAX_TAG_BYTES);
  if (!isTemporaryTag(tag) || tag === `${RESERVED_TAG}:`) {
    throw new CatalogError('BAD_NAME', `"${tag}" names no temporary snapshot: give NAME@now or NAME@now:LABEL`);
  }
  return tag;
}

/** A name for a VDI: 1 to 255 bytes of UTF-8, no "/", "@" or control characters, no space at either end, not "." or "..". */
export function checkName(name: string): string {
  check('VDI name', name, MAX_NAME_BYTES);
  return name;
}

/** A tag for a snapshot: as a name, and not "now" nor "now:..." (those are temporary snapshots). */
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
  if (text === '.' || text === '..') throw bad('is a directory everywhere, and no name');
  if (text !== text.trim()) throw bad('must not begin or end with a space');
  if (Buffer.byteLength(text) > maxBytes) throw bad(`is longer than ${maxBytes} bytes`);
}
