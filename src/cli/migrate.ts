/** `sheepgate migrate`: a VDI with its snapshots, from one store or cluster to another. */
import { Command, Option } from 'commander';
import { migrateVdi, type Migrated, type MigrationResult, type Verify } from '../jobs/migration/migrate-vdi.js';
import { withTwoStores, type StorePlace } from '../jobs/migration/two-stores.js';
import { OperationError } from '../operations/operations.js';
import { io } from './command-io.js';
import { forceOption } from './common-options.js';
import { copiesOption, type CopiesOption } from './copies-option.js';
import { interruptible } from './interrupt.js';
import { printJson, printLine, printNote, table } from './output.js';
import { missingOption, storeOptions } from './missing-option.js';
import { onStderr } from './reporting.js';
import { storeArgument } from './store-argument.js';
import { LOCATION_SYNTAX } from '../store/locations.js';
import { formatSize } from '../text/size.js';
import { blockSizeShiftOption } from './vdi-create.js';

interface MigrateOptions extends CopiesOption {
  readonly from: string;
  readonly to: string;
  readonly fromControl?: string;
  readonly toControl?: string;
  readonly as?: string;
  readonly renameTags?: boolean;
  readonly sync?: boolean;
  readonly verify: Verify;
  readonly sha256?: boolean;
  readonly missing?: 'zero';
  readonly blockSizeShift?: number;
  readonly force?: boolean;
  readonly json?: boolean;
}

const NOTES = `
Copies the snapshots of NAME with their tags and times, the oldest first, and then its current content. Zeros, and data that
has not changed since the previous snapshot, are not copied. Each snapshot is compared by hash before it gets its tag in the
target. The source may be in use.

Until the migration is complete, the target is unfinished: 'vdi list' shows it as such, and it cannot be opened. After any
interruption, the same command continues where it stopped. An existing VDI in the target that this command did not create is
not touched.

A cluster may have names and tags that are not allowed here, and takes tags that are numbers for ids. A migration with such
tags is refused before it begins, with a list of the tags. With --rename-tags, the tag x/y of the snapshot @2d6333 becomes
x_y.id-2d6333; give the option in every run.

To move a disk that is in use: run the command with --sync, once or several times; then stop all writers, and run it without
--sync.

Examples:
  sheepgate migrate vm1 --from cluster:node1,node2 --to /var/lib/sheepgate
  sheepgate migrate vm1 --from /var/lib/sheepgate --to cluster:node1 --sync
  sheepgate migrate vm1 --from /var/lib/sheepgate --to cluster:node1 --verify changed`;

export function migrateCommand(): Command {
  return new Command('migrate')
    .description('copy a VDI with its snapshots between stores and clusters')
    .argument(
      '<name>',
      'name of the VDI, or @=NAME or @ID for VDIs of other tools with names that are not allowed here',
    )
    .addOption(new Option('--from <place>', LOCATION_SYNTAX).argParser(storeArgument).makeOptionMandatory())
    .addOption(new Option('--to <place>', LOCATION_SYNTAX).argParser(storeArgument).makeOptionMandatory())
    .option('--as <name>', 'name of the VDI in the target (default: the same name)')
    .option('--rename-tags', 'replace tags that the target does not allow by tags that contain the ID of the snapshot')
    .option(
      '--sync',
      'do not finish: a later run will copy what has changed since this one (keeps a snapshot of the source)',
    )
    .addOption(
      new Option(
        '--verify <what>',
        'all: compare everything, also what earlier runs copied; changed: only what this run copies; only: compare, copy nothing',
      )
        .choices(['all', 'changed', 'only'])
        .default('all'),
    )
    .option('--sha256', 'print the SHA-256 of each whole image, as sha256sum computes it (hashes zeros too)')
    .addOption(missingOption())
    .addOption(copiesOption())
    .addOption(blockSizeShiftOption('in a cluster, as it was formatted; in a local store, as in the source'))
    .addOption(forceOption())
    .option(
      '--from-control <path>',
      "control socket of the source's daemon, if it is not the default one of that place",
    )
    .option('--to-control <path>', "control socket of the target's daemon, if it is not the default one of that place")
    .option('--json', 'print JSON')
    .addHelpText('after', NOTES)
    .action(migrate);
}

async function migrate(name: string, options: MigrateOptions): Promise<void> {
  const startedAt = performance.now();
  if (options.sync && options.verify === 'only') {
    throw new OperationError('BAD_USAGE', '--sync copies, but --verify only copies nothing; leave out one of them');
  }
  const { from, to, verify } = options;
  const source: StorePlace = {
    location: from,
    control: options.fromControl,
    mayCreate: false,
    options: storeOptions(options),
  };
  const target: StorePlace = { location: to, control: options.toControl, mayCreate: verify !== 'only' };
  const { newName, ...result } = await withTwoStores(source, target, printNote, (fromStore, toStore) =>
    interruptible((signal) =>
      migrateVdi(fromStore, toStore, name, {
        ...onStderr,
        as: options.as,
        renamesTags: options.renameTags ?? false,
        sync: options.sync ?? false,
        verify,
        sha256: options.sha256 ?? false,
        isReadOnly: options.missing !== undefined,
        redundancy: options.copies,
        blockSizeShift: options.blockSizeShift,
        force: options.force,
        signal,
      }),
    ),
  );
  const seconds = (performance.now() - startedAt) / 1000;
  if (options.json) return void printJson({ name, newName, from, to, verify, ...result, seconds });
  printResult(name, newName, options, result, seconds);
}

function printResult(
  name: string,
  newName: string,
  { from, to, verify, sha256: hasSha256 }: MigrateOptions,
  { snapshots, working, isFinished }: MigrationResult,
  seconds: number,
): void {
  const all: readonly Migrated[] = working ? [...snapshots, working] : snapshots;
  const copied = all.reduce((sum, { copiedBytes }) => sum + copiedBytes, 0);
  const rows = all.map(({ tag, size, copiedBytes, comparedBytes, treeHash, sha256 }) => [
    tag === null ? newName : `${newName}@${tag}`,
    formatSize(size),
    formatSize(copiedBytes),
    formatSize(comparedBytes),
    treeHash ?? '-',
    ...(hasSha256 ? [sha256 ?? '-'] : []),
  ]);
  const header = ['NAME', 'SIZE', 'COPIED', 'COMPARED', 'TREEHASH', ...(hasSha256 ? ['SHA256'] : [])];
  io().stdout.write(table(header, rows, ['SIZE', 'COPIED', 'COMPARED']));
  for (const { tag, renamedFrom } of all) {
    if (renamedFrom !== undefined) printLine(`${renamedFrom} became ${newName}@${tag}`);
  }
  const what = `${name} from ${from} ${verify === 'only' ? 'and' : 'to'} ${newName} in ${to}`;
  if (verify === 'only') printLine(`compared ${what} in ${seconds.toFixed(1)} s: they are identical`);
  else printLine(`migrated ${what} in ${seconds.toFixed(1)} s: ${formatSize(copied)} copied, all of it compared`);
  if (!isFinished) printLine(`${newName} is not finished; run it again without --sync to finish it`);
}
