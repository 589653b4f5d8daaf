/**
 * The NBD server's connections as the exports see them: whether a client is ending, whether it is still there, and cutting it off.
 * Owns how long the client's machine may take to answer. Decides nothing.
 */
import net from 'node:net';
import type { Duplex } from 'node:stream';
import type { ConnectionInfo, NbdServer, Peer } from 'nbd-server-ts';
import type { Connected } from '../export/writers.js';
import { isRunning, processKey } from '../system/process-identity.js';
import { GONE_AFTER_PROBES } from './dead-peer-timeouts.js';
import { askOften, hasPeerEnded, msSinceHeard, sendState } from '../system/socket-calls.js';

/**
 * How long the kernel of a TCP client may take to answer a keepalive probe; one is sent per second, so there are four. A client that
 * is wrongly taken for gone loses its connection and cannot write any more; no data is lost.
 */
const PROBE_MS = 5_000;
const PROBE_SECONDS = 1;
const POLL_MS = 100;

export class ServerConnections implements Connected {
  readonly #server: Pick<NbdServer, 'connections' | 'disconnect' | 'transportOf'>;
  /** Connections found before: for a disk with a thousand writers, all of them are looked up at once. */
  readonly #known = new WeakMap<Peer, ConnectionInfo>();
  /** Probes under way: a second caller waits for the same answer. */
  readonly #asked = new Map<net.Socket, Promise<boolean>>();

  constructor(server: Pick<NbdServer, 'connections' | 'disconnect' | 'transportOf'>) {
    this.#server = server;
  }

  isEnding(peer: Peer): boolean {
    const found = this.#find(peer);
    // Not a connection of the server: a command in this process.
    if (found === undefined) return false;
    if (found.phase === 'closing') return true;
    const socket = socketOf(this.#server.transportOf(found.id));
    // Node reports the end only after all data before it has been read.
    return socket !== undefined && hasPeerEnded(socket);
  }

  async isThere(peer: Peer): Promise<boolean> {
    const found = this.#find(peer);
    const socket = found && socketOf(this.#server.transportOf(found.id));
    if (socket === undefined) return true;
    if (hasPeerEnded(socket)) return false;
    if (peer.transport === 'tcp') return this.#ask(socket);
    const { pid = 0, startTime } = peer.credentials ?? {};
    // The process may have ended while a child or another process still has its socket: then the socket has no end.
    return pid <= 0 || startTime === undefined || isRunning(processKey(pid, startTime));
  }

  async cutOff(peer: Peer, reason: string): Promise<void> {
    const found = this.#find(peer);
    if (found !== undefined) await this.#server.disconnect(found.id, reason);
  }

  hasEnded(peer: Peer): boolean {
    return this.#find(peer)?.hasEnded ?? false;
  }

  /** One at a time per socket: each restores the keepalive times that it found. */
  #ask(socket: net.Socket): Promise<boolean> {
    let asked = this.#asked.get(socket);
    if (asked === undefined) {
      asked = answersWithin(socket, PROBE_MS).finally(() => this.#asked.delete(socket));
      this.#asked.set(socket, asked);
    }
    return asked;
  }

  #find(peer: Peer): ConnectionInfo | undefined {
    const { connections } = this.#server;
    const known = this.#known.get(peer);
    if (known !== undefined) return connections.get(known.id);
    for (const connection of connections.values()) {
      if (connection.peer !== peer) continue;
      this.#known.set(peer, connection);
      return connection;
    }
    return undefined;
  }
}

/** Whether anything, at least an acknowledgement, comes from the peer's machine within `ms`. */
async function answersWithin(socket: net.Socket, ms: number): Promise<boolean> {
  const began = performance.now();
  const restore = askOften(socket, PROBE_SECONDS);
  // Without probes its silence would prove nothing.
  if (restore === undefined) return !socket.destroyed;
  try {
    for (;;) {
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
      const heard = socket.destroyed ? undefined : msSinceHeard(socket);
      if (heard === undefined) return false;
      const passed = performance.now() - began;
      if (heard < passed) return true;
      if (passed >= ms) return isOnlyFull(socket);
    }
  } finally {
    restore();
  }
}

/**
 * To a client that does not read, with replies outstanding, the kernel sends window probes instead of keepalives, at growing
 * intervals of up to two minutes. The client counts as there until two of these are unanswered.
 */
function isOnlyFull(socket: net.Socket): boolean {
  const state = sendState(socket);
  return state !== undefined && state.isWindowClosed && state.unansweredProbes < GONE_AFTER_PROBES;
}

function socketOf(stream: Duplex | undefined): net.Socket | undefined {
  return stream instanceof net.Socket ? stream : undefined;
}
