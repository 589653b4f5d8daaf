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

/** Run `work`; its signal is aborted with an InterruptedError as reason when the process is told to end. */
export async function interruptible<T>(work: (signal: AbortSignal) => Promise<T>): Promise<T> {
  const controller = new AbortController();
  const onSignal = (signal: NodeJS.Signals): void => {
    const error = new InterruptedError(signal);
    if (controller.signal.aborted) process.exit(error.exitCode);
    controller.abort(error);
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
