/** `sheepgate vdi delete`: a snapshot, or a VDI that nobody has open. */
import { Command } from 'commander';
import { withCommonOptions, withOperations, type CommonOptions } from './common-options.js';
import { printJson, printLine } from './output.js';

export function vdiDeleteCommand(): Command {
  const command = new Command('delete')
    .description('delete a snapshot, or a VDI (its snapshots stay); data that nobody else shares is gone')
    .argument('<vdi>', 'NAME, or NAME@TAG for a snapshot')
    .addHelpText('after', '\nExample:\n  sheepgate vdi delete vm1@monday');
  return withCommonOptions(command).action(async (spec: string, options: CommonOptions) => {
    await withOperations(options, (operations) => operations.remove(spec));
    if (options.json) printJson({ deleted: spec });
    else printLine(`deleted ${spec}`);
  });
}
