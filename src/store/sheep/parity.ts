/**
 * Stale parity: erasure-coded objects that were written while there were fewer nodes than strips. Nodes then leave out the strips
 * that have no node, parity first. A node that comes back uses its old strip, if it had that strip before it went
 * (sheep/recovery.c, read_erasure_object: from the newest epoch back to the oldest in which any node has the strip). Reads do
 * not show it, until another node goes and data is computed from the stale strip. Writing the whole object, once all nodes are
 * back, makes all strips new.
 *
 * Owns which objects of one VDI must be written again, and writes them.
 */
import type { ClusterClient } from './cluster-client.js';
import { oidKey } from '../../sheepdog/object-ids.js';
import type { WriteOrder } from './write-order.js';

export interface ParityHost {
  readonly cluster: ClusterClient;
  readonly order: WriteOrder;
  log(line: string, details?: object): void;
}

/** The VDI as it is now. */
export interface CodedVdi {
  readonly map: Uint32Array;
  readonly record: { readonly vid: number; readonly name: string; readonly blockSizeShift: number };
  /** `copies`: strips of an object. */
  readonly inode: { readonly copies: number; readonly copyPolicy: number };
}

export class OldParity {
  readonly #host: ParityHost;
  readonly #vdi: CodedVdi;
  #writing: Promise<void> | undefined;
  #isClosed = false;

  constructor(host: ParityHost, vdi: CodedVdi) {
    this.#host = host;
    this.#vdi = vdi;
  }

  /** Call before and after object `idx` is written. */
  note(idx: number): void {
    const { inode, record } = this.#vdi;
    const { recovery, oldParity } = this.#host.cluster;
    if (inode.copyPolicy === 0 || recovery.isComplete(inode.copies)) return;
    let written = oldParity.get(record.vid);
    if (!written) oldParity.set(record.vid, (written = new Set()));
    written.add(idx);
  }

  /** Writes the noted objects again, if all nodes are back. Never fails: what could not be written stays for the next time. */
  async renew(): Promise<void> {
    this.#writing ??= this.#renew().finally(() => (this.#writing = undefined));
    await this.#writing;
  }

  /** No writes after this. The remaining objects are written again when the VDI is next opened for writing. */
  async close(): Promise<void> {
    this.#isClosed = true;
    await this.#writing;
    const { name, vid } = this.#vdi.record;
    const left = this.#host.cluster.oldParity.get(vid)?.size;
    if (left === undefined) return;
    // Without the words "all parity is new", which operators search the log for.
    this.#host.log(
      `${name} is closed, and ${left} of its objects were written while nodes were missing: take no other node down before ` +
        'the disk has been written again and their parity has been rebuilt',
    );
  }

  async #renew(): Promise<void> {
    const { cluster } = this.#host;
    const { copies } = this.#vdi.inode;
    const { name, vid } = this.#vdi.record;
    const written = cluster.oldParity.get(vid);
    if (!written || !cluster.recovery.isComplete(copies)) return;
    this.#host.log(
      `${name}: rebuilding the parity of ${written.size} objects; take no other node down until this is done`,
    );
    for (const idx of written) {
      // Under another vid, too: the object belongs to a snapshot then, and is read-only.
      if (this.#isClosed || this.#vdi.record.vid !== vid || !cluster.recovery.isComplete(copies)) return;
      try {
        await this.#renewObject(vid, idx, written);
      } catch (error) {
        this.#host.log(`${name}: the parity of object ${idx} was not rebuilt: ${(error as Error).message}`);
        return;
      }
    }
    if (written.size > 0) return;
    cluster.oldParity.delete(vid);
    this.#host.log(`${name}: all parity is new`);
  }

  async #renewObject(vid: number, idx: number, written: Set<number>): Promise<void> {
    const { cluster, order } = this.#host;
    const bytes = Buffer.alloc(2 ** this.#vdi.record.blockSizeShift);
    await order.run(oidKey(vid, idx), 0, bytes.length, async () => {
      // It may have been discarded.
      if (this.#vdi.map[idx] === vid) {
        await cluster.readData(vid, idx, 0, bytes);
        await cluster.createData(vid, idx, 0, bytes, 0);
      }
      // If nodes have gone meanwhile, its parity is stale again.
      if (cluster.recovery.isComplete(this.#vdi.inode.copies)) written.delete(idx);
    });
  }
}
