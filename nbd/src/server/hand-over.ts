/**
 * Handing a connection over between two requests: it stops, its requests in flight are answered, and another server takes its
 * socket and its state. It owns the order of these steps, and the way back if the connection is not taken.
 */

import net from 'node:net';
import type { Duplex } from 'node:stream';
import type { Peer } from '../block-device.js';
import { takeBuffered } from './in-place-socket.js';
import { HandOverError, plainPeer, STATE_VERSION, type NegotiatedState } from './negotiated-state.js';
import type { TakeConnection } from './serving-loop.js';
import { bytesTakenBySystem, unsentBytes } from './socket-end.js';
import type { Transmission } from './transmission.js';

/** What handing over needs of its connection. */
export interface HandOverHost {
  readonly peer: Peer;
  readonly exportName: string | undefined;
  readonly socket: Duplex;
  /** Below TLS; the same as `socket` without it. */
  readonly transport: Duplex;
  /** Undefined until an export is chosen. */
  readonly transmission: Transmission | undefined;
  /** It is over, or will be when its requests in flight are answered. */
  readonly isLeaving: boolean;
  /** Stop, and go on, listening for what the socket receives. */
  stopReading(): void;
  readOn(): void;
  abort(reason: string): void;
}

export class HandOver {
  readonly #host: HandOverHost;
  readonly #socketGone: Promise<void>;
  #isUnderWay = false;

  constructor(host: HandOverHost, socketGone: Promise<void>) {
    this.#host = host;
    this.#socketGone = socketGone;
  }

  /**
   * `take` is called with the socket, which nobody reads or writes any more, and the state, once the requests in flight are
   * answered. When `take` returns the connection is over. If `take` throws, or `signal` is aborted before, the connection
   * continues as before. Errors: HandOverError; what `take` throws.
   */
  async run<T>(take: TakeConnection<T>, signal: AbortSignal | undefined): Promise<T> {
    // Not at once: this may be called from inside a request.
    await new Promise((resolve) => setImmediate(resolve));
    const host = this.#host;
    const { transmission, socket } = this.#mustBeGivable();
    const { exportName } = host;
    if (exportName === undefined) throw new Error('hand-over: an export without a name');
    this.#isUnderWay = true;
    try {
      await this.#standStill(transmission, signal);
      if (signal?.aborted === true) throw new HandOverError('ABORTED', 'the hand-over was aborted');
      this.#isUnderWay = false;
      this.#mustBeGivable();
      // From here to the end in one turn of the event loop: between two turns the system takes more of what is unsent.
      host.stopReading();
      takeBuffered(socket, (chunk) => transmission.feed(chunk));
      const state: NegotiatedState = {
        ...{ version: STATE_VERSION, peer: plainPeer(host.peer), exportName },
        ...{ negotiated: transmission.rules.negotiated, geometry: transmission.rules.geometry },
        ...{ unread: transmission.unread, unsent: transmission.unsent(unsentBytes(socket)) },
      };
      const taken = take(socket, state);
      host.abort('it was handed over');
      return taken;
    } catch (error) {
      host.readOn();
      transmission.thaw();
      throw error;
    } finally {
      this.#isUnderWay = false;
    }
  }

  /** Errors: HandOverError if it cannot be handed over, now or at all. */
  #mustBeGivable(): { readonly transmission: Transmission; readonly socket: net.Socket } {
    const { transmission, socket, transport, isLeaving } = this.#host;
    if (isLeaving) throw new HandOverError('ENDING', 'it is ending');
    if (transmission === undefined) throw new HandOverError('NOT_READY', 'it has chosen no export yet');
    if (this.#isUnderWay) throw new HandOverError('NOT_READY', 'it is being handed over already');
    if (socket !== transport) throw new HandOverError('TLS', 'the keys of a TLS connection cannot be handed over');
    if (!(socket instanceof net.Socket) || bytesTakenBySystem(socket) === undefined) {
      throw new HandOverError('NOT_A_SOCKET', 'it is a stream of this process, not a socket of the system');
    }
    return { transmission, socket };
  }

  /** Resolves when no request is in flight and none begins, the socket is gone, or `signal` is aborted. */
  #standStill(transmission: Transmission, signal: AbortSignal | undefined): Promise<unknown> {
    const still = new Promise<void>((resolve) => {
      transmission.freeze(resolve);
      if (signal?.aborted === true) resolve();
      else signal?.addEventListener('abort', () => resolve(), { once: true });
    });
    return Promise.race([still, this.#socketGone]);
  }
}
