/**
 * What a certificate says about its holder (RFC 5280), read from its DER. Owns the layouts: names, alternative names, serial
 * number, end of validity. Texts that tools print are not parsed back: in them a name with a comma or a newline can pose as
 * two. It proves nothing: a signature is OpenSSL's work, and must have been checked before.
 */

import { createHash } from 'node:crypto';
import net from 'node:net';

/**
 * One attribute of a distinguished name, as "O=Example". `value` is exactly what the certificate has, control characters
 * included: escape it before it is printed, and compare the whole of it.
 */
export interface NameAttribute {
  /**
   * OpenSSL's short name: 'C', 'ST', 'L', 'street', 'O', 'OU', 'CN', 'SN', 'GN', 'title', 'serialNumber', 'UID', 'DC',
   * 'emailAddress' and some more; for others the object identifier as "2.5.4.99".
   */
  readonly type: string;
  /** The text; empty if the value is none (see `der`). */
  readonly value: string;
  /** Place of its relative distinguished name, from 0: the attributes of a multi-valued one ("CN=a+UID=b") have the same. */
  readonly rdn: number;
  /** Only for a value that is not text, or not valid in its encoding: its DER in hexadecimal. */
  readonly der?: string;
}

/** One alternative name of a certificate's holder. */
export interface SubjectAltName {
  /** 'other': any other kind, or a name that is not valid as its kind. */
  readonly type: 'DNS' | 'URI' | 'IP' | 'email' | 'registeredId' | 'other';
  /**
   * Exactly what the certificate has; of an IP address the usual text ("192.0.2.1", "2001:db8::1"); of a registered identifier
   * "1.2.3"; of 'other' the DER of the GeneralName in hexadecimal.
   */
  readonly value: string;
}

/** The client's certificate, as plain data. */
export interface ClientCertificate {
  /** In the order of the certificate. Empty if it names nobody. */
  readonly subject: readonly NameAttribute[];
  /** The authority that signed it. */
  readonly issuer: readonly NameAttribute[];
  /** In the order of the certificate; empty if it has none. */
  readonly subjectAltNames: readonly SubjectAltName[];
  /** SHA-256 of the DER, as OpenSSL prints it: 32 pairs of upper-case hexadecimal digits with colons between. */
  readonly fingerprint256: string;
  /** Upper-case hexadecimal without prefix. Unique only among the certificates of one issuer. */
  readonly serialNumber: string;
  /** When it expires: "2027-01-31T23:59:59Z". */
  readonly validTo: string;
}

const TAG = {
  INTEGER: 0x02,
  OCTET_STRING: 0x04,
  OID: 0x06,
  UTF8: 0x0c,
  NUMERIC: 0x12,
  PRINTABLE: 0x13,
  T61: 0x14,
  IA5: 0x16,
  UTC_TIME: 0x17,
  GENERALIZED_TIME: 0x18,
  VISIBLE: 0x1a,
  UNIVERSAL: 0x1c,
  BMP: 0x1e,
  SEQUENCE: 0x30,
  SET: 0x31,
} as const;

/** GeneralName (RFC 5280, 4.2.1.6): context-specific tags. */
const GENERAL_NAME = { EMAIL: 0x81, DNS: 0x82, URI: 0x86, IP: 0x87, REGISTERED_ID: 0x88 } as const;

const TBS_VERSION = 0xa0;
const TBS_EXTENSIONS = 0xa3;
const SUBJECT_ALT_NAME = '2.5.29.17';

const SHORT_NAMES: ReadonlyMap<string, string> = new Map([
  ['2.5.4.3', 'CN'],
  ['2.5.4.4', 'SN'],
  ['2.5.4.5', 'serialNumber'],
  ['2.5.4.6', 'C'],
  ['2.5.4.7', 'L'],
  ['2.5.4.8', 'ST'],
  ['2.5.4.9', 'street'],
  ['2.5.4.10', 'O'],
  ['2.5.4.11', 'OU'],
  ['2.5.4.12', 'title'],
  ['2.5.4.13', 'description'],
  ['2.5.4.17', 'postalCode'],
  ['2.5.4.41', 'name'],
  ['2.5.4.42', 'GN'],
  ['2.5.4.43', 'initials'],
  ['2.5.4.44', 'generationQualifier'],
  ['2.5.4.46', 'dnQualifier'],
  ['2.5.4.65', 'pseudonym'],
  ['2.5.4.97', 'organizationIdentifier'],
  ['0.9.2342.19200300.100.1.1', 'UID'],
  ['0.9.2342.19200300.100.1.25', 'DC'],
  ['1.2.840.113549.1.9.1', 'emailAddress'],
]);

/** Read the DER of a certificate. Errors: Error if it is not one, or has two lists of alternative names. */
export function readCertificate(der: Buffer): ClientCertificate {
  const [certificate] = elements(der);
  const [tbs] = elements(content(certificate, TAG.SEQUENCE));
  const fields = elements(content(tbs, TAG.SEQUENCE));
  if (fields[0]?.tag === TBS_VERSION) fields.shift();
  const [serial, , issuer, validity, subject] = fields;
  const [, notAfter] = elements(content(validity, TAG.SEQUENCE));
  return {
    subject: readName(subject),
    issuer: readName(issuer),
    subjectAltNames: readAltNames(fields.find(({ tag }) => tag === TBS_EXTENSIONS)),
    fingerprint256: withColons(createHash('sha256').update(der).digest('hex').toUpperCase()),
    serialNumber: readInteger(content(serial, TAG.INTEGER)),
    validTo: readTime(notAfter),
  };
}

// --- Names ---

function readName(name: Element | undefined): NameAttribute[] {
  const attributes: NameAttribute[] = [];
  for (const [rdn, set] of elements(content(name, TAG.SEQUENCE)).entries()) {
    for (const attribute of elements(content(set, TAG.SET))) {
      const [oid, value] = elements(content(attribute, TAG.SEQUENCE));
      if (value === undefined) throw malformed('a name has an attribute without a value');
      const id = readOid(content(oid, TAG.OID));
      const text = readText(value);
      attributes.push({
        type: SHORT_NAMES.get(id) ?? id,
        value: text ?? '',
        rdn,
        ...(text === undefined && { der: value.whole.toString('hex') }),
      });
    }
  }
  return attributes;
}

function readAltNames(extensions: Element | undefined): SubjectAltName[] {
  if (extensions === undefined) return [];
  let names: SubjectAltName[] | undefined;
  const [list] = elements(extensions.content);
  for (const extension of elements(content(list, TAG.SEQUENCE))) {
    const parts = elements(content(extension, TAG.SEQUENCE));
    if (readOid(content(parts[0], TAG.OID)) !== SUBJECT_ALT_NAME) continue;
    // "A certificate MUST NOT include more than one instance of a particular extension."
    if (names !== undefined) throw malformed('it has two lists of alternative names');
    // Between them may be the flag "critical".
    const [general] = elements(content(parts.at(-1), TAG.OCTET_STRING));
    names = elements(content(general, TAG.SEQUENCE)).map(readGeneralName);
  }
  return names ?? [];
}

function readGeneralName(name: Element): SubjectAltName {
  const { tag, content: bytes, whole } = name;
  const other = { type: 'other', value: whole.toString('hex') } as const;
  // These three are IA5Strings: anything beyond ASCII is not a name of that kind.
  const text = isAscii(bytes) ? bytes.toString('latin1') : undefined;
  switch (tag) {
    case GENERAL_NAME.DNS:
      return text === undefined ? other : { type: 'DNS', value: text };
    case GENERAL_NAME.URI:
      return text === undefined ? other : { type: 'URI', value: text };
    case GENERAL_NAME.EMAIL:
      return text === undefined ? other : { type: 'email', value: text };
    case GENERAL_NAME.IP: {
      const address = readAddress(bytes);
      return address === undefined ? other : { type: 'IP', value: address };
    }
    case GENERAL_NAME.REGISTERED_ID:
      return { type: 'registeredId', value: readOid(bytes) };
    default:
      return other;
  }
}

function readAddress(bytes: Buffer): string | undefined {
  if (bytes.length === 4) return bytes.join('.');
  if (bytes.length !== 16) return undefined;
  const groups = Array.from({ length: 8 }, (_, i) => bytes.readUInt16BE(2 * i).toString(16));
  // Node writes the short form (RFC 5952).
  return new net.SocketAddress({ address: groups.join(':'), family: 'ipv6' }).address;
}

/** Undefined if the value is not a text, or not valid in its encoding. */
function readText({ tag, content: bytes }: Element): string | undefined {
  switch (tag) {
    case TAG.UTF8:
      return decodeUtf8(bytes);
    case TAG.NUMERIC:
    case TAG.PRINTABLE:
    case TAG.IA5:
    case TAG.VISIBLE:
      return isAscii(bytes) ? bytes.toString('latin1') : undefined;
    case TAG.T61:
      // As OpenSSL and everybody who makes them.
      return bytes.toString('latin1');
    case TAG.BMP:
      return bytes.length % 2 === 0 ? decodeCodePoints(bytes, 2) : undefined;
    case TAG.UNIVERSAL:
      return bytes.length % 4 === 0 ? decodeCodePoints(bytes, 4) : undefined;
    default:
      return undefined;
  }
}

/** Undefined if the bytes are not UTF-8. */
export function decodeUtf8(bytes: Uint8Array): string | undefined {
  try {
    return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    return undefined;
  }
}

/** Characters of `width` bytes; undefined if one is none (half of a pair, too large). */
function decodeCodePoints(bytes: Buffer, width: 2 | 4): string | undefined {
  const characters: string[] = [];
  for (let at = 0; at < bytes.length; at += width) {
    const point = bytes.readUIntBE(at, width);
    if ((point >= 0xd800 && point <= 0xdfff) || point > 0x10ffff) return undefined;
    characters.push(String.fromCodePoint(point));
  }
  return characters.join('');
}

function isAscii(bytes: Uint8Array): boolean {
  return bytes.every((byte) => byte < 0x80);
}

function withColons(hexadecimal: string): string {
  return (hexadecimal.match(/../g) ?? []).join(':');
}

// --- DER (X.690) ---

interface Element {
  readonly tag: number;
  readonly content: Buffer;
  /** With tag and length. */
  readonly whole: Buffer;
}

/** The elements that `bytes` consist of, one after the other. */
function elements(bytes: Buffer): Element[] {
  const found: Element[] = [];
  for (let start = 0; start < bytes.length;) {
    const tag = bytes[start] ?? 0;
    // Numbers from 31 on take more bytes; nothing in a certificate has one.
    if ((tag & 0x1f) === 0x1f) throw malformed('an element has a tag of several bytes');
    const first = bytes[start + 1];
    if (first === undefined) throw malformed('it ends within an element');
    let at = start + 2;
    let length = first;
    if (first >= 0x80) {
      const count = first & 0x7f;
      // 0 is the indefinite form of BER, which DER forbids.
      if (count === 0 || count > 4 || at + count > bytes.length) throw malformed('an element has no valid length');
      length = bytes.readUIntBE(at, count);
      at += count;
    }
    const end = at + length;
    if (end > bytes.length) throw malformed('it ends within an element');
    found.push({ tag, content: bytes.subarray(at, end), whole: bytes.subarray(start, end) });
    start = end;
  }
  return found;
}

function content(element: Element | undefined, tag: number): Buffer {
  if (element?.tag !== tag) {
    throw malformed(`an element with tag ${tag} was expected, and ${element ? `tag ${element.tag}` : 'nothing'} found`);
  }
  return element.content;
}

function readOid(bytes: Buffer): string {
  const arcs: bigint[] = [];
  let arc = 0n;
  for (const [i, byte] of bytes.entries()) {
    // Longer ones are no identifiers: they only take time.
    if (i >= MAX_OID_BYTES) throw malformed('an object identifier is too long');
    arc = (arc << 7n) | BigInt(byte & 0x7f);
    if (byte >= 0x80) continue;
    if (arcs.length === 0) {
      const first = arc < 40n ? 0n : arc < 80n ? 1n : 2n;
      arcs.push(first, arc - 40n * first);
    } else arcs.push(arc);
    arc = 0n;
  }
  if (arcs.length === 0 || (bytes.at(-1) ?? 0) >= 0x80) throw malformed('an object identifier is cut off');
  return arcs.join('.');
}

const MAX_OID_BYTES = 256;

function readInteger(bytes: Buffer): string {
  if (bytes.length === 0) throw malformed('a number is empty');
  let number = BigInt(`0x${bytes.toString('hex')}`);
  const isNegative = (bytes[0] ?? 0) >= 0x80;
  if (isNegative) number = (1n << BigInt(8 * bytes.length)) - number;
  // As OpenSSL.
  if (number === 0n) return '0';
  const digits = number.toString(16).toUpperCase();
  return `${isNegative ? '-' : ''}${digits.length % 2 === 0 ? digits : `0${digits}`}`;
}

/** "YYMMDDHHMMSSZ" from 1950 to 2049, or with four digits for the year (RFC 5280, 4.1.2.5). */
function readTime(time: Element | undefined): string {
  const text = time?.content.toString('latin1') ?? '';
  const digits = time?.tag === TAG.GENERALIZED_TIME ? 4 : 2;
  const parts = new RegExp(`^(\\d{${digits}})(\\d\\d)(\\d\\d)(\\d\\d)(\\d\\d)(\\d\\d)Z$`).exec(text);
  if (parts === null) throw malformed('its end of validity is not a time');
  const [, year = '', month, day, hour, minute, second] = parts;
  const century = digits === 4 ? '' : Number(year) < 50 ? '20' : '19';
  return `${century}${year}-${month}-${day}T${hour}:${minute}:${second}Z`;
}

function malformed(why: string): Error {
  return new Error(`the certificate is not valid DER: ${why}`);
}
