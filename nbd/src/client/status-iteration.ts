/**
 * Block statuses of a whole range, as async iterators: one request after the other, asked for as the caller consumes. It
 * owns how neighbours are joined, and the bound of one request.
 */

import { ALLOCATION_CONTEXT } from '../block-device.js';
import { checkedCount, checkNumber, checkSignal } from './argument-checks.js';
import { NbdClientError } from './client-error.js';
import type { Extent } from './reply-reader.js';

/** The range of one request by default, bytes: servers look at all of it before they answer, and it fits 32 bits. */
const DEFAULT_CHUNK_BYTES = 2 ** 31;
/** The lowest flag of contexts that mark changes: "dirty" of `qemu:dirty-bitmap:…` (qemu's docs, interop/nbd). */
const STATE_CHANGED = 1;

/** What is asked of extents() and changed(). */
export interface StatusOptions {
  /** By default 0. */
  readonly offset?: number;
  /** By default up to the end of the export. */
  readonly length?: number;
  /** Ends the iteration with NbdClientError ABORTED. */
  readonly signal?: AbortSignal;
  /** The longest range to ask for at once, bytes; by default 2 GiB. It is rounded up to the block size. */
  readonly chunkBytes?: number;
}

/** A range that has changed. */
export interface ChangedRange {
  readonly offset: number;
  readonly length: number;
}

/** What the iterators need of a client. */
export interface StatusSource {
  readonly details: { readonly size: number; readonly minimumBlockSize: number } | undefined;
  blockStatus(
    context: string,
    offset: number,
    length: number,
    options?: { readonly signal?: AbortSignal },
  ): Promise<Extent[]>;
}

/** The extents as the server reports them: neighbours may have the same flags. */
export async function* reportedExtents(
  source: StatusSource,
  context: string,
  options: StatusOptions = {},
): AsyncGenerator<Extent, void, undefined> {
  const { offset = 0, signal } = options;
  const wantedBytes = checkedCount(options.chunkBytes, 'chunkBytes', DEFAULT_CHUNK_BYTES);
  checkSignal(signal);
  const { details } = source;
  if (details === undefined) throw new NbdClientError('CLOSED', `the extents of ${context}: no export is open`);
  const { length = Math.max(0, details.size - offset) } = options;
  checkNumber(offset, 'offset');
  checkNumber(length, 'length');
  const isRange = Number.isSafeInteger(offset) && offset >= 0 && Number.isSafeInteger(length) && length >= 0;
  if (!isRange || length > details.size || offset > details.size - length) {
    const what = `the extents of ${length} bytes at ${offset}`;
    throw new NbdClientError('EINVAL', `${what}: not a range of the export, which has ${details.size} bytes`);
  }
  const end = offset + length;
  const chunkBytes = Math.ceil(wantedBytes / details.minimumBlockSize) * details.minimumBlockSize;
  for (let at = offset; at < end;) {
    const before = at;
    for (const extent of await source.blockStatus(context, at, Math.min(chunkBytes, end - at), { signal })) {
      at = extent.offset + extent.length;
      yield extent;
    }
    // Otherwise a server could keep the caller busy for ever.
    if (at <= before) throw new NbdClientError('PROTOCOL', `a block status of ${context} at ${before} without extents`);
  }
}

/** See NbdClient.extents. */
export async function* wholeExtents(
  source: StatusSource,
  context: string = ALLOCATION_CONTEXT,
  options?: StatusOptions,
): AsyncGenerator<Extent, void, undefined> {
  let joined: Extent | undefined;
  for await (const extent of reportedExtents(source, context, options)) {
    if (joined?.flags === extent.flags) {
      joined = { offset: joined.offset, length: joined.length + extent.length, flags: joined.flags };
      continue;
    }
    if (joined !== undefined) yield joined;
    joined = extent;
  }
  if (joined !== undefined) yield joined;
}

/** See NbdClient.changed. */
export async function* changedRanges(
  source: StatusSource,
  context: string,
  options?: StatusOptions,
): AsyncGenerator<ChangedRange, void, undefined> {
  let joined: ChangedRange | undefined;
  for await (const { offset, length, flags } of reportedExtents(source, context, options)) {
    if (flags % 2 !== STATE_CHANGED) {
      if (joined !== undefined) yield joined;
      joined = undefined;
    } else {
      joined = joined === undefined ? { offset, length } : { offset: joined.offset, length: joined.length + length };
    }
  }
  if (joined !== undefined) yield joined;
}
