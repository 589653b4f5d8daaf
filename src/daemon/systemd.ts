/**
 * The daemon as a systemd service: listening sockets from systemd (sd_listen_fds(3)), and notifications to it (sd_notify(3),
 * sd_watchdog_enabled(3)). Owns the environment variables for both. Does nothing where they are not set.
 */
import { OperationError } from '../operations/operations.js';

type Environment = Record<string, string | undefined>;

/** SD_LISTEN_FDS_START */
const FIRST_FD = 3;
const MAX_FDS = 1024;

export interface InheritedSocket {
  readonly fd: number;
  /** FileDescriptorName= of the socket unit. */
  readonly name: string;
}

/**
 * The sockets of socket activation; none without it. Removes the variables from `env`, so that child processes do not get them.
 * Errors: ACTIVATION.
 */
export function takeInheritedSockets(env: Environment = process.env, pid = process.pid): InheritedSocket[] {
  const { LISTEN_PID, LISTEN_FDS, LISTEN_FDNAMES } = env;
  delete env.LISTEN_PID;
  delete env.LISTEN_FDS;
  delete env.LISTEN_FDNAMES;
  // Left over from another process, which did not clean its environment.
  if (LISTEN_PID === undefined || LISTEN_FDS === undefined || LISTEN_PID !== String(pid)) return [];
  const count = /^\d{1,5}$/.test(LISTEN_FDS) ? Number(LISTEN_FDS) : NaN;
  if (!(count <= MAX_FDS)) {
    throw new OperationError('ACTIVATION', `LISTEN_FDS is "${LISTEN_FDS}", not a number up to ${MAX_FDS}`);
  }
  const names = LISTEN_FDNAMES?.split(':') ?? [];
  return Array.from({ length: count }, (_, i) => ({ fd: FIRST_FD + i, name: names[i] || 'unknown' }));
}

/** Notifies the service manager. All methods do nothing if there is none. */
export interface Notifier {
  /** The daemon serves: after its start, and after a reload. */
  ready(status: string): void;
  reloading(): void;
  stopping(): void;
  /** Stop the watchdog's keep-alive messages. */
  close(): void;
}

const SILENT: Notifier = {
  ready: () => undefined,
  reloading: () => undefined,
  stopping: () => undefined,
  close: () => undefined,
};

export interface NotifierOptions {
  readonly env?: Environment;
  readonly pid?: number;
  /** Sends a datagram to the address in NOTIFY_SOCKET; returns whether it was accepted. */
  readonly send: (address: string, text: string) => boolean;
  /** Called once, when a message could not be sent. */
  readonly onFailure: (message: string) => void;
}

/**
 * The notifier for NOTIFY_SOCKET. If systemd's watchdog is on, it starts sending keep-alive messages at once. They come from the
 * event loop: if that hangs, they stop, and systemd restarts the daemon.
 */
export function openNotifier(options: NotifierOptions): Notifier {
  const { env = process.env, pid = process.pid, send } = options;
  const { NOTIFY_SOCKET: address, WATCHDOG_USEC, WATCHDOG_PID } = env;
  delete env.NOTIFY_SOCKET;
  delete env.WATCHDOG_USEC;
  delete env.WATCHDOG_PID;
  if (address === undefined || address === '') return SILENT;
  let hasFailed = false;
  const say = (...lines: string[]): void => {
    if (send(address, lines.join('\n')) || hasFailed) return;
    hasFailed = true;
    options.onFailure(`the service manager does not take messages at NOTIFY_SOCKET=${address}`);
  };
  if (!/^[/@]/.test(address)) {
    options.onFailure(
      `NOTIFY_SOCKET=${address} is neither a path nor an abstract unix socket; no notifications are sent`,
    );
    return SILENT;
  }

  let watchdog: NodeJS.Timeout | undefined;
  const timeoutUs = Number(WATCHDOG_USEC ?? 0);
  if (timeoutUs > 0 && (WATCHDOG_PID === undefined || WATCHDOG_PID === String(pid))) {
    const beat = (): void => say('WATCHDOG=1');
    beat();
    // "it is recommended … every half of the time returned here"
    watchdog = setInterval(beat, Math.max(1, timeoutUs / 2000));
    watchdog.unref();
  }
  return {
    ready: (status) => say('READY=1', `STATUS=${oneLine(status)}`),
    // systemd 253 and later pairs it with the READY=1 after it by this clock; older ones ignore the second line.
    reloading: () => say('RELOADING=1', `MONOTONIC_USEC=${process.hrtime.bigint() / 1000n}`),
    stopping: () => say('STOPPING=1', 'STATUS=finishing requests in flight'),
    close: () => clearInterval(watchdog),
  };
}

function oneLine(text: string): string {
  return text.replaceAll('\n', ' ');
}
