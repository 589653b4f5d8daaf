/**
 * `sheepgate client disconnect`: cuts connections off, and keeps their clients from writing for a while. Reports a connection as
 * cut off only when its last request has ended.
 */
import { Command, InvalidArgumentError, Option } from 'commander';
import { MAX_KEEP_OUT_MS } from '../operations/control-protocol.js';
import { OperationError, type Disconnected } from '../operations/operations.js';
import { clientJson } from './client-list.js';
import { withCommonOptions, withOperations, type CommonOptions } from './common-options.js';
import { printJson, printLine } from './output.js';

/** Clients reconnect at once or after some seconds: this gives another client time to come first. */
const DEFAULT_KEEP_OUT_S = 60;
/** Each uses a control connection, and their number is limited; a client may have hundreds of connections to cut off. */
const AT_A_TIME = 16;

interface DisconnectOptions extends CommonOptions {
  readonly keepOut?: number;
}

export function clientDisconnectCommand(): Command {
  const command = new Command('disconnect')
    .description('disconnect NBD clients, and keep them from writing for a while')
    .argument('<id...>', "IDs of connections, from 'sheepgate client list'", idArgument)
    .addOption(
      new Option(
        '--keep-out <seconds>',
        `how long the client may not open the disk for writing again, if it could write it; 0: it may at once (default: ${DEFAULT_KEEP_OUT_S})`,
      ).argParser(secondsArgument),
    )
    .addHelpText(
      'after',
      '\nThe daemon finishes the requests in flight and discards the rest; then the command ends. From then on, nothing that came\n' +
        'over the connection can have an effect, and another client may write. The client gets no message; most clients\n' +
        'reconnect by themselves.\n\nExample:\n  sheepgate client disconnect 12',
    );
  return withCommonOptions(command).action(async (ids: readonly number[], options: DisconnectOptions) => {
    const keepOutMs = (options.keepOut ?? DEFAULT_KEEP_OUT_S) * 1000;
    const results = await withOperations(options, async (operations) => {
      const settled: PromiseSettledResult<Disconnected>[] = [];
      for (let at = 0; at < ids.length; at += AT_A_TIME) {
        const asked = ids.slice(at, at + AT_A_TIME).map((id) => operations.disconnect(id, { keepOutMs }));
        // All of them, even if one fails.
        settled.push(...(await Promise.allSettled(asked)));
      }
      for (const result of settled) if (result.status === 'fulfilled' && !options.json) printLine(textOf(result.value));
      const results = settled.flatMap((result) => (result.status === 'fulfilled' ? [result.value] : []));
      if (options.json) {
        printJson(results.map(({ connection, ...rest }) => ({ ...rest, connection: clientJson(connection) })));
      }
      const failed = settled.find((result) => result.status === 'rejected');
      if (failed) throw failed.reason;
      return results;
    });
    const late = results.filter(({ isOver }) => !isOver);
    if (late.length === 0) return;
    const which = late.map(({ connection, inFlight }) => `${connection.id} (${inFlight})`).join(', ');
    throw new OperationError(
      'NOT_OVER',
      `requests of ${which} are still in flight, and may still have an effect; check whether the disk of the store is stuck`,
    );
  });
}

function textOf({ connection, isOver }: Disconnected): string {
  const { id, client, peer } = connection;
  const what = connection.export === null ? '' : ` from ${connection.export}`;
  const who = `connection ${id} of ${client ?? peer}${what}`;
  return isOver ? `cut off ${who}` : `${who} is cut off, but has requests in flight`;
}

function idArgument(text: string, before: readonly number[] = []): number[] {
  if (!/^\d{1,15}$/.test(text))
    throw new InvalidArgumentError(`"${text}" is not the ID of a connection; 'sheepgate client list' shows them.`);
  return [...before, Number(text)];
}

function secondsArgument(text: string): number {
  const most = MAX_KEEP_OUT_MS / 1000;
  const seconds = /^\d{1,10}$/.test(text) ? Number(text) : NaN;
  if (!(seconds <= most)) throw new InvalidArgumentError(`"${text}" is no whole number from 0 to ${most}.`);
  return seconds;
}
