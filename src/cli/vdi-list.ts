/** `sheepgate vdi list`: every VDI and snapshot of the store. */
import { Command } from 'commander';
import { withCommonOptions, withOperations, type CommonOptions } from './common-options.js';
import { formatTime, formatVid, printJson, table, vdiJson } from './output.js';
import { formatSize } from './size.js';

export function vdiListCommand(): Command {
  const command = new Command('list')
    .description('list VDIs and their snapshots')
    .addHelpText(
      'after',
      '\nUSED is the space of the data objects, shared ones counted with everybody who shares them. STATE is there if a VDI is\n' +
        'unfinished: a command that fills it has not come to its end, and nobody else can open it.\n\nExample:\n  sheepgate vdi list',
    );
  return withCommonOptions(command).action(async (options: CommonOptions) => {
    const vdis = await withOperations(options, (operations) => operations.listDetails());
    if (options.json) return printJson(vdis.map(vdiJson));
    const hasState = vdis.some(({ unfinished }) => unfinished);
    const rows = vdis.map((vdi) => [
      vdi.name,
      vdi.tag,
      formatVid(vdi.vid),
      formatSize(vdi.size),
      formatSize(vdi.allocatedBytes),
      formatTime(vdi.isSnapshot ? vdi.snapshotAt : vdi.createdAt),
      ...(hasState ? [vdi.unfinished ? `unfinished ${vdi.unfinished.by}` : ''] : []),
    ]);
    const header = ['NAME', 'TAG', 'ID', 'SIZE', 'USED', 'CREATED', ...(hasState ? ['STATE'] : [])];
    process.stdout.write(table(header, rows, ['ID', 'SIZE', 'USED']));
  });
}
