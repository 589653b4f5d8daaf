/** `sheepgate vdi snapshot`: freeze a VDI's present content under a tag, in use or not. */
import { Command } from 'commander';
import type { Operations, VdiRecord } from '../operations/operations.js';
import { forceOption, withCommonOptions, withOperations, type CommonOptions } from './common-options.js';
import { FrozenMoment, withFreezeOptions, type FreezeOptions } from '../jobs/freeze.js';
import { interruptible } from './interrupt.js';
import { specOf } from '../vdi/names.js';
import { printJson, printLine, printNote, vdiJson } from './output.js';

interface SnapshotOptions extends CommonOptions, FreezeOptions {
  readonly force?: boolean;
}

export function vdiSnapshotCommand(): Command {
  const command = new Command('snapshot')
    .description('take a snapshot NAME@TAG; whoever writes to the VDI goes on without noticing')
    .argument('<name>', 'name of the VDI')
    .argument('<tag>', 'tag of the snapshot')
    .addOption(forceOption())
    .addHelpText('after', '\nExample:\n  sheepgate vdi snapshot vm1 monday');
  return withFreezeOptions(withCommonOptions(command)).action(
    async (name: string, tag: string, options: SnapshotOptions) => {
      const vdi = await withOperations(options, (operations) => snapshot(operations, name, tag, options));
      if (options.json) printJson(vdiJson(vdi));
      else printLine(`took ${specOf(vdi)}`);
    },
  );
}

/** A snapshot that came too late to be of a guest that held still is not left behind. */
async function snapshot(
  operations: Operations,
  name: string,
  tag: string,
  options: SnapshotOptions,
): Promise<VdiRecord> {
  const { force } = options;
  if (options.freezeCmd === undefined && options.thawCmd === undefined && options.freezeTimeout === undefined) {
    return operations.snapshot(name, tag, { force });
  }
  return interruptible(async (signal) => {
    const moment = new FrozenMoment(options, signal);
    let taken: VdiRecord | undefined;
    try {
      taken = await moment.during(async () => (taken = await operations.snapshot(name, tag, { force })));
    } catch (error) {
      if (taken) {
        const label = specOf(taken);
        await operations.remove(label).catch((failure: Error) => {
          printNote(`${label} is left behind: ${failure.message}`);
        });
      }
      throw error;
    }
    moment.throwIfFrozen(`took ${specOf(taken)}`);
    return taken;
  });
}
