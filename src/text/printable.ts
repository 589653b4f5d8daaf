/**
 * Text that others chose (names in a cluster, a manifest, an error that quotes a file), made safe for a terminal: control
 * characters and those that turn the direction of text are written as escapes, all else stays as it is.
 */

/** C0, DEL and C1, line and paragraph separators, lone surrogates, and what reorders the text around it. */
const UNSAFE = /[\p{Cc}\p{Zl}\p{Zp}\p{Cs}\p{Bidi_Control}]/gu;

/** A byte of a name that is no text: U+DC00 and the byte (src/text/name-bytes.ts). */
const BYTE = /^[\udc80-\udcff]$/u;

/** "\x1b", "\u202e" in place of what must not reach a terminal; "\xff" for a byte that is no text. */
export function printable(text: string): string {
  return text.replaceAll(UNSAFE, (character) => {
    const code = BYTE.test(character) ? character.charCodeAt(0) & 0xff : character.charCodeAt(0);
    return code < 0x100 ? `\\x${code.toString(16).padStart(2, '0')}` : unicodeEscape(code);
  });
}

/** JSON that reads the same and is safe to print: its own escapes leave out C1, DEL and what reorders. */
export function printableJson(json: string): string {
  return json.replaceAll(UNSAFE, (character) => unicodeEscape(character.charCodeAt(0)));
}

function unicodeEscape(code: number): string {
  return `\\u${code.toString(16).padStart(4, '0')}`;
}
