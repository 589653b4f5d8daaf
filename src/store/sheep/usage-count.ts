/**
 * What every VDI and snapshot of a cluster uses, counted from all tables in one pass: how many objects, and how many that
 * no other table refers to. Owns the counts; reads nothing.
 */
import type { Usage } from '../object-store.js';
import type { Inode } from '../../sheepdog/inode.js';

/** Several tables refer to the object. */
const SHARED = 2 ** 32 - 1;

export class UsageCount {
  /** By owner and idx: the vid of the only table that refers to the object, or SHARED. */
  readonly #referrers = new Map<number, Uint32Array>();
  /** By vid: objects that no other table refers to, among the tables counted so far. */
  readonly #alone = new Map<number, number>();
  readonly #allocated = new Map<number, number>();
  /** By vid: objects that are exclusive without counting: of working VDIs, and of hyper volumes. */
  readonly #own = new Map<number, number>();
  readonly #inodes: Inode[] = [];
  readonly #damaged = new Map<number, Usage>();

  /** Counts the entries [from, to) of the inode's table. Call once for each entry. */
  add(inode: Inode, table: Uint32Array, from: number, to: number): void {
    const { vid, isSnapshot, storePolicy } = inode;
    let allocated = 0;
    let own = 0;
    for (let idx = from; idx < to; idx++) {
      const owner = table[idx] as number;
      if (owner === 0) continue;
      allocated++;
      // No other table refers to the objects that a working VDI owns, nor to those of a hyper volume.
      if (isSnapshot ? storePolicy !== 0 : owner === vid) own++;
      if (storePolicy === 0) this.#refer(owner, idx, vid, table.length);
    }
    this.#allocated.set(vid, (this.#allocated.get(vid) ?? 0) + allocated);
    this.#own.set(vid, (this.#own.get(vid) ?? 0) + own);
  }

  /** All of its table is counted. */
  note(inode: Inode): void {
    this.#inodes.push(inode);
  }

  /** Its table cannot be read. */
  noteDamage({ vid }: Inode, damage: string): void {
    this.#damaged.set(vid, { allocated: 0, exclusive: 0, damage });
  }

  result(): Map<number, Usage> {
    const usages = new Map<number, Usage>(this.#damaged);
    for (const { vid, isSnapshot, storePolicy } of this.#inodes) {
      const exclusive = isSnapshot && storePolicy === 0 ? this.#alone.get(vid) : this.#own.get(vid);
      usages.set(vid, { allocated: this.#allocated.get(vid) ?? 0, exclusive: exclusive ?? 0 });
    }
    return usages;
  }

  #refer(owner: number, idx: number, vid: number, length: number): void {
    let referrers = this.#referrers.get(owner);
    if (referrers === undefined || idx >= referrers.length) {
      const longer = new Uint32Array(Math.max(length, idx + 1));
      if (referrers) longer.set(referrers);
      this.#referrers.set(owner, (referrers = longer));
    }
    const other = referrers[idx] as number;
    if (other === 0) {
      referrers[idx] = vid;
      this.#alone.set(vid, (this.#alone.get(vid) ?? 0) + 1);
    } else if (other !== SHARED) {
      referrers[idx] = SHARED;
      this.#alone.set(other, (this.#alone.get(other) ?? 1) - 1);
    }
  }
}
