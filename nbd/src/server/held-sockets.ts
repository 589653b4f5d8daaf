/**
 * Sockets of clients that have broken the protocol again and wait for their end (see offenders.ts). Owns these sockets, of
 * one event loop: their connections have no device and no request any more, and count for nobody.
 */

import type { Duplex } from 'node:stream';

/** Sockets that wait; with one more the one that has waited longest is closed early. */
const MAX_HELD = 64;
/** With more than this on its way to the client a socket is not held: its memory would be, too. */
const MAX_HELD_UNSENT_BYTES = 64 * 1024;

export class HeldSockets {
  /** Those that wait, in the order in which they came, and what will end it. */
  readonly #held = new Map<Duplex, NodeJS.Timeout>();

  /**
   * Keep `socket`, which nobody may hear any more, and destroy it after `delayMs`. False, and nothing done, if it is gone
   * or has too much on its way to be kept.
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
    // Paused, its end is not seen: a client that is gone costs a descriptor for the rest of its time, one of MAX_HELD.
    socket.pause();
    const timer = setTimeout(() => socket.destroy(), delayMs);
    this.#held.set(socket, timer);
    socket.once('close', () => this.#forget(socket));
    return true;
  }

  /** Close all that wait. */
  release(): void {
    for (const socket of [...this.#held.keys()]) socket.destroy();
  }

  #forget(socket: Duplex): void {
    clearTimeout(this.#held.get(socket));
    this.#held.delete(socket);
  }
}
