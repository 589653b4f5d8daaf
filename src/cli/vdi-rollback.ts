/** `sheepgate vdi rollback`: replaces the content of a VDI by that of its snapshot. */
import { Command } from 'commander';
import { formatSpec } from '../vdi/names.js';
import { forceOption, withCommonOptions, withOperations, type CommonOptions } from './common-options.js';
import { endedJson, endedLines, printJson, printLine, vdiJson } from './output.js';
import { formatSizes } from '../text/size.js';

export function vdiRollbackCommand(): Command {
  const command = new Command('rollback')
    .description('reset a VDI to one of its snapshots; later writes are lost, all snapshots stay')
    .argument('<snapshot>', 'NAME@TAG')
    .addOption(forceOption())
    .addHelpText('after', '\nThe VDI must not be in use.\n\nExample:\n  sheepgate vdi rollback vm1@monday');
  return withCommonOptions(command).action(async (spec: string, options: CommonOptions & { force?: boolean }) => {
    const { force } = options;
    const { before, vdi } = await withOperations(options, async (operations) => {
      const records = await operations.list();
      const after = await operations.rollback(spec, { force });
      return { before: records.find(({ name, isSnapshot }) => name === after.name && !isSnapshot), vdi: after };
    });
    if (options.json) return printJson({ ...vdiJson(vdi), ...endedJson(vdi), sizeBefore: before?.size ?? vdi.size });
    for (const line of endedLines(vdi)) printLine(line);
    const [was, is] = formatSizes(before?.size ?? vdi.size, vdi.size);
    printLine(
      `${formatSpec({ name: vdi.name, tag: undefined })} is ${spec} again${was === is ? '' : `; its size was ${was} and is ${is} now`}`,
    );
  });
}
