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
import { checkTemporaryTag, formatSpec, isTemporaryTag, parseSpec, type VdiSpec } from '../vdi/names.js';
import type { Client, UseOfConnection } from '../vdi/client-use.js';
import type { Vdi, VdiRecord } from '../vdi/vdi.js';
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
  /** All disks are written by one connection at a time each. */
  readonly exclusive?: Exclusive | undefined;
  /** As `log`, for what clients can bring about again and again: of one `subject` it is told once in a while. */
  readonly logOften?: ((subject: string, line: string, details: object) => void) | undefined;
}

/** What a connection is about to have. */
interface Opening {
  readonly vdi: Vdi;
  /** Of a moment: the snapshots that it was compared with so far, by tag. */
  readonly bases?: Map<string, number>;
  /** Of a VDI that is opened to be written. */
  readonly claim?: Claim | undefined;
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

  /**
   * Temporary snapshots are not listed: who opens what is listed would keep them alive, or find them gone. Nor is what is
   * unfinished: nobody can open it. `isTold`: whether a subject is to be in it.
   */
  async list(_peer: Peer, isTold?: (subject: Pick<VdiSpec, 'name' | 'tag'>) => boolean): Promise<Iterable<ExportInfo>> {
    return infosOf(await this.#catalog.list(), isTold);
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
      // A command of ours wants to know only whether it can be had.
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
      // The connection is about something else by now.
      this.#temporary.left(peer);
      throw asExportError(error);
    }
  }

  /** `access`: of the peer, if it may not do what the export could. */
  async open(
    exportName: string,
    peer: Peer,
    access: PeerAccess = {},
  ): Promise<{ device: VdiDevice; info: ExportInfo }> {
    try {
      const { name, run } = parseUnfinishedExport(exportName, peer);
      const { subject, options } = parseExportName(name);
      mustBeWritable(subject, options);
      const client = clientOf(peer);
      const isReadOnly = this.#catalog.isReadOnly || isById(subject) || access.isReadOnly === true;
      // Before anything is opened: a snapshot that is not there must not cost a temporary one.
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
        // First: it must not look unused in between.
        this.#endUse(use, closing);
        return this.#catalog.release(vdi);
      };
      const opened = { options, client, isReadOnly: isOnlyRead, exportName, peer };
      return await this.#opened({ vdi, claim, close }, opened);
    } catch (error) {
      throw asExportError(error);
    }
  }

  /** The right to write `vdi`, which was opened for that; undefined if it is not to be written, or by a command of ours only. */
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

  /** The same for who only asks. */
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

  /** What the client says of itself, what its rule says, and what the server says of all. */
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
      // Held from the first moment: what a backup is compared with is not deleted, and taken anew, in the middle of it.
      if (options.since !== undefined) await device.hold(options.since);
    } catch (error) {
      await device.refuse();
      throw error;
    }
    return { device, info: infoOf(record, options) };
  }

  /** `vdi`, which was opened for it, is in use by this client. Undefined if that need not be known. */
  async #use(
    vdi: Vdi,
    client: Client | undefined,
    writable: boolean,
    claim?: Claim,
  ): Promise<UseOfConnection | undefined> {
    // Nothing of a store that nobody changes can be taken away from anybody.
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

  /** What a subject is about; of a temporary snapshot the VDI that it is, or would be, taken of. */
  async #find(subject: VdiSpec): Promise<VdiRecord> {
    const { name, vid } = subject;
    if (vid !== undefined) return this.#catalog.find(`@${vid.toString(16)}`);
    if (!isTemporary(subject)) return this.#catalog.find(formatSpec(subject));
    checkTemporaryTag(subject.tag);
    return this.#catalog.find(formatSpec({ name, tag: undefined }));
  }
}

/** Who asks to open something. */
interface Asking {
  readonly peer: Peer;
  readonly client: Client | undefined;
  readonly isReadOnly: boolean;
  /** It fills what nobody else can open. */
  readonly run: string | undefined;
}

function asksToWrite({ isSnapshot }: VdiRecord, { isReadOnly, run }: Asking): boolean {
  return !isSnapshot && !isReadOnly && run === undefined;
}

/** Errors: BAD_NAME, for what nobody can write and somebody wants to write alone. */
function mustBeWritable(subject: VdiSpec, { exclusive }: ExportOptions): void {
  if (exclusive === undefined || (subject.tag === undefined && !isById(subject))) return;
  const what = isById(subject) ? 'what is opened by its ID' : 'a snapshot';
  throw new CatalogError('BAD_NAME', `exclusive is for a VDI that is written: ${what} is read-only for everybody`);
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

function asExportError(error: unknown): ExportError {
  const code = error instanceof CatalogError ? (error.code === 'BUSY' ? 'POLICY' : 'UNKNOWN') : 'FAILED';
  return new ExportError(code, (error as Error).message, { cause: error });
}
