/**
 * Lists the locks that the nodes of a cluster keep on VDIs, and takes one away. Owns the order: the spec is looked up again just
 * before, and the request to the nodes carries its id. What may be unlocked: cluster-locks.ts.
 */
import type { VdiLock } from '../store/object-store.js';
import type { VdiRecord } from '../store/vdi-record.js';
import { CatalogError } from './catalog-error.js';
import type { CatalogParts } from './catalog-parts.js';
import { locksOf, mayUnlock, ofVid, type LockReport, type LockStatus, type UnlockOptions } from './cluster-locks.js';
import { parseSpec } from './names.js';

/** Errors: UNSUPPORTED (a local store). */
export async function listLocks(parts: CatalogParts): Promise<LockReport> {
  const locks = locksOf(parts.store);
  const list = await locks.list();
  const records = list.length === 0 ? [] : await recordsOf(parts, list);
  return { areEnforced: locks.areEnforced, locks: list.map((lock) => statusOf(parts, lock, records)) };
}

/** Errors: as of VdiCatalog.unlock. */
export function unlock(parts: CatalogParts, spec: string, options: UnlockOptions): Promise<LockStatus> {
  const { store, queue, open, lookup, busy } = parts;
  return queue.change(spec, async () => {
    const locks = locksOf(store);
    const { vid } = parseSpec(spec);
    // An id may be that of a deleted VDI, whose lock is in the way of the next VDI that gets this id.
    const find = async (): Promise<VdiRecord | undefined> =>
      vid === undefined ? await lookup.findText(spec) : await store.catalog.record(vid);
    const record = await find();
    if (record) {
      await open.settle(record);
      busy.mustBeClosed(record, 'unlocked');
      busy.mustNotBeElsewhere(spec, record, 'unlocked');
    }
    const found = (await locks.list()).find((other) => other.vid === (vid ?? record?.vid));
    const status = found && statusOf(parts, found, record ? [record] : []);
    const { lock, holder } = mayUnlock(spec, { areEnforced: locks.areEnforced, status, record, options });
    if ((await find())?.vid !== record?.vid) {
      throw new CatalogError(
        'NOT_LOCKED',
        `${spec} has changed at this moment (a snapshot?); nothing was done, look again`,
      );
    }
    await locks.unlock(lock, holder);
    return lock;
  });
}

/** Locks are listed even if some of the store's records cannot be read. */
async function recordsOf({ store }: CatalogParts, locks: readonly VdiLock[]): Promise<readonly VdiRecord[]> {
  try {
    return await store.catalog.list();
  } catch {
    const each = locks.map(async ({ vid }) => store.catalog.record(vid));
    const read = await Promise.allSettled(each);
    return read.flatMap((record) => (record.status === 'fulfilled' ? (record.value ?? []) : []));
  }
}

function statusOf({ busy }: CatalogParts, lock: VdiLock, records: readonly VdiRecord[]): LockStatus {
  const record = records.find(({ vid }) => vid === lock.vid);
  return { ...lock, ...ofVid(record), usedBy: record === undefined ? [] : busy.usersHere(record) };
}
