/** The default of --max-memory: the share of the machine's memory for the requests and replies of all NBD clients. */
import { MIN_MEMORY_BYTES } from 'nbd-server-ts';

/** Share of the memory that the process may use. The rest is for the page cache, which serves reads, and for object maps. */
const SHARE = 1 / 8;
/** 32 clients with the most that one client may have in flight; more makes nothing faster. */
const MOST_BYTES = 1024 * 1024 * 1024;

export function defaultMemoryBudget(memoryBytes: number): number {
  return Math.max(MIN_MEMORY_BYTES, Math.min(MOST_BYTES, Math.floor(memoryBytes * SHARE)));
}
