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
Copies the snapshots of NAME, the oldest first, with their tags and times, and then its present content; what is zeros or
has not changed since the snapshot before is not copied. Every snapshot is compared by hash before it gets its tag in the
target. The source may be in use.

Until it is complete the target is unfinished: 'vdi list' says so, and nobody can open it. After an interruption, whatever it
was, the same command goes on where it stopped. A NAME in the target that this command did not make is left alone.

A cluster may have names and tags that are not allowed here, and takes tags that are numbers for ids. A migration with such
tags is refused with the list of them, before it begins; with --rename-tags the tag x/y of the snapshot @2d6333 becomes
x_y.id-2d6333. Give it in every run.

To move a disk that is in use: run it with --sync, as often as you like; then stop whoever writes, and run it without.

Examples:
  sheepgate migrate vm1 --from cluster:node1,node2 --to /var/lib/sheepgate
  sheepgate migrate vm1 --from /var/lib/sheepgate --to cluster:node1 --sync
  sheepgate migrate vm1 --from /var/lib/sheepgate --to cluster:node1 --verify changed`;

export function migrateCommand(): Command {
  return new Command('migrate')
    .description('copy a VDI with its snapshots between stores and clusters')
    .argument('<name>', 'name of the VDI, or @=NAME or @ID for what other tools have made')
    .addOption(new Option('--from <place>', LOCATION_SYNTAX).argParser(storeArgument).makeOptionMandatory())
    .addOption(new Option('--to <place>', 'the same').argParser(storeArgument).makeOptionMandatory())
    .option('--as <name>', 'its name in the target, if not the same')
    .option('--rename-tags', 'give snapshots whose tags the target cannot have others, with their IDs')
    .option('--sync', 'more runs will follow: leave a mark, so that the next one copies what has changed')
    .addOption(
      new Option(
        '--verify <what>',
        'all: also what earlier runs copied; changed: only what this one copies; only: compare, and copy nothing',
      )
        .choices(['all', 'changed', 'only'])
        .default('all'),
    )
    .option('--sha256', 'compute the SHA-256 of the whole images, their zeros too, as sha256sum says it')
    .addOption(missingOption())
    .addOption(copiesOption())
    .addOption(blockSizeShiftOption("a cluster's own; in a local store, that of the source"))
    .addOption(forceOption())
    .option('--from-control <path>', "control socket of the source's daemon, if it is not found by itself")
    .option('--to-control <path>', "control socket of the target's daemon")
    .option('--json', 'print JSON')
    .addHelpText('after', NOTES)
    .action(migrate);
}

async function migrate(name: string, options: MigrateOptions): Promise<void> {
  const startedAt = performance.now();
  if (options.sync && options.verify === 'only') {
    throw new OperationError('BAD_USAGE', '--sync copies, --verify only does not; leave out one of them');
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
    if (renamedFrom !== undefined) printLine(`${renamedFrom} is ${newName}@${tag} there`);
  }
  const what = `${name} from ${from} ${verify === 'only' ? 'and' : 'to'} ${newName} in ${to}`;
  if (verify === 'only') printLine(`compared ${what} in ${seconds.toFixed(1)} s: they are the same`);
  else printLine(`migrated ${what} in ${seconds.toFixed(1)} s: ${formatSize(copied)} copied, all of it compared`);
  if (!isFinished) printLine(`${newName} is not finished; run it again without --sync to finish it`);
}
