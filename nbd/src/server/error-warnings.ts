/**
 * Errors as process warnings, for programs that do not handle them: one readable line each. It owns the text and the rate: a
 * burst is summed up. It never throws.
 */

import type { ErrorContext } from './observer.js';

/** The type of the warnings, as `process.on('warning')` and `--disable-warning` know it. */
const WARNING_TYPE = 'NbdServerWarning';
/** Least time between two warnings of a server, milliseconds. */
const INTERVAL_MS = 1000;
/** Longest text of an error that is shown. */
const MAX_TEXT = 400;

export class ErrorWarnings {
  #lastAt = -Infinity;
  /** Errors since the last warning, and the last one of them. */
  #untold = 0;
  #lastUntold = '';
  #timer: NodeJS.Timeout | undefined;

  report(error: unknown, context: ErrorContext): void {
    // What the program wrote, an error with a getter for example, may throw; so may its own process.emitWarning.
    try {
      const now = performance.now();
      if (now - this.#lastAt >= INTERVAL_MS && this.#untold === 0) {
        this.#lastAt = now;
        process.emitWarning(describe(error, context), WARNING_TYPE);
        return;
      }
      // The text only of the first in each interval and of few others: a burst costs little.
      if (this.#untold++ === 0) this.#lastUntold = describe(error, context);
      this.#timer ??= setTimeout(this.#sumUp, INTERVAL_MS).unref();
    } catch {
      // There is nobody left to tell.
    }
  }

  readonly #sumUp = (): void => {
    this.#timer = undefined;
    const [count, example] = [this.#untold, this.#lastUntold];
    this.#untold = 0;
    this.#lastAt = performance.now();
    try {
      process.emitWarning(
        count === 1 ? example : `${count} errors within a second; the first: ${example}`,
        WARNING_TYPE,
      );
    } catch {
      // There is nobody left to tell.
    }
  };
}

const unobserved = new ErrorWarnings();

/** Warn of an error that nobody waits for, where there is no observer. */
export function warnOf(error: unknown, context: ErrorContext): void {
  unobserved.report(error, context);
}

function describe(error: unknown, context: ErrorContext): string {
  const { id, peer, exportName, command, offset, length, method, source } = context;
  const range = length === undefined || offset === undefined ? '' : ` of ${length} bytes at ${offset}`;
  const what = command === undefined ? `${method ?? 'a method'} of the ${source}` : `${command}${range}`;
  const ofExport = exportName === undefined ? '' : ` of export ${JSON.stringify(exportName)}`;
  const client = peer === undefined ? '' : `, client ${peer.address}`;
  const connection = id === undefined ? '' : ` (connection ${id}${client})`;
  return `nbd-server-ts: ${what}${ofExport}${connection} failed: ${textOf(error, context.expected)}`;
}

/** An error in one line: its name, message, and where it was made, if it is a bug. */
function textOf(error: unknown, isExpected: boolean): string {
  try {
    const place = error instanceof Error && !isExpected ? placeOf(error) : '';
    const text = error instanceof Error ? `${error.name}: ${error.message}${place}` : `threw ${String(error)}`;
    return text.replaceAll(/[\p{Cc}\u2028\u2029]+/gu, ' ').slice(0, MAX_TEXT);
  } catch {
    return 'threw a value that cannot be shown';
  }
}

function placeOf({ stack }: Error): string {
  const frame = typeof stack === 'string' ? /^\s+at (.+)$/m.exec(stack)?.[1] : undefined;
  return frame === undefined ? '' : ` (at ${frame})`;
}
