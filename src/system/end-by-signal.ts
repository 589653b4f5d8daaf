/** The end of this process by a signal, as if nothing had caught it. */

/**
 * End this process now, as the uncaught signal would. process.exit() could hang for ever: it waits for the thread pool, where a
 * metadata commit waits for this thread (lmdb's WaitForCallbacks).
 */
export function endBySignal(signal: NodeJS.Signals): void {
  process.removeAllListeners(signal);
  process.kill(process.pid, signal);
}
