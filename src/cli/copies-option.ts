/** `--copies`, for commands that make a VDI in a cluster. */
import { InvalidArgumentError, Option } from 'commander';
import type { Redundancy } from '../store/vdi-record.js';
import { parseRedundancy, REDUNDANCY_HELP } from '../store/redundancy.js';

export interface CopiesOption {
  readonly copies?: Redundancy;
}

export function copiesOption(): Option {
  return new Option(
    '--copies <copies>',
    `in a cluster: ${REDUNDANCY_HELP} (default: as the cluster was formatted)`,
  ).argParser((text) => {
    const redundancy = parseRedundancy(text);
    if (!redundancy) throw new InvalidArgumentError(`Give ${REDUNDANCY_HELP}.`);
    return redundancy;
  });
}
