/**
 * Snapshots, and temporary snapshots, which are dropped when their last reader is gone. Owns the checks before one is taken, and
 * the flush before the name is taken. How writers are held while the store switches over is `take` of the VDI (vdi.ts); where
 * snapshots are stored is the store's affair.
 */
import type { OpenVdi, Switch } from '../store/open-vdi.js';
import type { Awaitable, VdiRecord } from '../store/vdi-record.js';
import type { ForceOption } from './busy-checks.js';
import { CatalogError } from './catalog-error.js';
import type { CatalogParts } from './catalog-parts.js';
import { checkTag, checkTemporaryTag, isTemporaryTag, parseSpec } from './names.js';
import type { Filling } from './unfinished.js';
import type { Vdi } from './vdi.js';

/** A cluster stores times as seconds in 32 bits. */
const MAX_TIME_MS = 2 ** 32 * 1000;

export interface SnapshotOptions extends Filling, ForceOption {
  /** Milliseconds since the epoch: when it was taken in the store that it is copied from. */
  readonly takenAt?: number | undefined;
}

/** Errors: as of VdiCatalog.snapshot. */
export async function takeSnapshot(
  parts: CatalogParts,
  name: string,
  tag: string,
  { takenAt, run, force }: SnapshotOptions,
): Promise<VdiRecord> {
  const { queue, open, lookup, busy } = parts;
  const { catalog } = parts.store;
  await open.flushAhead(name);
  return queue.change(name, async () => {
    checkTag(tag);
    const why = catalog.whyNoTag?.(tag);
    if (why !== undefined) throw new CatalogError('BAD_NAME', `tag "${tag}" ${why}`);
    const { name: own } = await lookup.findWorking(name);
    busy.mustBeUnused({ name: own, tag }, 'taken again', { force });
    if (takenAt !== undefined && !(Number.isSafeInteger(takenAt) && takenAt > 0 && takenAt < MAX_TIME_MS)) {
      throw new CatalogError('BAD_TIME', `a snapshot cannot have been taken at ${takenAt} ms since 1970`);
    }
    return switchTo(parts, name, tag, (vdi) => vdi.prepareSwitch(tag, takenAt), run);
  });
}

/** Errors: as of VdiCatalog.snapshotTemporary. */
export function takeTemporary(parts: CatalogParts, name: string, tag: string): Promise<VdiRecord> {
  return parts.queue.changeTemporaries(name, async () => {
    checkTemporaryTag(tag);
    return switchTo(parts, name, tag, (vdi) => vdi.prepareTemporary(tag));
  });
}

/** Of several temporary snapshots with the tag, drops the one with this `vid`. Errors: BAD_NAME, BUSY, READ_ONLY. */
export function dropTemporary(parts: CatalogParts, name: string, tag: string, vid?: number): Promise<void> {
  return parts.queue.changeTemporaries(name, async () => {
    checkTemporaryTag(tag);
    const { name: own } = parseSpec(name);
    const record = (await parts.lookup.named(own)).find(
      (other) => other.isTemporary && other.tag === tag && (vid === undefined || other.vid === vid),
    );
    if (!record) return; // dropped already
    await parts.open.settle(record);
    parts.busy.mustBeClosed(record, 'dropped');
    await parts.store.catalog.remove(record.vid);
  });
}

/** Errors: NO_TAG (it has ended). */
export function openTemporary(parts: CatalogParts, vid: number): Promise<Vdi> {
  return parts.queue.onVid(vid, async () => {
    const record = await parts.store.catalog.record(vid);
    if (!record?.isTemporary) throw new CatalogError('NO_TAG', 'this temporary snapshot has ended');
    return parts.open.acquire(record);
  });
}

/** Drop the temporary snapshots that an earlier process was killed with. Returns how many. */
export function dropLeftovers({ store, queue }: CatalogParts): Promise<number> {
  return queue.alone(async () => {
    // Earlier versions stored them in a local store, where no other tool gives tags.
    const isOurs = store.catalog.temporariesStoreNothing === true;
    const leftovers = (await store.catalog.list()).filter(
      ({ isSnapshot, isTemporary, tag }) => isTemporary || (isOurs && isSnapshot && isTemporaryTag(tag)),
    );
    for (const { vid } of leftovers) await store.catalog.remove(vid);
    return leftovers.length;
  });
}

async function switchTo(
  { open, lookup }: CatalogParts,
  name: string,
  tag: string,
  prepare: (vdi: OpenVdi) => Awaitable<Switch>,
  run?: string,
): Promise<VdiRecord> {
  const record = await lookup.findWorking(name);
  await lookup.mustBeHeldBy(record, run);
  const isTaken = (await lookup.named(record.name)).some((other) => other.tag === tag);
  if (isTaken && !isTemporaryTag(tag)) {
    throw new CatalogError('EXISTS', `${name} has a snapshot "${tag}" already; choose another tag or delete it`);
  }
  return open.using(record, async (vdi) => vdi.take(await prepare(vdi.opened)));
}
