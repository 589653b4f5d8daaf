/**
 * TLS over a connection that began in the clear (proto.md, "TLS support"): the handshakes of both ends, and what they prove
 * about the other side. It owns the accepted versions and ciphers and the rule when a name is proven; it contains no
 * messages of NBD and reads no files.
 */

import type { Duplex } from 'node:stream';
import net from 'node:net';
import tls from 'node:tls';
import { constants } from 'node:crypto';
import { encryptInParts } from './tls-output.js';

/** 'on': a client may ask for TLS (SELECTIVETLS without TLS-only exports); 'require': it must (FORCEDTLS). */
export type TlsMode = 'off' | 'on' | 'require';

/** The server's keys, and what it requires of clients. At least one of `certificate` and `pskKey`. */
export interface TlsMaterial {
  /** PEM: the server's certificate (with its chain) and private key. */
  readonly certificate?: { readonly chain: string | Buffer; readonly key: string | Buffer };
  /** PEM: the authorities that sign client certificates. */
  readonly authorities?: string | Buffer;
  /** PEM: revoked client certificates. */
  readonly revocations?: string | Buffer;
  /** A client without a pre-shared key must show a certificate signed by `authorities`. */
  readonly verifyPeer: boolean;
  /** The key of a user; undefined if there is no such user. */
  readonly pskKey?: (user: string) => Buffer | undefined;
}

/** How a server speaks TLS. */
export interface ServerTls {
  readonly mode: TlsMode;
  /** Called at every handshake, so that new keys apply to the next connection. */
  material(): TlsMaterial;
}

/** What a TLS handshake has proven. */
export interface TlsIdentity {
  /** "TLSv1.3" */
  readonly protocol: string;
  readonly cipher: string;
  /** Common name and DNS names of the verified client certificate; empty without one. */
  readonly certificateNames: readonly string[];
  readonly pskUser?: string;
}

/** How client and server prove themselves: by certificates, or by a pre-shared key. */
export type ClientTls =
  | {
      /** PEM: the authorities that sign server certificates; by default those of Node. */
      readonly authorities?: string | Buffer;
      /** PEM: the client's own certificate and key. */
      readonly certificate?: { readonly chain: string | Buffer; readonly key: string | Buffer };
      /** The name that the server's certificate must be for; by default the host connected to, "localhost" for unix sockets. */
      readonly serverName?: string;
    }
  | { readonly psk: { readonly user: string; readonly key: Buffer } };

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

/**
 * Server side of the handshake. `socket` must have no reader any more; its buffered bytes belong to TLS. However it fails,
 * `socket` is destroyed.
 */
export function acceptTls(
  socket: Duplex,
  material: TlsMaterial,
): Promise<{ readonly socket: tls.TLSSocket; readonly identity: TlsIdentity }> {
  const { certificate, pskKey } = material;
  let pskUser: string | undefined;
  return new Promise((resolve, reject) => {
    const fail = (error: Error): void => {
      socket.destroy();
      reject(error);
    };
    // A server that never listens: the public way to have Node verify the client's certificate on a given socket. Its own
    // context (1.4 ms to create) also means that no session of an earlier connection can be resumed.
    let server: tls.Server;
    try {
      server = tls.createServer({
        minVersion: MIN_VERSION,
        secureOptions: OPTIONS,
        ciphers: cipherList(certificate !== undefined, pskKey !== undefined),
        cert: certificate?.chain,
        key: certificate?.key,
        ca: material.authorities,
        crl: material.revocations,
        requestCert: material.verifyPeer,
        rejectUnauthorized: material.verifyPeer,
        ...(pskKey !== undefined && {
          pskCallback: (_: tls.TLSSocket, user: string) => {
            pskUser = user;
            return pskKey(user) ?? null;
          },
        }),
      } as tls.TlsOptions);
    } catch (error) {
      fail(error as Error);
      return;
    }
    server.once('tlsClientError', (error, failed) => {
      // Null unless the certificate was refused, whatever Node's types say.
      const authorizationError = failed.authorizationError as Error | string | null;
      fail(new Error(authorizationError ? `the client's certificate: ${String(authorizationError)}` : reasonOf(error)));
    });
    server.once('secureConnection', (secure) => {
      secure.allowHalfOpen = true;
      encryptInParts(secure);
      const byKey = isByPreSharedKey(secure);
      resolve({ socket: secure, identity: identityOf(secure, byKey ? pskUser : undefined) });
    });
    // After tlsClientError has given its reason: Node closes the socket first.
    socket.once('close', () => setImmediate(reject, new Error('the client left')));
    // A half-open connection is useful for requests, not for a handshake: a client that closes its side ends the handshake.
    // Otherwise Node would wait for bytes that cannot arrive.
    socket.allowHalfOpen = false;
    server.emit('connection', socket);
  });
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
          ca: options.authorities,
          cert: options.certificate?.chain,
          key: options.certificate?.key,
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

function identityOf(socket: tls.TLSSocket, pskUser: string | undefined): TlsIdentity {
  return {
    protocol: socket.getProtocol() ?? 'unknown',
    cipher: socket.getCipher().standardName,
    certificateNames: socket.authorized && pskUser === undefined ? certificateNames(socket.getPeerCertificate()) : [],
    ...(pskUser !== undefined && { pskUser }),
  };
}

/** Common names and DNS names. Names that Node quotes are ignored: a comma in one could pose as a second name. */
export function certificateNames(certificate: tls.PeerCertificate): string[] {
  const names = new Set<string>();
  // A client that shows no certificate has an empty object here, whatever Node's types say.
  const commonName: unknown = (certificate as Partial<tls.PeerCertificate>).subject?.CN;
  for (const name of Array.isArray(commonName) ? (commonName as unknown[]) : [commonName]) {
    if (typeof name === 'string' && name !== '') names.add(name);
  }
  const alternatives = certificate.subjectaltname ?? '';
  if (!alternatives.includes('"')) {
    for (const entry of alternatives.split(', ')) {
      if (entry.startsWith('DNS:')) names.add(entry.slice('DNS:'.length));
    }
  }
  return [...names];
}
