/** `sheepgate vdi delete`: deletes a snapshot, or a VDI that is not open. */
import { Command } from 'commander';
import { forceOption, withCommonOptions, withOperations, type CommonOptions } from './common-options.js';
import { endedJson, endedLines, printJson, printLine } from './output.js';

export function vdiDeleteCommand(): Command {
  const command = new Command('delete')
    .description('delete a snapshot, or a VDI without its snapshots; data that no other VDI or snapshot shares is lost')
    .argument('<vdi>', 'NAME, or NAME@TAG for a snapshot')
    .addOption(forceOption())
    .addHelpText('after', '\nExample:\n  sheepgate vdi delete vm1@monday');
  return withCommonOptions(command).action(async (spec: string, options: CommonOptions & { force?: boolean }) => {
    const { force } = options;
    const result = await withOperations(options, (operations) => operations.remove(spec, { force }));
    if (options.json) return printJson({ deleted: spec, ...endedJson(result) });
    for (const line of endedLines(result)) printLine(line);
    printLine(`deleted ${spec}`);
  });
}
