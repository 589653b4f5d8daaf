/** `sheepgate reload`: a daemon reads its TLS keys and access rules again, and reports the result. */
import { Command } from 'commander';
import type { ReloadReport } from '../operations/control-protocol.js';
import { OperationError } from '../operations/operations.js';
import { chosenStore, withCommonOptions, type CommonOptions } from './common-options.js';
import { printJson, printLine, printNote } from './output.js';

/** Enough to read a few files; a network share that does not answer is not waited for. */
const RELOAD_TIMEOUT_MS = 30_000;

export function reloadCommand(): Command {
  const command = new Command('reload')
    .description("make the store's daemon read its TLS keys and access rules again, and report the result")
    .addHelpText(
      'after',
      '\nOpen connections are not affected. If a file is wrong, the old keys and rules stay in force and the exit code is 1.\n\n' +
        'Example:\n  sheepgate reload --store /var/lib/sheepgate',
    );
  return withCommonOptions(command).action(reload);
}

async function reload(options: CommonOptions): Promise<void> {
  const place = chosenStore(options);
  // Loaded late: it takes a while, and usage errors and --help do not need it.
  const { controlOfDaemon } = await import('../operations/open-operations.js');
  const control = await controlOfDaemon(place);
  const report = await control.call<ReloadReport>('POST', '/reload', { body: {}, timeoutMs: RELOAD_TIMEOUT_MS });
  for (const warning of report.warnings) printNote(warning);
  if (options.json) printJson(report);
  if (report.failures.length > 0) {
    const others = report.reloaded.length > 0 ? `; ${textOf(report)}` : '';
    const failures = report.failures.join('; ');
    throw new OperationError('NOT_RELOADED', `not reloaded, the old settings stay in force: ${failures}${others}`);
  }
  if (!options.json) printLine(textOf(report));
}

function textOf({ reloaded, rules }: ReloadReport): string {
  if (reloaded.length === 0) return 'nothing to reload: the daemon has neither TLS keys nor an access file';
  const counted = rules === 1 ? '1 access rule' : `${rules ?? 0} access rules`;
  return `reloaded: ${reloaded.map((what) => (what === 'access rules' ? counted : what)).join(', ')}`;
}
