/**
 * `createServer`: many exports from one function. It owns the devices that were opened only to be described, one for each
 * connection at most; everything else of a connection is the server's.
 */

import {
  ExportError,
  type Awaitable,
  type CompleteDevice,
  type ExportInfo,
  type ExportProvider,
  type Geometry,
  type OpenContext,
  type Peer,
} from './block-device.js';
import { checkedOpened } from './checked-device.js';
import type { AnyDevice } from './device.js';
import { warnOf } from './server/error-warnings.js';
import { NbdServer, type ServerOptions } from './server/server.js';
import { checkObject, isThenable, kindOf } from './kinds.js';

/** The connection for which an export is asked. */
export interface ExportRequest {
  /** The client: its address, and what TLS has proven. */
  readonly peer: Peer;
  /** The id of the connection, as in ConnectionInfo. */
  readonly id: number;
  /** Aborted when the client is gone, or the connection is closed. */
  readonly signal: AbortSignal;
}

/** What `exports` answers: a device, null or undefined if there is no such export, or an Error. */
export type ExportAnswer = AnyDevice | Error | null | undefined;

/** An export in a list: its name, or its name with more. */
export type ListedExport = string | (Pick<ExportInfo, 'name'> & Partial<ExportInfo>);

/** The exports that are listed to clients: any iterable, or a function that gives one to each client that asks. */
export type ListedExports = Iterable<ListedExport> | ((peer: Peer) => Awaitable<Iterable<ListedExport>>);

/** What createServer serves, and how. Only `exports` is required. */
export interface CreateServerOptions extends Omit<ServerOptions, 'provider'> {
  /**
   * Gives the device called `name`, opened for this connection: the server closes it when the connection is over. Clients that
   * name no export ask for ''. Called once for each connection and name, also for a client that only asks what the export is.
   *
   * Errors: an ExportError, returned or thrown, is told to the client as it is. Any other error is reported, and the client
   * learns only that there was one.
   */
  exports(name: string, request: ExportRequest): Awaitable<ExportAnswer>;
  /**
   * What clients see that ask for a list of the exports; without it they are told that this server does not list them. The
   * list does not limit `exports`. Descriptions are shown with an opened export too, if the list is not a function.
   */
  readonly list?: ListedExports;
}

/**
 * A server of many exports. It listens when `listen` is called.
 *
 *     const server = createServer({ exports: (name, { peer }) => (mayOpen(peer, name) ? openImage(name) : null) })
 *     await server.listen('nbd://localhost')
 *
 * Errors: TypeError (an option of the wrong type), RangeError (a limit is invalid).
 */
export function createServer(options: CreateServerOptions): NbdServer {
  checkObject(options, 'the options of createServer');
  const given = (options as { readonly exports?: unknown }).exports;
  if (typeof given !== 'function') {
    throw new TypeError(
      `createServer: exports is ${kindOf(given)}, not a function (name, { peer, id, signal }) => device`,
    );
  }
  // Called as a method, as it is written.
  const exports: CreateServerOptions['exports'] = (name, request) => options.exports(name, request);
  return new NbdServer({ ...options, provider: new FunctionExports(exports, checkedList(options.list)) });
}

/** A device that was opened to be described, and is kept for an `open` that may follow. */
interface Kept {
  readonly name: string;
  readonly opened: Promise<CompleteDevice>;
  /** Undefined while it is being opened. */
  device?: CompleteDevice;
}

class FunctionExports implements ExportProvider<CompleteDevice> {
  readonly #exports: CreateServerOptions['exports'];
  readonly #list: ListedExports | undefined;
  /** By connection: `peer` is an object of its own for each. */
  readonly #kept = new Map<Peer, Kept>();

  constructor(exports: CreateServerOptions['exports'], list: ListedExports | undefined) {
    this.#exports = exports;
    this.#list = list;
  }

  async list(peer: Peer): Promise<Iterable<ExportInfo>> {
    const list = this.#list;
    // Not an empty list: that would be taken for a server without exports, and old qemu would not open any.
    if (list === undefined) throw new ExportError('POLICY', 'this server does not list its exports');
    return infosOf(typeof list === 'function' ? iterable(await list(peer)) : list);
  }

  async describe(
    name: string,
    peer: Peer,
    _contexts?: readonly string[],
    context?: OpenContext,
  ): Promise<{ readonly geometry: Geometry; readonly info: ExportInfo }> {
    let kept = this.#kept.get(peer);
    if (kept?.name !== name) {
      // Entered at once: whenever the client leaves, `left` finds it.
      const before = kept;
      kept = { name, opened: this.#openAfter(before, name, peer, context) };
      this.#kept.set(peer, kept);
    }
    try {
      kept.device = await kept.opened;
    } catch (error) {
      if (this.#kept.get(peer) === kept) this.#kept.delete(peer);
      throw error;
    }
    return { geometry: kept.device.geometry, info: this.#infoOf(name) };
  }

  async open(
    name: string,
    peer: Peer,
    context?: OpenContext,
  ): Promise<{ readonly device: CompleteDevice; readonly info: ExportInfo }> {
    const kept = this.#kept.get(peer);
    this.#kept.delete(peer);
    const opened = kept?.name === name ? kept.opened : this.#openAfter(kept, name, peer, context);
    return { device: await opened, info: this.#infoOf(name) };
  }

  left(peer: Peer): Awaitable<void> {
    const kept = this.#kept.get(peer);
    this.#kept.delete(peer);
    if (kept === undefined) return;
    if (kept.device !== undefined) return closeUnused(kept);
    // The client does not wait for it, nor does the server.
    closeUnused(kept).catch((error: unknown) => {
      warnOf(error, { peer, exportName: kept.name, source: 'device', method: 'close', expected: false });
    });
  }

  /** Close `before` and open `name`, one after the other: both may be the same file. */
  async #openAfter(
    before: Kept | undefined,
    name: string,
    peer: Peer,
    context: OpenContext | undefined,
  ): Promise<CompleteDevice> {
    if (before !== undefined) await closeUnused(before);
    const { id = 0, signal = NEVER } = context ?? {};
    const answer: unknown = await this.#exports(name, { peer, id, signal });
    if (answer instanceof Error) throw answer;
    if (answer === null || answer === undefined) {
      throw new ExportError('UNKNOWN', `there is no export ${JSON.stringify(name)}`);
    }
    return checkedOpened(answer, `export ${JSON.stringify(name)}`);
  }

  #infoOf(name: string): ExportInfo {
    const list = this.#list;
    if (list !== undefined && typeof list !== 'function') {
      for (const listed of list) {
        if (typeof listed !== 'string' && listed.name === name)
          return { ...listed, description: listed.description ?? '' };
      }
    }
    return { name, description: '' };
  }
}

/** For a program that calls the provider itself, without a connection. */
const NEVER = new AbortController().signal;

/**
 * Close a device that no client has used: 'disconnect', since nobody will return to it. One that could not be opened has been
 * reported. Errors: those of the device.
 */
async function closeUnused({ opened }: Kept): Promise<void> {
  const device = await opened.catch(() => undefined);
  await device?.close('disconnect');
}

/** `list` as it can be used for each client. Errors: TypeError. */
function checkedList(list: unknown): ListedExports | undefined {
  if (list === undefined || typeof list === 'function') return list as ListedExports | undefined;
  const exports = iterable(list);
  // An iterator can be used once only.
  const isOnce = (exports as Iterable<unknown>)[Symbol.iterator]() === (exports as unknown);
  const kept = isOnce ? [...exports] : exports;
  // Mistakes show at once, not with the first client.
  Array.from(infosOf(kept));
  return kept;
}

function iterable(list: unknown): Iterable<ListedExport> {
  const isOne = typeof list === 'object' && list !== null && Symbol.iterator in list;
  if (isOne) return list as Iterable<ListedExport>;
  const hint = isThenable(list) ? '; give a function that returns it' : '';
  throw new TypeError(`list is ${kindOf(list)}, not an array or another iterable of names${hint}`);
}

/** One at a time, as the server asks for them. Errors: TypeError. */
function* infosOf(list: Iterable<unknown>): Iterable<ExportInfo> {
  for (const listed of list) {
    if (typeof listed === 'string') yield { name: listed, description: '' };
    else if (isInfo(listed)) yield { ...listed, description: listed.description ?? '' };
    else throw new TypeError(`list has ${kindOf(listed)}, which is neither a name nor { name, description }`);
  }
}

function isInfo(listed: unknown): listed is Exclude<ListedExport, string> {
  if (typeof listed !== 'object' || listed === null) return false;
  const { name, description = '', countedAs = '' } = listed as Readonly<Record<string, unknown>>;
  return typeof name === 'string' && typeof description === 'string' && typeof countedAs === 'string';
}
