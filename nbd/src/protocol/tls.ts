/**
 * TLS over a connection that began in the clear (proto.md, "TLS support"): the handshakes of both ends. It owns the accepted
 * versions and ciphers; it contains no messages of NBD, reads no files, and calls the program only by tls-material.ts.
 */

import type { Duplex } from 'node:stream';
import net from 'node:net';
import tls from 'node:tls';
import { constants } from 'node:crypto';
import { FirstFlight } from './first-flight.js';
import { identityOf, type TlsIdentity } from './tls-identity.js';
import {
  asBuffer,
  callMaterial,
  checkPsk,
  PskKeys,
  refusedMaterial,
  type ServerTime,
  type ServerTls,
  type TlsMaterial,
} from './tls-material.js';
import { encryptInParts } from './tls-output.js';

/** How client and server prove themselves: by certificates, or by a pre-shared key. */
export type ClientTls =
  | {
      /** PEM: the authorities that sign server certificates; by default those of Node. */
      readonly authorities?: string | Uint8Array;
      /** PEM: the client's own certificate and key. */
      readonly certificate?: { readonly chain: string | Uint8Array; readonly key: string | Uint8Array };
      /** The name that the server's certificate must be for; by default the host connected to, "localhost" for unix sockets. */
      readonly serverName?: string;
    }
  /** A user of the server, up to 256 bytes in UTF-8, and the user's key, 1 to 512 bytes. */
  | { readonly psk: { readonly user: string; readonly key: Uint8Array } };

/** "NBD implementations supporting TLS MUST support TLS version 1.2, SHOULD support any later versions." */
const MIN_VERSION = 'TLSv1.2';
/** SHA-256 first: pre-shared keys use that hash, and OpenSSL ignores the key if the chosen cipher has another. */
const TLS13_CIPHERS = ['TLS_AES_128_GCM_SHA256', 'TLS_CHACHA20_POLY1305_SHA256', 'TLS_AES_256_GCM_SHA384'];
/** Forward secrecy and authenticated encryption only. */
const CERTIFICATE_CIPHERS = ['ECDHE+AESGCM', 'ECDHE+CHACHA20'];
/** TLS 1.2; OpenSSL has no ECDHE-PSK with AES-GCM. */
const PSK_CIPHERS = ['ECDHE-PSK-CHACHA20-POLY1305', 'ECDHE-PSK-AES256-CBC-SHA384', 'ECDHE-PSK-AES128-CBC-SHA256'];
/** No resumption: a session ticket would outlive the revocation of the key or certificate that it was issued for. */
const OPTIONS = constants.SSL_OP_NO_TICKET | constants.SSL_OP_NO_RENEGOTIATION;

export interface AcceptedTls {
  readonly socket: tls.TLSSocket;
  readonly identity: TlsIdentity;
}

/**
 * Server side of the handshake, with the keys that `source` has for it; `time` limits the wait for them. `socket` must have no
 * reader any more, and be paused; its buffered bytes belong to TLS. However it fails, `socket` is destroyed.
 * Errors: TlsMaterialError if the program's functions fail or give something else; Error with the reason for everything else.
 */
export async function acceptTls(socket: Duplex, source: ServerTls, time: ServerTime): Promise<AcceptedTls> {
  let flight: FirstFlight | undefined;
  let keys: PskKeys | undefined;
  try {
    let material = callMaterial(source);
    if (material instanceof Promise) {
      flight = new FirstFlight(socket);
      material = await time.during('got its keys from material()', flight.whileHere(material));
    }
    if (material.pskKey !== undefined) keys = new PskKeys(material.pskKey);
    // Before the ClientHello is here: it is on its way meanwhile.
    const server = serverWith(material, keys);
    if (keys !== undefined) {
      flight ??= new FirstFlight(socket);
      const hello = await flight.hello();
      if (hello !== undefined) await keys.fetch(hello, flight, time);
    }
    flight?.giveBack();
    if (socket.destroyed) throw new Error('the client left');
    const secure = await handshake(server, socket, keys, material.verifyPeer);
    return { socket: secure, identity: identityOf(secure, isByPreSharedKey(secure) ? keys?.user : undefined) };
  } catch (error) {
    flight?.stop();
    socket.destroy();
    throw error;
  } finally {
    keys?.forget();
  }
}

/**
 * A server that never listens: the public way to have Node verify the client's certificate on a given socket. Its own context
 * (1.4 ms to create) also means that no session of an earlier connection can be resumed. Errors: TlsMaterialError.
 */
function serverWith(material: TlsMaterial, keys: PskKeys | undefined): tls.Server {
  const { certificate, verifyPeer } = material;
  const options: tls.TlsOptions = {
    minVersion: MIN_VERSION,
    secureOptions: OPTIONS,
    ciphers: cipherList(certificate !== undefined, keys !== undefined),
    cert: asBuffer(certificate?.chain),
    key: asBuffer(certificate?.key),
    ca: asBuffer(material.authorities),
    crl: asBuffer(material.revocations),
    requestCert: verifyPeer,
    // With keys, `handshake` decides: newer versions of Node (26) refuse a client that has a key and no certificate.
    rejectUnauthorized: verifyPeer && keys === undefined,
    ...(keys && { pskCallback: (_, user) => keys.answer(user) }),
  };
  try {
    return tls.createServer(options);
  } catch (error) {
    throw refusedMaterial(material, error);
  }
}

/** `mustProve`: the client must have shown a verified certificate, or have used a key. */
function handshake(
  server: tls.Server,
  socket: Duplex,
  keys: PskKeys | undefined,
  mustProve: boolean,
): Promise<tls.TLSSocket> {
  return new Promise((resolve, reject) => {
    server.once('tlsClientError', (error, failed) => {
      // Null unless the certificate was refused, whatever Node's types say.
      const authorizationError = failed.authorizationError as Error | string | null;
      const reason = authorizationError ? `the client's certificate: ${String(authorizationError)}` : reasonOf(error);
      reject(keys?.trouble ?? new Error(reason));
    });
    server.once('secureConnection', (secure) => {
      secure.allowHalfOpen = true;
      encryptInParts(secure);
      // The client may have gone on with a certificate.
      if (keys?.trouble !== undefined) reject(keys.trouble);
      else if (mustProve && keys !== undefined && !secure.authorized && !isByPreSharedKey(secure)) {
        reject(new Error(`the client's certificate: ${String(secure.authorizationError)}`));
      } else resolve(secure);
    });
    // After tlsClientError has given its reason: Node closes the socket first.
    socket.once('close', () => setImmediate(reject, new Error('the client left')));
    // A half-open connection is useful for requests, not for a handshake: a client that closes its side ends the handshake.
    // Otherwise Node would wait for bytes that cannot arrive.
    socket.allowHalfOpen = false;
    server.emit('connection', socket);
  });
}

/**
 * Whether what a client was given can be used, before it connects: a mistake of the program must not look like one of the
 * server. Errors: TypeError. Nothing of a key is in the message.
 */
export function checkClientTls(options: ClientTls): void {
  if (typeof options !== 'object' || (options as unknown) === null || Array.isArray(options)) {
    throw new TypeError(
      'tls must be an object: {} for the authorities of Node, { authorities }, or { psk: { user, key } }',
    );
  }
  if ('psk' in options) {
    const psk = options.psk as Partial<(typeof options)['psk']> | null | undefined;
    checkPsk(psk?.user, psk?.key);
    return;
  }
  const { authorities, certificate, serverName } = options;
  if (serverName !== undefined && (typeof serverName !== 'string' || serverName === '')) {
    throw new TypeError('tls.serverName must be a name that is not empty');
  }
  checkPem(authorities, 'tls.authorities');
  if (certificate === undefined) return;
  const parts: unknown = certificate;
  const { chain, key } = (parts ?? {}) as { readonly chain?: string | Uint8Array; readonly key?: string | Uint8Array };
  if (chain === undefined || key === undefined) throw new TypeError('tls.certificate must be { chain, key }, both PEM');
  checkPem(chain, 'tls.certificate.chain');
  checkPem(key, 'tls.certificate.key');
  try {
    tls.createSecureContext({ cert: asBuffer(chain), key: asBuffer(key) });
  } catch (error) {
    throw new TypeError(`tls.certificate cannot be used: ${reasonOf(error as Error)}`, { cause: error });
  }
}

function checkPem(value: unknown, what: string): void {
  if (value === undefined) return;
  if (!(typeof value === 'string' || value instanceof Uint8Array)) throw new TypeError(`${what} must be PEM`);
  // Node ignores what is no certificate, and then trusts nobody.
  if (!Buffer.from(value).includes('-----BEGIN')) throw new TypeError(`${what} has no PEM in it ("-----BEGIN …")`);
}

/** Client side. Rejects unless the server has proven itself; `socket` is destroyed then. */
export function connectTls(socket: Duplex, options: ClientTls, host: string): Promise<tls.TLSSocket> {
  const isPsk = 'psk' in options;
  return new Promise((resolve, reject) => {
    const fail = (error: Error): void => {
      socket.destroy();
      reject(error);
    };
    let secure: tls.TLSSocket;
    const common = { socket, minVersion: MIN_VERSION, ciphers: cipherList(!isPsk, isPsk) } as const;
    try {
      if (isPsk) {
        const { user, key } = options.psk;
        checkPsk(user, key);
        secure = tls.connect({
          ...common,
          pskCallback: () => ({ psk: key, identity: user }),
          // No identity: a server that sends a certificate instead of using the key is refused below.
          checkServerIdentity: () => undefined,
        });
      } else {
        const name = options.serverName ?? host;
        secure = tls.connect({
          ...common,
          host: name,
          ...(net.isIP(name) === 0 && { servername: name }),
          ca: asBuffer(options.authorities),
          cert: asBuffer(options.certificate?.chain),
          key: asBuffer(options.certificate?.key),
        });
      }
    } catch (error) {
      fail(error as Error);
      return;
    }
    secure.once('error', fail);
    secure.once('close', () => reject(new Error('the connection was closed during the TLS handshake')));
    secure.once('secureConnect', () => {
      secure.off('error', fail);
      if (isPsk && !isByPreSharedKey(secure)) fail(new Error('the server did not use the pre-shared key'));
      else {
        encryptInParts(secure);
        resolve(secure);
      }
    });
  });
}

/** The message of an OpenSSL error contains a place in OpenSSL's source; its reason is a property. */
function reasonOf(error: Error): string {
  return 'reason' in error && typeof error.reason === 'string' ? error.reason : error.message;
}

function cipherList(certificates: boolean, psk: boolean): string {
  return [...TLS13_CIPHERS, ...(certificates ? CERTIFICATE_CIPHERS : []), ...(psk ? PSK_CIPHERS : [])].join(':');
}

/**
 * Whether the handshake used a pre-shared key. A call of pskCallback does not prove it: OpenSSL continues with a
 * certificate if the key does not fit the cipher. In TLS 1.3 a pre-shared key is a kind of resumption, and there is no
 * other kind here.
 */
function isByPreSharedKey(socket: tls.TLSSocket): boolean {
  const isTls13 = socket.getProtocol() === 'TLSv1.3';
  return isTls13 ? socket.isSessionReused() : socket.getCipher().standardName.includes('_PSK_');
}
