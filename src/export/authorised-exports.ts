/**
 * Exports as one peer may see them: what it may not open is not listed and not told about, what it may only read is
 * read-only. Owns the filtering; who may do what is the policy's affair. Whoever came through a private socket of the
 * daemon's own ("internal") is the daemon's user and is let through.
 */
import {
  DeviceError,
  ExportError,
  type Awaitable,
  type BlockDevice,
  type Ending,
  type ExportInfo,
  type ExportProvider,
  type ExtentSink,
  type Geometry,
  type Peer,
} from 'nbd-server-ts';

/** 'needs-tls': not like this, but perhaps for the one it turns out to be over TLS. */
export type Access = 'read-write' | 'read-only' | 'needs-tls' | 'refused';

export interface AccessPolicy {
  decide(exportName: string, peer: Peer): Access;
}

export class AuthorisedExports implements ExportProvider {
  readonly #provider: ExportProvider;
  readonly #policy: AccessPolicy;

  constructor(provider: ExportProvider, policy: AccessPolicy) {
    this.#provider = provider;
    this.#policy = policy;
  }

  async list(peer: Peer): Promise<readonly ExportInfo[]> {
    const all = await this.#provider.list(peer);
    return all.filter(({ name }) => {
      const access = this.#decide(name, peer);
      return access === 'read-write' || access === 'read-only';
    });
  }

  async describe(name: string, peer: Peer): Promise<{ readonly geometry: Geometry; readonly info: ExportInfo }> {
    const isReadOnly = this.#admit(name, peer);
    const described = await this.#provider.describe(name, peer);
    return isReadOnly ? { ...described, geometry: readOnly(described.geometry) } : described;
  }

  async open(name: string, peer: Peer): Promise<{ readonly device: BlockDevice; readonly info: ExportInfo }> {
    const isReadOnly = this.#admit(name, peer);
    const opened = await this.#provider.open(name, peer);
    if (!isReadOnly || opened.device.geometry.readOnly) return opened;
    return { ...opened, device: new ReadOnlyDevice(opened.device) };
  }

  left(peer: Peer): void {
    this.#provider.left?.(peer);
  }

  /** Whether read-only. Refused before anybody looks whether there is such an export: the answer is the same if not. */
  #admit(name: string, peer: Peer): boolean {
    const access = this.#decide(name, peer);
    if (access === 'read-write') return false;
    if (access === 'read-only') return true;
    if (access === 'needs-tls') throw new ExportError('TLS_REQUIRED', `TLS is needed to open ${JSON.stringify(name)}`);
    throw new ExportError('POLICY', `you are not allowed to open ${JSON.stringify(name)}`);
  }

  #decide(name: string, peer: Peer): Access {
    return peer.transport === 'internal' ? 'read-write' : this.#policy.decide(name, peer);
  }
}

function readOnly(geometry: Geometry): Geometry {
  return { ...geometry, readOnly: true, canFua: false, canTrim: false, canZero: false, canFastZero: false };
}

/** nbd/ refuses writes to a read-only geometry by itself; that this device refuses them too is the second lock. */
class ReadOnlyDevice implements BlockDevice {
  readonly geometry: Geometry;
  readonly #device: BlockDevice;

  constructor(device: BlockDevice) {
    this.#device = device;
    this.geometry = readOnly(device.geometry);
  }

  read(offset: number, into: Buffer): Awaitable<void> {
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
