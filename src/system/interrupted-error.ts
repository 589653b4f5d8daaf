/** The reason with which a signal to this process (Ctrl-C, SIGTERM) ends long work. */
import os from 'node:os';

export class InterruptedError extends Error {
  /** What the process exits with: 128 + the number of the signal, as shells expect it. */
  readonly exitCode: number;

  constructor(signal: NodeJS.Signals) {
    super(`interrupted by ${signal}`);
    this.name = 'InterruptedError';
    this.exitCode = 128 + os.constants.signals[signal];
  }
}
