/** `sheepgate check`: compares the maps of a store with its objects. */
import { Command, InvalidArgumentError, Option } from 'commander';
import { OperationError } from '../operations/operations.js';
import { io } from './command-io.js';
import { sizeArgument, withCommonOptions, withOperations, type CommonOptions } from './common-options.js';
import { endedJson, endedLines, printJson, printLine } from './output.js';
import { formatSize } from '../text/size.js';

/** At a lower rate a check would not come to an end. */
const MIN_RATE = 2 ** 20;
const MAX_SETTLE_SECONDS = 3600;

const HELP = `
--deep is for clusters. It needs no client to be disconnected and asks no daemon: it reads every copy of every object, and
every strip of erasure-coded ones, from the node that should have it, and lists what differs, is missing or is lost.

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
      'check the store; exits with 1 if there are problems left. All clients must be disconnected, except with --deep',
    )
    .option('--repair', 'remove what no VDI refers to; lost data stays lost')
    .addOption(new Option('--deep', 'clusters: compare all copies and strips, beside clients').conflicts('repair'))
    .addOption(
      new Option('--rate <size>', 'with --deep: bytes to read in a second, of all nodes (default: 64M)').argParser(
        rate,
      ),
    )
    .addOption(
      new Option(
        '--settle <seconds>',
        'with --deep: how long something must be wrong, since clients write meanwhile (default: 10)',
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
        `${report.orphans} objects (${formatSize(report.orphanBytes)}) belong to nobody; --repair removes them`,
      );
    }
  });
}

function rate(text: string): number {
  const bytes = sizeArgument(text);
  if (bytes < MIN_RATE) throw new InvalidArgumentError('at least 1M a second.');
  return bytes;
}

function seconds(text: string): number {
  const value = Number(text);
  if (!/^\d{1,4}(\.\d{1,3})?$/.test(text) || value > MAX_SETTLE_SECONDS) {
    throw new InvalidArgumentError(`a number of seconds, ${MAX_SETTLE_SECONDS} at most.`);
  }
  return value;
}
