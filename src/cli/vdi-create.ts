/** `sheepgate vdi create`: an empty VDI. */
import { Argument, Command, InvalidArgumentError, Option } from 'commander';
import type { Operations, VdiRecord } from '../operations/operations.js';
import { MAX_BLOCK_SIZE_SHIFT, MIN_BLOCK_SIZE_SHIFT } from '../store/vdi-record.js';
import { forceOption, sizeArgument, withCommonOptions, withOperations, type CommonOptions } from './common-options.js';
import { copiesOption, type CopiesOption } from './copies-option.js';
import { printJson, printLine, vdiJson } from './output.js';
import { formatSize } from '../text/size.js';

/** --block-size-shift, for every command that creates a VDI. */
export function blockSizeShiftOption(
  otherwise = 'in a cluster, as it was formatted; in a local store 22 (4 MiB)',
): Option {
  return new Option(
    '--block-size-shift <shift>',
    `size of a data object is 2^shift bytes: ${MIN_BLOCK_SIZE_SHIFT} (1 MiB) to ${MAX_BLOCK_SIZE_SHIFT} (64 MiB); default: ${otherwise}`,
  ).argParser((text) => {
    const shift = Number(text);
    if (!/^\d+$/.test(text) || shift < MIN_BLOCK_SIZE_SHIFT || shift > MAX_BLOCK_SIZE_SHIFT) {
      throw new InvalidArgumentError(`It must be ${MIN_BLOCK_SIZE_SHIFT} to ${MAX_BLOCK_SIZE_SHIFT}.`);
    }
    return shift;
  });
}

interface CreateCommandOptions extends CommonOptions, CopiesOption {
  readonly blockSizeShift?: number;
  readonly force?: boolean;
}

export function vdiCreateCommand(): Command {
  const command = new Command('create')
    .description('create an empty VDI; it uses space only for data that is written')
    .argument('<name>', 'name of the VDI')
    .addArgument(new Argument('<size>', 'for example 10G, 512M, 1.5T').argParser(sizeArgument))
    .addOption(blockSizeShiftOption())
    .addOption(copiesOption())
    .addOption(forceOption())
    .addHelpText(
      'after',
      '\nExamples:\n  sheepgate vdi create vm1 20G\n  sheepgate vdi create vm1 20G --copies 4:2 --cluster node1',
    );
  return withCommonOptions(command).action(async (name: string, size: number, options: CreateCommandOptions) => {
    const { blockSizeShift, copies: redundancy, force } = options;
    const create = (operations: Operations): Promise<VdiRecord> =>
      operations.create(name, size, { blockSizeShift, redundancy, force });
    const vdi = await withOperations(options, create, { mayCreate: true });
    if (options.json) printJson(vdiJson(vdi));
    else printLine(`created ${vdi.name}, ${formatSize(vdi.size)}`);
  });
}
