/**
 * Ending the process at once. process.exit() waits for the threads of the pool, and one of them may hang in a system call:
 * on a disk that does not answer, or on a stopped terminal.
 */
import koffi from 'koffi';

const exit = koffi.load('libc.so.6').func('void _exit(int code)');

/** No handler runs and nothing is flushed: callers have done that, or have waited long enough for it. _exit(2). */
export function exitNow(code: number): never {
  exit(code);
  throw new Error('invariant: the process still runs after _exit');
}
