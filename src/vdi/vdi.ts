/**
 * An open VDI as a flat disk: what src/export serves, and the catalog takes snapshots of. One Vdi is shared by all who have
 * the VDI open. There is one kind for each kind of open VDI of the stores (src/store/open-vdi.ts).
 */
import type { ObjectVdi, OpenVdi, Switch } from '../store/open-vdi.js';
import type { Awaitable, VdiRecord } from '../store/vdi-record.js';

export interface ZeroRequest {
  /** Keep the range allocated. */
  readonly noHole: boolean;
  /** Durable when it answers. */
  readonly fua: boolean;
  /** Rather fail (StoreError SLOW), before anything has changed, than copy objects or write zeros. */
  readonly fastZero?: boolean;
}

/** Offsets and lengths are bytes. Errors of all: StoreError. */
export interface Vdi {
  readonly record: VdiRecord;
  readonly size: number;
  /** The store's side of this VDI; for the catalog. */
  readonly opened: OpenVdi;
  /** Why it cannot be used any more. */
  readonly failure: Error | undefined;
  /** Objects copied because a snapshot shared them. Where the store copies by itself: 0. */
  readonly copies: number;

  /**
   * Fill `into` with the bytes at `offset`. The range must lie within the disk as it was opened. Errors: BEHIND_END (others
   * have shrunk the disk since), `failure`, the store's.
   */
  read(offset: number, into: Buffer): Awaitable<void>;
  /** With `fua`, durable when it answers. Errors: NO_SPACE, PERMISSION, the store's. */
  write(offset: number, data: Buffer, fua: boolean): Awaitable<void>;
  /**
   * Make the range zeros. Unless `noHole`, its space is given back, and zeros in objects that a snapshot shares stay as they
   * are. Costs only what is allocated. Errors: as `write`, and SLOW.
   */
  zero(offset: number, length: number, options: ZeroRequest): Awaitable<void>;
  /** Give the range's space back; it reads as zeros. */
  trim(offset: number, length: number, fua: boolean): Awaitable<void>;
  /** Every change answered before is durable when it resolves. */
  flush(): Awaitable<void>;
  /** A hint: the range will be read soon. */
  cache(offset: number, length: number): Awaitable<void>;
  /**
   * Data and holes of the range in ascending order, neighbours joined. `sink` returns false to stop. Each object is reported as
   * it is when the walk reaches it, never in an older state than at the call. At once where the answer needs no waiting.
   */
  extents(
    offset: number,
    length: number,
    sink: (offset: number, length: number, hole: boolean) => boolean,
  ): Awaitable<void>;
  /** Known at once to read as zeros, because nothing of the range is allocated. False says nothing. */
  isHole(offset: number, length: number): boolean;
  /**
   * Where this VDI may differ from `base`, a snapshot of the same line: never less than the truth. Neighbours joined, `sink`
   * returns false to stop. At once where the answer does not take long.
   */
  changedSince(
    base: Vdi,
    offset: number,
    length: number,
    sink: (offset: number, length: number, changed: boolean) => boolean,
  ): Awaitable<void>;

  /**
   * Take the snapshot that `change` has prepared. Every write answered before this call is in it, no write that begins after
   * it has resolved is, and a write in flight meanwhile is in it or not. Call it right after `change` is prepared.
   */
  take(change: Switch): Promise<VdiRecord>;
  /**
   * Run `work` while no write is in flight; new writes wait until it has ended. One at a time. Where the store copies by itself,
   * it orders `work` and writes: nothing is held.
   */
  withWritersHeld<T>(work: () => Promise<T>): Promise<T>;
  /** Close it in the store. Nothing may be called afterwards. */
  close(): Promise<void>;
}

/** The map and the objects of a VDI that consists of objects. */
export function objectsOf({ opened }: Vdi): ObjectVdi {
  if (opened.kind === 'objects') return opened;
  throw new Error(`invariant: ${opened.record.name} is a disk of its own and has no map of objects`);
}
