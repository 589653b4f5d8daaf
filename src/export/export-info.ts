/** What a list of exports, and NBD_OPT_INFO, say of a VDI or snapshot beside its geometry: name and description. */
import type { VdiRecord } from '../store/vdi-record.js';
import type { ExportInfo } from 'nbd-server-ts/block-device';
import { formatSpec, specOf, type VdiSpec } from '../vdi/names.js';
import { formatExportName, type ExportOptions } from './export-name.js';

/** The tag that protocol violations on any of a VDI's temporary snapshots are counted under, whatever the label. */
const ANY_TEMPORARY = 'now';

/**
 * Of the VDIs and snapshots that can be listed and that `isTold` allows. Temporary snapshots are not listed: a client that opens
 * everything in the list would keep them alive, or find them gone. Nor are unfinished VDIs, which clients cannot open. One after
 * the other, as they are asked for: there may be very many.
 */
export function* infosOf(
  records: readonly VdiRecord[],
  isTold: ((subject: Pick<VdiSpec, 'name' | 'tag'>) => boolean) | undefined,
): Generator<ExportInfo> {
  for (const record of records) {
    if (record.isTemporary || record.unfinished) continue;
    const { name, tag, isSnapshot } = record;
    if (isTold === undefined || isTold({ name, tag: isSnapshot ? tag : undefined })) yield infoOf(record);
  }
}

export function infoOf(record: VdiRecord, options: ExportOptions = {}): ExportInfo {
  const { name, isSnapshot, isTemporary } = record;
  const description = isSnapshot
    ? `snapshot of ${formatSpec({ name, tag: undefined })}, taken ${new Date(record.snapshotAt).toISOString()}`
    : `VDI, created ${new Date(record.createdAt).toISOString()}`;
  const countedAs = isTemporary ? formatSpec({ name, tag: ANY_TEMPORARY }) : specOf(record);
  return { name: formatExportName(specOf(record), options), description, countedAs };
}
