/**
 * Records of VDIs in memory, found by id, name and parent without a scan of all, and kept in the order of listings. Owns that
 * order. Does not know what is stored, or when.
 */
import { inOrder, type VdiRecord } from '../vdi-record.js';

export class RecordIndex {
  readonly #byVid = new Map<number, VdiRecord>();
  readonly #byParent = new Map<number, Set<number>>();
  /** In order; records with the same name are neighbours. */
  #sorted: VdiRecord[] = [];
  /** A caller has `#sorted` and may read it for long: it is copied before it changes. */
  #isLent = false;

  /** Replace all records by these. */
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

  /** All, in order; the array does not change afterwards. */
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

  /** The position of the record, present or not. */
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

/** A total order: never 0 for two records. */
function compare(a: VdiRecord, b: VdiRecord): number {
  return inOrder(a, b) || a.vid - b.vid;
}
