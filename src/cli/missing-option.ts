/** --missing, for commands that can work on what is left of a damaged cluster. */
import { Option } from 'commander';
import type { StoreOptions } from '../store/locations.js';

export function missingOption(): Option {
  return new Option(
    '--missing <how>',
    'zero: zeros in place of objects that the cluster has lost, and read-only; only for clusters',
  ).choices(['zero']);
}

/** Undefined without --missing. */
export function storeOptions({ missing }: { readonly missing?: 'zero' }): StoreOptions | undefined {
  return missing === undefined ? undefined : { missing };
}
