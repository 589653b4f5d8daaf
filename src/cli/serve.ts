/** `sheepgate serve`: the daemon in the foreground, until SIGTERM or Ctrl-C. */
import { Command, InvalidArgumentError, Option } from 'commander';
import type { DaemonConfiguration, KeptVdi } from '../daemon/daemon.js';
import { AddressError, formatListenAddress, parseListenAddress, type ListenAddress } from '../daemon/listen-address.js';
import { defaultListeners } from '../daemon/places.js';
import { openNotifier, takeInheritedSockets } from '../daemon/systemd.js';
import { chosenStore, sizeArgument, withCommonOptions, type CommonOptions } from './common-options.js';
import { endBySignal } from './interrupt.js';
import { missingOption } from './missing.js';
import { printJson, printLine, unfinishedJson } from './output.js';
import { formatSizes } from './size.js';
import { peerConfiguration, withPeerOptions, type PeerOptions } from './serve-options.js';
import { version } from './version.js';

interface ServeOptions extends CommonOptions, PeerOptions {
  readonly listen?: readonly ListenAddress[];
  readonly create?: readonly NewVdi[];
  readonly createStore?: 'yes' | 'no';
  readonly socketMode?: number;
  readonly debug?: boolean;
  readonly clusterTimeout?: number;
  readonly missing?: 'zero';
}

interface NewVdi {
  readonly name: string;
  readonly size: number;
}

const MAX_CLUSTER_TIMEOUT_S = 86_400;

export function serveCommand(): Command {
  const command = new Command('serve')
    .description('serve the VDIs of a store to NBD clients, in the foreground')
    .addOption(
      new Option(
        '--listen <address>',
        `unix:PATH or tcp:HOST:PORT; may be repeated (default: ${defaultListeners().join(' ')})`,
      ).argParser(listenArgument),
    )
    .addOption(
      new Option('--create <name:size>', 'make this VDI if it does not exist; may be repeated').argParser(
        createArgument,
      ),
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
        '--cluster-timeout <seconds>',
        'how long requests wait for a cluster that cannot serve them, before clients see an error (default: 60)',
      ).argParser(secondsArgument),
    )
    .addOption(missingOption())
    .option('--debug', 'log every request')
    .addHelpText(
      'after',
      '\nThe log goes to stderr, one JSON object a line. SIGTERM and Ctrl-C finish the requests in flight and flush; a\n' +
        'second one ends at once; SIGHUP reads TLS keys and the access file again. Started by a systemd socket unit, it\n' +
        'serves the sockets of that unit instead of the default addresses.\n\nExamples:\n  sheepgate serve --create vm1:20G\n' +
        '  sheepgate serve --listen unix:/run/vm.sock --listen tcp:127.0.0.1:10809\n' +
        '  sheepgate serve --cluster node1,node2,node3',
    );
  return withCommonOptions(withPeerOptions(command)).action(serve);
}

async function serve(options: ServeOptions): Promise<void> {
  const place = chosenStore(options);
  const reloads = hangups();
  // Loaded late, as the daemon is: usage errors and --help need none of it.
  const { pino } = await import('pino');
  const log = pino(
    { level: options.debug ? 'debug' : 'info', base: undefined, timestamp: pino.stdTimeFunctions.isoTime },
    pino.destination({ dest: 2, sync: true }),
  );
  const inherited = takeInheritedSockets();
  const listeners = options.listen ?? (inherited.length > 0 ? [] : defaultListeners().map(parseListenAddress));
  const configuration: DaemonConfiguration = {
    ...peerConfiguration(options),
    store: place.store,
    mayCreateStore: options.createStore !== 'no',
    retryMs: options.clusterTimeout === undefined ? undefined : options.clusterTimeout * 1000,
    missingIsZero: options.missing === 'zero',
    control: place.control,
    listeners,
    inherited,
    socketMode: options.socketMode,
    create: options.create ?? [],
    debug: options.debug ?? false,
    version: version(),
  };
  // From here on: a supervisor may ask to stop the moment it reads "ready", or sooner.
  const toldToStop = firstSignal();
  const { startDaemon } = await import('../daemon/daemon.js');
  const { sendDatagram } = await import('../daemon/socket-calls.js');
  const notifier = openNotifier({ send: sendDatagram, onFailure: (message) => log.warn(message) });
  const daemon = await startDaemon(configuration, log);
  const addresses = daemon.listeners.map(formatListenAddress);
  const status = `serving ${daemon.store} at ${addresses.join(' ')}`;
  const { limit: openFiles, connections: maxConnections, objectFiles } = daemon.descriptors;
  log.info(
    {
      ...{ store: daemon.store, listeners: addresses, control: daemon.control, pid: process.pid },
      ...{ openFiles, maxConnections, objectFiles },
    },
    'ready',
  );
  // A daemon goes on when nobody reads what it said at its start.
  process.stdout.on('error', (error) => log.warn({ err: error }, 'cannot write to stdout'));
  if (options.json) {
    const { store, control, uris } = daemon;
    printJson({ event: 'ready', store, control, listeners: addresses, uris, kept: daemon.kept.map(keptJson) });
  } else {
    printLine(`serving ${daemon.store}`);
    for (const uri of daemon.uris) printLine(`  ${uri}`);
    for (const kept of daemon.kept) printLine(`note: ${keptText(kept)}`);
    printLine("'sheepgate vdi list' shows the VDIs, Ctrl-C stops");
  }

  notifier.ready(status);
  reloads.serve(() => {
    notifier.reloading();
    daemon.reload();
    notifier.ready(status);
  });

  const signal = await toldToStop;
  reloads.serve(() => undefined);
  log.info({ signal }, 'stopping');
  notifier.stopping();
  await daemon.stop();
  notifier.close();
  log.info('stopped');
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

function secondsArgument(text: string): number {
  const seconds = Number(text);
  if (!/^\d+$/.test(text) || seconds < 1 || seconds > MAX_CLUSTER_TIMEOUT_S) {
    throw new InvalidArgumentError(`It must be 1 to ${MAX_CLUSTER_TIMEOUT_S}.`);
  }
  return seconds;
}

function modeArgument(text: string): number {
  if (!/^0?[0-7]{3}$/.test(text)) throw new InvalidArgumentError(`"${text}" is no file mode; give 600, 660 or 666.`);
  return parseInt(text, 8);
}
