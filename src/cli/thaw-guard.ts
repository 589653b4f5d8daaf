/**
 * A process of its own that thaws what `sheepgate` had frozen: when it is told to, when whoever started it is gone, and
 * when the time is over, whichever comes first. It is there before anything is frozen, is in no terminal's or shell's group,
 * and ignores requests to end, so that nothing that ends its parent leaves a frozen machine behind. It knows only a command.
 *
 *   node thaw-guard.js MILLISECONDS COMMAND    stdin: anything, or its end, means now; stdout: one JSON object a line
 */
import { runCommand } from './run-command.js';

const ATTEMPTS = 3;
const ATTEMPT_TIMEOUT_MS = 30_000;
const BETWEEN_MS = 1_000;

/** What it says, in this order. */
export type GuardLine =
  { readonly event: 'armed' } | { readonly event: 'thawed'; readonly isLate: boolean; readonly failure: string | null };

const [timeout = '0', command = ''] = process.argv.slice(2);

function say(line: GuardLine): void {
  process.stdout.write(`${JSON.stringify(line)}\n`);
}

for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP', 'SIGPIPE'] as const) process.on(signal, () => undefined);
// Whoever listened may be gone; that is what this is for.
process.stdout.on('error', () => undefined);
process.stderr.on('error', () => undefined);

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
say({ event: 'armed' });
await told;
let failure: string | null = null;
for (let attempt = 1; attempt <= ATTEMPTS; attempt++) {
  failure = await runCommand(command, { timeoutMs: ATTEMPT_TIMEOUT_MS });
  if (failure === null) break;
  if (attempt < ATTEMPTS) await new Promise((resolve) => setTimeout(resolve, BETWEEN_MS));
}
say({ event: 'thawed', isLate, failure });
process.stdin.destroy();
