/** --missing, for commands that can do with what a damaged cluster has left. */
import { Option } from 'commander';

export function missingOption(): Option {
  return new Option(
    '--missing <how>',
    'zero: zeros in place of objects that the cluster has lost, and read-only; only for clusters',
  ).choices(['zero']);
}
