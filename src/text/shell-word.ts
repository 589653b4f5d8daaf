/** Names in the command lines that messages tell people to type. */

/** `word` as a POSIX shell takes it for one word, whatever is in it. */
export function shellWord(word: string): string {
  return /^[\w./:@%+=,-]+$/.test(word) ? word : `'${word.replaceAll("'", `'\\''`)}'`;
}
