/** `sheepgate vdi snapshot`: keep a VDI's current content under a tag. The VDI may be in use. */
import { Command } from 'commander';
import { takeFrozenSnapshot } from '../jobs/frozen-snapshot.js';
import { specOf } from '../vdi/names.js';
import { forceOption, withCommonOptions, withOperations, type CommonOptions } from './common-options.js';
import { freezingOf, withFreezeOptions, type FreezeOptions } from './freeze-options.js';
import { interruptible } from './interrupt.js';
import { printJson, printLine, printNote, vdiJson } from './output.js';

interface SnapshotOptions extends CommonOptions, FreezeOptions {
  readonly force?: boolean;
}

export function vdiSnapshotCommand(): Command {
  const command = new Command('snapshot')
    .description('take a snapshot NAME@TAG; the VDI may be in use, its clients are not disturbed')
    .argument('<name>', 'name of the VDI')
    .argument('<tag>', 'tag of the snapshot')
    .addOption(forceOption())
    .addHelpText('after', '\nExample:\n  sheepgate vdi snapshot vm1 monday');
  return withFreezeOptions(withCommonOptions(command)).action(
    async (name: string, tag: string, options: SnapshotOptions) => {
      const { force } = options;
      const freezing = freezingOf(options);
      const vdi = await withOperations(options, (operations) => {
        if (freezing === undefined) return operations.snapshot(name, tag, { force });
        return interruptible((signal) =>
          takeFrozenSnapshot(operations, name, tag, { freezing, force, log: printNote, signal }),
        );
      });
      if (options.json) printJson(vdiJson(vdi));
      else printLine(`took ${specOf(vdi)}`);
    },
  );
}
