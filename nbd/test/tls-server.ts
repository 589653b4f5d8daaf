/**
 * A server with TLS for one test, and clients for it; its reports are kept. Owns the cleanup of both.
 */

import tls from 'node:tls';
import { expect, onTestFinished } from 'vitest';
import {
  ExportError,
  NbdClient,
  NbdClientError,
  NbdServer,
  type ClientOptions,
  type ConnectionCloseEvent,
  type ConnectionOpenEvent,
  type Limits,
  type Peer,
  type TlsMaterial,
  type TlsMode,
} from '../src/index.js';
import { OPT, REP } from '../src/protocol/wire.js';
import { RawClient } from './raw-client.js';
import { TestExport, TestProvider } from './test-device.js';

/** A provider that records the peers of its calls. */
export class AskedProvider extends TestProvider {
  readonly peers: Peer[] = [];

  override describe(name: string, peer?: Peer): ReturnType<TestProvider['describe']> {
    if (peer !== undefined) this.peers.push(peer);
    if (name === 'tls only' && peer?.tls === undefined) throw new ExportError('TLS_REQUIRED', 'over TLS only');
    return super.describe(name);
  }
}

export interface TlsServer {
  readonly server: NbdServer;
  readonly provider: AskedProvider;
  readonly port: number;
  readonly closes: ConnectionCloseEvent[];
  readonly opens: ConnectionOpenEvent[];
  /** Errors of the program's code. */
  readonly errors: unknown[];
  /** The settings for the next handshake. */
  material: TlsMaterial;
  /** What the server calls; by default it returns `material`. Tests return what they should not. */
  supply: () => unknown;
  raw(): Promise<RawClient>;
  connect(options?: ClientOptions['tls']): Promise<NbdClient>;
}

export interface TlsServerOptions {
  readonly mode: TlsMode;
  readonly material: TlsMaterial;
  /** PEM: what clients trust. */
  readonly authority: string;
  readonly limits?: Partial<Limits>;
}

/** It has the exports "disk", and "tls only" for clients under TLS. */
export async function startTlsServer(options: TlsServerOptions): Promise<TlsServer> {
  const provider = new AskedProvider([new TestExport('disk'), new TestExport('tls only')]);
  const closes: ConnectionCloseEvent[] = [];
  const opens: ConnectionOpenEvent[] = [];
  const errors: unknown[] = [];
  const nbd = new NbdServer({
    provider,
    limits: options.limits,
    tls: { mode: options.mode, material: () => result.supply() as TlsMaterial },
    observer: {
      onConnectionClose: (event) => closes.push(event),
      onConnectionOpen: (event) => opens.push(event),
      onDeviceError: (error) => errors.push(error),
    },
  });
  onTestFinished(() => nbd.destroy());
  const bound = await nbd.listen({ host: '127.0.0.1', port: 0 });
  if (bound.transport !== 'tcp') throw new Error('not a TCP address');
  const address = { host: bound.host, port: bound.port };
  const result: TlsServer = {
    ...{ server: nbd, provider, port: bound.port, closes, opens, errors, material: options.material },
    supply: () => result.material,
    raw: () => RawClient.connect(address),
    async connect(clientTls) {
      const connected = await NbdClient.connect({ ...address, tls: clientTls ?? { authorities: options.authority } });
      onTestFinished(() => connected.destroy());
      return connected;
    },
  };
  return result;
}

/** A raw client under TLS, after STARTTLS. */
export async function rawInTls(from: TlsServer, options: tls.ConnectionOptions = {}): Promise<RawClient> {
  return upgrade(await acknowledged(from), options);
}

/** A raw client that may begin the TLS handshake: STARTTLS is acknowledged. */
export async function acknowledged(from: TlsServer): Promise<RawClient> {
  const plain = await from.raw();
  await plain.greet();
  await startTls(plain);
  return plain;
}

async function startTls(plain: RawClient): Promise<void> {
  expect((await plain.option(OPT.STARTTLS)).map(({ type }) => type)).toEqual([REP.ACK]);
}

/** The same client under TLS. */
export async function starttls(plain: RawClient, options: tls.ConnectionOptions = {}): Promise<RawClient> {
  await startTls(plain);
  return upgrade(plain, options);
}

async function upgrade(plain: RawClient, options: tls.ConnectionOptions): Promise<RawClient> {
  plain.socket.removeAllListeners('data').removeAllListeners('end');
  const secure = tls.connect({ socket: plain.socket, rejectUnauthorized: false, ...options });
  const inTls = new RawClient(secure);
  await new Promise((resolve, reject) => secure.once('secureConnect', resolve).once('error', reject));
  return inTls;
}

/** The error of `attempt`, which must fail. */
export async function failure(attempt: Promise<unknown>): Promise<NbdClientError> {
  const error: unknown = await attempt.then(
    () => undefined,
    (reason: unknown) => reason,
  );
  if (!(error instanceof NbdClientError)) throw new Error(`an NbdClientError was to come, not ${String(error)}`);
  return error;
}
