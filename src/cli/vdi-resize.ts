/** `sheepgate vdi resize`: grow a VDI, or shrink it with --force. */
import { Argument, Command } from 'commander';
import { sizeArgument, withCommonOptions, withOperations, type CommonOptions } from './common-options.js';
import { printJson, printLine, vdiJson } from './output.js';
import { formatSize } from '../text/size.js';

export function vdiResizeCommand(): Command {
  const command = new Command('resize')
    .description('grow a VDI, also while it is in use; only new connections see the new size')
    .argument('<name>', 'name of the VDI')
    .addArgument(new Argument('<size>', 'the new size, for example 40G').argParser(sizeArgument))
    .option('--force', 'allow shrinking, which destroys the data behind the new end')
    .option(
      '--force-in-use',
      'shrink even if a disconnected client may still come back and use it; make sure that it will not',
    )
    .addHelpText('after', '\nExample:\n  sheepgate vdi resize vm1 40G');
  return withCommonOptions(command).action(
    async (name: string, size: number, options: CommonOptions & { force?: boolean; forceInUse?: boolean }) => {
      const { force, forceInUse } = options;
      const vdi = await withOperations(options, (operations) => operations.resize(name, size, { force, forceInUse }));
      if (options.json) printJson(vdiJson(vdi));
      else printLine(`${vdi.name} now has ${formatSize(vdi.size)}`);
    },
  );
}
