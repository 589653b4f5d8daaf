/**
 * The catalog of a cluster: VDIs and snapshots as its own tools see them, and the temporary snapshots among them. Owns
 * the order of requests that make one operation, so that a failure in between leaves everything reachable.
 */
import { bytesOfText } from '../../text/name-bytes.js';
import {
  inOrder,
  MAX_DATA_OBJECTS,
  StoreError,
  type Catalog,
  type CheckReport,
  type DamagedVdi,
  type Redundancy,
  type Switch,
  type Unfinished,
  type Usage,
  type VdiRecord,
} from '../object-store.js';
import { deleteByName, isFoundByName, isUnchanged, mayGoByName, nameToDelete, underOwnName } from './by-name.js';
import { formatRedundancy, zonesFor } from '../redundancy.js';
import type { Cluster } from './cluster-client.js';
import { CLUSTER_DEFAULT, copyPolicyOf, zonesIn } from '../../sheepdog/copy-policy.js';
import { goneIsNone, isSameVdi } from './deleted-vdi.js';
import { clearHyper } from './hyper-index.js';
import { labelsOf, markDoubtful, NUMBER } from './labels.js';
import { encodeTime, recordOf, type Inode } from '../../sheepdog/layouts.js';
import { describeLost, inodeOrLost } from './lost-inodes.js';
import { isOursToDrop } from './shadow-owner.js';
import {
  INODE_SNAP_CTIME_OFFSET,
  INODE_TAG_OFFSET,
  INODE_VDI_SIZE_OFFSET,
  TAG_BYTES,
} from '../../sheepdog/protocol.js';
import { isShadow, isShadowName, MAX_SHADOWS, Shadow, shadowName, shadowNames, shadowPrefix } from './shadow.js';
import { SheepLocks } from './sheep-locks.js';
import type { SheepStore } from './sheep-store.js';
import { SheepVdi } from './sheep-vdi.js';
import { clearTable, inParallel, objectCount, objectKey } from './table.js';
import { parseUnfinishedTag, unfinishedTag } from '../../sheepdog/unfinished-tag.js';
import { UsageCount } from './usage-count.js';

/** Inodes and objects asked for at a time. */
const PARALLEL_READS = 64;
/** Tables, of 4 MiB at most, that are held at a time to count what is in them. */
const PARALLEL_TABLES = 16;
/** Table entries that are looked at in one turn of the loop: about a millisecond. */
const ENTRIES_PER_TURN = 2 ** 15;
/** How old may be what is known of the vids in use when one name is looked up; what is not found is looked up anew. */
const VIDS_AGE_MS = 1000;
/** Snapshots that others may take while we take a temporary one, or look what there is. */
const MAX_TAKE_ATTEMPTS = 5;
/** Deleting a VDI that others write to at the same time. */
const MAX_DELETE_ATTEMPTS = 5;
/** For asking whether what was given up is still there when it is closed. */
const CLOSING_LOOK_MS = 2_000;
/** Free slots after which no more shadows of a disk are looked for: they are used from the first on. */
const MAX_FREE_SLOTS = 2;
/** Findings a check spells out; it counts the rest. */
const MAX_PROBLEMS = 1000;
/**
 * Size of a VDI between its making and its mark: no whole sector, so that nobody uses it, and a size that nobody chooses. Of
 * ours no command takes it.
 */
const BARELY_MADE_BYTES = 509;

export class SheepCatalog implements Catalog {
  readonly #store: SheepStore;
  /** By vid: shadows this process has made or taken over, alive or waiting to be used again. */
  readonly #shadows = new Map<number, Shadow>();
  /** Snapshots whose tags do not say them, as of when they were last looked at. */
  readonly #doubtful = new Set<number>();
  /** Vids of lost inodes that the log has told of. */
  readonly #toldLost = new Set<number>();
  /** What cannot be followed any more, and was told of. */
  readonly #astray = new WeakSet<SheepVdi>();
  /** Of a cluster that uses vids again: what names they had when all were last read. */
  #names:
    | { readonly askedAt: number; readonly changes: number; readonly answer: Promise<ReadonlyMap<number, string>> }
    | undefined;

  readonly locks: SheepLocks;

  constructor(store: SheepStore) {
    this.#store = store;
    this.locks = new SheepLocks(store.cluster, store.enforcesLocks);
  }

  get #cluster(): Cluster {
    return this.#store.cluster;
  }

  async list(): Promise<VdiRecord[]> {
    const inodes = await this.#inodes();
    await this.#addLateWorking(inodes);
    return this.#recordsOf(inodes);
  }

  async #recordsOf(inodes: readonly Inode[]): Promise<VdiRecord[]> {
    const working = new Set(inodes.filter(({ isSnapshot }) => !isSnapshot).map(({ name }) => name));
    // What somebody else has snapshotted while we have it open goes on under the vid that the list shows.
    for (const inode of inodes) {
      const open = this.#store.open.get(inode.vid);
      if (!open || !inode.isSnapshot || open.record.isSnapshot) continue;
      // Deleted or rolled back by somebody else: that is for those who have it open, and no reason to list nothing.
      if (working.has(inode.name)) await this.#follow(open, inode.vid);
    }
    const names = new Map<string, string>();
    for (const { name } of inodes) if (!isShadowName(name)) names.set(shadowPrefix(name), name);
    const records: VdiRecord[] = [];
    const marks = leftMarks(inodes);
    for (const inode of inodes) {
      if (!isShadow(inode)) records.push(withMark(recordOf(inode), marks));
      // Others wait to be used again, or are another gateway's; not for people.
      else if (inode.isSnapshot && isOursToDrop(inode.mark, this.#store.owner))
        records.push(shadowRecord(inode, names.get(prefixOf(inode.name)) ?? inode.name));
    }
    markDoubtful(records.sort(inOrder));
    for (const { vid, isDoubtful } of records) {
      if (isDoubtful) this.#doubtful.add(vid);
      else this.#doubtful.delete(vid);
    }
    return records;
  }

  async #follow(open: SheepVdi, from: number): Promise<void> {
    try {
      await open.follow(from);
    } catch (error) {
      if (this.#astray.has(open)) return;
      this.#astray.add(open);
      this.#store.log((error as Error).message);
    }
  }

  /** The nodes look a name up by its place among the vids in use; the same is done here, without reading any other inode. */
  async named(name: string): Promise<VdiRecord[]> {
    const shadows = shadowNames(name);
    for (let maxAgeMs = VIDS_AGE_MS; ; maxAgeMs = 0) {
      // Where vids are used again the nodes find a snapshot by a name, and not what goes on after it: asked for is only that
      // they are through with it.
      if (this.#store.recyclesVids && maxAgeMs === 0) await this.#cluster.lookup(name);
      const { places, isKnown } = await this.#placesOf([name, ...shadows], maxAgeMs);
      const inodes = await this.#inodesNamed([name, ...shadows], places);
      if (!this.#store.recyclesVids) await this.#addLateWorking(inodes);
      const isThere = inodes.some((inode) => inode.name === name);
      const hasWorking = inodes.some((inode) => inode.name === name && !inode.isSnapshot);
      // What the nodes show by now is younger than what was known of their vids.
      const isOutdated = !isThere || !inodes.every(isKnown) || (this.#store.recyclesVids && !hasWorking);
      if (maxAgeMs > 0 && isOutdated) continue;
      // Nodes of some other kind, that give names other places; or it was made this moment.
      if (!isThere && (await this.#cluster.lookup(name)) !== 0) {
        return (await this.list()).filter((record) => record.name === name);
      }
      return (await this.#recordsOf(inodes)).filter((record) => record.name === name);
    }
  }

  async record(vid: number): Promise<VdiRecord | undefined> {
    const isInUse = async (): Promise<boolean> =>
      (await this.#cluster.vids(VIDS_AGE_MS)).isLive(vid) || (await this.#cluster.vids()).isLive(vid);
    if (!(await isInUse())) return undefined;
    const [inode] = await this.#readInodes([vid]);
    if (!inode) return undefined;
    const name = isShadow(inode) ? this.#shadows.get(vid)?.sourceName : inode.name;
    const records = name === undefined ? await this.list() : await this.named(name);
    return records.find((record) => record.vid === vid);
  }

  /** Vids among which all of these names are, and whether an inode was known when that was asked. */
  async #placesOf(
    names: readonly string[],
    maxAgeMs: number,
  ): Promise<{ readonly places: Iterable<number>; readonly isKnown: (inode: Inode) => boolean }> {
    if (!this.#store.recyclesVids) {
      const vids = await this.#cluster.vids(maxAgeMs);
      return { places: names.flatMap((name) => vids.placesOf(name)), isKnown: ({ vid }) => vids.isUsed(vid) };
    }
    // Clusters that use vids again leave gaps among those of a name.
    const known = await this.#namesInUse(maxAgeMs);
    const wanted = new Set(names);
    const places = [...known].filter(([, name]) => wanted.has(name)).map(([vid]) => vid);
    return { places, isKnown: ({ vid, name }) => known.get(vid) === name };
  }

  /** By vid; not older than `maxAgeMs`, nor than what we have made or deleted since. */
  #namesInUse(maxAgeMs: number): Promise<ReadonlyMap<number, string>> {
    const { changes } = this.#cluster;
    const known = this.#names;
    if (known?.changes === changes && performance.now() - known.askedAt < maxAgeMs) return known.answer;
    const answer = this.#inodes().then((inodes) => new Map(inodes.map(({ vid, name }) => [vid, name])));
    const asked = { askedAt: performance.now(), changes, answer };
    this.#names = asked;
    answer.catch(() => {
      if (this.#names === asked) this.#names = undefined;
    });
    return answer;
  }

  async usages(): Promise<ReadonlyMap<number, Usage>> {
    const counts = new UsageCount();
    let counting: Promise<void> = Promise.resolve();
    await inParallel(PARALLEL_TABLES, await this.#inodes(), async (inode) => {
      let map: Uint32Array;
      try {
        map = await this.#cluster.readOwners(inode);
      } catch (error) {
        if (!(error instanceof StoreError)) throw error;
        if (error.code === 'GONE' || error.code === 'DAMAGED') {
          if ((await this.#cluster.vids()).isLive(inode.vid)) counts.noteDamage(inode, error.message);
          return;
        }
        // A list without it would say that there is no such disk.
        const { code, message } = error;
        throw new StoreError(code, `what ${inode.name} uses cannot be counted: ${message}`, { cause: error });
      }
      // One at a time: else every one of them would have a slice of each turn.
      counting = counting.then(() => countTable(counts, inode, map));
      await counting;
    });
    return counts.result();
  }

  /**
   * A mark is set with a request of its own, after the one that makes the VDI. Until then the VDI is too small for anybody
   * to use, so that it is known for what it is if we do not live to set it (isBarelyMade).
   */
  async create(
    name: string,
    size: number,
    blockSizeShift: number,
    unfinished?: Unfinished,
    redundancy?: Redundancy,
  ): Promise<VdiRecord> {
    refuseShadowName(name);
    const firstSize = unfinished ? BARELY_MADE_BYTES : size;
    const policy = redundancy ? copyPolicyOf(redundancy) : CLUSTER_DEFAULT;
    const vid = await this.#newVdi({ name, size: firstSize, blockSizeShift, ...policy }, 0, false);
    if (unfinished) {
      await this.#writeTag(vid, unfinishedTag(unfinished));
      await this.#writeSize(vid, size);
    }
    return recordOf(await this.#cluster.readInode(vid));
  }

  /** Nodes make such a VDI all the same, with fewer copies than it says, and read nothing of a code that lacks strips. */
  async mustHold(redundancy: Redundancy): Promise<void> {
    const nodes = await this.#cluster.gateway.listNodes();
    const [needed, zones] = [zonesFor(redundancy), zonesIn(nodes)];
    // Nodes of a kind whose list is not known cannot be counted.
    if (nodes.length === 0 || needed <= zones) return;
    throw new StoreError(
      'LIMIT',
      `--copies ${formatRedundancy(redundancy)} needs ${needed} nodes in zones of their own, and ${this.#store.location} has ` +
        `${nodes.length} node${nodes.length === 1 ? '' : 's'} in ${zones} zone${zones === 1 ? '' : 's'}`,
    );
  }

  async isBarelyMade({ vid, size, parentVid, unfinished }: VdiRecord): Promise<boolean> {
    if (size !== BARELY_MADE_BYTES || parentVid !== 0 || unfinished) return false;
    return (await this.usage(vid)).allocated === 0;
  }

  async mark(sheep: SheepVdi, unfinished: Unfinished | undefined): Promise<VdiRecord> {
    const tag = unfinished ? unfinishedTag(unfinished) : '';
    await this.#writeTag(sheep.inode.vid, tag);
    sheep.retagged(tag);
    await this.#deleteLeftMarks(sheep.record.name);
    return sheep.record;
  }

  async open(vid: number): Promise<SheepVdi> {
    const opened = this.#store.open.get(vid);
    if (opened && !opened.failure) return opened;
    const found = await this.#cluster.readInode(vid);
    if (isShadow(found)) return this.#openShadow(found);
    // Who writes nothing may look at what somebody else has locked.
    const isOurs = !found.isSnapshot && this.#store.readOnlyBecause === undefined;
    if (isOurs) await this.#claim(found);
    let inode: Inode;
    let map: Uint32Array;
    try {
      // As whoever had the lock before has left it.
      inode = isOurs ? await this.#cluster.readInode(vid) : found;
      map = await this.#cluster.readOwners(inode);
    } catch (error) {
      if (isOurs) await this.#store.locks.release(vid).catch(() => undefined);
      throw error;
    }
    const vdi = new SheepVdi(this.#store, inode, map, async (closed) => {
      if (this.#store.open.get(closed.record.vid) === closed) this.#store.open.delete(closed.record.vid);
      if (isOurs && (await this.#isStillOurs(closed))) await this.#store.locks.release(closed.record.vid);
    });
    if (this.#doubtful.has(vid)) vdi.record = { ...vdi.record, isDoubtful: true };
    this.#store.open.set(vid, vdi);
    vdi.shadows = [...this.#shadows.values()].filter((shadow) => shadow.isLive && shadow.sourceName === inode.name);
    return vdi;
  }

  /** A vid that was deleted is another VDI's by now where vids are used again, and its lock too. */
  async #isStillOurs({ failure, inode }: SheepVdi): Promise<boolean> {
    if (failure === undefined || !this.#store.enforcesLocks || !this.#store.recyclesVids) return true;
    const found = await this.#cluster
      .readInode(inode.vid, { retryMs: CLOSING_LOOK_MS, isApart: true })
      .catch(goneIsNone);
    return found !== undefined && isSameVdi(found, inode);
  }

  prepareSwitch(sheep: SheepVdi, tag: string, takenAt?: number): Switch {
    const { unfinished } = sheep.record;
    refuseHyper(sheep.inode, 'snapshotted');
    let inode = sheep.inode;
    return {
      switchOver: async () => {
        // The new working VDI gets what the inode says now: somebody else may have resized it, or given it more copies.
        await sheep.look();
        inode = sheep.inode;
        await sheep.switching(async () => {
          // A snapshot of what is one already would put the working VDI back to it.
          const goesByName = await this.#mayGoByName(inode, 'snapshotted');
          // The snapshot keeps the mark in place of its tag until the new working VDI bears it: at no time it is nowhere.
          if (!unfinished) await this.#writeTag(inode.vid, tag);
          let vid: number;
          try {
            vid = await this.#replace(inode, inode, goesByName);
          } catch (error) {
            if (!unfinished) await this.#writeTag(inode.vid, inode.tag).catch(() => undefined);
            throw error;
          }
          const [made, { size }] = await Promise.all([
            this.#cluster.readInode(vid),
            this.#cluster.readInode(inode.vid),
          ]);
          await sheep.become(made, sheep.map);
          // Resized at this very moment: that is in the snapshot, and not in what goes on.
          if (made.size !== size) await this.#writeSize(vid, size);
        });
        await sheep.look();
      },
      finish: async () => {
        if (unfinished) {
          await this.#writeTag(sheep.inode.vid, inode.tag);
          sheep.retagged(inode.tag);
          await this.#writeTag(inode.vid, tag);
        }
        // The nodes have written the present time, and know no other request for it.
        if (takenAt !== undefined) {
          await this.#cluster.writeInodeBytes(inode.vid, INODE_SNAP_CTIME_OFFSET, encodeTime(takenAt));
        }
        const taken = await this.#cluster.readInode(inode.vid);
        if (!taken.isSnapshot) {
          throw new StoreError('IO', `the nodes took another VDI for ${inode.name}, and made that a snapshot`);
        }
        return recordOf(taken);
      },
    };
  }

  /** By copy-before-write (shadow.ts). */
  async prepareTemporary(sheep: SheepVdi, tag: string): Promise<Switch> {
    refuseHyper(sheep.inode, 'snapshotted');
    await sheep.look();
    await this.dropStaleShadows(sheep.record.name);
    const shadow = await this.#freeShadow(sheep.inode);
    return {
      switchOver: async () => {
        await this.#takeShadow(shadow, sheep, tag);
        this.#store.reads.users++;
        sheep.shadows = [...sheep.shadows, shadow];
      },
      finish: () =>
        Promise.resolve(
          shadowRecord(
            { ...shadow.inode, tag, isSnapshot: true, snapshotAt: shadow.takenAt, createdAt: sheep.inode.createdAt },
            sheep.record.name,
          ),
        ),
    };
  }

  async #takeShadow(shadow: Shadow, sheep: SheepVdi, tag: string): Promise<void> {
    for (let attempt = 0; ; attempt++) {
      await sheep.look();
      const source = sheep.inode;
      if (!(await this.#isWorking(source)) || (await this.#cluster.isReadOnly(source.vid, 0))) {
        await sheep.follow(source.vid);
        if (attempt < MAX_TAKE_ATTEMPTS) continue;
        throw new StoreError(
          'IO',
          `${source.name} is being snapshotted again and again; no temporary snapshot was taken`,
        );
      }
      await shadow.take(source, sheep.map, tag, this.#store.owner);
      // The nodes may have made a snapshot of it meanwhile, and have written back counts of before.
      if (!(await this.#cluster.isReadOnly(source.vid, 0))) return;
      await sheep.follow(source.vid);
      await shadow.retract(source, sheep.inode);
    }
  }

  /** Also if the nodes take something else for it. */
  async #isWorking(source: Inode): Promise<boolean> {
    if (await isFoundByName(this.#cluster, source)) return true;
    return this.#store.recyclesVids && isUnchanged(this.#cluster, source);
  }

  /** `dog` and qemu take a tag that is a number for a snapshot's id, and find another one by it (dog/vdi.c, -s). */
  whyNoTag(tag: string): string | undefined {
    if (!NUMBER.test(tag)) return undefined;
    return 'is a number, which other tools of a cluster take for the id of a snapshot; choose another tag';
  }

  async clone(vid: number, name: string): Promise<VdiRecord> {
    refuseShadowName(name);
    const base = await this.#cluster.readInode(vid);
    if (isShadow(base)) {
      throw new StoreError(
        'UNSUPPORTED',
        'a temporary snapshot cannot be cloned; take one that stays with "vdi snapshot"',
      );
    }
    // Whoever writes a VDI that is cloned from finds it read-only.
    if (!base.isSnapshot)
      throw new StoreError('IO', `${base.name} is no snapshot (any more); only snapshots are cloned`);
    refuseHyper(base, 'cloned');
    const made = await this.#newVdi({ ...base, name }, vid, false);
    return recordOf(await this.#cluster.readInode(made));
  }

  /**
   * The nodes make the working VDI a snapshot and the new one the working VDI in one operation; only then the old one is
   * deleted. Whatever fails, the name keeps a working VDI; and a mark, which the old one keeps until it is deleted.
   */
  async rollback(vid: number, snapshotVid: number, unfinished?: Unfinished): Promise<VdiRecord> {
    const working = await this.#cluster.readInode(vid);
    const base = await this.#cluster.readInode(snapshotVid);
    if (isShadow(base)) {
      throw new StoreError('UNSUPPORTED', 'a temporary snapshot cannot be rolled back to');
    }
    refuseHyper(base, 'rolled back to');
    let made = 0;
    await this.#store.locks.toEnd(working, async () => {
      const goesByName = await this.#mayGoByName(working, 'rolled back');
      made = await this.#replace(working, base, goesByName);
      if (unfinished) await this.#writeTag(made, unfinishedTag(unfinished));
      const replaced = await this.#cluster.readInode(vid);
      // The nodes make it a snapshot; if they did not, they have taken another one for it.
      if (!replaced.isSnapshot) {
        throw new StoreError(
          'IO',
          `${working.name} was changed by somebody else while it was rolled back; nothing was deleted`,
        );
      }
      await this.#delete(replaced);
    });
    await this.#deleteLeftMarks(working.name);
    return recordOf(await this.#cluster.readInode(made));
  }

  async resize(sheep: SheepVdi, size: number): Promise<VdiRecord> {
    for (let attempt = 0; ; attempt++) {
      await sheep.look();
      const { inode } = sheep;
      const count = objectCount(size, inode.blockSizeShift);
      for (let idx = count; idx < sheep.map.length; idx++) {
        if (sheep.map[idx] !== 0) throw new Error('invariant: a disk is cut off in front of data');
      }
      await this.#writeSize(inode.vid, size);
      // If somebody has taken a snapshot meanwhile, it is that one which has the size now.
      if (!(await this.#cluster.readInode(inode.vid)).isSnapshot) {
        sheep.resized({ ...inode, size });
        return sheep.record;
      }
      await this.#writeSize(inode.vid, inode.size);
      await sheep.follow(inode.vid);
      if (attempt === MAX_TAKE_ATTEMPTS) {
        throw new StoreError('IO', `${inode.name} is being snapshotted again and again; it was not resized`);
      }
    }
  }

  async remove(vid: number): Promise<void> {
    const inode = await this.#cluster.readInode(vid);
    if (isShadow(inode)) return this.#dropShadow(inode);
    if (inode.isSnapshot) return this.#delete(inode);
    await this.#store.locks.toEnd(inode, () => this.#delete(inode));
    await this.#deleteIdleShadows(inode.name);
    await this.#deleteLeftMarks(inode.name);
  }

  /** Nodes give space back by themselves, soon after. */
  reclaimed(): Promise<void> {
    return Promise.resolve();
  }

  async usage(vid: number): Promise<Usage> {
    const inode = await this.#cluster.readInode(vid);
    const map = await this.#cluster.readOwners(inode);
    const count = map.length;
    const shared = new Uint8Array(count);
    if (inode.isSnapshot) {
      // A working VDI's own objects are its alone. A snapshot's may be in any other table.
      const others = (await this.#inodes()).filter((other) => other.vid !== vid && other.storePolicy === 0);
      await inParallel(PARALLEL_READS, others, async (other) => {
        const table = await this.#tableOrNothing(
          other.vid,
          Math.min(count, objectCount(other.size, other.blockSizeShift)),
        );
        for (let idx = 0; idx < table.length; idx++) if (table[idx] !== 0 && table[idx] === map[idx]) shared[idx] = 1;
      });
    }
    let allocated = 0;
    let exclusive = 0;
    for (let idx = 0; idx < count; idx++) {
      if (map[idx] === 0) continue;
      allocated++;
      if (inode.isSnapshot ? shared[idx] === 0 : map[idx] === vid) exclusive++;
    }
    return { allocated, exclusive };
  }

  /** Of an inode that is gone, deleted or lost, nothing: it refers to nothing any more. */
  async #tableOrNothing(vid: number, count: number): Promise<Uint32Array> {
    try {
      return await this.#cluster.readTable(vid, count);
    } catch (error) {
      if ((error as StoreError).code !== 'GONE') throw error;
      return new Uint32Array(0);
    }
  }

  async damaged(name?: string): Promise<readonly DamagedVdi[]> {
    const vids = await this.#cluster.vids();
    const isAnywhere = name === undefined || this.#store.recyclesVids;
    const places = isAnywhere ? vids.live() : vids.placesOf(name);
    const known: Inode[] = [];
    const lost: number[] = [];
    await inParallel(PARALLEL_READS, places, async (vid) => {
      const inode = await inodeOrLost(this.#cluster, vid);
      if (inode) known.push(inode);
      else lost.push(vid);
    });
    if (lost.length === 0) return [];
    // Deleted since, or made this moment.
    const now = await this.#cluster.vids();
    const still: number[] = [];
    await inParallel(PARALLEL_READS, lost, async (vid) => {
      if (now.isLive(vid) && !(await inodeOrLost(this.#cluster, vid))) still.push(vid);
    });
    const described = describeLost(
      still.sort((a, b) => a - b),
      known,
      now,
      this.#store.recyclesVids,
    ).map((each) => {
      const open = this.#store.open.get(each.vid)?.record;
      return open ? { ...each, likelyName: open.name, isSnapshot: open.isSnapshot } : each;
    });
    return name === undefined ? described : described.filter(({ likelyName }) => likelyName === name);
  }

  /** Ask for every object that a table refers to. Objects nobody refers to are the cluster's own affair to find. */
  async check({ repair }: { readonly repair: boolean }): Promise<CheckReport> {
    if (repair) {
      throw new StoreError(
        'UNSUPPORTED',
        'nothing of a cluster is repaired from here: which of two copies is right, and what no table refers to, only its ' +
          "nodes can tell ('dog vdi check NAME' makes copies whole again). Check without --repair lists what is lost; " +
          "'serve --missing=zero' serves what is left",
      );
    }
    const inodes = await this.#inodes();
    const labels = labelsOf(inodes);
    const problems: string[] = [];
    let hidden = 0;
    const known = new Map<number, boolean>();
    const sector = Buffer.alloc(512);
    const damaged = await this.damaged();
    for (const { vid, likelyName, why } of damaged) {
      problems.push(
        `damaged: ${likelyName === undefined ? '' : `${likelyName}, probably, `}id ${vid.toString(16)}: ${why}`,
      );
    }
    for (const inode of inodes) {
      let map: Uint32Array;
      try {
        map = await this.#cluster.readOwners(inode);
      } catch (error) {
        const { code } = error as StoreError;
        if (code !== 'GONE' && code !== 'DAMAGED') throw error;
        problems.push(`damaged: ${labels.get(inode.vid)}, id ${inode.vid.toString(16)}: ${(error as Error).message}`);
        continue;
      }
      const present = await presentIn(map);
      await inParallel(PARALLEL_READS, present, async (idx) => {
        const owner = map[idx] as number;
        const key = objectKey(owner, idx);
        if (known.has(key)) return;
        known.set(key, await this.#exists(owner, idx, sector));
      });
      const label = labels.get(inode.vid) ?? '';
      for (const idx of present) {
        if (known.get(objectKey(map[idx] as number, idx))) continue;
        const from = idx * 2 ** inode.blockSizeShift;
        const to = Math.min(from + 2 ** inode.blockSizeShift, inode.size) - 1;
        if (problems.length < MAX_PROBLEMS) problems.push(`lost: ${label} bytes ${from} to ${to}`);
        else hidden++;
      }
    }
    if (hidden > 0) problems.push(`... and ${hidden} more`);
    return {
      objects: known.size,
      vdis: inodes.length + damaged.length,
      problems,
      orphans: 0,
      orphanBytes: 0,
      repaired: 0,
    };
  }

  /** The vid of the working VDI that goes on under this name; 0 if there is none. */
  async workingVid(name: string): Promise<number> {
    const vid = await this.#cluster.lookup(name);
    if (vid === 0 || !this.#store.recyclesVids) return vid;
    // The nodes may take a snapshot for it.
    const working = (await this.#inodes()).find((inode) => inode.name === name && !inode.isSnapshot);
    return working?.vid ?? 0;
  }

  /** Before `name` is written: shadows of it that no process keeps up to date any more. */
  async dropStaleShadows(name: string): Promise<void> {
    for (const inode of await this.#shadowsOf(name)) {
      if (!inode.isSnapshot || !isShadow(inode) || this.#shadows.get(inode.vid)?.isLive) continue;
      this.#store.log(`dropping a temporary snapshot of ${name} that an earlier process left behind`);
      await this.#shadowAt(inode, name).drop();
    }
  }

  /** At the end: what is alive has lost its readers. */
  async dropOwnShadows(): Promise<void> {
    for (const shadow of this.#shadows.values()) if (shadow.isLive) await this.#dropLive(shadow);
  }

  /** Inodes of all VDIs that are not deleted. */
  async #inodes(): Promise<Inode[]> {
    return this.#readInodes((await this.#cluster.vids()).live());
  }

  /** The same of those that bear one of these names. */
  async #inodesNamed(names: readonly string[], places: Iterable<number>): Promise<Inode[]> {
    const wanted = new Set(names);
    return (await this.#readInodes([...new Set(places)])).filter(({ name }) => wanted.has(name));
  }

  async #readInodes(vids: readonly number[]): Promise<Inode[]> {
    const inodes: Inode[] = [];
    await inParallel(PARALLEL_READS, vids, async (vid) => {
      try {
        const inode = await this.#cluster.readInode(vid);
        if (inode.name !== '') inodes.push(inode);
      } catch (error) {
        // Just being made, or lost; a list of the others is worth more than none.
        if ((error as StoreError).code !== 'GONE') throw error;
        if (this.#toldLost.has(vid)) return;
        this.#toldLost.add(vid);
        this.#store.log(`the inode of vid ${vid.toString(16)} cannot be read`, { err: error });
      }
    });
    return inodes.sort((a, b) => a.vid - b.vid);
  }

  /**
   * Somebody may have taken a snapshot while we read: then we have the snapshot, but not what goes on in its place, and a
   * disk that is in use would be missing. The nodes answer a look-up when they are through with it.
   */
  async #addLateWorking(inodes: Inode[]): Promise<void> {
    const working = new Set(inodes.filter(({ isSnapshot }) => !isSnapshot).map(({ name }) => name));
    const names = new Set(inodes.map(({ name }) => name).filter((name) => !isShadowName(name) && !working.has(name)));
    if (this.#store.recyclesVids) return this.#addLateIds(inodes, names);
    await inParallel(PARALLEL_READS, [...names], async (name) => {
      for (let attempt = 0; attempt < MAX_TAKE_ATTEMPTS; attempt++) {
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

  /** The same where vids are used again, and the nodes may find the snapshot by the name of what goes on in its place. */
  async #addLateIds(inodes: Inode[], names: ReadonlySet<string>): Promise<void> {
    const [first] = names;
    if (first === undefined) return;
    await this.#cluster.lookup(first);
    const known = new Set(inodes.map(({ vid }) => vid));
    const late = (await this.#cluster.vids()).live().filter((vid) => !known.has(vid));
    inodes.push(...(await this.#readInodes(late)).filter(({ name }) => names.has(name)));
    inodes.sort((a, b) => a.vid - b.vid);
  }

  async #exists(vid: number, idx: number, sector: Buffer): Promise<boolean> {
    try {
      await this.#cluster.readData(vid, idx, 0, sector);
      return true;
    } catch (error) {
      if ((error as StoreError).code !== 'GONE') throw error;
      return false;
    }
  }

  async #claim(inode: Inode): Promise<void> {
    for (const open of this.#store.open.values()) {
      if (open.record.isSnapshot || open.failure || open.record.name !== inode.name) continue;
      throw new StoreError('IO', `${inode.name} was snapshotted by somebody else at this moment; try again`);
    }
    await this.#store.locks.take(inode);
  }

  #openShadow(inode: Inode): SheepVdi {
    const shadow = this.#shadows.get(inode.vid);
    if (!shadow?.isLive) {
      throw new StoreError('IO', 'this temporary snapshot belongs to another process, or to one that has ended');
    }
    const taken = { ...inode, name: shadow.sourceName, tag: shadow.tag, isSnapshot: true };
    const vdi = new SheepVdi(this.#store, taken, shadow.map, (closed) => {
      this.#store.open.delete(closed.record.vid);
      return Promise.resolve();
    });
    vdi.record = shadowRecord(taken, shadow.sourceName);
    this.#store.open.set(inode.vid, vdi);
    return vdi;
  }

  #mayGoByName(working: Inode, done: string): Promise<boolean> {
    return mayGoByName(this.#cluster, working, this.#store.recyclesVids, done);
  }

  /** The working VDI becomes a snapshot, and one that reads as `base` goes on in its place. */
  async #replace(working: Inode, base: Inode, goesByName: boolean): Promise<number> {
    const request = (name: string): Promise<number> =>
      this.#newVdi({ ...base, name: working.name }, base.vid, true, working.vid, name);
    return goesByName ? request(working.name) : underOwnName(this.#cluster, working, request);
  }

  /** A request that makes a VDI cannot be repeated blindly: if its answer is lost, look whether it was made. */
  async #newVdi(
    like: Pick<Inode, 'name' | 'size' | 'copies' | 'copyPolicy' | 'blockSizeShift'>,
    baseVid: number,
    replacesWorking: boolean,
    replacedVid = baseVid,
    asName = like.name,
  ): Promise<number> {
    const { name, size, copies, copyPolicy, blockSizeShift } = like;
    const before = replacesWorking ? replacedVid : 0;
    try {
      const request = { name: asName, size, copies, copyPolicy, blockSizeShift, baseVid, replacesWorking };
      const vid = await this.#cluster.newVdi(request);
      return await this.#mustBeNew(vid, name, baseVid);
    } catch (error) {
      const vid = await this.#cluster.lookup(asName).catch(() => 0);
      if (vid === 0 || vid === before) throw error;
      const inode = await this.#cluster.readInode(vid);
      if (inode.isSnapshot || inode.name !== name || inode.parentVid !== baseVid) throw error;
      return vid;
    }
  }

  async #mustBeNew(vid: number, name: string, baseVid: number): Promise<number> {
    const made = await this.#cluster.readInode(vid);
    if (made.name === name && made.parentVid === baseVid) return vid;
    throw new StoreError('IO', `the nodes say that ${name} has the id ${vid.toString(16)} now, which is another VDI`);
  }

  /**
   * Errors: IO if somebody goes on making objects in it. Nodes delete such a VDI by half only (deleted-vdi.ts), and say that it
   * is done.
   */
  async #delete(found: Inode): Promise<void> {
    // Before its table is cleared: what the nodes cannot find by its name they cannot delete.
    await this.#cluster.mustBeFoundByNodes(found.name, found.isSnapshot ? found.snapId : 0);
    const inode = await nameToDelete(this.#cluster, found, this.#store.recyclesVids);
    const epoch = await this.#store.readEpoch();
    for (let attempt = 0; attempt < MAX_DELETE_ATTEMPTS; attempt++) {
      const own = await this.#clear(inode);
      const isGone = await deleteByName(this.#cluster, inode);
      if ((await this.#store.readEpoch()) !== epoch) await this.#removeOwn(inode, own);
      if (isGone) return;
    }
    throw new StoreError(
      'IO',
      `${inode.name} is not quite deleted: somebody else writes to it; stop that, and delete it again`,
    );
  }

  /** All of its table, whatever its size is: it may have been larger. Returns where it had objects of its own. */
  async #clear(inode: Inode): Promise<number[]> {
    const own: number[] = [];
    if (inode.storePolicy === 0) {
      const table = await this.#cluster.readTable(inode.vid, MAX_DATA_OBJECTS);
      for (let idx = 0; idx < table.length; idx++) if (table[idx] === inode.vid) own.push(idx);
      await clearTable(this.#cluster, inode.vid, table);
    } else {
      await clearHyper(this.#cluster, inode);
    }
    return own;
  }

  /**
   * Members have changed while the table was cleared: nodes may have forgotten objects (sheep-vdi.ts). Those of a working VDI
   * are in no other table but that of a temporary snapshot.
   */
  async #removeOwn(inode: Inode, own: readonly number[]): Promise<void> {
    if (inode.isSnapshot || isShadow(inode)) return;
    if ((await this.#shadowsOf(inode.name)).some(({ isSnapshot }) => isSnapshot)) return;
    await inParallel(PARALLEL_READS, own, (idx) => this.#cluster.removeData(inode.vid, idx));
  }

  #writeTag(vid: number, tag: string): Promise<void> {
    const bytes = Buffer.alloc(TAG_BYTES);
    bytesOfText(tag).copy(bytes, 0, 0, TAG_BYTES - 1);
    return this.#cluster.writeInodeBytes(vid, INODE_TAG_OFFSET, bytes);
  }

  #writeSize(vid: number, size: number): Promise<void> {
    const bytes = Buffer.alloc(8);
    bytes.writeBigUInt64LE(BigInt(size));
    return this.#cluster.writeInodeBytes(vid, INODE_VDI_SIZE_OFFSET, bytes);
  }

  /** Snapshots that bear a mark in place of a tag: of a snapshot or a rollback that was cut off. Nobody asked for them. */
  async #deleteLeftMarks(name: string): Promise<void> {
    const inodes = this.#store.recyclesVids
      ? await this.#inodes()
      : await this.#inodesNamed([name], (await this.#placesOf([name], 0)).places);
    for (const inode of inodes) if (inode.name === name && isLeftMark(inode)) await this.#delete(inode);
  }

  /** All shadows of a disk that the cluster has, in use or not. */
  async #shadowsOf(name: string): Promise<Inode[]> {
    const inodes: Inode[] = [];
    for (let slot = 0, free = 0; slot < MAX_SHADOWS && free < MAX_FREE_SLOTS; slot++) {
      const inode = await this.#findShadow(shadowName(name, slot));
      if (inode) inodes.push(inode);
      else free++;
    }
    return inodes;
  }

  async #findShadow(name: string): Promise<Inode | undefined> {
    // One that is alive looks like a snapshot, and those are found by their id only.
    const vid = (await this.#cluster.lookup(name)) || (await this.#cluster.lookup(name, 1));
    if (vid === 0) return undefined;
    const inode = await this.#cluster.readInode(vid);
    return inode.name === name ? inode : undefined;
  }

  /** An empty shadow that fits the disk: one that waits to be used again, else a new one. */
  async #freeShadow(source: Inode): Promise<Shadow> {
    for (let slot = 0; slot < MAX_SHADOWS; slot++) {
      const name = shadowName(source.name, slot);
      let inode = await this.#findShadow(name);
      if (inode?.isSnapshot) continue; // alive
      if (inode && !(await this.#fits(inode, source))) {
        await this.#delete(inode);
        this.#shadows.delete(inode.vid);
        inode = undefined;
      }
      if (!inode) {
        try {
          inode = await this.#cluster.readInode(await this.#newVdi({ ...source, name }, 0, false));
        } catch (error) {
          // The inode of the one that was there is lost; its name is of no use any more.
          if ((error as StoreError).code === 'DAMAGED') continue;
          throw error;
        }
      }
      return this.#shadowAt(inode, source.name);
    }
    throw new StoreError('LIMIT', `${source.name} has ${MAX_SHADOWS} temporary snapshots, and no more are possible`);
  }

  async #fits(inode: Inode, source: Inode): Promise<boolean> {
    return (
      inode.blockSizeShift === source.blockSizeShift &&
      inode.copies === source.copies &&
      inode.copyPolicy === source.copyPolicy &&
      // Nodes that were started while it was alive take it for a snapshot.
      !(await this.#cluster.isReadOnly(inode.vid, 0))
    );
  }

  #shadowAt(inode: Inode, sourceName: string): Shadow {
    const known = this.#shadows.get(inode.vid);
    // Another process may have deleted one, and its vid be used again.
    if (known?.name === inode.name) {
      known.sourceName = sourceName;
      return known;
    }
    const log = (line: string, details?: object): void => this.#store.log(line, details);
    const shadow = new Shadow(this.#cluster, this.#store.reads, inode, sourceName, log);
    this.#shadows.set(inode.vid, shadow);
    return shadow;
  }

  async #dropShadow(inode: Inode): Promise<void> {
    const known = this.#shadows.get(inode.vid);
    if (known?.isLive) return this.#dropLive(known);
    // Its source need not be known here; whoever uses it next says it anew.
    await this.#shadowAt(inode, known?.sourceName ?? inode.name).drop();
  }

  async #dropLive(shadow: Shadow): Promise<void> {
    for (const vdi of this.#store.open.values()) vdi.shadows = vdi.shadows.filter((other) => other !== shadow);
    this.#store.reads.users--;
    await shadow.drop();
  }

  async #deleteIdleShadows(name: string): Promise<void> {
    for (const inode of await this.#shadowsOf(name)) {
      if (inode.isSnapshot) continue;
      await this.#delete(inode);
      this.#shadows.delete(inode.vid);
    }
  }
}

/** Where there is an object. Hyper volumes have many millions of places, and few objects. */
async function presentIn(map: Uint32Array): Promise<number[]> {
  const present: number[] = [];
  for (let from = 0; from < map.length; from += ENTRIES_PER_TURN) {
    const to = Math.min(from + ENTRIES_PER_TURN, map.length);
    for (let idx = from; idx < to; idx++) if (map[idx] !== 0) present.push(idx);
    await new Promise((resolve) => setImmediate(resolve));
  }
  return present;
}

async function countTable(counts: UsageCount, inode: Inode, map: Uint32Array): Promise<void> {
  for (let from = 0; from < map.length; from += ENTRIES_PER_TURN) {
    counts.add(inode, map, from, Math.min(from + ENTRIES_PER_TURN, map.length));
    await new Promise((resolve) => setImmediate(resolve));
  }
  counts.note(inode);
}

function isLeftMark({ isSnapshot, tag }: Inode): boolean {
  return isSnapshot && parseUnfinishedTag(tag) !== undefined;
}

/** By name: marks that are left on snapshots, and are their working VDIs'. */
function leftMarks(inodes: readonly Inode[]): ReadonlyMap<string, Unfinished> {
  const marks = new Map<string, Unfinished>();
  for (const inode of inodes) {
    const unfinished = inode.isSnapshot ? parseUnfinishedTag(inode.tag) : undefined;
    if (unfinished) marks.set(inode.name, unfinished);
  }
  return marks;
}

function withMark(record: VdiRecord, marks: ReadonlyMap<string, Unfinished>): VdiRecord {
  const unfinished = record.isSnapshot ? undefined : (record.unfinished ?? marks.get(record.name));
  return unfinished ? { ...record, unfinished } : record;
}

function shadowRecord(inode: Inode, sourceName: string): VdiRecord {
  return { ...recordOf(inode), name: sourceName, parentVid: 0, isTemporary: true };
}

function prefixOf(name: string): string {
  return name.slice(0, name.lastIndexOf('-') + 1);
}

/** Errors: UNSUPPORTED. It would be taken for a temporary snapshot, and listed nowhere. */
function refuseShadowName(name: string): void {
  if (!isShadowName(name)) return;
  throw new StoreError('UNSUPPORTED', `${name}: such names are those of temporary snapshots here; choose another one`);
}

/** Errors: UNSUPPORTED, saying that a hyper volume is not `done` here. */
function refuseHyper(inode: Inode, done: string): void {
  if (inode.storePolicy === 0) return;
  throw new StoreError(
    'UNSUPPORTED',
    `${inode.name} is a hyper volume (made with -y) and is not ${done}: nodes do not count who shares its objects; copy it ` +
      'into a VDI of another kind for that',
  );
}
