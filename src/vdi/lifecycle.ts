/**
 * Operations that make, replace or remove VDIs: create, clone, roll back, resize, delete. Owns the order of their checks: a
 * disk that is in use, or expected back by a client, is never replaced under it. Filling is in filling.ts.
 */
import type { Redundancy, VdiRecord } from '../store/vdi-record.js';
import type { ForceOption } from './busy-checks.js';
import { CatalogError } from './catalog-error.js';
import type { CatalogParts } from './catalog-parts.js';
import type { Ended } from './kept-snapshots.js';
import { checkName } from './names.js';
import { checkSize, mustHold, shiftOfNew } from './new-vdi.js';
import type { Filling } from './unfinished.js';

export interface CreateOptions extends ForceOption {
  readonly blockSizeShift?: number | undefined;
  readonly redundancy?: Redundancy | undefined;
  /** Named in messages in place of --force, where a caller has another way to say it. */
  readonly forceHint?: string;
}

export interface ResizeOptions extends ForceOption, Filling {
  /** Shrink also if a client that was cut off may come back. */
  readonly forceInUse?: boolean | undefined;
}

/** Errors: as of VdiCatalog.create. */
export function createVdi(
  { store, queue, lookup, busy }: CatalogParts,
  name: string,
  size: number,
  options: CreateOptions,
): Promise<VdiRecord> {
  return queue.changeNames([name], async () => {
    const { redundancy, blockSizeShift } = options;
    const shift = shiftOfNew(store, name, { size, blockSizeShift });
    await mustHold(store, redundancy);
    await lookup.mustNotExist(name);
    busy.mustBeUnused({ name, tag: '' }, 'created again', options, options.forceHint);
    return store.catalog.create(name, size, shift, undefined, redundancy);
  });
}

/** Errors: as of VdiCatalog.clone. */
export function cloneSnapshot(
  { store, queue, lookup, busy }: CatalogParts,
  spec: string,
  newName: string,
  options: ForceOption,
): Promise<VdiRecord> {
  return queue.change(spec, async () => {
    checkName(newName);
    const base = await lookup.findSnapshot(spec, 'clone');
    await lookup.mustNotExist(newName);
    busy.mustBeUnused({ name: newName, tag: '' }, 'created again', options);
    return store.catalog.clone(base.vid, newName);
  }, [newName]);
}

/** Errors: as of VdiCatalog.rollback. */
export function rollBack(
  { store, queue, open, lookup, busy, kept }: CatalogParts,
  spec: string,
  { run, ...options }: Filling & ForceOption,
): Promise<VdiRecord & Ended> {
  return queue.change(spec, async () => {
    const base = await lookup.findSnapshot(spec, 'roll back to');
    const working = await lookup.find({ name: base.name, tag: undefined });
    if (run !== undefined) await lookup.mustBeHeldBy(working, run);
    await open.settle(working);
    busy.mustBeFree(working, 'rolled back', options);
    const ended = await kept.end(await lookup.named(base.name), `${base.name} was rolled back`);
    const unfinished = run === undefined ? undefined : working.unfinished;
    return { ...(await store.catalog.rollback(working.vid, base.vid, unfinished)), ended };
  });
}

/** Errors: as of VdiCatalog.resize. */
export async function resizeVdi(
  { queue, open, lookup, busy }: CatalogParts,
  name: string,
  size: number,
  { run, force, forceInUse }: ResizeOptions,
): Promise<VdiRecord> {
  await open.flushAhead(name);
  return queue.change(name, async () => {
    const record = await lookup.findWorking(name);
    await lookup.mustBeHeldBy(record, run);
    checkSize(size, record.blockSizeShift, record.maxObjects);
    if (size === record.size) return record;
    if (size < record.size) {
      if (!force) {
        throw new CatalogError(
          'NEEDS_FORCE',
          `${name} has ${record.size} bytes; shrinking it to ${size} destroys the data behind the new end; --force allows this`,
        );
      }
      await open.settle(record);
      busy.mustBeFree(record, 'shrunk', { force: forceInUse }, '--force-in-use');
    }
    return open.using(record, async (vdi) => {
      // Growing again must not bring back what was cut off.
      if (size < record.size) await vdi.zero(size, record.size - size, { noHole: false, fua: true });
      await vdi.flush();
      return vdi.withWritersHeld(() => vdi.opened.resize(size));
    });
  });
}

/** Errors: as of VdiCatalog.remove. */
export async function removeVdi(
  parts: CatalogParts,
  spec: string,
  { run, ...options }: Filling & ForceOption,
): Promise<Ended> {
  const { store, open, lookup, busy, kept } = parts;
  const ended = await queuedWithTouched(parts, spec, async (record) => {
    if (run !== undefined) await lookup.mustBeHeldBy(record, run);
    const named = await lookup.named(record.name);
    if (record.isTemporary) {
      const same = named.filter(({ tag }) => tag === record.tag);
      const gone = await kept.end(same, `${spec} was deleted`);
      if (gone.length > 0) return gone;
    }
    await open.settle(record);
    busy.mustBeFree(record, 'deleted', options);
    const gone = record.isSnapshot ? [] : await kept.end(named, `${record.name} was deleted`);
    await store.catalog.remove(record.vid);
    // A client may be about to come back to it.
    if (record.isTemporary) kept.keeper?.dropped(record.vid, `${spec} was deleted`);
    return gone;
  });
  // After the operation: others need not wait for this.
  await store.catalog.reclaimed();
  return { ended };
}

/** Queue `work` on the VDI's name, and on the names of other VDIs whose records change when it is removed. */
async function queuedWithTouched<T>(
  { store, queue, lookup }: CatalogParts,
  spec: string,
  work: (record: VdiRecord) => Promise<T>,
): Promise<T> {
  const more = new Set<string>();
  for (;;) {
    const known = more.size;
    const done = await queue.change(spec, async () => {
      const record = await lookup.findText(spec);
      for (const name of store.catalog.touchedBy?.(record.vid) ?? []) {
        if (name !== record.name) more.add(name);
      }
      return more.size > known ? undefined : { result: await work(record) };
    }, [...more]);
    if (done) return done.result;
  }
}
