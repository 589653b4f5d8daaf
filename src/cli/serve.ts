/** `sheepgate serve`: the daemon in the foreground, until SIGTERM or Ctrl-C. */
import { Command, InvalidArgumentError, Option } from 'commander';
import type { KeptVdi } from '../daemon/create-missing.js';
import type { Daemon } from '../daemon/daemon.js';
import type { ServeConfiguration } from '../daemon/daemon-process.js';
import { catchHangups } from '../daemon/hangups.js';
import { AddressError, formatListenAddress, parseListenAddress, type ListenAddress } from '../daemon/listen-address.js';
import { defaultListeners } from '../operations/default-paths.js';
import { parseExportName } from '../daemon/options.js';
import { CatalogError } from '../vdi/catalog-error.js';
import { chosenStore, sizeArgument, withCommonOptions, type CommonOptions } from './common-options.js';
import { endBy } from './ending.js';
import { missingOption, storeOptions } from './missing-option.js';
import { unfinishedJson } from './output.js';
import { printable, printableJson } from '../text/printable.js';
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
  const hangups = catchHangups();
  // Loaded late: --help needs none of it. Before anything can fail, so that whatever is wrong can be said.
  const { DaemonProcess } = await import('../daemon/daemon-process.js');
  const daemonProcess = new DaemonProcess(hangups);
  endBy(daemonProcess);
  const place = chosenStore(options);
  const configuration: ServeConfiguration = {
    ...peerConfiguration(options),
    store: place.store,
    mayCreateStore: options.createStore !== 'no',
    retryMs: options.clusterTimeout === undefined ? undefined : options.clusterTimeout * 1000,
    storeOptions: storeOptions(options),
    control: place.control,
    controlMode: options.controlMode,
    listeners: options.listen,
    defaultListeners: defaultListeners().map(parseListenAddress),
    socketMode: options.socketMode,
    defaultExport: options.default,
    create: options.create ?? [],
    debug: options.debug ?? false,
    version: version(),
  };
  await daemonProcess.run(configuration, options.json ? readyJson : readyText);
}

function readyJson(daemon: Daemon): string {
  const { store, control, uris, warnings } = daemon;
  const listeners = daemon.listeners.map(formatListenAddress);
  const kept = daemon.kept.map(keptJson);
  return `${printableJson(JSON.stringify({ event: 'ready', store, control, listeners, uris, warnings, kept }))}\n`;
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

/** A VDI of --create that exists and is not as --create says. */
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

/** Only modes 600 and 660: commands refuse a socket that every user can write to. */
function controlModeArgument(text: string): number {
  if (!/^0?6[06]0$/.test(text)) throw new InvalidArgumentError(`"${text}": give 600, or 660 for the daemon's group.`);
  return parseInt(text, 8);
}

function modeArgument(text: string): number {
  if (!/^0?[0-7]{3}$/.test(text)) throw new InvalidArgumentError(`"${text}" is no file mode; give 600, 660 or 666.`);
  return parseInt(text, 8);
}
