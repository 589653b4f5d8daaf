/** Copies and erasure codes of a cluster, in words for people and in JSON with stable fields. */
import type { Redundancy } from '../store/vdi-record.js';
import { formatRedundancy, zonesFor } from '../store/redundancy.js';

/** "2" or "erasure code 2:1, any 2 of 3 strips are enough". */
export function redundancyText(redundancy: Redundancy): string {
  if ('copies' in redundancy) return formatRedundancy(redundancy);
  return `erasure code ${formatRedundancy(redundancy)}, any ${redundancy.dataStrips} of ${zonesFor(redundancy)} strips are enough`;
}

/** Null for a local store, and from daemons of earlier versions. */
export function redundancyJson(redundancy: Redundancy | undefined): object | null {
  if (redundancy === undefined) return null;
  return { policy: 'copies' in redundancy ? 'replicated' : 'erasure', ...redundancy };
}
