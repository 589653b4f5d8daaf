/** `sheepgate store rescue`: builds a new store from what is left of a damaged one. Prints what is certain and what is not. */
import fs from 'node:fs';
import { Command } from 'commander';
import { OperationError } from '../operations/operations.js';
import type { Rescued } from '../operations/rescue-store.js';
import { labelOfVdi } from '../store/vdi-record.js';
import { formatSize } from '../text/size.js';
import { io } from './command-io.js';
import { interruptible } from './interrupt.js';
import { formatTime, formatVid, printJson, printLine, printNote } from './output.js';
import { startProgress } from './progress.js';

const HELP = `
DIR is only read, and may be on a read-only filesystem; no daemon may have it open. NEW must be missing or empty; the objects are
copied into it. Exits with 0 only if everything in NEW is certain: every disk and snapshot is as it was flushed last. What is not
certain is listed with its ranges.

Examples:
  sheepgate store rescue /var/lib/sheepgate --dry-run
  sheepgate store rescue /var/lib/sheepgate /mnt/big/sheepgate`;

/** Ranges that are printed of one disk; --json has all. */
const SHOWN_RANGES = 10;

interface RescueCommandOptions {
  readonly dryRun?: boolean;
  readonly force?: boolean;
  readonly json?: boolean;
}

type Plan = Rescued['plan'];
type Vdi = Plan['vdis'][number];
type Ranges = Vdi['newer'];

const BASES: Readonly<Record<Plan['base'], string>> = {
  metadata: 'maps from',
  copy: 'maps from a copy,',
  changes: 'no whole copy: maps from the record of changes and the names of objects',
  'damaged metadata': 'no whole copy: maps from the readable part of',
  nothing: 'no metadata at all: every object is of an unknown disk',
};

export function storeRescueCommand(): Command {
  return new Command('rescue')
    .description('build a store in NEW from what is left of the damaged one in DIR')
    .argument('<dir>', 'directory of the damaged store')
    .argument('[new]', 'directory of the new store; may be left out with --dry-run')
    .option('--dry-run', 'only tell what can be rescued')
    .option('--force', 'build a new store although the metadata is good')
    .option('--json', 'print JSON')
    .addHelpText('after', HELP)
    .action(rescueAction);
}

async function rescueAction(dir: string, to: string | undefined, options: RescueCommandOptions): Promise<void> {
  const isDry = options.dryRun ?? false;
  if (to === undefined && !isDry)
    throw new OperationError('BAD_USAGE', 'give the directory of the new store as well, or --dry-run');
  if (dir === '' || to === '') throw new OperationError('BAD_USAGE', 'a directory needs a name');
  const { rescue } = await import('../operations/rescue-store.js');
  let progress: ReturnType<typeof startProgress> | undefined;
  const { plan, built } = await interruptible(async (signal) => {
    try {
      return await rescue(dir, to, {
        isDry,
        force: options.force ?? false,
        signal,
        planned: (found) => {
          if (!options.json) for (const line of linesOf(found, dir)) printLine(line);
          if (!isDry) progress = startProgress('copying objects', found.bytes);
        },
        advance: (bytes) => void progress?.advance(bytes),
      });
    } finally {
      progress?.end();
    }
  });
  const unreadable = built?.unreadable ?? [];
  if (!plan.isCertain || unreadable.length > 0) io().exitCode = 1;
  if (options.json) return void printJson(planJson(plan, to, built));
  for (const file of unreadable)
    printLine(`unreadable: ${file}: left out; 'sheepgate check' lists where it is missing`);
  if (built)
    printLine(
      `built ${to ?? ''}: ${plan.vdis.length + plan.lost.length} disks and snapshots, ${built.objects} objects`,
    );
  if (built) noteOwner(dir, to ?? '');
}

/** The new store belongs to who runs the command, often root. Its daemon may be another user. */
function noteOwner(dir: string, to: string): void {
  const { uid } = fs.statSync(dir);
  if (uid === process.geteuid?.()) return;
  printNote(`${to} belongs to you, and ${dir} to uid ${uid}: give the new store to the user of its daemon (chown -R)`);
}

function linesOf(plan: Plan, dir: string): string[] {
  const { problem, base, basedOn, asOf, changes } = plan;
  const lines = [`metadata: ${problem ?? `${dir} is good, and needs no rescue`}`];
  const time = asOf === undefined ? '' : ` of ${formatTime(asOf)}`;
  const since = changes === 0 ? '' : `, with ${changes} changes recorded since`;
  lines.push(`${BASES[base]}${basedOn === undefined ? '' : ` ${basedOn}`}${time}${since}`);
  for (const vdi of [...plan.vdis, ...plan.lost]) lines.push(...linesOfVdi(vdi));
  if (plan.leftOut.objects > 0)
    lines.push(
      `left out: ${plan.leftOut.objects} objects (${formatSize(plan.leftOut.bytes)}) that no disk has: deleted or trimmed, ` +
        'or written and not flushed',
    );
  for (const note of plan.notes) lines.push(`note: ${note}`);
  lines.push(
    `needs ${formatSize(plan.bytes)} in the new place, for ${plan.objects.size + plan.overlays.length} objects`,
  );
  lines.push(plan.isCertain ? 'everything is certain' : 'not everything is certain');
  return lines;
}

function linesOfVdi(vdi: Vdi): string[] {
  const { record, isCertain, reasons } = vdi;
  const why = isCertain ? '' : `: ${reasons.join('; ')}`;
  const lines = [`${isCertain ? 'certain' : 'likely'}  ${labelOfVdi(record)} (${formatSize(record.size)})${why}`];
  const kinds: readonly [string, Ranges][] = [
    ['by their names', vdi.newer],
    ['being merged: may be older', vdi.merged],
    ['zeros: trimmed or lost', vdi.gone],
    ['lost: reads fail', vdi.lost],
  ];
  for (const [what, ranges] of kinds) {
    for (const { from, to } of ranges.slice(0, SHOWN_RANGES)) lines.push(`    bytes ${from} to ${to - 1}: ${what}`);
    if (ranges.length > SHOWN_RANGES) lines.push(`    and ${ranges.length - SHOWN_RANGES} more ranges: ${what}`);
  }
  return lines;
}

function planJson(plan: Plan, to: string | undefined, built: Rescued['built']): object {
  const vdiJson = ({ record, isCertain, reasons, newer, merged, gone, lost }: Vdi): object => ({
    name: record.name,
    tag: record.isSnapshot ? record.tag : null,
    vid: record.vid,
    id: formatVid(record.vid),
    size: record.size,
    isCertain,
    reasons,
    newer,
    merged,
    gone,
    lost,
  });
  return {
    store: plan.directory,
    new: built ? (to ?? null) : null,
    problem: plan.problem ?? null,
    base: plan.base,
    basedOn: plan.basedOn ?? null,
    asOf: plan.asOf === undefined ? null : new Date(plan.asOf).toISOString(),
    changes: plan.changes,
    vdis: plan.vdis.map(vdiJson),
    lost: plan.lost.map(vdiJson),
    leftOut: plan.leftOut,
    notes: plan.notes,
    objects: plan.objects.size + plan.overlays.length,
    bytes: plan.bytes,
    unreadable: built?.unreadable ?? [],
    isCertain: plan.isCertain && (built?.unreadable ?? []).length === 0,
  };
}
