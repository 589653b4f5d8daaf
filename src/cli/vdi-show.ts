/** `sheepgate vdi show`: all details of one VDI or snapshot. */
import { labelOfVdi } from '../store/vdi-record.js';
import { Command } from 'commander';
import type { ShownVdi, VdiDetails, VdiRecord } from '../operations/operations.js';
import { isTemporaryTag } from '../vdi/names.js';
import { waysOut } from '../vdi/unfinished.js';
import { withCommonOptions, withOperations, type CommonOptions } from './common-options.js';
import { formatTime, formatVid, otherSpec, printJson, printLine, usersOf, vdiJson } from './output.js';
import { redundancyText } from './redundancy-output.js';
import { formatSize } from '../text/size.js';

function useLine({ client, since, lostAt, until }: VdiDetails['clients'][number]): [string, string] {
  const cut = lostAt === null ? '' : `, cut off ${formatTime(lostAt)}, may come back until ${formatTime(until ?? 0)}`;
  return ['in use', `by ${client}, since ${formatTime(since)}${cut}`];
}

function writerLine({ client, isExclusive, firstWriteAt }: NonNullable<ShownVdi['writers']>[number]): [string, string] {
  const since = firstWriteAt === null ? 'has not written yet' : `writes since ${formatTime(firstWriteAt)}`;
  return ['writer', `${client}${isExclusive ? ', exclusively' : ''}, ${since}`];
}

function twoWritersLine({ at, clients }: NonNullable<ShownVdi['twoWriters']>): [string, string] {
  return [
    'WARNING',
    `written by two clients at once, ${clients.join(' and ')}, at ${formatTime(at)}: check its filesystem, unless the ` +
      'clients coordinate their writes (cluster filesystem, live migration)',
  ];
}

function keptLine({ spec, takenAt, client, until }: VdiDetails['kept'][number]): [string, string] {
  return ['kept', `${spec} of ${formatTime(takenAt)} for ${client}, until ${formatTime(until)}`];
}

export function vdiShowCommand(): Command {
  const command = new Command('show')
    .description('show one VDI or snapshot')
    .argument('<vdi>', 'NAME, NAME@TAG for a snapshot, or @ID')
    .addHelpText('after', '\nExample:\n  sheepgate vdi show vm1@monday');
  return withCommonOptions(command).action(async (spec: string, options: CommonOptions) => {
    const { vdi, parent, hasSnapshots } = await withOperations(options, async (operations) => {
      const found = await operations.show(spec);
      const all = found.parentVid === 0 ? [] : await operations.list();
      const isOwn = ({ name, isSnapshot, tag }: VdiRecord): boolean =>
        name === found.name && isSnapshot && !isTemporaryTag(tag);
      return {
        vdi: found,
        parent: all.find((other) => other.vid === found.parentVid),
        hasSnapshots: all.some(isOwn),
      };
    });
    if (options.json) return printJson(vdiJson(vdi));
    const lines: [string, string][] = [
      ['name', vdi.name],
      ...(vdi.isSnapshot ? [['tag', vdi.tag] as [string, string]] : []),
      ['id', formatVid(vdi.vid)],
      ...(vdi.isSnapshot ? [['number', String(vdi.snapId)] as [string, string]] : []),
      ...(otherSpec(vdi) === undefined ? [] : [['spec', otherSpec(vdi) ?? ''] as [string, string]]),
      ['size', `${formatSize(vdi.size)} (${vdi.size} bytes)`],
      ['used', formatSize(vdi.allocatedBytes)],
      ['not shared', formatSize(vdi.exclusiveBytes)],
      ...(vdi.merging ? [['to merge', mergingText(vdi.merging)] as [string, string]] : []),
      ['object size', formatSize(2 ** vdi.blockSizeShift)],
      ...(vdi.redundancy ? [['copies', redundancyText(vdi.redundancy)] as [string, string]] : []),
      ['created', formatTime(vdi.createdAt)],
      ...(vdi.isSnapshot ? [['snapshot', formatTime(vdi.snapshotAt)] as [string, string]] : []),
      ...(vdi.unfinished ? [['unfinished', unfinishedText(vdi, hasSnapshots)] as [string, string]] : []),
      ...(parent ? [['from', labelOfVdi(parent)] as [string, string]] : []),
      ['open', vdi.open === 0 ? 'no' : `by ${vdi.open} connection${vdi.open === 1 ? '' : 's'}`],
      ...usersOf(vdi).clients.map(useLine),
      ...(vdi.writers ?? []).map(writerLine),
      ...(vdi.twoWriters ? [twoWritersLine(vdi.twoWriters)] : []),
      ...usersOf(vdi).kept.map(keptLine),
    ];
    const width = Math.max(...lines.map(([title]) => title.length));
    for (const [title, value] of lines) printLine(`${title.padEnd(width)}  ${value}`);
  });
}

function mergingText({ overlays, bytes }: NonNullable<VdiDetails['merging']>): string {
  return `${overlays} object${overlays === 1 ? '' : 's'}, ${formatSize(bytes)} to move, in the background`;
}

function unfinishedText(vdi: VdiDetails, hasSnapshots: boolean): string {
  const { by, since } = vdi.unfinished ?? {};
  const began = `${by}, begun ${formatTime(since ?? 0)}`;
  if (vdi.open > 0) return `${began}, at work now`;
  return `${began}: cannot be opened; 'sheepgate ${by}' again completes it, ${waysOut(vdi, hasSnapshots)} gives it up`;
}
