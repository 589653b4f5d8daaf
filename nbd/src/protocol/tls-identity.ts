/**
 * What a TLS handshake has proven about the client, as plain data. Owns the rule when a name counts as proven; layouts of
 * certificates are in x509.ts.
 */

import type tls from 'node:tls';
import { readCertificate, type ClientCertificate } from './x509.js';

/** What a TLS handshake has proven. Plain data: structured clone and JSON keep all of it. */
export interface TlsIdentity {
  /** "TLSv1.3" */
  readonly protocol: string;
  readonly cipher: string;
  /**
   * Common names and DNS names of the verified client certificate, mixed; empty without one. `certificate` has all that it says,
   * each with its kind.
   */
  readonly certificateNames: readonly string[];
  /** The client's certificate, if it was verified; undefined if it has shown none or has used a pre-shared key. */
  readonly certificate?: ClientCertificate;
  /** The user whose pre-shared key the client has. */
  readonly pskUser?: string;
}

/**
 * The identity that the handshake of `socket`, a server's, has proven; `pskUser` if it was with that user's key.
 * Errors: Error if the client's certificate, which OpenSSL has accepted, cannot be read: nobody is let in as somebody unknown.
 */
export function identityOf(socket: tls.TLSSocket, pskUser: string | undefined): TlsIdentity {
  // Without one it is an empty object, whatever Node's types say.
  const shown: Partial<tls.PeerCertificate> =
    socket.authorized && pskUser === undefined ? socket.getPeerCertificate() : {};
  return {
    protocol: socket.getProtocol() ?? 'unknown',
    cipher: socket.getCipher().standardName,
    certificateNames: certificateNames(shown),
    ...(shown.raw !== undefined && { certificate: readCertificate(shown.raw) }),
    ...(pskUser !== undefined && { pskUser }),
  };
}

/** Common names and DNS names. Names that Node quotes are ignored: a comma in one could pose as a second name. */
export function certificateNames(certificate: Partial<tls.PeerCertificate>): string[] {
  const names = new Set<string>();
  const commonName: unknown = certificate.subject?.CN;
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
