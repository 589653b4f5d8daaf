/**
 * The words for opening a disk exclusively, in export names, access rules and `serve --exclusive`: `exclusive`, or `exclusive=`
 * and what happens to a client that comes while another has the disk to write. Owns the words; their meaning is in
 * docs/exclusive.md and writers.ts.
 */

/**
 * What happens to a client that wants to write a disk which another client has to write. 'read-only': it may read. 'refuse': it
 * is refused. 'take-over': the other is asked whether it is still there; if it is gone, it is cut off for good, else the new one
 * is refused.
 */
export type Otherwise = 'read-only' | 'refuse' | 'take-over';

export const OTHERWISE: readonly Otherwise[] = ['read-only', 'refuse', 'take-over'];

/** For messages and help. */
export const EXCLUSIVE_FORM = `exclusive[=${OTHERWISE.join('|')}]`;

/** 'unsaid': exclusively, and another rule says what happens to clients that come late. */
export type Exclusive = Otherwise | 'unsaid';

/** `text`: the part after the =. Undefined if it is none of the words. */
export function parseOtherwise(text: string): Otherwise | undefined {
  return OTHERWISE.find((word) => word === text);
}

export function formatExclusive(exclusive: Exclusive): string {
  return exclusive === 'unsaid' ? 'exclusive' : `exclusive=${exclusive}`;
}

/** Joins rules, the most important first: exclusive if any rule says so, in the way of the first rule that says how. */
export function joinExclusive(...said: readonly (Exclusive | undefined)[]): Exclusive | undefined {
  const wishes = said.filter((each) => each !== undefined);
  return wishes.find((each) => each !== 'unsaid') ?? wishes[0];
}
