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
      '\nUSED is the space of the data objects, shared ones counted with everybody who shares them.\n\nExample:\n  sheepgate vdi list',
    );
  return withCommonOptions(command).action(async (options: CommonOptions) => {
    const vdis = await withOperations(options, (operations) => operations.listDetails());
    if (options.json) return printJson(vdis.map(vdiJson));
    const rows = vdis.map((vdi) => [
      vdi.name,
      vdi.tag,
      formatVid(vdi.vid),
      formatSize(vdi.size),
      formatSize(vdi.allocatedBytes),
      formatTime(vdi.isSnapshot ? vdi.snapshotAt : vdi.createdAt),
    ]);
    process.stdout.write(table(['NAME', 'TAG', 'ID', 'SIZE', 'USED', 'CREATED'], rows, ['ID', 'SIZE', 'USED']));
  });
}
