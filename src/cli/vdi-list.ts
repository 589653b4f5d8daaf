/** `sheepgate vdi list`: every VDI and snapshot of the store. */
import { Command } from 'commander';
import { withCommonOptions, withOperations, type CommonOptions } from './common-options.js';
import type { VdiDetails } from '../daemon/operations.js';
import { damagedJson, formatTime, formatVid, printJson, table, vdiJson } from './output.js';
import { formatSize } from './size.js';

export function vdiListCommand(): Command {
  const command = new Command('list')
    .description('list VDIs and their snapshots')
    .addHelpText(
      'after',
      '\nUSED is the space of the data objects, shared ones counted with everybody who shares them. STATE is there if a VDI is\n' +
        'unfinished: a command that fills it has not come to its end, and nobody else can open it; or if it is damaged: a\n' +
        'cluster has lost its inode. A name in brackets is what it was probably called.\n\nExample:\n  sheepgate vdi list',
    );
  return withCommonOptions(command).action(async (options: CommonOptions) => {
    const { vdis, damaged } = await withOperations(options, async (operations) => ({
      vdis: await operations.listDetails(),
      damaged: await operations.listDamaged(),
    }));
    if (options.json) return printJson([...vdis.map(vdiJson), ...damaged.map(damagedJson)]);
    const hasState = damaged.length > 0 || vdis.some(({ unfinished, damage }) => unfinished ?? damage);
    const rows = vdis.map((vdi) => [
      vdi.name,
      vdi.tag,
      formatVid(vdi.vid),
      formatSize(vdi.size),
      vdi.damage === undefined ? formatSize(vdi.allocatedBytes) : '-',
      formatTime(vdi.isSnapshot ? vdi.snapshotAt : vdi.createdAt),
      ...(hasState ? [stateOf(vdi)] : []),
    ]);
    for (const { vid, likelyName, why } of damaged) {
      const name = likelyName === undefined ? '-' : `(${likelyName}?)`;
      rows.push([name, '-', formatVid(vid), '-', '-', '-', `damaged: ${why}`]);
    }
    const header = ['NAME', 'TAG', 'ID', 'SIZE', 'USED', 'CREATED', ...(hasState ? ['STATE'] : [])];
    process.stdout.write(table(header, rows, ['ID', 'SIZE', 'USED']));
  });
}

function stateOf({ unfinished, damage }: VdiDetails): string {
  if (damage !== undefined) return `damaged: ${damage}`;
  return unfinished ? `unfinished ${unfinished.by}` : '';
}
