/**
 * The NBD server as the daemon runs it: with its log, the credentials of its peers, and the time-outs of their sockets. Owns which
 * event of the server becomes which line of the log. Decides nothing about exports or clients.
 */
import type { Logger } from 'pino';
import { DeviceError, ExportError, NbdServer, type ErrorContext, type ServerOptions } from 'nbd-server-ts';
import { peerCredentials } from '../system/socket-calls.js';
import type { NbdSessions } from './control/nbd-sessions.js';
import type { DeadPeerTimeouts } from './dead-peer-timeouts.js';
import { ConnectionLog, identityOf } from './log/connection-log.js';
import { causeOf, counted, times, type StoreAndPeerLines } from './log/repeated-lines.js';

export interface LoggedServerOptions extends Pick<ServerOptions, 'provider' | 'tls' | 'limits'> {
  readonly log: Logger;
  readonly repeated: StoreAndPeerLines;
  readonly deadPeers: DeadPeerTimeouts;
  readonly sessions: NbdSessions;
  /** Log every request. */
  readonly debug: boolean;
}

export function makeLoggedServer(options: LoggedServerOptions): NbdServer {
  const { log, repeated, deadPeers, sessions } = options;
  const connections = new ConnectionLog(log, repeated.ofPeers);
  return new NbdServer({
    provider: options.provider,
    tls: options.tls,
    limits: options.limits,
    peerCredentials,
    prepareSocket: (socket) => deadPeers.watch(socket),
    observer: {
      onConnectionOpen: (event) => connections.opened(event),
      onConnectionRefused: (event) => connections.refused(event),
      onConnectionClose: (event) => {
        connections.closed(event);
        if (event.peer.transport === 'internal') sessions.ended(event.peer.address);
      },
      onError: (error, context) => {
        if (isLoggedElsewhere(error, context)) return;
        const { id, exportName, peer } = context;
        const what = whatFailed(context);
        const details = { err: error, connection: id, export: exportName, ...(peer && identityOf(peer)) };
        repeated.ofStore.tell(`fault ${exportName}`, `${what}${causeOf(error)}`, (repetition) =>
          log.error({ ...details, ...counted(repetition) }, `${what}${textOf(error)}${times(repetition)}`),
        );
      },
      onListenerError: (error) =>
        repeated.ofStore.tell('listeners', causeOf(error), (repetition) =>
          log.error({ err: error }, `cannot accept a connection${times(repetition)}`),
        ),
      onRequest: options.debug ? (request) => log.debug(request, 'request') : undefined,
    },
  });
}

/** The devices log failed requests, and LoggedExports what the exports refuse, where they know the cause. */
function isLoggedElsewhere(error: unknown, { source, command }: ErrorContext): boolean {
  if (error instanceof DeviceError) return command !== undefined;
  return error instanceof ExportError && source === 'provider';
}

/** The beginning of a line about a failure; empty if the server itself tells it, in a whole sentence. */
function whatFailed({ exportName, source, command, method }: ErrorContext): string {
  if (source === 'server') return '';
  return `${exportName === undefined ? '' : `${exportName}: `}${command ?? method ?? source} failed: `;
}

function textOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
