/**
 * Says what a failed import, restore or migration has left of the VDI that it was filling. Asks the store: the answer to the
 * command's last step may have been lost. Changes nothing.
 */
import { NOUNS } from '../vdi/unfinished.js';
import type { Operations, VdiRecord } from '../operations/operations.js';

/** `begun`: the answer of `begin`. `isFinishing`: the failed step was `finish`. */
export async function whatIsLeft(
  operations: Pick<Operations, 'show'>,
  begun: VdiRecord,
  { isFinishing }: { readonly isFinishing: boolean },
): Promise<string> {
  const { name, vid, unfinished } = begun;
  if (!unfinished) throw new Error('invariant: a VDI is filled that has no unfinished mark');
  const { by, run } = unfinished;
  try {
    const found = await operations.show(name);
    if (found.unfinished?.run === run) {
      return `${name} is now unfinished and cannot be opened: run ${by} again, or delete it`;
    }
    if (isFinishing && !found.unfinished && found.vid === vid) {
      return `${name} is nevertheless complete: only the answer to the last step was lost`;
    }
    return `${name} is no longer the VDI that ${NOUNS[by]} began to fill: 'sheepgate vdi show ${name}' shows its state`;
  } catch {
    return `${name} may be unfinished: 'sheepgate vdi show ${name}' shows whether it is`;
  }
}
