/**
 * One connection's part of a device that several connections share: the same methods, and a `close` of its own. It owns that
 * this close counts once; what follows from it is for the one who made the handle.
 */

import type { Awaitable, CompleteDevice, Ending, ExtentSink, Geometry, Transferred, ZeroMode } from './block-device.js';
import type { AnyDevice } from './device.js';

/** `device` as a connection has it. Its geometry is given: it is the device's with what follows from sharing. */
export class DeviceHandle implements CompleteDevice {
  readonly geometry: Geometry;
  readonly fillsBuffer: boolean;
  /** Only if the device has one: its presence says that it can be asked. */
  readonly isHole?: (offset: number, length: number) => boolean;
  readonly #device: CompleteDevice;
  readonly #onClose: (ending: Ending) => Awaitable<void>;
  #isClosed = false;

  /** `onClose` is called once, when the connection closes the handle; its errors are those of `close`. */
  constructor(device: CompleteDevice, geometry: Geometry, onClose: (ending: Ending) => Awaitable<void>) {
    this.#device = device;
    this.#onClose = onClose;
    this.geometry = geometry;
    this.fillsBuffer = device.fillsBuffer ?? false;
    if (device.isHole !== undefined) this.isHole = (offset, length) => device.isHole?.(offset, length) ?? false;
  }

  read(offset: number, into: Buffer, signal?: AbortSignal): Awaitable<Transferred> {
    return this.#device.read(offset, into, signal);
  }

  write(offset: number, data: Buffer, fua: boolean, signal?: AbortSignal): Awaitable<Transferred> {
    return this.#device.write(offset, data, fua, signal);
  }

  flush(signal?: AbortSignal): Awaitable<void> {
    return this.#device.flush(signal);
  }

  zero(offset: number, length: number, mode: ZeroMode, signal?: AbortSignal): Awaitable<void> {
    return this.#device.zero(offset, length, mode, signal);
  }

  trim(offset: number, length: number, fua: boolean, signal?: AbortSignal): Awaitable<void> {
    return this.#device.trim(offset, length, fua, signal);
  }

  cache(offset: number, length: number, signal?: AbortSignal): Awaitable<void> {
    return this.#device.cache(offset, length, signal);
  }

  extents(context: string, offset: number, length: number, sink: ExtentSink, signal?: AbortSignal): Awaitable<void> {
    return this.#device.extents(context, offset, length, sink, signal);
  }

  close(ending: Ending): Awaitable<void> {
    if (this.#isClosed) return;
    this.#isClosed = true;
    return this.#onClose(ending);
  }
}

/**
 * The geometry of `device`, completed as `complete`, when one object answers all connections: unless the device itself says
 * otherwise, `multiConn` is announced.
 *
 * That holds for any such object (proto.md, NBD_FLAG_CAN_MULTI_CONN). A reply to a write leaves after the device has answered
 * it; a flush that the client sends then, on whatever connection, reaches the same object later, and makes durable all writes
 * answered before, because the object does not know connections. It does not hold if the object hands its calls to others
 * with caches of their own, one for each signal for instance: such a device says `multiConn: false`.
 */
export function sharedGeometry(device: AnyDevice, complete: CompleteDevice): Geometry {
  const said = 'geometry' in device ? device.geometry.multiConn : device.multiConn;
  return Object.freeze({ ...complete.geometry, multiConn: said ?? true });
}
