/**
 * What a job reports while it works: progress, and notes about what is not a failure. Owns the interface. The command
 * line shows it on stderr (src/cli/reporting.ts); tests collect it.
 */

export interface Progress {
  /** So many more bytes are done. */
  readonly advance: (bytes: number) => void;
  /** The work has ended, successfully or not. */
  readonly end: () => void;
}

export interface Reporting {
  /** Begin to show the progress of `what`. `total` is in bytes; undefined if it is not known. */
  readonly progress: (what: string, total: number | undefined) => Progress;
  /** A line for the operator about something that is not a failure. */
  readonly log: (line: string) => void;
}

/** What every long job gets: where to report, and the signal that stops it. */
export interface JobContext extends Reporting {
  /** Aborted to stop the job; its reason is what the job then throws. */
  readonly signal: AbortSignal;
}

/** Run `work`, which advances `progress`; the progress ends with it. */
export async function withProgress<T>(progress: Progress, work: (progress: Progress) => Promise<T>): Promise<T> {
  try {
    return await work(progress);
  } finally {
    progress.end();
  }
}
