/**
 * The exports of a catalog: NAME is the working VDI, NAME@TAG a snapshot (read-only), NAME@now a temporary snapshot; the other
 * forms are in export-name.ts. Owns the opening of an export: the order in which the VDI is opened, claimed and counted as in
 * use, and all of that undone when a step fails; and the translation of catalog errors for nbd/.
 */
import type { VdiRecord } from '../store/vdi-record.js';
import {
  ExportError,
  type ExportInfo,
  type ExportProvider,
  type OpenContext,
  type Geometry,
  type Peer,
} from 'nbd-server-ts/block-device';
import { CatalogError } from '../vdi/catalog-error.js';
import type { VdiCatalog } from '../vdi/catalog.js';
import { checkTemporaryTag, formatSpec, isTemporaryTag, parseSpec, type VdiSpec } from '../vdi/names.js';
import type { Client, UseOfConnection } from '../vdi/client-use.js';
import type { LogOften } from '../vdi/log.js';
import type { Vdi } from '../vdi/vdi.js';
import { basesOf, openBase } from './bases.js';
import { toldBases } from './changed-contexts.js';
import type { PeerAccess } from './authorised-exports.js';
import { joinExclusive, type Exclusive } from './exclusive.js';
import { infoOf, infosOf } from './export-info.js';
import { parseExportName, subjectText, type ExportOptions } from './export-name.js';
import { clientOf } from './peer-client.js';
import { TemporarySnapshots, type TemporaryOptions } from './temporary-snapshots.js';
import { parseUnfinishedExport } from './unfinished-export.js';
import { geometryOf, VdiDevice, type Closing } from './vdi-device.js';
import type { Claim } from './writer-claim.js';
import { Writers } from './writers.js';

export interface ExportsOptions extends TemporaryOptions {
  /** Each disk is written by one connection at a time. */
  readonly exclusive?: Exclusive | undefined;
  /** As `log`, for what clients can cause again and again. */
  readonly logOften?: LogOften | undefined;
}

/** What a connection opens. */
interface Opening {
  readonly vdi: Vdi;
  /** Of a temporary snapshot: the vids of the bases that it was compared with so far, by tag. */
  readonly bases?: Map<string, number>;
  /** Of a VDI that is opened to be written. */
  readonly claim?: Claim | undefined;
  readonly close: (closing: Closing) => Promise<void>;
}

/** The connection that opens it, and how. */
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

export class VdiExports implements ExportProvider {
  readonly #catalog: VdiCatalog;
  readonly #temporary: TemporarySnapshots;
  readonly #exclusive: Exclusive | undefined;
  readonly writers: Writers;

  constructor(catalog: VdiCatalog, options: ExportsOptions = {}) {
    this.#catalog = catalog;
    this.#exclusive = options.exclusive;
    this.#temporary = new TemporarySnapshots(catalog, options);
    const log = options.log ?? ((): void => undefined);
    this.writers = new Writers(log, options.logOften ?? ((_subject, line, details) => log(line, details)));
  }

  /** All VDIs and snapshots but temporary and unfinished ones. `isTold`: whether the list may have a subject. */
  async list(_peer: Peer, isTold?: (subject: Pick<VdiSpec, 'name' | 'tag'>) => boolean): Promise<Iterable<ExportInfo>> {
    return infosOf(await this.#catalog.list(), isTold);
  }

  /**
   * The VDI or snapshot that an export name of any form leads to, by name and tag. Only an id is looked up; undefined if nothing
   * has it. Errors: ExportError UNKNOWN (it is no name).
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

  /** A temporary snapshot is taken here, for its size and time; `open` on the same connection then gives the same one. */
  async describe(
    exportName: string,
    peer: Peer,
    contexts: readonly string[] = [],
    access: PeerAccess = {},
  ): Promise<{ geometry: Geometry; info: ExportInfo }> {
    try {
      const { name, run } = parseUnfinishedExport(exportName, peer);
      const { subject, options } = parseExportName(name);
      mustBeWritable(subject, options);
      const isReadOnly = this.#catalog.isReadOnly || isById(subject) || access.isReadOnly === true;
      let record = await this.#find(subject);
      await this.#catalog.mustBeHeldBy(record, run);
      if (isTemporary(subject)) {
        this.#catalog.mustTakeTemporaries();
        record = { ...record, tag: subject.tag, isSnapshot: true, isTemporary: true, snapshotAt: Date.now() };
      }
      let tags = toldBases(await basesOf(this.#catalog, record, options), contexts);
      const client = clientOf(peer);
      // Our own commands only ask whether it can be opened: no snapshot is taken.
      if (isTemporary(subject) && client !== undefined) {
        ({ record } = await this.#temporary.ask(workingName(subject), subject.tag, peer, client));
        tags = toldBases(await basesOf(this.#catalog, record, options), contexts);
      }
      const may = this.#mayWrite(record, { peer, client, isReadOnly, run }, options, access);
      return {
        geometry: geometryOf(record, tags, isReadOnly || !may.write, may.isAlone),
        info: infoOf(record, options),
      };
    } catch (error) {
      // The connection does not open the export that it asked for before.
      this.#temporary.left(peer);
      throw asExportError(error);
    }
  }

  /** `access`: what the peer may do, if that is less than the export allows. */
  async open(
    exportName: string,
    peer: Peer,
    access: PeerAccess & Partial<OpenContext> = {},
  ): Promise<{ device: VdiDevice; info: ExportInfo }> {
    try {
      const { name, run } = parseUnfinishedExport(exportName, peer);
      const { subject, options } = parseExportName(name);
      mustBeWritable(subject, options);
      const client = clientOf(peer);
      const isReadOnly = this.#catalog.isReadOnly || isById(subject) || access.isReadOnly === true;
      // Checked before anything is opened: a wrong `since` must not cost a temporary snapshot.
      if (options.since !== undefined) await basesOf(this.#catalog, await this.#find(subject), options);
      if (isTemporary(subject)) {
        const held = await this.#temporary.open(workingName(subject), subject.tag, peer, client);
        const close = (closing: Closing): Promise<void> => this.#temporary.close(held, closing);
        const { vdi, snapshot } = held;
        return await this.#opened(
          { vdi, bases: snapshot.bases, close },
          { options, client, isReadOnly: true, exportName, peer },
        );
      }
      const vdi = await this.#catalog.openVdi(subjectText(name), { run });
      const claim = await this.#claim(vdi, { peer, client, isReadOnly, run }, options, access);
      const isOnlyRead = isReadOnly || claim?.mayWrite === false;
      const use = await this.#use(vdi, client, !vdi.record.isSnapshot && !isOnlyRead, claim);
      const close = (closing: Closing): Promise<void> => {
        // Before the release: an open VDI must not look unused.
        this.#endUse(use, closing);
        return this.#catalog.release(vdi);
      };
      const opened = { options, client, isReadOnly: isOnlyRead, exportName, peer };
      return await this.#opened({ vdi, claim, close }, opened);
    } catch (error) {
      throw asExportError(error);
    }
  }

  /**
   * The claim to write `vdi`; undefined if it is opened for reading, or by the command that fills it. If it fails, `vdi` is
   * released.
   */
  async #claim(vdi: Vdi, asking: Asking, options: ExportOptions, access: PeerAccess): Promise<Claim | undefined> {
    if (!asksToWrite(vdi.record, asking)) return undefined;
    const { peer, client } = asking;
    try {
      return await this.writers.claim(vdi.record.name, { peer, client }, this.#exclusively(options, access));
    } catch (error) {
      await this.#catalog.release(vdi);
      throw error;
    }
  }

  /** The same, as far as it is known without a claim. */
  #mayWrite(
    record: VdiRecord,
    asking: Asking,
    options: ExportOptions,
    access: PeerAccess,
  ): { readonly write: boolean; readonly isAlone: boolean } {
    if (!asksToWrite(record, asking)) return { write: !record.isSnapshot && !asking.isReadOnly, isAlone: false };
    const exclusive = this.#exclusively(options, access);
    const write = this.writers.look(record.name, asking, exclusive);
    return { write, isAlone: exclusive !== undefined || !write };
  }

  /** The export name's option comes before the peer's access rule, and that before the server's option. */
  #exclusively(options: ExportOptions, access: PeerAccess): Exclusive | undefined {
    return joinExclusive(options.exclusive, access.exclusive, this.#exclusive);
  }

  left(peer: Peer): void {
    this.#temporary.left(peer);
  }

  async #opened(
    { vdi, bases: known, claim, close }: Opening,
    { options, client, isReadOnly, exportName, peer }: OpenedBy,
  ): Promise<{ device: VdiDevice; info: ExportInfo }> {
    const { record } = vdi;
    let tags: readonly string[];
    try {
      tags = toldBases(await basesOf(this.#catalog, record, options), []);
    } catch (error) {
      claim?.end();
      await close(REFUSED);
      throw error;
    }
    const uses = new Map<Vdi, UseOfConnection | undefined>();
    const device = new VdiDevice(vdi, {
      tags,
      isReadOnly,
      isOurs: client === undefined,
      claim,
      exportName,
      peer,
      openBase: async (tag) => {
        const base = await openBase(this.#catalog, record, tag, known);
        // In use: a client that comes back to the same temporary snapshot finds the same base; others cannot delete it.
        uses.set(base, await this.#use(base, client, false));
        return base;
      },
      releaseBase: (base, closing) => {
        this.#endUse(uses.get(base), closing);
        return this.#catalog.release(base);
      },
      close,
    });
    try {
      // Held from the start: the base of a backup must not be deleted, and taken again, during the backup.
      if (options.since !== undefined) await device.hold(options.since);
    } catch (error) {
      await device.refuse();
      throw error;
    }
    return { device, info: infoOf(record, options) };
  }

  /**
   * Count `vdi` as in use by this client; undefined if that need not be known. If it fails, `vdi` is released, and the claim ends.
   */
  async #use(
    vdi: Vdi,
    client: Client | undefined,
    writable: boolean,
    claim?: Claim,
  ): Promise<UseOfConnection | undefined> {
    // In a read-only store no disk can be taken away from its clients.
    if (!client || this.#catalog.isReadOnly) return undefined;
    try {
      return await this.#catalog.inUse.begin(vdi.record, client, writable);
    } catch (error) {
      claim?.end();
      await this.#catalog.release(vdi);
      throw error;
    }
  }

  #endUse(use: UseOfConnection | undefined, { ending, isRefused, ...closing }: Closing): void {
    if (!use) return;
    if (isRefused) this.#catalog.inUse.withdraw(use);
    else this.#catalog.inUse.end(use, { ...closing, isOver: ending === 'disconnect' });
  }

  /** The record of a subject; for a temporary snapshot, that of the VDI it is taken of. */
  async #find(subject: VdiSpec): Promise<VdiRecord> {
    const { name, vid } = subject;
    if (vid !== undefined) return this.#catalog.find(`@${vid.toString(16)}`);
    if (!isTemporary(subject)) return this.#catalog.find(formatSpec(subject));
    checkTemporaryTag(subject.tag);
    return this.#catalog.find(formatSpec({ name, tag: undefined }));
  }
}

/** A connection that asks for an export. */
interface Asking {
  readonly peer: Peer;
  readonly client: Client | undefined;
  readonly isReadOnly: boolean;
  /** It is the run that fills the VDI, which no other client can open. */
  readonly run: string | undefined;
}

function asksToWrite({ isSnapshot }: VdiRecord, { isReadOnly, run }: Asking): boolean {
  return !isSnapshot && !isReadOnly && run === undefined;
}

/** Errors: BAD_NAME (the option "exclusive" on an export that is read-only for all). */
function mustBeWritable(subject: VdiSpec, { exclusive }: ExportOptions): void {
  if (exclusive === undefined || (subject.tag === undefined && !isById(subject))) return;
  const what = isById(subject) ? 'an export named by its ID' : 'a snapshot';
  throw new CatalogError('BAD_NAME', `exclusive needs a VDI that can be written: ${what} is read-only for all clients`);
}

/** The spec of the VDI that a temporary snapshot is taken of. */
function workingName({ name }: VdiSpec): string {
  return formatSpec({ name, tag: undefined });
}

function isTemporary(subject: VdiSpec): subject is VdiSpec & { readonly tag: string } {
  return subject.tag !== undefined && isTemporaryTag(subject.tag);
}

/**
 * Named by its id: such an export is read-only. A working VDI gets another id with every snapshot, and the snapshot keeps the old
 * one: a client that reconnects by the id may find an older state of the disk, and must not write to it.
 */
function isById({ vid }: VdiSpec): boolean {
  return vid !== undefined;
}

function asExportError(error: unknown): ExportError {
  const code = error instanceof CatalogError ? (error.code === 'BUSY' ? 'POLICY' : 'UNKNOWN') : 'FAILED';
  return new ExportError(code, (error as Error).message, { cause: error });
}
