/** `sheepgate serve`: the daemon in the foreground, until SIGTERM or Ctrl-C. */
import { Command, InvalidArgumentError, Option } from 'commander';
import type { Logger } from 'pino';
import type { KeptVdi } from '../daemon/create-missing.js';
import type { Daemon } from '../daemon/daemon.js';
import type { DaemonConfiguration } from '../daemon/daemon-configuration.js';
import { isJournal, withPriorities } from '../daemon/log/journal-priorities.js';
import { AddressError, formatListenAddress, parseListenAddress, type ListenAddress } from '../daemon/listen-address.js';
import type { LogOutput } from '../daemon/log/log-output.js';
import { defaultListeners } from '../operations/default-paths.js';
import { openNotifier, takeInheritedSockets } from '../daemon/systemd.js';
import { parseExportName } from '../export/export-name.js';
import { CatalogError } from '../vdi/catalog-error.js';
import { chosenStore, sizeArgument, withCommonOptions, type CommonOptions } from './common-options.js';
import { endBy } from './ending.js';
import { endBySignal } from './interrupt.js';
import { missingOption, storeOptions } from './missing-option.js';
import { unfinishedJson } from './output.js';
import { printable, printableJson } from '../text/printable.js';
import { readableStack } from './readable-stack.js';
import { formatSizes } from '../text/size.js';
import { peerConfiguration, withPeerOptions, type PeerOptions } from './serve-options.js';
import { version } from './version.js';

interface ServeOptions extends CommonOptions, PeerOptions {
  readonly listen?: readonly ListenAddress[];
  readonly create?: readonly NewVdi[];
  readonly createStore?: 'yes' | 'no';
  readonly default?: string;
  readonly socketMode?: number;
  readonly controlMode?: number;
  readonly debug?: boolean;
  readonly clusterTimeout?: number;
  readonly missing?: 'zero';
}

interface NewVdi {
  readonly name: string;
  readonly size: number;
}

const MAX_CLUSTER_TIMEOUT_S = 86_400;
const STDOUT_FD = 1;
const STDERR_FD = 2;
/**
 * From the signal, or from what a start failed of, to the end of the process, whatever hangs. Shorter than TimeoutStopSec in
 * examples/systemd. What clients were answered is in files by then, if not on the disk.
 */
const END_LIMIT_MS = 50_000;
/** For the last lines to be written, and then for Node to find that nothing is left to do. */
const LAST_WORDS_MS = 1_000;
const LEFTOVERS_MS = 2_000;

export function serveCommand(): Command {
  const command = new Command('serve')
    .description('serve the VDIs of a store to NBD clients, in the foreground')
    .addOption(
      new Option(
        '--listen <address>',
        `unix:PATH or tcp:HOST:PORT; may be repeated (default: ${defaultListeners().join(' ')}, and no TCP)`,
      ).argParser(listenArgument),
    )
    .addOption(
      new Option('--create <name:size>', 'make this VDI if it does not exist; may be repeated').argParser(
        createArgument,
      ),
    )
    .addOption(
      new Option(
        '--default <name>',
        'what clients get that name no export: VDI, VDI@TAG, or any other (docs/exports.md); default: they are refused',
      ).argParser(exportArgument),
    )
    .addOption(
      new Option(
        '--create-store <yes|no>',
        'whether to make a store where there is none (default: yes); no: a directory that is not mounted is an error',
      ).choices(['yes', 'no']),
    )
    .addOption(
      new Option('--socket-mode <octal>', 'permissions of the unix sockets for NBD (default: 600)').argParser(
        modeArgument,
      ),
    )
    .addOption(
      new Option(
        '--control-mode <octal>',
        'permissions of the control socket: 600 (default), or 660 so that the group of the daemon may do everything, too',
      ).argParser(controlModeArgument),
    )
    .addOption(
      new Option(
        '--cluster-timeout <seconds>',
        'how long requests wait for a cluster that cannot serve them, before clients see an error (default: 60)',
      ).argParser(secondsArgument),
    )
    .addOption(missingOption())
    .option('--debug', 'log every request')
    .addHelpText(
      'after',
      '\nThe log goes to stderr, one JSON object a line. SIGTERM and Ctrl-C finish the requests in flight and flush; a\n' +
        'second one ends at once; SIGHUP reads TLS keys and the access file again;\n' +
        '"sheepgate reload" does, too, and says what came of it. The log never holds the daemon up: lines that nobody takes are\n' +
        'dropped and counted. Started by a systemd socket unit, it serves the sockets of that unit instead of the default\n' +
        'addresses.\n\nExamples:\n  sheepgate serve --create vm1:20G\n' +
        '  sheepgate serve --listen unix:/run/vm.sock --listen tcp:0.0.0.0:10809 --tls-psk keys.psk\n' +
        '  sheepgate serve --cluster node1,node2,node3',
    );
  return withCommonOptions(withPeerOptions(command)).action(serve);
}

async function serve(options: ServeOptions): Promise<void> {
  const reloads = hangups();
  // Loaded late, as the daemon is: --help needs none of it. First of all, for whatever is wrong must have a way to say so.
  const { LogOutput: Output } = await import('../daemon/log/log-output.js');
  const inForm = isJournal(STDERR_FD) ? withPriorities : asIs;
  const output = new Output(STDERR_FD, (count, reason) => inForm(droppedLine(count, reason)));
  const lines = { write: (line: string) => output.write(inForm(line)), flushSync: () => output.flushSync() };
  const screen = new Output(STDOUT_FD, () => '');
  const { exitNow } = await import('../system/exit-now.js');
  endBy({ say: (text) => output.write(inForm(text)), finish: (code) => finish([output, screen], code, exitNow) });
  const place = chosenStore(options);
  const { pino } = await import('pino');
  const log = pino(
    { level: options.debug ? 'debug' : 'info', base: undefined, timestamp: pino.stdTimeFunctions.isoTime },
    lines,
  );
  tellFaults(log);
  const inherited = takeInheritedSockets();
  const listeners = options.listen ?? (inherited.length > 0 ? [] : defaultListeners().map(parseListenAddress));
  const configuration: DaemonConfiguration = {
    ...peerConfiguration(options),
    store: place.store,
    mayCreateStore: options.createStore !== 'no',
    retryMs: options.clusterTimeout === undefined ? undefined : options.clusterTimeout * 1000,
    storeOptions: storeOptions(options),
    control: place.control,
    controlMode: options.controlMode,
    listeners,
    inherited,
    socketMode: options.socketMode,
    defaultExport: options.default,
    create: options.create ?? [],
    debug: options.debug ?? false,
    version: version(),
  };
  // From here on: a supervisor may ask to stop the moment it reads "ready", or sooner.
  const stopping = new AbortController();
  const { startDaemon } = await import('../daemon/daemon.js');
  const { sendDatagram } = await import('../system/socket-calls.js');
  const notifier = openNotifier({ send: sendDatagram, onFailure: (message) => log.warn(message) });
  /** Nothing that hangs keeps the process for longer. */
  const endInTime = (): void => {
    const giveUp = (): void => {
      log.error(`gave up: something does not end within ${END_LIMIT_MS / 1000} s`);
      void finish([output, screen], 1, exitNow).finally(() => exitNow(1));
    };
    setTimeout(giveUp, END_LIMIT_MS).unref();
  };
  const toldToStop = firstSignal();
  void toldToStop.then((signal) => {
    log.info({ signal }, 'stopping');
    notifier.stopping();
    endInTime();
    reloads.serve(() => undefined);
    stopping.abort();
  });
  let tellReloaded: (failures: readonly string[]) => void = () => undefined;
  let daemon: Daemon;
  try {
    daemon = await startDaemon(configuration, log, {
      stop: stopping.signal,
      onFailure: endInTime,
      onReloaded: ({ failures }) => tellReloaded(failures),
    });
  } catch (error) {
    // Told to stop while it started: that is what it has done.
    if (!stopping.signal.aborted) throw error;
    log.info('stopped before it was ready');
    return;
  }
  if (stopping.signal.aborted) {
    await daemon.stop();
    log.info('stopped before it was ready');
    return;
  }
  const addresses = daemon.listeners.map(formatListenAddress);
  const status = `serving ${daemon.store} at ${addresses.join(' ')}`;
  const { limit: openFiles, connections: maxConnections, objectFiles } = daemon.descriptors;
  log.info(
    {
      ...{ store: daemon.store, listeners: addresses, control: daemon.control, pid: process.pid },
      ...{ openFiles, maxConnections, objectFiles, maxMemoryBytes: daemon.maxMemoryBytes },
    },
    'ready',
  );
  screen.write(options.json ? readyJson(daemon, addresses) : readyText(daemon));

  notifier.ready(status);
  tellReloaded = (failures) => {
    if (stopping.signal.aborted) return;
    notifier.ready(failures.length === 0 ? status : `${status}; not reloaded: ${failures.join('; ')}`);
  };
  reloads.serve(() => {
    notifier.reloading();
    void daemon.reload();
  });

  await toldToStop;
  await daemon.stop();
  notifier.close();
  log.info('stopped');
}

function readyJson({ store, control, uris, warnings, kept }: Daemon, listeners: readonly string[]): string {
  const ready = { event: 'ready', store, control, listeners, uris, warnings, kept: kept.map(keptJson) };
  return `${printableJson(JSON.stringify(ready))}\n`;
}

function readyText(daemon: Daemon): string {
  const lines = [
    `serving ${daemon.store}`,
    ...daemon.uris.map((uri) => `  ${uri}`),
    ...daemon.warnings.map((warning) => `note: ${warning}`),
    ...daemon.kept.map((kept) => `note: ${keptText(kept)}`),
    "'sheepgate vdi list' shows the VDIs, Ctrl-C stops",
  ];
  return lines.map((line) => `${printable(line)}\n`).join('');
}

function asIs(text: string): string {
  return text;
}

/** In the log, in place of lines that were dropped; pino's level 40 is a warning. */
function droppedLine(count: number, reason: string): string {
  const time = new Date().toISOString();
  return `${JSON.stringify({ level: 40, time, dropped: count, reason, msg: 'lines of the log were dropped' })}\n`;
}

/** A fault of ours ends the process with its cause in the log; what Node has to say goes there, too. */
function tellFaults(log: Logger): void {
  // Before the handler that all commands have: that one writes to stderr, which can wait for ever.
  process.prependListener('uncaughtException', (error) => {
    if (error instanceof Error) error.stack = readableStack(error);
    log.fatal({ err: error }, 'internal error, please report it');
    endBySignal('SIGABRT');
  });
  process.removeAllListeners('warning');
  process.on('warning', (warning) => log.warn({ err: warning }, 'a warning of Node'));
}

/** The last lines are written, or given up; Node ends by itself, or is ended. */
async function finish(outputs: readonly LogOutput[], code: number, exitNow: (code: number) => never): Promise<void> {
  const isWritten = await Promise.all(outputs.map((output) => output.drain(LAST_WORDS_MS)));
  // A write that hangs in a thread would be waited for.
  if (isWritten.includes(false)) exitNow(code);
  setTimeout(() => exitNow(code), LEFTOVERS_MS).unref();
}

/** What --create has found in place of what it was to make. */
function keptJson({ unfinished, ...kept }: KeptVdi): object {
  return { ...kept, unfinished: unfinishedJson(unfinished) };
}

/** The same for people. */
function keptText({ name, size, wantedSize, unfinished }: KeptVdi): string {
  if (unfinished)
    return `${name} exists and is unfinished, so nobody can open it; 'sheepgate vdi show ${name}' says why`;
  const [is, wanted] = formatSizes(size, wantedSize);
  return `${name} exists and has ${is}, not ${wanted}; it was left as it is ('sheepgate vdi resize' changes it)`;
}

/** SIGHUP from the first moment on, so that one that comes while we start is served late instead of ending us. */
function hangups(): { serve(reload: () => void): void } {
  let isWaiting = false;
  let reload: (() => void) | undefined;
  process.on('SIGHUP', () => {
    if (reload === undefined) isWaiting = true;
    else reload();
  });
  return {
    serve(action) {
      reload = action;
      if (isWaiting) action();
      isWaiting = false;
    },
  };
}

/** The signal that asks to stop; from then on the next one ends the process at once. */
function firstSignal(): Promise<NodeJS.Signals> {
  return new Promise((resolve) => {
    let isStopping = false;
    const onSignal = (signal: NodeJS.Signals): void => {
      if (isStopping) return endBySignal(signal);
      isStopping = true;
      resolve(signal);
    };
    process.on('SIGTERM', onSignal);
    process.on('SIGINT', onSignal);
  });
}

function listenArgument(text: string, before: readonly ListenAddress[] = []): ListenAddress[] {
  try {
    return [...before, parseListenAddress(text)];
  } catch (error) {
    if (!(error instanceof AddressError)) throw error;
    throw new InvalidArgumentError(error.message);
  }
}

function createArgument(text: string, before: readonly NewVdi[] = []): NewVdi[] {
  const colon = text.lastIndexOf(':');
  if (colon <= 0) throw new InvalidArgumentError(`"${text}": give NAME:SIZE, for example vm1:20G.`);
  return [...before, { name: text.slice(0, colon), size: sizeArgument(text.slice(colon + 1)) }];
}

function exportArgument(text: string): string {
  try {
    parseExportName(text);
    return text;
  } catch (error) {
    if (!(error instanceof CatalogError)) throw error;
    throw new InvalidArgumentError(`${error.message}.`);
  }
}

function secondsArgument(text: string): number {
  const seconds = Number(text);
  if (!/^\d+$/.test(text) || seconds < 1 || seconds > MAX_CLUSTER_TIMEOUT_S) {
    throw new InvalidArgumentError(`It must be 1 to ${MAX_CLUSTER_TIMEOUT_S}.`);
  }
  return seconds;
}

/** Others than a group are not let in: commands send nothing to a socket that every user can write to. */
function controlModeArgument(text: string): number {
  if (!/^0?6[06]0$/.test(text)) throw new InvalidArgumentError(`"${text}": give 600, or 660 for the daemon's group.`);
  return parseInt(text, 8);
}

function modeArgument(text: string): number {
  if (!/^0?[0-7]{3}$/.test(text)) throw new InvalidArgumentError(`"${text}" is no file mode; give 600, 660 or 666.`);
  return parseInt(text, 8);
}
