/**
 * The exports of a catalog: NAME is the working VDI, NAME@TAG the snapshot, read-only, NAME@now a temporary one; what other
 * names mean export-name.ts says. Owns nothing but the translation of names and errors between nbd/ and src/vdi.
 */
import {
  ExportError,
  type ExportInfo,
  type ExportProvider,
  type Geometry,
  type Peer,
} from 'nbd-server-ts/block-device';
import { CatalogError } from '../vdi/catalog-error.js';
import type { VdiCatalog } from '../vdi/catalog.js';
import { checkTemporaryTag, formatSpec, isTemporaryTag, parseSpec, specOf, type VdiSpec } from '../vdi/names.js';
import type { Client, UseOfConnection } from '../vdi/in-use.js';
import type { Vdi, VdiRecord } from '../vdi/vdi.js';
import { isContextTag, toldBases } from './changed-contexts.js';
import { formatExportName, parseExportName, subjectText, type ExportOptions } from './export-name.js';
import { clientOf } from './peer-client.js';
import { TemporarySnapshots, type TemporaryOptions } from './temporary-snapshots.js';
import { parseUnfinishedExport } from './unfinished-export.js';
import { geometryOf, VdiDevice, type Bases, type Closing } from './vdi-device.js';

/** What a connection is about to have. */
interface Opening {
  readonly vdi: Vdi;
  /** Of a moment: the snapshots that it was compared with so far, by tag. */
  readonly bases?: Map<string, number>;
  readonly close: (closing: Closing) => Promise<void>;
}

/** Who has opened what, and as what. */
interface OpenedBy {
  readonly options: ExportOptions;
  readonly client: Client | undefined;
  readonly isReadOnly: boolean;
  readonly exportName: string;
  readonly peer: Peer;
}

const REFUSED: Closing = {
  ...{ ending: 'disconnect', isRefused: true, hadErrors: false, hasWritten: false },
  span: { opened: 0, lastRequest: 0 },
};

/** The tag that violations of the protocol on any of a VDI's temporary snapshots are counted under, whatever the label. */
const ANY_TEMPORARY = 'now';

export class VdiExports implements ExportProvider {
  readonly #catalog: VdiCatalog;
  readonly #temporary: TemporarySnapshots;

  constructor(catalog: VdiCatalog, options: TemporaryOptions = {}) {
    this.#catalog = catalog;
    this.#temporary = new TemporarySnapshots(catalog, options);
  }

  /**
   * Temporary snapshots are not listed: who opens what is listed would keep them alive, or find them gone. Nor is what is
   * unfinished: nobody can open it.
   */
  async list(_peer: Peer): Promise<ExportInfo[]> {
    const records = await this.#catalog.list();
    return records.filter(({ isTemporary, unfinished }) => !isTemporary && !unfinished).map((record) => infoOf(record));
  }

  /**
   * Whose data an export name is about, by name and tag, whatever form it has; looked up for an id only, and undefined if
   * nothing has it. Errors: ExportError, for what is no name.
   */
  async subjectOf(name: string): Promise<Pick<VdiSpec, 'name' | 'tag'> | undefined> {
    try {
      const subject = parseSpec(subjectText(name));
      if (subject.vid === undefined) return subject;
      const record = await this.#catalog.find(subjectText(name));
      return { name: record.name, tag: record.isSnapshot ? record.tag : undefined };
    } catch (error) {
      if (error instanceof CatalogError && error.code === 'NO_VDI') return undefined;
      throw asExportError(error);
    }
  }

  /** Of a temporary snapshot: the moment that `open` on the same connection gives is taken here, for its size and time. */
  async describe(
    exportName: string,
    peer: Peer,
    contexts: readonly string[] = [],
  ): Promise<{ geometry: Geometry; info: ExportInfo }> {
    try {
      const { name, run } = parseUnfinishedExport(exportName, peer);
      const { subject, options } = parseExportName(name);
      const { isReadOnly } = this.#catalog;
      let record = await this.#find(subject);
      await this.#catalog.mustBeHeldBy(record, run);
      if (isTemporary(subject)) {
        this.#catalog.mustTakeTemporaries();
        record = { ...record, tag: subject.tag, isSnapshot: true, isTemporary: true, snapshotAt: Date.now() };
      }
      let tags = toldBases(await this.#basesOf(record, options), contexts);
      const client = clientOf(peer);
      // A command of ours wants to know only whether it can be had.
      if (isTemporary(subject) && client !== undefined) {
        ({ record } = await this.#temporary.ask(workingName(subject), subject.tag, peer, client));
        tags = toldBases(await this.#basesOf(record, options), contexts);
      }
      return { geometry: geometryOf(record, tags, isReadOnly || isById(subject)), info: infoOf(record, options) };
    } catch (error) {
      // The connection is about something else by now.
      this.#temporary.left(peer);
      throw asExportError(error);
    }
  }

  /** `access`: of the peer, if it may not do what the export could. */
  async open(
    exportName: string,
    peer: Peer,
    access: { readonly isReadOnly?: boolean } = {},
  ): Promise<{ device: VdiDevice; info: ExportInfo }> {
    try {
      const { name, run } = parseUnfinishedExport(exportName, peer);
      const { subject, options } = parseExportName(name);
      const client = clientOf(peer);
      const isReadOnly = this.#catalog.isReadOnly || isById(subject) || access.isReadOnly === true;
      // Before anything is opened: a snapshot that is not there must not cost a temporary one.
      if (options.since !== undefined) await this.#basesOf(await this.#find(subject), options);
      if (isTemporary(subject)) {
        const held = await this.#temporary.open(workingName(subject), subject.tag, peer, client);
        const close = (closing: Closing): Promise<void> => this.#temporary.close(held, closing);
        const { vdi, moment } = held;
        return await this.#opened(
          { vdi, bases: moment.bases, close },
          { options, client, isReadOnly: true, exportName, peer },
        );
      }
      const vdi = await this.#catalog.openVdi(subjectText(name), { run });
      const use = await this.#use(vdi, client, !vdi.record.isSnapshot && !isReadOnly);
      const close = (closing: Closing): Promise<void> => {
        // First: it must not look unused in between.
        this.#endUse(use, closing);
        return this.#catalog.release(vdi);
      };
      return await this.#opened({ vdi, close }, { options, client, isReadOnly, exportName, peer });
    } catch (error) {
      throw asExportError(error);
    }
  }

  left(peer: Peer): void {
    this.#temporary.left(peer);
  }

  async #opened(
    { vdi, bases: known, close }: Opening,
    { options, client, isReadOnly, exportName, peer }: OpenedBy,
  ): Promise<{ device: VdiDevice; info: ExportInfo }> {
    const { record } = vdi;
    let tags: readonly string[];
    try {
      tags = toldBases(await this.#basesOf(record, options), []);
    } catch (error) {
      await close(REFUSED);
      throw error;
    }
    const uses = new Map<Vdi, UseOfConnection | undefined>();
    const bases: Bases = {
      tags,
      isReadOnly,
      isOurs: client === undefined,
      exportName,
      peer,
      open: async (tag) => {
        const base = await this.#catalog.openVdi(formatSpec({ name: record.name, tag }));
        const { vid } = base.record;
        if ((known?.get(tag) ?? vid) !== vid) {
          await this.#catalog.release(base);
          throw new CatalogError(
            'ENDED',
            `${specOf(base.record)} was taken anew since ${specOf(record)} was compared with it`,
          );
        }
        known?.set(tag, vid);
        // Who comes back to the same moment finds the same base, or it is refused to take it away.
        uses.set(base, await this.#use(base, client, false));
        return base;
      },
      release: (base, closing) => {
        this.#endUse(uses.get(base), closing);
        return this.#catalog.release(base);
      },
    };
    const device = new VdiDevice(vdi, bases, close);
    try {
      // Held from the first moment: what a backup is compared with is not deleted, and taken anew, in the middle of it.
      if (options.since !== undefined) await device.hold(options.since);
    } catch (error) {
      await device.refuse();
      throw error;
    }
    return { device, info: infoOf(record, options) };
  }

  /** `vdi`, which was opened for it, is in use by this client. Undefined if that need not be known. */
  async #use(vdi: Vdi, client: Client | undefined, writable: boolean): Promise<UseOfConnection | undefined> {
    // Nothing of a store that nobody changes can be taken away from anybody.
    if (!client || this.#catalog.isReadOnly) return undefined;
    try {
      return await this.#catalog.inUse.begin(vdi.record, client, writable);
    } catch (error) {
      await this.#catalog.release(vdi);
      throw error;
    }
  }

  #endUse(use: UseOfConnection | undefined, { ending, isRefused, ...closing }: Closing): void {
    if (!use) return;
    if (isRefused) this.#catalog.inUse.withdraw(use);
    else this.#catalog.inUse.end(use, { ...closing, isOver: ending === 'disconnect' });
  }

  /** What a subject is about; of a temporary snapshot the VDI that it is, or would be, taken of. */
  async #find(subject: VdiSpec): Promise<VdiRecord> {
    const { name, vid } = subject;
    if (vid !== undefined) return this.#catalog.find(`@${vid.toString(16)}`);
    if (!isTemporary(subject)) return this.#catalog.find(formatSpec(subject));
    checkTemporaryTag(subject.tag);
    return this.#catalog.find(formatSpec({ name, tag: undefined }));
  }

  /**
   * Tags of the snapshots that the VDI or snapshot can be compared with, newest first: all those of the same VDI, or the
   * one that the options name. Errors: NO_TAG, BAD_SIZE.
   */
  async #basesOf({ name, vid, blockSizeShift }: VdiRecord, { since }: ExportOptions): Promise<readonly string[]> {
    const snapshots = (await this.#catalog.list()).filter(
      (other) => other.name === name && other.isSnapshot && !isTemporaryTag(other.tag),
    );
    // Other tools may give one tag twice: what has changed since cannot be told by it.
    const count = new Map<string, number>();
    for (const { tag } of snapshots) count.set(tag, (count.get(tag) ?? 0) + 1);
    if (since === undefined) {
      return snapshots
        .filter((base) => base.vid !== vid && base.blockSizeShift === blockSizeShift)
        .filter(({ tag }) => count.get(tag) === 1 && isContextTag(tag))
        .map(({ tag }) => tag)
        .reverse();
    }
    const base = await this.#catalog.find(formatSpec({ name, tag: since }));
    const refuse = (why: string): CatalogError =>
      new CatalogError('BAD_NAME', `what has changed since ${specOf(base)} cannot be told: ${why}`);
    if (base.blockSizeShift !== blockSizeShift) throw refuse('it has data objects of another size');
    if (count.get(since) !== 1) throw refuse('several snapshots have this tag');
    if (!isContextTag(since)) throw refuse('its tag has control characters');
    return [since];
  }
}

/** The VDI that a temporary snapshot is taken of, as the catalog's specs have it. */
function workingName({ name }: VdiSpec): string {
  return formatSpec({ name, tag: undefined });
}

function isTemporary(subject: VdiSpec): subject is VdiSpec & { readonly tag: string } {
  return subject.tag !== undefined && isTemporaryTag(subject.tag);
}

/**
 * A working VDI gets another id with every snapshot, and the snapshot keeps the old one: a client that connects again
 * under an id may find an older state of the disk. Nobody writes on that.
 */
function isById({ vid }: VdiSpec): boolean {
  return vid !== undefined;
}

function infoOf(record: VdiRecord, options: ExportOptions = {}): ExportInfo {
  const { name, isSnapshot, isTemporary } = record;
  const description = isSnapshot
    ? `snapshot of ${formatSpec({ name, tag: undefined })}, taken ${new Date(record.snapshotAt).toISOString()}`
    : `VDI, created ${new Date(record.createdAt).toISOString()}`;
  const countedAs = isTemporary ? formatSpec({ name, tag: ANY_TEMPORARY }) : specOf(record);
  return { name: formatExportName(specOf(record), options), description, countedAs };
}

function asExportError(error: unknown): ExportError {
  const code = error instanceof CatalogError ? 'UNKNOWN' : 'FAILED';
  return new ExportError(code, (error as Error).message, { cause: error });
}
