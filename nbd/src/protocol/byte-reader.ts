/**
 * The bytes of a handshake, read in exact amounts, so that the code of a handshake follows the protocol's text. It owns
 * bytes that have arrived and were not read; it is not for the transmission phase, which parses in place.
 */

import type { Duplex } from 'node:stream';

/** With so many unread bytes the socket is paused: a handshake needs far fewer. */
const PAUSE_AT_BYTES = 128 * 1024;

export class ByteReader {
  #chunks: Buffer[] = [];
  #available = 0;
  #failure: Error | undefined;
  #wake: (() => void) | undefined;
  #isPaused = false;

  #socket: Duplex;

  constructor(socket: Duplex) {
    this.#socket = socket;
  }

  /** Bytes that arrived and were not read yet. */
  get unread(): number {
    return this.#available;
  }

  /** Whether a read waits for bytes. */
  get isWaiting(): boolean {
    return this.#wake !== undefined;
  }

  /**
   * Further bytes come from the TLS stream over the old one. Bytes that arrived in the clear and were not read must never
   * be taken for its bytes.
   * Errors: Error if there are any.
   */
  moveTo(socket: Duplex): void {
    if (this.#available > 0) throw new Error('byte-reader: bytes of the old stream are left');
    this.#socket = socket;
    this.#isPaused = false;
  }

  feed(chunk: Buffer): void {
    this.#chunks.push(chunk);
    this.#available += chunk.length;
    if (this.#available >= PAUSE_AT_BYTES && this.#wake === undefined) {
      this.#isPaused = true;
      this.#socket.pause();
    }
    this.#signal();
  }

  /** No more bytes will arrive: reads that need more than there are fail with `error`. */
  fail(error: Error): void {
    this.#failure ??= error;
    this.#signal();
  }

  /** Exactly `length` bytes. */
  async read(length: number): Promise<Buffer> {
    while (this.#available < length) await this.#more();
    const taken: Buffer[] = [];
    let missing = length;
    while (missing > 0) {
      const piece = this.#takeUpTo(missing);
      taken.push(piece);
      missing -= piece.length;
    }
    return taken.length === 1 && taken[0] !== undefined ? taken[0] : Buffer.concat(taken, length);
  }

  /** Discard `length` bytes. */
  async skip(length: number): Promise<void> {
    let missing = length;
    while (missing > 0) {
      if (this.#available === 0) await this.#more();
      else missing -= this.#takeUpTo(missing).length;
    }
  }

  /** All unread bytes; the reader is not used any more. */
  takeRest(): Buffer {
    const rest = Buffer.concat(this.#chunks);
    this.#chunks = [];
    this.#available = 0;
    if (this.#isPaused) this.#socket.resume();
    this.#isPaused = false;
    return rest;
  }

  #takeUpTo(length: number): Buffer {
    const first = this.#chunks[0];
    if (first === undefined) throw new Error('byte-reader: nothing to take');
    if (first.length <= length) {
      this.#chunks.shift();
      this.#available -= first.length;
      return first;
    }
    this.#chunks[0] = first.subarray(length);
    this.#available -= length;
    return first.subarray(0, length);
  }

  async #more(): Promise<void> {
    if (this.#failure !== undefined) throw this.#failure;
    const arrived = new Promise<void>((resolve) => {
      this.#wake = resolve;
    });
    if (this.#isPaused) {
      this.#isPaused = false;
      this.#socket.resume();
    }
    await arrived;
  }

  #signal(): void {
    const wake = this.#wake;
    this.#wake = undefined;
    wake?.();
  }
}
