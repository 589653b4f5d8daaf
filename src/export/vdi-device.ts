/**
 * A VDI as the block device that nbd/ serves: one device for each connection, over the Vdi that all of them share. Owns the
 * connection's geometry, which stays as it was at the start, and the translation of store errors into device errors. Reading and
 * writing is the hot path: a request that is served at once allocates nothing here.
 */
import type { VdiRecord } from '../store/vdi-record.js';
import {
  ALLOCATION_CONTEXT,
  DeviceError,
  STATE_HOLE,
  STATE_ZERO,
  type Awaitable,
  type BlockDevice,
  type DeviceErrorCode,
  type Ending,
  type ExtentSink,
  type Geometry,
  type Peer,
  type ZeroMode,
} from 'nbd-server-ts/block-device';
import type { ConnectionSpan } from '../vdi/client-connections.js';
import { specOf } from '../vdi/names.js';
import type { Vdi } from '../vdi/vdi.js';
import { deviceFailures, type DeviceFailure } from './device-failures.js';
import { baseOfContext, changedContexts } from './changed-contexts.js';
import { clientMessage } from './client-messages.js';
import type { Claim } from './writer-claim.js';

const PREFERRED_BLOCK_SIZE = 4096;
/** Bit 0 of the contexts of changed-contexts.ts. */
const STATE_CHANGED = 1;

/** Devices opened so far, in this process. */
let opened = 0;

/** How a device's client has left. */
export interface Closing {
  readonly ending: Ending;
  /** It got an error that may be cured, and has sent no request since: it may try again on another connection. */
  readonly hadErrors: boolean;
  readonly hasWritten: boolean;
  readonly span: ConnectionSpan;
  /** It was refused after all, and never had the device. */
  readonly isRefused: boolean;
}

/** What a device is given beside its VDI. */
export interface DeviceSetup {
  /** Tags of the snapshots whose changed-contexts are announced to clients, newest first. Others can be opened too. */
  readonly tags: readonly string[];
  /** Nothing of the VDI may be changed. */
  readonly isReadOnly: boolean;
  /** The client is a command of ours, and gets the operator's messages. */
  readonly isOurs?: boolean;
  /** Of a client that may write; undefined if other writers do not matter. */
  readonly claim?: Claim | undefined;
  /** As the client gave it. */
  readonly exportName: string;
  readonly peer: Peer;
  openBase(tag: string): Promise<Vdi>;
  releaseBase(vdi: Vdi, closing: Closing): Promise<void>;
  /** The device is closed: release the VDI. */
  close(closing: Closing): Awaitable<void>;
}

/**
 * The geometry of an export of this VDI. `tags`: of the snapshots whose changed-contexts it has. `isReadOnly`: it must not be
 * changed. `isExclusive`: one connection writes, so no multi-conn: several connections of a client would be a writer and readers.
 */
export function geometryOf(
  record: VdiRecord,
  tags: readonly string[],
  isReadOnly: boolean,
  isExclusive = false,
): Geometry {
  const writable = !record.isSnapshot && !isReadOnly;
  return {
    size: record.size,
    minimumBlockSize: 1,
    preferredBlockSize: PREFERRED_BLOCK_SIZE,
    readOnly: !writable,
    canFlush: writable,
    canFua: writable,
    canTrim: writable,
    canZero: writable,
    // Zeroing changes maps and punches holes. A range that would need more than that fails with ENOTSUP.
    canFastZero: writable,
    canCache: true,
    multiConn: !isExclusive,
    rotational: false,
    contexts: [ALLOCATION_CONTEXT, ...tags.flatMap(changedContexts)],
  };
}

export class VdiDevice implements BlockDevice {
  readonly geometry: Geometry;
  readonly fillsBuffer = true;
  readonly #vdi: Vdi;
  readonly #setup: DeviceSetup;
  /** Bases opened so far, by tag: held until the device is closed, so that they cannot be deleted meanwhile. */
  readonly #opened = new Map<string, Promise<Vdi>>();
  readonly #openedAs = ++opened;
  /** `opened` at the last request; negative if there was no request since an error. */
  #lastRequest = this.#openedAs;
  #hasWritten = false;
  /** The claim allows it to write, and has not been fenced since. */
  #isWriting = false;

  constructor(vdi: Vdi, setup: DeviceSetup) {
    this.#vdi = vdi;
    this.#setup = setup;
    const { tags, isReadOnly, claim } = setup;
    this.geometry = geometryOf(vdi.record, tags, isReadOnly, claim?.isExclusive);
    if (claim) claim.onFenced = () => (this.#isWriting = false);
  }

  readonly #rethrow = (error: unknown): never => {
    const told = asDeviceError(error, this.#setup.isOurs === true);
    // Refusing a FAST_ZERO that would be slow is no failure.
    if (told.code !== 'ENOTSUP' && deviceFailures.hasSubscribers) {
      const { exportName, peer } = this.#setup;
      const disk = specOf(this.#vdi.record);
      deviceFailures.publish({ code: told.code, error, disk, exportName, peer } satisfies DeviceFailure);
    }
    if (mayBeCured(error, told)) this.#lastRequest = -Math.abs(this.#lastRequest);
    throw told;
  };

  read(offset: number, into: Buffer): Awaitable<void> {
    this.#lastRequest = opened;
    try {
      const later = this.#vdi.read(offset, into);
      return later?.catch(this.#rethrow);
    } catch (error) {
      this.#rethrow(error);
    }
  }

  write(offset: number, data: Buffer, fua: boolean): Awaitable<void> {
    this.#lastRequest = opened;
    try {
      if (!this.#isWriting) this.#beginWriting();
      const later = this.#vdi.write(offset, data, fua);
      return later?.catch(this.#rethrow);
    } catch (error) {
      this.#rethrow(error);
    }
  }

  zero(offset: number, length: number, mode: ZeroMode): Awaitable<void> {
    this.#lastRequest = opened;
    try {
      if (!this.#isWriting) this.#beginWriting();
      const later = this.#vdi.zero(offset, length, mode);
      return later?.catch(this.#rethrow);
    } catch (error) {
      this.#rethrow(error);
    }
  }

  #beginWriting(): void {
    this.#setup.claim?.beginWriting();
    this.#hasWritten = true;
    this.#isWriting = true;
  }

  trim(offset: number, length: number, fua: boolean): Awaitable<void> {
    return this.zero(offset, length, { noHole: false, fua, fastZero: false });
  }

  flush(): Awaitable<void> {
    this.#lastRequest = opened;
    try {
      const later = this.#vdi.flush();
      return later?.catch(this.#rethrow);
    } catch (error) {
      this.#rethrow(error);
    }
  }

  cache(offset: number, length: number): Awaitable<void> {
    this.#lastRequest = opened;
    try {
      const later = this.#vdi.cache(offset, length);
      return later?.catch(this.#rethrow);
    } catch (error) {
      this.#rethrow(error);
    }
  }

  extents(context: string, offset: number, length: number, sink: ExtentSink): Awaitable<void> {
    this.#lastRequest = opened;
    if (context !== ALLOCATION_CONTEXT) return this.#changes(context, offset, length, sink).catch(this.#rethrow);
    try {
      const later = this.#vdi.extents(offset, length, (at, size, hole) =>
        sink(at, size, hole ? STATE_HOLE | STATE_ZERO : 0),
      );
      return later?.catch(this.#rethrow);
    } catch (error) {
      this.#rethrow(error);
    }
  }

  async #changes(context: string, offset: number, length: number, sink: ExtentSink): Promise<void> {
    const tag = baseOfContext(context);
    if (tag === undefined) throw new Error(`invariant: ${context} is no context of a VDI`);
    const base = await this.hold(tag);
    const report = (at: number, size: number, changed: boolean): boolean => sink(at, size, changed ? STATE_CHANGED : 0);
    await this.#vdi.changedSince(base, offset, length, report);
  }

  /** The snapshot TAG, which cannot be deleted until the device is closed. Errors: those of `DeviceSetup.openBase`. */
  hold(tag: string): Promise<Vdi> {
    const known = this.#opened.get(tag);
    if (known) return known;
    const base = this.#setup.openBase(tag);
    this.#opened.set(tag, base);
    // The next call tries again.
    base.catch(() => this.#opened.delete(tag));
    return base;
  }

  isHole(offset: number, length: number): boolean {
    return this.#vdi.isHole(offset, length);
  }

  close(ending: Ending): Promise<void> {
    return this.#end({ ...this.#state(), ending, isRefused: false });
  }

  /** In place of `close`, if the client does not get the device after all. */
  refuse(): Promise<void> {
    return this.#end({ ...this.#state(), ending: 'disconnect', isRefused: true });
  }

  #state(): Pick<Closing, 'hadErrors' | 'hasWritten' | 'span'> {
    const hadErrors = this.#lastRequest < 0;
    const span = { opened: this.#openedAs, lastRequest: Math.abs(this.#lastRequest) };
    return { hadErrors, hasWritten: this.#hasWritten, span };
  }

  async #end(closing: Closing): Promise<void> {
    const { claim } = this.#setup;
    // No request is in flight: the next writer need not wait until the bases are closed.
    claim?.fence();
    claim?.end();
    try {
      const opened = await Promise.allSettled(this.#opened.values());
      for (const base of opened) if (base.status === 'fulfilled') await this.#setup.releaseBase(base.value, closing);
    } finally {
      await this.#setup.close(closing);
    }
  }
}

const DEVICE_CODES: Readonly<Record<string, DeviceErrorCode>> = {
  NO_SPACE: 'ENOSPC',
  BEHIND_END: 'EINVAL',
  PERMISSION: 'EPERM',
  BUSY: 'EPERM',
  CLOSED: 'ESHUTDOWN',
  SLOW: 'ENOTSUP',
};

/**
 * Whether the same request may succeed on another connection, which some clients try (nbdkit's retry filter). A FAST_ZERO that
 * would be slow stays slow, and damaged data stays damaged.
 */
function mayBeCured(error: unknown, told: DeviceError): boolean {
  return told.code !== 'ENOTSUP' && (error as { code?: string }).code !== 'DAMAGED';
}

function asDeviceError(error: unknown, isOurs: boolean): DeviceError {
  const { code: reason, message } = error as { code?: string; message: string };
  const code = DEVICE_CODES[reason ?? ''] ?? 'EIO';
  return new DeviceError(code, isOurs ? message : clientMessage(error), { cause: error });
}
