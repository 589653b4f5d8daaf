/**
 * The small interface of a device, `Device`, and its completion to the full one, which the server and the filters use. It owns
 * what is announced for a device that announces nothing itself, FUA by flush and zeros by write; it knows no connection.
 */

import {
  ALLOCATION_CONTEXT,
  DeviceError,
  type Awaitable,
  type BlockDevice,
  type CompleteDevice,
  type DeviceGeometry,
  type Ending,
  type ExtentSink,
  type Geometry,
  type Transferred,
  type ZeroMode,
} from './block-device.js';
import { LoopSlice, LoopSlices } from './loop-slices.js';
import { awaited } from './promised.js';
import { writeShortfall } from './transferred.js';

/** A page of most systems, and the block of most filesystems, bytes. */
const DEFAULT_PREFERRED_BLOCK_SIZE = 4096;
/** Zeros are written in pieces of this size, bytes: a multiple of every minimum block size. */
const ZERO_PIECE_BYTES = 1024 * 1024;

/** Zeros that are written, for all clients: one request may be for 4 GiB, and a device in memory answers each piece at once. */
const zeroSlices = new LoopSlices();

/**
 * A device as small as it can be: only `size`, in bytes, and `read` are required. The methods that it has are announced;
 * without `write` it is read-only. With `write` and `flush` a write with FUA is followed by a flush, and with `write` alone
 * zeros are written where a client asks for them. The fields of Geometry may stand beside the methods, and count more than
 * what follows from the methods: with `canFua: true`, for example, `write`, `zero` and `trim` obey `fua` themselves.
 * With `extents`, `contexts` is `['base:allocation']` if it is not given.
 */
export interface Device
  extends
    DeviceGeometry,
    Pick<BlockDevice, 'read' | 'isHole' | 'fillsBuffer'>,
    Partial<Pick<BlockDevice, 'write' | 'flush' | 'zero' | 'trim' | 'cache' | 'extents' | 'close'>> {}

/** A device of either interface. */
export type AnyDevice = Device | BlockDevice;

/** `given` with its defaults, frozen: later changes by the device have no effect. */
export function completeGeometry(given: DeviceGeometry): Geometry {
  const { size, minimumBlockSize = 1, contexts = [], wideContexts = [] } = given;
  return Object.freeze({
    size,
    minimumBlockSize,
    preferredBlockSize: given.preferredBlockSize ?? Math.max(minimumBlockSize, DEFAULT_PREFERRED_BLOCK_SIZE),
    readOnly: given.readOnly ?? false,
    canFlush: given.canFlush ?? true,
    canFua: given.canFua ?? false,
    canTrim: given.canTrim ?? false,
    canZero: given.canZero ?? false,
    canFastZero: given.canFastZero ?? false,
    canCache: given.canCache ?? false,
    multiConn: given.multiConn ?? false,
    rotational: given.rotational ?? false,
    contexts,
    wideContexts,
  });
}

/**
 * `device` with a whole geometry and all methods; a method that it neither has nor announces fails with ENOTSUP. A device of
 * the full interface behaves as before. What it answers later is a promise of the language, whatever the device returned.
 * Errors: TypeError if `device` has no method `read`.
 */
export function completeDevice(device: AnyDevice): CompleteDevice {
  return new CompletedDevice(device);
}

/** Whether `device` has the full interface, which is told by its geometry. */
export function isBlockDevice(device: AnyDevice): device is BlockDevice {
  return 'geometry' in device;
}

/** What a small device announces. */
function geometryOf(device: Device): Geometry {
  const readOnly = device.readOnly ?? device.write === undefined;
  const canFlush = device.canFlush ?? device.flush !== undefined;
  return completeGeometry({
    size: device.size,
    minimumBlockSize: device.minimumBlockSize,
    preferredBlockSize: device.preferredBlockSize,
    readOnly,
    canFlush,
    // Without flush nothing can be made durable; a read-only export has nothing to be made durable.
    canFua: device.canFua ?? (canFlush && !readOnly),
    canTrim: device.canTrim ?? (device.trim !== undefined && !readOnly),
    canZero: device.canZero ?? !readOnly,
    canFastZero: device.canFastZero,
    canCache: device.canCache ?? device.cache !== undefined,
    multiConn: device.multiConn,
    rotational: device.rotational,
    contexts: device.contexts ?? (device.extents === undefined ? [] : [ALLOCATION_CONTEXT]),
    wideContexts: device.wideContexts,
  });
}

class CompletedDevice implements CompleteDevice {
  readonly geometry: Geometry;
  readonly fillsBuffer: boolean;
  /** Only if the device has one: its presence says that it can be asked. */
  readonly isHole?: (offset: number, length: number) => boolean;
  readonly #inner: Partial<BlockDevice> & Pick<BlockDevice, 'read'>;
  /** FUA is announced, and the device does not know it. */
  readonly #flushesForFua: boolean;

  constructor(device: AnyDevice) {
    if (typeof (device as Partial<AnyDevice>).read !== 'function')
      throw new TypeError('a device has a method read; a promise of one must be awaited');
    this.#inner = device;
    if (isBlockDevice(device)) {
      this.geometry = completeGeometry(device.geometry);
      this.#flushesForFua = false;
    } else {
      this.geometry = geometryOf(device);
      this.#flushesForFua = this.geometry.canFua && device.canFua !== true;
    }
    this.fillsBuffer = device.fillsBuffer ?? false;
    if (device.isHole !== undefined) this.isHole = (offset, length) => device.isHole?.(offset, length) ?? false;
  }

  read(offset: number, into: Buffer, signal?: AbortSignal): Awaitable<Transferred> {
    return awaited(this.#inner.read(offset, into, signal));
  }

  write(offset: number, data: Buffer, fua: boolean, signal?: AbortSignal): Awaitable<Transferred> {
    const inner = this.#inner;
    if (inner.write === undefined) throw missing('write');
    if (!fua || !this.#flushesForFua) return awaited(inner.write(offset, data, fua, signal));
    return this.#writeAndFlush(offset, data, signal);
  }

  flush(signal?: AbortSignal): Awaitable<void> {
    return awaited(this.#inner.flush?.(signal));
  }

  zero(offset: number, length: number, mode: ZeroMode, signal?: AbortSignal): Awaitable<void> {
    const inner = this.#inner;
    if (inner.zero === undefined) {
      if (this.geometry.canZero && inner.write !== undefined) return this.#writeZeros(offset, length, mode, signal);
      throw missing('zero');
    }
    const answer = awaited(inner.zero(offset, length, mode, signal));
    return mode.fua && this.#flushesForFua ? this.#flushAfter(answer, signal) : answer;
  }

  trim(offset: number, length: number, fua: boolean, signal?: AbortSignal): Awaitable<void> {
    const inner = this.#inner;
    if (inner.trim === undefined) throw missing('trim');
    const answer = awaited(inner.trim(offset, length, fua, signal));
    return fua && this.#flushesForFua ? this.#flushAfter(answer, signal) : answer;
  }

  cache(offset: number, length: number, signal?: AbortSignal): Awaitable<void> {
    const inner = this.#inner;
    if (inner.cache === undefined) throw missing('cache');
    return awaited(inner.cache(offset, length, signal));
  }

  extents(context: string, offset: number, length: number, sink: ExtentSink, signal?: AbortSignal): Awaitable<void> {
    const inner = this.#inner;
    if (inner.extents === undefined) throw missing('extents');
    return awaited(inner.extents(context, offset, length, sink, signal));
  }

  close(ending: Ending): Awaitable<void> {
    return awaited(this.#inner.close?.(ending));
  }

  async #writeAndFlush(offset: number, data: Buffer, signal: AbortSignal | undefined): Promise<void> {
    await this.#writeWhole(offset, data, signal);
    await this.flush(signal);
  }

  async #flushAfter(answer: Awaitable<void>, signal: AbortSignal | undefined): Promise<void> {
    await answer;
    await this.flush(signal);
  }

  async #writeZeros(offset: number, length: number, mode: ZeroMode, signal: AbortSignal | undefined): Promise<void> {
    if (mode.fastZero) throw new DeviceError('ENOTSUP', 'zeros are written here, which is not fast');
    const end = offset + length;
    const zeros = Buffer.alloc(Math.min(ZERO_PIECE_BYTES, length));
    const slice = new LoopSlice(zeroSlices);
    for (let at = offset; at < end; at += ZERO_PIECE_BYTES) {
      if (slice.isOver) await slice.next();
      signal?.throwIfAborted();
      // A device may have written into what it was given.
      if (at > offset) zeros.fill(0);
      await this.#writeWhole(at, zeros.subarray(0, end - at), signal);
    }
    if (mode.fua) await this.flush(signal);
  }

  /** Errors: DeviceError EIO if the device says that it has written less. */
  async #writeWhole(offset: number, data: Buffer, signal: AbortSignal | undefined): Promise<void> {
    const shortfall = writeShortfall(await awaited(this.#inner.write?.(offset, data, false, signal)), data.length);
    if (shortfall !== undefined) throw new DeviceError('EIO', shortfall);
  }
}

function missing(method: string): DeviceError {
  return new DeviceError('ENOTSUP', `the device has no method ${method}`);
}
