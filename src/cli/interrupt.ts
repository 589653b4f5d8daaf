/**
 * Ctrl-C and SIGTERM during a job: the first signal aborts the job, which cleans up, and the process then exits with 128 + the
 * number of the signal. A second signal ends the process at once.
 */
import { endBySignal } from '../system/end-by-signal.js';
import { InterruptedError } from '../system/interrupted-error.js';
import { io } from './command-io.js';

/** Run `work`. SIGINT and SIGTERM abort its AbortSignal with an InterruptedError as reason. */
export async function interruptible<T>(work: (signal: AbortSignal) => Promise<T>): Promise<T> {
  const controller = new AbortController();
  if (!io().takesSignals) return work(controller.signal);
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
