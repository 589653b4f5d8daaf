/** `sheepgate import`: a raw disk image, from a file or stdin, becomes a VDI. */
import { Command, Option } from 'commander';
import { openSource, type ImageSource } from '../jobs/image-source.js';
import { importImage, SIZE_UNIT } from '../jobs/import-image.js';
import { asFileError } from '../jobs/file-errors.js';
import { formatSize } from '../text/size.js';
import { checkName } from '../vdi/names.js';
import { io } from './command-io.js';
import { forceOption, sizeArgument, withCommonOptions, withOperations, type CommonOptions } from './common-options.js';
import { copiesOption, type CopiesOption } from './copies-option.js';
import { interruptible } from './interrupt.js';
import { printJson, printLine, printNote } from './output.js';
import { onStderr } from './reporting.js';
import { blockSizeShiftOption } from './vdi-create.js';

interface ImportOptions extends CommonOptions, CopiesOption {
  readonly overwrite?: boolean;
  readonly raw?: boolean;
  readonly force?: boolean;
  readonly size?: number;
  readonly blockSizeShift?: number;
}

const HELP = `
With a file, --size makes the VDI larger than the image. With stdin, --size is the number of bytes that must arrive. A pipe
ends in the same way whether its writer has finished or failed; with --size, fewer bytes are an error, and the VDI stays
unfinished. The store is opened when the first bytes have arrived.

Until the import is complete, the VDI is unfinished: 'vdi list' shows it as such, and it cannot be opened. The same command
starts the import again.

Examples:
  sheepgate import disk.img vm1
  zcat disk.img.gz | sheepgate import - vm1 --size 20G`;

export function importCommand(): Command {
  const command = new Command('import')
    .description('create a VDI from a raw disk image; zeros use no space')
    .argument('<file>', 'image file, block device, or - for stdin')
    .argument('<name>', 'name of the VDI')
    .option('--overwrite', 'overwrite an existing VDI, which must be large enough')
    .addOption(forceOption())
    .option('--raw', 'import the bytes as they are, even if they look like qcow2 or another format')
    .addOption(
      new Option(
        '--size <size>',
        'size of the new VDI, if larger than the file; with stdin: bytes that must arrive',
      ).argParser(sizeArgument),
    )
    .addOption(blockSizeShiftOption())
    .addOption(copiesOption())
    .addHelpText('after', HELP);
  return withCommonOptions(command).action(async (file: string, name: string, options: ImportOptions) => {
    const startedAt = performance.now();
    checkName(name);
    // Before signals are caught: opening a fifo waits for its writer, and only an uncaught signal ends that wait.
    const source = openSource(file, { isRaw: options.raw ?? false, vdi: name, stdin: io().stdin });
    try {
      const result = await interruptible((signal) =>
        importImage((work) => withOperations(options, work, { mayCreate: true }), source, name, {
          ...onStderr,
          overwrite: options.overwrite,
          force: options.force,
          size: options.size,
          blockSizeShift: options.blockSizeShift,
          redundancy: options.copies,
          signal,
        }),
      );
      const seconds = (performance.now() - startedAt) / 1000;
      if (options.json) printJson({ name, ...result, seconds });
      else {
        printLine(
          `imported ${formatSize(result.size)} into ${name} in ${seconds.toFixed(1)} s: ` +
            `${formatSize(result.dataBytes)} of data, the rest is zeros`,
        );
      }
      if (source.length === undefined && options.size === undefined) noteUnknownLength(source, result.size);
    } catch (error) {
      throw asFileError(error, source.name);
    } finally {
      source.close();
    }
  });
}

/** The end of a pipe does not show whether its writer has finished or failed. */
function noteUnknownLength({ name }: ImageSource, size: number): void {
  const odd =
    size % SIZE_UNIT === 0
      ? ''
      : `; ${size} bytes are not a whole number of sectors, so the image is probably incomplete`;
  printNote(
    `${name} ended after ${size} bytes, and it is not known whether that was all${odd}; with --size, too few bytes are an error`,
  );
}
