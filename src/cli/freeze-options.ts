/** --freeze-cmd, --thaw-cmd and --freeze-timeout, for commands that take a snapshot. Freezing is src/jobs/freeze.ts's. */
import { InvalidArgumentError, Option, type Command } from 'commander';
import type { Freezing } from '../jobs/freeze.js';
import { OperationError } from '../operations/operations.js';

/** Far longer than any snapshot takes. A guest that is frozen for longer is an outage for its users. */
const DEFAULT_TIMEOUT_S = 30;
const MAX_TIMEOUT_S = 3600;

export interface FreezeOptions {
  readonly freezeCmd?: string;
  readonly thawCmd?: string;
  readonly freezeTimeout?: number;
}

export function withFreezeOptions(command: Command): Command {
  return command
    .option('--freeze-cmd <command>', 'shell command to run before the snapshot; if it fails, no snapshot is taken')
    .option('--thaw-cmd <command>', 'shell command to run after the snapshot, also if the snapshot failed')
    .addOption(
      new Option(
        '--freeze-timeout <seconds>',
        `thaw after this time in any case (default: ${DEFAULT_TIMEOUT_S}); the command fails if the snapshot is not taken by then`,
      ).argParser((text) => {
        const seconds = Number(text);
        if (!(seconds > 0 && seconds <= MAX_TIMEOUT_S)) {
          throw new InvalidArgumentError(`It must be above 0 and at most ${MAX_TIMEOUT_S} seconds.`);
        }
        return seconds;
      }),
    );
}

/** Undefined if nothing is to be frozen. Errors: BAD_USAGE. */
export function freezingOf({ freezeCmd, thawCmd, freezeTimeout }: FreezeOptions): Freezing | undefined {
  if ((freezeCmd === undefined) !== (thawCmd === undefined)) {
    throw new OperationError('BAD_USAGE', '--freeze-cmd and --thaw-cmd need each other; give both');
  }
  if (freezeCmd === undefined || thawCmd === undefined) {
    if (freezeTimeout === undefined) return undefined;
    throw new OperationError('BAD_USAGE', '--freeze-timeout needs --freeze-cmd and --thaw-cmd');
  }
  return { freezeCommand: freezeCmd, thawCommand: thawCmd, timeoutMs: (freezeTimeout ?? DEFAULT_TIMEOUT_S) * 1000 };
}
