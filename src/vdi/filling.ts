/**
 * Filling a VDI: an import, a restore or a migration begins it, and finishes it when all of it is durable. Owns when a VDI
 * gets the mark "unfinished" and loses it, and what may be overwritten. Messages and rules about marked VDIs: unfinished.ts.
 */
import { MAX_DATA_OBJECTS, type VdiRecord } from '../store/vdi-record.js';
import type { CatalogParts } from './catalog-parts.js';
import { checkName } from './names.js';
import { mustHold, mustKeepRedundancy, shiftOfNew } from './new-vdi.js';
import { isOfSame, type Beginning } from './unfinished.js';

/** For commands that have this option. */
const OVERWRITE_HINT = ', and --overwrite writes over it';

/** Errors: as of VdiCatalog.begin. */
export function beginFilling(parts: CatalogParts, name: string, beginning: Beginning): Promise<VdiRecord> {
  const { store, queue, open, lookup, busy, kept, log } = parts;
  const { catalog } = store;
  return queue.changeNames([name], async () => {
    const { by, of, run, redundancy, overwrites, goesOn, force } = beginning;
    checkName(name);
    await mustHold(store, redundancy);
    const named = await lookup.named(name);
    const found = named.find(({ isSnapshot }) => !isSnapshot);
    if (found) await open.settle(found);
    const before = found?.unfinished;
    const isBarelyMade = found !== undefined && ((await catalog.isBarelyMade?.(found)) ?? false);
    const isSame = isOfSame(before, beginning);
    if (found && !isBarelyMade && !isSame && !overwrites)
      throw await lookup.exists(found, by === 'migrate' ? '' : OVERWRITE_HINT);
    if (found) busy.mustBeFree(found, 'overwritten', { force });
    if (found && !isBarelyMade && (!before?.isNew || (isSame && goesOn))) {
      mustKeepRedundancy(found, redundancy);
      const unfinished = { by, of, run, since: before?.since ?? Date.now(), isNew: before?.isNew ?? false };
      return open.using(found, (vdi) => vdi.opened.mark(unfinished));
    }
    const shift = shiftOfNew(store, name, beginning);
    // Checked before anything is removed: the snapshots are what a migration has carried over so far.
    const [other] = named.filter((record) => record !== found && !kept.isUnused(record));
    if (other) throw await lookup.exists(found ?? other, '');
    const ended = await kept.end(named, `${name} was created again`);
    for (const { spec, client } of ended) log(`dropped ${spec}, kept for ${client}: ${name} was created again`);
    // The VDI was made by a command that did not finish: it holds nothing from before that command.
    if (found) await catalog.remove(found.vid);
    busy.mustBeUnused({ name, tag: '' }, 'created again', { force });
    const size = beginning.isOpenEnded ? MAX_DATA_OBJECTS * 2 ** shift : beginning.size;
    const unfinished = { by, of, run, since: Date.now(), isNew: true };
    return catalog.create(name, size, shift, unfinished, redundancy);
  });
}

/** Errors: as of VdiCatalog.finish. */
export async function finishFilling(
  { queue, open, lookup }: CatalogParts,
  name: string,
  run: string,
): Promise<VdiRecord> {
  await open.flushAhead(name);
  return queue.change(name, async () => {
    const record = await lookup.findWorking(name);
    await lookup.mustBeHeldBy(record, run);
    return open.using(record, async (vdi) => {
      await vdi.flush();
      return vdi.opened.mark(undefined);
    });
  });
}
