/** `sheepgate restore`: makes a VDI from a backup, lists backups, and verifies them. */
import { Command, Option } from 'commander';
import { restoreFrom } from '../jobs/backup/restore-backup.js';
import { BackupTarget } from '../jobs/backup/target.js';
import { verifyTarget } from '../jobs/backup/verify-target.js';
import type { WithStore } from '../jobs/with-store.js';
import { asFileError } from '../jobs/file-errors.js';
import { OperationError } from '../operations/operations.js';
import { io } from './command-io.js';
import { forceOption, withCommonOptions, withOperations, type CommonOptions } from './common-options.js';
import { copiesOption, type CopiesOption } from './copies-option.js';
import { interruptible } from './interrupt.js';
import { formatTime, printJson, printLine, table } from './output.js';
import { onStderr } from './reporting.js';
import { formatSize } from '../text/size.js';
import { blockSizeShiftOption } from './vdi-create.js';

interface RestoreOptions extends CommonOptions, CopiesOption {
  readonly at?: string;
  readonly list?: boolean;
  /** undefined unless --verify or --no-verify is given. */
  readonly verify?: boolean;
  readonly blockSizeShift?: number;
  readonly overwrite?: boolean;
  readonly force?: boolean;
}

const HELP = `
Examples:
  sheepgate restore /backup/vm1 --list
  sheepgate restore /backup/vm1 --verify
  sheepgate restore /backup/vm1 vm1-yesterday --at 2026-11-24`;

export function restoreCommand(): Command {
  const command = new Command('restore')
    .description('create a VDI from a backup; with --list or --verify, only list or verify the backups')
    .argument('<target>', 'the directory or image that was given to backup as --to')
    .argument('[name]', 'name of the VDI to create')
    .option(
      '--at <backup>',
      'number of a backup, or a day or time: the newest backup up to then (default: the newest of all)',
    )
    .option('--list', 'list the backups')
    .option('--verify', 'compare all backups with their hashes; exit code 1 if one is damaged')
    .addOption(new Option('--no-verify', 'do not read back and verify what was restored'))
    .addOption(blockSizeShiftOption('in a cluster, as it was formatted; in a local store, as in the backup'))
    .option('--overwrite', 'overwrite an existing VDI of that name; it must not be open')
    .addOption(copiesOption())
    .addOption(forceOption())
    .addHelpText('after', HELP);
  return withCommonOptions(command).action(async (given: string, name: string | undefined, options: RestoreOptions) => {
    const looks = options.list === true || (options.verify === true && name === undefined);
    if (looks && (name !== undefined || options.at !== undefined || options.overwrite || options.copies)) {
      throw new OperationError(
        'BAD_USAGE',
        '--list and --verify restore nothing; leave out NAME, --at, --overwrite and --copies',
      );
    }
    if (!looks && name === undefined) {
      throw new OperationError('BAD_USAGE', 'no VDI is named; give a name for it, or list the backups with --list');
    }
    await interruptible(async (signal) => {
      const target = await BackupTarget.openToRead(given);
      try {
        if (options.list) return void list(given, target, options);
        if (name === undefined) return void (await verify(given, target, options, signal));
        await restore(given, target, name, options, signal);
      } catch (error) {
        throw asFileError(withAdvice(error, given), given);
      } finally {
        await target.close();
      }
    });
  });
}

async function restore(
  given: string,
  target: BackupTarget,
  name: string,
  options: RestoreOptions,
  signal: AbortSignal,
): Promise<void> {
  const startedAt = performance.now();
  const withStore: WithStore = (work) => withOperations(options, work, { mayCreate: true });
  const { point, dataBytes } = await restoreFrom(target, options.at, withStore, {
    ...onStderr,
    name,
    blockSizeShift: options.blockSizeShift,
    overwrites: options.overwrite ?? false,
    redundancy: options.copies,
    force: options.force,
    verifies: options.verify ?? true,
    signal,
  });
  const seconds = (performance.now() - startedAt) / 1000;
  const { id, time, size, treeHash, blockBytes, sha256 = null } = point;
  if (options.json) {
    const hashes = { treeHash, treeBlockBytes: blockBytes, sha256 };
    return void printJson({ name, target: given, id, time, size, dataBytes, ...hashes, seconds });
  }
  printLine(
    `restored ${name} from backup ${id} of ${target.manifest.vdi}, ${formatTime(Date.parse(time))}: ` +
      `${formatSize(dataBytes)} of data of ${formatSize(size)}, in ${seconds.toFixed(1)} s`,
  );
}

function list(given: string, target: BackupTarget, options: RestoreOptions): void {
  const { manifest, points } = target;
  if (options.json) {
    const backups = points.map((point, index) => ({
      id: point.id,
      time: point.time,
      kind: point.isFull ? 'full' : 'incremental',
      size: point.size,
      changedBytes: point.changedBytes,
      storedBytes: point.storedBytes,
      file: fileOf(target, index),
      treeHash: point.treeHash,
      treeBlockBytes: point.blockBytes,
      sha256: point.sha256 ?? null,
      base: point.base?.tag ?? null,
    }));
    return printJson({ vdi: manifest.vdi, target: given, store: manifest.store, backups });
  }
  if (points.length === 0) return printLine(`${given} has no complete backup of ${manifest.vdi}`);
  printLine(`backups of ${manifest.vdi} (${manifest.store})`);
  const rows = points.map(({ id, time, isFull, size, changedBytes, storedBytes }, index) => [
    String(id),
    formatTime(Date.parse(time)),
    isFull ? 'full' : 'incremental',
    formatSize(size),
    formatSize(changedBytes),
    formatSize(storedBytes),
    fileOf(target, index),
  ]);
  const right = ['ID', 'SIZE', 'CHANGED', 'STORED'];
  io().stdout.write(table(['ID', 'TIME', 'KIND', 'SIZE', 'CHANGED', 'STORED', 'FILE'], rows, right));
}

/** The file to open. */
function fileOf(target: BackupTarget, index: number): string {
  const point = target.points[index];
  return target.image ?? (point ? target.fileOf(point) : '');
}

async function verify(
  given: string,
  target: BackupTarget,
  options: RestoreOptions,
  signal: AbortSignal,
): Promise<void> {
  const backups = await verifyTarget(target, given, { ...onStderr, signal });
  const whole = backups.filter(({ isWhole }) => isWhole).map(({ id }) => id);
  if (options.json) printJson({ vdi: target.manifest.vdi, target: given, backups });
  else if (whole.length === backups.length)
    printLine(
      `${backups.length} backup${backups.length === 1 ? '' : 's'} of ${target.manifest.vdi} in ${given}, all intact`,
    );
  const first = backups.find(({ isWhole }) => !isWhole);
  if (!first) return;
  throw new OperationError(
    'NOT_WHOLE',
    `${first.damage}; ${whole.length === 0 ? 'no backup is intact' : `intact backups: ${whole.join(', ')}`}; ` +
      "'sheepgate backup --full' starts again with a full backup",
  );
}

/** Adds to the error what to do about a damaged backup. */
function withAdvice(error: unknown, target: string): unknown {
  if (!(error instanceof OperationError) || error.code !== 'DAMAGED') return error;
  return new OperationError(
    'DAMAGED',
    `${error.message}; 'sheepgate restore ${target} --verify' shows which backups are intact, --at ID restores one of them`,
    { cause: error },
  );
}
