/**
 * What the exports may ask of the NBD server's connections: whether a client is about to end, whether it is still there, and
 * that it be cut off. Owns how long the other machine is given to answer. Decides nothing.
 */
import net from 'node:net';
import type { Duplex } from 'node:stream';
import type { ConnectionInfo, NbdServer, Peer } from 'nbd-server-ts';
import type { Connected } from '../export/writers.js';
import { isRunning, processKey } from '../system/process-identity.js';
import { GONE_AFTER_PROBES } from './dead-peer-timeouts.js';
import { askOften, hasPeerEnded, msSinceHeard, sendState } from '../system/socket-calls.js';

/**
 * How long the kernel of a TCP client has to answer, being asked once a second: four questions. One that was cut off before
 * cannot write any more, so that a wrong answer costs it its connection and nobody any data.
 */
const PROBE_MS = 5_000;
const PROBE_SECONDS = 1;
const POLL_MS = 100;

export class ServerConnections implements Connected {
  readonly #server: Pick<NbdServer, 'connections' | 'disconnect' | 'transportOf'>;
  /** Those that were looked for: of a disk with a thousand writers all are asked about at once. */
  readonly #known = new WeakMap<Peer, ConnectionInfo>();
  /** Those that are asked just now: who else wants to know waits for the same answer. */
  readonly #asked = new Map<net.Socket, Promise<boolean>>();

  constructor(server: Pick<NbdServer, 'connections' | 'disconnect' | 'transportOf'>) {
    this.#server = server;
  }

  isEnding(peer: Peer): boolean {
    const found = this.#find(peer);
    // Not the server's: a command in this process.
    if (found === undefined) return false;
    if (found.phase === 'closing') return true;
    const socket = socketOf(this.#server.transportOf(found.id));
    // Seen by us only when what came before it has been read.
    return socket !== undefined && hasPeerEnded(socket);
  }

  async isThere(peer: Peer): Promise<boolean> {
    const found = this.#find(peer);
    const socket = found && socketOf(this.#server.transportOf(found.id));
    if (socket === undefined) return true;
    if (hasPeerEnded(socket)) return false;
    if (peer.transport === 'tcp') return this.#ask(socket);
    const { pid = 0, startTime } = peer.credentials ?? {};
    // Others may have its socket, a child or whoever it was handed to; then the kernel has not told us of an end.
    return pid <= 0 || startTime === undefined || isRunning(processKey(pid, startTime));
  }

  async cutOff(peer: Peer, reason: string): Promise<void> {
    const found = this.#find(peer);
    if (found !== undefined) await this.#server.disconnect(found.id, reason);
  }

  hasEnded(peer: Peer): boolean {
    return this.#find(peer)?.hasEnded ?? false;
  }

  /** Once at a time: each sets the socket's times back to what it has found there. */
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

/** Whether the machine at the other end says anything within `ms`, an acknowledgement at least. */
async function answersWithin(socket: net.Socket, ms: number): Promise<boolean> {
  const began = performance.now();
  const restore = askOften(socket, PROBE_SECONDS);
  // Without questions its silence would prove nothing.
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
 * A client that does not read, with replies outstanding, is asked by other questions: for room, and less and less often, up to
 * every two minutes. It is there until two of those had no answer.
 */
function isOnlyFull(socket: net.Socket): boolean {
  const state = sendState(socket);
  return state !== undefined && state.isWindowClosed && state.unansweredProbes < GONE_AFTER_PROBES;
}

function socketOf(stream: Duplex | undefined): net.Socket | undefined {
  return stream instanceof net.Socket ? stream : undefined;
}
