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
import { mustBeHeldBy } from '../vdi/unfinished.js';
import type { Vdi, VdiRecord } from '../vdi/vdi.js';
import { TemporarySnapshots } from './temporary-snapshots.js';
import { parseUnfinishedExport } from './unfinished-export.js';
import { geometryOf, VdiDevice, type Bases } from './vdi-device.js';

export class VdiExports implements ExportProvider {
  readonly #catalog: VdiCatalog;
  readonly #temporary: TemporarySnapshots;

  constructor(catalog: VdiCatalog) {
    this.#catalog = catalog;
    this.#temporary = new TemporarySnapshots(catalog);
  }

  /**
   * Temporary snapshots are not listed: who opens what is listed would keep them alive, or find them gone. Nor is what is
   * unfinished: nobody can open it.
   */
  async list(_peer: Peer): Promise<ExportInfo[]> {
    const records = await this.#catalog.list();
    return records.filter(({ tag, unfinished }) => !isTemporaryTag(tag) && !unfinished).map(infoOf);
  }

  async describe(exportName: string, peer: Peer): Promise<{ geometry: Geometry; info: ExportInfo }> {
    try {
      const { isReadOnly } = this.#catalog;
      const { name, run } = parseUnfinishedExport(exportName, peer);
      const { name: vdiName, tag } = parseSpec(name);
      if (tag === undefined || !isTemporaryTag(tag)) {
        const record = await this.#catalog.find(name);
        mustBeHeldBy(record, run);
        return { geometry: geometryOf(record, await this.#tagsOf(record), isReadOnly), info: infoOf(record) };
      }
      checkTemporaryTag(tag);
      this.#catalog.mustBeWritable();
      const working = await this.#catalog.find(vdiName);
      mustBeHeldBy(working, undefined);
      const record = { ...working, tag, isSnapshot: true, snapshotAt: Date.now() };
      return { geometry: geometryOf(record, await this.#tagsOf(record), isReadOnly), info: infoOf(record) };
    } catch (error) {
      throw asExportError(error);
    }
  }

  async open(exportName: string, peer: Peer): Promise<{ device: BlockDevice; info: ExportInfo }> {
    try {
      const { name, run } = parseUnfinishedExport(exportName, peer);
      const { name: vdiName, tag } = parseSpec(name);
      if (tag !== undefined && isTemporaryTag(tag)) {
        const vdi = await this.#temporary.open(vdiName, tag);
        const close = (): Promise<void> => this.#temporary.close(vdi, vdiName, tag);
        return await this.#opened(vdi, close);
      }
      const vdi = await this.#catalog.openVdi(name, { run });
      return await this.#opened(vdi, () => this.#catalog.release(vdi));
    } catch (error) {
      throw asExportError(error);
    }
  }

  async #opened(vdi: Vdi, close: () => Promise<void>): Promise<{ device: BlockDevice; info: ExportInfo }> {
    const { name } = vdi.record;
    let tags: string[];
    try {
      tags = await this.#tagsOf(vdi.record);
    } catch (error) {
      await close();
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
