/** `sheepgate export`: a VDI or snapshot becomes a raw, sparse disk image, in a file or on stdout. */
import { Command } from 'commander';
import { OperationError } from '../operations/operations.js';
import { io } from './command-io.js';
import { withCommonOptions, withOperations, type CommonOptions } from './common-options.js';
import { exportImage } from '../jobs/export-image.js';
import { isStdout } from '../jobs/image-target.js';
import { interruptible } from './interrupt.js';
import { missingOption, storeOptions } from './missing-option.js';
import { printJson } from './output.js';
import { printable } from '../text/printable.js';
import { onStderr } from './reporting.js';
import { formatSize } from '../text/size.js';

const HELP = `
--force replaces an existing file when the new image is complete; the old one stays until then. Symbolic links are followed.
Below /dev, /proc and /sys, only devices, fifos and stdout are accepted.

Examples:
  sheepgate export vm1@now vm1.img
  sheepgate export vm1@monday - | zstd > vm1.zst
  sheepgate export vm1@now /dev/vg0/vm1`;

interface ExportOptions extends CommonOptions {
  readonly force?: boolean;
  readonly missing?: 'zero';
}

export function exportCommand(): Command {
  const command = new Command('export')
    .description('copy a VDI or snapshot into a raw image; zeros become holes')
    .argument('<vdi>', 'NAME, NAME@TAG, @ID, or NAME@now for a temporary snapshot during the export')
    .argument('<file>', 'file, block device, or - for stdout')
    .option('--force', 'replace an existing file, or overwrite a device that holds data')
    .addOption(missingOption())
    .addHelpText('after', HELP);
  return withCommonOptions(command).action(async (spec: string, file: string, options: ExportOptions) => {
    if (options.json && isStdout(file)) {
      throw new OperationError('BAD_USAGE', '--json and the image cannot both go to stdout; leave out --json');
    }
    const startedAt = performance.now();
    const { size, copied } = await interruptible((signal) =>
      exportImage((work) => withOperations(options, work, { store: storeOptions(options) }), spec, file, {
        ...onStderr,
        stdout: () => io().stdout,
        mayReplace: options.force ?? false,
        signal,
      }),
    );
    const seconds = (performance.now() - startedAt) / 1000;
    if (options.json) return printJson({ vdi: spec, file, size, ...copied, seconds });
    const what = `exported ${formatSize(size)} of ${spec} in ${seconds.toFixed(1)} s`;
    io().stderr.write(`${printable(what)}: ${formatSize(copied.dataBytes)} of data\n`);
  });
}
