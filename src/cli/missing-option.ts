/** --missing, for commands that can work on what is left of a damaged cluster. */
import { Option } from 'commander';
import type { StoreOptions } from '../store/locations.js';

export function missingOption(): Option {
  return new Option(
    '--missing <how>',
    'zero: read objects that the cluster has lost as zeros; makes everything read-only; clusters only',
  ).choices(['zero']);
}

/** Undefined without --missing. */
export function storeOptions({ missing }: { readonly missing?: 'zero' }): StoreOptions | undefined {
  return missing === undefined ? undefined : { missing };
}
