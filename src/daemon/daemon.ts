/**
 * The daemon: one store, the NBD server in front of it, the control socket beside it. Owns the order in which these start
 * (stop-daemon.ts has the order in which they stop). A failed start leaves nothing behind, no new store and no new VDI: what
 * can fail comes before what makes something.
 */
import path from 'node:path';
import type { Logger } from 'pino';
import { DEFAULT_LIMITS, type NbdServer } from 'nbd-server-ts';
import { ExportsWithDefault, whyNotOpen } from '../export/default-export.js';
import { ExportsWhenOpen } from '../export/exports-when-open.js';
import { ExportsWithClientMessages } from '../export/client-messages.js';
import type { ReloadReport, StatusAnswer } from '../operations/control-protocol.js';
import { controlSocketElsewhere, controlSocketOf } from '../operations/default-paths.js';
import { openDirectly, type OpenedStore } from '../operations/open-directly.js';
import { whileLocked } from '../operations/open-operations.js';
import { OperationError } from '../operations/operations.js';
import { directoryOf, kindOf } from '../store/locations.js';
import { MAX_BLOCK_SIZE_SHIFT } from '../store/vdi-record.js';
import { descriptorLimit } from '../system/descriptor-limit.js';
import { machineMemory } from '../system/machine-memory.js';
import { checkNewVdi } from '../vdi/new-vdi.js';
import { specOf } from '../vdi/names.js';
import { disconnect, statusOf } from './control/client-connections.js';
import { ControlServer } from './control/control-server.js';
import { NbdSessions } from './control/nbd-sessions.js';
import { createMissing, type KeptVdi } from './create-missing.js';
import type { DaemonConfiguration } from './daemon-configuration.js';
import { DeadPeerTimeouts } from './dead-peer-timeouts.js';
import { divideDescriptors, shortageOf, tooFew, type DescriptorBudget } from './descriptor-budget.js';
import { exportUri, formatListenAddress, type ListenAddress } from './listen-address.js';
import { adopt, DEFAULT_SOCKET_MODE, listen, refusePlaintext } from './listeners.js';
import { logFailures, logOfPeers, logOfStore } from './log/failure-log.js';
import { LoggedExports } from './log/refusal-log.js';
import { RepeatedLines, type StoreAndPeerLines } from './log/repeated-lines.js';
import { makeLoggedServer } from './logged-server.js';
import { defaultMemoryBudget } from './memory-budget.js';
import { exposureOf } from './security/listener-exposure.js';
import { Security } from './security/security.js';
import { ServerConnections } from './server-connections.js';
import { checkControlSocket, doubtOf, refuseSecondDaemon } from './start-checks.js';
import { stopInOrder, type RunningParts } from './stop-daemon.js';

/** How long a TCP peer has to answer keepalive probes: Node sends ten, one a second. */
const KEEP_ALIVE_ANSWER_MS = 10_000;
/** In a URI, in place of a VDI's name, while there is no VDI. */
const PLACEHOLDER = 'NAME';

export interface Daemon {
  readonly store: string;
  /** Path of the control socket. */
  readonly control: string;
  /** VDIs of `create` that existed already, with another size or unfinished. */
  readonly kept: readonly KeptVdi[];
  readonly listeners: readonly ListenAddress[];
  /** For the operator: listeners that other users or machines can reach unhindered, a default export that cannot be served. */
  readonly warnings: readonly string[];
  /** How the limit of open files is divided. */
  readonly descriptors: DescriptorBudget;
  /** For the requests and replies of all clients. */
  readonly maxMemoryBytes: number;
  /** One URI per listener, of an existing export or of the placeholder NAME. */
  readonly uris: readonly string[];
  /** Read TLS keys and access rules again. A bad file is logged and changes nothing. Never fails. */
  reload(): Promise<ReloadReport>;
  /** Take no more connections, finish the requests in flight, flush, and close the store. */
  stop(): Promise<void>;
}

export interface StartOptions {
  /** Aborts the start. A daemon that has started is stopped with its `stop`. */
  readonly stop?: AbortSignal;
  /** Called when the start has failed, before the cleaning up. */
  readonly onFailure?: () => void;
  /** Called with the result of each reload, also of those from the control socket. */
  readonly onReloaded?: (report: ReloadReport) => void;
}

/**
 * Start serving. Errors: IN_USE (another daemon, or a socket is in use), TOO_FEW_FILES, PLAINTEXT, TLS, ACCESS, ACTIVATION, LOCKED,
 * those of the store and the catalog; the reason of `stop`.
 */
export async function startDaemon(
  configuration: DaemonConfiguration,
  log: Logger,
  { stop: stopSignal, onFailure, onReloaded }: StartOptions = {},
): Promise<Daemon> {
  // Checks first: none of them makes a store, a VDI or a listener.
  const controlPath = path.resolve(configuration.control ?? controlSocketOf(configuration.store));
  const startedAt = new Date().toISOString();
  const security = await Security.load(configuration.security ?? {}, log);
  const isTlsRequired = security.tls?.mode === 'require';
  const wanted = configuration.limits?.maxConnections ?? DEFAULT_LIMITS.maxConnections;
  const descriptors = divideDescriptors(descriptorLimit(), wanted);
  const few = tooFew(descriptors);
  if (few !== undefined) throw new OperationError('TOO_FEW_FILES', few);
  if (!isTlsRequired && !configuration.allowPlaintext) configuration.listeners.forEach(refusePlaintext);
  checkNewVdis(configuration);
  await refuseSecondDaemon(configuration.store);
  await checkControlSocket(controlPath, configuration.store);

  const reload = async (): Promise<ReloadReport> => {
    const report = await security.reload();
    onReloaded?.(report);
    return report;
  };
  const maxMemoryBytes = configuration.limits?.maxMemoryBytes ?? defaultMemoryBudget(machineMemory());
  const keepAliveMs = configuration.limits?.keepAliveMs ?? DEFAULT_LIMITS.keepAliveMs;
  const deadPeers = new DeadPeerTimeouts(keepAliveMs + KEEP_ALIVE_ANSWER_MS);
  const repeated: StoreAndPeerLines = { ofStore: new RepeatedLines(), ofPeers: new RepeatedLines() };
  const sessions = new NbdSessions();
  // Clients may connect before the store is open; they wait for it.
  const exports = new ExportsWhenOpen();
  const nbd = makeLoggedServer({
    provider: exports,
    tls: security.tls,
    limits: { ...configuration.limits, maxMemoryBytes, maxConnections: descriptors.connections },
    ...{ log, repeated, deadPeers, sessions, debug: configuration.debug },
  });
  const parts: RunningParts = {
    ...{ nbd, deadPeers, repeated },
    stopLoggingFailures: logFailures(log, repeated.ofStore),
    leaving: new AbortController(),
    operations: undefined,
    control: undefined,
  };
  const leave = (): void => parts.leaving.abort();
  stopSignal?.addEventListener('abort', leave, { once: true });
  try {
    stopSignal?.throwIfAborted();
    const listening = await openListeners(configuration, nbd, log, isTlsRequired);
    const warnings = listening.flatMap((address) => {
      const warning = exposureOf(address, configuration.security);
      if (warning !== undefined) log.warn({ listener: formatListenAddress(address) }, warning);
      return warning ?? [];
    });
    const shortage = shortageOf(descriptors, wanted);
    if (shortage !== undefined) log.warn(shortage);
    const opened = await whileLocked(async () => {
      await refuseSecondDaemon(configuration.store);
      return openStore(configuration, { log, repeated, descriptors, signal: parts.leaving.signal });
    }, controlPath);
    parts.operations = opened;
    stopSignal?.throwIfAborted();
    opened.exports.writers.connected = new ServerConnections(nbd);
    const status = (): StatusAnswer => statusAnswer(configuration, { nbd, operations: opened, startedAt, listening });
    const control = controlServer(configuration, controlPath, {
      nbd,
      operations: opened,
      sessions,
      status,
      reload,
      log,
      descriptors,
    });
    parts.control = control;
    await control.listen();
    const doubt = doubtOf(control.path);
    if (doubt !== undefined) log.warn({ control: control.path }, doubt);
    const existing = (await opened.list()).find((vdi) => !vdi.isSnapshot);
    const example = configuration.create[0]?.name ?? (existing === undefined ? PLACEHOLDER : specOf(existing));
    // The last step that can fail: a failure after it would leave new VDIs behind.
    const kept = await createMissing(opened, configuration.create, { log, stop: stopSignal });
    const { defaultExport } = configuration;
    const lacking = defaultExport === undefined ? undefined : await whyNotOpen(opened.exports, defaultExport);
    if (lacking !== undefined) {
      const warning = `the default export cannot be opened, and clients that name none are refused until it can: ${lacking}`;
      log.warn({ export: defaultExport }, warning);
      warnings.push(warning);
    }
    stopSignal?.removeEventListener('abort', leave);
    const withDefault = new ExportsWithDefault(security.guard(opened.exports), defaultExport);
    exports.opened(new LoggedExports(new ExportsWithClientMessages(withDefault), log, repeated));
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
      stop: () => stopInOrder(parts),
    };
  } catch (error) {
    onFailure?.();
    exports.failed();
    parts.operations?.takeBackCreation();
    await stopInOrder(parts).catch((stopError: unknown) =>
      log.error({ err: stopError }, 'cleaning up after the failed start'),
    );
    throw error;
  }
}

/** Fails for VDIs of --create that could never be made. Errors: those of checkNewVdi. */
function checkNewVdis({ store, create }: DaemonConfiguration): void {
  // A cluster has its own object size, which is not known yet.
  const mostShift = kindOf(store).hasOwnObjectSize ? MAX_BLOCK_SIZE_SHIFT : undefined;
  for (const { name, size } of create) checkNewVdi(name, size, mostShift);
}

/** Listen on the addresses of the configuration, then on the sockets from systemd. Errors: those of listen() and adopt(). */
async function openListeners(
  configuration: DaemonConfiguration,
  nbd: NbdServer,
  log: Logger,
  isTlsRequired: boolean,
): Promise<ListenAddress[]> {
  const { listeners, inherited = [], socketMode = DEFAULT_SOCKET_MODE } = configuration;
  const mayBePlain = isTlsRequired || configuration.allowPlaintext === true;
  const listening: ListenAddress[] = [];
  for (const address of listeners) listening.push(await listen(nbd, address, socketMode));
  for (const socket of inherited) {
    const address = await adopt(nbd, socket, mayBePlain);
    log.info({ listener: formatListenAddress(address), name: socket.name }, 'took over a socket');
    listening.push(address);
  }
  return listening;
}

function openStore(
  configuration: DaemonConfiguration,
  given: {
    readonly log: Logger;
    readonly repeated: StoreAndPeerLines;
    readonly descriptors: DescriptorBudget;
    readonly signal: AbortSignal;
  },
): Promise<OpenedStore> {
  const { log, repeated, descriptors, signal } = given;
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
    note: (line, details) => log.info({ ...details }, line),
    signal,
  });
}

function controlServer(
  configuration: DaemonConfiguration,
  controlPath: string,
  given: {
    readonly nbd: NbdServer;
    readonly operations: OpenedStore;
    readonly sessions: NbdSessions;
    readonly status: () => StatusAnswer;
    readonly reload: () => Promise<ReloadReport>;
    readonly log: Logger;
    readonly descriptors: DescriptorBudget;
  },
): ControlServer {
  const { nbd, operations, sessions, status, reload, log, descriptors } = given;
  // No socket can be made on a read-only filesystem. A command that finds none there opens the store itself, beside the daemon,
  // for reading.
  const isFixed = operations.isReadOnly && directoryOf(configuration.store) !== undefined;
  const isElsewhere = isFixed && configuration.control === undefined;
  return new ControlServer(isElsewhere ? controlSocketElsewhere(operations.identity) : controlPath, {
    target: {
      operations,
      status,
      reload,
      disconnect: (id, keepOutMs) => disconnect(nbd, operations.exports.writers, id, keepOutMs),
      sessionEnd: (session) => sessions.over(session),
    },
    isFoundFromStore: !isFixed,
    maxConnections: descriptors.controlConnections,
    mode: configuration.controlMode,
    nextSession: () => sessions.next(),
    serveNbd: (socket, head, session) => sessions.serve(nbd, socket, head, session),
    onFault: (error, request) => log.error({ err: error, request }, 'control request failed'),
  });
}

function statusAnswer(
  { version }: DaemonConfiguration,
  given: {
    readonly nbd: NbdServer;
    readonly operations: OpenedStore;
    readonly startedAt: string;
    readonly listening: readonly ListenAddress[];
  },
): StatusAnswer {
  const { nbd, operations, startedAt, listening } = given;
  const { writers } = operations.exports;
  return {
    version,
    pid: process.pid,
    store: operations.store,
    identity: operations.identity,
    startedAt,
    listeners: listening.map(formatListenAddress),
    connections: Array.from(nbd.connections.values(), (connection) => statusOf(connection, writers)),
  };
}
