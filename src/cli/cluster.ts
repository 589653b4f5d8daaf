/** `sheepgate cluster info` and `sheepgate node list`: what a Sheepdog cluster says of itself. */
import { Command } from 'commander';
import { OperationError } from '../daemon/operations.js';
import { addressLabel } from '../store/sheep/cluster-address.js';
import type { ClusterView } from '../store/sheep/cluster-state.js';
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
    const { clusterState, clusterStateName } = await import('../store/sheep/cluster-state.js');
    const { info, nodes } = await withCluster(options, async (cluster) => ({
      info: await cluster.info(),
      nodes: await cluster.nodes(),
    }));
    const isFormatted = info.createdAt !== 0;
    const nodeCount = nodes.length;
    if (options.json) {
      const createdAt = isFormatted ? new Date(info.createdAt).toISOString() : null;
      return printJson({ ...info, nodeCount, createdAt, state: clusterStateName(info) });
    }
    const known: [string, string][] = [
      ['sheepdog', info.version],
      ['state', clusterState(info)],
      ['nodes', String(nodeCount)],
    ];
    const ofFormat: [string, string][] = [
      ['created', formatTime(info.createdAt)],
      ['epoch', String(info.epoch)],
      ['copies', info.copyPolicy === 0 ? String(info.copies) : `${info.copies} strips (erasure coded)`],
      ['object size', formatSize(2 ** info.blockSizeShift)],
      ['store', info.store],
    ];
    const lines = isFormatted ? [...known, ...ofFormat] : known;
    const width = Math.max(...lines.map(([title]) => title.length));
    for (const [title, value] of lines) printLine(`${title.padEnd(width)}  ${value}`);
  });
}

function listCommand(): Command {
  const command = new Command('list')
    .description('list the nodes of the cluster')
    .addHelpText('after', '\nExample:\n  sheepgate node list --cluster node1');
  return withCommonOptions(command).action(async (options: CommonOptions) => {
    const nodes = await withCluster(options, (cluster) => cluster.nodes());
    if (options.json) return printJson(nodes.map(({ address: _, disks: _disks, ...node }) => node));
    const rows = nodes.map(({ host, port, vnodes, zone, space }, id) => [
      String(id),
      addressLabel({ host, port }),
      String(vnodes),
      String(zone),
      formatSize(space),
    ]);
    process.stdout.write(table(['ID', 'NODE', 'VNODES', 'ZONE', 'SPACE'], rows, ['ID', 'VNODES', 'ZONE', 'SPACE']));
  });
}

/** Also one that does not serve: then most of all somebody wants to know why. */
async function withCluster<T>(options: CommonOptions, work: (cluster: ClusterView) => Promise<T>): Promise<T> {
  if (options.cluster === undefined) {
    throw new OperationError('NO_CLUSTER', 'which cluster? give --cluster HOST[:PORT]');
  }
  const { lookAtCluster } = await import('../store/sheep/cluster-state.js');
  return lookAtCluster(options.cluster, RETRY_MS, work);
}
