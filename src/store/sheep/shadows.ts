/**
 * The shadows (temporary snapshots) that this process has made or taken over. Owns which are alive and which wait to be reused; a
 * shadow itself is in shadow.ts.
 */
import type { Inode } from '../../sheepdog/inode.js';
import { StoreError } from '../store-error.js';
import { isFoundByName, isUnchanged } from './by-name.js';
import type { CatalogHost } from './catalog-host.js';
import type { ClusterClient } from './cluster-client.js';
import { deleteVdi } from './deletion.js';
import { makeVdi } from './new-vdi.js';
import { findShadow, shadowInodesOf } from './shadow-inodes.js';
import { isShadow, MAX_SHADOWS, shadowName } from './shadow-names.js';
import { Shadow } from './shadow.js';
import type { SheepVdi } from './sheep-vdi.js';

/** Snapshots that other clients may take while a temporary one is taken. */
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

  /** Live shadows of the disk. */
  liveOf(name: string): Shadow[] {
    return [...this.#byVid.values()].filter((shadow) => shadow.isLive && shadow.sourceName === name);
  }

  /**
   * Makes the shadow a snapshot of `sheep`; its writers must be held. Errors: IO (snapshotted again and again), and as
   * Shadow.take.
   */
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
      // If another client took a snapshot meanwhile, the nodes have written old counts back.
      if (!(await this.#cluster.isReadOnly(source.vid, 0))) return;
      await sheep.follow(source.vid);
      await shadow.retract(source, sheep.inode);
    }
  }

  /** True also where the nodes find another VDI by its name. */
  async #isWorking(source: Inode): Promise<boolean> {
    if (await isFoundByName(this.#cluster, source)) return true;
    return this.#host.recyclesVids && isUnchanged(this.#cluster, source);
  }

  /** Drops shadows of `name` that no living process keeps up to date. */
  async dropStale(name: string): Promise<void> {
    for (const inode of await shadowInodesOf(this.#cluster, name)) {
      if (!inode.isSnapshot || !isShadow(inode) || this.#byVid.get(inode.vid)?.isLive) continue;
      this.#host.log(`dropping a temporary snapshot of ${name} that an earlier process left behind`);
      await this.#shadowAt(inode, name).drop();
    }
  }

  /** Drops all live shadows. */
  async dropLive(): Promise<void> {
    for (const shadow of this.#byVid.values()) if (shadow.isLive) await this.#drop(shadow);
  }

  /** An empty shadow that fits the disk: one that waits to be reused, or a new one. Errors: LIMIT, and as makeVdi. */
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
          // The inode of the shadow with this name is lost: the name cannot be used.
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
      // Nodes that started while it was alive believe that it is a snapshot.
      !(await this.#cluster.isReadOnly(inode.vid, 0))
    );
  }

  #shadowAt(inode: Inode, sourceName: string): Shadow {
    const known = this.#byVid.get(inode.vid);
    // Another process may have deleted it, and the vid may have been reused.
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
    // Its source may be unknown here; the next user sets it.
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
