/**
 * The process of a daemon: its log on stderr, the signals that stop and reload it, its supervisor, and its end within a bound,
 * whatever hangs. Owns the order of events at the start and the end of the process; the daemon itself is in daemon.ts.
 */
import { pino, type Logger } from 'pino';
import { endBySignal } from '../system/end-by-signal.js';
import { exitNow } from '../system/exit-now.js';
import { readableStack } from '../system/readable-stack.js';
import { sendDatagram } from '../system/socket-calls.js';
import type { DaemonConfiguration } from './daemon-configuration.js';
import { startDaemon, type Daemon } from './daemon.js';
import type { Hangups } from './hangups.js';
import { isJournal, withPriorities } from './log/journal-priorities.js';
import { formatListenAddress, type ListenAddress } from './listen-address.js';
import { LogOutput } from './log/log-output.js';
import { openNotifier, takeInheritedSockets } from './systemd.js';

const STDOUT_FD = 1;
const STDERR_FD = 2;
/**
 * From the signal to stop, or from a failed start, to the end of the process, whatever hangs. Shorter than TimeoutStopSec in
 * examples/systemd. By then all acknowledged writes are in files, if not on the disk.
 */
const END_LIMIT_MS = 50_000;
/** For the last lines to be written, and then for Node to find that nothing is left to do. */
const LAST_WORDS_MS = 1_000;
const LEFTOVERS_MS = 2_000;

export interface ServeConfiguration extends Omit<DaemonConfiguration, 'listeners' | 'inherited'> {
  /** Undefined: the sockets of systemd, or without any `defaultListeners`. */
  readonly listeners: readonly ListenAddress[] | undefined;
  readonly defaultListeners: readonly ListenAddress[];
}

export class DaemonProcess {
  readonly #hangups: Hangups;
  readonly #inForm = isJournal(STDERR_FD) ? withPriorities : asIs;
  readonly #output = new LogOutput(STDERR_FD, (count, reason) => this.#inForm(droppedLine(count, reason)));
  readonly #screen = new LogOutput(STDOUT_FD, () => '');

  constructor(hangups: Hangups) {
    this.#hangups = hangups;
  }

  /** In place of process.stderr. */
  say(text: string): void {
    this.#output.write(this.#inForm(text));
  }

  /** The last lines are written, or given up; Node ends by itself, or is ended. */
  async finish(code: number): Promise<void> {
    const outputs = [this.#output, this.#screen];
    const isWritten = await Promise.all(outputs.map((output) => output.drain(LAST_WORDS_MS)));
    // A write that hangs in a thread would be waited for.
    if (isWritten.includes(false)) exitNow(code);
    setTimeout(() => exitNow(code), LEFTOVERS_MS).unref();
  }

  /**
   * Serve until the process is told to stop. `readyText`: what stdout says when it serves. Errors: those of startDaemon.
   */
  async run(
    { listeners: given, defaultListeners, ...rest }: ServeConfiguration,
    readyText: (daemon: Daemon) => string,
  ): Promise<void> {
    const lines = {
      write: (line: string) => this.#output.write(this.#inForm(line)),
      flushSync: () => this.#output.flushSync(),
    };
    const log = pino(
      { level: rest.debug ? 'debug' : 'info', base: undefined, timestamp: pino.stdTimeFunctions.isoTime },
      lines,
    );
    logFaults(log);
    const inherited = takeInheritedSockets();
    const listeners = given ?? (inherited.length > 0 ? [] : defaultListeners);
    const configuration: DaemonConfiguration = { ...rest, listeners, inherited };
    // From here on: a supervisor may ask to stop the moment it reads "ready", or sooner.
    const stopping = new AbortController();
    const notifier = openNotifier({ send: sendDatagram, onFailure: (message) => log.warn(message) });
    /** Ends the process after this time, even if something hangs. */
    const endInTime = (): void => {
      const giveUp = (): void => {
        log.error(`gave up: not everything has ended within ${END_LIMIT_MS / 1000} s`);
        void this.finish(1).finally(() => exitNow(1));
      };
      setTimeout(giveUp, END_LIMIT_MS).unref();
    };
    const toldToStop = firstSignal();
    void toldToStop.then((signal) => {
      log.info({ signal }, 'stopping');
      notifier.stopping();
      endInTime();
      this.#hangups.serve(() => undefined);
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
      // A stop was requested during the start, and the start has ended because of it.
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
    this.#screen.write(readyText(daemon));
    notifier.ready(status);
    tellReloaded = (failures) => {
      if (stopping.signal.aborted) return;
      notifier.ready(failures.length === 0 ? status : `${status}; not reloaded: ${failures.join('; ')}`);
    };
    this.#hangups.serve(() => {
      notifier.reloading();
      void daemon.reload();
    });

    await toldToStop;
    await daemon.stop();
    notifier.close();
    log.info('stopped');
  }
}

function asIs(text: string): string {
  return text;
}

/** In the log, in place of lines that were dropped; pino's level 40 is a warning. */
function droppedLine(count: number, reason: string): string {
  const time = new Date().toISOString();
  return `${JSON.stringify({ level: 40, time, dropped: count, reason, msg: 'lines of the log were dropped' })}\n`;
}

/** An internal error ends the process, with its cause in the log; warnings of Node go to the log, too. */
function logFaults(log: Logger): void {
  // Before the handler of all commands, which writes to stderr and can therefore wait for ever.
  process.prependListener('uncaughtException', (error) => {
    if (error instanceof Error) error.stack = readableStack(error);
    log.fatal({ err: error }, 'internal error, please report it');
    endBySignal('SIGABRT');
  });
  process.removeAllListeners('warning');
  process.on('warning', (warning) => log.warn({ err: warning }, 'a warning of Node'));
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
