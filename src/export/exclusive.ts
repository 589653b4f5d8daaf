/**
 * The words for opening a disk exclusively, as export names, access rules and `serve --exclusive` have them: `exclusive`, or
 * `exclusive=` and what becomes of a client that finds another one writing. Owns the words; docs/exclusive.md has what they mean.
 */

/**
 * What becomes of a client that wants to write and may not, for another one has the disk: 'read-only': it may read. 'refuse':
 * it is refused. 'take-over': if the other one is found gone, that is cut off for good; else it is refused.
 */
export type Otherwise = 'read-only' | 'refuse' | 'take-over';

export const OTHERWISE: readonly Otherwise[] = ['read-only', 'refuse', 'take-over'];

/** For messages and help. */
export const EXCLUSIVE_FORM = `exclusive[=${OTHERWISE.join('|')}]`;

/** 'unsaid': exclusively, and somebody else says what becomes of those who come late. */
export type Exclusive = Otherwise | 'unsaid';

/** Undefined if `text`, what stands behind the =, is none of the words. */
export function parseOtherwise(text: string): Otherwise | undefined {
  return OTHERWISE.find((word) => word === text);
}

export function formatExclusive(exclusive: Exclusive): string {
  return exclusive === 'unsaid' ? 'exclusive' : `exclusive=${exclusive}`;
}

/** Of several that each have a say, the most important one first: exclusively if one of them says so, as the first one that says how. */
export function joinExclusive(...said: readonly (Exclusive | undefined)[]): Exclusive | undefined {
  const wishes = said.filter((each) => each !== undefined);
  return wishes.find((each) => each !== 'unsaid') ?? wishes[0];
}
