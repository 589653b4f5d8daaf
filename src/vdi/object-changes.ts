/**
 * The order of changes within one VDI. Owns the write gate, and per object: a change of its owner (made, copied, dropped) runs
 * alone, after the writes in place that are under way, and others wait for it. Nothing is allocated for a write in place that
 * the store answers at once.
 */
import type { ObjectVdi } from '../store/open-vdi.js';
import type { StoreError } from '../store/store-error.js';
import type { Awaitable } from '../store/vdi-record.js';
import { WriteGate } from './write-gate.js';

export class ObjectChanges {
  readonly gate = new WriteGate();
  readonly #open: ObjectVdi;
  readonly #objectSize: number;
  /** idx -> the change of owner of that object that is under way. */
  readonly #running = new Map<number, Promise<void>>();
  /** idx -> operations in place under way off the loop; a change of owner waits until there are none. */
  readonly #inPlace = new Map<number, number>();
  #inPlaceWaiters: { idx: number; wake: () => void }[] = [];

  constructor(open: ObjectVdi) {
    this.#open = open;
    this.#objectSize = 2 ** open.record.blockSizeShift;
  }

  /** The change of owner that is under way for idx. */
  running(idx: number): Promise<void> | undefined {
    return this.#running.size === 0 ? undefined : this.#running.get(idx);
  }

  /** The objects whose owner is being changed. */
  get changing(): Iterable<number> {
    return this.#running.keys();
  }

  isInPlace(idx: number): boolean {
    return this.#inPlace.has(idx);
  }

  /** Do the change again if the VDI has got a new map meanwhile: what was decided by the old map does not hold. */
  async againIfMoved(later: Promise<void>, again: () => Awaitable<void>): Promise<void> {
    try {
      await later;
    } catch (error) {
      if ((error as StoreError).code !== 'MOVED') throw error;
      await again();
    }
  }

  /** Leave the gate when `later` has ended; then, with `fua`, make the range durable. */
  async leaveAfter(epoch: number, later: Promise<void>, offset: number, length: number, fua: boolean): Promise<void> {
    try {
      await later;
    } finally {
      this.gate.leave(epoch);
    }
    // Outside the gate: a snapshot need not wait for the disk.
    if (fua) await this.makeDurable(offset, length);
  }

  /** All changes of the range so far are durable when it resolves. */
  makeDurable(offset: number, length: number): Promise<void> {
    const first = Math.floor(offset / this.#objectSize);
    const last = Math.floor((offset + length - 1) / this.#objectSize);
    return first === last ? this.#open.flushObject(first) : this.#open.flush();
  }

  /** Run a change of the owner of idx alone: after the operations in place that are under way, with all others waiting. */
  run(idx: number, change: () => Promise<void>): Promise<void> {
    const run = async (): Promise<void> => {
      try {
        if (this.#inPlace.has(idx)) {
          await new Promise<void>((wake) => this.#inPlaceWaiters.push({ idx, wake }));
        }
        await change();
      } finally {
        this.#running.delete(idx);
      }
    };
    const running = run();
    // Until here only the synchronous part of `run` has happened: it is registered before any other request can look.
    this.#running.set(idx, running);
    return running;
  }

  /** Do `retry` when the change that is `running` has ended. */
  async after(running: Promise<void>, retry: () => Awaitable<void>): Promise<void> {
    // A failure is for the request that started the change; this one tries for itself.
    await running.catch(() => undefined);
    await retry();
  }

  /** Count an operation in place that the store answers later. */
  async trackInPlace(idx: number, later: Promise<void>): Promise<void> {
    this.#inPlace.set(idx, (this.#inPlace.get(idx) ?? 0) + 1);
    try {
      await later;
    } finally {
      const left = (this.#inPlace.get(idx) ?? 1) - 1;
      if (left > 0) this.#inPlace.set(idx, left);
      else {
        this.#inPlace.delete(idx);
        const woken = this.#inPlaceWaiters.filter((waiter) => waiter.idx === idx);
        if (woken.length > 0) {
          this.#inPlaceWaiters = this.#inPlaceWaiters.filter((waiter) => waiter.idx !== idx);
          for (const { wake } of woken) wake();
        }
      }
    }
  }
}
