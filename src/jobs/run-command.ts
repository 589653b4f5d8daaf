/** Runs a command line of the operator by sh, with a time limit. Its output goes to stderr: stdout is for results. */
import { spawn, type ChildProcess } from 'node:child_process';

export interface RunCommandOptions {
  readonly timeoutMs: number;
  /** Kills the command. */
  readonly signal?: AbortSignal;
}

/** Run it to its end. Returns null if it succeeded, otherwise what failed, to follow "the command" in a message. */
export async function runCommand(command: string, { timeoutMs, signal }: RunCommandOptions): Promise<string | null> {
  // In its own process group: a Ctrl-C is handled by sheepgate, and children of the command can be killed with it.
  const child = spawn('/bin/sh', ['-c', command], { detached: true, stdio: ['ignore', 'pipe', 'pipe'] });
  // Through us and not inherited: the command must not die of SIGPIPE when the reader of our stderr is gone.
  for (const stream of [child.stdout, child.stderr])
    stream.on('data', (text: Buffer) => process.stderr.write(text)).on('error', () => undefined);
  let early: string | undefined;
  const end = (why: string): void => {
    early ??= why;
    endGroup(child);
  };
  const timer = setTimeout(() => end(`did not end within ${timeoutMs / 1000} s`), timeoutMs);
  const onAbort = (): void => end('was interrupted');
  if (signal?.aborted) onAbort();
  signal?.addEventListener('abort', onAbort, { once: true });
  try {
    // 'exit' and not 'close': a background process of the command may keep its output open.
    return await new Promise((resolve) => {
      child.on('error', (error) => resolve(`could not be started: ${error.message}`));
      child.once('exit', (code, by) => resolve(code === 0 && !early ? null : (early ?? `ended with ${by ?? code}`)));
    });
  } finally {
    clearTimeout(timer);
    signal?.removeEventListener('abort', onAbort);
    for (const stream of [child.stdout, child.stderr]) (stream as unknown as { unref?(): void }).unref?.();
    child.unref();
  }
}

function endGroup({ pid }: ChildProcess): void {
  if (pid === undefined) return;
  try {
    process.kill(-pid, 'SIGKILL');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error;
  }
}
