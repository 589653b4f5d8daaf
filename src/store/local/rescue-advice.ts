/** What a message about lost or damaged metadata says to do. */
import { shellWord } from '../../text/shell-word.js';

/** `directory`: of the store. */
export function rescueOf(directory: string): string {
  return `'sheepgate store rescue ${shellWord(directory)} NEW' builds a store in NEW from what is left`;
}
