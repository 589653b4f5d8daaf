/** Converts between the redundancy of a store (redundancy.ts) and a cluster's copy policy. */
import { policyOfStrips, stripsOf, type CopyPolicy } from '../../sheepdog/copy-policy.js';
import type { Redundancy } from '../vdi-record.js';
import { zonesFor } from '../redundancy.js';

export function redundancyOf({ copies, copyPolicy }: CopyPolicy): Redundancy {
  const strips = stripsOf(copyPolicy);
  return strips ? { dataStrips: strips.data, parityStrips: strips.parity } : { copies };
}

export function copyPolicyOf(redundancy: Redundancy): CopyPolicy {
  const copies = zonesFor(redundancy);
  if ('copies' in redundancy) return { copies, copyPolicy: 0 };
  return { copies, copyPolicy: policyOfStrips({ data: redundancy.dataStrips, parity: redundancy.parityStrips }) };
}
