/**
 * A VDI that consists of objects, as a flat disk. Splits reads and writes into objects and decides for each object: write in
 * place, make it, or copy what a snapshot shares. Zeroing (zeroing.ts), questions to the map (map-questions.ts) and the order
 * of changes (object-changes.ts) are its parts. Must not depend on names, exports, or how a store keeps objects.
 */
import type { ExtentSink, ObjectVdi, ReadCount, Switch } from '../store/open-vdi.js';
import { behindEndError, type StoreError } from '../store/store-error.js';
import type { Awaitable, VdiRecord } from '../store/vdi-record.js';
import { allDone } from '../system/all-done.js';
import { FirstWrites, FirstWritesPolicy } from './first-writes.js';
import { MapQuestions } from './map-questions.js';
import { ObjectChanges } from './object-changes.js';
import { PARALLEL_OBJECTS, Several } from './several.js';
import { ObjectCalls } from './store-calls.js';
import { objectsOf, type Vdi, type ZeroRequest } from './vdi.js';
import { CLOSED, type WriteGate } from './write-gate.js';
import { Zeroing } from './zeroing.js';

export class CopyOnWriteVdi implements Vdi {
  readonly gate: WriteGate;
  readonly #open: ObjectVdi;
  readonly #calls: ObjectCalls;
  readonly #changes: ObjectChanges;
  readonly #questions: MapQuestions;
  readonly #zeroing: Zeroing;
  readonly #objectSize: number;
  /** idx -> first writes that are gathered for one copy of the object; its change is under way. */
  readonly #gathering = new Map<number, FirstWrites>();
  readonly #gathers = new FirstWritesPolicy();
  copies = 0;

  /** `readOnlyBecause`: of the store; undefined if it can be changed. */
  constructor(open: ObjectVdi, readOnlyBecause: string | undefined) {
    this.#open = open;
    this.#calls = new ObjectCalls(open, readOnlyBecause);
    this.#changes = new ObjectChanges(open);
    this.gate = this.#changes.gate;
    this.#questions = new MapQuestions(open, this.#calls);
    const create = (idx: number, within: number, data: Buffer): Awaitable<void> => this.#create(idx, within, data);
    this.#zeroing = new Zeroing(open, {
      calls: this.#calls,
      changes: this.#changes,
      questions: this.#questions,
      create,
    });
    this.#objectSize = 2 ** open.record.blockSizeShift;
  }

  get record(): VdiRecord {
    return this.#open.record;
  }

  get opened(): ObjectVdi {
    return this.#open;
  }

  get failure(): Error | undefined {
    return this.#open.failure;
  }

  get size(): number {
    return this.#open.record.size;
  }

  read(offset: number, into: Buffer): Awaitable<void> {
    if (offset + into.length > this.size) this.#isOutside('BEHIND_END');
    if (this.#open.noteRead === undefined) return this.#read(offset, into);
    return this.#countedRead(this.#open.noteRead(offset, into.length), offset, into);
  }

  async #countedRead(count: ReadCount, offset: number, into: Buffer): Promise<void> {
    count.inFlight++;
    try {
      await this.#read(offset, into);
    } finally {
      count.inFlight--;
    }
  }

  #read(offset: number, into: Buffer): Awaitable<void> {
    const idx = Math.floor(offset / this.#objectSize);
    const within = offset - idx * this.#objectSize;
    if (within + into.length <= this.#objectSize) return this.#readObject(idx, within, into);
    let later: Promise<void>[] | undefined;
    for (let done = 0; done < into.length;) {
      const at = offset + done;
      const part = Math.floor(at / this.#objectSize);
      const from = at - part * this.#objectSize;
      const length = Math.min(this.#objectSize - from, into.length - done);
      const result = this.#readObject(part, from, into.subarray(done, done + length));
      if (result !== undefined) (later ??= []).push(result);
      done += length;
    }
    if (later) return allDone(later);
  }

  write(offset: number, data: Buffer, fua: boolean): Awaitable<void> {
    const epoch = this.gate.tryEnter();
    if (epoch === CLOSED) return this.#whenOpen((later) => this.#writeInside(later, offset, data, fua));
    return this.#writeInside(epoch, offset, data, fua);
  }

  zero(offset: number, length: number, options: ZeroRequest): Awaitable<void> {
    const epoch = this.gate.tryEnter();
    if (epoch === CLOSED) return this.#whenOpen((later) => this.#zeroing.zero(later, offset, length, options));
    return this.#zeroing.zero(epoch, offset, length, options);
  }

  trim(offset: number, length: number, fua: boolean): Awaitable<void> {
    return this.zero(offset, length, { noHole: false, fua });
  }

  flush(): Awaitable<void> {
    if (this.record.isSnapshot) return;
    return this.#open.flush();
  }

  cache(offset: number, length: number): Awaitable<void> {
    return this.#questions.cache(offset, length);
  }

  extents(offset: number, length: number, sink: ExtentSink): Awaitable<void> {
    if (offset + length > this.size) this.#isOutside('BEHIND_END');
    return this.#questions.extents(offset, length, sink);
  }

  isHole(offset: number, length: number): boolean {
    return this.#questions.isHole(offset, length);
  }

  changedSince(base: Vdi, offset: number, length: number, sink: ExtentSink): Awaitable<void> {
    return this.#questions.changedSince(objectsOf(base), offset, length, sink);
  }

  async take(change: Switch): Promise<VdiRecord> {
    if (change.needsNoPause) {
      // Nothing is awaited between the two: a write that enters the gate after the switch must not be in the snapshot.
      void change.switchOver();
      await this.gate.newEpoch();
      return change.finish();
    }
    // Most of what is dirty goes to disk before the writers are held, so little is left for after.
    await this.flush();
    await this.withWritersHeld(async () => change.switchOver());
    return change.finish();
  }

  async withWritersHeld<T>(work: () => Promise<T>): Promise<T> {
    await this.gate.close();
    try {
      return await work();
    } finally {
      this.gate.open();
    }
  }

  close(): Promise<void> {
    return this.#calls.close();
  }

  #readObject(idx: number, within: number, into: Buffer): Awaitable<void> {
    const owner = this.#open.map[idx] ?? this.#isOutside('BEHIND_END');
    if (owner === 0) {
      into.fill(0);
      return;
    }
    const later = this.#calls.readObject(owner, idx, within, into);
    if (later === undefined || !this.#open.objectsMove) return later;
    return this.#readAgainIfGone(later, owner, idx, within, into);
  }

  /** If the object was removed during the read: read the object that has replaced it. */
  async #readAgainIfGone(
    later: Promise<void>,
    owner: number,
    idx: number,
    within: number,
    into: Buffer,
  ): Promise<void> {
    try {
      await later;
    } catch (error) {
      if ((error as StoreError).code !== 'GONE') throw error;
      // The new entry may be on its way to the map. If the map names the same owner, the object may have gone and come back.
      await this.#changes.running(idx)?.catch(() => undefined);
      if (this.#open.map[idx] === owner) await this.#calls.readObject(owner, idx, within, into);
      else await this.#readObject(idx, within, into);
    }
  }

  async #whenOpen(inside: (epoch: number) => Awaitable<void>): Promise<void> {
    const epoch = await this.gate.enter();
    await inside(epoch);
  }

  /** Others have shrunk or deleted the disk: inside the size at opening, and outside the present one. */
  #isOutside(code: 'BEHIND_END' | 'NO_SPACE'): never {
    throw this.#open.failure ?? behindEndError(this.record, code);
  }

  #writeInside(epoch: number, offset: number, data: Buffer, fua: boolean): Awaitable<void> {
    const idx = Math.floor(offset / this.#objectSize);
    const within = offset - idx * this.#objectSize;
    let later: Awaitable<void>;
    try {
      if (offset + data.length > this.size) this.#isOutside('NO_SPACE');
      later =
        within + data.length <= this.#objectSize
          ? this.#writeObject(idx, within, data, epoch)
          : this.#writeMany(offset, data, epoch);
    } catch (error) {
      this.gate.leave(epoch);
      throw error;
    }
    if (later !== undefined) return this.#changes.leaveAfter(epoch, later, offset, data.length, fua);
    this.gate.leave(epoch);
    if (fua) return this.#changes.makeDurable(offset, data.length);
  }

  async #writeMany(offset: number, data: Buffer, epoch: number): Promise<void> {
    const pending = new Several(PARALLEL_OBJECTS);
    try {
      for (let done = 0; done < data.length && !pending.hasFailed;) {
        const at = offset + done;
        const idx = Math.floor(at / this.#objectSize);
        const within = at - idx * this.#objectSize;
        const length = Math.min(this.#objectSize - within, data.length - done);
        const later = this.#writeObject(idx, within, data.subarray(done, done + length), epoch);
        done += length;
        if (later !== undefined) pending.add(later);
        if (pending.isFull) await pending.one();
      }
    } catch (error) {
      pending.fail(error);
    }
    await pending.all();
  }

  /** `epoch`: the gate's, for a write that has just entered; CLOSED for a write that is repeated. */
  #writeObject(idx: number, within: number, data: Buffer, epoch = CLOSED): Awaitable<void> {
    const running = this.#changes.running(idx);
    if (running) {
      const gathered = this.#gathering.get(idx);
      if (gathered?.join(within, data, epoch)) return this.#orAgain(gathered.done as Promise<void>, idx, within, data);
      return this.#changes.after(running, () => this.#writeObject(idx, within, data));
    }
    const owner = this.#open.map[idx] ?? 0;
    if (owner !== 0 && this.#open.exclusive(idx)) {
      const later = this.#calls.writeObject(idx, within, data);
      if (later === undefined) return;
      return this.#orAgain(this.#changes.trackInPlace(idx, later), idx, within, data);
    }
    if (owner !== 0 && epoch !== CLOSED && this.#isWorthGathering(within, data.length)) {
      return this.#orAgain(this.#gather(idx, data, epoch), idx, within, data);
    }
    if (!this.#open.objectsMove && !this.#changes.isInPlace(idx)) {
      const later = this.#create(idx, within, data);
      return later === undefined ? undefined : this.#changes.run(idx, () => later);
    }
    return this.#orAgain(
      this.#changes.run(idx, async () => this.#create(idx, within, data)),
      idx,
      within,
      data,
    );
  }

  /** Where objects move: repeat the write if the VDI has another vid meanwhile. */
  #orAgain(later: Promise<void>, idx: number, within: number, data: Buffer): Promise<void> {
    if (!this.#open.objectsMove) return later;
    return this.#changes.againIfMoved(later, () => this.#writeObject(idx, within, data));
  }

  #isWorthGathering(within: number, length: number): boolean {
    return this.#open.gathersFirstWrites === true && this.#gathers.isWorthIt(within, length, this.#objectSize);
  }

  /** Copy the object at idx once, for `data` and for the writes that follow it immediately. */
  #gather(idx: number, data: Buffer, epoch: number): Promise<void> {
    const gathered = new FirstWrites(data, epoch, this.#objectSize, () => this.gate.isAwaited(epoch));
    this.#gathering.set(idx, gathered);
    gathered.done = this.#changes.run(idx, async () => {
      const all = await gathered.whole();
      this.#gathering.delete(idx);
      this.#gathers.learn(gathered.count);
      await this.#create(idx, 0, all);
    });
    return gathered.done;
  }

  #create(idx: number, within: number, data: Buffer): Awaitable<void> {
    const owner = this.#open.map[idx] ?? 0;
    if (owner === 0 || data.length === this.#objectSize) return this.#calls.makeObject(idx, within, data, 0);
    const later = this.#calls.makeObject(idx, within, data, owner);
    if (later !== undefined) return later.then(() => void this.copies++);
    this.copies++;
  }
}
