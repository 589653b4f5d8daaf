/**
 * The redundancy of a VDI in words: "3" is three whole copies of each object, "4:2" an erasure code of four data strips and two
 * parity strips. Owns this syntax, and the limits, which are the nodes' (internal_proto.h, SD_MAX_COPIES; fec.h, SD_EC_MAX_STRIP).
 */
import type { Redundancy } from './vdi-record.js';

/** SD_MAX_COPIES. */
export const MAX_COPIES = 31;
/** An inode has four bits for half of this number. */
export const DATA_STRIPS: readonly number[] = [2, 4, 8, 16];
/** SD_EC_MAX_STRIP - 1. */
export const MAX_PARITY_STRIPS = 15;

export const REDUNDANCY_HELP = `X copies, 1 to ${MAX_COPIES}; or X:Y strips, X of ${DATA_STRIPS.join(', ')} with data and 1 to ${MAX_PARITY_STRIPS} with parity`;

/** Undefined if `text` is no redundancy. */
export function parseRedundancy(text: string): Redundancy | undefined {
  const match = /^(\d{1,2})(?::(\d{1,2}))?$/.exec(text);
  if (!match) return undefined;
  const [first, second] = [Number(match[1]), Number(match[2])];
  if (match[2] === undefined) return first >= 1 && first <= MAX_COPIES ? { copies: first } : undefined;
  const isCode = DATA_STRIPS.includes(first) && second >= 1 && second <= MAX_PARITY_STRIPS;
  return isCode ? { dataStrips: first, parityStrips: second } : undefined;
}

/** The syntax that parseRedundancy reads. */
export function formatRedundancy(redundancy: Redundancy): string {
  if ('copies' in redundancy) return String(redundancy.copies);
  return `${redundancy.dataStrips}:${redundancy.parityStrips}`;
}

/** The number of zones that each object needs: nodes of one zone count once. */
export function zonesFor(redundancy: Redundancy): number {
  return 'copies' in redundancy ? redundancy.copies : redundancy.dataStrips + redundancy.parityStrips;
}

/** For messages and tables: "2 copies", "erasure code 4:2". */
export function describeRedundancy(redundancy: Redundancy): string {
  if ('copies' in redundancy) return redundancy.copies === 1 ? '1 copy' : `${redundancy.copies} copies`;
  return `erasure code ${formatRedundancy(redundancy)}`;
}

export function isSameRedundancy(a: Redundancy | undefined, b: Redundancy | undefined): boolean {
  if (a === undefined || b === undefined) return a === b;
  return formatRedundancy(a) === formatRedundancy(b);
}
