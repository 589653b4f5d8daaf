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
      new Option('--create <name:size>', 'create this VDI if it does not exist; may be repeated').argParser(
        createArgument,
      ),
    )
    .addOption(
      new Option(
        '--default <name>',
        'export for clients that name none: VDI, VDI@TAG, or another form (docs/exports.md); default: refuse them',
      ).argParser(exportArgument),
    )
    .addOption(
      new Option(
        '--create-store <yes|no>',
        'whether to create a missing store (default: yes). no: a directory without a store, such as an unmounted one, is an error',
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
        'permissions of the control socket: 600 (default), or 660 to give the group of the daemon full control',
      ).argParser(controlModeArgument),
    )
    .addOption(
      new Option(
        '--cluster-timeout <seconds>',
        'how long requests wait for a cluster that cannot serve them before they fail (default: 60)',
      ).argParser(secondsArgument),
    )
    .addOption(missingOption())
    .option('--debug', 'log every request')
    .addHelpText(
      'after',
      '\nSIGTERM or Ctrl-C finishes the requests in flight, flushes, and ends the daemon; a second signal ends it at once.\n' +
        'SIGHUP reads the TLS keys and the access file again. "sheepgate reload" does the same and reports the result.\n' +
        'The log goes to stderr, one JSON object per line. A log that is not read does not block the daemon: it drops lines\n' +
        'and counts them. Under a systemd socket unit, the daemon serves the sockets of that unit, not the default addresses.\n' +
        '\nExamples:\n  sheepgate serve --create vm1:20G\n' +
        '  sheepgate serve --listen unix:/run/vm.sock --listen tcp:0.0.0.0:10809 --tls-psk keys.psk\n' +
        '  sheepgate serve --cluster node1,node2,node3',
    );
  return withCommonOptions(withPeerOptions(command)).action(serve);
}

async function serve(options: ServeOptions): Promise<void> {
  const hangups = catchHangups();
  // Loaded late: --help does not need it. Loaded before anything can fail, so that every failure can be logged.
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

/** A VDI of --create that exists already, with another size or unfinished. */
function keptJson({ unfinished, ...kept }: KeptVdi): object {
  return { ...kept, unfinished: unfinishedJson(unfinished) };
}

/** The same for people. */
function keptText({ name, size, wantedSize, unfinished }: KeptVdi): string {
  if (unfinished)
    return `${name} exists but is unfinished, so it cannot be opened; 'sheepgate vdi show ${name}' shows why`;
  const [is, wanted] = formatSizes(size, wantedSize);
  return `${name} exists and has ${is}, not ${wanted}; its size was not changed ('sheepgate vdi resize' changes it)`;
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
