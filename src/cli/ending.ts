/**
 * The end of the process: its last lines on stderr, and whatever still keeps Node running. Most commands write to stderr directly
 * and end by themselves. `serve` replaces the last steps (endBy), so that it ends within a time limit even if its log is not read
 * and a node or a disk does not answer.
 */

import { isJournal, withPriorities } from '../daemon/log/journal-priorities.js';
import { io } from './command-io.js';

export interface LastSteps {
  /** In place of stderr. */
  say(text: string): void;
  /** Called when everything is done and said, with the exit code. */
  finish(code: number): Promise<void>;
}

const OF_A_COMMAND: LastSteps = {
  say: (text) => {
    const { stderr } = io();
    stderr.write(stderr.fd !== undefined && isJournal(stderr.fd) ? withPriorities(text) : text);
  },
  finish: () => Promise.resolve(),
};

let steps = OF_A_COMMAND;

export function endBy(those: LastSteps): void {
  steps = those;
}

/** Write a line to stderr, or to the log of `serve`. */
export function lastWords(text: string): void {
  steps.say(text);
}

export function finish(code: number): Promise<void> {
  return steps.finish(code);
}
