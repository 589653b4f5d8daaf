/**
 * The daemon: one store, the NBD server in front of it, the control socket beside it. Owns the order in which these
 * start and stop; the order is what makes a stop lose nothing and a failed start leave nothing behind, no new store and no
 * new VDI: what can fail comes before what makes something.
 */
import fs from 'node:fs';
import path from 'node:path';
import type { Logger } from 'pino';
import { DEFAULT_LIMITS, ListenError, NbdServer, type ConnectionInfo, type Limits } from 'nbd-server-ts';
import { ExportsWithDefault, whyNotOpen } from '../export/default-export.js';
import type { Exclusive } from '../export/exclusive.js';
import { ExportsWhenOpen } from '../export/exports-when-open.js';
import { clientOf } from '../export/peer-client.js';
import { ExportsToldToClients } from '../export/told-to-clients.js';
import type { Claim, Writers } from '../export/writers.js';
import { descriptorLimit } from '../system/descriptor-limit.js';
import { MAX_BLOCK_SIZE_SHIFT, type Unfinished } from '../store/object-store.js';
import { shellWord } from '../text/shell-word.js';
import { directoryOf, kindOf, type StoreOptions } from '../store/locations.js';
import { reasonOf } from '../system/system-error.js';
import { checkNewVdi } from '../vdi/catalog.js';
import { CatalogError } from '../vdi/catalog-error.js';
import { specOf } from '../vdi/names.js';
import { ClosedWindows } from './dead-peer-timeouts.js';
import { ServerConnections } from './server-connections.js';
import { ConnectionLog, labelOf } from './log/connection-log.js';
import { ControlServer } from './control/control-server.js';
import {
  DISCONNECT_WAIT_MS,
  type ConnectionStatus,
  type Disconnected,
  type StatusAnswer,
} from '../operations/control-protocol.js';
import { divideDescriptors, shortageOf, tooFew, type DescriptorBudget } from './descriptor-budget.js';
import { exposureOf } from './security/listener-exposure.js';
import { logFailures, logOfPeers, logOfStore } from './log/failure-log.js';
import { exportUri, formatListenAddress, isLocalOnly, type ListenAddress } from './listen-address.js';
import { openDirectly } from '../operations/open-directly.js';
import { whileLocked } from '../operations/open-operations.js';
import { machineMemory } from '../system/machine-memory.js';
import { defaultMemoryBudget } from './memory-budget.js';
import { OperationError, type VdiRecord } from '../operations/operations.js';
import {
  checkSocketPath,
  controlSocketElsewhere,
  controlSocketOf,
  makeSocketDirectory,
} from '../operations/default-paths.js';
import { LoggedExports } from './log/refusal-log.js';
import { causeOf, RepeatedLines, times } from './log/repeated-lines.js';
import { Security, type ReloadReport, type SecurityConfiguration } from './security/security.js';
import { boundAddress, peerCredentials } from '../system/socket-calls.js';
import { trustedSocket } from '../operations/socket-trust.js';
import { refuseUsedSocket, socketState } from '../operations/socket-state.js';
import type { InheritedSocket } from './systemd.js';

/** How long requests in flight may take to finish when the daemon stops. */
const STOP_GRACE_MS = 10_000;
/**
 * How long a cluster's nodes may take, after that, to be told what the end of its users means (locks, temporary snapshots).
 * What they do not answer by then is left as after a crash: the next start finds it.
 */
const CLUSTER_CLOSE_MS = 10_000;
/** Of the NBD sockets; other users are let in with --socket-mode. */
export const DEFAULT_SOCKET_MODE = 0o600;
/** How long a TCP peer has to answer when it is asked whether it is there: Node asks ten times, once a second. */
const KEEP_ALIVE_ANSWER_MS = 10_000;
/** Stands in a URI for the name of a VDI while there is none. */
const PLACEHOLDER = 'NAME';

export interface DaemonConfiguration {
  /** A directory, or a cluster's location. */
  readonly store: string;
  /** Whether a store is made where there is none; true if not given. */
  readonly mayCreateStore?: boolean;
  /** How long requests to a cluster are repeated while it cannot serve them. */
  readonly retryMs?: number;
  readonly storeOptions?: StoreOptions;
  /** By default in the store. */
  readonly control?: string;
  /** Permissions of the control socket. */
  readonly controlMode?: number;
  readonly listeners: readonly ListenAddress[];
  /** Sockets that listen already, from systemd. */
  readonly inherited?: readonly InheritedSocket[];
  readonly security?: SecurityConfiguration;
  /** Listen in the clear also where others than this machine can reach it. */
  readonly allowPlaintext?: boolean;
  /** How long NAME@now is kept for a client that was cut off; see DEFAULT_KEEP_MS. */
  readonly keepMs?: number;
  /** How long such a client counts as a user of a VDI; see DEFAULT_IN_USE_MS. */
  readonly inUseMs?: number;
  /** Each disk is written by one connection at a time; see exclusive.ts. */
  readonly exclusive?: Exclusive | undefined;
  /** Bounds other than the NBD server's own. */
  readonly limits?: Partial<Limits>;
  /** By default DEFAULT_SOCKET_MODE. */
  readonly socketMode?: number;
  /** The export of clients that name none; without it they are refused. A name that parseExportName takes. */
  readonly defaultExport?: string;
  /** VDIs to make if they do not exist. */
  readonly create: readonly { readonly name: string; readonly size: number }[];
  /** Log every request. */
  readonly debug: boolean;
  readonly version: string;
}

/** A VDI that was to be made, and exists with another size, or unfinished. Sizes in bytes. */
export interface KeptVdi {
  readonly name: string;
  readonly size: number;
  readonly wantedSize: number;
  readonly unfinished: Unfinished | undefined;
}

export interface Daemon {
  readonly store: string;
  /** Path of the control socket. */
  readonly control: string;
  /** VDIs of `create` that were there, and are not what it says. */
  readonly kept: readonly KeptVdi[];
  readonly listeners: readonly ListenAddress[];
  /** What an operator should know: which of them others can reach with nothing in the way, what cannot be served. */
  readonly warnings: readonly string[];
  /** What the limit of open files allows. */
  readonly descriptors: DescriptorBudget;
  /** Of requests and replies of all clients. */
  readonly maxMemoryBytes: number;
  /** One URI per listener, of an export that exists or of the name NAME. */
  readonly uris: readonly string[];
  /** Read TLS keys and access rules again; what is wrong is logged and changes nothing. Never fails. */
  reload(): Promise<ReloadReport>;
  /** Take no more connections, finish the requests in flight, flush, and let go of the store. */
  stop(): Promise<void>;
}

export interface StartOptions {
  /** Aborted when the daemon is to stop. While it starts it gives up then; later `stop` is for that. */
  readonly stop?: AbortSignal;
  /** Told when the start has failed, before it is cleaned up after. */
  readonly onFailure?: () => void;
  /** Told what came of each reload, whoever asked for it. */
  readonly onReloaded?: (report: ReloadReport) => void;
}

type OpenedStore = Awaited<ReturnType<typeof openDirectly>>;

/**
 * Start serving. Errors: IN_USE if a daemon or socket is in the way, and those of the store and the catalog; the signal's
 * reason.
 */
export async function startDaemon(
  configuration: DaemonConfiguration,
  log: Logger,
  { stop: toldToStop, onFailure, onReloaded }: StartOptions = {},
): Promise<Daemon> {
  const controlPath = path.resolve(configuration.control ?? controlSocketOf(configuration.store));
  const startedAt = new Date().toISOString();
  const security = await Security.load(configuration.security ?? {}, log);
  const isTlsRequired = security.tls?.mode === 'require';
  const wanted = configuration.limits?.maxConnections ?? DEFAULT_LIMITS.maxConnections;
  const descriptors = divideDescriptors(descriptorLimit(), wanted);
  const few = tooFew(descriptors);
  if (few !== undefined) throw new OperationError('TOO_FEW_FILES', few);
  if (!isTlsRequired && !configuration.allowPlaintext) configuration.listeners.forEach(refusePlaintext);
  // A cluster has an object size of its own, and is not asked yet.
  const mostShift = kindOf(configuration.store).hasOwnObjectSize ? MAX_BLOCK_SIZE_SHIFT : undefined;
  for (const { name, size } of configuration.create) checkNewVdi(name, size, mostShift);
  await refuseSecondDaemon(configuration.store);
  await checkControlSocket(controlPath, configuration.store);

  const reload = async (): Promise<ReloadReport> => {
    const report = await security.reload();
    onReloaded?.(report);
    return report;
  };

  /** By session: called when a connection that came through the control socket is over. */
  const sessionEnds = new Map<string, () => void>();
  const keepAliveMs = configuration.limits?.keepAliveMs ?? DEFAULT_LIMITS.keepAliveMs;
  const closedWindows = new ClosedWindows(keepAliveMs + KEEP_ALIVE_ANSWER_MS);
  const maxMemoryBytes = configuration.limits?.maxMemoryBytes ?? defaultMemoryBudget(machineMemory());
  // Apart: however many peers are turned away, a disk that fails is told of.
  const repeated = { ofStore: new RepeatedLines(), ofPeers: new RepeatedLines() };
  const connections = new ConnectionLog(log, repeated.ofPeers);
  const stopLoggingFailures = logFailures(log, repeated.ofStore);
  const exports = new ExportsWhenOpen();
  const nbd = new NbdServer({
    provider: exports,
    tls: security.tls,
    limits: { ...configuration.limits, maxMemoryBytes, maxConnections: descriptors.connections },
    peerCredentials,
    prepareSocket: (socket) => closedWindows.watch(socket),
    observer: {
      onConnectionOpen: (event) => connections.opened(event),
      onConnectionRefused: (event) => connections.refused(event),
      onConnectionClose: (event) => {
        connections.closed(event);
        if (event.peer.transport === 'internal') sessionEnds.get(event.peer.address)?.();
      },
      onDeviceError: (error, context) =>
        repeated.ofStore.tell(`fault ${context.exportName}`, causeOf(error), (repetition) =>
          log.error({ err: error, ...context }, `request failed${times(repetition)}`),
        ),
      onListenerError: (error) =>
        repeated.ofStore.tell('listeners', causeOf(error), (repetition) =>
          log.error({ err: error }, `cannot accept a connection${times(repetition)}`),
        ),
      onRequest: configuration.debug ? (request) => log.debug(request, 'request') : undefined,
    },
  });
  const listening: ListenAddress[] = [];
  const controlOf = (operations: OpenedStore): ControlServer => {
    // Nothing can be made on a read-only filesystem; who looks for a daemon there opens the store beside it, to read.
    const isFixed = operations.isReadOnly && directoryOf(configuration.store) !== undefined;
    const isElsewhere = isFixed && configuration.control === undefined;
    return new ControlServer(isElsewhere ? controlSocketElsewhere(operations.identity) : controlPath, {
      operations,
      isFoundFromStore: !isFixed,
      maxConnections: descriptors.controlConnections,
      mode: configuration.controlMode,
      status: (): StatusAnswer => ({
        version: configuration.version,
        pid: process.pid,
        store: operations.store,
        identity: operations.identity,
        startedAt,
        listeners: listening.map(formatListenAddress),
        connections: Array.from(nbd.connections.values(), (connection) =>
          statusOf(connection, operations.exports.writers),
        ),
      }),
      disconnect: (id, keepOutMs) => disconnect(nbd, operations.exports.writers, id, keepOutMs),
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
      reload,
      onFault: (error, request) => log.error({ err: error, request }, 'control request failed'),
    });
  };

  let operations: OpenedStore | undefined;
  let control: ControlServer | undefined;
  /** Aborted when a cluster is not waited for any more. */
  const leaving = new AbortController();
  const leave = (): void => leaving.abort();
  const stop = async (): Promise<void> => {
    operations?.announceStop();
    await Promise.all([nbd.close({ graceMs: STOP_GRACE_MS, refuse: false }), control?.close(STOP_GRACE_MS)]);
    stopLoggingFailures();
    closedWindows.stop();
    try {
      if (operations !== undefined) await closeStore(operations, leaving);
    } finally {
      repeated.ofStore.close();
      repeated.ofPeers.close();
    }
  };
  toldToStop?.addEventListener('abort', leave, { once: true });
  try {
    toldToStop?.throwIfAborted();
    for (const address of configuration.listeners) {
      listening.push(await listen(nbd, address, configuration.socketMode ?? DEFAULT_SOCKET_MODE));
    }
    for (const inherited of configuration.inherited ?? []) {
      const address = await adopt(nbd, inherited, isTlsRequired || configuration.allowPlaintext === true);
      log.info({ listener: formatListenAddress(address), name: inherited.name }, 'took over a socket');
      listening.push(address);
    }
    const warnings = listening.flatMap((address) => {
      const warning = exposureOf(address, configuration.security);
      if (warning !== undefined) log.warn({ listener: formatListenAddress(address) }, warning);
      return warning ?? [];
    });
    const shortage = shortageOf(descriptors, wanted);
    if (shortage !== undefined) log.warn(shortage);
    const opened = await whileLocked(async () => {
      await refuseSecondDaemon(configuration.store);
      return openDirectly({
        store: configuration.store,
        isDaemon: true,
        mayCreate: configuration.mayCreateStore ?? true,
        retryMs: configuration.retryMs,
        options: configuration.storeOptions,
        keepMs: configuration.keepMs,
        maxKept: descriptors.keptMoments,
        inUseMs: configuration.inUseMs,
        maxDescriptors: descriptors.objectFiles,
        exclusive: configuration.exclusive,
        log: logOfStore(log, repeated.ofStore),
        logOften: logOfPeers(log, repeated.ofPeers),
        signal: leaving.signal,
      });
    }, controlPath);
    operations = opened;
    toldToStop?.throwIfAborted();
    opened.exports.writers.connected = new ServerConnections(nbd);
    control = controlOf(opened);
    await control.listen();
    const doubt = doubtOf(control.path);
    if (doubt !== undefined) log.warn({ control: control.path }, doubt);
    const existing = (await opened.list()).find((vdi) => !vdi.isSnapshot);
    const example = configuration.create[0]?.name ?? (existing === undefined ? PLACEHOLDER : specOf(existing));
    // The last that can fail: whatever fails after it would leave new VDIs behind.
    const kept = await createMissing(opened, configuration.create, { log, stop: toldToStop });
    const { defaultExport } = configuration;
    const lacking = defaultExport === undefined ? undefined : await whyNotOpen(opened.exports, defaultExport);
    if (lacking !== undefined) {
      const warning = `the default export cannot be opened, and clients that name none are refused until it can: ${lacking}`;
      log.warn({ export: defaultExport }, warning);
      warnings.push(warning);
    }
    toldToStop?.removeEventListener('abort', leave);
    const withDefault = new ExportsWithDefault(security.guard(opened.exports), defaultExport);
    exports.opened(new LoggedExports(new ExportsToldToClients(withDefault), log, repeated));
    return {
      store: opened.store,
      control: control.path,
      kept,
      listeners: listening,
      warnings,
      descriptors,
      maxMemoryBytes,
      uris: listening.map((address) => exportUri(address, example, isTlsRequired)),
      reload,
      stop,
    };
  } catch (error) {
    onFailure?.();
    exports.failed();
    operations?.takeBackCreation();
    await stop().catch((stopError: unknown) => log.error({ err: stopError }, 'cleaning up after the failed start'));
    throw error;
  }
}

/** Errors: CLOSED if a cluster has not answered in its time, and those of closing. */
async function closeStore(operations: OpenedStore, leaving: AbortController): Promise<void> {
  const isRemote = directoryOf(operations.store) === undefined;
  let isLate = false;
  const leave = (): void => {
    isLate = true;
    leaving.abort();
  };
  const timer = setTimeout(leave, CLUSTER_CLOSE_MS);
  try {
    await operations.close();
    // What it waited for was cut off, and may be done or not.
    if (isLate && isRemote) throw new Error('what was asked of it was cut off');
  } catch (error) {
    if (!leaving.signal.aborted || !isRemote) throw error;
    throw new OperationError(
      'CLOSED',
      `${operations.store} was left without a word: its nodes did not answer in time. Locks and temporary snapshots of this ` +
        'daemon may still be there; the next start drops the snapshots',
      { cause: error },
    );
  } finally {
    clearTimeout(timer);
  }
}

/** Why commands will send nothing to our own control socket, if that is so. */
function doubtOf(controlPath: string): string | undefined {
  try {
    trustedSocket(controlPath);
    return undefined;
  } catch (error) {
    return (error as Error).message;
  }
}

/** What would be found wrong with it when the store is open. Errors: BAD_USAGE, IN_USE, PERMISSION. */
async function checkControlSocket(controlPath: string, store: string): Promise<void> {
  checkSocketPath(controlPath);
  await refuseUsedSocket(controlPath);
  const directory = path.dirname(controlPath);
  // The store's own is made with the store.
  const own = directoryOf(store);
  if (own !== undefined && directory === path.resolve(own)) return;
  makeSocketDirectory(directory);
  try {
    fs.accessSync(directory, fs.constants.W_OK | fs.constants.X_OK);
  } catch (error) {
    throw new OperationError(
      'PERMISSION',
      `cannot make the control socket ${controlPath}: ${reasonOf(error as Error)}; give --control PATH to have it elsewhere`,
      { cause: error },
    );
  }
}

async function refuseSecondDaemon(store: string): Promise<void> {
  const socketPath = controlSocketOf(store);
  if ((await socketState(socketPath)) !== 'alive') return;
  throw new OperationError(
    'IN_USE',
    `a daemon serves the store ${store} already (its control socket is ${socketPath}); stop it first, or give another --store`,
  );
}

/**
 * Make the VDIs that are missing, all or none. Errors: NO_VDI for a name that only snapshots bear, those of making, and the
 * signal's reason.
 */
async function createMissing(
  operations: OpenedStore,
  wanted: DaemonConfiguration['create'],
  { log, stop }: { readonly log: Logger; readonly stop: AbortSignal | undefined },
): Promise<KeptVdi[]> {
  const names = new Set((await operations.list()).map(({ name }) => name));
  // A name that only snapshots bear cannot be served as asked.
  for (const { name } of wanted) if (names.has(name)) await operations.show(name);
  const kept: KeptVdi[] = [];
  const made: string[] = [];
  try {
    for (const { name, size } of wanted) {
      const there = await createIfMissing(operations, name, size);
      if (!there) {
        made.push(name);
        log.info({ vdi: name, size }, 'created');
      } else if (there.size === size && !there.unfinished) {
        log.info({ vdi: name }, 'exists already, left as it is');
      } else {
        const { unfinished } = there;
        kept.push({ name, size: there.size, wantedSize: size, unfinished });
        const how = unfinished ? 'unfinished, and cannot be opened' : 'with another size than was asked for';
        log.warn({ vdi: name, size: there.size, wantedSize: size }, `exists already, left as it is: ${how}`);
      }
      stop?.throwIfAborted();
    }
  } catch (error) {
    for (const name of made) {
      await operations.remove(name).catch((failure: unknown) => {
        log.error({ err: failure, vdi: name }, 'left behind by the failed start');
      });
    }
    throw error;
  }
  return kept;
}

/** undefined if it was made; what is there if it was not. */
async function createIfMissing(operations: OpenedStore, name: string, size: number): Promise<VdiRecord | undefined> {
  try {
    await operations.create(name, size, { forceHint: `'sheepgate vdi create ${shellWord(name)} ${size} --force'` });
    return undefined;
  } catch (error) {
    if (!(error instanceof CatalogError) || error.code !== 'EXISTS') throw error;
    return operations.show(name);
  }
}

/** Errors: PLAINTEXT if others than this machine could talk to us, or listen in, unencrypted. */
function refusePlaintext(address: ListenAddress): void {
  if (isLocalOnly(address)) return;
  throw new OperationError(
    'PLAINTEXT',
    `${formatListenAddress(address)} can be reached from other machines, and NBD in the clear has neither passwords ` +
      'nor encryption: give --tls require with --tls-certificates or --tls-psk, or --allow-plaintext if the network is trusted',
  );
}

/** Errors: ACTIVATION if it is no socket that can be served; PLAINTEXT. */
async function adopt(nbd: NbdServer, { fd, name }: InheritedSocket, mayBePublic: boolean): Promise<ListenAddress> {
  const bound = boundAddress(fd);
  const unusable = (why: string, cause?: unknown): OperationError =>
    new OperationError(
      'ACTIVATION',
      `descriptor ${fd}, "${name}" of the socket unit, ${why}; give ListenStream= a path or ADDRESS:PORT`,
      { cause },
    );
  // Node cannot adopt other families, AF_VSOCK among them.
  if (bound === undefined) throw unusable('is neither a unix nor an IP socket');
  if (!mayBePublic && 'host' in bound) refusePlaintext({ transport: 'tcp', ...bound });
  try {
    return await nbd.listen('path' in bound ? { fd, path: bound.path } : { fd });
  } catch (error) {
    if (!(error instanceof ListenError)) throw error;
    throw unusable(`cannot be listened on (${error.message})`, error);
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

/** Cut a connection off; answers when it is over, or has requests that take too long. Errors: NO_CLIENT. */
async function disconnect(nbd: NbdServer, writers: Writers, id: number, keepOutMs: number): Promise<Disconnected> {
  const found = nbd.connections.get(id);
  if (found === undefined) {
    throw new OperationError(
      'NO_CLIENT',
      `there is no connection ${id}; 'sheepgate client list' shows those there are`,
    );
  }
  const connection = statusOf(found, writers);
  writers.keepOut(found.peer, keepOutMs);
  const over = nbd.disconnect(id, 'disconnected by the operator');
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<boolean>((resolve) => {
    timer = setTimeout(() => resolve(false), DISCONNECT_WAIT_MS);
  });
  const isOver = await Promise.race([over.then(() => true), late]);
  clearTimeout(timer);
  return { connection, isOver, inFlight: isOver ? 0 : found.inFlight };
}

function statusOf(connection: ConnectionInfo, writers: Writers): ConnectionStatus {
  const { peer, exportName } = connection;
  return {
    id: connection.id,
    peer: labelOf(peer),
    export: exportName ?? null,
    client: clientOf(peer)?.label ?? null,
    access: exportName === undefined || peer.transport === 'internal' ? null : accessOf(writers.claimOf(peer)),
    openedAt: new Date(connection.openedAt).toISOString(),
    bytesRead: connection.bytesRead,
    bytesWritten: connection.bytesWritten,
    requests: connection.requests,
  };
}

function accessOf(claim: Claim | undefined): ConnectionStatus['access'] {
  if (claim === undefined || !claim.mayWrite) return 'read-only';
  return claim.isExclusive ? 'exclusive' : 'read-write';
}
