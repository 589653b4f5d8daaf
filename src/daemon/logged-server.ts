/**
 * The NBD server as the daemon runs it: with its log, the credentials of its peers, and the time-outs of their sockets. Owns which
 * event of the server becomes which line of the log. Decides nothing about exports or clients.
 */
import type { Logger } from 'pino';
import { DeviceError, ExportError, NbdServer, type ServerOptions } from 'nbd-server-ts';
import { peerCredentials } from '../system/socket-calls.js';
import type { NbdSessions } from './control/nbd-sessions.js';
import type { DeadPeerTimeouts } from './dead-peer-timeouts.js';
import { ConnectionLog } from './log/connection-log.js';
import { causeOf, times, type StoreAndPeerLines } from './log/repeated-lines.js';

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
      onError: (error, { id, exportName }) => {
        // The devices and exports log these where they know the cause.
        if (error instanceof DeviceError || error instanceof ExportError) return;
        repeated.ofStore.tell(`fault ${exportName}`, causeOf(error), (repetition) =>
          log.error({ err: error, id, exportName }, `request failed${times(repetition)}`),
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
