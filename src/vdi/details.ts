/** The details that `vdi list` and `vdi show` print: records of VDIs and snapshots with their space, users and kept snapshots. */
import type { Usage } from '../store/object-store.js';
import type { VdiRecord } from '../store/vdi-record.js';
import type { CatalogParts } from './catalog-parts.js';
import type { ClientUse } from './in-use.js';
import type { KeptSnapshot } from './kept-snapshots.js';
import { specOf } from './names.js';

/** Records that are processed before the event loop does other work. */
const RECORDS_PER_TURN = 500;

export interface VdiDetails extends VdiRecord {
  /** Space of its allocated objects: whole objects, whether shared or not. */
  readonly allocatedBytes: number;
  /** Space of the objects that no other VDI or snapshot refers to. */
  readonly exclusiveBytes: number;
  /** Why neither is known. */
  readonly damage?: string;
  /** Of `detailsOf` only: objects that lie over others and are being merged with them, and the bytes to move for that. */
  readonly merging?: Usage['merging'];
  /** Its users: connections and commands that have it open. */
  readonly open: number;
  /** The clients that have it open, or were cut off and may come back. Our own commands are not among them. */
  readonly clients: readonly ClientUse[];
  /** Temporary snapshots of it, or this one, that nobody has open and that are kept for clients that may come back. */
  readonly kept: readonly KeptSnapshot[];
}

/** Errors: BAD_NAME, NO_VDI, NO_TAG. */
export function detailsOf(parts: CatalogParts, spec: string): Promise<VdiDetails> {
  const { store, queue, open, lookup, inUse, kept } = parts;
  return queue.on(spec, async () => {
    const record = await lookup.findText(spec);
    const listed = (await lookup.named(record.name)).filter(({ vid }) => vid === record.vid || !record.isSnapshot);
    const usage = await store.catalog.usage(record.vid);
    const clients = inUse.of(record.name, record.tag);
    return withUsage(record, usage, {
      open: open.usersOf(record.vid),
      clients,
      kept: listed.flatMap((each) => kept.of(each) ?? []),
    });
  });
}

/** The same of all, in one pass. A client or VDI that comes or goes meanwhile may be in it or not. */
export async function detailsOfAll({ store, open, inUse, kept }: CatalogParts): Promise<VdiDetails[]> {
  const records = await store.catalog.list();
  const usages = await store.catalog.usages();
  const clients = inUse.all();
  const users = open.userCounts();
  const keptByName = new Map<string, KeptSnapshot[]>();
  for (const record of records) {
    const one = kept.of(record);
    if (one) keptByName.set(record.name, [...(keptByName.get(record.name) ?? []), one]);
  }
  const all: VdiDetails[] = [];
  for (const [n, record] of records.entries()) {
    if (n % RECORDS_PER_TURN === RECORDS_PER_TURN - 1) await new Promise((resolve) => setImmediate(resolve));
    const usage = usages.get(record.vid);
    if (usage === undefined) continue; // deleted since
    const ofName = keptByName.get(record.name) ?? [];
    const label = specOf(record);
    all.push(
      withUsage(record, usage, {
        open: users.get(record.vid) ?? 0,
        clients: clients.of(record.name, record.tag),
        kept: record.isSnapshot ? ofName.filter(({ spec }) => record.isTemporary && spec === label) : ofName,
      }),
    );
  }
  return all;
}

function withUsage(
  record: VdiRecord,
  { allocated, exclusive, damage, merging }: Usage,
  more: Pick<VdiDetails, 'open' | 'clients' | 'kept'>,
): VdiDetails {
  const objectSize = 2 ** record.blockSizeShift;
  const bytes = { allocatedBytes: allocated * objectSize, exclusiveBytes: exclusive * objectSize };
  return { ...record, ...bytes, ...more, ...(damage !== undefined && { damage }), ...(merging && { merging }) };
}
