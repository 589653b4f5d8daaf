/**
 * The daemon: one store, the NBD server in front of it, the control socket beside it. Owns the order in which these
 * start and stop; the order is what makes a stop lose nothing and a failed start leave nothing behind.
 */
import path from 'node:path';
import type { Logger } from 'pino';
import { ListenError, NbdServer, type ConnectionInfo, type Peer } from 'nbd-server-ts';
import { CatalogError } from '../vdi/catalog-error.js';
import { ControlServer } from './control-server.js';
import type { ConnectionStatus, StatusAnswer } from './control-protocol.js';
import { exportUri, formatListenAddress, isLocalOnly, type ListenAddress } from './listen-address.js';
import { openDirectly, whileLocked } from './open-operations.js';
import { OperationError } from './operations.js';
import { controlSocketOf, makeSocketDirectory } from './places.js';
import { socketState } from './stale-socket.js';

/** How long requests in flight may take to finish when the daemon stops. */
const STOP_GRACE_MS = 10_000;
/** Of the NBD sockets; other users are let in with --socket-mode. */
export const DEFAULT_SOCKET_MODE = 0o600;
/** Stands in a URI for the name of a VDI while there is none. */
const PLACEHOLDER = 'NAME';

export interface DaemonConfiguration {
  /** A directory, or a cluster's location. */
  readonly store: string;
  /** How long requests to a cluster are repeated while it cannot serve them. */
  readonly retryMs?: number;
  /** By default in the store. */
  readonly control?: string;
  readonly listeners: readonly ListenAddress[];
  /** By default DEFAULT_SOCKET_MODE. */
  readonly socketMode?: number;
  /** VDIs to make if they do not exist. */
  readonly create: readonly { readonly name: string; readonly size: number }[];
  /** Log every request. */
  readonly debug: boolean;
  readonly version: string;
}

export interface Daemon {
  readonly store: string;
  /** Path of the control socket. */
  readonly control: string;
  readonly listeners: readonly ListenAddress[];
  /** One URI per listener, of an export that exists or of the name NAME. */
  readonly uris: readonly string[];
  /** Take no more connections, finish the requests in flight, flush, and let go of the store. */
  stop(): Promise<void>;
}

/** Start serving. Errors: IN_USE if a daemon or socket is in the way, and those of the store and the catalog. */
export async function startDaemon(configuration: DaemonConfiguration, log: Logger): Promise<Daemon> {
  const controlPath = path.resolve(configuration.control ?? controlSocketOf(configuration.store));
  const startedAt = new Date().toISOString();
  const operations = await whileLocked(async () => {
    await refuseSecondDaemon(configuration.store);
    return openDirectly({
      store: configuration.store,
      isDaemon: true,
      retryMs: configuration.retryMs,
      log: (line, details) => log.warn(details ?? {}, line),
    });
  }, controlPath);

  /** By session: called when a connection that came through the control socket is over. */
  const sessionEnds = new Map<string, () => void>();
  const nbd = new NbdServer({
    provider: operations.exports,
    observer: {
      onConnectionOpen: ({ id, peer, exportName }) =>
        log.info({ connection: id, peer: labelOf(peer), export: exportName }, 'connection open'),
      onConnectionClose: ({ id, peer, exportName, ...counted }) => {
        log.info({ connection: id, peer: labelOf(peer), export: exportName, ...counted }, 'connection closed');
        if (peer.transport === 'internal') sessionEnds.get(peer.address)?.();
      },
      onDeviceError: (error, context) => log.error({ err: error, ...context }, 'request failed'),
      onListenerError: (error) => log.error({ err: error }, 'cannot accept a connection'),
      onRequest: configuration.debug ? (request) => log.debug(request, 'request') : undefined,
    },
  });
  const listening: ListenAddress[] = [];
  const control = new ControlServer(controlPath, {
    operations,
    status: (): StatusAnswer => ({
      version: configuration.version,
      pid: process.pid,
      store: operations.store,
      startedAt,
      listeners: listening.map(formatListenAddress),
      connections: Array.from(nbd.connections.values(), statusOf),
    }),
    serveNbd: (socket, head, session) =>
      new Promise<void>((resolve) => {
        const end = (): void => {
          sessionEnds.delete(session);
          resolve();
        };
        sessionEnds.set(session, end);
        if (nbd.serveConnection(socket, { peer: { transport: 'internal', address: session }, head }) === undefined)
          end();
      }),
    onFault: (error, request) => log.error({ err: error, request }, 'control request failed'),
  });

  const stop = async (): Promise<void> => {
    await Promise.all([nbd.close({ graceMs: STOP_GRACE_MS }), control.close(STOP_GRACE_MS)]);
    await operations.close();
  };
  try {
    for (const { name, size } of configuration.create) await createIfMissing(operations, name, size, log);
    for (const address of configuration.listeners) {
      listening.push(await listen(nbd, address, configuration.socketMode ?? DEFAULT_SOCKET_MODE));
      if (!isLocalOnly(address)) {
        log.warn(
          { listener: formatListenAddress(address) },
          'anybody who can reach this address can read and write every VDI: NBD without TLS knows no passwords',
        );
      }
    }
    await control.listen();
  } catch (error) {
    await stop().catch((stopError: unknown) => log.error({ err: stopError }, 'cleaning up after the failed start'));
    throw error;
  }
  const example =
    configuration.create[0]?.name ?? (await operations.list()).find((vdi) => !vdi.isSnapshot)?.name ?? PLACEHOLDER;
  return {
    store: operations.store,
    control: control.path,
    listeners: listening,
    uris: listening.map((address) => exportUri(address, example)),
    stop,
  };
}

async function refuseSecondDaemon(store: string): Promise<void> {
  const socketPath = controlSocketOf(store);
  if ((await socketState(socketPath)) !== 'alive') return;
  throw new OperationError(
    'IN_USE',
    `a daemon serves the store ${store} already (its control socket is ${socketPath}); stop it first, or give another --store`,
  );
}

async function createIfMissing(
  operations: Awaited<ReturnType<typeof openDirectly>>,
  name: string,
  size: number,
  log: Logger,
): Promise<void> {
  try {
    await operations.create(name, size, {});
    log.info({ vdi: name, size }, 'created');
  } catch (error) {
    if (!(error instanceof CatalogError) || error.code !== 'EXISTS') throw error;
    // A name that only snapshots bear cannot be served as asked.
    await operations.show(name);
    log.info({ vdi: name }, 'exists already, left as it is');
  }
}

async function listen(nbd: NbdServer, address: ListenAddress, socketMode: number): Promise<ListenAddress> {
  if (address.transport === 'unix') makeSocketDirectory(path.dirname(address.path));
  try {
    return await nbd.listen(
      address.transport === 'unix'
        ? { path: address.path, mode: socketMode }
        : { host: address.host, port: address.port },
    );
  } catch (error) {
    if (!(error instanceof ListenError)) throw error;
    throw new OperationError(error.code, `${error.message}; choose another address with --listen`, { cause: error });
  }
}

function statusOf(connection: ConnectionInfo): ConnectionStatus {
  return {
    id: connection.id,
    peer: labelOf(connection.peer),
    export: connection.exportName ?? null,
    openedAt: new Date(connection.openedAt).toISOString(),
    bytesRead: connection.bytesRead,
    bytesWritten: connection.bytesWritten,
    requests: connection.requests,
  };
}

function labelOf(peer: Peer): string {
  return peer.transport === 'internal' ? 'control socket' : `${peer.transport} ${peer.address}`;
}
