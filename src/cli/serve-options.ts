/**
 * The options of `serve` about clients: TLS, access rules, exclusive writing, limits of connections. Owns their syntax and their
 * defaults for each other; the daemon reads the files that they name.
 */
import { InvalidArgumentError, Option, type Command } from 'commander';
import type { Limits } from 'nbd-server-ts';
import { MIN_MEMORY_BYTES } from 'nbd-server-ts/limits';
import type { DaemonConfiguration } from '../daemon/daemon-configuration.js';
import { DEFAULT_IN_USE_MS, DEFAULT_KEEP_MS, OTHERWISE, parseOtherwise, type Exclusive } from '../daemon/options.js';
import { sizeArgument } from './common-options.js';
import { formatSize } from '../text/size.js';

export interface PeerOptions {
  readonly tls?: 'off' | 'on' | 'require';
  readonly tlsCertificates?: string;
  readonly tlsVerifyPeer?: boolean;
  readonly tlsPsk?: string;
  readonly access?: string;
  /** True if no word follows. */
  readonly exclusive?: Exclusive | true;
  readonly allowPlaintext?: boolean;
  readonly maxConnections?: number;
  readonly maxConnectionsPerPeer?: number;
  readonly maxHandshakes?: number;
  readonly handshakeTimeout?: number;
  readonly idleTimeout?: number;
  readonly keepAlive?: number;
  readonly stallTimeout?: number;
  readonly maxMemory?: number;
  readonly keepNow?: number;
  readonly inUseTime?: number;
}

/** setTimeout takes no longer delay. */
const MAX_SECONDS = Math.floor((2 ** 31 - 1) / 1000);
/** tcp(7), TCP_KEEPIDLE: what the kernel takes. */
const MAX_KEEP_ALIVE_SECONDS = 32_767;
const MAX_CONNECTIONS = 1_000_000;

export function withPeerOptions(command: Command): Command {
  return command
    .addOption(
      new Option(
        '--tls <mode>',
        'off, on (clients may use TLS) or require (they must); default: off, or require if keys are given',
      ).choices(['off', 'on', 'require']),
    )
    .addOption(
      new Option(
        '--tls-certificates <dir>',
        'X.509: server-cert.pem, server-key.pem, and ca-cert.pem to verify clients with',
      ),
    )
    .addOption(new Option('--tls-verify-peer', 'require client certificates signed by ca-cert.pem'))
    .addOption(new Option('--tls-psk <file>', 'pre-shared keys, one USER:HEXKEY per line, as psktool writes them'))
    .addOption(
      new Option('--access <file>', 'who may open which export (docs/access.md); default: everybody may open all'),
    )
    .addOption(
      new Option(
        '--exclusive [otherwise]',
        'only one connection may write a disk. A second writer: read-only (default) makes it read-only, refuse refuses it, ' +
          'take-over lets it replace a writer that does not answer (docs/exclusive.md). Live migration needs this off',
      ).argParser(exclusiveArgument),
    )
    .addOption(new Option('--allow-plaintext', 'listen without TLS on addresses that other machines can reach'))
    .addOption(
      new Option(
        '--max-connections <n>',
        'maximum of open connections, lowered if the limit of open files is too low (default: 1024)',
      ).argParser(wholeNumber(1, MAX_CONNECTIONS)),
    )
    .addOption(
      new Option(
        '--max-connections-per-peer <n>',
        'maximum from one address (TCP) or one user (unix) (default: three quarters of --max-connections)',
      ).argParser(wholeNumber(1, MAX_CONNECTIONS)),
    )
    .addOption(
      new Option(
        '--max-handshakes <n>',
        'maximum of connections that have not chosen an export yet; one more closes the one silent for longest (default: 256)',
      ).argParser(wholeNumber(1, MAX_CONNECTIONS)),
    )
    .addOption(
      new Option('--handshake-timeout <seconds>', 'time for a client to choose its export (default: 30)').argParser(
        wholeNumber(1, MAX_SECONDS),
      ),
    )
    .addOption(
      new Option(
        '--idle-timeout <seconds>',
        'close connections without requests for this time; 0: never (default). Only for clients that reconnect by themselves: ' +
          'a guest or kernel that does not reconnect gets I/O errors at its next request',
      ).argParser(wholeNumber(0, MAX_SECONDS)),
    )
    .addOption(
      new Option(
        '--stall-timeout <seconds>',
        'close connections whose client reads no replies, or stops in the middle of a request, for this time; 0: never ' +
          '(default): a client that was stopped (SIGSTOP) is served again when it continues',
      ).argParser(wholeNumber(0, MAX_SECONDS)),
    )
    .addOption(
      new Option(
        '--max-memory <size>',
        'memory for the requests and replies of all clients; further requests wait (default: an eighth of the memory of the ' +
          'machine or cgroup, at most 1G)',
      ).argParser(memoryArgument),
    )
    .addOption(
      new Option(
        '--keep-alive <seconds>',
        'probe a TCP peer that is silent for this time; without an answer within ten more it is disconnected (default: 60). ' +
          'Does not detect a client that stops reading on a machine that answers: see --stall-timeout',
      ).argParser(wholeNumber(1, MAX_KEEP_ALIVE_SECONDS)),
    )
    .addOption(
      new Option(
        '--keep-now <seconds>',
        'how long the snapshot behind NAME@now is kept for a client that was cut off, so that it can continue reading; ' +
          `at least the client's reconnect delay (default: ${DEFAULT_KEEP_MS / 1000})`,
      ).argParser(wholeNumber(0, MAX_SECONDS)),
    )
    .addOption(
      new Option(
        '--in-use-time <seconds>',
        'how long a VDI counts as in use by a client that was cut off, and cannot be replaced or deleted without --force ' +
          `(default: ${DEFAULT_IN_USE_MS / 1000})`,
      ).argParser(wholeNumber(0, MAX_SECONDS)),
    );
}

/** The part of the daemon's configuration that these options make. */
export function peerConfiguration(
  options: PeerOptions,
): Pick<DaemonConfiguration, 'security' | 'exclusive' | 'allowPlaintext' | 'limits' | 'keepMs' | 'inUseMs'> {
  const hasKeys = options.tlsCertificates !== undefined || options.tlsPsk !== undefined;
  // Keys are given to be used: without --tls they make TLS mandatory.
  const mode = options.tls ?? (hasKeys || options.tlsVerifyPeer ? 'require' : undefined);
  const limits: Partial<Limits> = {
    maxConnections: options.maxConnections,
    maxConnectionsPerPeer: options.maxConnectionsPerPeer,
    maxHandshakes: options.maxHandshakes,
    handshakeTimeoutMs: seconds(options.handshakeTimeout),
    idleTimeoutMs: seconds(options.idleTimeout),
    keepAliveMs: seconds(options.keepAlive),
    stallTimeoutMs: seconds(options.stallTimeout),
    maxMemoryBytes: options.maxMemory,
  };
  return {
    security: {
      ...(mode !== undefined && {
        tls: {
          mode,
          certificates: options.tlsCertificates,
          verifyPeer: options.tlsVerifyPeer ?? false,
          psk: options.tlsPsk,
        },
      }),
      access: options.access,
    },
    exclusive: options.exclusive === true ? 'unsaid' : options.exclusive,
    allowPlaintext: options.allowPlaintext ?? false,
    limits,
    keepMs: seconds(options.keepNow),
    inUseMs: seconds(options.inUseTime),
  };
}

function memoryArgument(text: string): number {
  const bytes = sizeArgument(text);
  if (bytes < MIN_MEMORY_BYTES) throw new InvalidArgumentError(`It must be ${formatSize(MIN_MEMORY_BYTES)} at least.`);
  return bytes;
}

function exclusiveArgument(text: string): Exclusive {
  const otherwise = parseOtherwise(text);
  if (otherwise === undefined) throw new InvalidArgumentError(`Give ${OTHERWISE.join(', ')}, or nothing.`);
  return otherwise;
}

function seconds(value: number | undefined): number | undefined {
  return value === undefined ? undefined : value * 1000;
}

function wholeNumber(least: number, most: number): (text: string) => number {
  return (text) => {
    const value = /^\d{1,10}$/.test(text) ? Number(text) : NaN;
    if (!(value >= least && value <= most)) {
      throw new InvalidArgumentError(`"${text}" is no whole number from ${least} to ${most}.`);
    }
    return value;
  };
}
