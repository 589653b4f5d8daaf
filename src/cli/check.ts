/** `sheepgate check`: compares the maps of a store with its objects. */
import { Command, InvalidArgumentError, Option } from 'commander';
import { OperationError } from '../operations/operations.js';
import { io } from './command-io.js';
import { sizeArgument, withCommonOptions, withOperations, type CommonOptions } from './common-options.js';
import { endedJson, endedLines, printJson, printLine } from './output.js';
import { formatSize } from '../text/size.js';

/** At a lower rate, a check would take too long to be useful. */
const MIN_RATE = 2 ** 20;
const MAX_SETTLE_SECONDS = 3600;

const HELP = `
--deep is for clusters. It reads every copy of every object, and every strip of erasure-coded objects, from the node that
should have it, and lists objects that differ, are missing or are lost. Clients may stay connected, and no daemon is needed.

Examples:
  sheepgate check --repair
  sheepgate check --deep --cluster node1,node2,node3 --rate 200M`;

export interface CheckOptions extends CommonOptions {
  readonly repair?: boolean;
  readonly deep?: boolean;
  /** Bytes a second. */
  readonly rate?: number;
  readonly settle?: number;
}

export function checkCommand(): Command {
  const command = new Command('check')
    .description(
      'check the store; exits with 1 if problems remain. All clients must be disconnected, except with --deep',
    )
    .option('--repair', 'delete objects that no VDI refers to; does not bring lost data back')
    .addOption(new Option('--deep', 'clusters: compare all copies and strips, while clients work').conflicts('repair'))
    .addOption(
      new Option(
        '--rate <size>',
        'with --deep: bytes to read per second from all nodes together (default: 64M)',
      ).argParser(rate),
    )
    .addOption(
      new Option(
        '--settle <seconds>',
        'with --deep: report a difference only if it lasts this long, since clients may be writing (default: 10)',
      ).argParser(seconds),
    )
    .addHelpText('after', HELP);
  return withCommonOptions(command).action(async (options: CheckOptions) => {
    if (options.deep) {
      const { checkDeep } = await import('./check-deep.js');
      return checkDeep(options);
    }
    for (const name of ['rate', 'settle'] as const) {
      if (options[name] !== undefined) throw new OperationError('BAD_USAGE', `--${name} is an option of check --deep`);
    }
    const { report, left } = await withOperations(options, async (operations) => {
      const first = await operations.check({ repair: options.repair ?? false });
      const again = first.repaired > 0 ? await operations.check({ repair: false }) : first;
      return { report: first, left: again.problems.length };
    });
    if (left > 0) io().exitCode = 1;
    if (options.json) {
      const { ended, ...rest } = report;
      return printJson({ ...rest, ...endedJson({ ended }), problemsLeft: left });
    }
    for (const line of endedLines(report)) printLine(line);
    for (const problem of report.problems) printLine(problem);
    printLine(`${report.vdis} VDIs and snapshots, ${report.objects} objects, ${report.problems.length} problems`);
    if (report.repaired > 0) printLine(`repaired ${report.repaired}, freed ${formatSize(report.orphanBytes)}`);
    else if (report.orphans > 0) {
      printLine(
        `${report.orphans} objects (${formatSize(report.orphanBytes)}) are not referred to by any VDI; --repair deletes them`,
      );
    }
  });
}

function rate(text: string): number {
  const bytes = sizeArgument(text);
  if (bytes < MIN_RATE) throw new InvalidArgumentError('It must be at least 1M.');
  return bytes;
}

function seconds(text: string): number {
  const value = Number(text);
  if (!/^\d{1,4}(\.\d{1,3})?$/.test(text) || value > MAX_SETTLE_SECONDS) {
    throw new InvalidArgumentError(`It must be 0 to ${MAX_SETTLE_SECONDS}.`);
  }
  return value;
}
