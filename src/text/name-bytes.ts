/**
 * Names and tags as text. A Sheepdog cluster keeps them as bytes and asks for no encoding; here they are strings. A byte that
 * is no part of UTF-8 is a lone surrogate, U+DC00 and the byte, which no text of ours has: the same bytes come back from it,
 * two names are equal if their bytes are, and JSON carries it. (Python does the same: "surrogateescape".)
 */
import { isUtf8 } from 'node:buffer';

const ESCAPE = 0xdc00;
/** Bytes below it are always text. */
const FIRST_ESCAPED = 0x80;
/** The longest sequence of UTF-8. */
const MAX_SEQUENCE = 4;
const NOT_TEXT = /[\udc80-\udcff]/u;

export function textOfBytes(bytes: Buffer): string {
  if (isUtf8(bytes)) return bytes.toString('utf8');
  let text = '';
  for (let at = 0; at < bytes.length;) {
    const length = sequenceAt(bytes, at);
    text +=
      length === 0 ? String.fromCharCode(ESCAPE + (bytes[at] as number)) : bytes.toString('utf8', at, at + length);
    at += Math.max(length, 1);
  }
  return text;
}

/** Bytes of the character at `at`; 0 if none begins there. */
function sequenceAt(bytes: Buffer, at: number): number {
  if ((bytes[at] as number) < FIRST_ESCAPED) return 1;
  for (let length = 2; length <= MAX_SEQUENCE && at + length <= bytes.length; length++) {
    if (isUtf8(bytes.subarray(at, at + length))) return length;
  }
  return 0;
}

export function bytesOfText(text: string): Buffer {
  if (text.isWellFormed()) return Buffer.from(text);
  return Buffer.concat(
    Array.from(text, (character) =>
      NOT_TEXT.test(character) ? Buffer.from([character.charCodeAt(0) - ESCAPE]) : Buffer.from(character),
    ),
  );
}

/** As encodeURIComponent, and of every name. */
export function uriComponent(text: string): string {
  if (text.isWellFormed()) return encodeURIComponent(text);
  return Array.from(text, (character) =>
    character.isWellFormed() ? encodeURIComponent(character) : percentOf(character),
  ).join('');
}

/** "%C3%A4": all bytes of `text`. */
export function percentOf(text: string): string {
  return Array.from(bytesOfText(text), (byte) => `%${byte.toString(16).toUpperCase().padStart(2, '0')}`).join('');
}
