/**
 * Mistakes that a test can plant in this process, to prove that the crash harness finds each of them (test/power). Owns their
 * names and the switch. Never reachable by an environment variable, an option or a file: only a test that imports this module
 * can call `plant`.
 */

export type PlantedFault =
  /** References are given up before the map that no longer has them is durable. */
  | 'release before commit'
  /** Logs are applied on any boot. */
  | 'log of another boot'
  /** An object that is created while a flush runs counts as part of that flush, which has synced its objects before. */
  | 'flush skips new objects'
  /** A snapshot is answered when it is in memory. */
  | 'snapshot before its commit'
  /** For overlay objects: a presence bitmap is durable before the data that it speaks of. */
  | 'bitmap before data'
  /** For overlay objects: the base is given up before the merged object is durable. */
  | 'merge drops its base early';

let planted: PlantedFault | undefined;

export function isPlanted(fault: PlantedFault): boolean {
  return planted === fault;
}

/** Undefined: none. */
export function plant(fault: PlantedFault | undefined): void {
  planted = fault;
}
