/**
 * Reads the inodes of a cluster's catalog: all of them, or those of some names. Nodes look a name up among the vids that it
 * hashes to; this does the same, and reads no other inodes. Owns what is remembered between look-ups.
 */
import type { Inode } from '../../sheepdog/inode.js';
import { inParallel } from '../../system/in-parallel.js';
import type { StoreError } from '../store-error.js';
import type { CatalogHost } from './catalog-host.js';
import type { ClusterClient } from './cluster-client.js';
import { inodeOrLost } from './lost-inodes.js';
import { isShadowName } from './shadow-names.js';

/** Inodes asked for at a time. */
const PARALLEL_READS = 64;
/** Snapshots that other clients may take while inodes are read. */
const MAX_LATE_SNAPSHOTS = 5;

export class CatalogInodes {
  readonly #host: CatalogHost;
  /** Vids of lost inodes; the log has said so. */
  readonly #toldLost = new Set<number>();
  /** On a cluster that reuses vids: the names of all vids when they were last read. */
  #names:
    | { readonly askedAt: number; readonly changes: number; readonly answer: Promise<ReadonlyMap<number, string>> }
    | undefined;

  constructor(host: CatalogHost) {
    this.#host = host;
  }

  get #cluster(): ClusterClient {
    return this.#host.cluster;
  }

  /** Vids that include all VDIs of these names, and whether an inode was known when this was asked. */
  async placesOf(
    names: readonly string[],
    maxAgeMs: number,
  ): Promise<{ readonly places: Iterable<number>; readonly isKnown: (inode: Inode) => boolean }> {
    if (!this.#host.recyclesVids) {
      const vids = await this.#cluster.vids(maxAgeMs);
      return { places: names.flatMap((name) => vids.placesOf(name)), isKnown: ({ vid }) => vids.isUsed(vid) };
    }
    // Reused vids leave gaps among the vids of a name.
    const known = await this.#namesInUse(maxAgeMs);
    const wanted = new Set(names);
    const places = [...known].filter(([, name]) => wanted.has(name)).map(([vid]) => vid);
    return { places, isKnown: ({ vid, name }) => known.get(vid) === name };
  }

  /** Names by vid. Not older than `maxAgeMs`, nor than our last request that makes or deletes a VDI. */
  #namesInUse(maxAgeMs: number): Promise<ReadonlyMap<number, string>> {
    const { changes } = this.#cluster;
    const known = this.#names;
    if (known?.changes === changes && performance.now() - known.askedAt < maxAgeMs) return known.answer;
    const answer = this.all().then((inodes) => new Map(inodes.map(({ vid, name }) => [vid, name])));
    const asked = { askedAt: performance.now(), changes, answer };
    this.#names = asked;
    answer.catch(() => {
      if (this.#names === asked) this.#names = undefined;
    });
    return answer;
  }

  /** Inodes of all VDIs that are not deleted. */
  async all(): Promise<Inode[]> {
    return this.read((await this.#cluster.vids()).live());
  }

  /** Inodes with one of these names, among the vids `places`. */
  async named(names: readonly string[], places: Iterable<number>): Promise<Inode[]> {
    const wanted = new Set(names);
    return (await this.read([...new Set(places)])).filter(({ name }) => wanted.has(name));
  }

  async read(vids: readonly number[]): Promise<Inode[]> {
    const inodes: Inode[] = [];
    await inParallel(PARALLEL_READS, vids, async (vid) => {
      try {
        const inode = await this.#cluster.readInode(vid);
        if (inode.name !== '') inodes.push(inode);
      } catch (error) {
        // Being made at this moment, or lost: list the others.
        if ((error as StoreError).code !== 'GONE') throw error;
        if (this.#toldLost.has(vid)) return;
        this.#toldLost.add(vid);
        this.#host.log(`the inode of vid ${vid.toString(16)} cannot be read`, { err: error });
      }
    });
    return inodes.sort((a, b) => a.vid - b.vid);
  }

  /**
   * Another client may have taken a snapshot while inodes were read: then the list has the snapshot and not the new working
   * VDI, and a disk in use would be missing. A look-up is answered when the snapshot is complete.
   */
  async addLateWorking(inodes: Inode[]): Promise<void> {
    const working = new Set(inodes.filter(({ isSnapshot }) => !isSnapshot).map(({ name }) => name));
    const names = new Set(inodes.map(({ name }) => name).filter((name) => !isShadowName(name) && !working.has(name)));
    if (this.#host.recyclesVids) return this.#addLateIds(inodes, names);
    await inParallel(PARALLEL_READS, [...names], async (name) => {
      for (let attempt = 0; attempt < MAX_LATE_SNAPSHOTS; attempt++) {
        const vid = await this.#cluster.lookup(name);
        if (vid === 0) return;
        const inode = await inodeOrLost(this.#cluster, vid);
        if (inode?.name !== name) return;
        const at = inodes.findIndex((known) => known.vid === vid);
        if (at >= 0) inodes[at] = inode;
        else inodes.push(inode);
        if (!inode.isSnapshot) return;
      }
    });
    inodes.sort((a, b) => a.vid - b.vid);
  }

  /** The same where vids are reused, and the nodes may find the snapshot by the name of the working VDI. */
  async #addLateIds(inodes: Inode[], names: ReadonlySet<string>): Promise<void> {
    const [first] = names;
    if (first === undefined) return;
    await this.#cluster.lookup(first);
    const known = new Set(inodes.map(({ vid }) => vid));
    const late = (await this.#cluster.vids()).live().filter((vid) => !known.has(vid));
    inodes.push(...(await this.read(late)).filter(({ name }) => names.has(name)));
    inodes.sort((a, b) => a.vid - b.vid);
  }
}
