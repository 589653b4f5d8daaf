/**
 * Sockets of clients that have violated the protocol repeatedly and wait for their end (see offenders.ts). It owns these
 * sockets, for one event loop: their connections have no device and no request any more, and count for no limit.
 */

import type { Duplex } from 'node:stream';

/** Most sockets that wait; one more closes the one that has waited longest. */
const MAX_HELD = 64;
/** A socket with more unsent bytes is not held, since its memory would be held as well. */
const MAX_HELD_UNSENT_BYTES = 64 * 1024;

export class HeldSockets {
  /** The waiting sockets in the order in which they came, with the timers that close them. */
  readonly #held = new Map<Duplex, NodeJS.Timeout>();

  /**
   * Keep `socket`, which has no reader any more, and destroy it after `delayMs`. False, and nothing done, if it is closed
   * or has too many unsent bytes.
   */
  hold(socket: Duplex, delayMs: number): boolean {
    if (socket.destroyed || socket.writableLength > MAX_HELD_UNSENT_BYTES) return false;
    if (this.#held.size >= MAX_HELD) {
      const [longest] = this.#held.keys();
      if (longest !== undefined) {
        this.#forget(longest);
        longest.destroy();
      }
    }
    // While it is paused its end is not seen: a client that is gone costs one of MAX_HELD descriptors for the rest of the
    // delay.
    socket.pause();
    const timer = setTimeout(() => socket.destroy(), delayMs);
    this.#held.set(socket, timer);
    socket.once('close', () => this.#forget(socket));
    return true;
  }

  /** Close all waiting sockets. */
  release(): void {
    for (const socket of [...this.#held.keys()]) socket.destroy();
  }

  #forget(socket: Duplex): void {
    clearTimeout(this.#held.get(socket));
    this.#held.delete(socket);
  }
}
