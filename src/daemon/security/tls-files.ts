/**
 * Reads the files for TLS: a directory of certificates under nbdkit's names, a file of pre-shared keys in GnuTLS' form. Owns the
 * checks that make a wrong file a clear error at start, and not a failed handshake later. Keeps no state: a reload calls again.
 */
import { createPrivateKey, X509Certificate } from 'node:crypto';
import path from 'node:path';
import tls from 'node:tls';
import type { TlsMaterial, TlsMode } from 'nbd-server-ts';
import { OperationError } from '../../operations/operations.js';
import {
  readSettings,
  SettingsError,
  textOf,
  warningOfSecret,
  warningOfWritable,
  type SettingsFile,
} from './settings-file.js';

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
  /** For the operator; the files work all the same. */
  readonly warnings: readonly string[];
}

const CERTIFICATE = 'server-cert.pem';
const KEY = 'server-key.pem';
const AUTHORITIES = 'ca-cert.pem';
const REVOCATIONS = 'ca-crl.pem';
/** Shorter keys can be found by brute force. */
const LEAST_PSK_BYTES = 16;
/** OpenSSL's limits for keys (PSK_MAX_PSK_LEN) and for names (PSK_MAX_IDENTITY_LEN). */
const MAX_PSK_BYTES = 512;
const MAX_USER_BYTES = 256;
const SOON_MS = 14 * 24 * 3600_000;

/** Read and check all files. Errors: TLS. */
export async function loadTls(configuration: TlsConfiguration): Promise<LoadedTls> {
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
  const keys = psk === undefined ? undefined : await loadPsk(psk, warnings);
  return {
    material: {
      ...(certificates !== undefined && (await loadCertificates(certificates, verifyPeer, warnings))),
      verifyPeer,
      ...(keys !== undefined && { pskKey: (user: string) => keys.get(user) }),
    },
    pskUsers: new Set(keys?.keys()),
    warnings,
  };
}

async function loadCertificates(
  directory: string,
  verifyPeer: boolean,
  warnings: string[],
): Promise<Omit<TlsMaterial, 'verifyPeer'>> {
  const inDirectory = (name: string): string => path.join(directory, name);
  const chainFile = await readFile(inDirectory(CERTIFICATE), 'the certificate of this server');
  const keyFile = await readFile(inDirectory(KEY), 'the private key of this server');
  const { bytes: chain } = chainFile;
  const { bytes: key } = keyFile;
  const certificate = parsed(inDirectory(CERTIFICATE), 'a certificate in PEM form', () => new X509Certificate(chain));
  const privateKey = parsed(inDirectory(KEY), 'a private key in PEM form without a passphrase', () =>
    createPrivateKey(key),
  );
  if (!certificate.checkPrivateKey(privateKey)) {
    throw failure(`${inDirectory(KEY)} is not the key of ${inDirectory(CERTIFICATE)}; put a matching pair there`);
  }
  warn(warnings, warningOfSecret(inDirectory(KEY), keyFile));
  warn(warnings, warningOfWritable(inDirectory(CERTIFICATE), chainFile));
  warnOfDates(inDirectory(CERTIFICATE), certificate, warnings);
  let authorities: Buffer | undefined;
  let revocations: Buffer | undefined;
  if (verifyPeer) {
    const file = await readFile(
      inDirectory(AUTHORITIES),
      '--tls-verify-peer needs the authority that signs the clients',
    );
    warn(warnings, warningOfWritable(inDirectory(AUTHORITIES), file));
    const authority = file.bytes;
    authorities = authority;
    parsed(inDirectory(AUTHORITIES), 'a certificate in PEM form', () => new X509Certificate(authority));
    const revoked = await readFile(inDirectory(REVOCATIONS), 'the revoked certificates', { mayBeMissing: true });
    if (revoked !== undefined) warn(warnings, warningOfWritable(inDirectory(REVOCATIONS), revoked));
    revocations = revoked?.bytes;
  }
  parsed(directory, 'accepted by OpenSSL', () =>
    tls.createSecureContext({ cert: chain, key, ca: authorities, crl: revocations }),
  );
  return { certificate: { chain, key }, authorities, revocations };
}

/** Lines `user:hexkey`, as psktool(1) writes them; after a leading # the user is in hexadecimal, too. Errors: TLS. */
async function loadPsk(file: string, warnings: string[]): Promise<Map<string, Buffer>> {
  const keys = new Map<string, Buffer>();
  const read = await readFile(file, 'the pre-shared keys');
  const text = settingsOf(file, 'the pre-shared keys', () => textOf(read));
  for (const [index, full] of text.split('\n').entries()) {
    const line = full.trim();
    if (line === '') continue;
    const bad = (what: string): OperationError => failure(`${file}:${index + 1}: ${what}`);
    const colon = line.lastIndexOf(':');
    if (colon <= 0) throw bad("no USER:HEXKEY; make lines with 'psktool -u USER -p FILE'");
    const user = line.startsWith('#') ? hexadecimal(line.slice(1, colon))?.toString() : line.slice(0, colon);
    if (user === undefined || user === '') {
      throw bad('the text between # and : is not a name in hexadecimal; comments are not possible in this file');
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
  warn(warnings, warningOfSecret(file, read));
  return keys;
}

function hexadecimal(text: string): Buffer | undefined {
  return /^(?:[0-9a-fA-F]{2})+$/.test(text) ? Buffer.from(text, 'hex') : undefined;
}

async function readFile(file: string, what: string): Promise<SettingsFile>;
async function readFile(
  file: string,
  what: string,
  options: { readonly mayBeMissing: true },
): Promise<SettingsFile | undefined>;
async function readFile(file: string, what: string, { mayBeMissing = false } = {}): Promise<SettingsFile | undefined> {
  try {
    return await readSettings(file);
  } catch (error) {
    if (!(error instanceof SettingsError)) throw error;
    const { cause, message } = error;
    const isMissing = (cause as NodeJS.ErrnoException | undefined)?.code === 'ENOENT';
    if (isMissing && mayBeMissing) return undefined;
    throw failure(`${file} ${isMissing ? 'does not exist' : `cannot be read: ${message}`} (${what})`, error);
  }
}

function settingsOf<T>(file: string, what: string, read: () => T): T {
  try {
    return read();
  } catch (error) {
    throw failure(`${file} cannot be read: ${(error as Error).message} (${what})`, error);
  }
}

function warn(warnings: string[], warning: string | undefined): void {
  if (warning !== undefined) warnings.push(warning);
}

function parsed<T>(file: string, what: string, parse: () => T): T {
  try {
    return parse();
  } catch (error) {
    throw failure(`${file} is not ${what}: ${(error as Error).message}`, error);
  }
}

function warnOfDates(file: string, certificate: X509Certificate, warnings: string[]): void {
  const until = Date.parse(certificate.validTo);
  const today = Date.now();
  if (Date.parse(certificate.validFrom) > today) {
    warnings.push(`${file} is valid only from ${certificate.validFrom}; clients refuse it until then`);
  } else if (until < today) warnings.push(`${file} expired on ${certificate.validTo}; clients refuse it`);
  else if (until < today + SOON_MS) warnings.push(`${file} expires on ${certificate.validTo}`);
}

function failure(message: string, cause?: unknown): OperationError {
  return new OperationError('TLS', message, { cause });
}
