/** `sheepgate client list`: the connections of a daemon's NBD clients. */
import { Command } from 'commander';
import type { ConnectionStatus } from '../operations/operations.js';
import { io } from './command-io.js';
import { withCommonOptions, withOperations, type CommonOptions } from './common-options.js';
import { formatTime, printJson, printNote, table } from './output.js';
import { formatSize } from '../text/size.js';

const HEADER = ['ID', 'EXPORT', 'ACCESS', 'CLIENT', 'SINCE', 'READ', 'WRITTEN'];

export function clientListCommand(): Command {
  const command = new Command('list')
    .description('list the connections of NBD clients')
    .addHelpText(
      'after',
      '\nACCESS is read-only, read-write, or exclusive (no other client may write the disk). A client with several connections has\n' +
        'several lines. Without a daemon there are no clients.\n\nExample:\n  sheepgate client list',
    );
  return withCommonOptions(command).action(async (options: CommonOptions) => {
    const { clients, isDaemon } = await withOperations(options, async (operations) => ({
      clients: await operations.clients(),
      isDaemon: operations.isDaemon,
    }));
    if (options.json) return printJson(clients.map(clientJson));
    if (!isDaemon) printNote('no daemon serves this store, so it has no clients');
    io().stdout.write(table(HEADER, clients.map(row), ['ID', 'READ', 'WRITTEN']));
  });
}

function row(status: ConnectionStatus): string[] {
  const { id, peer, client, access, openedAt, bytesRead, bytesWritten } = status;
  return [
    String(id),
    status.export ?? '-',
    access ?? '-',
    // The port distinguishes TCP clients of the same address.
    client === undefined || client === null ? peer : peer.startsWith('tcp ') ? `${client}, ${peer.slice(4)}` : client,
    formatTime(Date.parse(openedAt)),
    formatSize(bytesRead),
    formatSize(bytesWritten),
  ];
}

/** A connection in JSON, as the daemon reports it; null for fields that an earlier version does not have. */
export function clientJson({ client, access, ...status }: ConnectionStatus): object {
  return { ...status, client: client ?? null, access: access ?? null };
}
