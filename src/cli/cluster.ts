/** `sheepgate cluster info` and `sheepgate node list`: what a Sheepdog cluster says of itself. */
import { Command } from 'commander';
import { OperationError } from '../daemon/operations.js';
import type { SheepStore } from '../store/sheep/sheep-store.js';
import { withCommonOptions, type CommonOptions } from './common-options.js';
import { formatTime, printJson, printLine, table } from './output.js';
import { formatSize } from './size.js';

/** Asking is done at once or not at all. */
const RETRY_MS = 5_000;

export function clusterCommand(): Command {
  return new Command('cluster').description('look at a Sheepdog cluster').addCommand(infoCommand());
}

export function nodeCommand(): Command {
  return new Command('node').description("look at a Sheepdog cluster's nodes").addCommand(listCommand());
}

function infoCommand(): Command {
  const command = new Command('info')
    .description('show the state of the cluster')
    .addHelpText('after', '\nExample:\n  sheepgate cluster info --cluster node1');
  return withCommonOptions(command).action(async (options: CommonOptions) => {
    const info = await withCluster(options, (store) => store.info());
    if (options.json) {
      return printJson({ ...info, createdAt: new Date(info.createdAt).toISOString() });
    }
    const lines: [string, string][] = [
      ['created', formatTime(info.createdAt)],
      ['epoch', String(info.epoch)],
      ['nodes', String(info.nodeCount)],
      ['copies', info.copyPolicy === 0 ? String(info.copies) : `${info.copies} strips (erasure coded)`],
      ['object size', formatSize(2 ** info.blockSizeShift)],
      ['store', info.store],
    ];
    const width = Math.max(...lines.map(([title]) => title.length));
    for (const [title, value] of lines) printLine(`${title.padEnd(width)}  ${value}`);
  });
}

function listCommand(): Command {
  const command = new Command('list')
    .description('list the nodes of the cluster')
    .addHelpText('after', '\nExample:\n  sheepgate node list --cluster node1');
  return withCommonOptions(command).action(async (options: CommonOptions) => {
    const nodes = await withCluster(options, (store) => store.nodes());
    if (options.json) return printJson(nodes.map(({ address: _, ...node }) => node));
    const rows = nodes.map(({ host, port, vnodes, zone, space }, id) => [
      String(id),
      `${host}:${port}`,
      String(vnodes),
      String(zone),
      formatSize(space),
    ]);
    process.stdout.write(table(['ID', 'NODE', 'VNODES', 'ZONE', 'SPACE'], rows, ['ID', 'VNODES', 'ZONE', 'SPACE']));
  });
}

async function withCluster<T>(options: CommonOptions, work: (store: SheepStore) => Promise<T>): Promise<T> {
  if (options.cluster === undefined) {
    throw new OperationError('NO_CLUSTER', 'which cluster? give --cluster HOST[:PORT]');
  }
  const { SheepStore: store } = await import('../store/sheep/sheep-store.js');
  const opened = await store.open(options.cluster, { retryMs: RETRY_MS });
  try {
    return await work(opened);
  } finally {
    await opened.close();
  }
}
