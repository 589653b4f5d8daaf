/** `sheepgate vdi rollback`: make a VDI what its snapshot is. */
import { Command } from 'commander';
import { forceOption, withCommonOptions, withOperations, type CommonOptions } from './common-options.js';
import { endedJson, endedLines, printJson, printLine, vdiJson } from './output.js';

export function vdiRollbackCommand(): Command {
  const command = new Command('rollback')
    .description('make a VDI what its snapshot is; what was written since is gone, snapshots stay')
    .argument('<snapshot>', 'NAME@TAG')
    .addOption(forceOption())
    .addHelpText('after', '\nNot while the VDI is in use.\n\nExample:\n  sheepgate vdi rollback vm1@monday');
  return withCommonOptions(command).action(async (spec: string, options: CommonOptions & { force?: boolean }) => {
    const { force } = options;
    const vdi = await withOperations(options, (operations) => operations.rollback(spec, { force }));
    if (options.json) return printJson({ ...vdiJson(vdi), ...endedJson(vdi) });
    for (const line of endedLines(vdi)) printLine(line);
    printLine(`${vdi.name} is ${spec} again`);
  });
}
