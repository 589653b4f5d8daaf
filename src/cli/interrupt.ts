/**
 * Ctrl-C and SIGTERM during long work: the work is told to stop, so that it can clean up, and the process then ends with
 * the usual code. A second signal ends it at once.
 */
import { endBySignal } from '../system/end-by-signal.js';
import { InterruptedError } from '../system/interrupted-error.js';

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
