/**
 * --freeze-cmd and --thaw-cmd: a snapshot taken while the guest holds still. Owns the order (freeze, snapshot, thaw) and that
 * a snapshot is refused if the guest was thawed before it was there. Freezing and thawing themselves are the guard's
 * (thaw-guard.ts), whatever becomes of this process.
 */
import { spawn, type ChildProcess } from 'node:child_process';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { InvalidArgumentError, Option, type Command } from 'commander';
import { OperationError } from '../operations/operations.js';
import { printNote } from '../cli/output.js';
import type { GuardLine } from './thaw-guard.js';

/** A guest that is frozen for longer has its users call: nothing that we do meanwhile takes as much. */
const DEFAULT_TIMEOUT_S = 30;
const MAX_TIMEOUT_S = 3600;

export interface FreezeOptions {
  readonly freezeCmd?: string;
  readonly thawCmd?: string;
  readonly freezeTimeout?: number;
}

/** Add --freeze-cmd, --thaw-cmd and --freeze-timeout. */
export function withFreezeOptions(command: Command): Command {
  return command
    .option('--freeze-cmd <command>', 'run by sh before the snapshot is taken; if it fails, none is')
    .option('--thaw-cmd <command>', 'run by sh after it, whatever happened')
    .addOption(
      new Option(
        '--freeze-timeout <seconds>',
        `thaw after this long in any case (default: ${DEFAULT_TIMEOUT_S}); a snapshot that was not taken by then fails`,
      ).argParser((text) => {
        const seconds = Number(text);
        if (!(seconds > 0 && seconds <= MAX_TIMEOUT_S)) {
          throw new InvalidArgumentError(`It must be above 0 and at most ${MAX_TIMEOUT_S} seconds.`);
        }
        return seconds;
      }),
    );
}

export class FrozenMoment {
  readonly #options: FreezeOptions;
  readonly #signal: AbortSignal;
  #thawFailure: string | undefined;

  /** Errors: BAD_USAGE. */
  constructor(options: FreezeOptions, signal: AbortSignal) {
    const { freezeCmd, thawCmd, freezeTimeout } = options;
    if ((freezeCmd === undefined) !== (thawCmd === undefined)) {
      throw new OperationError('BAD_USAGE', '--freeze-cmd and --thaw-cmd belong together; give both');
    }
    if (freezeCmd === undefined && freezeTimeout !== undefined) {
      throw new OperationError('BAD_USAGE', '--freeze-timeout is of no use without --freeze-cmd and --thaw-cmd');
    }
    this.#options = options;
    this.#signal = signal;
  }

  /** Run `take` between the two commands; just run it if there are none. Errors: FREEZE_FAILED, FREEZE_TIMEOUT. */
  readonly during = async <T>(take: () => Promise<T>): Promise<T> => {
    const { freezeCmd, thawCmd, freezeTimeout = DEFAULT_TIMEOUT_S } = this.#options;
    if (freezeCmd === undefined || thawCmd === undefined) return take();
    this.#signal.throwIfAborted();
    const guard = new Guard(freezeTimeout * 1000, freezeCmd, thawCmd);
    let taken: T;
    try {
      const failure = await Promise.race([guard.frozen, aborted(this.#signal)]);
      if (failure !== null)
        throw new OperationError('FREEZE_FAILED', `no snapshot taken: the freeze command ${failure}`);
      taken = await take();
    } finally {
      const { failure } = await guard.thaw();
      if (failure !== null) {
        this.#thawFailure = `the thaw command ${failure}: thaw by hand what is frozen`;
        printNote(this.#thawFailure);
      }
    }
    const { isLate } = await guard.thaw();
    if (isLate) {
      throw new OperationError(
        'FREEZE_TIMEOUT',
        `the snapshot was not there ${freezeTimeout} s after freezing began, and the thaw command was run; ` +
          'give a longer --freeze-timeout if the guest can bear it',
      );
    }
    return taken;
  };

  /** At the end of the work, so that it is not in vain. Errors: THAW_FAILED. */
  throwIfFrozen(done: string): void {
    if (this.#thawFailure === undefined) return;
    throw new OperationError('THAW_FAILED', `${done}, but ${this.#thawFailure}`);
  }
}

/** Rejects when the work is interrupted. */
function aborted(signal: AbortSignal): Promise<never> {
  const rejected = new Promise<never>((_, reject) => {
    signal.addEventListener('abort', () => reject(signal.reason as Error), { once: true });
  });
  rejected.catch(() => undefined);
  return rejected;
}

interface Thawed {
  readonly isLate: boolean;
  readonly failure: string | null;
}

class Guard {
  /** What went wrong with freezing, or null. Errors: FREEZE_FAILED if there is nobody to do it. */
  readonly frozen: Promise<string | null>;
  readonly #child: ChildProcess;
  readonly #thawed: Promise<Thawed>;

  constructor(timeoutMs: number, freezeCmd: string, thawCmd: string) {
    const script = fileURLToPath(new URL('./thaw-guard.js', import.meta.url));
    const child = spawn(process.execPath, [script, String(timeoutMs), freezeCmd, thawCmd], {
      detached: true,
      stdio: ['pipe', 'pipe', 'inherit'],
      // It freezes and thaws as whoever gave the command, also where root works as the owner of a store.
      ...(process.getuid?.() === 0 && { uid: 0, gid: process.getgid?.() }),
    });
    this.#child = child;
    child.stdin.on('error', () => undefined);
    child.stdout.on('error', () => undefined);
    let answer: (failure: string | null) => void = () => undefined;
    let refuse: (error: Error) => void = () => undefined;
    this.frozen = new Promise((resolve, reject) => {
      answer = resolve;
      refuse = reject;
    });
    this.frozen.catch(() => undefined);
    this.#thawed = new Promise((resolve) => {
      createInterface(child.stdout).on('line', (text) => {
        const line = JSON.parse(text) as GuardLine;
        if (line.event === 'frozen') answer(line.failure);
        else resolve(line);
      });
      const gone = (why: string): void => {
        refuse(new OperationError('FREEZE_FAILED', `no snapshot taken: the process that freezes and thaws ${why}`));
        resolve({ isLate: true, failure: `may not have run: the process that would run it ${why}` });
      };
      child.on('error', (error) => gone(`could not be started: ${error.message}`));
      child.once('close', (code, signal) => gone(`ended with ${signal ?? code}`));
    });
  }

  /** Thaw now, if it has not happened yet; resolves when it has. */
  thaw(): Promise<Thawed> {
    this.#child.stdin?.end('now\n');
    return this.#thawed;
  }
}
