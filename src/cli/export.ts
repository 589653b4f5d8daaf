/** `sheepgate export`: a VDI or snapshot becomes a raw, sparse disk image, in a file or on stdout. */
import { Command } from 'commander';
import { OperationError, type Operations } from '../operations/operations.js';
import { withCommonOptions, withOperations, type CommonOptions } from './common-options.js';
import type { Copied } from '../jobs/disk-copy.js';
import { isStdout, openTarget, type ImageTarget } from '../jobs/image-target.js';
import { interruptible } from './interrupt.js';
import { missingOption, storeOptions } from './missing-option.js';
import { printJson } from './output.js';
import { printable } from '../text/printable.js';
import { startProgress } from './progress.js';
import { formatSize } from '../text/size.js';

const HELP = `
A file that exists is replaced with --force, when the new one is whole; a symbolic link is followed to what it leads to.
Below /dev, /proc and /sys only devices, fifos and stdout are written to.

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
    .argument('<vdi>', 'NAME, NAME@TAG, @ID, or NAME@now for a snapshot that lasts as long as the copying')
    .argument('<file>', 'file, block device, or - for stdout')
    .option('--force', 'replace an existing file, overwrite a device that holds something')
    .addOption(missingOption())
    .addHelpText('after', HELP);
  return withCommonOptions(command).action(async (spec: string, file: string, options: ExportOptions) => {
    if (options.json && isStdout(file)) {
      throw new OperationError('BAD_USAGE', '--json and the image cannot both go to stdout; leave --json out');
    }
    const startedAt = performance.now();
    // From before the file is made to after it has its name: whatever interrupts this, no half of one is left.
    const { size, copied } = await interruptible(async (signal) => {
      const target = await openTarget(file, options.force ?? false, signal);
      try {
        const copying = (operations: Operations): Promise<Exported> => copyOut(operations, spec, target, signal);
        const done = await withOperations(options, copying, { store: storeOptions(options) });
        await target.finish();
        return done;
      } catch (error) {
        await target.abandon();
        throw error;
      }
    });
    const seconds = (performance.now() - startedAt) / 1000;
    if (options.json) return printJson({ vdi: spec, file, size, ...copied, seconds });
    const what = `exported ${formatSize(size)} of ${spec} in ${seconds.toFixed(1)} s`;
    process.stderr.write(`${printable(what)}: ${formatSize(copied.dataBytes)} of data\n`);
  });
}

interface Exported {
  readonly size: number;
  readonly copied: Copied;
}

async function copyOut(
  operations: Operations,
  spec: string,
  target: ImageTarget,
  signal: AbortSignal,
): Promise<Exported> {
  signal.throwIfAborted();
  const disk = await operations.openDisk(spec);
  const progress = startProgress(`exporting ${spec}`, disk.size);
  try {
    return { size: disk.size, copied: await target.copy(disk, progress, signal) };
  } finally {
    progress.end();
    await disk.close();
  }
}
