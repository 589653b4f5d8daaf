/**
 * A separate process that runs the freeze command, and the thaw command as soon as one of these happens: `sheepgate` says so,
 * `sheepgate` is gone, or the time limit is reached. It has its own session and ignores signals that ask it to end, so that
 * whatever kills its parent leaves no frozen guest behind. Before it thaws it kills a freeze command that still runs, so that
 * nothing is frozen afterwards.
 *
 *   node thaw-guard.js MILLISECONDS FREEZE THAW    stdin: any byte, or its end, means thaw; stdout: one JSON object per line
 */
import { runCommand } from './run-command.js';

const ATTEMPTS = 3;
const ATTEMPT_TIMEOUT_MS = 30_000;
const BETWEEN_MS = 1_000;
/** A killed freeze command may be stuck in the kernel: thawing waits no longer than this. */
const END_WAIT_MS = 5_000;

/** The lines on stdout, in this order. */
export type GuardLine =
  | { readonly event: 'frozen'; readonly failure: string | null }
  | { readonly event: 'thawed'; readonly isLate: boolean; readonly failure: string | null };

const [timeout = '0', freeze = '', thaw = ''] = process.argv.slice(2);

function say(line: GuardLine): void {
  process.stdout.write(`${JSON.stringify(line)}\n`);
}

for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP', 'SIGPIPE'] as const) process.on(signal, () => undefined);
// The parent may be gone; that is what this process is for.
process.stdout.on('error', () => undefined);
process.stderr.on('error', () => undefined);

async function guard(): Promise<void> {
  const stop = new AbortController();
  const freezing = runCommand(freeze, { timeoutMs: Number(timeout), signal: stop.signal });
  void freezing.then((failure) => say({ event: 'frozen', failure }));
  let isLate = false;
  const told = new Promise<void>((resolve) => {
    const timer = setTimeout(() => {
      isLate = true;
      resolve();
    }, Number(timeout));
    const now = (): void => {
      clearTimeout(timer);
      resolve();
    };
    process.stdin.once('data', now).once('end', now).once('error', now);
  });
  await told;
  stop.abort();
  await Promise.race([freezing, new Promise((resolve) => setTimeout(resolve, END_WAIT_MS).unref())]);
  let failure: string | null = null;
  for (let attempt = 1; attempt <= ATTEMPTS; attempt++) {
    failure = await runCommand(thaw, { timeoutMs: ATTEMPT_TIMEOUT_MS });
    if (failure === null) break;
    if (attempt < ATTEMPTS) await new Promise((resolve) => setTimeout(resolve, BETWEEN_MS));
  }
  say({ event: 'thawed', isLate, failure });
  process.stdin.destroy();
}

void guard();
