/** `sheepgate vdi list`: every VDI and snapshot of the store. */
import { Command } from 'commander';
import { isClusterLocation } from '../store/sheep/cluster-address.js';
import { withCommonOptions, withOperations, type CommonOptions } from './common-options.js';
import { formatTime, formatVid, otherSpec, printJson, table, vdiJson } from './output.js';
import { formatSize } from './size.js';

const IS_NUMBER = /^\d+$/;

export function vdiListCommand(): Command {
  const command = new Command('list')
    .description('list VDIs and their snapshots')
    .addHelpText(
      'after',
      '\nUSED is the space of the data objects, shared ones counted with everybody who shares them. STATE is there if a VDI is\n' +
        'unfinished: a command that fills it has not come to its end, and nobody else can open it. SAY is there in a cluster\n' +
        'where NAME and TAG do not say which is meant: all commands and NBD clients find it by that.\n' +
        'NUMBER is there if a tag is one: `dog` takes that for the NUMBER of a snapshot.\n\nExample:\n  sheepgate vdi list',
    );
  return withCommonOptions(command).action(async (options: CommonOptions) => {
    const { vdis, isCluster } = await withOperations(options, async (operations) => ({
      vdis: await operations.listDetails(),
      isCluster: isClusterLocation(operations.store),
    }));
    if (options.json) return printJson(vdis.map(vdiJson));
    const hasState = vdis.some(({ unfinished }) => unfinished);
    const hasSpec = vdis.some((vdi) => otherSpec(vdi) !== undefined);
    const hasNumber = isCluster && vdis.some(({ isSnapshot, tag }) => isSnapshot && IS_NUMBER.test(tag));
    const rows = vdis.map((vdi) => [
      vdi.name,
      vdi.tag,
      formatVid(vdi.vid),
      formatSize(vdi.size),
      formatSize(vdi.allocatedBytes),
      formatTime(vdi.isSnapshot ? vdi.snapshotAt : vdi.createdAt),
      ...(hasNumber ? [vdi.isSnapshot ? String(vdi.snapId) : ''] : []),
      ...(hasSpec ? [otherSpec(vdi) ?? ''] : []),
      ...(hasState ? [vdi.unfinished ? `unfinished ${vdi.unfinished.by}` : ''] : []),
    ]);
    const header = ['NAME', 'TAG', 'ID', 'SIZE', 'USED', 'CREATED'];
    if (hasNumber) header.push('NUMBER');
    if (hasSpec) header.push('SAY');
    if (hasState) header.push('STATE');
    process.stdout.write(table(header, rows, ['ID', 'SIZE', 'USED', 'NUMBER']));
  });
}
