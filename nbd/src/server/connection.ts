/**
 * The life of one connection: handshake, transmission, end. It owns the socket and guarantees that, however the connection
 * ends, the device is closed exactly once, after its last request, and the close event is sent exactly once after that. It
 * contains no listeners and no layouts of the wire.
 */

import type { Duplex } from 'node:stream';
import type { Ending, Peer } from '../block-device.js';
import { ByteReader } from '../protocol/byte-reader.js';
import { acceptTls, type AcceptedTls } from '../protocol/tls.js';
import { TlsMaterialError, type ServerTls, type TlsMode } from '../protocol/tls-material.js';
import type { BufferPool } from './buffer-pool.js';
import { ClientExport } from './client-export.js';
import { ClientSignal } from './client-signal.js';
import type { ConnectionOptions, LoopResources } from './connection-options.js';
import type { GuardedObserver } from './guarded-observer.js';
import { HandOver, type HandOverHost } from './hand-over.js';
import { HandshakeClock } from './handshake-clock.js';
import { HandshakeError, type HandshakeHost, type HandshakeOutcome } from './handshake-host.js';
import { negotiate } from './handshake.js';
import type { HeldSockets } from './held-sockets.js';
import { IdleClock } from './idle-clock.js';
import type { InPlaceSocket } from './in-place-socket.js';
import type { Leftovers } from './leftovers.js';
import type { Limits } from './limits.js';
import type { LoopShare } from './loop-share.js';
import type { LoopTime } from './loop-time.js';
import { reopen, type NegotiatedState } from './negotiated-state.js';
import type { ConnectionInfo } from './observer.js';
import type { OverdueRequests } from './overdue-requests.js';
import type { Progress, ServedConnection, TakeConnection } from './serving-loop.js';
import { bytesTakenBySystem, closeAfterOutput, watchOutput } from './socket-end.js';
import type { Watched } from './stall-watch.js';
import type { TransmissionHost } from './transmission-host.js';
import { Transmission } from './transmission.js';
import { Violations } from './violations.js';

const VANISHED = 'the client vanished';

export class Connection implements ServedConnection, HandshakeHost, TransmissionHost, HandOverHost, Watched {
  readonly id: number;
  peer: Peer;
  readonly openedAt = Date.now();
  /** The same moment by performance.now(): setting the clock does not change the duration. */
  readonly #startedAt = performance.now();
  /** The socket that is read and written; under TLS not the accepted one. */
  socket: Duplex;
  readonly tlsMode: TlsMode | undefined;
  readonly provider: HandshakeHost['provider'];
  readonly limits: Limits;
  readonly observer: GuardedObserver;
  readonly pool: BufferPool;
  readonly loop: LoopShare;
  readonly overdue: OverdueRequests;
  readonly reader: ByteReader;
  /** Runs from the greeting on. */
  readonly clock: HandshakeClock;
  isShuttingDown = false;
  #isRefusing = true;
  readonly export: ClientExport;
  /** Resolves when the connection is over and its device closed. Never fails. */
  readonly over: Promise<void>;

  transmission: Transmission | undefined;
  /** 'lost' until the client has sent a disconnect. */
  #ending: Ending = 'lost';
  #isClosing = false;
  /** The connection ends when its requests in flight are finished. */
  #isEnding = false;
  #isInTlsHandshake = false;
  #reason: string | undefined;
  #isLingering = false;
  #idleClock: IdleClock | undefined;
  #handingOver: HandOver | undefined;
  readonly #time: LoopTime;
  /** The accepted socket; under TLS the one below it. */
  readonly transport: Duplex;
  readonly #tls: ServerTls | undefined;
  readonly #inPlace: InPlaceSocket | undefined;
  readonly #socketGone: Promise<void>;
  readonly #heldSockets: HeldSockets;
  readonly #progress: Progress | undefined;
  readonly #state: NegotiatedState | undefined;
  #isCrowdedOut = false;
  readonly #violations: Violations;
  readonly #clientSignal = new ClientSignal();
  readonly #leftovers: Leftovers;

  constructor(options: ConnectionOptions, shared: LoopResources) {
    this.id = options.id;
    this.peer = options.peer;
    this.socket = options.socket;
    this.transport = options.socket;
    this.provider = shared.provider;
    this.export = new ClientExport(options.id, this.#clientSignal, shared);
    this.export.onStuckClose = () => this.#progress?.left?.();
    this.limits = shared.limits;
    this.observer = shared.observer;
    this.pool = shared.pool;
    this.loop = shared.loop;
    this.overdue = shared.overdue;
    this.#leftovers = shared.leftovers;
    this.#time = shared.time;
    this.#tls = options.tls;
    this.#inPlace = options.inPlace;
    this.#heldSockets = shared.heldSockets;
    this.#violations = new Violations(options.offender, shared.offenders);
    this.#progress = options.progress;
    this.#state = options.state;
    // Fixed for the whole connection: the server "MUST be consistent in its mode of operation across the lifespan of a
    // connection".
    this.tlsMode = options.tls?.mode;
    this.reader = new ByteReader(this.socket);
    this.clock = new HandshakeClock(this.limits, this.#time, (reason) => {
      this.export.giveUp();
      this.abort(reason);
    });
    this.#socketGone = new Promise((resolve) => {
      if (this.socket.closed) resolve();
      else this.socket.once('close', resolve);
    });
    this.#listen();
    this.socket.once('close', this.#onClose);
    // The program that read `head` may have paused it.
    this.socket.resume();
    const head = options.state === undefined ? options.head : options.state.unread;
    if (head !== undefined && head.length > 0) this.reader.feed(Buffer.from(head));
    if (this.socket.destroyed) this.reader.fail(new Error('the socket was closed before it was served'));
    this.over = this.#live();
  }

  get exportName(): string | undefined {
    return this.export.name;
  }

  get exportKey(): string {
    return this.export.countedAs ?? '';
  }

  get phase(): ConnectionInfo['phase'] {
    if (this.#isClosing || this.#isEnding) return 'closing';
    return this.transmission === undefined ? 'handshake' : 'transmission';
  }

  get hasEnded(): boolean {
    return this.transmission?.hasEnded ?? false;
  }

  get bytesRead(): number {
    return this.transmission?.bytesRead ?? 0;
  }

  get bytesWritten(): number {
    return this.transmission?.bytesWritten ?? 0;
  }

  get requests(): number {
    return this.transmission?.requests ?? 0;
  }

  get errors(): number {
    return this.transmission?.errors ?? 0;
  }

  get inFlight(): number {
    return this.transmission?.inFlight ?? 0;
  }

  /** Bytes of the memory budget held for requests and replies. */
  get memoryBytes(): number {
    return this.transmission?.memoryBytes ?? 0;
  }

  get movedBytes(): number {
    const { transmission } = this;
    if (transmission === undefined) return 0;
    return transmission.payloadBytes + (bytesTakenBySystem(this.transport) ?? transmission.takenBytes);
  }

  get clientSignal(): ClientSignal {
    return this.#clientSignal;
  }

  get waitsForClient(): boolean {
    return this.transmission?.waitsForClient ?? false;
  }

  /** Finish the requests in flight, refuse or drop further ones, then close. Returns at once; see `over`. */
  shutdown(options: { readonly refuse: boolean }): void {
    if (this.isShuttingDown) return;
    this.isShuttingDown = true;
    this.#isRefusing = options.refuse;
    const reason = 'the server is shutting down';
    // Only its last requests in flight are left.
    if (this.#violations.isCondemned) return;
    if (this.transmission === undefined) {
      // An option that is being answered is still answered; there is nothing else to wait for.
      this.reader.fail(new Error(reason));
      if (this.#isInTlsHandshake) this.abort(reason);
      return;
    }
    this.#takeNoRequests(this.transmission);
    this.#endWhenIdle(reason);
  }

  #takeNoRequests(transmission: Transmission): void {
    if (this.#isRefusing) transmission.refuseNewRequests();
    else transmission.dropNewRequests();
  }

  /** Close the socket now. The device is closed when its last request has finished. */
  abort(reason: string): void {
    this.#reason ??= reason;
    this.#isClosing = true;
    this.#clientSignal.abort(reason);
    this.reader.fail(new Error(reason));
    this.socket.destroy();
  }

  /** Close the socket now, and execute nothing more of what was received; see `over`. */
  disconnect(reason: string): void {
    this.transmission?.stopListening();
    this.abort(reason);
  }

  /** Give the connection away; see HandOver. Errors: HandOverError; what `take` throws. */
  handOver<T>(take: TakeConnection<T>, signal?: AbortSignal): Promise<T> {
    this.#handingOver ??= new HandOver(this, this.#socketGone);
    return this.#handingOver.run(take, signal);
  }

  // --- For handing over ---

  /** It is over, or will be when its requests in flight are answered. */
  get isLeaving(): boolean {
    return this.#isClosing || this.#isEnding || this.isShuttingDown;
  }

  stopReading(): void {
    this.socket.off('data', this.#onHandshakeData).off('data', this.#onRequestData).off('end', this.#onEnd);
  }

  readOn(): void {
    this.stopReading();
    if (!this.#isClosing) this.socket.on('data', this.#onRequestData).on('end', this.#onEnd);
  }

  // --- For the server, which counts connections ---

  get isWaitedFor(): boolean {
    if (this.#isClosing || this.transmission !== undefined) return this.#isClosing;
    // A client that does not read our answers is waited for as well.
    return this.reader.isWaiting || this.#isInTlsHandshake || this.socket.writableLength > 0;
  }

  crowdOut(reason: string): void {
    this.#isCrowdedOut = true;
    this.abort(reason);
  }

  // --- For the handshake ---

  advanced(): void {
    this.#progress?.advanced();
  }

  send(bytes: Buffer): Promise<void> {
    return new Promise((resolve, reject) => {
      this.socket.write(bytes, (error) => (error ? reject(error) : resolve()));
    });
  }

  async startTls(acknowledgement: Buffer): Promise<void> {
    const { socket: plain } = this;
    const tls = this.#tls;
    if (tls === undefined) throw new Error('connection: TLS without keys');
    // No reader from here on: bytes that arrive before TLS takes over belong to the TLS handshake.
    this.stopReading();
    plain.pause();
    await this.send(acknowledgement);
    let accepted: AcceptedTls;
    try {
      this.#isInTlsHandshake = true;
      accepted = await acceptTls(plain, tls, this.clock);
    } catch (error) {
      if (error instanceof TlsMaterialError)
        this.export.failed(error, { source: 'callback', method: 'tls', peer: this.peer });
      throw new Error(`the TLS handshake failed: ${(error as Error).message}`, { cause: error });
    } finally {
      this.#isInTlsHandshake = false;
    }
    this.socket = accepted.socket;
    const inTheClear = this.peer;
    this.peer = { ...this.peer, tls: accepted.identity };
    this.reader.moveTo(this.socket);
    this.#listen();
    // "the server MUST NOT preserve any negotiation state … issued before this command"
    await this.export.left(inTheClear);
  }

  #listen(): void {
    this.socket.on('data', this.#onHandshakeData).on('end', this.#onEnd).on('error', this.#onError);
  }

  // --- For the transmission ---

  receiveElsewhere(): void {
    this.#inPlace?.askAgain();
  }

  disconnectRequested(): void {
    this.#ending = 'disconnect';
    this.#progress?.leaving();
    this.#endWhenIdle('the client disconnected');
  }

  protocolViolated(reason: string): void {
    if (!this.#noteViolation(reason)) this.abort(`protocol violation: ${reason}`);
  }

  /**
   * Count a violation. True if this is a repeated one and the socket is kept open for a while: the connection is over when its
   * requests in flight are finished, and only the socket is left. False if the socket is to be closed at once.
   */
  #noteViolation(reason: string): boolean {
    if (this.#isClosing) return false;
    this.#reason ??= `protocol violation: ${reason}`;
    const delayMs = this.#violations.record(this.export.countedAs);
    if (delayMs === 0 || this.isShuttingDown) return false;
    this.transmission?.dropReplies();
    if (!this.#heldSockets.hold(this.socket, delayMs)) return false;
    this.#isClosing = true;
    this.stopReading();
    this.#clientSignal.abort(this.#reason);
    this.#violations.condemn();
    return true;
  }

  // --- From start to end ---

  async #live(): Promise<void> {
    let outcome: HandshakeOutcome | { readonly next: 'held' };
    try {
      outcome = this.#state === undefined ? await negotiate(this) : await reopen(this, this.#state);
    } catch (error) {
      outcome = { next: 'close', reason: this.#describeFailure(error) };
      if (error instanceof HandshakeError && this.#noteViolation(error.message)) outcome = { next: 'held' };
    }
    this.clock.stop();

    if (outcome.next === 'transmission' && !this.socket.destroyed) {
      this.#beginTransmission(outcome);
    } else if (outcome.next === 'close') {
      this.#endSocket(outcome.reason);
    }
    await Promise.race([this.#socketGone, this.#violations.condemned]);
    await this.#requestsFinished();
    // At the latest: what the device does beside its requests ends before it is closed.
    this.#clientSignal.abortNow(this.#reason ?? VANISHED);
    await this.#requestsSettled();
    const { exportName } = this;
    const { refused } = this.export;
    await this.export.close(this.#ending);
    await this.export.left(this.peer);
    this.observer.onConnectionClose({
      id: this.id,
      peer: this.peer,
      exportName,
      refused: exportName === undefined ? refused : undefined,
      reason: this.#reason ?? VANISHED,
      violations: this.#violations.count,
      isCrowdedOut: this.#isCrowdedOut,
      bytesRead: this.bytesRead,
      bytesWritten: this.bytesWritten,
      requests: this.requests,
      errors: this.errors,
      durationMs: Math.round(performance.now() - this.#startedAt),
    });
  }

  #beginTransmission(outcome: HandshakeOutcome & { readonly next: 'transmission' }): void {
    const transmission = new Transmission(this, outcome.device, {
      geometry: outcome.geometry,
      negotiated: outcome.negotiated,
    });
    this.transmission = transmission;
    this.#progress?.settled();
    this.socket.off('data', this.#onHandshakeData);
    this.socket.on('data', this.#onRequestData);
    const violations = this.#violations.countOf(this.export.countedAs);
    this.observer.onConnectionOpen({ id: this.id, peer: this.peer, exportName: outcome.exportName, violations });
    const unsent = this.#state?.unsent;
    if (unsent !== undefined && unsent.length > 0) transmission.sendFirst(unsent);
    const rest = this.reader.takeRest();
    if (rest.length > 0) transmission.feed(rest);
    this.#inPlace?.receive({
      nextBuffer: () => transmission.nextBuffer(),
      received: (length) => {
        this.#idleClock?.heard();
        transmission.received(length);
      },
    });
    const { idleTimeoutMs } = this.limits;
    if (idleTimeoutMs > 0) {
      this.#idleClock = new IdleClock(
        this.#time,
        idleTimeoutMs,
        () => transmission.isBusy,
        () => {
          if (!this.#isClosing) this.#endWhenIdle(`idle for ${idleTimeoutMs} ms`);
        },
      );
    }
    if (this.socket.readableEnded) this.#onEnd();
    else if (this.isShuttingDown) {
      this.#takeNoRequests(transmission);
      this.#endWhenIdle('the server is shutting down');
    }
  }

  #requestsFinished(): Promise<void> {
    const { transmission } = this;
    if (transmission === undefined) return Promise.resolve();
    return new Promise((resolve) => {
      transmission.onIdle(resolve);
    });
  }

  /** The client is gone, and all that may be left are requests whose time was up: this connection does not count any more. */
  async #requestsSettled(): Promise<void> {
    const { transmission } = this;
    if (transmission === undefined || transmission.inFlight === 0) return;
    this.#progress?.left?.();
    const release = this.#leftovers.add(this.exportKey);
    await new Promise<void>((resolve) => {
      transmission.onSettled(resolve);
    });
    release();
  }

  #endWhenIdle(reason: string): void {
    this.#reason ??= reason;
    this.#isEnding = true;
    this.transmission?.onIdle(() => this.#endSocket(reason));
  }

  /** All replies are with the socket: close it when they have left, or after `lingerMs`. */
  #endSocket(reason: string): void {
    this.#reason ??= reason;
    this.#isClosing = true;
    this.#progress?.leaving();
    this.transmission?.stopListening();
    const { socket } = this;
    if (socket.destroyed || this.#isLingering) return;
    this.#isLingering = true;
    this.stopReading();
    closeAfterOutput(socket, this.limits.lingerMs);
  }

  #describeFailure(error: unknown): string {
    if (error instanceof HandshakeError) return `protocol violation: ${error.message}`;
    return error instanceof Error ? error.message : String(error);
  }

  readonly #onHandshakeData = (chunk: Buffer): void => this.reader.feed(chunk);

  readonly #onRequestData = (chunk: Buffer): void => {
    this.#idleClock?.heard();
    this.transmission?.feed(chunk);
  };

  readonly #onEnd = (): void => {
    this.#progress?.leaving();
    const { lingerMs } = this.limits;
    if (this.transmission === undefined) {
      const reason = this.export.whyLeft ?? 'the client left during the handshake';
      this.reader.fail(new Error(reason));
      this.#endIfNothingIsTaken();
      this.#clientSignal.abortAfter(lingerMs, reason);
      return;
    }
    const where = this.transmission.isMidRequest ? 'in the middle of a request' : 'without a disconnect request';
    const reason = `the client left ${where}`;
    // The client may still read: the requests received so far are finished and answered. But usually it was killed, which looks
    // the same, and work that takes long is done for nobody.
    if (this.#ending !== 'disconnect') this.#clientSignal.abortAfter(lingerMs, reason);
    this.#endWhenIdle(reason);
  };

  /**
   * A client that has closed its side in the handshake may still read the answers. A client that is gone reads nothing, and
   * under TLS a write to it never completes.
   */
  #endIfNothingIsTaken(): void {
    watchOutput(
      this.socket,
      this.transport,
      this.limits.lingerMs,
      () => this.transmission === undefined,
      () => this.abort('the client left during the handshake, and takes nothing more'),
    );
  }

  readonly #onError = (error: Error): void => {
    const left = this.transmission === undefined ? this.export.whyLeft : undefined;
    this.#reason ??= left ?? `socket error: ${error.message}`;
    this.reader.fail(error);
  };

  readonly #onClose = (): void => {
    this.#isClosing = true;
    this.#idleClock?.stop();
    this.reader.fail(new Error(VANISHED));
    // "The server MUST handle all outstanding requests" of a client that has disconnected: their work is not given up.
    if (this.#ending !== 'disconnect') this.#clientSignal.abort(this.#reason ?? VANISHED);
    this.transmission?.socketClosed();
  };
}
