/** `sheepgate serve`: the daemon in the foreground, until SIGTERM or Ctrl-C. */
import { Command, InvalidArgumentError, Option } from 'commander';
import { pino } from 'pino';
import type { DaemonConfiguration } from '../daemon/daemon.js';
import { AddressError, formatListenAddress, parseListenAddress, type ListenAddress } from '../daemon/listen-address.js';
import { defaultListeners } from '../daemon/places.js';
import { chosenStore, sizeArgument, withCommonOptions, type CommonOptions } from './common-options.js';
import { printJson, printLine } from './output.js';
import { version } from './version.js';

interface ServeOptions extends CommonOptions {
  readonly listen?: readonly ListenAddress[];
  readonly create?: readonly NewVdi[];
  readonly socketMode?: number;
  readonly debug?: boolean;
  readonly clusterTimeout?: number;
}

interface NewVdi {
  readonly name: string;
  readonly size: number;
}

/** The exit code of a process that SIGTERM ended, as shells report it. */
const EXIT_TERMINATED = 128 + 15;
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
    .option('--debug', 'log every request')
    .addHelpText(
      'after',
      '\nThe log goes to stderr, one JSON object a line. SIGTERM and Ctrl-C finish the requests in flight and flush; a\n' +
        'second one ends at once.\n\nExamples:\n  sheepgate serve --create vm1:20G\n' +
        '  sheepgate serve --listen unix:/run/vm.sock --listen tcp:127.0.0.1:10809\n' +
        '  sheepgate serve --cluster node1,node2,node3',
    );
  return withCommonOptions(command).action(serve);
}

async function serve(options: ServeOptions): Promise<void> {
  const place = chosenStore(options);
  const log = pino(
    { level: options.debug ? 'debug' : 'info', base: undefined, timestamp: pino.stdTimeFunctions.isoTime },
    pino.destination({ dest: 2, sync: true }),
  );
  const configuration: DaemonConfiguration = {
    store: place.store,
    retryMs: options.clusterTimeout === undefined ? undefined : options.clusterTimeout * 1000,
    control: place.control,
    listeners: options.listen ?? defaultListeners().map(parseListenAddress),
    socketMode: options.socketMode,
    create: options.create ?? [],
    debug: options.debug ?? false,
    version: version(),
  };
  const { startDaemon } = await import('../daemon/daemon.js');
  const daemon = await startDaemon(configuration, log);
  const listeners = daemon.listeners.map(formatListenAddress);
  log.info({ store: daemon.store, listeners, control: daemon.control, pid: process.pid }, 'ready');
  if (options.json) {
    const { store, control, uris } = daemon;
    printJson({ event: 'ready', store, control, listeners, uris });
  } else {
    printLine(`serving ${daemon.store}`);
    for (const uri of daemon.uris) printLine(`  ${uri}`);
    printLine("'sheepgate vdi list' shows the VDIs, Ctrl-C stops");
  }

  const signal = await firstSignal();
  log.info({ signal }, 'stopping');
  await daemon.stop();
  log.info('stopped');
}

/** The signal that asks to stop; from then on the next one ends the process at once. */
function firstSignal(): Promise<NodeJS.Signals> {
  return new Promise((resolve) => {
    let isStopping = false;
    const onSignal = (signal: NodeJS.Signals): void => {
      if (isStopping) process.exit(EXIT_TERMINATED);
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
