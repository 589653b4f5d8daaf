/**
 * A snapshot taken while the guest's filesystems are frozen. Owns the order freeze, snapshot, thaw, and the refusal of a
 * snapshot that was completed after the thaw. A process of its own runs the two commands (thaw-guard.ts), so that the guest is
 * thawed even if this process dies.
 */
import { spawn, type ChildProcess } from 'node:child_process';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { OperationError } from '../operations/operations.js';
import type { JobContext } from './reporting.js';
import type { GuardLine } from './thaw-guard.js';

/** The two commands, and how long the guest may stay frozen. */
export interface Freezing {
  readonly freezeCommand: string;
  readonly thawCommand: string;
  readonly timeoutMs: number;
}

export class FrozenMoment {
  readonly #freezing: Freezing | undefined;
  readonly #context: Pick<JobContext, 'log' | 'signal'>;
  #thawFailure: string | undefined;

  /** `freezing` undefined: nothing is frozen. */
  constructor(freezing: Freezing | undefined, context: Pick<JobContext, 'log' | 'signal'>) {
    this.#freezing = freezing;
    this.#context = context;
  }

  /** Run `take` between the two commands, or alone if there are none. Errors: FREEZE_FAILED, FREEZE_TIMEOUT, and those of `take`. */
  readonly during = async <T>(take: () => Promise<T>): Promise<T> => {
    if (this.#freezing === undefined) return take();
    const { freezeCommand, thawCommand, timeoutMs } = this.#freezing;
    const { log, signal } = this.#context;
    signal.throwIfAborted();
    const guard = new Guard(timeoutMs, freezeCommand, thawCommand);
    let taken: T;
    try {
      const failure = await Promise.race([guard.frozen, aborted(signal)]);
      if (failure !== null) {
        throw new OperationError('FREEZE_FAILED', `no snapshot taken: the freeze command ${failure}`);
      }
      taken = await take();
    } finally {
      const { failure } = await guard.thaw();
      if (failure !== null) {
        this.#thawFailure = `the thaw command ${failure}: thaw the guest by hand`;
        log(this.#thawFailure);
      }
    }
    const { isLate } = await guard.thaw();
    if (isLate) {
      throw new OperationError(
        'FREEZE_TIMEOUT',
        `the snapshot was not taken within ${timeoutMs / 1000} s of the freeze, and the thaw command was run; ` +
          'give a longer --freeze-timeout if the guest can stay frozen for longer',
      );
    }
    return taken;
  };

  /** To be called at the end of the job, so that its work is not lost. Errors: THAW_FAILED. */
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
  /** What failed in freezing, or null. Errors: FREEZE_FAILED (the guard process could not run). */
  readonly frozen: Promise<string | null>;
  readonly #child: ChildProcess;
  readonly #thawed: Promise<Thawed>;

  constructor(timeoutMs: number, freezeCmd: string, thawCmd: string) {
    const script = fileURLToPath(new URL('./thaw-guard.js', import.meta.url));
    const child = spawn(process.execPath, [script, String(timeoutMs), freezeCmd, thawCmd], {
      detached: true,
      stdio: ['pipe', 'pipe', 'inherit'],
      // As the user who gave the command, even while root works as the owner of a store.
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
