/**
 * Exports as one peer may see them: an export that it may not open is neither listed nor described, one that it may only read is
 * read-only. The policy judges the VDI or snapshot that a name leads to, and every snapshot since which its changes are reported;
 * never the name as it was sent. Owns the filtering; the rules are the policy's. A peer that came through the daemon's own
 * private socket ("internal") is the daemon's user and may do everything.
 */
import {
  DeviceError,
  ExportError,
  type Awaitable,
  type CompleteDevice,
  type Ending,
  type ExportInfo,
  type ExportProvider,
  type ExtentSink,
  type Geometry,
  type OpenContext,
  type Peer,
  type Transferred,
} from 'nbd-server-ts/block-device';
import type { VdiSpec } from '../vdi/names.js';
import { baseOfContext } from './changed-contexts.js';
import { parseOtherwise, type Exclusive } from './exclusive.js';
import { accessName, parseExportName, subjectText } from './export-name.js';

/** Exports that know which VDI or snapshot a name leads to. */
export interface SubjectExports extends ExportProvider<CompleteDevice> {
  /** Undefined if the name is an id that nothing has. Errors: ExportError UNKNOWN (it is not a valid name). */
  subjectOf(name: string): Promise<Subject | undefined>;
  /** Only the subjects for which `isTold` is true. */
  list(peer: Peer, isTold?: (subject: Subject) => boolean): Awaitable<Iterable<ExportInfo>>;
  /** `access`: a peer that may only read does not count as a writer. */
  describe(
    name: string,
    peer: Peer,
    contexts?: readonly string[],
    access?: PeerAccess & Partial<OpenContext>,
  ): Awaitable<{ readonly geometry: Geometry; readonly info: ExportInfo }>;
  open(
    name: string,
    peer: Peer,
    context?: PeerAccess & Partial<OpenContext>,
  ): Awaitable<{ readonly device: RefusableDevice; readonly info: ExportInfo }>;
}

/** What the peer may do with the export that it asks for. */
export interface PeerAccess {
  readonly isReadOnly?: boolean;
  /** It may write, and no other client at the same time. */
  readonly exclusive?: Exclusive | undefined;
}

interface RefusableDevice extends CompleteDevice {
  /** In place of `close`, if the peer does not get the device after all. */
  refuse?(): Awaitable<void>;
}

type Subject = Pick<VdiSpec, 'name' | 'tag'>;

/**
 * 'needs-tls': refused without TLS; over TLS the peer may turn out to be one that may open it. 'exclusive': to write, and no
 * other client at the same time; see exclusive.ts.
 */
export type Access = 'read-write' | ExclusiveAccess | 'read-only' | 'needs-tls' | 'refused';
export type ExclusiveAccess = 'exclusive' | `exclusive=${Exclude<Exclusive, 'unsaid'>}`;

export interface AccessPolicy {
  /** `accessName`: see accessName in export-name.ts. */
  decide(accessName: string, peer: Peer): Access;
}

export class AuthorisedExports implements ExportProvider<CompleteDevice> {
  readonly #provider: SubjectExports;
  readonly #policy: AccessPolicy;

  constructor(provider: SubjectExports, policy: AccessPolicy) {
    this.#provider = provider;
    this.#policy = policy;
  }

  async list(peer: Peer): Promise<Iterable<ExportInfo>> {
    return this.#provider.list(peer, (subject) => this.#mayOpen(subject, peer));
  }

  async describe(
    name: string,
    peer: Peer,
    contexts?: readonly string[],
    context?: OpenContext,
  ): Promise<{ readonly geometry: Geometry; readonly info: ExportInfo }> {
    const { subject, ...access } = await this.#admit(name, peer);
    const described = await this.#provider.describe(name, peer, contexts, { ...context, ...access });
    const geometry = this.#withoutHidden(described.geometry, subject, peer);
    return { ...described, geometry: access.isReadOnly ? readOnly(geometry) : geometry };
  }

  async open(
    name: string,
    peer: Peer,
    context?: OpenContext,
  ): Promise<{ readonly device: CompleteDevice; readonly info: ExportInfo }> {
    const { subject, ...access } = await this.#admit(name, peer);
    const opened = await this.#provider.open(name, peer, { ...context, ...access });
    // Since the policy judged it, the id may have become another VDI's.
    const found = subject && (await this.#provider.subjectOf(opened.info.name));
    if (subject !== undefined && (found === undefined || accessName(found) !== accessName(subject))) {
      await (opened.device.refuse?.() ?? opened.device.close('disconnect'));
      throw refused(name);
    }
    // A snapshot is read-only for all.
    if (!access.isReadOnly || subject?.tag !== undefined) return opened;
    return { ...opened, device: new ReadOnlyDevice(opened.device) };
  }

  left(peer: Peer): Awaitable<void> {
    return this.#provider.left?.(peer);
  }

  /** Refuses before it is known whether the export exists: the answer must be the same in both cases. */
  async #admit(name: string, peer: Peer): Promise<PeerAccess & { readonly subject?: Subject }> {
    if (peer.transport === 'internal') return { isReadOnly: false };
    const text = subjectText(name);
    let subject: Subject | undefined;
    try {
      subject = await this.#provider.subjectOf(name);
    } catch (error) {
      // It is not a valid name. A peer that may open everything learns why, from the exports.
      if (!(error instanceof ExportError) || error.code !== 'UNKNOWN') throw error;
      return this.#judge(text, name, peer);
    }
    // A peer that may not open it must not learn whether an id exists, not even by "TLS is needed".
    if (subject === undefined) throw refused(name);
    if (isById(text) && !this.#mayOpen(subject, peer)) throw refused(name);
    const access = this.#judge(accessName(subject), name, peer);
    const since = sinceOf(name);
    if (since !== undefined) this.#judge(accessName({ name: subject.name, tag: since }), name, peer);
    return { ...access, subject };
  }

  #judge(judged: string, name: string, peer: Peer): PeerAccess {
    const access = this.#policy.decide(judged, peer);
    if (access === 'read-write') return { isReadOnly: false };
    if (access === 'read-only') return { isReadOnly: true };
    if (access === 'needs-tls') throw new ExportError('TLS_REQUIRED', `TLS is needed to open ${JSON.stringify(name)}`);
    if (access === 'refused') throw refused(name);
    const [, otherwise = ''] = access.split('=');
    return { isReadOnly: false, exclusive: parseOtherwise(otherwise) ?? 'unsaid' };
  }

  #mayOpen(subject: Subject, peer: Peer): boolean {
    if (peer.transport === 'internal') return true;
    const access = this.#policy.decide(accessName(subject), peer);
    return access !== 'needs-tls' && access !== 'refused';
  }

  /** Without the contexts of snapshots that the peer may not open. */
  #withoutHidden(geometry: Geometry, subject: Subject | undefined, peer: Peer): Geometry {
    if (subject === undefined) return geometry;
    const decided = new Map<string, boolean>();
    const contexts = geometry.contexts.filter((context) => {
      const tag = baseOfContext(context);
      if (tag === undefined) return true;
      let isTold = decided.get(tag);
      if (isTold === undefined) decided.set(tag, (isTold = this.#mayOpen({ name: subject.name, tag }, peer)));
      return isTold;
    });
    return contexts.length === geometry.contexts.length ? geometry : { ...geometry, contexts };
  }
}

/** The words are the same whether there is such an export or not. */
function refused(name: string): ExportError {
  const hint = isById(subjectText(name)) ? ', or there is nothing with this id' : '';
  return new ExportError('POLICY', `you are not allowed to open ${JSON.stringify(name)}${hint}`);
}

/** Undefined also for wrong options: the exports report those, to peers that may open it. */
function sinceOf(name: string): string | undefined {
  try {
    return parseExportName(name).options.since;
  } catch {
    return undefined;
  }
}

function isById(subject: string): boolean {
  return subject.startsWith('@') && !subject.startsWith('@=');
}

function readOnly(geometry: Geometry): Geometry {
  return { ...geometry, readOnly: true, canFua: false, canTrim: false, canZero: false, canFastZero: false };
}

/** The server refuses writes to a read-only geometry by itself; this device is the second lock. */
class ReadOnlyDevice implements CompleteDevice {
  readonly geometry: Geometry;
  readonly fillsBuffer: boolean;
  readonly #device: CompleteDevice;

  constructor(device: CompleteDevice) {
    this.#device = device;
    this.geometry = readOnly(device.geometry);
    this.fillsBuffer = device.fillsBuffer ?? false;
  }

  read(offset: number, into: Buffer): Awaitable<Transferred> {
    return this.#device.read(offset, into);
  }

  write(): never {
    throw new DeviceError('EPERM', 'this client may only read the export');
  }

  zero(): never {
    throw new DeviceError('EPERM', 'this client may only read the export');
  }

  trim(): never {
    throw new DeviceError('EPERM', 'this client may only read the export');
  }

  flush(): Awaitable<void> {
    return this.#device.flush();
  }

  cache(offset: number, length: number): Awaitable<void> {
    return this.#device.cache(offset, length);
  }

  extents(context: string, offset: number, length: number, sink: ExtentSink): Awaitable<void> {
    return this.#device.extents(context, offset, length, sink);
  }

  isHole(offset: number, length: number): boolean {
    return this.#device.isHole?.(offset, length) ?? false;
  }

  close(ending: Ending): Awaitable<void> {
    return this.#device.close(ending);
  }
}
