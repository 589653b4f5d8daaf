/**
 * The number of copies, or the erasure code, in inodes, requests and the cluster's description: nr_copies and copy_policy (fec.h,
 * ec_policy_to_dp). Owns the bits of that byte.
 */

export interface CopyPolicy {
  /** Copies, or strips of all kinds. 0 in a request: the cluster's default. */
  readonly copies: number;
  /** 0: whole copies; else half of the data strips in the upper four bits, the parity strips in the lower ones. */
  readonly copyPolicy: number;
}

export const CLUSTER_DEFAULT: CopyPolicy = { copies: 0, copyPolicy: 0 };

export interface Strips {
  readonly data: number;
  readonly parity: number;
}

/** Undefined for whole copies. */
export function stripsOf(copyPolicy: number): Strips | undefined {
  return copyPolicy === 0 ? undefined : { data: (copyPolicy >> 4) * 2, parity: copyPolicy & 0x0f };
}

/** The copy_policy of an erasure code. */
export function policyOfStrips({ data, parity }: Strips): number {
  return ((data / 2) << 4) | parity;
}

/** Zones with nodes that hold objects: only one node of a zone has a copy, and nodes without vnodes have none. */
export function zonesIn(nodes: readonly { readonly zone: number; readonly vnodes: number }[]): number {
  return new Set(nodes.filter(({ vnodes }) => vnodes > 0).map(({ zone }) => zone)).size;
}
