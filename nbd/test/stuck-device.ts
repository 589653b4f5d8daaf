/**
 * An export whose calls and opens are answered only when the test says so, or never: for time-outs, signals and orderly ends. It
 * records every call with its signal. Owns a server in front of it, on a unix socket or TCP, with or without TLS.
 */

import { join } from 'node:path';
import type net from 'node:net';
import { onTestFinished } from 'vitest';
import {
  ALLOCATION_CONTEXT,
  NbdServer,
  type BlockDevice,
  type ConnectionCloseEvent,
  type Ending,
  type ExportInfo,
  type ExportProvider,
  type ExtentSink,
  type OpenContext,
  type Peer,
  type ServerOptions,
} from '../src/index.js';
import { RawClient } from './raw-client.js';
import { temporaryDirectory } from './test-server.js';

export const STUCK_SIZE = 64 * 1024 * 1024;

type Method = 'read' | 'write' | 'flush' | 'zero' | 'trim' | 'cache' | 'extents';

/** One call that waits. */
export interface StuckCall {
  readonly method: Method;
  readonly exportName: string;
  readonly offset: number;
  readonly length: number;
  readonly signal: AbortSignal | undefined;
  /** Of `extents`. */
  readonly sink: ExtentSink | undefined;
  /** The memory of a read or write. */
  readonly buffer: Buffer | undefined;
  answer(): void;
  fail(error: unknown): void;
}

export interface StuckOpen extends OpenContext {
  readonly name: string;
  answer(): void;
  fail(error: unknown): void;
}

/** Opens every name; a name that begins with "stuck" is opened, and described, only when the test answers. */
export class StuckProvider implements ExportProvider {
  readonly calls: StuckCall[] = [];
  readonly opens: StuckOpen[] = [];
  readonly describes: StuckOpen[] = [];
  readonly endings: Ending[] = [];
  readonly left: (peer: Peer) => void;
  readonly gone: Peer[] = [];
  opened = 0;
  /** Which calls are not answered at once. */
  isStuck: (method: Method, offset: number, exportName: string) => boolean = () => true;
  /** Called for every call that waits. */
  onCall: (call: StuckCall) => void = () => undefined;
  /** Called when a device is to be closed. */
  closing: () => Promise<void> | void = () => undefined;
  countedAs: ((name: string) => string) | undefined;

  constructor() {
    this.left = (peer) => void this.gone.push(peer);
  }

  info(name: string): ExportInfo {
    const { countedAs } = this;
    return { name, description: 'answers late', ...(countedAs && { countedAs: countedAs(name) }) };
  }

  list(): ExportInfo[] {
    return [this.info('disk')];
  }

  describe(name: string, _peer: Peer, _contexts?: readonly string[], context?: OpenContext) {
    const described = { geometry: GEOMETRY, info: this.info(name) };
    if (!name.startsWith('stuck describe')) return described;
    return new Promise<typeof described>((resolve, reject) => {
      if (context === undefined) throw new Error('describe() was given no context');
      this.describes.push({ ...context, name, answer: () => resolve(described), fail: reject });
    });
  }

  open(name: string, _peer: Peer, context?: OpenContext) {
    if (context === undefined) throw new Error('open() was given no context');
    const { id, signal } = context;
    return new Promise<{ device: BlockDevice; info: ExportInfo }>((resolve, reject) => {
      const answer = (): void => {
        this.opened++;
        resolve({ device: this.device(name), info: this.info(name) });
      };
      this.opens.push({ name, id, signal, answer, fail: reject });
      if (!name.startsWith('stuck')) answer();
    });
  }

  private device(exportName: string): BlockDevice {
    const call = (method: Method, at: Partial<StuckCall>, act?: () => void): Promise<void> | void => {
      const offset = at.offset ?? 0;
      if (!this.isStuck(method, offset, exportName)) return act?.();
      return new Promise<void>((resolve, reject) => {
        const one: StuckCall = {
          ...{
            method,
            exportName,
            offset,
            length: at.length ?? 0,
            signal: at.signal,
            sink: at.sink,
            buffer: at.buffer,
          },
          answer: () => {
            act?.();
            resolve();
          },
          fail: reject,
        };
        this.calls.push(one);
        this.onCall(one);
      });
    };
    return {
      geometry: GEOMETRY,
      fillsBuffer: true,
      read: (offset, into, signal) =>
        call('read', { offset, length: into.length, buffer: into, signal }, () => void into.fill(1)),
      write: (offset, data, _fua, signal) => call('write', { offset, length: data.length, buffer: data, signal }),
      flush: (signal) => call('flush', { signal }),
      zero: (offset, length, _mode, signal) => call('zero', { offset, length, signal }),
      trim: (offset, length, _fua, signal) => call('trim', { offset, length, signal }),
      cache: (offset, length, signal) => call('cache', { offset, length, signal }),
      extents: (_context, offset, length, sink, signal) =>
        call('extents', { offset, length, sink, signal }, () => void sink(offset, length, 0)),
      close: (ending) => {
        this.endings.push(ending);
        return this.closing();
      },
    };
  }
}

const GEOMETRY = {
  ...{ size: STUCK_SIZE, canTrim: true, canZero: true, canCache: true, canFua: true },
  contexts: [ALLOCATION_CONTEXT],
};

export interface StuckServer {
  readonly server: NbdServer;
  readonly provider: StuckProvider;
  readonly address: net.NetConnectOpts;
  readonly closes: ConnectionCloseEvent[];
  readonly errors: unknown[];
  raw(): Promise<RawClient>;
  opened(name?: string): Promise<RawClient>;
}

export async function stuckServer(
  options: Omit<ServerOptions, 'provider' | 'observer'> & {
    readonly tcp?: boolean;
  } = {},
): Promise<StuckServer> {
  const provider = new StuckProvider();
  const closes: ConnectionCloseEvent[] = [];
  const errors: unknown[] = [];
  const { tcp, ...rest } = options;
  const server = new NbdServer({
    ...rest,
    provider,
    observer: {
      onConnectionClose: (event) => closes.push(event),
      onError: (error) => errors.push(error),
    },
  });
  onTestFinished(() => server.destroy());
  let address: net.NetConnectOpts;
  if (tcp === true) {
    const bound = await server.listen({ host: '127.0.0.1', port: 0 });
    if (bound.transport !== 'tcp') throw new Error('not TCP');
    address = { host: '127.0.0.1', port: bound.port };
  } else {
    const path = join(await temporaryDirectory(), 'nbd.sock');
    await server.listen({ path });
    address = { path };
  }
  const raw = (): Promise<RawClient> => RawClient.connect(address);
  return {
    ...{ server, provider, address, closes, errors, raw },
    async opened(name = 'disk') {
      const client = await raw();
      await client.open(name);
      return client;
    },
  };
}
