/**
 * Makes text from outside (names in a cluster, a manifest, an error that quotes a file) safe for a terminal: control
 * characters, and characters that change the direction of text, become escapes. All other characters stay.
 */

/** C0, DEL and C1, line and paragraph separators, lone surrogates, and characters that reorder text. */
const UNSAFE = /[\p{Cc}\p{Zl}\p{Zp}\p{Cs}\p{Bidi_Control}]/gu;

/** A byte of a name that is not valid UTF-8: U+DC00 plus the byte (name-bytes.ts). */
const BYTE = /^[\udc80-\udcff]$/u;

/** Unsafe characters become "\x1b" or "\u202e"; a byte that is not valid UTF-8 becomes "\xff". */
export function printable(text: string): string {
  return text.replaceAll(UNSAFE, (character) => {
    const code = BYTE.test(character) ? character.charCodeAt(0) & 0xff : character.charCodeAt(0);
    return code < 0x100 ? `\\x${code.toString(16).padStart(2, '0')}` : unicodeEscape(code);
  });
}

/** JSON with the same meaning that is safe to print: JSON.stringify does not escape C1, DEL and characters that reorder text. */
export function printableJson(json: string): string {
  return json.replaceAll(UNSAFE, (character) => unicodeEscape(character.charCodeAt(0)));
}

function unicodeEscape(code: number): string {
  return `\\u${code.toString(16).padStart(4, '0')}`;
}
