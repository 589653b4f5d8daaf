/** `sheepgate store merging`: says what a local store has to merge in the background, and pauses that or lets it go on. */
import { Argument, Command } from 'commander';
import { OperationError, type MergeState } from '../operations/operations.js';
import { withCommonOptions, withOperations, type CommonOptions } from './common-options.js';
import { printJson, printLine } from './output.js';
import { formatSize } from '../text/size.js';

export function storeMergingCommand(): Command {
  const command = new Command('merging')
    .description('what is left to merge after snapshots were deleted; pause it, or let it go on')
    .addArgument(new Argument('[what]', 'pause: until resumed, or until the daemon ends').choices(['pause', 'resume']))
    .addHelpText(
      'after',
      '\nAfter a snapshot, a disk gets new blocks beside its older ones. When the snapshot is deleted, the daemon puts them\n' +
        'together, slowly and while clients leave it time. Nothing waits for it, but the space is free only after that.\n\n' +
        'Example:\n  sheepgate store merging pause',
    );
  return withCommonOptions(command).action(async (what: 'pause' | 'resume' | undefined, options: CommonOptions) => {
    const state = await withOperations(options, async (operations) => {
      if (what === undefined) return operations.merging();
      if (!operations.isDaemon)
        throw new OperationError('UNSUPPORTED', `no daemon serves ${operations.store}, so nothing is being merged`);
      return operations.merging({ paused: what === 'pause' });
    });
    if (options.json) printJson(state);
    else printLine(textOf(state));
  });
}

function textOf({ overlays, bytes, isPaused }: MergeState): string {
  const paused = isPaused ? '; paused' : '';
  if (overlays === 0) return `nothing to merge${paused}`;
  return `to merge: ${overlays} object${overlays === 1 ? '' : 's'}, ${formatSize(bytes)} to move${paused}`;
}
