/** The end of this process by a signal, as if nothing had caught it. */

/**
 * End this process now, as the signal would have without us. Not with process.exit(): that waits for the thread pool, and
 * a metadata commit under way there waits for the thread that would be waiting (lmdb's WaitForCallbacks): for ever.
 */
export function endBySignal(signal: NodeJS.Signals): void {
  process.removeAllListeners(signal);
  process.kill(process.pid, signal);
}
