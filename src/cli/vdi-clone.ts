/** `sheepgate vdi clone`: makes a VDI from a snapshot, whose data it shares. */
import { Command } from 'commander';
import { forceOption, withCommonOptions, withOperations, type CommonOptions } from './common-options.js';
import { printJson, printLine, vdiJson } from './output.js';

export function vdiCloneCommand(): Command {
  const command = new Command('clone')
    .description('create a VDI from a snapshot; they share data until the VDI is written')
    .argument('<snapshot>', 'NAME@TAG')
    .argument('<new-name>', 'name of the new VDI')
    .addOption(forceOption())
    .addHelpText('after', '\nExample:\n  sheepgate vdi clone debian@golden vm7');
  return withCommonOptions(command).action(
    async (spec: string, newName: string, options: CommonOptions & { force?: boolean }) => {
      const { force } = options;
      const vdi = await withOperations(options, (operations) => operations.clone(spec, newName, { force }));
      if (options.json) printJson(vdiJson(vdi));
      else printLine(`created ${vdi.name} from ${spec}`);
    },
  );
}
