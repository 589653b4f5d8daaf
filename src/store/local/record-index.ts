/**
 * Records of VDIs in memory, found by id, by name and by parent without looking at all of them, and kept in the order that
 * people see. Owns that order. Knows nothing of what is stored, or when.
 */
import { inOrder, type VdiRecord } from '../object-store.js';

export class RecordIndex {
  readonly #byVid = new Map<number, VdiRecord>();
  readonly #byParent = new Map<number, Set<number>>();
  /** In order; records of one name are neighbours. */
  #sorted: VdiRecord[] = [];
  /** Somebody has `#sorted`, and may be reading it for long: it is copied before it changes. */
  #isLent = false;

  /** Take these in place of all. */
  reset(records: Iterable<VdiRecord>): void {
    this.#byVid.clear();
    this.#byParent.clear();
    for (const record of records) {
      this.#byVid.set(record.vid, record);
      this.#adopt(record);
    }
    this.#sorted = [...this.#byVid.values()].sort(compare);
    this.#isLent = false;
  }

  get(vid: number): VdiRecord | undefined {
    return this.#byVid.get(vid);
  }

  /** All, in order; nobody changes this array afterwards. */
  all(): readonly VdiRecord[] {
    this.#isLent = true;
    return this.#sorted;
  }

  named(name: string): VdiRecord[] {
    const found: VdiRecord[] = [];
    for (let at = this.#firstOf(name); this.#sorted[at]?.name === name; at++) found.push(this.#sorted[at] as VdiRecord);
    return found;
  }

  childrenOf(vid: number): VdiRecord[] {
    return [...(this.#byParent.get(vid) ?? [])].flatMap((child) => this.#byVid.get(child) ?? []);
  }

  set(record: VdiRecord): void {
    this.delete(record.vid);
    this.#byVid.set(record.vid, record);
    this.#adopt(record);
    this.#own();
    this.#sorted.splice(this.#positionOf(record), 0, record);
  }

  delete(vid: number): void {
    const record = this.#byVid.get(vid);
    if (record === undefined) return;
    this.#byVid.delete(vid);
    const siblings = this.#byParent.get(record.parentVid);
    siblings?.delete(vid);
    if (siblings?.size === 0) this.#byParent.delete(record.parentVid);
    this.#own();
    this.#sorted.splice(this.#positionOf(record), 1);
  }

  #adopt({ vid, parentVid }: VdiRecord): void {
    if (parentVid === 0) return;
    const siblings = this.#byParent.get(parentVid);
    if (siblings) siblings.add(vid);
    else this.#byParent.set(parentVid, new Set([vid]));
  }

  #own(): void {
    if (!this.#isLent) return;
    this.#sorted = this.#sorted.slice();
    this.#isLent = false;
  }

  /** Where the record is, or would be. */
  #positionOf(record: VdiRecord): number {
    return this.#first((other) => compare(other, record) >= 0);
  }

  #firstOf(name: string): number {
    return this.#first((other) => other.name >= name);
  }

  #first(isFrom: (record: VdiRecord) => boolean): number {
    let from = 0;
    let to = this.#sorted.length;
    while (from < to) {
      const middle = (from + to) >>> 1;
      if (isFrom(this.#sorted[middle] as VdiRecord)) to = middle;
      else from = middle + 1;
    }
    return from;
  }
}

/** Of no two records is it 0. */
function compare(a: VdiRecord, b: VdiRecord): number {
  return inOrder(a, b) || a.vid - b.vid;
}
