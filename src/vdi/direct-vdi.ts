/**
 * A VDI whose store does copy-on-write itself: requests go to the store as they come, and so do snapshots. No gate holds
 * writers here: the store orders a snapshot, or growing, and the writes in flight (src/store/open-vdi.ts).
 */
import type { DiskVdi, Switch } from '../store/open-vdi.js';
import type { Awaitable, VdiRecord } from '../store/vdi-record.js';
import { ExtentJoiner } from './extent-walk.js';
import { DiskCalls } from './store-calls.js';
import type { Vdi, ZeroRequest } from './vdi.js';

type Sink = (offset: number, length: number, hole: boolean) => boolean;

export class DirectVdi implements Vdi {
  readonly copies = 0;
  readonly #disk: DiskVdi;
  readonly #calls: DiskCalls;

  constructor(disk: DiskVdi, readOnlyBecause: string | undefined) {
    this.#disk = disk;
    this.#calls = new DiskCalls(disk, readOnlyBecause);
  }

  get record(): VdiRecord {
    return this.#disk.record;
  }

  get size(): number {
    return this.#disk.record.size;
  }

  get opened(): DiskVdi {
    return this.#disk;
  }

  get failure(): Error | undefined {
    return this.#disk.failure;
  }

  read(offset: number, into: Buffer): Awaitable<void> {
    return this.#calls.read(offset, into);
  }

  write(offset: number, data: Buffer, fua: boolean): Awaitable<void> {
    return this.#calls.write(offset, data, fua);
  }

  zero(offset: number, length: number, options: ZeroRequest): Awaitable<void> {
    return this.#calls.zero(offset, length, options);
  }

  trim(offset: number, length: number, fua: boolean): Awaitable<void> {
    return this.#calls.zero(offset, length, { noHole: false, fua });
  }

  flush(): Awaitable<void> {
    if (this.record.isSnapshot) return;
    return this.#calls.flush();
  }

  cache(offset: number, length: number): Awaitable<void> {
    return this.#calls.cache(offset, length);
  }

  extents(offset: number, length: number, sink: Sink): Awaitable<void> {
    const joiner = new ExtentJoiner(offset, sink);
    return finishing(joiner, offset + length, false, this.#calls.extents(offset, length, joiner.addPart));
  }

  /** Asking the store takes time. */
  isHole(): boolean {
    return false;
  }

  changedSince(base: Vdi, offset: number, length: number, sink: Sink): Awaitable<void> {
    const joiner = new ExtentJoiner(offset, sink);
    return finishing(joiner, offset + length, true, this.#calls.changes(base.record, offset, length, joiner.addPart));
  }

  async take(change: Switch): Promise<VdiRecord> {
    const later = change.switchOver();
    if (later !== undefined) await later;
    return change.finish();
  }

  withWritersHeld<T>(work: () => Promise<T>): Promise<T> {
    return work();
  }

  close(): Promise<void> {
    return this.#calls.close();
  }
}

/** The range up to `end` that the store has not reported counts as `rest`. */
function finishing(joiner: ExtentJoiner, end: number, rest: boolean, later: Awaitable<void>): Awaitable<void> {
  if (later !== undefined) return later.then(() => finishing(joiner, end, rest, undefined));
  joiner.fillUpTo(end, rest);
  joiner.finish();
}
