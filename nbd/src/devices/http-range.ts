/**
 * A read-only disk that is a resource on an HTTP server: each read is a request for a range. It owns how many requests run at once
 * and how often one is repeated; http-request.ts checks each answer.
 */

import { DeviceError, type CompleteDevice } from '../block-device.js';
import { completeDevice } from '../device.js';
import { onAbort } from '../on-abort.js';
import { requestRange, TransientFailure, type Source, type Version } from './http-request.js';

/** A request costs a round trip: clients should ask for this much at once, bytes. */
const PREFERRED_BLOCK_SIZE = 65536;
/** The largest delay of setTimeout, milliseconds: it takes a larger one for 1. */
const MAX_DELAY_MS = 2 ** 31 - 1;

/** Options of `httpRangeDevice`. */
export interface HttpRangeOptions {
  /** Sent with each request: authorization, for example. */
  readonly headers?: ConstructorParameters<typeof Headers>[0];
  /** In the place of the global `fetch`; it must obey `signal`, or what it does continues unheard. */
  readonly fetch?: typeof fetch;
  /** A request that brings no byte for so long has failed, milliseconds. Default 30000. */
  readonly timeoutMs?: number;
  /** How often a request is repeated after a broken connection, a time-out, or status 408, 429 or 5xx. Default 2. */
  readonly retries?: number;
  /**
   * The pause before the first repetition, milliseconds; each further one is twice as long, and as long as the server asks for
   * (Retry-After). If that is longer than `timeoutMs`, the read fails at once. Default 200.
   */
  readonly retryDelayMs?: number;
  /** Requests at once; others wait. Default 8. */
  readonly maxParallel?: number;
  /** Gives up the opening. */
  readonly signal?: AbortSignal;
}

/**
 * The resource at `url` as a read-only disk. One request at once finds the size; the server must answer ranges (status 206).
 * Redirections are followed at each request. A user and password in the URL are sent as Basic authorization. If the resource
 * changes (ETag, Last-Modified, size) while the device is open, all reads of what is new fail with EIO: a client never gets
 * parts of two versions.
 *
 * Errors: DeviceError EIO with what the server has answered; a read that fails has the same.
 */
export async function httpRangeDevice(url: string | URL, options: HttpRangeOptions = {}): Promise<CompleteDevice> {
  const { timeoutMs = 30_000, retries = 2, retryDelayMs = 200, maxParallel = 8 } = options;
  const target = new URL(url);
  if (!/^https?:$/.test(target.protocol)) throw new RangeError(`${target.protocol} is not http: or https:`);
  for (const [name, value, least] of [
    ['timeoutMs', timeoutMs, 1],
    ['retries', retries, 0],
    ['retryDelayMs', retryDelayMs, 0],
    ['maxParallel', maxParallel, 1],
  ] as const) {
    if (!(value >= least && value <= MAX_DELAY_MS))
      throw new RangeError(`${name} ${value} is not from ${least} to 2^31-1`);
  }
  const headers = new Headers(options.headers);
  const { username, password } = target;
  if ((username !== '' || password !== '') && !headers.has('authorization')) {
    const credentials = `${decodeURIComponent(username)}:${decodeURIComponent(password)}`;
    headers.set('authorization', `Basic ${Buffer.from(credentials).toString('base64')}`);
  }
  // fetch refuses credentials in URLs, with a message that has them.
  Object.assign(target, { username: '', password: '' });
  const source: Source = {
    url: target.href,
    label: target.origin + target.pathname,
    headers,
    fetch: options.fetch ?? fetch,
    timeoutMs,
  };
  const slots = new Slots(maxParallel);

  const read = async (
    offset: number,
    into: Buffer,
    signal: AbortSignal | undefined,
    expected: Version | undefined,
  ): Promise<Version> => {
    await slots.take();
    try {
      for (let attempt = 0; ; attempt++) {
        let pauseMs: number;
        try {
          return await requestRange(source, offset, into, expected, signal);
        } catch (error) {
          if (!(error instanceof TransientFailure)) throw error;
          const { message, retryAfterMs } = error;
          const isTooLong = retryAfterMs > timeoutMs;
          if (attempt >= retries || isTooLong) {
            const reason = isTooLong
              ? `${message}, to be asked again after ${Math.ceil(retryAfterMs / 1000)} s`
              : message;
            throw new DeviceError('EIO', reason, { cause: error });
          }
          pauseMs = Math.max(retryDelayMs * 2 ** attempt, retryAfterMs);
        }
        await pause(pauseMs, signal);
      }
    } finally {
      slots.give();
    }
  };

  const version = await read(0, Buffer.alloc(1), options.signal, undefined);
  return completeDevice({
    size: version.size,
    readOnly: true,
    multiConn: true,
    preferredBlockSize: PREFERRED_BLOCK_SIZE,
    fillsBuffer: true,
    read: async (offset, into, signal) => {
      if (into.length > 0) await read(offset, into, signal, version);
    },
  });
}

/** So many at once; the others wait in their order. */
class Slots {
  #free: number;
  readonly #waiting: (() => void)[] = [];

  constructor(count: number) {
    this.#free = count;
  }

  async take(): Promise<void> {
    if (this.#free > 0) this.#free--;
    else await new Promise<void>((resolve) => this.#waiting.push(resolve));
  }

  give(): void {
    const next = this.#waiting.shift();
    if (next === undefined) this.#free++;
    else next();
  }
}

/** Ends early when `signal` is aborted: the next request sees it. */
function pause(ms: number, signal: AbortSignal | undefined): Promise<void> {
  return new Promise((resolve) => {
    const timer = setTimeout(
      () => {
        ended();
        resolve();
      },
      Math.min(ms, MAX_DELAY_MS),
    );
    const ended = onAbort(signal, () => {
      clearTimeout(timer);
      resolve();
    });
  });
}
