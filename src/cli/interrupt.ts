/**
 * Ctrl-C and SIGTERM during long work: the work is told to stop, so that it can clean up, and the process then ends with
 * the usual code. A second signal ends it at once.
 */
import os from 'node:os';

export class InterruptedError extends Error {
  readonly exitCode: number;

  constructor(signal: NodeJS.Signals) {
    super(`interrupted by ${signal}`);
    this.name = 'InterruptedError';
    this.exitCode = 128 + os.constants.signals[signal];
  }
}

/**
 * End this process now, as the signal would have without us. Not with process.exit(): that waits for the thread pool, and
 * a metadata commit under way there waits for the thread that would be waiting (lmdb's WaitForCallbacks): for ever.
 */
export function endBySignal(signal: NodeJS.Signals): void {
  process.removeAllListeners(signal);
  process.kill(process.pid, signal);
}

/** Run `work`; its signal is aborted with an InterruptedError as reason when the process is told to end. */
export async function interruptible<T>(work: (signal: AbortSignal) => Promise<T>): Promise<T> {
  const controller = new AbortController();
  const onSignal = (signal: NodeJS.Signals): void => {
    if (controller.signal.aborted) endBySignal(signal);
    else controller.abort(new InterruptedError(signal));
  };
  process.on('SIGINT', onSignal);
  process.on('SIGTERM', onSignal);
  try {
    return await work(controller.signal);
  } finally {
    process.off('SIGINT', onSignal);
    process.off('SIGTERM', onSignal);
  }
}
