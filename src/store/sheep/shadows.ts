/**
 * The temporary snapshots that this process has made or taken over. Owns which are alive, and which wait to be used again; what
 * one does is in shadow.ts.
 */
import type { Inode } from '../../sheepdog/inode.js';
import { StoreError } from '../object-store.js';
import { isFoundByName, isUnchanged } from './by-name.js';
import type { CatalogHost } from './catalog-host.js';
import type { ClusterClient } from './cluster-client.js';
import { deleteVdi } from './deletion.js';
import { makeVdi } from './new-vdi.js';
import { findShadow, shadowInodesOf } from './shadow-inodes.js';
import { isShadow, MAX_SHADOWS, shadowName } from './shadow-names.js';
import { Shadow } from './shadow.js';
import type { SheepVdi } from './sheep-vdi.js';

/** Snapshots that others may take while we take a temporary one. */
const MAX_TAKE_ATTEMPTS = 5;

export class Shadows {
  readonly #host: CatalogHost;
  /** By vid, alive or waiting to be used again. */
  readonly #byVid = new Map<number, Shadow>();

  constructor(host: CatalogHost) {
    this.#host = host;
  }

  get #cluster(): ClusterClient {
    return this.#host.cluster;
  }

  get(vid: number): Shadow | undefined {
    return this.#byVid.get(vid);
  }

  /** Alive ones of the disk. */
  liveOf(name: string): Shadow[] {
    return [...this.#byVid.values()].filter((shadow) => shadow.isLive && shadow.sourceName === name);
  }

  async take(shadow: Shadow, sheep: SheepVdi, tag: string): Promise<void> {
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
      await shadow.take(source, sheep.map, tag, this.#host.owner);
      // The nodes may have made a snapshot of it meanwhile, and have written back counts of before.
      if (!(await this.#cluster.isReadOnly(source.vid, 0))) return;
      await sheep.follow(source.vid);
      await shadow.retract(source, sheep.inode);
    }
  }

  /** Also if the nodes take something else for it. */
  async #isWorking(source: Inode): Promise<boolean> {
    if (await isFoundByName(this.#cluster, source)) return true;
    return this.#host.recyclesVids && isUnchanged(this.#cluster, source);
  }

  /** Before `name` is written: shadows of it that no process keeps up to date any more. */
  async dropStale(name: string): Promise<void> {
    for (const inode of await shadowInodesOf(this.#cluster, name)) {
      if (!inode.isSnapshot || !isShadow(inode) || this.#byVid.get(inode.vid)?.isLive) continue;
      this.#host.log(`dropping a temporary snapshot of ${name} that an earlier process left behind`);
      await this.#shadowAt(inode, name).drop();
    }
  }

  /** At the end: what is alive has lost its readers. */
  async dropLive(): Promise<void> {
    for (const shadow of this.#byVid.values()) if (shadow.isLive) await this.#drop(shadow);
  }

  /** An empty shadow that fits the disk: one that waits to be used again, else a new one. */
  async free(source: Inode): Promise<Shadow> {
    for (let slot = 0; slot < MAX_SHADOWS; slot++) {
      const name = shadowName(source.name, slot);
      let inode = await findShadow(this.#cluster, name);
      if (inode?.isSnapshot) continue; // alive
      if (inode && !(await this.#fits(inode, source))) {
        await deleteVdi(this.#host, inode);
        this.#byVid.delete(inode.vid);
        inode = undefined;
      }
      if (!inode) {
        try {
          inode = await this.#cluster.readInode(await makeVdi(this.#cluster, { ...source, name }, 0, false));
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
    const known = this.#byVid.get(inode.vid);
    // Another process may have deleted one, and its vid be used again.
    if (known?.name === inode.name) {
      known.sourceName = sourceName;
      return known;
    }
    const log = (line: string, details?: object): void => this.#host.log(line, details);
    const shadow = new Shadow(this.#cluster, this.#host.reads, inode, sourceName, log);
    this.#byVid.set(inode.vid, shadow);
    return shadow;
  }

  async drop(inode: Inode): Promise<void> {
    const known = this.#byVid.get(inode.vid);
    if (known?.isLive) return this.#drop(known);
    // Its source need not be known here; whoever uses it next says it anew.
    await this.#shadowAt(inode, known?.sourceName ?? inode.name).drop();
  }

  async #drop(shadow: Shadow): Promise<void> {
    for (const vdi of this.#host.open.values()) vdi.shadows = vdi.shadows.filter((other) => other !== shadow);
    this.#host.reads.users--;
    await shadow.drop();
  }

  async deleteIdle(name: string): Promise<void> {
    for (const inode of await shadowInodesOf(this.#cluster, name)) {
      if (inode.isSnapshot) continue;
      await deleteVdi(this.#host, inode);
      this.#byVid.delete(inode.vid);
    }
  }
}
