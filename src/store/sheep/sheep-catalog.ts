/**
 * The catalog of a cluster: VDIs and snapshots as its own tools see them, and the temporary snapshots among them. Owns
 * the order of requests that make one operation, so that a failure in between leaves everything reachable.
 */
import {
  inOrder,
  StoreError,
  type Catalog,
  type CheckReport,
  type DamagedVdi,
  type OpenVdi,
  type Redundancy,
  type Switch,
  type Unfinished,
  type Usage,
  type VdiRecord,
} from '../object-store.js';
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

/** How old may be what is known of the vids in use when one name is looked up; what is not found is looked up anew. */
const VIDS_AGE_MS = 1000;
/** Snapshots that others may take while we take a temporary one, or look what there is. */
const MAX_TAKE_ATTEMPTS = 5;
/** For asking whether what was given up is still there when it is closed. */
const CLOSING_LOOK_MS = 2_000;
/**
 * Size of a VDI between its making and its mark: no whole sector, so that nobody uses it, and a size that nobody chooses. Of
 * ours no command takes it.
 */
const BARELY_MADE_BYTES = 509;

export class SheepCatalog implements Catalog {
  readonly #store: CatalogHost;
  readonly #inodes: CatalogInodes;
  readonly #shadows: Shadows;
  /** Snapshots whose tags do not say them, as of when they were last looked at. */
  readonly #doubtful = new Set<number>();
  /** What cannot be followed any more, and was told of. */
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
      const { places, isKnown } = await this.#inodes.placesOf([name, ...shadows], maxAgeMs);
      const inodes = await this.#inodes.named([name, ...shadows], places);
      if (!this.#store.recyclesVids) await this.#inodes.addLateWorking(inodes);
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
    const [inode] = await this.#inodes.read([vid]);
    if (!inode) return undefined;
    const name = isShadow(inode) ? this.#shadows.get(vid)?.sourceName : inode.name;
    const records = name === undefined ? await this.list() : await this.named(name);
    return records.find((record) => record.vid === vid);
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
    const vid = await makeVdi(this.#cluster, { name, size: firstSize, blockSizeShift, ...policy }, 0, false);
    if (unfinished) {
      await this.#writeTag(vid, unfinishedTag(unfinished));
      await this.#writeSize(vid, size);
    }
    return recordOf(await this.#cluster.readInode(vid));
  }

  /** Nodes make such a VDI all the same, with fewer copies than it says, and read nothing of a code that lacks strips. */
  async mustHold(redundancy: Redundancy): Promise<void> {
    const nodes = await this.#cluster.pool.listNodes();
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

  async mark(vdi: OpenVdi, unfinished: Unfinished | undefined): Promise<VdiRecord> {
    const sheep = asSheepVdi(vdi);
    const tag = unfinished ? unfinishedTag(unfinished) : '';
    await this.#writeTag(sheep.inode.vid, tag);
    sheep.retagged(tag);
    await this.#deleteLeftMarks(sheep.record.name);
    return sheep.record;
  }

  async open(vid: number): Promise<OpenVdi> {
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
    vdi.shadows = this.#shadows.liveOf(inode.name);
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

  prepareSwitch(vdi: OpenVdi, tag: string, takenAt?: number): Switch {
    const sheep = asSheepVdi(vdi);
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
  async prepareTemporary(vdi: OpenVdi, tag: string): Promise<Switch> {
    const sheep = asSheepVdi(vdi);
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
        'a temporary snapshot cannot be cloned; take one that stays with "vdi snapshot"',
      );
    }
    // Whoever writes a VDI that is cloned from finds it read-only.
    if (!base.isSnapshot)
      throw new StoreError('IO', `${base.name} is no snapshot (any more); only snapshots are cloned`);
    refuseHyper(base, 'cloned');
    const made = await makeVdi(this.#cluster, { ...base, name }, vid, false);
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
      made = await replaceWorking(this.#cluster, working, base, goesByName);
      if (unfinished) await this.#writeTag(made, unfinishedTag(unfinished));
      const replaced = await this.#cluster.readInode(vid);
      // The nodes make it a snapshot; if they did not, they have taken another one for it.
      if (!replaced.isSnapshot) {
        throw new StoreError(
          'IO',
          `${working.name} was changed by somebody else while it was rolled back; nothing was deleted`,
        );
      }
      await deleteVdi(this.#store, replaced);
    });
    await this.#deleteLeftMarks(working.name);
    return recordOf(await this.#cluster.readInode(made));
  }

  async resize(vdi: OpenVdi, size: number): Promise<VdiRecord> {
    const sheep = asSheepVdi(vdi);
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
    if (isShadow(inode)) return this.#shadows.drop(inode);
    if (inode.isSnapshot) return deleteVdi(this.#store, inode);
    await this.#store.locks.toEnd(inode, () => deleteVdi(this.#store, inode));
    await this.#shadows.deleteIdle(inode.name);
    await this.#deleteLeftMarks(inode.name);
  }

  /** Nodes give space back by themselves, soon after. */
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

  /** Ask for every object that a table refers to. Objects nobody refers to are the cluster's own affair to find. */
  async check({ repair }: { readonly repair: boolean }): Promise<CheckReport> {
    if (repair) throw cannotRepair();
    return checkCatalog(this.#cluster, await this.#inodes.all(), await this.damaged());
  }

  /** The vid of the working VDI that goes on under this name; 0 if there is none. */
  async workingVid(name: string): Promise<number> {
    const vid = await this.#cluster.lookup(name);
    if (vid === 0 || !this.#store.recyclesVids) return vid;
    // The nodes may take a snapshot for it.
    const working = (await this.#inodes.all()).find((inode) => inode.name === name && !inode.isSnapshot);
    return working?.vid ?? 0;
  }

  /** Before `name` is written: shadows of it that no process keeps up to date any more. */
  dropStaleShadows(name: string): Promise<void> {
    return this.#shadows.dropStale(name);
  }

  /** At the end: what is alive has lost its readers. */
  dropOwnShadows(): Promise<void> {
    return this.#shadows.dropLive();
  }

  async #claim(inode: Inode): Promise<void> {
    for (const open of this.#store.open.values()) {
      if (open.record.isSnapshot || open.failure || open.record.name !== inode.name) continue;
      throw new StoreError('IO', `${inode.name} was snapshotted by somebody else at this moment; try again`);
    }
    await this.#store.locks.take(inode);
  }

  #openShadow(inode: Inode): OpenVdi {
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

  /** Snapshots that bear a mark in place of a tag: of a snapshot or a rollback that was cut off. Nobody asked for them. */
  async #deleteLeftMarks(name: string): Promise<void> {
    const inodes = this.#store.recyclesVids
      ? await this.#inodes.all()
      : await this.#inodes.named([name], (await this.#inodes.placesOf([name], 0)).places);
    for (const inode of inodes) if (inode.name === name && isLeftMark(inode)) await deleteVdi(this.#store, inode);
  }
}

/** Callers give back what `open` has returned. */
function asSheepVdi(vdi: OpenVdi): SheepVdi {
  if (!(vdi instanceof SheepVdi)) throw new Error('invariant: a VDI of another store');
  return vdi;
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
