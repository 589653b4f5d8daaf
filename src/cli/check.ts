/** `sheepgate check`: compare what the maps of a store say with the objects that are there. */
import { Command } from 'commander';
import { withCommonOptions, withOperations, type CommonOptions } from './common-options.js';
import { endedJson, endedLines, printJson, printLine } from './output.js';
import { formatSize } from './size.js';

export function checkCommand(): Command {
  const command = new Command('check')
    .description('check the store; exits with 1 if there are problems left. All clients must be disconnected')
    .option('--repair', 'remove what no VDI refers to; lost data stays lost')
    .addHelpText('after', '\nExample:\n  sheepgate check --repair');
  return withCommonOptions(command).action(async (options: CommonOptions & { repair?: boolean }) => {
    const { report, left } = await withOperations(options, async (operations) => {
      const first = await operations.check({ repair: options.repair ?? false });
      const again = first.repaired > 0 ? await operations.check({ repair: false }) : first;
      return { report: first, left: again.problems.length };
    });
    if (left > 0) process.exitCode = 1;
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
