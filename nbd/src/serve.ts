/**
 * `serve`: one device at one address, in one call. It owns the device from then on: all connections use the same object, which is
 * closed once, when the server is closed and its last connection is over.
 */

import {
  ExportError,
  type CompleteDevice,
  type Ending,
  type ExportInfo,
  type ExportProvider,
  type Geometry,
} from './block-device.js';
import { checkedDevice } from './checked-device.js';
import type { AnyDevice } from './device.js';
import { DeviceHandle, sharedGeometry } from './device-handle.js';
import { checkTls } from './protocol/tls-material.js';
import { formatNbdUri, type NbdUri } from './protocol/uri.js';
import { decodeString, MAX_STRING_BYTES } from './protocol/wire.js';
import { GuardedObserver } from './server/guarded-observer.js';
import { listenPlace, type BoundAddress, type ListenOptions, type ListenTarget } from './server/listening.js';
import { graceOf, NbdServer, type ServerOptions, type Unfinished } from './server/server.js';
import { checkObject, kindOf } from './kinds.js';

type ServerTls = NonNullable<ServerOptions['tls']>;

/** How a device is served; everything has a default. */
export interface ServeOptions extends Omit<ServerOptions, 'provider' | 'tls'> {
  /** The export's name, if the URI has none; by default ''. */
  readonly name?: string;
  /** Of the export, for people. */
  readonly description?: string;
  /** Permissions of the file of a unix socket, for example 0o660. */
  readonly mode?: number;
  /** TLS; required of every client, unless its `mode` is 'on'. */
  readonly tls?: Omit<ServerTls, 'mode'> & Partial<Pick<ServerTls, 'mode'>>;
}

/**
 * Serve `device` at `where`: an NBD URI, or `{ path }`, `{ port }` or `{ fd }`. It is the only export, with the name that the URI
 * has, and clients that ask for '' get it too.
 *
 *     const server = await serve('nbd+unix:///ram?socket=ram.sock', {
 *       size: disk.length,
 *       read: (offset, into) => disk.copy(into, 0, offset),
 *       write: (offset, data) => disk.set(data, offset),
 *     })
 *
 * All connections use this one device: `multiConn` is announced, unless it says otherwise, as memoryDevice, overlay and cache do
 * by default. Its `close` is called once, when the server is closed and the last connection is over: with 'disconnect' if all of
 * them have ended so, else with 'lost'. If this rejects, the device is still the caller's, and not closed.
 *
 * Without a host only this machine can connect. For an `nbds` URI `options.tls` must be given, and every client must use TLS.
 * A server keeps the process alive until it is closed. It handles no signals.
 *
 * Errors: TypeError and RangeError (an argument that cannot be used: nobody has been served); ListenError.
 */
export async function serve(where: ListenTarget, device: AnyDevice, options: ServeOptions = {}): Promise<DeviceServer> {
  checkObject(options, 'the options of serve');
  const { uri, options: place } = listenPlace(where);
  const complete = checkedDevice(device, 'the device');
  const { name, description = '', mode, tls, ...others } = options;
  const info = { name: nameFor(uri, name), description: text('description', description) };
  const provider = new OneExport(complete, sharedGeometry(device, complete), info);
  const observer = GuardedObserver.of(options.observer);
  const server = new OneDeviceServer(provider, { ...others, observer, tls: tlsFor(uri, tls) }, info.name, uri);
  await server.listen(withMode(place, mode));
  return server;
}

/** A server of one device, as `serve` returns it. Its address is the one that `serve` was given; `listen` adds others. */
export interface DeviceServer extends NbdServer {
  /** Where it listens: the whole path of a unix socket, the port that it really has. */
  readonly address: BoundAddress;
  /**
   * The URI to give to a client, with everything of the given URI, the port that the server really has and the whole path of a
   * unix socket. A server at all addresses of the machine is 'localhost' in it. Errors: RangeError when it is read, for `{ fd }`
   * of a unix socket without its path, which Node does not know.
   */
  readonly uri: string;
  /**
   * Close the server as NbdServer does, then the device. If a request is left unfinished, the device is closed when that has
   * finished. Errors: those of the device's `close`.
   */
  close(options?: Parameters<NbdServer['close']>[0]): Promise<Unfinished>;
}

type OneDeviceOptions = Omit<ServerOptions, 'provider' | 'observer'> & { readonly observer: GuardedObserver };

class OneDeviceServer extends NbdServer implements DeviceServer {
  readonly #provider: OneExport;
  readonly #exportName: string;
  readonly #given: NbdUri | undefined;
  readonly #requiresTls: boolean;
  #bound: BoundAddress | undefined;
  #host: string | undefined;
  readonly #observer: GuardedObserver;
  /** A caller of close() gets the errors of the device. */
  #isClosing = false;

  constructor(provider: OneExport, options: OneDeviceOptions, exportName: string, uri?: NbdUri) {
    super({ ...options, provider });
    this.#provider = provider;
    this.#observer = options.observer;
    this.#exportName = exportName;
    this.#given = uri;
    this.#requiresTls = options.tls?.mode === 'require';
  }

  get address(): BoundAddress {
    if (this.#bound === undefined) throw new Error('this server does not listen yet');
    return this.#bound;
  }

  get uri(): string {
    const bound = this.address;
    const parts = { ...this.#given, exportName: this.#exportName, tls: this.#requiresTls };
    if (bound.transport === 'unix') {
      if (bound.path.startsWith('descriptor '))
        throw new RangeError(`the path of ${bound.path} is unknown: give it with fd`);
      return formatNbdUri({ ...parts, transport: 'unix', path: bound.path });
    }
    return formatNbdUri({ ...parts, transport: 'tcp', host: this.#hostForClients(bound.host), port: bound.port });
  }

  #hostForClients(boundHost: string): string {
    const given = this.#given?.transport === 'tcp' ? this.#given.host : this.#host;
    if (boundHost === '0.0.0.0' || boundHost === '::') return 'localhost';
    // A certificate is for a name. Without one, the address is surer: another program may have the port on ::1.
    if (given === undefined || given === 'localhost') return this.#requiresTls ? 'localhost' : boundHost;
    return given;
  }

  override async listen(where: ListenTarget): Promise<BoundAddress> {
    const bound = await super.listen(where);
    if (this.#bound === undefined) {
      const { options } = listenPlace(where);
      this.#bound = bound;
      if ('port' in options) this.#host = (where as { host?: string }).host;
    }
    return bound;
  }

  override async close(options?: Parameters<NbdServer['close']>[0]): Promise<Unfinished> {
    graceOf(options);
    this.#isClosing = true;
    const unfinished = await super.close(options);
    await this.#provider.end();
    return unfinished;
  }

  /** The device is closed as soon as its requests in flight have finished. */
  override destroy(): void {
    super.destroy();
    this.#provider.end().catch((error: unknown) => {
      if (this.#isClosing) return;
      const { name: exportName } = this.#provider;
      this.#observer.onError(error, { exportName, source: 'device', method: 'close', expected: false });
    });
  }
}

/** A provider of one export, whose device is the same for all connections. */
class OneExport implements ExportProvider<CompleteDevice> {
  readonly #device: CompleteDevice;
  readonly #geometry: Geometry;
  readonly #info: ExportInfo;
  #connections = 0;
  #ending: Ending = 'disconnect';
  #isEnding = false;
  #closed: Promise<void> | undefined;

  constructor(device: CompleteDevice, geometry: Geometry, info: ExportInfo) {
    this.#device = device;
    this.#geometry = geometry;
    this.#info = info;
  }

  get name(): string {
    return this.#info.name;
  }

  list(): readonly ExportInfo[] {
    return [this.#info];
  }

  describe(name: string): { readonly geometry: Geometry; readonly info: ExportInfo } {
    this.#check(name);
    return { geometry: this.#geometry, info: this.#info };
  }

  open(name: string): { readonly device: CompleteDevice; readonly info: ExportInfo } {
    this.#check(name);
    if (this.#isEnding) throw new ExportError('SHUTDOWN', 'the server is shutting down');
    this.#connections++;
    const device = new DeviceHandle(this.#device, this.#geometry, (ending) => this.#left(ending));
    return { device, info: this.#info };
  }

  /** The server is closed: the device is closed when the last connection is over. Errors: those of the device, if it is now. */
  end(): Promise<void> {
    this.#isEnding = true;
    return this.#connections === 0 ? this.#close() : Promise.resolve();
  }

  #check(name: string): void {
    if (name === this.#info.name || name === '') return;
    const there = JSON.stringify(this.#info.name);
    throw new ExportError('UNKNOWN', `there is no export ${JSON.stringify(name)}; there is ${there}`);
  }

  #left(ending: Ending): Promise<void> | undefined {
    if (ending === 'lost') this.#ending = 'lost';
    this.#connections--;
    return this.#isEnding && this.#connections === 0 ? this.#close() : undefined;
  }

  #close(): Promise<void> {
    this.#closed ??= Promise.resolve(this.#ending).then((ending) => this.#device.close(ending));
    return this.#closed;
  }
}

/** Errors: TypeError (a name that is none, or two). */
function nameFor(uri: NbdUri | undefined, name: string | undefined): string {
  const inUri = uri?.exportName ?? '';
  if (name === undefined) return inUri;
  if (decodeString(Buffer.from(text('name', name))) !== name) {
    throw new TypeError(`name is none for an export: that has at most ${MAX_STRING_BYTES} bytes of UTF-8, and no NUL`);
  }
  if (inUri !== '' && name !== inUri) {
    throw new TypeError(`the export has two names: ${JSON.stringify(inUri)} in the URI, and ${JSON.stringify(name)}`);
  }
  return name;
}

function text(what: string, value: unknown): string {
  if (typeof value === 'string') return value;
  throw new TypeError(`${what} is ${kindOf(value)}, not a string`);
}

function tlsFor(uri: NbdUri | undefined, tls: ServeOptions['tls']): ServerTls | undefined {
  if (tls === undefined) {
    if (uri?.tls === true) throw new TypeError('an nbds URI needs the option tls, with the keys of the server');
    return undefined;
  }
  checkTls(tls, 'require');
  const { mode = 'require' } = tls;
  if (uri?.tls === true && mode === 'off') throw new TypeError("an nbds URI needs TLS, and tls.mode is 'off'");
  // Called as a method, as it is written.
  return { mode: uri?.tls === true ? 'require' : mode, material: () => tls.material() };
}

function withMode(place: ListenOptions, mode: number | undefined): ListenOptions {
  if (mode === undefined) return place;
  if ('path' in place && !('fd' in place)) return { path: place.path, mode };
  throw new TypeError('mode is for the file of a unix socket, and this is none');
}
