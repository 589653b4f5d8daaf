/**
 * A process of its own that freezes for `sheepgate` and thaws: when it is told to, when whoever started it is gone, and when
 * the time is over, whichever comes first. It is in no terminal's or shell's group and ignores requests to end, so that
 * nothing that ends its parent leaves a frozen machine behind; and it ends a freeze command that is still at work before it
 * thaws, so that nothing is frozen after that. It knows only two commands.
 *
 *   node thaw-guard.js MILLISECONDS FREEZE THAW    stdin: anything, or its end, means thaw; stdout: a JSON object a line
 */
import { runCommand } from './run-command.js';

const ATTEMPTS = 3;
const ATTEMPT_TIMEOUT_MS = 30_000;
const BETWEEN_MS = 1_000;
/** A killed freeze command may be stuck in the kernel: thawing does not wait for it for ever. */
const END_WAIT_MS = 5_000;

/** What it says, in this order. */
export type GuardLine =
  | { readonly event: 'frozen'; readonly failure: string | null }
  | { readonly event: 'thawed'; readonly isLate: boolean; readonly failure: string | null };

const [timeout = '0', freeze = '', thaw = ''] = process.argv.slice(2);

function say(line: GuardLine): void {
  process.stdout.write(`${JSON.stringify(line)}\n`);
}

for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP', 'SIGPIPE'] as const) process.on(signal, () => undefined);
// Whoever listened may be gone; that is what this is for.
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
