/**
 * Runs inputs by their seeds, half of them against the server and half against the client, and checks that each ends within a time
 * limit, that no exception is uncaught, and that memory stays bounded.
 */

import { runClientInput } from './client-fuzz.js';
import { ServerFuzzer } from './server-fuzz.js';

/** One input takes a millisecond; this is for one that hangs. */
const INPUT_BOUND_MS = 20_000;
/** Of the whole process; it has been seen at a quarter of this. */
export const MEMORY_BOUND_BYTES = 1024 * 1024 * 1024;

export class FuzzFailure extends Error {
  constructor(seed: number, cause: unknown) {
    super(`seed ${seed}: ${cause instanceof Error ? (cause.stack ?? cause.message) : String(cause)}`, { cause });
    this.name = 'FuzzFailure';
  }
}

export interface FuzzReport {
  readonly inputs: number;
  readonly durationMs: number;
  readonly largestMemoryBytes: number;
}

/** Run the seeds from `firstSeed` on. @throws FuzzFailure at the first that fails */
export async function fuzz(firstSeed: number, inputs: number, progress?: (done: number) => void): Promise<FuzzReport> {
  const began = Date.now();
  const server = new ServerFuzzer();
  let largestMemoryBytes = 0;
  const strays: Error[] = [];
  // The server warns of errors of its observer.
  const { emitWarning } = process;
  process.emitWarning = () => undefined;
  const onStray = (error: unknown): void => void strays.push(error instanceof Error ? error : new Error(String(error)));
  process.on('uncaughtException', onStray).on('unhandledRejection', onStray);
  try {
    for (let index = 0; index < inputs; index++) {
      const seed = firstSeed + index;
      try {
        await within(INPUT_BOUND_MS, seed % 2 === 0 ? server.run(seed) : runClientInput(seed));
        const [stray] = strays;
        if (stray !== undefined) throw stray;
      } catch (error) {
        throw new FuzzFailure(seed, error);
      }
      if (index % 1000 === 999) {
        const { rss } = process.memoryUsage();
        largestMemoryBytes = Math.max(largestMemoryBytes, rss);
        if (rss > MEMORY_BOUND_BYTES) throw new FuzzFailure(seed, new Error(`${rss} bytes of memory`));
        progress?.(index + 1);
      }
    }
  } finally {
    process.off('uncaughtException', onStray).off('unhandledRejection', onStray);
    process.emitWarning = emitWarning;
    server.close();
  }
  return { inputs, durationMs: Date.now() - began, largestMemoryBytes };
}

async function within(timeoutMs: number, work: Promise<void>): Promise<void> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Error(`did not end within ${timeoutMs} ms`)), timeoutMs);
  });
  await Promise.race([work, late]).finally(() => clearTimeout(timer));
}
