/** `sheepgate vdi rollback`: make a VDI what its snapshot is. */
import { Command } from 'commander';
import { withCommonOptions, withOperations, type CommonOptions } from './common-options.js';
import { printJson, printLine, vdiJson } from './output.js';

export function vdiRollbackCommand(): Command {
  const command = new Command('rollback')
    .description('make a VDI what its snapshot is; what was written since is gone, snapshots stay')
    .argument('<snapshot>', 'NAME@TAG')
    .addHelpText('after', '\nNot while the VDI is open.\n\nExample:\n  sheepgate vdi rollback vm1@monday');
  return withCommonOptions(command).action(async (spec: string, options: CommonOptions) => {
    const vdi = await withOperations(options, (operations) => operations.rollback(spec));
    if (options.json) printJson(vdiJson(vdi));
    else printLine(`${vdi.name} is ${spec} again`);
  });
}
