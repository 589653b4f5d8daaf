/**
 * `sheepgate cluster info` and `sheepgate node list`: the state of a Sheepdog cluster and of each of its nodes, as they report
 * it. Works without a daemon, because it is for when something is wrong.
 */
import { Command, InvalidArgumentError, Option } from 'commander';
import { OperationError } from '../operations/operations.js';
import {
  addressLabel,
  clusterState,
  readClusterReport,
  type ClusterReport,
  type NodeState,
} from '../operations/inspect-cluster.js';
import { io } from './command-io.js';
import { withCommonOptions, type CommonOptions } from './common-options.js';
import { formatTime, printJson, printLine, table } from './output.js';
import { redundancyJson, redundancyText } from './redundancy-output.js';
import { formatSize } from '../text/size.js';

/** Epochs that are shown, and the maximum: nodes read a file for each. */
const DEFAULT_EPOCHS = 10;
const MAX_EPOCHS = 1000;

export function clusterCommand(): Command {
  return new Command('cluster').description('show the state of a Sheepdog cluster').addCommand(infoCommand());
}

export function nodeCommand(): Command {
  return new Command('node').description("list a Sheepdog cluster's nodes").addCommand(listCommand());
}

const INFO_HELP = `
An epoch lasts from one change of the members to the next. "left" lists nodes that were members in one of the epochs shown,
and no longer are. "recovery" counts the objects that the nodes have restored since the members changed; while it runs, some
objects have fewer copies than they should.

Example:
  sheepgate cluster info --cluster node1`;

function infoCommand(): Command {
  const command = new Command('info')
    .description('show the state of the cluster: members and their changes, space, recovery')
    .addOption(
      new Option('--epochs <count>', `number of epochs to show, up to ${MAX_EPOCHS}`)
        .argParser(epochCount)
        .default(DEFAULT_EPOCHS),
    )
    .addHelpText('after', INFO_HELP);
  return withCommonOptions(command).action(async (options: CommonOptions & { epochs: number }) => {
    const state = await stateOf(options, options.epochs);
    if (options.json) return printJson(infoJson(state));
    const lines = infoLines(state);
    const width = Math.max(...lines.map(([title]) => title.length));
    for (const [title, value] of lines) printLine(`${title.padEnd(width)}  ${value}`);
    if (state.epochs.length === 0) return;
    printLine('');
    io().stdout.write(table(['EPOCH', 'SINCE', 'NODES', 'CHANGE'], epochRows(state), ['EPOCH', 'NODES']));
  });
}

const LIST_HELP = `
STATE is one of
  ok
  recovering   with the number of objects that are done, of all that the node should have
  waiting      the cluster does not serve
  silent       the node accepts connections but does not answer
  unreachable  from this machine; other nodes may still reach it

Example:
  sheepgate node list --cluster node1`;

function listCommand(): Command {
  const command = new Command('list')
    .description('list the nodes of the cluster, with their space, state and recovery')
    .addHelpText('after', LIST_HELP);
  return withCommonOptions(command).action(async (options: CommonOptions) => {
    const { nodes } = await stateOf(options, 1);
    if (options.json) return printJson(nodes.map(nodeJson));
    const rows = nodes.map((node, id) => [
      String(id),
      node.node,
      String(node.zone),
      String(node.vnodes),
      ...spaceCells(node),
      stateText(node),
    ]);
    const right = ['ID', 'ZONE', 'VNODES', 'SIZE', 'USED', 'FREE'];
    io().stdout.write(table(['ID', 'NODE', 'ZONE', 'VNODES', 'SIZE', 'USED', 'FREE', 'STATE'], rows, right));
  });
}

function stateOf(options: CommonOptions, epochs: number): Promise<ClusterReport> {
  if (options.cluster === undefined) {
    throw new OperationError('NO_CLUSTER', 'no cluster is named; give --cluster HOST[:PORT]');
  }
  return readClusterReport(options.cluster, { epochs });
}

function epochCount(text: string): number {
  const count = Number(text);
  if (/^\d{1,4}$/.test(text) && count >= 1 && count <= MAX_EPOCHS) return count;
  throw new InvalidArgumentError(`It must be 1 to ${MAX_EPOCHS}.`);
}

function infoLines(state: ClusterReport): [string, string][] {
  const { stateName, nodes, zones, redundancy, left } = state;
  const isFormatted = stateName !== 'not-formatted';
  const isWaiting = stateName === 'waiting';
  const yesNo = (is: boolean): string => (is ? 'yes' : 'no');
  return [
    ['sheepdog', state.version],
    ['state', clusterState(state)],
    ...(state.createdAt > 0 ? [['created', formatTime(state.createdAt)] as [string, string]] : []),
    ['epoch', String(state.epoch)],
    ['nodes', `${nodes.length}, in ${zones} zone${zones === 1 ? '' : 's'}`],
    ...(redundancy ? [['copies', redundancyText(redundancy)] as [string, string]] : []),
    ...(isFormatted
      ? ([
          ['object size', formatSize(2 ** state.blockSizeShift)],
          ['store', state.store],
          ['locks VDIs', yesNo(state.enforcesLocks)],
          ['uses ids again', yesNo(state.recyclesVids)],
          ['strict', yesNo(state.isStrict)],
        ] as [string, string][])
      : []),
    ['space', spaceText(nodes)],
    ['recovery', recoveryText(state)],
    ...left.map(({ node, epoch, since }): [string, string] => [
      'left',
      epoch === 0
        ? `${node}, ${isWaiting ? 'the cluster waits for it' : 'just now'}`
        : `${node}, with epoch ${epoch}, ${formatTime(since)}`,
    ]),
    ...nodes
      .filter(({ reason }) => reason !== null)
      .map(({ node, state, reason }): [string, string] => [state, `${node}, ${reason}`]),
  ];
}

function spaceText(nodes: readonly NodeState[]): string {
  const { size, free, unknown } = spaceOf(nodes);
  if (size === null || free === null) return 'unknown, no node reports it';
  const besides =
    unknown === 0 ? '' : `, without ${unknown} node${unknown === 1 ? ' that does' : 's that do'} not report it`;
  return `${formatSize(size - free)} used of ${formatSize(size)}, ${formatSize(free)} free${besides}`;
}

/** Null if no node reports its space, as in a cluster that does not serve. */
function spaceOf(nodes: readonly NodeState[]): {
  readonly size: number | null;
  readonly free: number | null;
  readonly unknown: number;
} {
  let [size, free, unknown] = [0, 0, 0];
  for (const node of nodes) {
    size += node.size ?? 0;
    free += node.free ?? 0;
    if (node.size === null) unknown++;
  }
  if (unknown === nodes.length) return { size: null, free: null, unknown };
  return { size, free, unknown };
}

function recoveryText({ nodes, isRecoveryDisabled }: ClusterReport): string {
  const recovering = nodes.filter(({ recovery }) => recovery !== null);
  const unknown = nodes.filter(({ state }) => state !== 'ok' && state !== 'recovering').length;
  const disabled = isRecoveryDisabled
    ? "; disabled for later changes of the members ('dog cluster recover disable')"
    : '';
  const besides = unknown === 0 ? '' : `; ${unknown} node${unknown === 1 ? ' does' : 's do'} not report it`;
  if (recovering.length === 0) return `none is running${besides}${disabled}`;
  return `running on ${recovering.length} of ${nodes.length} nodes: ${progressText(totalOf(recovering))}${besides}${disabled}`;
}

function totalOf(nodes: readonly NodeState[]): { readonly done: number; readonly total: number } {
  let [done, total] = [0, 0];
  for (const { recovery } of nodes) {
    done += recovery?.done ?? 0;
    total += recovery?.total ?? 0;
  }
  return { done, total };
}

function progressText({ done, total }: { readonly done: number; readonly total: number }): string {
  if (total === 0) return 'being prepared';
  // 100 % only at the end.
  return `${done} of ${total} objects (${Math.min(99, Math.floor((100 * done) / total))} %)`;
}

function stateText({ state, reason, recovery }: NodeState): string {
  if (recovery === null) return reason === null ? state : `${state}: ${reason}`;
  return recovery.phase === 'finishing' ? `${state}, about to end` : `${state}, ${progressText(recovery)}`;
}

function spaceCells({ size, free }: NodeState): string[] {
  if (size === null || free === null) return ['?', '?', '?'];
  return [formatSize(size), formatSize(size - free), formatSize(free)];
}

function epochRows({ epochs }: ClusterReport): string[][] {
  return epochs.map(({ epoch, since, nodes }, n) => {
    const before = epochs[n + 1];
    const labels = nodes.map(addressLabel);
    const earlier = before?.nodes.map(addressLabel);
    const change =
      earlier === undefined
        ? labels.join(' ')
        : [
            ...labels.filter((label) => !earlier.includes(label)).map((label) => `+ ${label}`),
            ...earlier.filter((label) => !labels.includes(label)).map((label) => `- ${label}`),
          ].join('  ');
    return [String(epoch), since === 0 ? '?' : formatTime(since), String(nodes.length), change];
  });
}

function infoJson(state: ClusterReport): object {
  const { epoch, createdAt, flags, copies, copyPolicy, status, blockSizeShift, store, version, nodes } = state;
  const { size, free, unknown } = spaceOf(nodes);
  const recovering = nodes.filter(({ recovery }) => recovery !== null);
  return {
    ...{ epoch, createdAt: createdAt > 0 ? isoTime(createdAt) : null, flags, copies, copyPolicy, status },
    ...{ blockSizeShift, store, version, nodeCount: nodes.length },
    state: state.stateName,
    redundancy: redundancyJson(state.redundancy),
    enforcesLocks: state.enforcesLocks,
    recyclesVids: state.recyclesVids,
    isStrict: state.isStrict,
    zones: state.zones,
    space: { size, free, unknownNodes: unknown },
    recovery: {
      isEnabled: !state.isRecoveryDisabled,
      nodes: recovering.length,
      ...totalOf(recovering),
    },
    nodes: nodes.map(nodeJson),
    left: state.left.map(({ node, epoch, since }) => ({
      node,
      epoch: epoch || null,
      since: since === 0 ? null : isoTime(since),
    })),
    epochs: state.epochs.map(({ epoch, since, nodes }) => ({
      epoch,
      since: since === 0 ? null : isoTime(since),
      nodes: nodes.map(addressLabel),
    })),
  };
}

function nodeJson({ host, port, node, vnodes, zone, space, state, reason, size, free, recovery }: NodeState): object {
  return { host, port, node, vnodes, zone, space, state, reason, size, free, recovery };
}

function isoTime(timeMs: number): string {
  return new Date(timeMs).toISOString();
}
