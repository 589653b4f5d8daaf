/** `sheepgate vdi snapshot`: freeze a VDI's present content under a tag, in use or not. */
import { Command } from 'commander';
import { withCommonOptions, withOperations, type CommonOptions } from './common-options.js';
import { labelOf, printJson, printLine, vdiJson } from './output.js';

export function vdiSnapshotCommand(): Command {
  const command = new Command('snapshot')
    .description('take a snapshot NAME@TAG; whoever writes to the VDI goes on without noticing')
    .argument('<name>', 'name of the VDI')
    .argument('<tag>', 'tag of the snapshot')
    .addHelpText('after', '\nExample:\n  sheepgate vdi snapshot vm1 monday');
  return withCommonOptions(command).action(async (name: string, tag: string, options: CommonOptions) => {
    const vdi = await withOperations(options, (operations) => operations.snapshot(name, tag));
    if (options.json) printJson(vdiJson(vdi));
    else printLine(`took ${labelOf(vdi)}`);
  });
}
