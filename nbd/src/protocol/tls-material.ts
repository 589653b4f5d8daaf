/**
 * The server's keys as the program gives them: what it may give, and what happens if it gives something else. Owns the calls of
 * `material` and `pskKey`: whatever they throw, return or never settle, one connection ends with a reason that names them. It
 * speaks no TLS.
 */

import tls from 'node:tls';
import type { ClientHello } from './client-hello.js';
import type { FirstFlight } from './first-flight.js';
import { decodeUtf8 } from './x509.js';
import { kindOf } from '../kinds.js';

/** 'on': a client may ask for TLS (SELECTIVETLS without TLS-only exports); 'require': it must (FORCEDTLS). */
export type TlsMode = 'off' | 'on' | 'require';

/** The server's keys, and what it requires of clients. At least one of `certificate` and `pskKey`. */
export interface TlsMaterial {
  /** PEM: the server's certificate (with its chain) and private key. */
  readonly certificate?: { readonly chain: string | Uint8Array; readonly key: string | Uint8Array };
  /** PEM: the authorities that sign client certificates. */
  readonly authorities?: string | Uint8Array;
  /** PEM: revoked client certificates. */
  readonly revocations?: string | Uint8Array;
  /** A client without a pre-shared key must show a certificate signed by `authorities`. */
  readonly verifyPeer: boolean;
  /**
   * The key of a user, 1 to 512 bytes; undefined or null if there is no such user. `user` is what a stranger has sent: up to 256
   * bytes, nothing of it is proven yet.
   *
   * A promise is waited for up to `limits.openTimeoutMs`. It works with clients of TLS 1.3 only, which are most: they say in
   * their first message whose key they have. A client that uses a key in TLS 1.2 is refused then, as is the fifth user that a
   * client names in one handshake. To serve TLS 1.2, return the key itself.
   *
   * What it throws, and anything else that it returns, ends the connection and is reported as an error of the program.
   */
  readonly pskKey?: (user: string) => MaybePromise<Uint8Array | undefined | null>;
}

/** How a server speaks TLS. */
export interface ServerTls {
  readonly mode: TlsMode;
  /**
   * Called at every handshake, so that new keys apply to the next connection. A promise is waited for up to
   * `limits.openTimeoutMs`. What it throws, and anything that is not TlsMaterial, ends the connection and is reported as an error
   * of the program.
   */
  material(): MaybePromise<TlsMaterial>;
}

/**
 * Check what a program has given as ServerTls; `defaultMode` if `mode` may be missing. A misspelt mode must not mean that clients
 * without TLS are served. Errors: TypeError.
 */
export function checkTls(given: unknown, defaultMode?: TlsMode): void {
  if (typeof given !== 'object' || given === null) throw new TypeError(`tls is ${shown(given)}, not an object`);
  const { mode = defaultMode }: { readonly mode?: unknown } = given;
  if (mode !== 'off' && mode !== 'on' && mode !== 'require') {
    const found = typeof mode === 'string' ? JSON.stringify(mode) : shown(mode);
    throw new TypeError(`tls.mode is ${found}, and must be 'off', 'on' or 'require'`);
  }
  const { material }: { readonly material?: unknown } = given;
  if (mode === 'off' || typeof material === 'function') return;
  throw new TypeError(`tls.material is ${shown(material)}, not a function that gives the keys`);
}

type MaybePromise<T> = T | PromiseLike<T>;

/** An error of the program's `material` or `pskKey`. The message names it; `cause` is what it threw. */
export class TlsMaterialError extends Error {
  constructor(message: string, options?: ErrorOptions) {
    super(message, options);
    this.name = 'TlsMaterialError';
  }
}

/** Limits the time of work of the server; `doing` completes "the server has not ...". See HandshakeClock. */
export interface ServerTime {
  during<T>(doing: string, work: Promise<T>): Promise<T>;
}

/** OpenSSL's limits for keys (PSK_MAX_PSK_LEN) and for names (PSK_MAX_IDENTITY_LEN). */
const MAX_KEY_BYTES = 512;
const MAX_USER_BYTES = 256;
/** Users of one ClientHello that are looked up before TLS begins: a stranger could name thousands. */
const MAX_USERS = 4;

// --- material ---

/** What `material()` has returned, checked; or a promise of it. Errors: TlsMaterialError. */
export function callMaterial(source: ServerTls): TlsMaterial | Promise<TlsMaterial> {
  const answer = calling('material()', () => {
    const value = source.material();
    return isThenable(value) ? promiseOf('material()', value) : checkMaterial(value);
  });
  return answer instanceof Promise ? answer.then((value) => calling('material()', () => checkMaterial(value))) : answer;
}

/** A copy: each property is read once. */
function checkMaterial(value: TlsMaterial): TlsMaterial {
  const given: unknown = value;
  if (typeof given !== 'object' || given === null) throw wrongMaterial(`returned ${shown(given)}`, 'TlsMaterial');
  const { certificate, authorities, revocations, verifyPeer, pskKey } = given as Partial<TlsMaterial>;
  const pair: unknown = certificate;
  if (pair !== undefined && (typeof pair !== 'object' || pair === null)) {
    throw wrongMaterial(`returned ${shown(pair)} as certificate`, '{ chain, key }');
  }
  if (certificate === undefined && pskKey === undefined) {
    throw wrongMaterial('returned neither certificate nor pskKey', 'at least one of them');
  }
  if (typeof verifyPeer !== 'boolean') {
    throw wrongMaterial(`returned ${shown(verifyPeer)} as verifyPeer`, 'true or false');
  }
  if (pskKey !== undefined && typeof pskKey !== 'function') {
    throw wrongMaterial(`returned ${shown(pskKey)} as pskKey`, 'a function (user) => key');
  }
  return {
    certificate: certificate && {
      chain: pem('certificate.chain', certificate.chain),
      key: pem('certificate.key', certificate.key),
    },
    authorities: authorities === undefined ? undefined : pem('authorities', authorities),
    revocations: revocations === undefined ? undefined : pem('revocations', revocations),
    verifyPeer,
    // Called as a method, as it is written.
    pskKey: pskKey && ((user) => pskKey.call(value, user)),
  };
}

/**
 * OpenSSL is silent about some values that are not PEM. With empty authorities Node would trust every authority that the
 * system trusts, and with empty revocations check none.
 */
function pem(name: string, value: unknown): string | Uint8Array {
  if (typeof value !== 'string' && !(value instanceof Uint8Array)) {
    throw wrongMaterial(`returned ${shown(value)} as ${name}`, 'PEM, as a string or bytes');
  }
  const bytes =
    typeof value === 'string' ? Buffer.from(value) : Buffer.from(value.buffer, value.byteOffset, value.length);
  if (!bytes.includes('-----BEGIN ')) {
    const what = bytes.length === 0 ? 'is empty' : 'has no line "-----BEGIN ...-----"';
    throw wrongMaterial(`returned ${name} that ${what}`, 'PEM');
  }
  return value;
}

/** The reason why OpenSSL does not take `material`; `error` is what it said of all of it. */
export function refusedMaterial(material: TlsMaterial, error: unknown): TlsMaterialError {
  const { certificate, authorities, revocations } = material;
  const parts: readonly [string, tls.SecureContextOptions][] = [
    ['certificate.chain', { cert: asBuffer(certificate?.chain) }],
    ['certificate.key', { key: asBuffer(certificate?.key) }],
    ['authorities', { ca: asBuffer(authorities) }],
    ['revocations', { crl: asBuffer(revocations) }],
  ];
  for (const [name, part] of parts) {
    try {
      tls.createSecureContext(part);
    } catch (ofPart) {
      return new TlsMaterialError(`material() returned ${name} that OpenSSL does not take: ${messageOf(ofPart)}`, {
        cause: error,
      });
    }
  }
  return new TlsMaterialError(`OpenSSL does not take what material() returned: ${messageOf(error)}`, { cause: error });
}

/** Node takes any bytes; its types, in part, only Buffers. */
export function asBuffer(pemText: string | Uint8Array | undefined): string | Buffer | undefined {
  return pemText as string | Buffer | undefined;
}

function wrongMaterial(did: string, expected: string): TlsMaterialError {
  return new TlsMaterialError(`material() ${did}; expected was ${expected}`);
}

// --- pskKey ---

/** The keys of one handshake: those that were waited for, and the way to all others. */
export class PskKeys {
  /** The user whose key OpenSSL has asked for last. */
  user: string | undefined;
  /** Why the handshake must fail, whatever OpenSSL makes of it. */
  trouble: Error | undefined;
  readonly #pskKey: NonNullable<TlsMaterial['pskKey']>;
  readonly #known = new Map<string, Buffer | null>();

  constructor(pskKey: NonNullable<TlsMaterial['pskKey']>) {
    this.#pskKey = pskKey;
  }

  /**
   * Look up the users that `hello` names, so that OpenSSL, which cannot wait, need not.
   * Errors: TlsMaterialError; the client has left.
   */
  async fetch(hello: ClientHello, flight: FirstFlight, time: ServerTime): Promise<void> {
    for (const identity of hello.identities.slice(0, MAX_USERS)) {
      const user = userOf(identity);
      if (user === undefined || this.#known.has(user)) continue;
      const answer = this.#call(user);
      const key =
        answer instanceof Promise
          ? await time.during(`got an answer of ${callOf(user)}`, flight.whileHere(answer))
          : answer;
      this.#known.set(user, key);
      // OpenSSL asks for no further user.
      if (key !== null) return;
    }
  }

  /** OpenSSL asks for the key of `user`. Null if there is none, or with `trouble`. Never throws. */
  answer(user: string): Buffer | null {
    this.user = user;
    const known = this.#known.get(user);
    if (known !== undefined) return known;
    // It is over; a client may have named a thousand more.
    if (this.trouble !== undefined) return null;
    try {
      const answer = this.#call(user);
      if (!(answer instanceof Promise)) return answer;
      answer.catch(() => undefined);
      this.trouble ??= new Error(
        `${callOf(user)} returned a promise, which can be waited for only in TLS 1.3, and for the first ${MAX_USERS} users that ` +
          'a client names; to serve this client, return the key itself',
      );
    } catch (error) {
      this.trouble ??= error as TlsMaterialError;
    }
    return null;
  }

  /** The handshake is over. */
  forget(): void {
    for (const key of this.#known.values()) key?.fill(0);
    this.#known.clear();
  }

  /** Errors: TlsMaterialError, thrown or of the promise. */
  #call(user: string): Buffer | null | Promise<Buffer | null> {
    const name = callOf(user);
    const answer = calling(name, () => {
      const value = this.#pskKey(user);
      return isThenable(value) ? promiseOf(name, value) : checkKey(name, value);
    });
    return answer instanceof Promise ? answer.then((value) => calling(name, () => checkKey(name, value))) : answer;
  }
}

/** A copy: the program may use the memory again while the key is waited with. */
function checkKey(name: string, value: unknown): Buffer | null {
  if (value === undefined || value === null) return null;
  if (!(value instanceof Uint8Array)) {
    const hint = typeof value === 'string' ? `; for hexadecimal text: Buffer.from(text, 'hex')` : '';
    throw new TlsMaterialError(`${name} returned ${shown(value)}; expected was a Buffer or Uint8Array${hint}`);
  }
  if (value.length === 0 || value.length > MAX_KEY_BYTES) {
    throw new TlsMaterialError(
      `${name} returned a key of ${value.length} bytes; expected was one of 1 to ${MAX_KEY_BYTES} bytes, or undefined`,
    );
  }
  return Buffer.from(value);
}

/** A client's own key and user: Node would throw where nobody can catch it. Errors: TypeError. */
export function checkPsk(user: unknown, key: unknown): void {
  if (typeof user !== 'string' || user === '' || user.includes('\0') || Buffer.byteLength(user) > MAX_USER_BYTES) {
    throw new TypeError(
      `psk.user is ${shown(user)}; expected was a name of 1 to ${MAX_USER_BYTES} bytes without zeros`,
    );
  }
  if (!(key instanceof Uint8Array) || key.length === 0 || key.length > MAX_KEY_BYTES) {
    const found = key instanceof Uint8Array ? `${key.length} bytes` : shown(key);
    throw new TypeError(`psk.key is ${found}; expected were 1 to ${MAX_KEY_BYTES} bytes, as a Buffer or Uint8Array`);
  }
}

/** The user as OpenSSL and Node will ask for it; undefined if they will not. */
function userOf(identity: Buffer): string | undefined {
  if (identity.length > MAX_USER_BYTES) return undefined;
  // A string of C.
  const end = identity.indexOf(0);
  return decodeUtf8(end < 0 ? identity : identity.subarray(0, end));
}

function callOf(user: string): string {
  return `pskKey(${JSON.stringify(user)})`;
}

// --- Calls of the program ---

/** What `call` returns. What it throws becomes a TlsMaterialError. */
function calling<T>(name: string, call: () => T): T {
  try {
    return call();
  } catch (error) {
    if (error instanceof TlsMaterialError) throw error;
    throw new TlsMaterialError(`${name} threw ${messageOf(error)}`, { cause: error });
  }
}

function isThenable<T>(value: T | PromiseLike<T>): value is PromiseLike<T> {
  const { then } = (value ?? {}) as { then?: unknown };
  return typeof then === 'function';
}

/** A promise of the language: it settles once, whatever the other one does. */
function promiseOf<T>(name: string, value: PromiseLike<T>): Promise<T> {
  return new Promise<T>((resolve) => resolve(value)).catch((error: unknown) => {
    throw new TlsMaterialError(`${name} rejected with ${messageOf(error)}`, { cause: error });
  });
}

/** Nothing of the value itself: it may be a key. */
function shown(value: unknown): string {
  return typeof value === 'string' && value !== '' ? `a string of ${value.length} characters` : kindOf(value);
}

/** Anything can be thrown, also what has no text. */
function messageOf(error: unknown): string {
  try {
    const text = error instanceof Error ? String(error) : JSON.stringify(error);
    return typeof text === 'string' ? text.slice(0, MAX_MESSAGE) : shown(error);
  } catch {
    return `${shown(error)} that cannot be shown`;
  }
}

const MAX_MESSAGE = 1000;
