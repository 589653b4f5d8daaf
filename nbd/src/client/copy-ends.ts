/**
 * The two ends of a copy: an open client, or a device of this process, behind one small interface. It owns the differences
 * between them; what is copied, and in which order, is not its business.
 */

import { ALLOCATION_CONTEXT, type Geometry } from '../block-device.js';
import { completeDevice, type AnyDevice } from '../device.js';
import { readShortfall, writeShortfall } from '../transferred.js';
import { kindOf } from '../kinds.js';
import { NbdClientError } from './client-error.js';
import type { ExportDetails } from './export-details.js';
import type { Extent } from './reply-reader.js';
import { reportedExtents, type StatusSource } from './status-iteration.js';

/** Extents that a device is asked for at once. */
const EXTENTS_AT_ONCE = 4096;

interface Signalled {
  readonly signal?: AbortSignal;
}

/** What copy() uses of a client with an open export: NbdClient and ReconnectingClient have it. */
export interface CopyClient extends StatusSource {
  readonly details: ExportDetails | undefined;
  readonly contexts: readonly string[];
  readInto(offset: number, into: Uint8Array, options?: Signalled): Promise<void>;
  write(offset: number, data: Uint8Array, options?: Signalled): Promise<void>;
  zero(offset: number, length: number, options?: Signalled): Promise<void>;
  flush(options?: Signalled): Promise<void>;
}

/** One end. All methods reject and none throws. */
export interface CopyEnd {
  readonly size: number;
  /** Requests begin and end at multiples of it, bytes. */
  readonly blockSize: number;
  readonly readOnly: boolean;
  read(offset: number, into: Buffer, signal: AbortSignal): Promise<void>;
  write(offset: number, data: Buffer, signal: AbortSignal): Promise<void>;
  flush(signal: AbortSignal): Promise<void>;
  /** Undefined if it can only write zeros. */
  readonly zero: ((offset: number, length: number, signal: AbortSignal) => Promise<void>) | undefined;
  /** The extents of base:allocation; undefined if it has none. */
  readonly extents: ((signal: AbortSignal) => AsyncIterable<Extent>) | undefined;
}

/** Errors: TypeError; NbdClientError CLOSED (a client without an open export). */
export function copyEnd(given: CopyClient | AnyDevice, which: string): CopyEnd {
  if (typeof given !== 'object' || (given as unknown) === null) {
    throw new TypeError(`${which} of a copy must be an open client or a device, not ${kindOf(given)}`);
  }
  if ('readInto' in given) return clientEnd(given, which);
  if (typeof (given as Partial<AnyDevice>).read !== 'function') {
    throw new TypeError(`${which} of a copy must be an open client or a device: it has no method read`);
  }
  return deviceEnd(given, which);
}

function clientEnd(client: CopyClient, which: string): CopyEnd {
  const { details } = client;
  if (details === undefined) throw new NbdClientError('CLOSED', `${which} of a copy: no export is open`);
  return {
    size: details.size,
    blockSize: details.minimumBlockSize,
    readOnly: details.readOnly,
    read: (offset, into, signal) => client.readInto(offset, into, { signal }),
    write: (offset, data, signal) => client.write(offset, data, { signal }),
    // A server that cannot flush has nothing to be flushed.
    flush: (signal) => (details.canFlush ? client.flush({ signal }) : Promise.resolve()),
    zero: details.canZero ? (offset, length, signal) => client.zero(offset, length, { signal }) : undefined,
    extents: client.contexts.includes(ALLOCATION_CONTEXT)
      ? (signal) => reportedExtents(client, ALLOCATION_CONTEXT, { signal })
      : undefined,
  };
}

function deviceEnd(given: AnyDevice, which: string): CopyEnd {
  const device = completeDevice(given);
  const { geometry } = device;
  refuseGeometry(geometry, which);
  const mode = { fua: false, noHole: false, fastZero: false };
  return {
    size: geometry.size,
    blockSize: geometry.minimumBlockSize,
    readOnly: geometry.readOnly,
    async read(offset, into, signal) {
      if (device.fillsBuffer !== true) into.fill(0);
      refuseShortfall(readShortfall(await device.read(offset, into, signal), into), `read at ${offset}`);
    },
    async write(offset, data, signal) {
      refuseShortfall(
        writeShortfall(await device.write(offset, data, false, signal), data.length),
        `write at ${offset}`,
      );
    },
    async flush(signal) {
      if (geometry.canFlush) await device.flush(signal);
    },
    zero: geometry.canZero ? async (offset, length, signal) => device.zero(offset, length, mode, signal) : undefined,
    extents: geometry.contexts.includes(ALLOCATION_CONTEXT)
      ? (signal) => reportedExtents(statusOf(device, signal), ALLOCATION_CONTEXT)
      : undefined,
  };
}

/** Block statuses of a device. */
function statusOf(device: ReturnType<typeof completeDevice>, signal: AbortSignal): StatusSource {
  return {
    details: device.geometry,
    async blockStatus(context, offset, length) {
      const found: Extent[] = [];
      const end = offset + length;
      let reached = offset;
      let breach: string | undefined;
      const sink = (at: number, count: number, flags: number): boolean => {
        if (reached === end) return false;
        if (at !== reached || !(count > 0) || !Number.isSafeInteger(flags)) {
          breach ??= `${count} bytes at ${at} with flags ${flags}, expected was an extent at ${reached}`;
          reached = end;
          return false;
        }
        if (found.length === EXTENTS_AT_ONCE) return false;
        const counted = Math.min(count, end - at);
        found.push({ offset: at, length: counted, flags });
        reached += counted;
        return reached < end;
      };
      await device.extents(context, offset, length, sink, signal);
      // It gets no more: what it reports later counts for nothing.
      reached = end;
      // Those before the first mistake are used, as the server does.
      if (found.length === 0) {
        throw new NbdClientError('EIO', `the device reported ${breach ?? 'no extent'} (extents of ${context})`);
      }
      return found;
    },
  };
}

/** The plan is made from these: with a size of NaN nothing would be copied, and no error be seen. */
function refuseGeometry({ size, minimumBlockSize: block }: Geometry, which: string): void {
  if (!Number.isSafeInteger(size) || size < 0) {
    const found = typeof size === 'number' ? String(size) : kindOf(size);
    throw new TypeError(`the size of ${which} of a copy must be a whole number from 0 to 2^53-1, not ${found}`);
  }
  if (!Number.isInteger(block) || block < 1 || (block & (block - 1)) !== 0) {
    throw new TypeError(`minimumBlockSize of ${which} of a copy must be a power of two, not ${String(block)}`);
  }
}

function refuseShortfall(shortfall: string | undefined, what: string): void {
  if (shortfall !== undefined) throw new NbdClientError('EIO', `${what}: ${shortfall}`);
}
