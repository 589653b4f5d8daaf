/**
 * Closes connections to dead TCP peers, and not those to peers that are alive and do not read. The kernel closes a connection when
 * data is not acknowledged in time (TCP_USER_TIMEOUT). It does the same to a peer that acknowledges everything and keeps its window
 * closed, for example a stopped program. So this polls the connections and removes the time-out while the window is closed; then it
 * looks itself whether the peer answers the kernel's window probes. Owns the TCP_USER_TIMEOUT of every socket that it watches.
 */
import type net from 'node:net';
import { sendState, setUserTimeout } from '../system/socket-calls.js';

/** The interval of the polls: several of them fit into the shortest possible time-out. */
const LOOK_MS = 3_000;
/** Unanswered probes of a dead peer. One may be under way at the moment; the kernel sends the next up to two minutes later. */
export const GONE_AFTER_PROBES = 2;

export class DeadPeerTimeouts {
  /** True: its window is closed, and it has no time-out. */
  readonly #sockets = new Map<net.Socket, boolean>();
  readonly #timer: NodeJS.Timeout;
  readonly #timeoutMs: number;

  /** `timeoutMs`: how long a peer may leave sent data unacknowledged. */
  constructor(timeoutMs: number, lookMs = LOOK_MS) {
    this.#timeoutMs = timeoutMs;
    this.#timer = setInterval(() => this.#look(), lookMs).unref();
  }

  /** Watch `socket` until it closes. Ignores sockets other than TCP. */
  watch(socket: net.Socket): void {
    if (!setUserTimeout(socket, this.#timeoutMs)) return;
    this.#sockets.set(socket, false);
    socket.once('close', () => this.#sockets.delete(socket));
  }

  stop(): void {
    clearInterval(this.#timer);
  }

  #look(): void {
    for (const [socket, isWaiting] of this.#sockets) {
      const state = sendState(socket);
      if (state === undefined) continue;
      if (state.isWindowClosed !== isWaiting) {
        setUserTimeout(socket, state.isWindowClosed ? 0 : this.#timeoutMs);
        this.#sockets.set(socket, state.isWindowClosed);
      } else if (isWaiting && state.unansweredProbes >= GONE_AFTER_PROBES && state.lastAckMs >= this.#timeoutMs) {
        socket.destroy(new Error(`the peer has not answered for ${Math.round(state.lastAckMs / 1000)} s`));
      }
    }
  }
}
