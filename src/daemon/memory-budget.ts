/** How much of the machine's memory the requests and replies of all NBD clients may take, unless --max-memory says it. */
import { MIN_MEMORY_BYTES } from 'nbd-server-ts';

/** Of what the process may use. The rest is for the page cache, which serves reads, and for maps. */
const SHARE = 1 / 8;
/** 32 clients with as much under way as one may have; more makes nothing faster. */
const MOST_BYTES = 1024 * 1024 * 1024;

export function defaultMemoryBudget(memoryBytes: number): number {
  return Math.max(MIN_MEMORY_BYTES, Math.min(MOST_BYTES, Math.floor(memoryBytes * SHARE)));
}
