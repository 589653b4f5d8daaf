/**
 * `sheepgate` as a process: runs the command of its arguments (run.ts), and ends. Owns what happens when stdout is closed, when
 * Node has nothing left to do, and when an error is caught nowhere. Importing it runs nothing: bin/start.cjs calls `main`.
 */
import { endBySignal } from '../system/end-by-signal.js';
import { InterruptedError } from '../system/interrupted-error.js';
import { readableStack } from '../system/readable-stack.js';
import { reasonOf } from '../system/system-error.js';
import { io } from './command-io.js';
import { EXIT_FAILED, runWords } from './run.js';

export { runCommand } from './run.js';

export async function main(): Promise<void> {
  // `sheepgate vdi list | head`: a reader that stops reading is no error. Commands that write more than lines to stdout (an image)
  // have listeners of their own.
  process.stdout.on('error', (error: NodeJS.ErrnoException) => {
    if (process.stdout.listenerCount('error') > 1) return;
    if (error.code === 'EPIPE') process.exit(process.exitCode ?? io().exitCode);
    process.stderr.write(`sheepgate: cannot write to stdout: ${reasonOf(error)}\n`);
    process.exit(EXIT_FAILED);
  });
  // A note that cannot be written does not end the command.
  process.stderr.on('error', () => undefined);
  // An internal error ends the process by a signal: Node's own exit can wait for ever (see endBySignal).
  process.on('uncaughtException', (error) => {
    process.stderr.write(`sheepgate: internal error, please report it: ${readableStack(error)}\n`);
    endBySignal('SIGABRT');
  });

  let isOver = false;
  // Node has nothing left to do, but the command has not ended: that must not look like success.
  process.once('beforeExit', () => {
    if (isOver) return;
    process.stderr.write('sheepgate: internal error, please report it: the command stopped before it was done\n');
    process.exit(EXIT_FAILED);
  });

  const { code, error } = await runWords(process.argv.slice(2));
  isOver = true;
  // Output that is still buffered for a pipe is written first, except for an interrupted image.
  if (error instanceof InterruptedError) process.exit(code);
  if (error !== undefined && process.stdout.writableLength > 0) process.stdout.once('drain', () => process.exit(code));
  else process.exitCode = code;
}
