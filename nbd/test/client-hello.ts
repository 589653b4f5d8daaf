/** A ClientHello of TLS, field by field: what its server thinks of it is up to the test. It has no keys that fit. */

import { randomBytes } from 'node:crypto';

export interface HelloFields {
  /** The users whose pre-shared keys it offers; by default it offers none. */
  readonly identities?: readonly (string | Buffer)[];
  readonly versions?: readonly number[];
  /** Without psk_key_exchange_modes no key may be used. */
  readonly hasModes?: boolean;
  /** Further extensions, before the pre-shared keys. */
  readonly extensions?: readonly Buffer[];
  /** Bytes of the message in each record. */
  readonly recordBytes?: number;
}

export function clientHello(fields: HelloFields = {}): Buffer {
  const { identities, versions = [0x0304, 0x0303], hasModes = true, extensions = [], recordBytes = 16_384 } = fields;
  const body = Buffer.concat([
    number(0x0303, 2),
    randomBytes(32),
    list(1, randomBytes(32)),
    list(2, number(0x1301, 2)),
    list(1, number(0, 1)),
    list(
      2,
      extension(43, list(1, ...versions.map((version) => number(version, 2)))),
      extension(10, list(2, number(23, 2), number(29, 2))),
      extension(13, list(2, number(0x0403, 2))),
      extension(51, list(2)),
      ...(hasModes ? [extension(45, list(1, number(1, 1)))] : []),
      ...extensions,
      ...(identities ? [preSharedKeys(identities)] : []),
    ),
  ]);
  const message = Buffer.concat([number(1, 1), number(body.length, 3), body]);
  const records: Buffer[] = [];
  for (let at = 0; at < message.length; at += recordBytes) {
    records.push(Buffer.from([22, 3, 1]), list(2, message.subarray(at, at + recordBytes)));
  }
  return Buffer.concat(records);
}

export function extension(type: number, data: Buffer): Buffer {
  return Buffer.concat([number(type, 2), list(2, data)]);
}

function preSharedKeys(identities: readonly (string | Buffer)[]): Buffer {
  const offered = identities.map((identity) => Buffer.concat([list(2, Buffer.from(identity)), number(0, 4)]));
  const binders = identities.map(() => list(1, Buffer.alloc(32)));
  return extension(41, Buffer.concat([list(2, ...offered), list(2, ...binders)]));
}

/** With its length before it, a number of `width` bytes. */
export function list(width: number, ...parts: readonly Buffer[]): Buffer {
  const bytes = Buffer.concat(parts);
  return Buffer.concat([number(bytes.length, width), bytes]);
}

function number(value: number, width: number): Buffer {
  const bytes = Buffer.alloc(width);
  bytes.writeUIntBE(value, 0, width);
  return bytes;
}
