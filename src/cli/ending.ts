/**
 * The end of the process as far as it may have to wait: for its last words to be written, and for whatever keeps Node running.
 * Commands end by themselves and write to stderr as it is; `serve` says here how it ends within a bound (LastSteps), though
 * nobody reads its log and a node or a disk does not answer.
 */

import { isJournal, withPriorities } from '../daemon/log/journal-priorities.js';

export interface LastSteps {
  /** In place of process.stderr. */
  say(text: string): void;
  /** All is done, and said; the exit code is known. */
  finish(code: number): Promise<void>;
}

const OF_A_COMMAND: LastSteps = {
  say: (text) => void process.stderr.write(isJournal(process.stderr.fd) ? withPriorities(text) : text),
  finish: () => Promise.resolve(),
};

let steps = OF_A_COMMAND;

export function endBy(those: LastSteps): void {
  steps = those;
}

/** A line on stderr, whoever reads it. */
export function lastWords(text: string): void {
  steps.say(text);
}

export function finish(code: number): Promise<void> {
  return steps.finish(code);
}
