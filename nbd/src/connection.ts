/**
 * The life of one connection: handshake, transmission, end. It owns the socket and the opened device, and guarantees
 * that however the connection ends the device is closed exactly once, after its last request, and the close event is
 * sent exactly once after that. It knows nothing of listeners and nothing of the bytes on the wire.
 */

import type { Duplex } from 'node:stream';
import type { BlockDevice, ExportProvider, Peer } from './block-device.js';
import type { BufferPool } from './buffer-pool.js';
import { ByteReader } from './byte-reader.js';
import { HandshakeError, negotiate, type HandshakeHost, type HandshakeOutcome, type OpenExport } from './handshake.js';
import type { Limits } from './limits.js';
import type { ConnectionInfo, ServerObserver } from './observer.js';
import { Transmission, type TransmissionHost } from './transmission.js';

export interface ConnectionOptions {
  readonly id: number;
  readonly socket: Duplex;
  readonly peer: Peer;
  /** Bytes already received on the socket, by whoever accepted it. */
  readonly head: Buffer | undefined;
  readonly provider: ExportProvider;
  readonly limits: Limits;
  readonly observer: ServerObserver;
  readonly pool: BufferPool;
}

export class Connection implements ConnectionInfo, HandshakeHost, TransmissionHost {
  readonly id: number;
  readonly peer: Peer;
  readonly openedAt = Date.now();
  readonly socket: Duplex;
  readonly provider: ExportProvider;
  readonly limits: Limits;
  readonly observer: ServerObserver;
  readonly pool: BufferPool;
  readonly reader: ByteReader;
  isShuttingDown = false;
  exportName: string | undefined;
  /** Resolves when the connection is over and its device closed. Never fails. */
  readonly over: Promise<void>;

  private transmission: Transmission | undefined;
  private device: BlockDevice | undefined;
  private isClosing = false;
  private reason: string | undefined;
  private lingerTimer: NodeJS.Timeout | undefined;
  private readonly socketGone: Promise<void>;

  constructor(options: ConnectionOptions) {
    this.id = options.id;
    this.peer = options.peer;
    this.socket = options.socket;
    this.provider = options.provider;
    this.limits = options.limits;
    this.observer = options.observer;
    this.pool = options.pool;
    this.reader = new ByteReader(this.socket);
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
    if (options.head !== undefined && options.head.length > 0) this.reader.feed(options.head);
    if (this.socket.destroyed) this.reader.fail(new Error('the socket was closed before it was served'));
    this.over = this.live();
  }

  get phase(): ConnectionInfo['phase'] {
    if (this.isClosing) return 'closing';
    return this.transmission === undefined ? 'handshake' : 'transmission';
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

  /** Finish what is in flight, refuse what comes, then close. Returns at once; see `over`. */
  shutdown(): void {
    if (this.isShuttingDown) return;
    this.isShuttingDown = true;
    const reason = 'the server is shutting down';
    if (this.transmission === undefined) {
      // An option being answered is answered; a client that has nothing pending is not waited for.
      this.reader.fail(new Error(reason));
      return;
    }
    this.transmission.refuseNewRequests();
    this.endWhenIdle(reason);
  }

  /** Close the socket now. The device is closed when its last request has finished. */
  abort(reason: string): void {
    this.reason ??= reason;
    this.isClosing = true;
    this.reader.fail(new Error(reason));
    this.socket.destroy();
  }

  // --- For the handshake ---

  send(bytes: Buffer): Promise<void> {
    return new Promise((resolve, reject) => {
      this.socket.write(bytes, (error) => (error ? reject(error) : resolve()));
    });
  }

  async open(name: string): Promise<OpenExport> {
    const opened = await this.provider.open(name, this.peer);
    this.device = opened.device;
    this.exportName = opened.info.name;
    return opened;
  }

  async abandon(): Promise<void> {
    const { device } = this;
    this.device = undefined;
    try {
      await device?.close();
    } catch (error) {
      this.unexpected(error);
    }
    this.exportName = undefined;
  }

  unexpected(error: unknown): void {
    this.observer.onDeviceError?.(error, { id: this.id, exportName: this.exportName });
  }

  // --- For the transmission ---

  disconnectRequested(): void {
    this.endWhenIdle('the client disconnected');
  }

  protocolViolated(reason: string): void {
    this.abort(`protocol violation: ${reason}`);
  }

  // --- Its life ---

  private async live(): Promise<void> {
    const handshakeTimer = setTimeout(
      () => this.abort(`no export chosen within ${this.limits.handshakeTimeoutMs} ms`),
      this.limits.handshakeTimeoutMs,
    );
    let outcome: HandshakeOutcome;
    try {
      outcome = await negotiate(this);
    } catch (error) {
      outcome = { next: 'close', reason: this.describeFailure(error) };
    }
    clearTimeout(handshakeTimer);

    if (outcome.next === 'transmission' && !this.socket.destroyed) {
      this.beginTransmission(outcome);
    } else if (outcome.next === 'close') {
      this.endSocket(outcome.reason);
    }
    await this.socketGone;
    await this.requestsFinished();
    const { exportName } = this;
    await this.abandon();
    this.observer.onConnectionClose?.({
      id: this.id,
      peer: this.peer,
      exportName,
      reason: this.reason ?? 'the client vanished',
      bytesRead: this.bytesRead,
      bytesWritten: this.bytesWritten,
      requests: this.requests,
      errors: this.errors,
      durationMs: Date.now() - this.openedAt,
    });
  }

  private beginTransmission(outcome: HandshakeOutcome & { readonly next: 'transmission' }): void {
    const transmission = new Transmission(this, outcome.device, outcome.negotiated);
    this.transmission = transmission;
    this.socket.off('data', this.onHandshakeData);
    this.socket.on('data', this.onRequestData);
    this.observer.onConnectionOpen?.({ id: this.id, peer: this.peer, exportName: outcome.exportName });
    const rest = this.reader.takeRest();
    if (rest.length > 0) transmission.feed(rest);
    if (this.socket.readableEnded) this.onEnd();
    else if (this.isShuttingDown) {
      transmission.refuseNewRequests();
      this.endWhenIdle('the server is shutting down');
    }
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
    this.transmission?.onIdle(() => this.endSocket(reason));
  }

  /** Everything there was to say is with the socket: close it once it has left, but do not wait for ever. */
  private endSocket(reason: string): void {
    this.reason ??= reason;
    this.isClosing = true;
    this.transmission?.stopListening();
    if (this.socket.destroyed || this.lingerTimer !== undefined) return;
    this.lingerTimer = setTimeout(() => this.socket.destroy(), this.limits.lingerMs);
    // The callback comes when the last byte is with the kernel.
    this.socket.end(() => this.socket.destroy());
  }

  private describeFailure(error: unknown): string {
    if (error instanceof HandshakeError) return `protocol violation: ${error.message}`;
    return error instanceof Error ? error.message : String(error);
  }

  private readonly onHandshakeData = (chunk: Buffer): void => this.reader.feed(chunk);

  private readonly onRequestData = (chunk: Buffer): void => this.transmission?.feed(chunk);

  private readonly onEnd = (): void => {
    if (this.transmission === undefined) {
      this.reader.fail(new Error('the client left during the handshake'));
      return;
    }
    const where = this.transmission.isMidRequest ? 'in the middle of a request' : 'without a disconnect request';
    // Half a connection is enough to be answered: what was asked before it is still finished and sent.
    this.endWhenIdle(`the client left ${where}`);
  };

  private readonly onError = (error: Error): void => {
    this.reason ??= `socket error: ${error.message}`;
    this.reader.fail(error);
  };

  private readonly onClose = (): void => {
    this.isClosing = true;
    clearTimeout(this.lingerTimer);
    this.reader.fail(new Error('the client vanished'));
    this.transmission?.socketClosed();
  };
}
