/**
 * One request for a range of an HTTP resource (RFC 9110, "Range Requests"), and everything in its answer that is checked before
 * its bytes are believed. It owns the time-out and the cancelling; it never asks twice.
 */

import { DeviceError } from '../block-device.js';
import { onAbort } from '../on-abort.js';

/** Where the bytes come from. */
export interface Source {
  readonly url: string;
  /** The URL for messages: clients see them, so without credentials and query. */
  readonly label: string;
  readonly headers: Headers;
  readonly fetch: typeof fetch;
  /** An answer that brings nothing for so long is given up, milliseconds. */
  readonly timeoutMs: number;
}

/** What tells one version of the resource from another. */
export interface Version {
  readonly size: number;
  readonly etag: string | null;
  readonly lastModified: string | null;
}

/** A failure that may be over at the next request. */
export class TransientFailure extends Error {
  /** The server does not want to be asked again sooner (Retry-After), milliseconds. */
  readonly retryAfterMs: number;

  constructor(
    message: string,
    { retryAfterMs = 0, ...options }: ErrorOptions & { readonly retryAfterMs?: number } = {},
  ) {
    super(message, options);
    this.retryAfterMs = retryAfterMs;
  }
}

/**
 * Fill `into` with the bytes at `offset`. `expected`: the version that it must be; undefined for the first request, for which a
 * resource without a byte is a version, too. Errors: TransientFailure; DeviceError: asking again is no use.
 */
export async function requestRange(
  source: Source,
  offset: number,
  into: Buffer,
  expected: Version | undefined,
  signal: AbortSignal | undefined,
): Promise<Version> {
  const attempt = new Attempt(source, signal);
  try {
    const headers = new Headers(source.headers);
    headers.set('range', `bytes=${offset}-${offset + into.length - 1}`);
    // Ranges of something compressed would be ranges of what the client has never seen.
    headers.set('accept-encoding', 'identity');
    const validator = validatorOf(expected);
    if (validator !== null) headers.set('if-range', validator);
    const response = await attempt.within(source.fetch(source.url, { headers, signal: attempt.signal }));
    const version = checkedVersion(source, response, offset, into.length, expected);
    if (version.size > 0) await fill(source, attempt, response, into);
    return version;
  } catch (error) {
    if (error instanceof DeviceError || error instanceof TransientFailure) throw error;
    if (signal?.aborted === true) throw new DeviceError('ESHUTDOWN', 'the client has gone', { cause: error });
    throw new TransientFailure(`${source.label}: ${attempt.timedOut ?? reasonOf(error)}`, { cause: error });
  } finally {
    attempt.end();
  }
}

/** The life of a request: it ends with its answer, when `signal` is aborted, or after a time without a byte. */
class Attempt {
  timedOut: string | undefined;
  readonly #controller = new AbortController();
  readonly #aborted: Promise<never>;
  readonly #timer: NodeJS.Timeout;
  readonly #forgetCaller: () => void;

  constructor({ timeoutMs }: Source, caller: AbortSignal | undefined) {
    const { signal } = this.#controller;
    this.#aborted = new Promise((_, reject) => {
      signal.addEventListener('abort', () => reject(new Error('given up')), { once: true });
    });
    this.#aborted.catch(() => undefined);
    this.#timer = setTimeout(() => {
      this.timedOut = `no answer within ${timeoutMs} ms`;
      this.#controller.abort();
    }, timeoutMs);
    this.#forgetCaller = onAbort(caller, () => this.#controller.abort());
  }

  get signal(): AbortSignal {
    return this.#controller.signal;
  }

  /** `promise`, or the end of this attempt: a `fetch` of the caller may not obey its signal. */
  async within<T>(promise: Promise<T>): Promise<T> {
    const result = await Promise.race([promise, this.#aborted]);
    this.#timer.refresh();
    return result;
  }

  /** Whatever is not read yet is cancelled, with its connection. */
  end(): void {
    clearTimeout(this.#timer);
    this.#forgetCaller();
    this.#controller.abort();
  }
}

/** What If-Range may have: a strong entity tag, or else a date. */
function validatorOf(expected: Version | undefined): string | null {
  if (expected === undefined) return null;
  const { etag, lastModified } = expected;
  return etag !== null && !etag.startsWith('W/') ? etag : lastModified;
}

/** Errors: as requestRange. */
function checkedVersion(
  { label }: Source,
  response: Response,
  offset: number,
  length: number,
  expected: Version | undefined,
): Version {
  const { status, headers } = response;
  const etag = headers.get('etag');
  const lastModified = headers.get('last-modified');
  const range = headers.get('content-range') ?? '';
  const isOther =
    expected !== undefined && (differ(etag, expected.etag) || differ(lastModified, expected.lastModified));
  const changed = `${label} has changed since it was opened`;
  if (status === 416) {
    if (expected !== undefined) throw new DeviceError('EIO', changed);
    if (/^bytes \*\/0$/i.test(range)) return { size: 0, etag, lastModified };
  }
  if (status >= 500 || status === 429 || status === 408) {
    throw new TransientFailure(`${label}: status ${status}`, { retryAfterMs: retryAfterOf(headers) });
  }
  if (status === 200) {
    throw new DeviceError('EIO', isOther ? changed : `${label}: the server does not answer ranges, but with all of it`);
  }
  if (status !== 206) throw new DeviceError('EIO', `${label}: status ${status}`);
  const [, first, last, size] = /^bytes (\d+)-(\d+)\/(\d+)$/i.exec(range) ?? [];
  const total = Number(size);
  if (first === undefined || !Number.isSafeInteger(total)) {
    throw new DeviceError('EIO', `${label}: Content-Range is ${JSON.stringify(range)}; it must have range and size`);
  }
  if (isOther || (expected !== undefined && total !== expected.size)) throw new DeviceError('EIO', changed);
  const end = offset + length;
  if (Number(first) !== offset || Number(last) !== end - 1 || total < end) {
    throw new DeviceError('EIO', `${label}: asked for ${length} bytes at ${offset}, the server sends ${range}`);
  }
  const encoding = headers.get('content-encoding');
  if (encoding !== null && !/^(?:identity)?$/i.test(encoding)) {
    throw new DeviceError('EIO', `${label}: the server sends ${encoding}, a range of which is no range of the data`);
  }
  return { size: total, etag, lastModified };
}

/** Milliseconds from now, of seconds or a date, by the server's clock; 0 if there is none. */
function retryAfterOf(headers: Headers): number {
  const value = headers.get('retry-after') ?? '';
  const ms = /^\d+$/.test(value) ? Number(value) * 1000 : Date.parse(value) - Date.parse(headers.get('date') ?? '');
  return ms > 0 ? ms : 0;
}

/** A 206 need not repeat what If-Range has confirmed. */
function differ(found: string | null, expected: string | null): boolean {
  return found !== null && expected !== null && found !== expected;
}

/** Errors: DeviceError if there are more or fewer bytes. */
async function fill({ label }: Source, attempt: Attempt, response: Response, into: Buffer): Promise<void> {
  const reader: ReadableStreamDefaultReader<Uint8Array> | undefined = response.body?.getReader();
  let done = 0;
  for (;;) {
    const part = await (reader && attempt.within(reader.read()));
    if (part === undefined || part.done) break;
    if (part.value.length > into.length - done) throw wrongLength(label, 'more than', into.length);
    into.set(part.value, done);
    done += part.value.length;
  }
  if (done < into.length) throw wrongLength(label, `${done} bytes of`, into.length);
}

function wrongLength(label: string, sent: string, asked: number): DeviceError {
  return new DeviceError('EIO', `${label}: the server sent ${sent} the ${asked} bytes that it has announced`);
}

/** fetch says "fetch failed", and its cause says why. */
function reasonOf(error: unknown): string {
  const { message, cause } = error as { readonly message?: unknown; readonly cause?: { readonly message?: unknown } };
  return String(cause?.message ?? message ?? error);
}
