/**
 * The catalog of a cluster: VDIs and snapshots as its own tools see them, and the temporary snapshots among them. Owns
 * the order of requests that make one operation, so that a failure in between leaves everything reachable.
 */
import type { Catalog, CheckReport, DamagedVdi, Usage } from '../object-store.js';
import type { Switch } from '../open-vdi.js';
import { StoreError } from '../store-error.js';
import { inOrder, type Redundancy, type Unfinished, type VdiRecord } from '../vdi-record.js';
import { mayGoByName } from './by-name.js';
import { formatRedundancy, zonesFor } from '../redundancy.js';
import type { ClusterClient } from './cluster-client.js';
import { CLUSTER_DEFAULT, zonesIn } from '../../sheepdog/copy-policy.js';
import { goneIsNone, isSameVdi } from './deleted-vdi.js';
import { markDoubtful, NUMBER } from './labels.js';
import { isOursToDrop } from './shadow-owner.js';
import { isShadow, isShadowName, shadowNames, shadowPrefix } from './shadow-names.js';
import { SheepLocks } from './sheep-locks.js';
import type { CatalogHost } from './catalog-host.js';
import { CatalogInodes } from './catalog-inodes.js';
import { Shadows } from './shadows.js';
import { findLost } from './lost-inodes.js';
import { deleteVdi } from './deletion.js';
import { makeVdi, replaceWorking } from './new-vdi.js';
import { cannotRepair, checkCatalog } from './catalog-check.js';
import { countUsage, countUsages } from './catalog-usage.js';
import { isLeftMark, leftMarks, withMark } from './left-marks.js';
import { encodeSize } from '../../sheepdog/inode.js';
import { encodeTag } from '../../sheepdog/text-fields.js';
import { inParallel } from '../../system/in-parallel.js';
import { SheepVdi } from './sheep-vdi.js';
import { objectCount } from '../../sheepdog/inode-table.js';
import {
  encodeTime,
  type Inode,
  INODE_SNAP_CTIME_OFFSET,
  INODE_TAG_OFFSET,
  INODE_VDI_SIZE_OFFSET,
} from '../../sheepdog/inode.js';
import { copyPolicyOf } from './redundancy-of.js';
import { unfinishedTag } from './unfinished-tag.js';
import { recordOf } from './vdi-record.js';

/** Age up to which known vids in use serve a look-up of a name; a name that is not found is looked up with new ones. */
const VIDS_AGE_MS = 1000;
/** Snapshots that other clients may take during a resize before it is given up. */
const MAX_TAKE_ATTEMPTS = 5;
/** Entries that a resize clears at a time. */
const PARALLEL_ENTRIES = 1024;
/** For asking, on close, whether a failed VDI still exists. */
const CLOSING_LOOK_MS = 2_000;
/**
 * Size of a VDI between its creation and its mark: less than a sector, so that it cannot be used, and no size that people choose.
 * No command of ours accepts it.
 */
const BARELY_MADE_BYTES = 509;

export class SheepCatalog implements Catalog {
  readonly #store: CatalogHost;
  readonly #inodes: CatalogInodes;
  readonly #shadows: Shadows;
  /** Vids of snapshots with ambiguous tags, as of the last list. */
  readonly #doubtful = new Set<number>();
  /** VDIs that cannot be followed any more; the log has said so. */
  readonly #astray = new WeakSet<SheepVdi>();

  readonly locks: SheepLocks;

  constructor(store: CatalogHost) {
    this.#store = store;
    this.#inodes = new CatalogInodes(store);
    this.#shadows = new Shadows(store);
    this.locks = new SheepLocks(store.cluster, store.enforcesLocks);
  }

  get #cluster(): ClusterClient {
    return this.#store.cluster;
  }

  async list(): Promise<VdiRecord[]> {
    const inodes = await this.#inodes.all();
    await this.#inodes.addLateWorking(inodes);
    return this.#recordsOf(inodes);
  }

  async #recordsOf(inodes: readonly Inode[]): Promise<VdiRecord[]> {
    const working = new Set(inodes.filter(({ isSnapshot }) => !isSnapshot).map(({ name }) => name));
    // If another client has snapshotted a VDI that is open here, it continues under the vid that the list shows.
    for (const inode of inodes) {
      const open = this.#store.open.get(inode.vid);
      if (!open || !inode.isSnapshot || open.record.isSnapshot) continue;
      // If it was deleted or rolled back, its users get the error; the list does not fail.
      if (working.has(inode.name)) await this.#follow(open, inode.vid);
    }
    const names = new Map<string, string>();
    for (const { name } of inodes) if (!isShadowName(name)) names.set(shadowPrefix(name), name);
    const records: VdiRecord[] = [];
    const marks = leftMarks(inodes);
    for (const inode of inodes) {
      if (!isShadow(inode)) records.push(withMark(recordOf(inode), marks));
      // Other shadows wait to be reused, or belong to another client of the cluster: not listed.
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

  /** Looks the name up as nodes do, by the vids that it hashes to, and reads no other inodes. */
  async named(name: string): Promise<VdiRecord[]> {
    const shadows = shadowNames(name);
    for (let maxAgeMs = VIDS_AGE_MS; ; maxAgeMs = 0) {
      // Where vids are reused the answer may be a snapshot, and is not used: the look-up only waits until a snapshot in
      // progress is
      // complete.
      if (this.#store.recyclesVids && maxAgeMs === 0) await this.#cluster.lookup(name);
      const { places, isKnown } = await this.#inodes.placesOf([name, ...shadows], maxAgeMs);
      const inodes = await this.#inodes.named([name, ...shadows], places);
      if (!this.#store.recyclesVids) await this.#inodes.addLateWorking(inodes);
      const isThere = inodes.some((inode) => inode.name === name);
      const hasWorking = inodes.some((inode) => inode.name === name && !inode.isSnapshot);
      // The inodes are newer than the known vids.
      const isOutdated = !isThere || !inodes.every(isKnown) || (this.#store.recyclesVids && !hasWorking);
      if (maxAgeMs > 0 && isOutdated) continue;
      // It was made at this moment, or nodes of another kind hash names differently.
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
    const [inode] = await this.#inodes.read([vid]);
    if (!inode) return undefined;
    const name = isShadow(inode) ? this.#shadows.get(vid)?.sourceName : inode.name;
    const records = name === undefined ? await this.list() : await this.named(name);
    return records.find((record) => record.vid === vid);
  }

  /**
   * The mark is set with a separate request, after the one that makes the VDI. Until then the VDI is too small to be used, so
   * that it is recognised if this process dies in between (isBarelyMade).
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
    const vid = await makeVdi(this.#cluster, { name, size: firstSize, blockSizeShift, ...policy }, 0, false);
    if (unfinished) {
      await this.#writeTag(vid, unfinishedTag(unfinished));
      await this.#writeSize(vid, size);
    }
    return recordOf(await this.#cluster.readInode(vid));
  }

  /** Nodes would create the VDI all the same: with fewer copies than it says, or with an erasure code that cannot be read. */
  async mustHold(redundancy: Redundancy): Promise<void> {
    const nodes = await this.#cluster.pool.listNodes();
    const [needed, zones] = [zonesFor(redundancy), zonesIn(nodes)];
    // An empty list: the nodes cannot be counted.
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
    // A reader needs no lock.
    const isOurs = !found.isSnapshot && this.#store.readOnlyBecause === undefined;
    if (isOurs) await this.#claim(found);
    let inode: Inode;
    let map: Uint32Array;
    try {
      // Read again under the lock: its last holder may have changed it.
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
    vdi.shadows = this.#shadows.liveOf(inode.name);
    return vdi;
  }

  /** Where vids are reused, a deleted vid and its lock may belong to another VDI now. */
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
        // The new working VDI gets the fields of the inode: another client may have changed its size or copies.
        await sheep.look();
        inode = sheep.inode;
        await sheep.switching(async () => {
          // Must still be the working VDI: a request on a snapshot would roll the working VDI back to it.
          const goesByName = await this.#mayGoByName(inode, 'snapshotted');
          // The snapshot keeps the mark in place of its tag until the new working VDI has it: one of them always has it.
          if (!unfinished) await this.#writeTag(inode.vid, tag);
          let vid: number;
          try {
            vid = await replaceWorking(this.#cluster, inode, inode, goesByName);
          } catch (error) {
            if (!unfinished) await this.#writeTag(inode.vid, inode.tag).catch(() => undefined);
            throw error;
          }
          const [made, { size }] = await Promise.all([
            this.#cluster.readInode(vid),
            this.#cluster.readInode(inode.vid),
          ]);
          await sheep.become(made, sheep.map);
          // Another client resized it at this moment: the size is in the snapshot, not in the new working VDI.
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
        // The nodes have written the present time; no request sets another one.
        if (takenAt !== undefined) {
          await this.#cluster.writeInodeBytes(inode.vid, INODE_SNAP_CTIME_OFFSET, encodeTime(takenAt));
        }
        const taken = await this.#cluster.readInode(inode.vid);
        if (!taken.isSnapshot) {
          throw new StoreError('IO', `the nodes have made another VDI a snapshot, in place of ${inode.name}`);
        }
        return recordOf(taken);
      },
    };
  }

  /** By copy-before-write (shadow.ts). */
  async prepareTemporary(sheep: SheepVdi, tag: string): Promise<Switch> {
    refuseHyper(sheep.inode, 'snapshotted');
    await sheep.look();
    await this.#shadows.dropStale(sheep.record.name);
    const shadow = await this.#shadows.free(sheep.inode);
    return {
      switchOver: async () => {
        await this.#shadows.take(shadow, sheep, tag);
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
        'a temporary snapshot cannot be cloned; take a permanent one with "vdi snapshot"',
      );
    }
    // Nodes would make a working VDI read-only for its writers.
    if (!base.isSnapshot)
      throw new StoreError('IO', `${base.name} is not a snapshot, or no longer; only snapshots can be cloned`);
    refuseHyper(base, 'cloned');
    const made = await makeVdi(this.#cluster, { ...base, name }, vid, false);
    return recordOf(await this.#cluster.readInode(made));
  }

  /**
   * In one operation the nodes make the working VDI a snapshot and the new VDI the working one; only then is the old one
   * deleted. If anything fails, the name still has a working VDI, and a mark is still on one of them.
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
      made = await replaceWorking(this.#cluster, working, base, goesByName);
      if (unfinished) await this.#writeTag(made, unfinishedTag(unfinished));
      const replaced = await this.#cluster.readInode(vid);
      // If it is no snapshot, the nodes have replaced another VDI.
      if (!replaced.isSnapshot) {
        throw new StoreError(
          'IO',
          `${working.name} was changed by another client while it was rolled back; nothing was deleted`,
        );
      }
      await deleteVdi(this.#store, replaced);
    });
    await this.#deleteLeftMarks(working.name);
    return recordOf(await this.#cluster.readInode(made));
  }

  async resize(sheep: SheepVdi, size: number): Promise<VdiRecord> {
    for (let attempt = 0; attempt <= MAX_TAKE_ATTEMPTS; attempt++) {
      await sheep.look();
      const { inode } = sheep;
      if (!(await clearBehind(sheep, objectCount(size, inode.blockSizeShift)))) continue;
      await this.#writeSize(inode.vid, size);
      // If another client has taken a snapshot meanwhile, the size was written to the snapshot.
      if (!(await this.#cluster.readInode(inode.vid)).isSnapshot) {
        sheep.resized({ ...inode, size });
        return sheep.record;
      }
      await this.#writeSize(inode.vid, inode.size);
      await sheep.follow(inode.vid);
    }
    throw new StoreError('IO', `${sheep.record.name} is being snapshotted again and again; it was not resized`);
  }

  async remove(vid: number): Promise<void> {
    const inode = await this.#cluster.readInode(vid);
    if (isShadow(inode)) return this.#shadows.drop(inode);
    if (inode.isSnapshot) return deleteVdi(this.#store, inode);
    await this.#store.locks.toEnd(inode, () => deleteVdi(this.#store, inode));
    await this.#shadows.deleteIdle(inode.name);
    await this.#deleteLeftMarks(inode.name);
  }

  /** Nodes free the space by themselves, soon after. */
  reclaimed(): Promise<void> {
    return Promise.resolve();
  }

  usages(): Promise<ReadonlyMap<number, Usage>> {
    return countUsages(this.#cluster, () => this.#inodes.all());
  }

  usage(vid: number): Promise<Usage> {
    return countUsage(this.#cluster, vid, () => this.#inodes.all());
  }

  async damaged(name?: string): Promise<readonly DamagedVdi[]> {
    const lost = (await findLost(this.#cluster, name)).map((each) => {
      const open = this.#store.open.get(each.vid)?.record;
      return open ? { ...each, likelyName: open.name, isSnapshot: open.isSnapshot } : each;
    });
    return name === undefined ? lost : lost.filter(({ likelyName }) => likelyName === name);
  }

  /** Errors: UNSUPPORTED (repair), and as reading inodes and tables. */
  async check({ repair }: { readonly repair: boolean }): Promise<CheckReport> {
    if (repair) throw cannotRepair();
    return checkCatalog(this.#cluster, await this.#inodes.all(), await this.damaged());
  }

  /** The vid of the working VDI of this name; 0 if there is none. */
  async workingVid(name: string): Promise<number> {
    const vid = await this.#cluster.lookup(name);
    if (vid === 0 || !this.#store.recyclesVids) return vid;
    // The nodes may have answered with a snapshot.
    const working = (await this.#inodes.all()).find((inode) => inode.name === name && !inode.isSnapshot);
    return working?.vid ?? 0;
  }

  /** Call before `name` is written: drops its shadows that no living process keeps up to date. */
  dropStaleShadows(name: string): Promise<void> {
    return this.#shadows.dropStale(name);
  }

  /** Call when the store closes: drops all live shadows of this process. */
  dropOwnShadows(): Promise<void> {
    return this.#shadows.dropLive();
  }

  async #claim(inode: Inode): Promise<void> {
    for (const open of this.#store.open.values()) {
      if (open.record.isSnapshot || open.failure || open.record.name !== inode.name) continue;
      throw new StoreError('IO', `another client has taken a snapshot of ${inode.name} at this moment; try again`);
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

  #writeTag(vid: number, tag: string): Promise<void> {
    return this.#cluster.writeInodeBytes(vid, INODE_TAG_OFFSET, encodeTag(tag));
  }

  #writeSize(vid: number, size: number): Promise<void> {
    return this.#cluster.writeInodeBytes(vid, INODE_VDI_SIZE_OFFSET, encodeSize(size));
  }

  /** Deletes snapshots with a mark in place of a tag: left by a snapshot or a rollback that was cut off. */
  async #deleteLeftMarks(name: string): Promise<void> {
    const inodes = this.#store.recyclesVids
      ? await this.#inodes.all()
      : await this.#inodes.named([name], (await this.#inodes.placesOf([name], 0)).places);
    for (const inode of inodes) if (inode.name === name && isLeftMark(inode)) await deleteVdi(this.#store, inode);
  }
}

function shadowRecord(inode: Inode, sourceName: string): VdiRecord {
  return { ...recordOf(inode), name: sourceName, parentVid: 0, isTemporary: true };
}

function prefixOf(name: string): string {
  return name.slice(0, name.lastIndexOf('-') + 1);
}

/** Errors: UNSUPPORTED (the name is that of a shadow: the VDI would be listed nowhere). */
function refuseShadowName(name: string): void {
  if (!isShadowName(name)) return;
  throw new StoreError(
    'UNSUPPORTED',
    `${name}: names of this form are reserved for temporary snapshots; choose another one`,
  );
}

/** Errors: UNSUPPORTED (a hyper volume). `done`: the operation, for the message. */
function refuseHyper(inode: Inode, done: string): void {
  if (inode.storePolicy === 0) return;
  throw new StoreError(
    'UNSUPPORTED',
    `${inode.name} is a hyper volume (made with -y) and cannot be ${done}: nodes do not count the references to its ` +
      'objects; copy it into an ordinary VDI first',
  );
}

/**
 * Clears the entries from `count` on: zeros that a snapshot shares have stayed there, and nodes would count references of
 * objects behind the end for ever. False if another client has taken a snapshot meanwhile.
 */
async function clearBehind(sheep: SheepVdi, count: number): Promise<boolean> {
  const left: number[] = [];
  for (let idx = count; idx < sheep.map.length; idx++) if (sheep.map[idx] !== 0) left.push(idx);
  try {
    await inParallel(PARALLEL_ENTRIES, left, (idx) => sheep.setOwner(idx, 0));
    return true;
  } catch (error) {
    if ((error as StoreError).code === 'MOVED') return false;
    throw error;
  }
}
