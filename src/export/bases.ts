/**
 * Bases: the snapshots since which an export reports changes. Owns which snapshots a VDI can be compared with. The names of the
 * meta contexts are in changed-contexts.ts.
 */
import type { VdiRecord } from '../store/vdi-record.js';
import { CatalogError } from '../vdi/catalog-error.js';
import type { VdiCatalog } from '../vdi/catalog.js';
import { formatSpec, isTemporaryTag, specOf } from '../vdi/names.js';
import type { Vdi } from '../vdi/vdi.js';
import { isContextTag } from './changed-contexts.js';
import type { ExportOptions } from './export-name.js';

/**
 * Tags of the snapshots that `record` can be compared with, newest first: all of the same VDI, or the one that the options name.
 * Errors: NO_TAG (no snapshot has this tag), BAD_NAME (it cannot be compared with).
 */
export async function basesOf(
  catalog: VdiCatalog,
  { name, vid, blockSizeShift }: VdiRecord,
  { since }: ExportOptions,
): Promise<readonly string[]> {
  if (since === undefined) {
    const named = await catalog.named(name);
    return (
      named
        .filter(({ isSnapshot, tag }) => isSnapshot && !isTemporaryTag(tag))
        .filter((base) => base.vid !== vid && base.blockSizeShift === blockSizeShift)
        // A tag that may mean several snapshots cannot name a base.
        .filter(({ tag, isDoubtful }) => !isDoubtful && isContextTag(tag))
        .map(({ tag }) => tag)
        .reverse()
    );
  }
  const base = await catalog.find(formatSpec({ name, tag: since }));
  const refuse = (why: string): CatalogError =>
    new CatalogError('BAD_NAME', `changes since ${specOf(base)} cannot be reported: ${why}`);
  if (base.blockSizeShift !== blockSizeShift) throw refuse('it has data objects of another size');
  if (!isContextTag(since)) throw refuse('its tag has control characters, or is not UTF-8');
  return [since];
}

/**
 * Open the snapshot `tag` of the VDI that `record` belongs to. `known`: the vids of the bases that a temporary snapshot was
 * compared with so far, by tag. Errors: ENDED (the tag was given to another snapshot since), those of VdiCatalog.openVdi.
 */
export async function openBase(
  catalog: VdiCatalog,
  record: VdiRecord,
  tag: string,
  known: Map<string, number> | undefined,
): Promise<Vdi> {
  const base = await catalog.openVdi(formatSpec({ name: record.name, tag }));
  const { vid } = base.record;
  if ((known?.get(tag) ?? vid) !== vid) {
    await catalog.release(base);
    throw new CatalogError(
      'ENDED',
      `${specOf(base.record)} is another snapshot now than the one that ${specOf(record)} was compared with`,
    );
  }
  known?.set(tag, vid);
  return base;
}
