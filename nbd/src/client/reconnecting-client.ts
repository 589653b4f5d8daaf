/**
 * A client that survives the loss of its connection: it connects again and repeats what had no answer. It owns that loop, the
 * check that the export is still the same, and the rule about writes that were not flushed; each connection is an NbdClient.
 *
 * Repeating is safe because every NBD request says absolutely what is to be where. Two things cannot be known after a loss:
 *
 * - Writes that were answered, but not followed by a successful flush, may be gone if the server's machine has crashed. The
 *   client cannot tell, so it never hides it: the next flush fails with FLUSH_IN_DOUBT, as fsync reports a lost write once.
 *   The caller then writes again what it has written since its last flush, or gives up. Writes with FUA are not affected.
 * - A server that has not noticed the loss may still carry out requests of the old connection, after those of the new one.
 *   Use it with servers that end a connection's requests before its export is opened again, or are restarted.
 */

import { abortError, unlessAborted } from './aborting.js';
import { checkFunction, checkObject } from '../kinds.js';
import { asError, checkedCount, checkedMs, checkSignal, checkText, checkTexts } from './argument-checks.js';
import { NbdClientError } from './client-error.js';
import type { ConnectionOptions, ServerAddress } from './client-options.js';
import type { ExportDetails } from './export-details.js';
import {
  NbdClient,
  type BlockStatusOptions,
  type CallOptions,
  type ReadOptions,
  type WriteOptions,
  type ZeroOptions,
} from './nbd-client.js';
import type { Extent } from './reply-reader.js';
import { changedRanges, wholeExtents, type ChangedRange, type StatusOptions } from './status-iteration.js';

const DEFAULT_ATTEMPTS = 60;
const DEFAULT_DELAY_MS = 100;
const DEFAULT_MAX_DELAY_MS = 5_000;

/** How often and when a lost connection is made again. */
export interface ReconnectOptions {
  /** Attempts after each loss; by default 60, which is about five minutes. `Infinity`: until disconnect(). */
  readonly attempts?: number;
  /** Before the first attempt, milliseconds; by default 100. Doubled for each further one, and varied by up to a half. */
  readonly delayMs?: number;
  /** The longest delay, milliseconds; by default 5 s. */
  readonly maxDelayMs?: number;
  /** Called when the connection is lost. What it throws becomes a warning of the process. */
  readonly onLost?: (reason: NbdClientError) => void;
  /** Called when there is a new connection. What it throws becomes a warning of the process. */
  readonly onReconnected?: () => void;
}

/** The options of ReconnectingClient.connect. */
export type ReconnectingClientOptions = Exclude<ServerAddress, { readonly socket: unknown }> &
  ConnectionOptions & {
    /** By default the one of the URI, or ''. */
    readonly exportName?: string;
    /** Meta contexts to be selected, `[]` for none; by default `base:allocation`, if the server has it. */
    readonly contexts?: readonly string[];
    /** How to reconnect. */
    readonly reconnect?: ReconnectOptions;
  };

/** What must be the same after a reconnect. Payload sizes and descriptions may differ. */
const FIXED = [
  'size',
  'readOnly',
  'canFlush',
  'canFua',
  'canTrim',
  'canZero',
  'canFastZero',
  'canCache',
  'multiConn',
  'minimumBlockSize',
] as const satisfies readonly (keyof ExportDetails)[];

/**
 * After these another attempt is of no use. TLS_FAILED is not among them: a server that stops during the handshake looks like it.
 * Neither are UNKNOWN_EXPORT and POLICY: a server that has just started may not have its exports yet, or believe the old
 * connection alive.
 */
const FINAL_CODES: ReadonlySet<string> = new Set([
  'PROTOCOL',
  'TLS_REQUIRED',
  'UNSUPPORTED',
  'INVALID',
  'EXPORT_CHANGED',
]);

/**
 * An open export that stays open over lost connections. Requests without an answer are repeated on the next connection; the
 * caller only notices that they take longer. An error that the server answers is not repeated, except ESHUTDOWN: the server has
 * not done the request and is about to end the connection, so this leaves it and repeats the request on the next one. A
 * time-out (`timeoutMs`) counts as a loss; a violation of the protocol does not, it is the end.
 *
 * After a loss the next flush() fails once with NbdClientError FLUSH_IN_DOUBT if writes (or zeros, or trims) without FUA had
 * been answered and not been flushed. They may be lost, because the server may have crashed: write again what was written since the
 * last successful flush. Flushes that were pending at the loss fail in the same way.
 *
 * If the export is not the same any more (size, flags, block size, contexts) everything fails with EXPORT_CHANGED.
 */
export class ReconnectingClient {
  readonly #options: ReconnectingClientOptions;
  readonly #attempts: number;
  readonly #delayMs: number;
  readonly #maxDelayMs: number;
  /** Ends attempts and delays when the caller leaves. */
  readonly #stop = new AbortController();
  #client: NbdClient | undefined;
  /** The next connection, while there is none. */
  #next: Promise<NbdClient> | undefined;
  #end: NbdClientError | undefined;
  #resolveClosed: (reason: NbdClientError) => void = () => undefined;
  #details: ExportDetails | undefined;
  #contexts: readonly string[] = [];
  /** Changes without FUA that were answered on this connection, and how many of them a flush has made durable. */
  #answered = 0;
  #durable = 0;
  /** Losses that left answered changes in doubt, and how many of them a flush has reported. */
  #doubts = 0;
  #told = 0;

  /** Resolves with the reason when the client has ended: it was disconnected, or could not reconnect. It never rejects. */
  readonly closed: Promise<NbdClientError>;

  private constructor(options: ReconnectingClientOptions) {
    checkObject(options, 'the options of connect()');
    const { reconnect = {} } = options;
    checkObject(reconnect, 'reconnect');
    checkFunction(reconnect.onLost, 'reconnect.onLost');
    checkFunction(reconnect.onReconnected, 'reconnect.onReconnected');
    if ('socket' in options) throw new TypeError('a client that reconnects needs an address, and not a socket');
    this.#options = options;
    this.#attempts = checkedCount(reconnect.attempts, 'reconnect.attempts', DEFAULT_ATTEMPTS, 0);
    this.#delayMs = checkedMs(reconnect.delayMs, 'reconnect.delayMs', DEFAULT_DELAY_MS);
    this.#maxDelayMs = checkedMs(reconnect.maxDelayMs, 'reconnect.maxDelayMs', DEFAULT_MAX_DELAY_MS);
    if (options.exportName !== undefined) checkText(options.exportName, 'exportName');
    if (options.contexts !== undefined) checkTexts(options.contexts, 'contexts');
    this.closed = new Promise((resolve) => (this.#resolveClosed = resolve));
  }

  /**
   * Connect and open the export. This first time nothing is repeated: a wrong address or name fails at once.
   * Errors: those of NbdClient.connect, selectContexts and go.
   */
  static async connect(options: ReconnectingClientOptions): Promise<ReconnectingClient> {
    const client = new ReconnectingClient(options);
    const first = await client.#open(options.signal);
    client.#details = first.details;
    client.#contexts = first.contexts;
    client.#use(first);
    return client;
  }

  /** What the server announced when the export was first opened. */
  get details(): ExportDetails | undefined {
    return this.#details;
  }

  /** The meta contexts that blockStatus(), extents() and changed() can query. */
  get contexts(): readonly string[] {
    return this.#contexts;
  }

  /** Whether there is a connection now. */
  get isConnected(): boolean {
    return this.#client !== undefined;
  }

  /** As NbdClient.read. */
  read(offset: number, length: number, options?: ReadOptions): Promise<Buffer> {
    return this.#run('read', options, (client) => client.read(offset, length, options));
  }

  /** As NbdClient.readInto; `onHole` may be called again for a read that is repeated. */
  readInto(offset: number, into: Uint8Array, options?: ReadOptions): Promise<void> {
    return this.#run('read', options, (client) => client.readInto(offset, into, options));
  }

  /** As NbdClient.write. */
  write(offset: number, data: Uint8Array, options?: WriteOptions): Promise<void> {
    return this.#change('write', options, (client) => client.write(offset, data, options));
  }

  /** As NbdClient.zero. */
  zero(offset: number, length: number, options?: ZeroOptions): Promise<void> {
    return this.#change('zero', options, (client) => client.zero(offset, length, options));
  }

  /** As NbdClient.trim. */
  trim(offset: number, length: number, options?: WriteOptions): Promise<void> {
    return this.#change('trim', options, (client) => client.trim(offset, length, options));
  }

  /** As NbdClient.flush. Errors: also FLUSH_IN_DOUBT, see the class. */
  async flush(options?: CallOptions): Promise<void> {
    const toldBefore = this.#told;
    await this.#run('flush', options, async (client) => {
      this.#refuseInDoubt(toldBefore);
      const covered = this.#answered;
      await client.flush(options);
      // The connection may have been lost, and another one be in use, before this continues.
      if (client === this.#client) this.#durable = Math.max(this.#durable, covered);
      this.#refuseInDoubt(toldBefore);
    });
  }

  /** As NbdClient.cache. */
  cache(offset: number, length: number, options?: CallOptions): Promise<void> {
    return this.#run('cache', options, (client) => client.cache(offset, length, options));
  }

  /** As NbdClient.blockStatus. */
  blockStatus(context: string, offset: number, length: number, options?: BlockStatusOptions): Promise<Extent[]> {
    return this.#run('block status', options, (client) => client.blockStatus(context, offset, length, options));
  }

  /** As NbdClient.extents. */
  extents(context?: string, options?: StatusOptions): AsyncGenerator<Extent, void, undefined> {
    return wholeExtents(this, context, options);
  }

  /** As NbdClient.changed. */
  changed(context: string, options?: StatusOptions): AsyncGenerator<ChangedRange, void, undefined> {
    return changedRanges(this, context, options);
  }

  /**
   * As NbdClient.disconnect. While there is no connection it ends the attempts at once, and what waits for one fails with
   * CLOSED.
   */
  async disconnect(options?: CallOptions): Promise<void> {
    checkSignal(options?.signal);
    const client = this.#client;
    this.#finish(new NbdClientError('CLOSED', 'this client has disconnected'), client);
    await client?.disconnect(options);
  }

  /** Close the connection at once, and reconnect no more. */
  destroy(): void {
    const client = this.#client;
    this.#finish(new NbdClientError('CLOSED', 'this client has closed the connection'), client);
    client?.destroy();
  }

  /** disconnect(), for `await using`. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.disconnect();
  }

  // --- Requests ---

  /** Do `work` with a connection, and again with the next one as long as it fails because the connection is lost. */
  async #run<T>(what: string, options: CallOptions | undefined, work: (client: NbdClient) => Promise<T>): Promise<T> {
    const signal = options?.signal;
    checkSignal(signal);
    for (;;) {
      if (this.#end !== undefined) throw this.#end;
      if (signal?.aborted) throw abortError(what, signal);
      const client = this.#client ?? (await unlessAborted(this.#connection(), signal, what));
      try {
        return await work(client);
      } catch (error) {
        if (!isLoss(error)) throw error;
        this.#lose(client, error);
      }
    }
  }

  /** A request that changes the disk. */
  #change(what: string, options: WriteOptions | undefined, work: (client: NbdClient) => Promise<void>): Promise<void> {
    return this.#run(what, options, async (client) => {
      await work(client);
      if (options?.fua) return;
      if (client === this.#client) this.#answered++;
      // Answered on a connection that this is leaving: no flush of the next one is known to cover it.
      else this.#doubt();
    });
  }

  #refuseInDoubt(toldBefore: number): void {
    if (this.#doubts <= toldBefore) return;
    this.#told = this.#doubts;
    throw new NbdClientError(
      'FLUSH_IN_DOUBT',
      'the connection was lost, and writes that were answered since the last flush may be lost too: write them again',
    );
  }

  #doubt(): void {
    // Without flush a server promises nothing that could be lost.
    if (this.#details?.canFlush === true) this.#doubts++;
  }

  // --- Connections ---

  #connection(): Promise<NbdClient> {
    return this.#next ?? Promise.reject(this.#end ?? new NbdClientError('CLOSED', 'there is no connection'));
  }

  #use(client: NbdClient): void {
    this.#client = client;
    this.#next = undefined;
    void client.closed.then((reason) => this.#lose(client, reason));
  }

  /** `client` is of no use any more: find the next connection, once. */
  #lose(client: NbdClient, reason: NbdClientError): void {
    if (this.#client !== client) return;
    this.#client = undefined;
    if (this.#answered > this.#durable) this.#doubt();
    this.#answered = this.#durable = 0;
    if (this.#end !== undefined) return;
    const next = this.#reconnect(client, reason);
    this.#next = next;
    // Whoever waits for it has the error.
    next.catch(() => undefined);
    this.#tell(() => this.#options.reconnect?.onLost?.(reason));
  }

  /** Errors: NbdClientError, which everything then fails with. */
  async #reconnect(old: NbdClient, reason: NbdClientError): Promise<NbdClient> {
    try {
      // After ESHUTDOWN it is still there, and other requests may get their answers.
      if (reason.code === 'ESHUTDOWN') await unlessAborted(old.disconnect(), this.#stop.signal, 'disconnect()');
      old.destroy();
      const client = FINAL_CODES.has(reason.code) ? undefined : await this.#attempt();
      if (client === undefined) throw reason;
      this.#use(client);
      this.#tell(() => this.#options.reconnect?.onReconnected?.());
      return client;
    } catch (error) {
      throw this.#finish(
        error instanceof NbdClientError ? error : new NbdClientError('CLOSED', asError(error).message),
      );
    }
  }

  async #attempt(): Promise<NbdClient> {
    let delayMs = this.#delayMs;
    let last: unknown;
    for (let attempt = 0; attempt < this.#attempts; attempt++) {
      // Varied, so that all clients of a server do not return to it in the same moment.
      await this.#pause(delayMs * (0.5 + Math.random() / 2));
      delayMs = Math.min(delayMs * 2, this.#maxDelayMs);
      try {
        return await this.#open(this.#stop.signal);
      } catch (error) {
        if (!(error instanceof NbdClientError) || FINAL_CODES.has(error.code) || this.#stop.signal.aborted) throw error;
        last = error;
      }
    }
    const why = last === undefined ? '' : `; the last one: ${asError(last).message}`;
    const attempts = `${this.#attempts} attempts to reconnect have failed`;
    throw new NbdClientError('CLOSED', `the connection was lost, and ${attempts}${why}`, { cause: last });
  }

  async #open(signal: AbortSignal | undefined): Promise<NbdClient> {
    const { exportName, contexts } = this.#options;
    const client = await NbdClient.connect({ ...this.#options, signal });
    try {
      if (contexts !== undefined) {
        await client.selectContexts(exportName ?? client.exportName, contexts, { signal });
      }
      const details = await client.go(exportName, { signal });
      this.#refuseChanges(details, client.contexts);
      return client;
    } catch (error) {
      client.destroy();
      throw error;
    }
  }

  #refuseChanges(details: ExportDetails, contexts: readonly string[]): void {
    const before = this.#details;
    if (before === undefined) return;
    const changes = FIXED.filter((name) => details[name] !== before[name]).map(
      (name) => `${name} was ${before[name]} and is ${details[name]}`,
    );
    for (const name of this.#contexts) {
      if (!contexts.includes(name)) changes.push(`the context ${name} is missing`);
    }
    if (changes.length > 0) {
      const what = `after the reconnect the export is not the same: ${changes.join(', ')}`;
      throw new NbdClientError('EXPORT_CHANGED', what);
    }
  }

  #pause(delayMs: number): Promise<void> {
    const { signal } = this.#stop;
    let timer: NodeJS.Timeout | undefined;
    const over = new Promise<void>((resolve) => (timer = setTimeout(resolve, delayMs)));
    return unlessAborted(over, signal, 'reconnecting', () => clearTimeout(timer));
  }

  /** The end: everything fails with `reason`, or what came before. `closed` follows the connection, if there is one. */
  #finish(reason: NbdClientError, client?: NbdClient): NbdClientError {
    if (this.#end !== undefined) return this.#end;
    this.#end = reason;
    this.#stop.abort(reason);
    if (client === undefined) this.#resolveClosed(reason);
    else void client.closed.then(() => this.#resolveClosed(reason));
    return reason;
  }

  /** Call a callback of the user. */
  #tell(callback: () => void): void {
    try {
      callback();
    } catch (error) {
      process.emitWarning(asError(error));
    }
  }
}

function isLoss(error: unknown): error is NbdClientError {
  if (!(error instanceof NbdClientError)) return false;
  return error.code === 'CLOSED' || error.code === 'TIMED_OUT' || error.code === 'ESHUTDOWN';
}
