/**
 * The exports of a catalog: NAME is the working VDI, NAME@TAG the snapshot, read-only, NAME@now a temporary one. Owns
 * nothing but the translation of names and errors between nbd/ and src/vdi.
 */
import {
  ExportError,
  type BlockDevice,
  type ExportInfo,
  type ExportProvider,
  type Geometry,
  type Peer,
} from 'nbd-server-ts';
import { CatalogError } from '../vdi/catalog-error.js';
import { labelOf, type VdiCatalog } from '../vdi/catalog.js';
import { checkTemporaryTag, isTemporaryTag, parseSpec } from '../vdi/names.js';
import type { Vdi, VdiRecord } from '../vdi/vdi.js';
import { clientOf } from './peer-client.js';
import { TemporarySnapshots, type TemporaryOptions } from './temporary-snapshots.js';
import { geometryOf, VdiDevice, type Bases, type Closing } from './vdi-device.js';

export class VdiExports implements ExportProvider {
  readonly #catalog: VdiCatalog;
  readonly #temporary: TemporarySnapshots;

  constructor(catalog: VdiCatalog, options: TemporaryOptions = {}) {
    this.#catalog = catalog;
    this.#temporary = new TemporarySnapshots(catalog, options);
  }

  /** Temporary snapshots are not listed: who opens what is listed would keep them alive, or find them gone. */
  async list(_peer: Peer): Promise<ExportInfo[]> {
    const records = await this.#catalog.list();
    return records.filter(({ tag }) => !isTemporaryTag(tag)).map(infoOf);
  }

  /** Of a temporary snapshot: the moment that `open` on the same connection gives is taken here, for its size and time. */
  async describe(name: string, peer: Peer): Promise<{ geometry: Geometry; info: ExportInfo }> {
    try {
      const { isReadOnly } = this.#catalog;
      const { name: vdiName, tag } = parseSpec(name);
      if (tag === undefined || !isTemporaryTag(tag)) {
        const record = await this.#catalog.find(name);
        return { geometry: geometryOf(record, await this.#tagsOf(record), isReadOnly), info: infoOf(record) };
      }
      checkTemporaryTag(tag);
      this.#catalog.mustBeWritable();
      const client = clientOf(peer);
      if (client) {
        const { record } = await this.#temporary.ask(vdiName, tag, peer, client);
        return { geometry: geometryOf(record, await this.#tagsOf(record), isReadOnly), info: infoOf(record) };
      }
      // A command of ours wants to know only whether it can be had.
      const working = await this.#catalog.find(vdiName);
      const record = { ...working, tag, isSnapshot: true, snapshotAt: Date.now() };
      return { geometry: geometryOf(record, await this.#tagsOf(record), isReadOnly), info: infoOf(record) };
    } catch (error) {
      throw asExportError(error);
    }
  }

  async open(name: string, peer: Peer): Promise<{ device: BlockDevice; info: ExportInfo }> {
    try {
      const client = clientOf(peer);
      const { name: vdiName, tag } = parseSpec(name);
      if (tag !== undefined && isTemporaryTag(tag)) {
        const held = await this.#temporary.open(vdiName, tag, peer, client);
        return await this.#opened(held.vdi, ({ ending, hadErrors }) => this.#temporary.close(held, ending, hadErrors));
      }
      const vdi = await this.#catalog.openVdi(name);
      // Nothing of a store that nobody changes can be taken away from anybody.
      if (!client || this.#catalog.isReadOnly) return await this.#opened(vdi, () => this.#catalog.release(vdi));
      const { inUse } = this.#catalog;
      const use = await inUse.begin(vdi.record, client, !vdi.record.isSnapshot);
      return await this.#opened(vdi, ({ ending, hasWritten }) => {
        // First: it must not look unused in between.
        inUse.end(use, { isOver: ending === 'disconnect', hasWritten });
        return this.#catalog.release(vdi);
      });
    } catch (error) {
      throw asExportError(error);
    }
  }

  left(peer: Peer): void {
    this.#temporary.left(peer);
  }

  async #opened(
    vdi: Vdi,
    close: (closing: Closing) => Promise<void>,
  ): Promise<{ device: BlockDevice; info: ExportInfo }> {
    const { name } = vdi.record;
    let tags: string[];
    try {
      tags = await this.#tagsOf(vdi.record);
    } catch (error) {
      await close({ ending: 'lost', hadErrors: false, hasWritten: false });
      throw error;
    }
    const bases: Bases = {
      tags,
      isReadOnly: this.#catalog.isReadOnly,
      open: (tag) => this.#catalog.openVdi(`${name}@${tag}`),
      release: (base) => this.#catalog.release(base),
    };
    return { device: new VdiDevice(vdi, bases, close), info: infoOf(vdi.record) };
  }

  /** Tags of the snapshots of the same VDI, newest first. */
  async #tagsOf({ name, vid }: VdiRecord): Promise<string[]> {
    return (await this.#catalog.list())
      .filter((other) => other.name === name && other.isSnapshot && other.vid !== vid && !isTemporaryTag(other.tag))
      .map(({ tag }) => tag)
      .reverse();
  }
}

function infoOf(record: VdiRecord): ExportInfo {
  const description = record.isSnapshot
    ? `snapshot of ${record.name}, taken ${new Date(record.snapshotAt).toISOString()}`
    : `VDI, created ${new Date(record.createdAt).toISOString()}`;
  return { name: labelOf(record), description };
}

function asExportError(error: unknown): ExportError {
  const code = error instanceof CatalogError ? 'UNKNOWN' : 'FAILED';
  return new ExportError(code, (error as Error).message, { cause: error });
}
