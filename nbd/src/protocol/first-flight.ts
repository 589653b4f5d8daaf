/**
 * What a client sends before the server has answered in TLS, read from the socket and put back. Owns the reading of the socket
 * while the server's keys are on their way, and so notices a client that leaves meanwhile. It changes nothing of the bytes: TLS
 * receives all of them.
 */

import type { Duplex } from 'node:stream';
import { readClientHello, type ClientHello } from './client-hello.js';

/** Bytes that are kept at most; more wait in the system. A client has nothing to say after its ClientHello. */
const MAX_BYTES = 64 * 1024;

export class FirstFlight {
  readonly #socket: Duplex;
  readonly #chunks: Buffer[] = [];
  #length = 0;
  #onHello: ((hello: ClientHello | undefined) => void) | undefined;
  #hasLeft: ((reason: Error) => void) | undefined;
  readonly #gone: Promise<never>;

  /** `socket` has no reader, and is paused. */
  constructor(socket: Duplex) {
    this.#socket = socket;
    this.#gone = new Promise((_, reject) => {
      this.#hasLeft = reject;
    });
    this.#gone.catch(() => undefined);
    socket.on('data', this.#onData).on('end', this.#onGone).on('close', this.#onGone);
    if (socket.destroyed || socket.readableEnded) this.#onGone();
    else socket.resume();
  }

  /** What `work` resolves to. Rejects at once when the client leaves or the socket is closed; `work` goes on, unheard. */
  whileHere<T>(work: Promise<T>): Promise<T> {
    return Promise.race([work, this.#gone]);
  }

  /** The ClientHello when all of it is here; undefined if the client sends something that is not read as one. */
  hello(): Promise<ClientHello | undefined> {
    return this.whileHere(
      new Promise((resolve) => {
        this.#onHello = resolve;
        this.#look();
      }),
    );
  }

  /** Stop reading. The next reader of the socket, which is paused, gets all that has arrived. */
  giveBack(): void {
    const socket = this.#socket;
    this.stop();
    socket.pause();
    if (this.#length > 0) socket.unshift(Buffer.concat(this.#chunks));
  }

  /** Stop reading, and forget what was read: the socket is given up. */
  stop(): void {
    this.#socket.off('data', this.#onData).off('end', this.#onGone).off('close', this.#onGone);
  }

  readonly #onData = (chunk: Buffer): void => {
    this.#chunks.push(chunk);
    this.#length += chunk.length;
    if (this.#length >= MAX_BYTES) this.#socket.pause();
    this.#look();
  };

  readonly #onGone = (): void => this.#hasLeft?.(new Error('the client left'));

  #look(): void {
    const onHello = this.#onHello;
    if (onHello === undefined) return;
    const bytes = Buffer.concat(this.#chunks);
    const hello = readClientHello(bytes);
    if (hello === 'incomplete') {
      this.#chunks.splice(0, this.#chunks.length, bytes);
      return;
    }
    this.#onHello = undefined;
    onHello(hello === 'unreadable' ? undefined : hello);
  }
}
