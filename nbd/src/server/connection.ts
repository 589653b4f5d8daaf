/**
 * The life of one connection: handshake, transmission, end. It owns the socket and the opened device, and guarantees
 * that however the connection ends the device is closed exactly once, after its last request, and the close event is
 * sent exactly once after that. It knows nothing of listeners and nothing of the bytes on the wire.
 */

import type net from 'node:net';
import type { Duplex } from 'node:stream';
import type { BlockDevice, Ending, ExportProvider, Peer } from '../block-device.js';
import type { BufferPool } from './buffer-pool.js';
import { ByteReader } from '../protocol/byte-reader.js';
import { HandshakeClock } from './handshake-clock.js';
import { negotiate } from './handshake.js';
import {
  HandshakeError,
  whyLeft,
  type HandshakeHost,
  type HandshakeOutcome,
  type OpenExport,
} from './handshake-host.js';
import type { HeldSockets } from './held-sockets.js';
import { takeBuffered, type InPlaceSocket } from './in-place-socket.js';
import type { Limits } from './limits.js';
import type { LoopShare } from './loop-share.js';
import type { LoopTime } from './loop-time.js';
import { HandOverError, plainPeer, reopen, STATE_VERSION, type NegotiatedState } from './negotiated-state.js';
import type { ConnectionInfo, ServerObserver } from './observer.js';
import type { OffenderCounts } from './offenders.js';
import type { Progress, ServedConnection, TakeConnection } from './serving-loop.js';
import type { Watched } from './stall-watch.js';
import { acceptTls, type ServerTls, type TlsMode } from '../protocol/tls.js';
import { Transmission } from './transmission.js';
import type { TransmissionHost } from './transmission-host.js';

/** What is one for all connections of an event loop. */
export interface LoopResources {
  readonly provider: ExportProvider;
  readonly limits: Limits;
  readonly observer: ServerObserver;
  readonly pool: BufferPool;
  readonly loop: LoopShare;
  readonly time: LoopTime;
  readonly offenders: OffenderCounts;
  readonly heldSockets: HeldSockets;
}

/** What is this connection's alone. */
export interface ConnectionOptions {
  readonly id: number;
  readonly socket: Duplex;
  readonly peer: Peer;
  /** Bytes already received on the socket, by whoever accepted it. */
  readonly head?: Buffer | undefined;
  /** The socket's way to receive into memory of ours, if it has one. */
  readonly inPlace?: InPlaceSocket | undefined;
  /** Undefined: this peer is not offered TLS. */
  readonly tls: ServerTls | undefined;
  /** Whose violations are counted together with this peer's; undefined: they are not counted. */
  readonly offender: string | undefined;
  /** Told how it gets on; undefined: nobody counts it. */
  readonly progress?: Progress | undefined;
  /** Where another server has left it. Undefined: it begins with the greeting. */
  readonly state?: NegotiatedState | undefined;
}

export class Connection implements ServedConnection, HandshakeHost, TransmissionHost, Watched {
  readonly id: number;
  peer: Peer;
  readonly openedAt = Date.now();
  /** The same moment by performance.now(): a clock that is set makes no connection longer or shorter. */
  private readonly startedAt = performance.now();
  /** What bytes are read from and written to; under TLS not the one that was accepted. */
  socket: Duplex;
  readonly tlsMode: TlsMode | undefined;
  readonly provider: ExportProvider;
  readonly limits: Limits;
  readonly observer: ServerObserver;
  readonly pool: BufferPool;
  readonly loop: LoopShare;
  readonly reader: ByteReader;
  /** From the greeting on. */
  readonly clock: HandshakeClock;
  isShuttingDown = false;
  private isRefusing = true;
  exportName: string | undefined;
  refused: string | undefined;
  /** What its violations are counted for; see ExportInfo. */
  private countedAs: string | undefined;
  /** Resolves when the connection is over and its device closed. Never fails. */
  readonly over: Promise<void>;

  private transmission: Transmission | undefined;
  private device: BlockDevice | undefined;
  /** Until the client has said goodbye. */
  private ending: Ending = 'lost';
  private isClosing = false;
  private isFrozen = false;
  /** It will end when its requests in flight are finished. */
  private isEnding = false;
  private isInTlsHandshake = false;
  private reason: string | undefined;
  private lingerTimer: NodeJS.Timeout | undefined;
  private idleTimer: NodeJS.Timeout | undefined;
  /** When the client was last heard or answered, by `time`. */
  private lastActiveAt = 0;
  private readonly time: LoopTime;
  /** What was accepted: under TLS what lies below it. */
  readonly transport: Duplex;
  private readonly tls: ServerTls | undefined;
  private readonly inPlace: InPlaceSocket | undefined;
  private readonly socketGone: Promise<void>;
  private readonly offenders: OffenderCounts;
  private readonly heldSockets: HeldSockets;
  private readonly offender: string | undefined;
  private readonly progress: Progress | undefined;
  private readonly state: NegotiatedState | undefined;
  private isCrowdedOut = false;
  private violationCount = 0;
  /** Resolves when the client has broken the protocol and its socket waits for its end: the connection is over before. */
  private readonly condemned: Promise<void>;
  private condemn: () => void = () => undefined;
  private isCondemned = false;

  constructor(options: ConnectionOptions, shared: LoopResources) {
    this.id = options.id;
    this.peer = options.peer;
    this.socket = options.socket;
    this.transport = options.socket;
    this.provider = shared.provider;
    this.limits = shared.limits;
    this.observer = shared.observer;
    this.pool = shared.pool;
    this.loop = shared.loop;
    this.time = shared.time;
    this.tls = options.tls;
    this.inPlace = options.inPlace;
    this.offenders = shared.offenders;
    this.heldSockets = shared.heldSockets;
    this.offender = options.offender;
    this.progress = options.progress;
    this.state = options.state;
    this.condemned = new Promise((resolve) => {
      this.condemn = resolve;
    });
    // For its whole life: the server "MUST be consistent in its mode of operation across the lifespan of a connection".
    this.tlsMode = options.tls?.mode;
    this.reader = new ByteReader(this.socket);
    this.clock = new HandshakeClock(this.limits, this.time, (reason) => this.abort(reason));
    this.socketGone = new Promise((resolve) => {
      if (this.socket.closed) resolve();
      else this.socket.once('close', resolve);
    });
    this.socket.on('data', this.onHandshakeData);
    this.socket.on('end', this.onEnd);
    this.socket.on('error', this.onError);
    this.socket.once('close', this.onClose);
    // Whoever took the head from it may have paused it since.
    this.socket.resume();
    const head = options.state === undefined ? options.head : Buffer.from(options.state.unread);
    if (head !== undefined && head.length > 0) this.reader.feed(head);
    if (this.socket.destroyed) this.reader.fail(new Error('the socket was closed before it was served'));
    this.over = this.live();
  }

  get phase(): ConnectionInfo['phase'] {
    if (this.isClosing || this.isEnding) return 'closing';
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

  /** Bytes of the server's memory that it holds for requests and replies. */
  get memoryBytes(): number {
    return this.transmission?.memoryBytes ?? 0;
  }

  get movedBytes(): number {
    const { transmission } = this;
    if (transmission === undefined) return 0;
    return transmission.payloadBytes + (bytesTakenBySystem(this.transport) ?? transmission.takenBytes);
  }

  get waitsForClient(): boolean {
    return this.transmission?.waitsForClient ?? false;
  }

  /** Finish what is in flight, refuse or drop what comes, then close. Returns at once; see `over`. */
  shutdown(options: { readonly refuse: boolean }): void {
    if (this.isShuttingDown) return;
    this.isShuttingDown = true;
    this.isRefusing = options.refuse;
    const reason = 'the server is shutting down';
    // Nothing of it but its last requests is left.
    if (this.isCondemned) return;
    if (this.transmission === undefined) {
      // An option being answered is answered; a client that has nothing pending is not waited for.
      this.reader.fail(new Error(reason));
      if (this.isInTlsHandshake) this.abort(reason);
      return;
    }
    this.takeNoRequests(this.transmission);
    this.endWhenIdle(reason);
  }

  private takeNoRequests(transmission: Transmission): void {
    if (this.isRefusing) transmission.refuseNewRequests();
    else transmission.dropNewRequests();
  }

  /** Close the socket now. The device is closed when its last request has finished. */
  abort(reason: string): void {
    this.reason ??= reason;
    this.isClosing = true;
    this.reader.fail(new Error(reason));
    this.socket.destroy();
  }

  /**
   * Close the socket now, and carry out nothing more of what was received; see `over`. Not to be called from inside a
   * request.
   */
  disconnect(reason: string): void {
    this.transmission?.stopListening();
    this.abort(reason);
  }

  /**
   * Stop between two requests and give the connection away: `take` is called with its socket, which nobody reads or writes
   * any more, and its state, once the requests in flight are answered. When `take` returns the socket is destroyed here, and
   * the connection is over. If `take` throws, or `signal` says so before, it goes on as if nothing had been.
   * Errors: HandOverError, what `take` throws.
   */
  async handOver<T>(take: TakeConnection<T>, signal?: AbortSignal): Promise<T> {
    // Not at once: this may be called from inside a request.
    await new Promise((resolve) => setImmediate(resolve));
    const { transmission, exportName } = this;
    this.mustBeGivable();
    if (transmission === undefined || exportName === undefined) throw new Error('connection: an export without a name');
    this.isFrozen = true;
    try {
      await this.standStill(transmission, signal);
      if (signal?.aborted === true) throw new HandOverError('ABORTED', 'it was not wanted any more');
      this.isFrozen = false;
      this.mustBeGivable();
      const socket = this.socket as net.Socket;
      // From here to the end in one turn: the system takes more of what is unsent in every other one.
      socket.off('data', this.onRequestData).off('end', this.onEnd);
      takeBuffered(socket, (chunk) => transmission.feed(chunk));
      const state: NegotiatedState = {
        ...{ version: STATE_VERSION, peer: plainPeer(this.peer), exportName },
        ...{ negotiated: transmission.rules.negotiated, geometry: transmission.rules.geometry },
        ...{ unread: transmission.unread, unsent: transmission.unsent(unsentBytes(socket)) },
      };
      const taken = take(socket, state);
      this.abort('it was handed over');
      return taken;
    } catch (error) {
      this.socket.off('data', this.onRequestData).off('end', this.onEnd);
      if (!this.isClosing) this.socket.on('data', this.onRequestData).on('end', this.onEnd);
      transmission.thaw();
      throw error;
    } finally {
      this.isFrozen = false;
    }
  }

  /** @throws HandOverError if it cannot be handed over, now or at all */
  private mustBeGivable(): void {
    if (this.isClosing || this.isEnding || this.isShuttingDown) throw new HandOverError('ENDING', 'it is ending');
    if (this.transmission === undefined) throw new HandOverError('NOT_READY', 'it has chosen no export yet');
    if (this.isFrozen) throw new HandOverError('NOT_READY', 'it is being handed over already');
    if (this.socket !== this.transport)
      throw new HandOverError('TLS', 'the keys of a TLS connection cannot be given away');
    if (bytesTakenBySystem(this.socket) === undefined) {
      throw new HandOverError('NOT_A_SOCKET', 'it is a stream of this process, not a socket of the system');
    }
  }

  /** Resolves when no request is in flight and none begins, the socket is gone, or `signal` says so. */
  private standStill(transmission: Transmission, signal: AbortSignal | undefined): Promise<unknown> {
    const still = new Promise<void>((resolve) => {
      transmission.freeze(resolve);
      if (signal?.aborted === true) resolve();
      else signal?.addEventListener('abort', () => resolve(), { once: true });
    });
    return Promise.race([still, this.socketGone]);
  }

  // --- For whoever counts connections ---

  get isWaitedFor(): boolean {
    if (this.isClosing || this.transmission !== undefined) return this.isClosing;
    // Also who does not take what we have said.
    return this.reader.isWaiting || this.isInTlsHandshake || this.socket.writableLength > 0;
  }

  crowdOut(reason: string): void {
    this.isCrowdedOut = true;
    this.abort(reason);
  }

  // --- For the handshake ---

  advanced(): void {
    this.progress?.advanced();
  }

  send(bytes: Buffer): Promise<void> {
    return new Promise((resolve, reject) => {
      this.socket.write(bytes, (error) => (error ? reject(error) : resolve()));
    });
  }

  async startTls(acknowledgement: Buffer): Promise<void> {
    const { tls, socket: plain } = this;
    if (tls === undefined) throw new Error('connection: TLS without keys');
    // From here nobody reads the socket: what comes before TLS has taken it over is TLS's to judge.
    plain.off('data', this.onHandshakeData);
    plain.off('end', this.onEnd);
    plain.pause();
    await this.send(acknowledgement);
    let accepted: Awaited<ReturnType<typeof acceptTls>>;
    try {
      this.isInTlsHandshake = true;
      accepted = await acceptTls(plain, tls.material());
    } catch (error) {
      throw new Error(`the TLS handshake failed: ${(error as Error).message}`, { cause: error });
    } finally {
      this.isInTlsHandshake = false;
    }
    this.socket = accepted.socket;
    // "the server MUST NOT preserve any negotiation state … issued before this command"
    this.tellLeft();
    this.refused = undefined;
    this.peer = { ...this.peer, tls: accepted.identity };
    this.reader.moveTo(this.socket);
    this.socket.on('data', this.onHandshakeData);
    this.socket.on('end', this.onEnd);
    this.socket.on('error', this.onError);
  }

  async open(name: string): Promise<OpenExport> {
    const opened = await this.provider.open(name, this.peer);
    this.device = opened.device;
    this.exportName = opened.info.name;
    this.countedAs = opened.info.countedAs ?? opened.info.name;
    return opened;
  }

  async abandon(): Promise<void> {
    const { device } = this;
    this.device = undefined;
    try {
      await device?.close(this.ending);
    } catch (error) {
      this.unexpected(error);
    }
    this.exportName = undefined;
    this.countedAs = undefined;
  }

  unexpected(error: unknown): void {
    this.observer.onDeviceError?.(error, { id: this.id, exportName: this.exportName });
  }

  // --- For the transmission ---

  disconnectRequested(): void {
    this.ending = 'disconnect';
    this.progress?.leaving();
    this.endWhenIdle('the client disconnected');
  }

  protocolViolated(reason: string): void {
    if (!this.noteViolation(reason)) this.abort(`protocol violation: ${reason}`);
  }

  /**
   * Count a violation. True if the client, having done it before, is now kept waiting for its end: the connection is over
   * when its requests in flight are finished, and only its socket is left. False if it is to be closed at once.
   */
  private noteViolation(reason: string): boolean {
    if (this.isClosing) return false;
    this.reason ??= `protocol violation: ${reason}`;
    this.violationCount = 1;
    const { offender } = this;
    if (offender === undefined) return false;
    const { count, delayMs } = this.offenders.record(this.offenceOf(offender), performance.now());
    this.violationCount = count;
    if (delayMs === 0 || this.isShuttingDown) return false;
    this.transmission?.dropReplies();
    if (!this.heldSockets.hold(this.socket, delayMs)) return false;
    this.isClosing = true;
    this.isCondemned = true;
    this.socket.off('data', this.onHandshakeData).off('data', this.onRequestData).off('end', this.onEnd);
    this.condemn();
    return true;
  }

  private offenceOf(offender: string): string {
    return `${offender} ${this.countedAs ?? ''}`;
  }

  // --- Its life ---

  private async live(): Promise<void> {
    let outcome: HandshakeOutcome | { readonly next: 'held' };
    try {
      outcome = this.state === undefined ? await negotiate(this) : await reopen(this, this.state);
    } catch (error) {
      outcome = { next: 'close', reason: this.describeFailure(error) };
      if (error instanceof HandshakeError && this.noteViolation(error.message)) outcome = { next: 'held' };
    }
    this.clock.stop();

    if (outcome.next === 'transmission' && !this.socket.destroyed) {
      this.beginTransmission(outcome);
    } else if (outcome.next === 'close') {
      this.endSocket(outcome.reason);
    }
    await Promise.race([this.socketGone, this.condemned]);
    await this.requestsFinished();
    const { exportName } = this;
    await this.abandon();
    this.tellLeft();
    this.observer.onConnectionClose?.({
      id: this.id,
      peer: this.peer,
      exportName,
      refused: exportName === undefined ? this.refused : undefined,
      reason: this.reason ?? 'the client vanished',
      violations: this.violationCount,
      isCrowdedOut: this.isCrowdedOut,
      bytesRead: this.bytesRead,
      bytesWritten: this.bytesWritten,
      requests: this.requests,
      errors: this.errors,
      durationMs: Math.round(performance.now() - this.startedAt),
    });
  }

  private tellLeft(): void {
    try {
      this.provider.left?.(this.peer);
    } catch (error) {
      this.unexpected(error);
    }
  }

  private beginTransmission(outcome: HandshakeOutcome & { readonly next: 'transmission' }): void {
    const transmission = new Transmission(this, outcome.device, {
      geometry: outcome.geometry,
      negotiated: outcome.negotiated,
    });
    this.transmission = transmission;
    this.progress?.settled();
    this.socket.off('data', this.onHandshakeData);
    this.socket.on('data', this.onRequestData);
    const violations =
      this.offender === undefined ? 0 : this.offenders.countOf(this.offenceOf(this.offender), performance.now());
    this.observer.onConnectionOpen?.({ id: this.id, peer: this.peer, exportName: outcome.exportName, violations });
    const unsent = this.state?.unsent;
    if (unsent !== undefined && unsent.length > 0) transmission.sendFirst(unsent);
    const rest = this.reader.takeRest();
    if (rest.length > 0) transmission.feed(rest);
    this.inPlace?.receive({
      nextBuffer: () => transmission.nextBuffer(),
      received: (length) => {
        if (this.idleTimer !== undefined) this.lastActiveAt = this.time.now();
        transmission.received(length);
      },
    });
    if (this.limits.idleTimeoutMs > 0) {
      this.lastActiveAt = this.time.now();
      this.waitForIdleness(this.limits.idleTimeoutMs);
    }
    if (this.socket.readableEnded) this.onEnd();
    else if (this.isShuttingDown) {
      this.takeNoRequests(transmission);
      this.endWhenIdle('the server is shutting down');
    }
  }

  /** One timer that looks again, instead of one that every request restarts. */
  private waitForIdleness(delayMs: number): void {
    const { idleTimeoutMs } = this.limits;
    this.idleTimer = setTimeout(() => {
      if (this.isClosing) return;
      if (this.transmission?.isBusy === true) this.lastActiveAt = this.time.now();
      const left = this.lastActiveAt + idleTimeoutMs - this.time.now();
      if (left > 0) this.waitForIdleness(left);
      else this.endWhenIdle(`idle for ${idleTimeoutMs} ms`);
    }, delayMs);
  }

  private requestsFinished(): Promise<void> {
    const { transmission } = this;
    if (transmission === undefined) return Promise.resolve();
    return new Promise((resolve) => {
      transmission.onIdle(resolve);
    });
  }

  private endWhenIdle(reason: string): void {
    this.reason ??= reason;
    this.isEnding = true;
    this.transmission?.onIdle(() => this.endSocket(reason));
  }

  /** Everything there was to say is with the socket: close it once it has left, but do not wait for ever. */
  private endSocket(reason: string): void {
    this.reason ??= reason;
    this.isClosing = true;
    this.progress?.leaving();
    this.transmission?.stopListening();
    const { socket } = this;
    if (socket.destroyed || this.lingerTimer !== undefined) return;
    this.lingerTimer = setTimeout(() => socket.destroy(), this.limits.lingerMs);
    // Read on, to the client's own end, and throw it away: a TCP socket that is closed with input unread, or that gets
    // some afterwards, sends a reset, and the client may lose the replies it has not read yet.
    const closeIfBothEnded = (): void => {
      if (socket.writableFinished && socket.readableEnded) socket.destroy();
    };
    socket.off('data', this.onHandshakeData).off('data', this.onRequestData).off('end', this.onEnd);
    socket.on('end', closeIfBothEnded);
    socket.resume();
    socket.end(closeIfBothEnded);
  }

  private describeFailure(error: unknown): string {
    if (error instanceof HandshakeError) return `protocol violation: ${error.message}`;
    return error instanceof Error ? error.message : String(error);
  }

  private readonly onHandshakeData = (chunk: Buffer): void => this.reader.feed(chunk);

  private readonly onRequestData = (chunk: Buffer): void => {
    if (this.idleTimer !== undefined) this.lastActiveAt = this.time.now();
    this.transmission?.feed(chunk);
  };

  private readonly onEnd = (): void => {
    this.progress?.leaving();
    if (this.transmission === undefined) {
      this.reader.fail(new Error(whyLeft(this.refused) ?? 'the client left during the handshake'));
      this.endIfNothingIsTaken();
      return;
    }
    const where = this.transmission.isMidRequest ? 'in the middle of a request' : 'without a disconnect request';
    // Half a connection is enough to be answered: what was asked before it is still finished and sent.
    this.endWhenIdle(`the client left ${where}`);
  };

  /**
   * A client that has shut its side in the handshake may still read what it has asked for. One that is gone takes nothing, and
   * under TLS a write to it never ends.
   */
  private endIfNothingIsTaken(): void {
    const { socket } = this;
    const taken = bytesTakenBySystem(this.transport);
    setTimeout(() => {
      if (socket.destroyed || this.transmission !== undefined || socket.writableLength === 0) return;
      if (bytesTakenBySystem(this.transport) !== taken) this.endIfNothingIsTaken();
      else this.abort('the client left during the handshake, and takes nothing more');
    }, this.limits.lingerMs).unref();
  }

  private readonly onError = (error: Error): void => {
    const left = this.transmission === undefined ? whyLeft(this.refused) : undefined;
    this.reason ??= left ?? `socket error: ${error.message}`;
    this.reader.fail(error);
  };

  private readonly onClose = (): void => {
    this.isClosing = true;
    clearTimeout(this.lingerTimer);
    clearTimeout(this.idleTimer);
    this.reader.fail(new Error('the client vanished'));
    this.transmission?.socketClosed();
  };
}

/**
 * What the system has taken of all that was written to `stream`. A long reply, and a batch of short ones, is one write, which a
 * slow client takes in the course of minutes: that it goes on is not seen by counting writes. Undefined if Node does not say.
 */
function bytesTakenBySystem(stream: Duplex): number | undefined {
  const { _handle: handle } = stream as { _handle?: { bytesWritten?: unknown; writeQueueSize?: unknown } | null };
  if (typeof handle?.bytesWritten !== 'number' || typeof handle.writeQueueSize !== 'number') return undefined;
  return handle.bytesWritten - handle.writeQueueSize;
}

/** Bytes written to `socket` that the system has not taken. */
function unsentBytes(socket: net.Socket): number {
  return socket.bytesWritten - (bytesTakenBySystem(socket) ?? socket.bytesWritten);
}
