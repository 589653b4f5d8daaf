/** Quoting of names in the command lines that messages suggest. */

/** `word`, quoted where needed so that a POSIX shell reads it as one word. */
export function shellWord(word: string): string {
  return /^[\w./:@%+=,-]+$/.test(word) ? word : `'${word.replaceAll("'", `'\\''`)}'`;
}
