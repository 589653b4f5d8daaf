/**
 * A filter for tests that makes wrong use of memory visible: a device that keeps the data of a write, or still fills the
 * memory of a read, after its call has settled. Both then have a private copy, which is overwritten when the call settles. In
 * operation such a device would write or read the data of other requests, and only sometimes.
 */

import type { Awaitable, BlockDevice, DeviceGeometry, Ending, ExportProvider, Transferred } from '../block-device.js';
import { completeDevice, isBlockDevice, type AnyDevice } from '../device.js';
import { promiseOf } from '../promised.js';
import { DETACHED, isDetached, readShortfall, writeShortfall } from '../transferred.js';

/** What overwritten memory reads as: "POISONED", again and again. */
const POISON = 'POISONED';

/** The same exports; their devices get memory that is overwritten as soon as it is no longer theirs. */
export function poisoned(provider: ExportProvider<AnyDevice>): ExportProvider<AnyDevice> {
  return {
    list: (peer) => provider.list(peer),
    describe: (name, peer, contexts, context) => provider.describe(name, peer, contexts, context),
    left: (peer) => provider.left?.(peer),
    async open(name, peer, context) {
      const opened = await provider.open(name, peer, context);
      const { device }: { readonly device: unknown } = opened;
      // The server says what is wrong with anything else.
      if (typeof device !== 'object' || device === null) return opened;
      try {
        return { device: poisonedDevice(opened.device), info: opened.info };
      } catch (error) {
        await opened.device.close?.('lost');
        throw error;
      }
    },
  };
}

function poisonedDevice(device: AnyDevice): BlockDevice {
  return new PoisonedDevice(isBlockDevice(device) ? device : completeDevice(device));
}

class PoisonedDevice implements BlockDevice {
  readonly geometry: DeviceGeometry;
  /** The server clears the memory otherwise; `read` does it here. */
  readonly fillsBuffer = true;
  readonly zero: BlockDevice['zero'];
  readonly trim: BlockDevice['trim'];
  readonly cache: BlockDevice['cache'];
  readonly extents: BlockDevice['extents'];
  readonly isHole: BlockDevice['isHole'];
  readonly #inner: BlockDevice;

  constructor(inner: BlockDevice) {
    this.#inner = inner;
    this.geometry = inner.geometry;
    this.zero = inner.zero?.bind(inner);
    this.trim = inner.trim?.bind(inner);
    this.cache = inner.cache?.bind(inner);
    this.extents = inner.extents?.bind(inner);
    this.isHole = inner.isHole?.bind(inner);
  }

  read(offset: number, into: Buffer, signal?: AbortSignal): Awaitable<Transferred> {
    const own = Buffer.alloc(into.length);
    // A device that says it fills its memory, and does not, shows it.
    if (this.#inner.fillsBuffer === true) own.fill(POISON);
    return whenSettled(
      () => this.#inner.read(offset, own, signal),
      (result) => {
        if (isDetached(own, into.length)) throw new Error(DETACHED);
        const shortfall = readShortfall(result, own);
        own.copy(into);
        own.fill(POISON);
        if (shortfall !== undefined) throw new Error(shortfall);
      },
    );
  }

  write(offset: number, data: Buffer, fua: boolean, signal?: AbortSignal): Awaitable<Transferred> {
    // Not in Node's pool, which cannot be transferred: a device that does so is found.
    const own = Buffer.alloc(data.length);
    own.set(data);
    const { length } = own;
    return whenSettled(
      () => this.#inner.write(offset, own, fua, signal),
      (result) => {
        if (isDetached(own, length)) throw new Error(DETACHED);
        own.fill(POISON);
        const shortfall = writeShortfall(result, length);
        if (shortfall !== undefined) throw new Error(shortfall);
      },
    );
  }

  flush(signal?: AbortSignal): Awaitable<void> {
    return this.#inner.flush(signal);
  }

  close(ending: Ending): Awaitable<void> {
    return this.#inner.close(ending);
  }
}

/** Call the device, and `settled` with its result; with undefined if it fails. Errors: the device's, or those of `settled`. */
function whenSettled(call: () => unknown, settled: (result?: unknown) => void): Awaitable<void> {
  let answer: unknown;
  let later: Promise<unknown> | undefined;
  try {
    answer = call();
    later = promiseOf(answer);
  } catch (error) {
    settled();
    throw error;
  }
  if (later === undefined) return settled(answer);
  return later.then(settled, (error: unknown) => {
    settled();
    throw error;
  });
}
