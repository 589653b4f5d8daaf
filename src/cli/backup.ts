/** `sheepgate backup`: backs up a VDI, in use or not, to a directory of backups or to an image that each run updates. */
import { Command, InvalidArgumentError, Option } from 'commander';
import { holdingOwner } from '../jobs/backup/hold-owner.js';
import { takeBackup, type Taken } from '../jobs/backup/take-backup.js';
import { FrozenMoment } from '../jobs/freeze.js';
import { asFileError } from '../jobs/file-errors.js';
import { asOperationError, OperationError } from '../operations/operations.js';
import { withCommonOptions, withOperations, type CommonOptions } from './common-options.js';
import { freezingOf, withFreezeOptions, type FreezeOptions } from './freeze-options.js';
import { interruptible } from './interrupt.js';
import { printJson, printLine, printNote } from './output.js';
import { onStderr } from './reporting.js';
import { formatSize } from '../text/size.js';

interface BackupOptions extends CommonOptions, FreezeOptions {
  readonly to: string;
  readonly keep?: number;
  readonly full?: boolean;
  readonly compare?: boolean;
  readonly base: boolean;
  readonly verify: boolean;
  readonly sha256?: boolean;
}

const HELP = `
--to names a directory for backups in qcow2 files, or a raw image (a name that ends in .img or .raw) that each run updates.
The first backup is full, later ones hold only changes. A snapshot of the VDI is kept, so that the next run finds the changes.

Examples:
  sheepgate backup vm1 --to /backup/vm1 --keep 7
  sheepgate backup vm1 --to /backup/vm1.img
  sheepgate restore /backup/vm1 --list`;

export function backupCommand(): Command {
  const command = new Command('backup')
    .description('back up a VDI, which may be in use: first all of it, then only what has changed')
    .argument('<name>', 'name of the VDI')
    .requiredOption('--to <target>', 'directory for the backups of this VDI, or a raw image')
    .addOption(
      new Option('--keep <count>', 'keep only this many backups in the directory, the newest (default: all)').argParser(
        (text) => {
          if (!/^[1-9]\d{0,5}$/.test(text)) throw new InvalidArgumentError('It must be a whole number, 1 or more.');
          return Number(text);
        },
      ),
    )
    .option('--full', 'start again with a full backup')
    .addOption(new Option('--compare', 'find the changes by reading all of the VDI').conflicts('full'))
    .option('--no-base', 'keep no snapshot of the VDI; the next backup must read all of it')
    .option('--no-verify', 'do not read back and verify what was written')
    .option('--sha256', 'store the SHA-256 of the whole image with the backup (hashes its zeros too)')
    .addHelpText('after', HELP);
  return withFreezeOptions(withCommonOptions(command)).action(async (name: string, options: BackupOptions) => {
    const startedAt = performance.now();
    const freezing = freezingOf(options);
    const notes: string[] = [];
    const log = (line: string): void => {
      notes.push(line);
      if (!options.json) printNote(line);
    };
    // The job opens the store several times, perhaps hours apart; another version may be installed meanwhile.
    const { loadEverything } = await import('../operations/open-operations.js');
    await loadEverything();
    const taken = await interruptible(async (signal) => {
      const moment = new FrozenMoment(freezing, { log: printNote, signal });
      const result = await holdingOwner(
        (work) => withOperations(options, work),
        (withStore) =>
          takeBackup(withStore, {
            vdi: name,
            to: options.to,
            keep: options.keep,
            isFull: options.full ?? false,
            compares: options.compare ?? false,
            keepsBase: options.base,
            verifies: options.verify,
            sha256: options.sha256 ?? false,
            moment: moment.during,
            progress: onStderr.progress,
            log,
            signal,
          }),
      ).catch((error: unknown) => {
        throw asFileError(withAdvice(error, options), options.to);
      });
      moment.throwIfFrozen(`${name} was backed up as ${result.point.id}`);
      return result;
    });
    print(name, taken, options, (performance.now() - startedAt) / 1000, notes);
  });
}

/** A store on a read-only filesystem can be backed up without a snapshot. */
function withAdvice(error: unknown, options: BackupOptions): unknown {
  const expected = asOperationError(error);
  if (expected?.code !== 'READ_ONLY' || !options.base) return error;
  return new OperationError('READ_ONLY', `${expected.message}; --no-base backs up without keeping a snapshot`);
}

function print(
  vdi: string,
  { point, file, kept, dropped }: Taken,
  options: BackupOptions,
  seconds: number,
  notes: readonly string[],
): void {
  const { id, time, isFull, size, changedBytes, storedBytes, treeHash, blockBytes, sha256, base } = point;
  if (options.json) {
    printJson({
      vdi,
      target: options.to,
      id,
      time,
      kind: isFull ? 'full' : 'incremental',
      size,
      changedBytes,
      storedBytes,
      file,
      treeHash,
      treeBlockBytes: blockBytes,
      sha256: sha256 ?? null,
      base: base?.tag ?? null,
      kept,
      dropped,
      notes,
      seconds,
    });
    return;
  }
  const what = isFull
    ? `full, ${formatSize(storedBytes)} of data of ${formatSize(size)}`
    : `${formatSize(changedBytes)} changed of ${formatSize(size)}, ${formatSize(storedBytes)} stored`;
  const gone = dropped.length === 0 ? '' : `; dropped backup ${dropped.join(', ')}`;
  const hash = sha256 === undefined ? '' : `; SHA-256 ${sha256}`;
  printLine(`backed up ${vdi}: ${what}, in ${seconds.toFixed(1)} s; backup ${id}, ${file}${gone}${hash}`);
}
