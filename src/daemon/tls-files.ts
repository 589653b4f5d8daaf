/**
 * Reads what TLS needs from files: a directory of certificates under nbdkit's names, a file of pre-shared keys in
 * GnuTLS' form. Owns the checks that turn a wrong file into a clear error at start instead of a failed handshake later;
 * holds nothing, whoever reloads calls again.
 */
import { createPrivateKey, X509Certificate } from 'node:crypto';
import fs from 'node:fs';
import path from 'node:path';
import tls from 'node:tls';
import type { TlsMaterial, TlsMode } from 'nbd-server-ts';
import { OperationError } from './operations.js';

export interface TlsConfiguration {
  readonly mode: TlsMode;
  /** Directory with server-cert.pem, server-key.pem, and ca-cert.pem and ca-crl.pem for the certificates of clients. */
  readonly certificates?: string;
  /** Clients must show a certificate that ca-cert.pem has signed, or know a pre-shared key. */
  readonly verifyPeer: boolean;
  /** File of pre-shared keys. */
  readonly psk?: string;
}

export interface LoadedTls {
  readonly material: TlsMaterial;
  readonly pskUsers: ReadonlySet<string>;
  /** What will work, but should be known. */
  readonly warnings: readonly string[];
}

const CERTIFICATE = 'server-cert.pem';
const KEY = 'server-key.pem';
const AUTHORITIES = 'ca-cert.pem';
const REVOCATIONS = 'ca-crl.pem';
/** Shorter keys can be tried out. */
const LEAST_PSK_BYTES = 16;
/** OpenSSL takes no longer ones (PSK_MAX_PSK_LEN), and no longer names (PSK_MAX_IDENTITY_LEN). */
const MAX_PSK_BYTES = 512;
const MAX_USER_BYTES = 256;
const SOON_MS = 14 * 24 * 3600_000;

/** Read and check all files. Errors: TLS. */
export function loadTls(configuration: TlsConfiguration): LoadedTls {
  const { certificates, psk, verifyPeer } = configuration;
  const warnings: string[] = [];
  if (certificates === undefined && psk === undefined) {
    throw failure('TLS needs keys: give --tls-certificates DIR or --tls-psk FILE (docs/tls.md shows how to make them)');
  }
  if (verifyPeer && certificates === undefined) {
    throw failure(
      '--tls-verify-peer checks certificates of clients, and needs --tls-certificates DIR with ca-cert.pem',
    );
  }
  const keys = psk === undefined ? undefined : loadPsk(psk, warnings);
  return {
    material: {
      ...(certificates !== undefined && loadCertificates(certificates, verifyPeer, warnings)),
      verifyPeer,
      ...(keys !== undefined && { pskKey: (user: string) => keys.get(user) }),
    },
    pskUsers: new Set(keys?.keys()),
    warnings,
  };
}

function loadCertificates(directory: string, verifyPeer: boolean, warnings: string[]): Omit<TlsMaterial, 'verifyPeer'> {
  const place = (name: string): string => path.join(directory, name);
  const chain = readFile(place(CERTIFICATE), 'the certificate of this server');
  const key = readFile(place(KEY), 'the private key of this server');
  const certificate = parsed(place(CERTIFICATE), 'a certificate in PEM form', () => new X509Certificate(chain));
  const privateKey = parsed(place(KEY), 'a private key in PEM form without a passphrase', () => createPrivateKey(key));
  if (!certificate.checkPrivateKey(privateKey)) {
    throw failure(`${place(KEY)} is not the key of ${place(CERTIFICATE)}; put the pair that belongs together there`);
  }
  warnOfMode(place(KEY), warnings);
  warnOfDates(place(CERTIFICATE), certificate, warnings);
  let authorities: Buffer | undefined;
  let revocations: Buffer | undefined;
  if (verifyPeer) {
    authorities = readFile(place(AUTHORITIES), '--tls-verify-peer needs the authority that signs the clients');
    const authority = authorities;
    parsed(place(AUTHORITIES), 'a certificate in PEM form', () => new X509Certificate(authority));
    if (fs.existsSync(place(REVOCATIONS))) revocations = readFile(place(REVOCATIONS), 'the revoked certificates');
  }
  parsed(directory, 'what OpenSSL takes', () =>
    tls.createSecureContext({ cert: chain, key, ca: authorities, crl: revocations }),
  );
  return { certificate: { chain, key }, authorities, revocations };
}

/** Lines `user:hexkey`, as psktool(1) writes them; a user that begins with # is in hexadecimal itself. */
function loadPsk(file: string, warnings: string[]): Map<string, Buffer> {
  const keys = new Map<string, Buffer>();
  const text = readFile(file, 'the pre-shared keys').toString();
  for (const [index, full] of text.split('\n').entries()) {
    const line = full.trim();
    if (line === '') continue;
    const bad = (what: string): OperationError => failure(`${file}:${index + 1}: ${what}`);
    const colon = line.lastIndexOf(':');
    if (colon <= 0) throw bad("no USER:HEXKEY; make lines with 'psktool -u USER -p FILE'");
    const user = line.startsWith('#') ? hexadecimal(line.slice(1, colon))?.toString() : line.slice(0, colon);
    if (user === undefined || user === '') {
      throw bad('what stands between # and : is no name in hexadecimal; comments are not possible in this file');
    }
    if (Buffer.byteLength(user) > MAX_USER_BYTES) throw bad(`the user's name is longer than ${MAX_USER_BYTES} bytes`);
    const key = hexadecimal(line.slice(colon + 1));
    if (key === undefined) throw bad(`the key of "${user}" is not hexadecimal`);
    if (key.length < LEAST_PSK_BYTES || key.length > MAX_PSK_BYTES) {
      throw bad(`the key of "${user}" has ${key.length} bytes; give ${LEAST_PSK_BYTES} to ${MAX_PSK_BYTES}`);
    }
    if (keys.has(user)) throw bad(`"${user}" has a key above already; remove one`);
    keys.set(user, key);
  }
  if (keys.size === 0) throw failure(`${file} has no keys; make one with 'psktool -u USER -p ${file}'`);
  warnOfMode(file, warnings);
  return keys;
}

function hexadecimal(text: string): Buffer | undefined {
  return /^(?:[0-9a-fA-F]{2})+$/.test(text) ? Buffer.from(text, 'hex') : undefined;
}

function readFile(file: string, what: string): Buffer {
  try {
    return fs.readFileSync(file);
  } catch (error) {
    const { code, message } = error as NodeJS.ErrnoException;
    const why = code === 'ENOENT' ? 'is not there' : `cannot be read: ${message}`;
    throw failure(`${file} ${why} (${what})`, error);
  }
}

function parsed<T>(file: string, what: string, parse: () => T): T {
  try {
    return parse();
  } catch (error) {
    throw failure(`${file} is not ${what}: ${(error as Error).message}`, error);
  }
}

function warnOfMode(file: string, warnings: string[]): void {
  const { mode } = fs.statSync(file);
  if ((mode & 0o007) !== 0) warnings.push(`${file} can be read by every user of this machine; chmod 600 it`);
}

function warnOfDates(file: string, certificate: X509Certificate, warnings: string[]): void {
  const until = Date.parse(certificate.validTo);
  if (Date.parse(certificate.validFrom) > Date.now()) {
    warnings.push(`${file} is valid only from ${certificate.validFrom}; clients refuse it until then`);
  } else if (until < Date.now()) warnings.push(`${file} expired on ${certificate.validTo}; clients refuse it`);
  else if (until < Date.now() + SOON_MS) warnings.push(`${file} expires on ${certificate.validTo}`);
}

function failure(message: string, cause?: unknown): OperationError {
  return new OperationError('TLS', message, { cause });
}
