/**
 * Names and tags as text. A Sheepdog cluster stores bytes in any encoding; here names are strings. A byte that is not valid
 * UTF-8 becomes a lone surrogate, U+DC00 plus the byte, which never occurs in valid text. So the same bytes come back, two
 * names are equal if their bytes are, and JSON can carry them. (Python does the same: "surrogateescape".)
 */
import { isUtf8 } from 'node:buffer';

const ESCAPE = 0xdc00;
/** Bytes below this are always valid. */
const FIRST_ESCAPED = 0x80;
/** Bytes of the longest sequence of UTF-8. */
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

/** How many bytes the character at `at` has; 0 if no valid character begins there. */
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

/** As encodeURIComponent, but for any name: that function throws on lone surrogates. */
export function uriComponent(text: string): string {
  if (text.isWellFormed()) return encodeURIComponent(text);
  return Array.from(text, (character) =>
    character.isWellFormed() ? encodeURIComponent(character) : percentOf(character),
  ).join('');
}

/** All bytes of `text`, as "%C3%A4". */
export function percentOf(text: string): string {
  return Array.from(bytesOfText(text), (byte) => `%${byte.toString(16).toUpperCase().padStart(2, '0')}`).join('');
}
