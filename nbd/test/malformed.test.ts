/**
 * Input that violates the protocol, one kind a line: the exact answer, and whether the connection continues. After every
 * kind another connection that was open all the time still works, a new client is served, and no device is left open.
 */

import { describe, expect, test } from 'vitest';
import { CMD, CMD_FLAG, GREETING_SIZE, NBD_ERRNO, OPT, REP, REQUEST_MAGIC } from '../src/protocol/wire.js';
import {
  infoQuery,
  optionBytes,
  optionHeader,
  requestBytes,
  uint16,
  uint32,
  USUAL_CLIENT_FLAGS,
  type RawClient,
  type RequestFields,
} from './raw-client.js';
import { DISK_SIZE, TestExport } from './test-device.js';
import { startServer, until, type TestServer } from './test-server.js';

const UNKNOWN_OPTION = 0x4e;
const MIB = 1024 * 1024;
const { EINVAL, ENOSPC, EPERM } = NBD_ERRNO;
/** Limits small enough to be reached in a test. */

const EXPORTS = [
  new TestExport('disk'),
  new TestExport('read-only', { readOnly: true }),
  new TestExport('plain', {
    ...{ canFlush: false, canFua: false, canTrim: false, canZero: false, canFastZero: false, canCache: false },
  }),
  new TestExport('no fast zero', { canFastZero: false }),
  new TestExport('aligned', { minimumBlockSize: 512 }),
  new TestExport('empty', { size: 0 }),
];

const none = Buffer.alloc(0);
/** Names that are not UTF-8: 0xff, a surrogate, a sequence cut short. */
const NO_TEXT = {
  'not UTF-8': Buffer.from([0x64, 0xff, 0x6b]),
  'a UTF-16 surrogate': Buffer.from([0xed, 0xa0, 0x80]),
  'an overlong encoding': Buffer.from([0xc0, 0xaf]),
  'cut within a character': Buffer.from('disk€').subarray(0, 6),
  'with a NUL inside': Buffer.from('di\0sk'),
  'with two NULs at its end': Buffer.from('disk\0\0'),
  'of 4097 bytes': Buffer.alloc(4097, 0x61),
};

async function withHealthyNeighbour(victim: (server: TestServer) => Promise<void>): Promise<void> {
  const server = await startServer({ exports: EXPORTS });
  const neighbour = await server.opened();
  await victim(server);

  await readsAWord(neighbour);
  const newcomer = await server.opened();
  await readsAWord(newcomer);
  newcomer.request({ type: CMD.DISC });
  await newcomer.readToEnd();
  await until(() => server.server.connections.size === 1, 'only the neighbour is left');
  await until(() => server.provider.openNow === 1, "only the neighbour's device is open");
  await readsAWord(neighbour);
  neighbour.request({ type: CMD.DISC });
  await neighbour.readToEnd();
  await server.allOver();
  expect(server.deviceErrors).toEqual([]);
}

async function readsAWord(client: RawClient): Promise<void> {
  client.request({ type: CMD.READ, offset: 4096, length: 4, cookie: 0xfeedn });
  expect(await client.readReply(4)).toEqual({ errno: 0, cookie: 0xfeedn, data: uint32(4097) });
}

async function isClosedWithoutAWord(client: RawClient): Promise<void> {
  expect((await client.readToEnd()).toString('hex')).toBe('');
}

// --- Input after which the server closes the connection without an answer ---

interface Fatal {
  readonly kind: string;
  /** Sent after the greeting was read. */
  readonly bytes: Buffer;
}

const fixed = (...parts: readonly Buffer[]): Buffer => Buffer.concat([uint32(USUAL_CLIENT_FLAGS), ...parts]);

const FATAL_HANDSHAKES: readonly Fatal[] = [
  { kind: 'client flags with the unknown bit 2', bytes: uint32(0b100) },
  { kind: 'client flags with an unknown bit beside the known ones', bytes: uint32(0b111) },
  { kind: 'client flags with bit 31', bytes: uint32(0x80000003) },
  { kind: 'client flags of all ones', bytes: uint32(0xffffffff) },
  { kind: 'an HTTP request instead of client flags', bytes: Buffer.from('GET / HTTP/1.1\r\n\r\n') },
  { kind: 'a TLS hello instead of client flags', bytes: Buffer.from('1603010200010001fc0303', 'hex') },
  { kind: 'zeros for an option magic', bytes: fixed(Buffer.alloc(16)) },
  { kind: 'the option magic wrong in its last bit', bytes: fixed(Buffer.from('IHAVEOPU'), Buffer.alloc(8)) },
  {
    kind: 'the option magic wrong in its first bit',
    bytes: fixed(Buffer.from('\xc9HAVEOPT', 'latin1'), Buffer.alloc(8)),
  },
  { kind: 'NBDMAGIC for an option magic', bytes: fixed(Buffer.from('NBDMAGIC'), Buffer.alloc(8)) },
  { kind: 'a bad magic after a good option', bytes: fixed(optionHeader(OPT.EXPORT_NAME, 0).fill(0, 0, 8)) },
  { kind: 'a request instead of an option', bytes: fixed(requestBytes({ type: CMD.READ, length: 512 })) },
  { kind: 'an option that claims 4 GiB of data', bytes: fixed(optionHeader(UNKNOWN_OPTION, 0xffffffff)) },
  { kind: 'an option that claims a byte more than is drained', bytes: fixed(optionHeader(OPT.LIST, MIB + 1)) },
  { kind: 'GO that claims 2 GiB of data', bytes: fixed(optionHeader(OPT.GO, 0x80000000)) },
  { kind: 'EXPORT_NAME that claims 4 GiB of name', bytes: fixed(optionHeader(OPT.EXPORT_NAME, 0xffffffff)) },
  { kind: 'EXPORT_NAME of 100000 bytes', bytes: fixed(optionBytes(OPT.EXPORT_NAME, Buffer.alloc(100_000, 0x61))) },
  { kind: 'EXPORT_NAME of an unknown export', bytes: fixed(optionBytes(OPT.EXPORT_NAME, Buffer.from('nothing'))) },
  { kind: 'EXPORT_NAME of the default export where there is none', bytes: fixed(optionBytes(OPT.EXPORT_NAME)) },
  ...Object.entries(NO_TEXT).map(([what, name]) => ({
    kind: `EXPORT_NAME ${what}`,
    bytes: fixed(optionBytes(OPT.EXPORT_NAME, name)),
  })),
];

describe('the server closes a handshake without an answer after', () => {
  for (const { kind, bytes } of FATAL_HANDSHAKES) {
    test(kind, () =>
      withHealthyNeighbour(async ({ raw }) => {
        const client = await raw();
        await client.read(GREETING_SIZE);
        client.send(bytes);
        await isClosedWithoutAWord(client);
      }),
    );
  }
});

// --- Options that are refused, after which the handshake continues ---

interface RefusedOption {
  readonly kind: string;
  readonly option: number;
  readonly data: Buffer;
  readonly answer: number;
}

const MALFORMED_QUERIES: readonly { readonly kind: string; readonly data: Buffer }[] = [
  { kind: 'no data', data: none },
  { kind: 'data cut within the name length', data: Buffer.alloc(3) },
  { kind: 'data cut before the name', data: uint32(4) },
  { kind: 'data cut within the name', data: infoQuery('disk').subarray(0, 6) },
  { kind: 'data cut before the count', data: infoQuery('disk').subarray(0, 8) },
  { kind: 'data cut within the count', data: infoQuery('disk').subarray(0, 9) },
  { kind: 'data cut within an information request', data: infoQuery('disk', [1, 2]).subarray(0, -1) },
  { kind: 'a name length one too large', data: infoQuery('disk', [], { nameLength: 5 }) },
  { kind: 'a name length one too small', data: infoQuery('disk', [], { nameLength: 3 }) },
  { kind: 'a name length of 0 before a name', data: infoQuery('disk', [], { nameLength: 0 }) },
  { kind: 'a name length of 2^32-1', data: infoQuery('disk', [], { nameLength: 0xffffffff }) },
  { kind: 'a name length of 2^31', data: infoQuery('disk', [], { nameLength: 0x80000000 }) },
  { kind: 'fewer information requests than counted', data: infoQuery('disk', [1], { infoCount: 2 }) },
  { kind: 'more information requests than counted', data: infoQuery('disk', [1, 2], { infoCount: 1 }) },
  { kind: 'information requests with a count of 0', data: infoQuery('disk', [3], { infoCount: 0 }) },
  { kind: 'a count of 65535 information requests without any', data: infoQuery('disk', [], { infoCount: 0xffff }) },
  { kind: 'a stray byte at the end', data: Buffer.concat([infoQuery('disk'), Buffer.alloc(1)]) },
  ...Object.entries(NO_TEXT).map(([what, name]) => ({ kind: `a name ${what}`, data: infoQuery(name) })),
];

const REFUSED_OPTIONS: readonly RefusedOption[] = [
  ...(['INFO', 'GO'] as const).flatMap((option) =>
    MALFORMED_QUERIES.map(({ kind, data }) => ({
      kind: `${option} with ${kind}`,
      option: OPT[option],
      data,
      answer: REP.ERR_INVALID,
    })),
  ),
  { kind: 'INFO of an unknown export', option: OPT.INFO, data: infoQuery('nothing'), answer: REP.ERR_UNKNOWN },
  { kind: 'GO to an unknown export', option: OPT.GO, data: infoQuery('nothing'), answer: REP.ERR_UNKNOWN },
  { kind: 'GO to a name of another case', option: OPT.GO, data: infoQuery('Disk'), answer: REP.ERR_UNKNOWN },
  { kind: 'LIST with data', option: OPT.LIST, data: Buffer.from('disk'), answer: REP.ERR_INVALID },
  { kind: 'LIST with one byte', option: OPT.LIST, data: Buffer.alloc(1), answer: REP.ERR_INVALID },
  { kind: 'option 0', option: 0, data: none, answer: REP.ERR_UNSUP },
  { kind: 'option 2^32-1', option: 0xffffffff, data: none, answer: REP.ERR_UNSUP },
  { kind: 'an unknown option', option: UNKNOWN_OPTION, data: none, answer: REP.ERR_UNSUP },
  {
    kind: 'an unknown option with data',
    option: UNKNOWN_OPTION,
    data: Buffer.alloc(65536, 0x49),
    answer: REP.ERR_UNSUP,
  },
  { kind: 'the withdrawn PEEK_EXPORT', option: OPT.PEEK_EXPORT, data: Buffer.from('disk'), answer: REP.ERR_UNSUP },
  {
    kind: 'data of one byte more than an option may have',
    option: OPT.LIST,
    data: Buffer.alloc(65537),
    answer: REP.ERR_TOO_BIG,
  },
  {
    kind: 'data of the largest size that is drained',
    option: UNKNOWN_OPTION,
    data: Buffer.alloc(MIB),
    answer: REP.ERR_TOO_BIG,
  },
  {
    kind: 'GO with 1 MiB of option headers',
    option: OPT.GO,
    data: Buffer.alloc(MIB, 'IHAVEOPT'),
    answer: REP.ERR_TOO_BIG,
  },
];

describe('a handshake continues, with the right refusal, after', () => {
  for (const { kind, option, data, answer } of REFUSED_OPTIONS) {
    test(kind, () =>
      withHealthyNeighbour(async ({ raw, provider }) => {
        const client = await raw();
        await client.greet();
        const replies = await client.option(option, data);
        expect(replies.map((reply) => ({ option: reply.option, type: reply.type }))).toEqual([
          { option, type: answer },
        ]);
        expect(provider.openNow).toBe(1);
        expect((await client.option(OPT.GO, infoQuery('disk'))).at(-1)?.type).toBe(REP.ACK);
        await readsAWord(client);
        client.vanish();
      }),
    );
  }
});

// --- Requests that are refused, after which the connection continues ---

interface RefusedRequest {
  readonly kind: string;
  readonly request: RequestFields;
  readonly errno: number;
  readonly export?: string;
  readonly payload?: Buffer;
}

const RANGED = [
  { command: 'READ', type: CMD.READ, outOfRange: EINVAL },
  { command: 'WRITE', type: CMD.WRITE, outOfRange: ENOSPC },
  { command: 'TRIM', type: CMD.TRIM, outOfRange: EINVAL },
  { command: 'CACHE', type: CMD.CACHE, outOfRange: EINVAL },
  { command: 'WRITE_ZEROES', type: CMD.WRITE_ZEROES, outOfRange: ENOSPC },
] as const;

const BAD_RANGES: readonly { readonly where: string; readonly offset: number | bigint; readonly length: number }[] = [
  { where: 'one byte past the end', offset: DISK_SIZE - 511, length: 512 },
  { where: 'beginning at the end', offset: DISK_SIZE, length: 1 },
  { where: 'far past the end', offset: 2 ** 40, length: 512 },
  { where: 'at 2^53-1', offset: 2n ** 53n - 1n, length: 512 },
  { where: 'at 2^53', offset: 2n ** 53n, length: 512 },
  { where: 'at 2^63', offset: 2n ** 63n, length: 512 },
  { where: 'at 2^64-1', offset: 2n ** 64n - 1n, length: 1 },
  { where: 'where offset and length overflow 64 bits to a good place', offset: 2n ** 64n - 512n, length: 1024 },
  { where: 'where offset is negative as a signed number', offset: 2n ** 64n - 4096n, length: 512 },
  { where: 'of no length past the end', offset: DISK_SIZE + 1, length: 0 },
  { where: 'of no length at 2^64-1', offset: 2n ** 64n - 1n, length: 0 },
];

function payloadOf(type: number, length: number): Buffer {
  // Full of request magics: a payload that is not skipped whole would be parsed as requests.
  return type === CMD.WRITE && length > 0 ? Buffer.alloc(length, uint32(REQUEST_MAGIC)) : none;
}

const refusedFlags = (
  command: keyof typeof CMD,
  flags: readonly number[],
  extra: { readonly export?: string } = {},
): RefusedRequest[] =>
  flags.map((flag) => ({
    kind: `${command} with flags 0x${flag.toString(16)}${extra.export === undefined ? '' : ` on ${extra.export}`}`,
    request: { type: CMD[command], flags: flag, length: command === 'FLUSH' ? 0 : 512 },
    errno: EINVAL,
    payload: payloadOf(CMD[command], 512),
    ...extra,
  }));

const REFUSED_REQUESTS: readonly RefusedRequest[] = [
  ...[7, 8, 9, 0x7f, 0x100, 0xffff].map((type) => ({
    kind: `command ${type}, which nothing was negotiated for`,
    request: { type, length: 512 },
    errno: EINVAL,
  })),
  ...RANGED.flatMap(({ command, type, outOfRange }) =>
    BAD_RANGES.map(({ where, offset, length }) => ({
      kind: `${command} ${where}`,
      request: { type, offset, length },
      errno: outOfRange,
      payload: payloadOf(type, length),
    })),
  ),
  ...(['TRIM', 'WRITE_ZEROES', 'CACHE'] as const).map((command) => ({
    kind: `${command} of 4 GiB`,
    request: { type: CMD[command], length: 0xffffffff },
    errno: command === 'WRITE_ZEROES' ? ENOSPC : EINVAL,
  })),
  { kind: 'READ of a byte more than 32 MiB', request: { type: CMD.READ, length: 32 * MIB + 1 }, errno: EINVAL },
  { kind: 'READ of 4 GiB', request: { type: CMD.READ, length: 0xffffffff }, errno: EINVAL },
  {
    kind: 'WRITE of a byte more than 32 MiB, its payload drained',
    request: { type: CMD.WRITE, length: 32 * MIB + 1 },
    errno: EINVAL,
    payload: Buffer.alloc(32 * MIB + 1, uint32(REQUEST_MAGIC)),
  },
  {
    kind: 'WRITE of 64 MiB, its payload drained',
    request: { type: CMD.WRITE, length: 64 * MIB },
    errno: EINVAL,
    payload: Buffer.alloc(64 * MIB, uint32(REQUEST_MAGIC)),
  },
  ...refusedFlags('READ', [CMD_FLAG.NO_HOLE, CMD_FLAG.REQ_ONE, CMD_FLAG.FAST_ZERO, CMD_FLAG.PAYLOAD_LEN, 0x40, 0x8000]),
  ...refusedFlags('WRITE', [CMD_FLAG.NO_HOLE, CMD_FLAG.DF, CMD_FLAG.REQ_ONE, CMD_FLAG.FAST_ZERO, 0x40, 0xffff]),
  ...refusedFlags('FLUSH', [CMD_FLAG.NO_HOLE, CMD_FLAG.DF, CMD_FLAG.REQ_ONE, CMD_FLAG.FAST_ZERO, 0x40, 0x8000]),
  ...refusedFlags('TRIM', [CMD_FLAG.NO_HOLE, CMD_FLAG.DF, CMD_FLAG.REQ_ONE, CMD_FLAG.FAST_ZERO, 0x40, 0x8000]),
  ...refusedFlags('CACHE', [CMD_FLAG.NO_HOLE, CMD_FLAG.DF, CMD_FLAG.REQ_ONE, CMD_FLAG.FAST_ZERO, 0x40, 0x8000]),
  ...refusedFlags('WRITE_ZEROES', [CMD_FLAG.DF, CMD_FLAG.REQ_ONE, CMD_FLAG.PAYLOAD_LEN, 0x40, 0x8000]),
  ...refusedFlags('WRITE_ZEROES', [CMD_FLAG.FAST_ZERO], { export: 'no fast zero' }),
  ...refusedFlags('READ', [CMD_FLAG.FUA], { export: 'plain' }),
  ...refusedFlags('WRITE', [CMD_FLAG.FUA], { export: 'plain' }),
  ...(['FLUSH', 'TRIM', 'WRITE_ZEROES', 'CACHE'] as const).map((command) => ({
    kind: `${command} to an export that does not announce it`,
    request: { type: CMD[command], length: command === 'FLUSH' ? 0 : 512 },
    errno: EINVAL,
    export: 'plain',
  })),
  ...(['WRITE', 'TRIM', 'WRITE_ZEROES'] as const).map((command) => ({
    kind: `${command} to a read-only export`,
    request: { type: CMD[command], length: 512 },
    errno: EPERM,
    export: 'read-only',
    payload: payloadOf(CMD[command], 512),
  })),
  ...RANGED.flatMap(({ command, type }) =>
    [
      { what: 'an unaligned offset', offset: 256, length: 512 },
      { what: 'an unaligned length', offset: 512, length: 511 },
    ].map(({ what, offset, length }) => ({
      kind: `${command} with ${what} to an export with a minimum block size`,
      request: { type, offset, length },
      errno: EINVAL,
      export: 'aligned',
      payload: payloadOf(type, length),
    })),
  ),
];

describe('a connection continues, with the right error, after', () => {
  for (const { kind, request, errno, export: exportName = 'disk', payload = none } of REFUSED_REQUESTS) {
    test(kind, () =>
      withHealthyNeighbour(async ({ opened, provider }) => {
        const client = await opened(exportName);
        client.request({ ...request, cookie: 0xabad1dean }, payload);
        expect(await client.readReply()).toMatchObject({ errno, cookie: 0xabad1dean });
        expect(provider.calls).toEqual([]);
        client.request({ type: CMD.READ, offset: 512, length: 512, cookie: 2n });
        const next = await client.readReply(512);
        expect({ errno: next.errno, cookie: next.cookie, word: next.data.readUInt32BE(0) }).toEqual({
          ...{ errno: 0, cookie: 2n, word: 513 },
        });
        client.vanish();
      }),
    );
  }

  test('a request of one byte to an export of no bytes', () =>
    withHealthyNeighbour(async ({ opened }) => {
      const client = await opened('empty');
      client.request({ type: CMD.READ, length: 1, cookie: 1n });
      client.request({ type: CMD.WRITE, length: 1, cookie: 2n }, Buffer.alloc(1));
      client.request({ type: CMD.READ, length: 0, cookie: 3n });
      expect(await client.readReply()).toMatchObject({ errno: EINVAL, cookie: 1n });
      expect(await client.readReply()).toMatchObject({ errno: ENOSPC, cookie: 2n });
      expect(await client.readReply()).toMatchObject({ errno: 0, cookie: 3n });
      client.vanish();
    }));

  test('a thousand refused requests in a row, each answered in order', () =>
    withHealthyNeighbour(async ({ opened }) => {
      const client = await opened();
      const cookies = Array.from({ length: 1000 }, (_, i) => BigInt(i));
      client.send(...cookies.map((cookie) => requestBytes({ type: 0xffff, cookie, length: 512 })));
      for (const cookie of cookies) expect(await client.readReply()).toMatchObject({ errno: EINVAL, cookie });
      client.vanish();
    }));
});

// --- Requests after which the server closes the connection ---

const FATAL_REQUESTS: readonly Fatal[] = [
  { kind: 'a request magic of zeros', bytes: requestBytes({ type: CMD.READ, length: 4, magic: 0 }) },
  { kind: 'a request magic wrong in one bit', bytes: requestBytes({ type: CMD.READ, magic: REQUEST_MAGIC ^ 1 }) },
  { kind: 'the magic of a reply for a request', bytes: requestBytes({ type: CMD.READ, magic: 0x67446698 }) },
  {
    kind: 'the magic of extended headers that were not negotiated',
    bytes: requestBytes({ type: CMD.READ, magic: 0x21e41c71 }),
  },
  { kind: 'a disconnect with a bad magic', bytes: requestBytes({ type: CMD.DISC, magic: 0xffffffff }) },
  { kind: 'an option in the transmission phase', bytes: optionBytes(OPT.GO, infoQuery('disk', [1])) },
  { kind: 'an HTTP request', bytes: Buffer.from('GET /index.html HTTP/1.1\r\n\r\n') },
  { kind: 'a WRITE of more than is drained', bytes: requestBytes({ type: CMD.WRITE, length: 64 * MIB + 1 }) },
  { kind: 'a WRITE that claims 4 GiB', bytes: requestBytes({ type: CMD.WRITE, length: 0xffffffff }) },
];

describe('the server closes a connection after', () => {
  for (const { kind, bytes } of FATAL_REQUESTS) {
    test(kind, () =>
      withHealthyNeighbour(async ({ opened, provider }) => {
        const client = await opened();
        client.send(bytes);
        await isClosedWithoutAWord(client);
        expect(provider.calls).toEqual([]);
      }),
    );
  }

  test('a bad magic that follows valid requests, which are answered', () =>
    withHealthyNeighbour(async ({ opened }) => {
      const client = await opened();
      client.send(
        requestBytes({ type: CMD.READ, offset: 4, length: 4, cookie: 1n }),
        requestBytes({ type: CMD.READ, length: 4, magic: 0 }),
        requestBytes({ type: CMD.READ, offset: 8, length: 4, cookie: 3n }),
      );
      expect(await client.readReply(4)).toEqual({ errno: 0, cookie: 1n, data: uint32(5) });
      await isClosedWithoutAWord(client);
    }));

  test('a payload longer than the length of its WRITE', () =>
    withHealthyNeighbour(async ({ opened }) => {
      const client = await opened();
      client.send(
        requestBytes({ type: CMD.WRITE, offset: 0, length: 4, cookie: 1n }),
        uint32(1),
        Buffer.alloc(28, 0xee),
      );
      expect(await client.readReply()).toMatchObject({ errno: 0, cookie: 1n });
      await isClosedWithoutAWord(client);
    }));
});

// --- Clients that leave within a message ---

interface Departure {
  readonly from: string;
  /** Sent after the greeting was read. */
  readonly bytes: Buffer;
}

/** Every prefix that ends at a boundary of a structure, or one byte before or after it. */
function prefixes(what: string, parts: readonly { readonly name: string; readonly bytes: Buffer }[]): Departure[] {
  const departures: Departure[] = [];
  let before = none;
  for (const { name, bytes } of parts) {
    if (bytes.length > 1) {
      departures.push({ from: `${what}: one byte into ${name}`, bytes: Buffer.concat([before, bytes.subarray(0, 1)]) });
      departures.push({
        from: `${what}: one byte before ${name} ends`,
        bytes: Buffer.concat([before, bytes.subarray(0, -1)]),
      });
    }
    before = Buffer.concat([before, bytes]);
    departures.push({ from: `${what}: behind ${name}`, bytes: before });
  }
  return departures;
}

const flagsPart = { name: 'the client flags', bytes: uint32(USUAL_CLIENT_FLAGS) };
const goPart = { name: 'GO', bytes: optionBytes(OPT.GO, infoQuery('disk')) };

const DEPARTURES: readonly Departure[] = [
  { from: 'the greeting, having said nothing', bytes: none },
  ...prefixes('a handshake', [
    flagsPart,
    { name: 'the option magic', bytes: Buffer.from('IHAVEOPT') },
    { name: 'the option number', bytes: uint32(OPT.GO) },
    { name: 'the option length', bytes: uint32(infoQuery('disk', [1]).length) },
    { name: 'the name length', bytes: uint32(4) },
    { name: 'the name', bytes: Buffer.from('disk') },
    { name: 'the count of information requests', bytes: uint16(1) },
    { name: 'the information request', bytes: uint16(1) },
  ]),
  ...prefixes('an option that is drained', [
    flagsPart,
    { name: 'the header', bytes: optionHeader(UNKNOWN_OPTION, MIB) },
    { name: 'half of the data', bytes: Buffer.alloc(MIB / 2) },
  ]),
  ...prefixes('EXPORT_NAME', [
    flagsPart,
    { name: 'all of it', bytes: optionBytes(OPT.EXPORT_NAME, Buffer.from('disk')) },
  ]),
  ...prefixes('a write', [
    flagsPart,
    goPart,
    { name: 'its magic', bytes: uint32(REQUEST_MAGIC) },
    { name: 'its flags and type', bytes: requestBytes({ type: CMD.WRITE }).subarray(4, 8) },
    { name: 'its cookie', bytes: Buffer.alloc(8, 7) },
    { name: 'its offset', bytes: requestBytes({ type: CMD.WRITE, offset: DISK_SIZE / 2 }).subarray(16, 24) },
    { name: 'its length', bytes: uint32(300_000) },
    { name: 'a part of its payload', bytes: Buffer.alloc(150_000) },
    { name: 'the rest of its payload', bytes: Buffer.alloc(150_000) },
  ]),
  ...prefixes('a refused write', [
    flagsPart,
    goPart,
    { name: 'its header', bytes: requestBytes({ type: CMD.WRITE, offset: 2n ** 63n, length: 300_000 }) },
    { name: 'a part of its payload', bytes: Buffer.alloc(150_000) },
  ]),
  ...prefixes('a disconnect', [flagsPart, goPart, { name: 'the request', bytes: requestBytes({ type: CMD.DISC }) }]),
];

describe('no device is left open by a client that leaves', () => {
  for (const { from, bytes } of DEPARTURES) {
    test(`${from}, by a half-close`, () =>
      withHealthyNeighbour(async ({ raw }) => {
        const client = await raw();
        await client.read(GREETING_SIZE);
        client.send(bytes);
        client.halfClose();
        await client.readToEnd();
      }));

    test(`${from}, by a reset`, () =>
      withHealthyNeighbour(async ({ raw }) => {
        const client = await raw();
        await client.read(GREETING_SIZE);
        await new Promise((resolve) => client.socket.write(bytes, resolve));
        client.vanish();
      }));
  }

  test('before it has read the greeting', () =>
    withHealthyNeighbour(async ({ raw }) => {
      (await raw()).vanish();
    }));
});
