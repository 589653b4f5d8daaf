/**
 * The standard streams and the environment of a command: those of this process, or others for a command that runs inside another
 * program (run.ts). Commands print and read variables through `io()` only, so that two commands in one process never mix.
 */
import { AsyncLocalStorage } from 'node:async_hooks';
import type { Readable, Writable } from 'node:stream';

export interface CommandIo {
  /** Undefined: descriptor 0 of this process. */
  readonly stdin?: Readable | undefined;
  readonly stdout: Writable;
  readonly stderr: Writable & { readonly fd?: number };
  readonly env: NodeJS.ProcessEnv;
  /** Signals of this process are for the command. */
  readonly takesSignals: boolean;
}

interface RunningCommand extends CommandIo {
  /** Set by a command that did its work and found something wrong. */
  exitCode: number;
  /** Notes printed so far: each is printed once a command. */
  readonly noted: Set<string>;
}

// Getters: process.stdout is opened at its first use, and --version needs no stderr.
const ofThisProcess: RunningCommand = {
  get stdout() {
    return process.stdout;
  },
  get stderr() {
    return process.stderr;
  },
  env: process.env,
  takesSignals: true,
  exitCode: 0,
  noted: new Set(),
};

const inside = new AsyncLocalStorage<RunningCommand>();

/** Those of the command that runs. */
export function io(): RunningCommand {
  return inside.getStore() ?? ofThisProcess;
}

/** Call `work`, with `those` in the place of the process's own, also in all that it awaits. */
export function withIo<T>(those: CommandIo, work: () => Promise<T>): Promise<T> {
  return inside.run({ ...those, exitCode: 0, noted: new Set() }, work);
}
