/** `sheepgate vdi list`: lists all VDIs and snapshots of the store. */
import { Command } from 'commander';
import { kindOf } from '../store/locations.js';
import { io } from './command-io.js';
import { withCommonOptions, withOperations, type CommonOptions } from './common-options.js';
import type { VdiDetails } from '../operations/operations.js';
import { damagedJson, formatTime, formatVid, otherSpec, printJson, table, vdiJson } from './output.js';
import { formatSize } from '../text/size.js';

const IS_NUMBER = /^\d+$/;

export function vdiListCommand(): Command {
  const command = new Command('list')
    .description('list VDIs and their snapshots')
    .addHelpText(
      'after',
      '\nUSED is the space of the data objects; an object that several VDIs or snapshots share counts for each of them.\n' +
        'Some columns appear only when they are needed:\n' +
        '  STATE   unfinished: the command that fills the VDI has not completed, and the VDI cannot be opened.\n' +
        '          damaged: the cluster has lost its inode; a NAME in brackets is its probable name.\n' +
        '  SPEC    in a cluster, if NAME and TAG are ambiguous or not usable: give this to commands and NBD clients instead.\n' +
        '  NUMBER  if a tag is a number: `dog` takes such a tag for the NUMBER of a snapshot.\n\nExample:\n  sheepgate vdi list',
    );
  return withCommonOptions(command).action(async (options: CommonOptions) => {
    const { vdis, damaged, store } = await withOperations(options, async (operations) => ({
      vdis: await operations.listDetails(),
      damaged: await operations.listDamaged(),
      store: operations.store,
    }));
    if (options.json) return printJson([...vdis.map(vdiJson), ...damaged.map(damagedJson)]);
    const hasState = damaged.length > 0 || vdis.some(({ unfinished, damage }) => unfinished ?? damage);
    const hasSpec = vdis.some((vdi) => otherSpec(vdi) !== undefined);
    const hasNumber =
      kindOf(store).takesNumbersForIds && vdis.some(({ isSnapshot, tag }) => isSnapshot && IS_NUMBER.test(tag));
    const rows = vdis.map((vdi) => [
      vdi.name,
      vdi.tag,
      formatVid(vdi.vid),
      formatSize(vdi.size),
      vdi.damage === undefined ? formatSize(vdi.allocatedBytes) : '-',
      formatTime(vdi.isSnapshot ? vdi.snapshotAt : vdi.createdAt),
      ...(hasNumber ? [vdi.isSnapshot ? String(vdi.snapId) : ''] : []),
      ...(hasSpec ? [otherSpec(vdi) ?? ''] : []),
      ...(hasState ? [stateOf(vdi)] : []),
    ]);
    for (const { vid, likelyName, why } of damaged) {
      const name = likelyName === undefined ? '-' : `(${likelyName}?)`;
      const number = hasNumber ? [''] : [];
      const spec = hasSpec ? [''] : [];
      rows.push([name, '-', formatVid(vid), '-', '-', '-', ...number, ...spec, `damaged: ${why}`]);
    }
    const header = ['NAME', 'TAG', 'ID', 'SIZE', 'USED', 'CREATED'];
    if (hasNumber) header.push('NUMBER');
    if (hasSpec) header.push('SPEC');
    if (hasState) header.push('STATE');
    io().stdout.write(table(header, rows, ['ID', 'SIZE', 'USED', 'NUMBER']));
  });
}

function stateOf({ unfinished, damage }: VdiDetails): string {
  if (damage !== undefined) return `damaged: ${damage}`;
  return unfinished ? `unfinished ${unfinished.by}` : '';
}
