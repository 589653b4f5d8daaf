/**
 * What a command that fills a VDI has left in its place when it failed, in words: as the store says, not as the command
 * expects, for the answer to its last step may have been lost.
 */
import { NOUNS } from '../vdi/unfinished.js';
import type { Operations, VdiRecord } from '../operations/operations.js';

/** `begun`: what `begin` has answered. `isFinishing`: it is `finish` that has failed, or seemed to. */
export async function whatIsLeft(
  operations: Pick<Operations, 'show'>,
  begun: VdiRecord,
  { isFinishing }: { readonly isFinishing: boolean },
): Promise<string> {
  const { name, vid, unfinished } = begun;
  if (!unfinished) throw new Error('invariant: a VDI is filled that bears no mark');
  const { by, run } = unfinished;
  try {
    const found = await operations.show(name);
    if (found.unfinished?.run === run) {
      return `${name} is unfinished now and cannot be opened: ${by} again, or delete it`;
    }
    if (isFinishing && !found.unfinished && found.vid === vid) {
      return `${name} is complete all the same: only the answer to the last step was lost`;
    }
    return `${name} is not what ${NOUNS[by]} has begun any more: 'sheepgate vdi show ${name}' says what it is`;
  } catch {
    return `${name} may be unfinished: 'sheepgate vdi show ${name}' says whether it is`;
  }
}
