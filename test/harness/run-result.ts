/** What a command left behind: its exit code and its output. */

export interface RunResult {
  /** null if a signal ended it, or it was killed at its time limit. */
  readonly code: number | null;
  readonly signal: NodeJS.Signals | null;
  readonly stdout: string;
  readonly stderr: string;
  readonly stdoutBytes: Buffer;
}

/** `stdout` is decoded at its first use: it may be a disk image, and decoding takes longer than copying. */
export function runResult(
  ending: Pick<RunResult, 'code' | 'signal'>,
  stdoutBytes: Buffer,
  stderrBytes: Buffer,
): RunResult {
  let text: string | undefined;
  return {
    ...ending,
    get stdout() {
      return (text ??= stdoutBytes.toString());
    },
    stderr: stderrBytes.toString(),
    stdoutBytes,
  };
}
