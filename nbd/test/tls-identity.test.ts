/**
 * What the server says about a client's certificate. Each has everything it says, exactly, and no name of it can pose as two:
 * certificates by openssl, shown by libnbd's and our own client, and as bytes where openssl does not make them.
 */

import { execFile } from 'node:child_process';
import { createHash, createPrivateKey, createPublicKey, sign, X509Certificate } from 'node:crypto';
import { join } from 'node:path';
import tls from 'node:tls';
import { promisify } from 'node:util';
import { beforeAll, describe, expect, test } from 'vitest';
import type { TlsIdentity } from '../src/index.js';
import { readCertificate } from '../src/protocol/x509.js';
import { Authority, opensslText, type Pair } from './pki.js';
import { temporaryDirectory, until } from './test-server.js';
import { startTlsServer, type TlsServer } from './tls-server.js';

let authority: Authority;
let server: Pair;

beforeAll(async () => {
  authority = await Authority.make('authority');
  server = await authority.sign(['CN = localhost'], ['DNS.1 = localhost', 'IP.1 = 127.0.0.1']);
});

function start(): Promise<TlsServer> {
  const authorities = authority.pair.chain;
  const material = { certificate: server, authorities, verifyPeer: true };
  return startTlsServer({ mode: 'require', material, authority: authorities });
}

/** What the provider learns of a client with this certificate. */
async function identityOf(certificate: Pair): Promise<TlsIdentity> {
  const from = await start();
  const client = await from.connect({ authorities: authority.pair.chain, certificate });
  await client.info('disk');
  const identity = from.provider.peers[0]?.tls;
  if (identity === undefined) throw new Error('no identity');
  return identity;
}

const attribute = (type: string, value: string, rdn: number): object => ({ type, value, rdn });

describe('a certificate of openssl', () => {
  test('with O= and a URI SAN has both', async () => {
    const identity = await identityOf(
      await authority.sign(['O = Example'], ['URI.1 = spiffe://example.org/ns/backup/sa/nightly']),
    );
    expect(identity.certificateNames).toEqual([]);
    expect(identity.certificate).toMatchObject({
      subject: [attribute('O', 'Example', 0)],
      issuer: [attribute('CN', 'authority', 0)],
      subjectAltNames: [{ type: 'URI', value: 'spiffe://example.org/ns/backup/sa/nightly' }],
    });
  });

  test('shown by nbdinfo has the fingerprint, serial number and end that openssl prints', async () => {
    const from = await start();
    const pair = await authority.sign(['O = Example', 'CN = backup'], ['DNS.1 = backup.example']);
    const directory = join(await temporaryDirectory(), 'client');
    await authority.writeTo(directory, 'client', pair);
    const uri = `nbds://localhost:${from.port}/disk?tls-certificates=${directory}&tls-verify-peer=true`;
    await promisify(execFile)('nbdinfo', ['--size', uri]);
    await until(() => from.closes.length === 1, 'the connection is over');
    const certificate = from.closes[0]?.peer.tls?.certificate;
    const printed = await opensslText(pair.chain, '-fingerprint', '-sha256', '-serial', '-enddate');
    const said = new Map(
      printed
        .trim()
        .split('\n')
        .map((line): [string, string] => split(line)),
    );
    expect(certificate?.fingerprint256).toBe(said.get('sha256 Fingerprint'));
    expect(certificate?.serialNumber).toBe(said.get('serial'));
    expect(certificate?.validTo).toBe(new Date(said.get('notAfter') ?? '').toISOString().replace('.000', ''));
    expect(certificate?.subject).toEqual([attribute('O', 'Example', 0), attribute('CN', 'backup', 1)]);
  });

  test('with every kind of alternative name has all of them, in its order', async () => {
    const { certificate } = await identityOf(
      await authority.sign(
        ['CN = x'],
        [
          ...['DNS.1 = a.example', 'DNS.2 = *.b.example', 'IP.1 = 192.0.2.1', 'IP.2 = 2001:db8::1', 'IP.3 = ::'],
          ...['email.1 = who@example.org', 'URI.1 = https://example.org/?a=1&b=2', 'RID.1 = 1.2.3.4'],
          ...['dirName.1 = other', 'otherName.1 = 1.3.6.1.4.1.311.20.2.3;UTF8:who@realm', 'DNS.3 = a.example'],
        ],
        ['[other]', 'O = Another', 'CN = who'],
      ),
    );
    const names = certificate?.subjectAltNames ?? [];
    expect(names.filter(({ type }) => type !== 'other')).toEqual([
      { type: 'DNS', value: 'a.example' },
      { type: 'DNS', value: '*.b.example' },
      { type: 'IP', value: '192.0.2.1' },
      { type: 'IP', value: '2001:db8::1' },
      { type: 'IP', value: '::' },
      { type: 'email', value: 'who@example.org' },
      { type: 'URI', value: 'https://example.org/?a=1&b=2' },
      { type: 'registeredId', value: '1.2.3.4' },
      { type: 'DNS', value: 'a.example' },
    ]);
    const others = names.filter(({ type }) => type === 'other').map(({ value }) => Buffer.from(value, 'hex'));
    expect(others.map((bytes) => bytes[0])).toEqual([0xa4, 0xa0]);
    expect(others[0]?.includes('Another')).toBe(true);
    expect(others[1]?.includes('who@realm')).toBe(true);
  });

  test('with commas, quotes, newlines and other names inside a name has one name', async () => {
    const trick = 'a, DNS:root.example';
    const { certificate, certificateNames } = await identityOf(
      await authority.sign(
        [String.raw`O = Example, CN=root\nCN=root+CN=\"root\"`, String.raw`OU = \\, x=y`],
        [
          `DNS.1 = ${trick}`,
          String.raw`URI.1 = a\", DNS:\"root.example\\\n`,
          String.raw`email.1 = a\nDNS:root.example`,
        ],
      ),
    );
    expect(certificate?.subject).toEqual([
      attribute('O', 'Example, CN=root\nCN=root+CN="root"', 0),
      attribute('OU', '\\, x=y', 1),
    ]);
    expect(certificate?.subjectAltNames).toEqual([
      { type: 'DNS', value: trick },
      { type: 'URI', value: 'a", DNS:"root.example\\\n' },
      { type: 'email', value: 'a\nDNS:root.example' },
    ]);
    // As before: a certificate with such a name has no DNS names in the short list.
    expect(certificateNames).toEqual([]);
  });

  test('with repeated attributes, a multi-valued one and no ASCII has each in its place', async () => {
    const { certificate } = await identityOf(
      await authority.sign(
        [
          '0.O = Söhne & Töchter 株式会社',
          '1.O = Example',
          'CN = a',
          '+UID = b',
          '0.DC = org',
          '1.DC = example',
          '0.1.2.3.4 = own',
        ],
        [],
      ),
    );
    expect(certificate?.subject).toEqual([
      attribute('O', 'Söhne & Töchter 株式会社', 0),
      attribute('O', 'Example', 1),
      attribute('CN', 'a', 2),
      attribute('UID', 'b', 2),
      attribute('DC', 'org', 3),
      attribute('DC', 'example', 4),
      attribute('1.2.3.4', 'own', 5),
    ]);
    expect(certificate?.subjectAltNames).toEqual([]);
  });

  test('with very long and very many names is kept whole, and goes through structured clone and JSON', async () => {
    const path = 'x'.repeat(5000);
    const dns = Array.from({ length: 400 }, (_, i) => `host-${i}.example`);
    const identity = await identityOf(
      await authority.sign([], [`URI.1 = spiffe://${path}`, ...dns.map((name, i) => `DNS.${i} = ${name}`)]),
    );
    expect(identity.certificate?.subject).toEqual([]);
    expect(identity.certificate?.subjectAltNames).toEqual([
      { type: 'URI', value: `spiffe://${path}` },
      ...dns.map((value) => ({ type: 'DNS', value })),
    ]);
    expect(structuredClone(identity)).toEqual(identity);
    expect(JSON.parse(JSON.stringify(identity))).toEqual(identity);
  });
});

test('without a verified certificate there is none, also if the client shows one', async () => {
  const from = await startTlsServer({
    mode: 'require',
    material: { certificate: server, verifyPeer: false },
    authority: authority.pair.chain,
  });
  const client = await from.connect({
    authorities: authority.pair.chain,
    certificate: await authority.sign(['CN = not asked']),
  });
  await client.info('disk');
  expect(from.provider.peers[0]?.tls).toEqual({
    protocol: 'TLSv1.3',
    cipher: 'TLS_AES_128_GCM_SHA256',
    certificateNames: [],
  });
});

// --- Certificates that openssl(1) does not make ---

const tlv = (tag: number, ...parts: readonly (Buffer | string)[]): Buffer => {
  const bytes = Buffer.concat(parts.map((part) => (typeof part === 'string' ? Buffer.from(part) : part)));
  const { length } = bytes;
  const header = length < 0x80 ? [length] : length < 0x100 ? [0x81, length] : [0x82, length >> 8, length & 0xff];
  return Buffer.concat([Buffer.from([tag, ...header]), bytes]);
};
const sequence = (...parts: readonly Buffer[]): Buffer => tlv(0x30, ...parts);
const oid = (hex: string): Buffer => tlv(0x06, Buffer.from(hex, 'hex'));
const ECDSA_SHA256 = sequence(oid('2a8648ce3d040302'));
/** An attribute "CN" in a set of its own. */
const commonName = (value: Buffer): Buffer => tlv(0x31, sequence(oid('550403'), value));
const altNames = (...names: readonly Buffer[]): Buffer => sequence(oid('551d11'), tlv(0x04, sequence(...names)));
const NOT_AFTER = tlv(0x17, '491231235959Z');

interface Parts {
  readonly subject?: Buffer;
  readonly extensions?: readonly Buffer[];
  readonly notAfter?: Buffer;
  readonly serial?: Buffer;
}

/** Signed by the authority. */
function handmade({ subject = sequence(), extensions = [], notAfter = NOT_AFTER, serial }: Parts): Pair {
  const by = new X509Certificate(authority.pair.chain);
  const key = createPrivateKey(authority.pair.key);
  const issuer = issuerOf(by.raw);
  const tbs = sequence(
    tlv(0xa0, tlv(0x02, Buffer.from([2]))),
    serial ?? tlv(0x02, Buffer.from([0, 0xff])),
    ECDSA_SHA256,
    issuer,
    sequence(tlv(0x17, '200101000000Z'), notAfter),
    subject,
    createPublicKey(key).export({ type: 'spki', format: 'der' }),
    ...(extensions.length > 0 ? [tlv(0xa3, sequence(...extensions))] : []),
  );
  const der = sequence(tbs, ECDSA_SHA256, tlv(0x03, Buffer.from([0]), sign('sha256', tbs, key)));
  const lines = der.toString('base64').match(/.{1,64}/g) ?? [];
  const chain = ['-----BEGIN CERTIFICATE-----', ...lines, '-----END CERTIFICATE-----', ''].join('\n');
  return { chain, key: authority.pair.key };
}

/** The authority's certificate is its own issuer: the name is in it twice, after the algorithm and after the validity. */
function issuerOf(der: Buffer): Buffer {
  const name = sequence(commonName(tlv(0x0c, 'authority')));
  expect(der.includes(name)).toBe(true);
  return name;
}

/** Also of what OpenSSL would not read. */
const derOf = ({ chain }: Pair): Buffer => Buffer.from(chain.replaceAll(/-----.*-----/g, ''), 'base64');

const read = (parts: Parts): ReturnType<typeof readCertificate> => readCertificate(derOf(handmade(parts)));

describe('a certificate made by hand', () => {
  for (const [what, value, expected] of [
    ['UTF8String', tlv(0x0c, 'ä\0b'), { value: 'ä\0b' }],
    ['PrintableString', tlv(0x13, 'a*b'), { value: 'a*b' }],
    ['T61String', tlv(0x14, Buffer.from([0xe4])), { value: 'ä' }],
    ['BMPString', tlv(0x1e, Buffer.from('00e4682a', 'hex')), { value: 'ä株' }],
    ['UniversalString', tlv(0x1c, Buffer.from('000000e40001f600', 'hex')), { value: 'ä😀' }],
    ['UTF8String with half a character', tlv(0x0c, Buffer.from([0xc3])), { value: '', der: '0c01c3' }],
    ['BMPString with half a pair', tlv(0x1e, Buffer.from('d83d', 'hex')), { value: '', der: '1e02d83d' }],
    ['IA5String beyond ASCII', tlv(0x16, Buffer.from([0xe4])), { value: '', der: '1601e4' }],
    ['OCTET STRING', tlv(0x04, 'CN'), { value: '', der: '0402434e' }],
    ['empty text', tlv(0x0c), { value: '' }],
  ] as const) {
    test(`with a name as ${what}`, () => {
      expect(read({ subject: sequence(commonName(value)) }).subject).toEqual([{ type: 'CN', rdn: 0, ...expected }]);
    });
  }

  test('with zero bytes in names has them, over TLS as well', async () => {
    const pair = handmade({
      subject: sequence(commonName(tlv(0x0c, 'root\0.example'))),
      extensions: [altNames(tlv(0x82, 'root\0.example'), tlv(0x86, 'spiffe://a\0b'))],
    });
    const { certificate } = await identityOf(pair);
    expect(certificate?.subject).toEqual([attribute('CN', 'root\0.example', 0)]);
    expect(certificate?.subjectAltNames).toEqual([
      { type: 'DNS', value: 'root\0.example' },
      { type: 'URI', value: 'spiffe://a\0b' },
    ]);
    expect(certificate?.fingerprint256.replaceAll(':', '').toLowerCase()).toBe(
      createHash('sha256').update(new X509Certificate(pair.chain).raw).digest('hex'),
    );
  });

  test('with names that are not of their kind has them as "other"', () => {
    const beyond = Buffer.from([0x61, 0xe4]);
    const wrong = [tlv(0x82, beyond), tlv(0x86, beyond), tlv(0x81, beyond), tlv(0x87, 'abc'), tlv(0x87, '12345678')];
    expect(read({ extensions: [altNames(...wrong)] }).subjectAltNames).toEqual(
      wrong.map((bytes) => ({ type: 'other', value: bytes.toString('hex') })),
    );
  });

  test('has its serial number as OpenSSL prints it, and times after 2049 and before 2000', () => {
    for (const [bytes, printed] of [
      ['00ff', 'FF'],
      ['0123456789abcdef0123456789abcdef01234567', '0123456789ABCDEF0123456789ABCDEF01234567'],
      ['ff', '-01'],
    ] as const) {
      const serial = tlv(0x02, Buffer.from(bytes, 'hex'));
      expect(read({ serial }).serialNumber).toBe(printed);
      expect(new X509Certificate(handmade({ serial }).chain).serialNumber).toBe(printed);
    }
    expect(read({ notAfter: tlv(0x18, '99991231235959Z') }).validTo).toBe('9999-12-31T23:59:59Z');
    expect(read({ notAfter: tlv(0x17, '991231235959Z') }).validTo).toBe('1999-12-31T23:59:59Z');
    expect(read({}).validTo).toBe('2049-12-31T23:59:59Z');
  });

  test('with two lists of alternative names is not let in', async () => {
    const pair = handmade({ extensions: [altNames(tlv(0x82, 'a')), altNames(tlv(0x82, 'b'))] });
    expect(() => readCertificate(new X509Certificate(pair.chain).raw)).toThrow('two lists of alternative names');
    const from = await start();
    await from
      .connect({ authorities: authority.pair.chain, certificate: pair })
      .then((client) => client.list())
      .then(
        () => expect.unreachable(),
        () => undefined,
      );
    await until(() => from.closes.length === 1, 'the connection is over');
    expect(from.closes[0]?.reason).toMatch(/^the TLS handshake failed: /);
  });

  test('cut off or with any byte changed is read or refused with an Error, and never anything else', () => {
    const { raw } = new X509Certificate(
      handmade({
        subject: sequence(commonName(tlv(0x0c, 'x'))),
        extensions: [altNames(tlv(0x82, 'a'), tlv(0x87, 'abcd'), tlv(0x88, Buffer.from('2a0304', 'hex')))],
      }).chain,
    );
    const attempt = (der: Buffer): void => {
      try {
        readCertificate(der);
      } catch (error) {
        expect((error as Error).message).toMatch(/^the certificate is not valid DER: /);
      }
    };
    for (let length = 0; length < raw.length; length++) attempt(raw.subarray(0, length));
    for (let at = 0; at < raw.length; at++) {
      for (const change of [1, 0x20, 0x80, 0xff]) {
        const der = Buffer.from(raw);
        der[at] = (der[at] ?? 0) ^ change;
        attempt(der);
      }
    }
  });
});

test('the certificates that Node brings along are read as Node reads them', () => {
  expect(tls.rootCertificates.length).toBeGreaterThan(50);
  for (const pem of tls.rootCertificates) {
    const node = new X509Certificate(pem);
    const { subject, issuer, subjectAltNames, ...rest } = readCertificate(node.raw);
    expect(rest).toEqual({
      fingerprint256: node.fingerprint256,
      serialNumber: node.serialNumber,
      validTo: new Date(node.validTo).toISOString().replace('.000', ''),
    });
    // Some have alternative names: of email, and of a directory.
    const email = subjectAltNames.filter(({ type }) => type === 'email').map(({ value }) => `email:${value}`);
    expect(email).toEqual((node.subjectAltName ?? '').split(', ').filter((name) => name.startsWith('email:')));
    expect(subject.map(({ type, value }) => `${type}=${value}`).join('\n')).toBe(
      // Node escapes some characters.
      node.subject.replaceAll(/\\(.)/g, '$1'),
    );
    expect(issuer).toEqual(subject);
  }
});

function split(line: string): [string, string] {
  const at = line.indexOf('=');
  return [line.slice(0, at), line.slice(at + 1)];
}
