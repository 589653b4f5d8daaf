/**
 * Erasure-coded objects that were written while there were fewer nodes than strips. Nodes leave out then the strips they
 * have no place for, parity first; and a node that comes back takes its own old strip for what is missing, if it had that
 * one before it went (sheep/recovery.c, read_erasure_object: from the newest epoch back to the oldest in which anybody has
 * the strip). Reads do not show it, until another node goes and data is computed from the old strip. A write of all of the
 * object, once all nodes are back, makes all strips anew.
 *
 * Owns which objects of one VDI are to be written again, and writes them.
 */
import type { Cluster } from './cluster.js';
import { objectKey } from './table.js';
import type { WriteOrder } from './write-order.js';

export interface ParityHost {
  readonly cluster: Cluster;
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
  readonly #written = new Set<number>();
  #writing: Promise<void> | undefined;

  constructor(host: ParityHost, vdi: CodedVdi) {
    this.#host = host;
    this.#vdi = vdi;
  }

  /** Object `idx` is about to be written, or has been. */
  note(idx: number): void {
    const { copyPolicy, copies } = this.#vdi.inode;
    if (copyPolicy !== 0 && !this.#host.cluster.recovery.isComplete(copies)) this.#written.add(idx);
  }

  /** Write again what has to be, if all nodes are back. Never fails: what could not be written is kept for the next time. */
  async renew(): Promise<void> {
    this.#writing ??= this.#renew().finally(() => (this.#writing = undefined));
    await this.#writing;
  }

  /** The VDI is closed: nobody knows of them any more. */
  async close(): Promise<void> {
    await this.renew();
    if (this.#written.size === 0) return;
    const { name } = this.#vdi.record;
    this.#host.log(
      `${name} is closed with ${this.#written.size} objects that were written while nodes were missing: their parity is not ` +
        `made anew. Before another node goes, write them again, for example with 'dog vdi check ${name}'`,
    );
  }

  async #renew(): Promise<void> {
    const { cluster } = this.#host;
    const { copies } = this.#vdi.inode;
    if (this.#written.size === 0 || !cluster.recovery.isComplete(copies)) return;
    const { name } = this.#vdi.record;
    this.#host.log(
      `${name}: making the parity of ${this.#written.size} objects anew; no other node should go until that is done`,
    );
    for (const idx of [...this.#written]) {
      if (!cluster.recovery.isComplete(copies)) return;
      this.#written.delete(idx);
      try {
        await this.#renewObject(idx);
      } catch (error) {
        this.#written.add(idx);
        this.#host.log(`${name}: the parity of object ${idx} was not made anew: ${(error as Error).message}`);
        return;
      }
    }
    this.#host.log(`${name}: all parity is new`);
  }

  async #renewObject(idx: number): Promise<void> {
    const { cluster, order } = this.#host;
    const { vid, blockSizeShift } = this.#vdi.record;
    const bytes = Buffer.alloc(2 ** blockSizeShift);
    await order.run(objectKey(vid, idx), 0, bytes.length, async () => {
      // It may have been let go, or become a snapshot's: that one can be written by nobody.
      if (this.#vdi.map[idx] !== vid || this.#vdi.record.vid !== vid) return;
      await cluster.readData(vid, idx, 0, bytes);
      await cluster.createData(vid, idx, 0, bytes, 0);
    });
    // Nodes may have gone meanwhile.
    this.note(idx);
  }
}
