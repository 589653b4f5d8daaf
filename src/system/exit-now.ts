/**
 * Ending the process whatever it is in the middle of. process.exit() waits for the threads of the pool, and one of them may
 * hang in a system call: on a disk that does not answer, on a terminal that was stopped.
 */
import koffi from 'koffi';

const exit = koffi.load('libc.so.6').func('void _exit(int code)');

/** No handler runs, nothing is flushed: for who has done that, or has waited long enough for it. */
export function exitNow(code: number): never {
  exit(code);
  throw new Error('invariant: a process lives on after _exit');
}
