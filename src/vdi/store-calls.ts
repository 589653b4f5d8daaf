/**
 * Every data call of src/vdi to a store. Owns the checks of what a caller must keep (src/store/open-vdi.ts), for all stores
 * alike: ranges lie inside the object or the disk, the VDI is open and writable, only an exclusive object is changed in place,
 * and an entry of the map gets the vid under which its object was just made. A store need not check them again: some nodes
 * would take a write behind the end of an object.
 *
 * Called for each request: comparisons only, no closures, no promises of its own.
 */
import type { DiskVdi, ExtentSink, ObjectReader, ObjectVdi, ZeroOptions } from '../store/open-vdi.js';
import { behindEndError, StoreError } from '../store/store-error.js';
import type { Awaitable, VdiRecord } from '../store/vdi-record.js';

const NOTHING = Buffer.alloc(0);

export class ObjectCalls implements ObjectReader {
  readonly #vdi: ObjectVdi;
  readonly #objectSize: number;
  /** Why the store cannot be changed; undefined if it can. */
  readonly #readOnlyBecause: string | undefined;
  #isClosed = false;

  constructor(vdi: ObjectVdi, readOnlyBecause: string | undefined) {
    this.#vdi = vdi;
    this.#objectSize = 2 ** vdi.record.blockSizeShift;
    this.#readOnlyBecause = readOnlyBecause;
  }

  readObject(vid: number, idx: number, offset: number, into: Buffer): Awaitable<void> {
    this.#checkRead(vid, idx, offset, into.length);
    return this.#vdi.readObject(vid, idx, offset, into);
  }

  cacheObject(vid: number, idx: number, offset: number, length: number): Awaitable<void> {
    this.#checkRead(vid, idx, offset, length);
    return this.#vdi.cacheObject(vid, idx, offset, length);
  }

  objectExtents(vid: number, idx: number, offset: number, length: number, sink: ExtentSink): Awaitable<void> {
    this.#checkRead(vid, idx, offset, length);
    return this.#vdi.objectExtents(vid, idx, offset, length, sink);
  }

  /** Errors: PERMISSION, NO_SPACE behind the end of a disk that others have shrunk, MOVED, IO. */
  writeObject(idx: number, offset: number, data: Buffer): Awaitable<void> {
    this.#checkInPlace(idx, offset, data.length);
    return this.#vdi.writeObject(idx, offset, data);
  }

  /** Errors: as `writeObject`. */
  zeroObject(idx: number, offset: number, length: number, options: ZeroOptions): Awaitable<void> {
    this.#checkInPlace(idx, offset, length);
    return this.#vdi.zeroObject(idx, offset, length, options);
  }

  /**
   * Make the object at idx and point the map at it; `copyOf` as in ObjectVdi.createObject. Object first, map entry second: a
   * crash in between leaves an object that no map refers to. Errors: as `writeObject`.
   */
  makeObject(idx: number, offset: number, data: Buffer, copyOf: number): Awaitable<void> {
    this.#checkChange(idx, offset, data.length);
    // The object's vid: in a cluster `creationVid` may be another one by the time the object is there.
    const { creationVid } = this.#vdi;
    const later = this.#vdi.createObject(idx, offset, data, copyOf);
    if (later === undefined) return this.#vdi.setOwner(idx, creationVid);
    return later.then(() => this.#vdi.setOwner(idx, creationVid));
  }

  /** A new object of zeros. */
  makeEmptyObject(idx: number): Awaitable<void> {
    return this.makeObject(idx, 0, NOTHING, 0);
  }

  /** The object at idx is not this VDI's any more: the range reads as zeros. Errors: as `writeObject`. */
  dropObject(idx: number): Awaitable<void> {
    this.#checkChange(idx, 0, 0);
    return this.#vdi.setOwner(idx, 0);
  }

  /** Nothing may be called after it but flush, which the store's own `close` does. */
  close(): Promise<void> {
    this.#isClosed = true;
    return this.#vdi.close();
  }

  #checkRead(vid: number, idx: number, offset: number, length: number): void {
    if (vid > 0 && offset >= 0 && offset + length <= this.#objectSize && !this.#isClosed) return;
    throw broken(this.#vdi.record, `${length} bytes at ${offset} of object ${idx} of vid ${vid}`, this.#isClosed);
  }

  #checkInPlace(idx: number, offset: number, length: number): void {
    this.#checkChange(idx, offset, length);
    if (this.#vdi.map[idx] !== 0 && this.#vdi.exclusive(idx)) return;
    throw new Error(`invariant: object ${idx} of ${this.#vdi.record.name} is changed in place, and is not its alone`);
  }

  #checkChange(idx: number, offset: number, length: number): void {
    const { map, record } = this.#vdi;
    if (
      record.isSnapshot ||
      this.#readOnlyBecause !== undefined ||
      !(idx >= 0 && idx < map.length && offset >= 0 && offset + length <= this.#objectSize) ||
      this.#isClosed
    ) {
      this.#refuse(idx, offset, length);
    }
  }

  #refuse(idx: number, offset: number, length: number): never {
    const { map, record, failure } = this.#vdi;
    mustBeWritable(record, this.#readOnlyBecause);
    if (idx >= map.length && !this.#isClosed) throw failure ?? behindEndError(record, 'NO_SPACE');
    throw broken(record, `${length} bytes at ${offset} of object ${idx}`, this.#isClosed);
  }
}

export class DiskCalls {
  readonly #vdi: DiskVdi;
  readonly #readOnlyBecause: string | undefined;
  #isClosed = false;

  constructor(vdi: DiskVdi, readOnlyBecause: string | undefined) {
    this.#vdi = vdi;
    this.#readOnlyBecause = readOnlyBecause;
  }

  /** Errors: BEHIND_END, and the store's. */
  read(offset: number, into: Buffer): Awaitable<void> {
    this.#checkRead(offset, into.length);
    return this.#vdi.readDisk(offset, into);
  }

  cache(offset: number, length: number): Awaitable<void> {
    this.#checkRead(offset, length);
    return this.#vdi.cacheDisk?.(offset, length);
  }

  /** Errors: PERMISSION, NO_SPACE, and the store's. */
  write(offset: number, data: Buffer, fua: boolean): Awaitable<void> {
    this.#checkChange(offset, data.length);
    return this.#vdi.writeDisk(offset, data, fua);
  }

  /** Errors: as `write`, and SLOW. */
  zero(
    offset: number,
    length: number,
    options: ZeroOptions & { readonly fua: boolean; readonly fastZero?: boolean },
  ): Awaitable<void> {
    this.#checkChange(offset, length);
    return this.#vdi.zeroDisk(offset, length, options);
  }

  /** All of the range counts as data where the store cannot tell. */
  extents(offset: number, length: number, sink: ExtentSink): Awaitable<void> {
    this.#checkRead(offset, length);
    if (this.#vdi.diskExtents) return this.#vdi.diskExtents(offset, length, sink);
    sink(offset, length, false);
  }

  /** All of the range counts as changed where the store cannot tell. */
  changes(base: VdiRecord, offset: number, length: number, sink: ExtentSink): Awaitable<void> {
    this.#checkRead(offset, length);
    if (this.#vdi.diskChanges) return this.#vdi.diskChanges(base, offset, length, sink);
    sink(offset, length, true);
  }

  flush(): Awaitable<void> {
    return this.#vdi.flushDisk();
  }

  close(): Promise<void> {
    this.#isClosed = true;
    return this.#vdi.close();
  }

  #checkRead(offset: number, length: number): void {
    const { record, failure } = this.#vdi;
    if (failure === undefined && offset >= 0 && offset + length <= record.size && !this.#isClosed) return;
    throw failure ?? outsideDisk(record, 'BEHIND_END', offset, length, this.#isClosed);
  }

  #checkChange(offset: number, length: number): void {
    const { record, failure } = this.#vdi;
    mustBeWritable(record, this.#readOnlyBecause);
    if (failure === undefined && offset >= 0 && offset + length <= record.size && !this.#isClosed) return;
    throw failure ?? outsideDisk(record, 'NO_SPACE', offset, length, this.#isClosed);
  }
}

/** Errors: PERMISSION. */
function mustBeWritable(record: VdiRecord, readOnlyBecause: string | undefined): void {
  if (record.isSnapshot) throw new StoreError('PERMISSION', `${record.name}@${record.tag} is a snapshot`);
  if (readOnlyBecause !== undefined) throw new StoreError('PERMISSION', `nothing is written: ${readOnlyBecause}`);
}

function outsideDisk(
  record: VdiRecord,
  code: 'BEHIND_END' | 'NO_SPACE',
  offset: number,
  length: number,
  isClosed: boolean,
): Error {
  if (offset >= 0 && !isClosed) return behindEndError(record, code);
  return broken(record, `${length} bytes at ${offset}`, isClosed);
}

/** The caller has broken the contract. */
function broken({ name }: VdiRecord, range: string, isClosed: boolean): Error {
  return new Error(
    isClosed ? `invariant: ${name} is used after its close` : `invariant: ${range} are outside the disk ${name}`,
  );
}
