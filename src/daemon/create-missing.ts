/** Creates the VDIs of --create that do not exist yet: all of them or none. Never changes an existing VDI. */
import type { Logger } from 'pino';
import type { DirectOperations } from '../operations/direct-operations.js';
import type { VdiRecord } from '../operations/operations.js';
import type { Unfinished } from '../store/vdi-record.js';
import { shellWord } from '../text/shell-word.js';
import { CatalogError } from '../vdi/catalog-error.js';
import type { DaemonConfiguration } from './daemon-configuration.js';

/** A VDI of --create that exists with another size, or unfinished. Sizes in bytes. */
export interface KeptVdi {
  readonly name: string;
  readonly size: number;
  readonly wantedSize: number;
  readonly unfinished: Unfinished | undefined;
}

/**
 * Create the missing VDIs, all or none. Errors: NO_VDI (only snapshots have the name), those of creating a VDI, and the reason of
 * `stop`.
 */
export async function createMissing(
  operations: DirectOperations,
  wanted: DaemonConfiguration['create'],
  { log, stop }: { readonly log: Logger; readonly stop: AbortSignal | undefined },
): Promise<KeptVdi[]> {
  const names = new Set((await operations.list()).map(({ name }) => name));
  // Fails for a name that only snapshots have: there is no VDI to serve.
  for (const { name } of wanted) if (names.has(name)) await operations.show(name);
  const kept: KeptVdi[] = [];
  const made: string[] = [];
  try {
    for (const { name, size } of wanted) {
      const there = await createIfMissing(operations, name, size);
      if (!there) {
        made.push(name);
        log.info({ vdi: name, size }, 'created');
      } else if (there.size === size && !there.unfinished) {
        log.info({ vdi: name }, 'exists already, left as it is');
      } else {
        const { unfinished } = there;
        kept.push({ name, size: there.size, wantedSize: size, unfinished });
        const how = unfinished ? 'unfinished, and cannot be opened' : 'with another size than was asked for';
        log.warn({ vdi: name, size: there.size, wantedSize: size }, `exists already, left as it is: ${how}`);
      }
      stop?.throwIfAborted();
    }
  } catch (error) {
    for (const name of made) {
      await operations.remove(name).catch((failure: unknown) => {
        log.error({ err: failure, vdi: name }, 'left behind by the failed start');
      });
    }
    throw error;
  }
  return kept;
}

/** undefined if it was created; the existing VDI if it was not. */
async function createIfMissing(
  operations: DirectOperations,
  name: string,
  size: number,
): Promise<VdiRecord | undefined> {
  try {
    await operations.create(name, size, { forceHint: `'sheepgate vdi create ${shellWord(name)} ${size} --force'` });
    return undefined;
  } catch (error) {
    if (!(error instanceof CatalogError) || error.code !== 'EXISTS') throw error;
    return operations.show(name);
  }
}
