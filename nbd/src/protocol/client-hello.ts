/**
 * The first message of a TLS client (RFC 8446, 4.1.2), which is in the clear: whose pre-shared key the client wants to use. Owns
 * its layout. It never decides: whatever it cannot read, OpenSSL refuses or accepts as if nobody had looked.
 */

/** Longest ClientHello that is read, bytes, and its records; real ones have up to 2 KiB, in one. OpenSSL takes longer ones. */
export const MAX_CLIENT_HELLO = 16 * 1024;
const MAX_RECORDS = 8;

const RECORD_HEADER = 5;
const HANDSHAKE_RECORD = 22;
const MAX_RECORD = 16 * 1024;
const HANDSHAKE_HEADER = 4;
const CLIENT_HELLO = 1;
const EXTENSION = { PRE_SHARED_KEY: 41, SUPPORTED_VERSIONS: 43, PSK_KEY_EXCHANGE_MODES: 45 } as const;
const TLS_1_3 = 0x0304;

export interface ClientHello {
  /**
   * The names of the keys that the client offers in TLS 1.3, in its order, as they are on the wire. Empty for a client of TLS
   * 1.2, which names its key later.
   */
  readonly identities: readonly Buffer[];
}

/** What `bytes`, the first of a connection, begin with. They may go on after it. */
export function readClientHello(bytes: Buffer): ClientHello | 'incomplete' | 'unreadable' {
  const message = readMessage(bytes);
  if (typeof message === 'string') return message;
  try {
    return { identities: readIdentities(new Fields(message)) };
  } catch (error) {
    if (error instanceof RangeError) return 'unreadable';
    throw error;
  }
}

/** The body of the ClientHello, which may be cut into several records. */
function readMessage(bytes: Buffer): Buffer | 'incomplete' | 'unreadable' {
  const fragments: Buffer[] = [];
  let has = 0;
  for (let at = 0, records = 0; ; records += 1) {
    if (at >= bytes.length) return 'incomplete';
    if (bytes[at] !== HANDSHAKE_RECORD || records === MAX_RECORDS) return 'unreadable';
    if (at + RECORD_HEADER > bytes.length) return 'incomplete';
    const length = bytes.readUInt16BE(at + 3);
    if (bytes[at + 1] !== 3 || length === 0 || length > MAX_RECORD) return 'unreadable';
    const fragment = bytes.subarray(at + RECORD_HEADER, at + RECORD_HEADER + length);
    fragments.push(fragment);
    has += fragment.length;
    const message = fragments.length === 1 ? fragment : Buffer.concat(fragments);
    if (has > 0 && message[0] !== CLIENT_HELLO) return 'unreadable';
    if (has >= HANDSHAKE_HEADER) {
      const end = HANDSHAKE_HEADER + message.readUIntBE(1, 3);
      if (end > MAX_CLIENT_HELLO) return 'unreadable';
      if (has >= end) return message.subarray(HANDSHAKE_HEADER, end);
    }
    at += RECORD_HEADER + length;
  }
}

function readIdentities(hello: Fields): Buffer[] {
  hello.skip(2 + 32);
  hello.list(1); // session
  hello.list(2); // ciphers
  hello.list(1); // compression
  if (hello.isEmpty) return [];
  const extensions = hello.list(2);
  hello.mustBeEmpty();
  const found = new Map<number, Fields>();
  while (!extensions.isEmpty) {
    const type = extensions.number(2);
    if (found.has(type)) throw new RangeError('an extension twice');
    found.set(type, extensions.list(2));
  }
  const versions = found.get(EXTENSION.SUPPORTED_VERSIONS);
  const keys = found.get(EXTENSION.PRE_SHARED_KEY);
  if (versions === undefined || keys === undefined || !found.has(EXTENSION.PSK_KEY_EXCHANGE_MODES)) return [];
  if (!versions.list(1).numbers(2).includes(TLS_1_3)) return [];
  const identities: Buffer[] = [];
  const offered = keys.list(2);
  while (!offered.isEmpty) {
    identities.push(offered.list(2).bytes);
    offered.skip(4); // age
  }
  keys.list(2); // binders
  keys.mustBeEmpty();
  return identities;
}

/** Reads one field after the other. Errors: RangeError at the end. */
class Fields {
  readonly bytes: Buffer;
  #at = 0;

  constructor(bytes: Buffer) {
    this.bytes = bytes;
  }

  get isEmpty(): boolean {
    return this.#at === this.bytes.length;
  }

  mustBeEmpty(): void {
    if (!this.isEmpty) throw new RangeError('more than its length says');
  }

  skip(length: number): Buffer {
    const start = this.#at;
    if (start + length > this.bytes.length) throw new RangeError('cut off');
    this.#at += length;
    return this.bytes.subarray(start, this.#at);
  }

  number(width: number): number {
    return this.skip(width).readUIntBE(0, width);
  }

  /** All of them, up to the end. */
  numbers(width: number): number[] {
    const all: number[] = [];
    while (!this.isEmpty) all.push(this.number(width));
    return all;
  }

  /** What follows its own length, a number of `width` bytes. */
  list(width: number): Fields {
    return new Fields(this.skip(this.number(width)));
  }
}
