/**
 * TCP peers that are gone, and peers that do not read. A peer that is gone is given up: the kernel does it when what was
 * sent is not acknowledged in time (TCP_USER_TIMEOUT). But it takes a peer that acknowledges everything and has no room for
 * more, a program that is stopped, for one that is gone. So this looks at the connections now and then and takes the time-out
 * away from those; for them it asks itself whether there are answers. Owns the time-out of every socket it is given.
 */
import type net from 'node:net';
import { sendState, setUserTimeout } from '../system/socket-calls.js';

/** How often is looked: several times before the shortest time-out there can be is over. */
const LOOK_MS = 3_000;
/** Questions without answer. One may be on its way just now; the kernel asks the next one up to two minutes later. */
export const GONE_AFTER_PROBES = 2;

export class DeadPeerTimeouts {
  /** Those without a time-out are true. */
  readonly #sockets = new Map<net.Socket, boolean>();
  readonly #timer: NodeJS.Timeout;
  readonly #timeoutMs: number;

  /** `timeoutMs`: how long a peer may leave what was sent to it unacknowledged. */
  constructor(timeoutMs: number, lookMs = LOOK_MS) {
    this.#timeoutMs = timeoutMs;
    this.#timer = setInterval(() => this.#look(), lookMs).unref();
  }

  /** From now on until it is closed. Nothing is done for what is no TCP connection. */
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
        socket.destroy(new Error(`the peer does not answer, for ${Math.round(state.lastAckMs / 1000)} s`));
      }
    }
  }
}
