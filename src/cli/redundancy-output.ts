/** Copies and erasure codes of a cluster, in words for people and in JSON with stable fields. */
import type { Redundancy } from '../store/vdi-record.js';
import { formatRedundancy, zonesFor } from '../store/redundancy.js';

/** "2" or "erasure code 2:1, 3 strips of which 2 are enough". */
export function redundancyText(redundancy: Redundancy): string {
  if ('copies' in redundancy) return formatRedundancy(redundancy);
  return `erasure code ${formatRedundancy(redundancy)}, ${zonesFor(redundancy)} strips of which ${redundancy.dataStrips} are enough`;
}

/** Null for a local store, and from daemons of earlier versions. */
export function redundancyJson(redundancy: Redundancy | undefined): object | null {
  if (redundancy === undefined) return null;
  return { policy: 'copies' in redundancy ? 'replicated' : 'erasure', ...redundancy };
}
