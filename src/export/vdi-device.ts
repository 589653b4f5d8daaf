/**
 * A VDI as the block device that nbd/ serves: fixes the geometry for the life of a connection and turns store errors
 * into device errors. One per connection; what they share is the Vdi behind them.
 */
import {
  ALLOCATION_CONTEXT,
  DeviceError,
  STATE_HOLE,
  STATE_ZERO,
  type Awaitable,
  type BlockDevice,
  type DeviceErrorCode,
  type ExtentSink,
  type Geometry,
  type ZeroMode,
} from 'nbd-server-ts';
import type { VdiRecord, Vdi } from '../vdi/vdi.js';

const PREFERRED_BLOCK_SIZE = 4096;
const CONTEXTS = [ALLOCATION_CONTEXT];

/** How an export of this VDI looks. */
export function geometryOf(record: VdiRecord): Geometry {
  const writable = !record.isSnapshot;
  return {
    size: record.size,
    minimumBlockSize: 1,
    preferredBlockSize: PREFERRED_BLOCK_SIZE,
    readOnly: !writable,
    canFlush: writable,
    canFua: writable,
    canTrim: writable,
    canZero: writable,
    // Zeroing changes maps and punches holes; what would need more than that is refused with ENOTSUP.
    canFastZero: writable,
    canCache: true,
    multiConn: true,
    rotational: false,
    contexts: CONTEXTS,
  };
}

export class VdiDevice implements BlockDevice {
  readonly geometry: Geometry;
  readonly #vdi: Vdi;
  readonly #onClose: () => Awaitable<void>;

  constructor(vdi: Vdi, onClose: () => Awaitable<void>) {
    this.#vdi = vdi;
    this.geometry = geometryOf(vdi.record);
    this.#onClose = onClose;
  }

  read(offset: number, into: Buffer): Awaitable<void> {
    try {
      const later = this.#vdi.read(offset, into);
      return later?.catch(rethrow);
    } catch (error) {
      rethrow(error);
    }
  }

  write(offset: number, data: Buffer, fua: boolean): Awaitable<void> {
    try {
      const later = this.#vdi.write(offset, data, fua);
      return later?.catch(rethrow);
    } catch (error) {
      rethrow(error);
    }
  }

  zero(offset: number, length: number, mode: ZeroMode): Awaitable<void> {
    try {
      const later = this.#vdi.zero(offset, length, mode);
      return later?.catch(rethrow);
    } catch (error) {
      rethrow(error);
    }
  }

  trim(offset: number, length: number, fua: boolean): Awaitable<void> {
    return this.zero(offset, length, { noHole: false, fua, fastZero: false });
  }

  flush(): Awaitable<void> {
    try {
      const later = this.#vdi.flush();
      return later?.catch(rethrow);
    } catch (error) {
      rethrow(error);
    }
  }

  cache(offset: number, length: number): Awaitable<void> {
    try {
      const later = this.#vdi.cache(offset, length);
      return later?.catch(rethrow);
    } catch (error) {
      rethrow(error);
    }
  }

  extents(_context: string, offset: number, length: number, sink: ExtentSink): Awaitable<void> {
    return this.#vdi
      .extents(offset, length, (at, size, hole) => sink(at, size, hole ? STATE_HOLE | STATE_ZERO : 0))
      ?.catch(rethrow);
  }

  isHole(offset: number, length: number): boolean {
    return this.#vdi.isHole(offset, length);
  }

  close(): Awaitable<void> {
    return this.#onClose();
  }
}

const DEVICE_CODES: Readonly<Record<string, DeviceErrorCode>> = {
  NO_SPACE: 'ENOSPC',
  PERMISSION: 'EPERM',
  CLOSED: 'ESHUTDOWN',
  SLOW: 'ENOTSUP',
};

function rethrow(error: unknown): never {
  const { code, message } = error as { code?: string; message: string };
  throw new DeviceError(DEVICE_CODES[code ?? ''] ?? 'EIO', message, { cause: error });
}
