/**
 * Data are never parsed as requests: a guest, or a user of a filesystem, chooses the contents of blocks, and must not be able to
 * send requests with them. Every block here is full of encoded requests of every kind.
 */
import { createHash } from 'node:crypto';
import { describe, expect, test } from 'vitest';
import { CMD, CMD_FLAG, GREETING_SIZE, MAX_PAYLOAD, NBD_ERRNO, REP, REPLY_TYPE } from '../src/protocol/wire.js';
import { errorOf, extendedRequestBytes, RawClient, requestBytes, uint32, type Chunk } from './raw-client.js';
import { TestExport } from './test-device.js';
import { startServer, type TestServer } from './test-server.js';

const KIB = 1024;
/** The cookie of every request inside the data. An answer with it shows that such a request was carried out. */
const FORGED = 0xf0f0_f0f0n;
const LEVELS = ['simple', 'structured', 'extended'] as const;
type Level = (typeof LEVELS)[number];
/** Sizes that arrive with their header, in pieces, and directly in their buffer (see transmission.ts). */
const SIZES = [512, 4 * KIB, 40 * KIB, 200 * KIB];

/** One request of each command, in both header formats, each with an effect or an answer if it were carried out. */
function requestsOfEveryKind(): Buffer {
  const fields = Object.values(CMD).map((type) => ({
    type,
    cookie: FORGED,
    offset: type === CMD.FLUSH ? 0 : 64 * KIB,
    length: type === CMD.FLUSH ? 0 : 4 * KIB,
  }));
  return Buffer.concat([
    ...fields.map(requestBytes),
    ...fields.map(extendedRequestBytes),
    ...fields.map((each) => extendedRequestBytes({ ...each, flags: CMD_FLAG.PAYLOAD_LEN })),
  ]);
}

/** A block of `size` bytes full of requests, the first one at its beginning. */
function blockOfRequests(size: number): Buffer {
  return Buffer.alloc(size, requestsOfEveryKind());
}

async function connected(server: TestServer, level: Level, exportName = 'disk'): Promise<RawClient> {
  if (level === 'simple') return server.opened(exportName);
  const client = await server.raw();
  await client.openWith(level, exportName, ['base:allocation']);
  return client;
}

function headerOf(level: Level, fields: Parameters<typeof requestBytes>[0]): Buffer {
  return level === 'extended' ? extendedRequestBytes(fields) : requestBytes(fields);
}

/** The error value of a reply; 0 for success. */
function errnoOf(chunk: Chunk): number {
  if (chunk.kind === 'simple') return chunk.errno;
  return chunk.type >= REPLY_TYPE.ERROR ? errorOf(chunk).errno : 0;
}

/** Sends a read of four bytes that must be answered: client and server agree where requests begin. */
async function expectInStep(client: RawClient, level: Level): Promise<void> {
  client.send(headerOf(level, { type: CMD.READ, offset: 4, length: 4, cookie: 99n }));
  const chunk = await client.readChunk();
  expect(chunk.cookie).toBe(99n);
  expect(errnoOf(chunk)).toBe(0);
  const data = chunk.kind === 'simple' ? await client.read(4) : chunk.payload.subarray(8);
  expect(data).toEqual(uint32(5));
}

/** Sends bytes in pieces of at most `size`, each in its own packet if the kernel permits. */
async function sendInPieces(client: RawClient, bytes: Buffer, size: number): Promise<void> {
  for (let at = 0; at < bytes.length; at += size) {
    await new Promise((resolve) => client.socket.write(bytes.subarray(at, at + size), resolve));
  }
}

interface Write {
  readonly what: string;
  /** Flags of the request, in addition to those that the level needs. */
  readonly flags?: number;
  readonly offset?: number | bigint;
  readonly export?: string;
  readonly errno: number;
}

const WRITES: readonly Write[] = [
  { what: 'allowed', errno: 0 },
  { what: 'allowed, with FUA', flags: CMD_FLAG.FUA, errno: 0 },
  { what: 'to a read-only export', export: 'read-only', errno: NBD_ERRNO.EPERM },
  { what: 'with a flag of another command', flags: CMD_FLAG.REQ_ONE, errno: NBD_ERRNO.EINVAL },
  { what: 'with an unknown flag', flags: 0x8000, errno: NBD_ERRNO.EINVAL },
  { what: 'beyond the end', offset: 1024 * KIB - 1, errno: NBD_ERRNO.ENOSPC },
  { what: 'at 2^64-1', offset: 2n ** 64n - 1n, errno: NBD_ERRNO.ENOSPC },
  { what: 'that is not aligned', offset: 1, export: 'blocks', errno: NBD_ERRNO.EINVAL },
];

const everyExport = (): TestExport[] => [
  new TestExport('disk'),
  new TestExport('read-only', { readOnly: true }),
  new TestExport('blocks', { minimumBlockSize: 512 }),
];

for (const level of LEVELS) {
  describe(`blocks full of requests, ${level} replies`, () => {
    for (const hasFlag of level === 'extended' ? [true, false] : [false]) {
      const flagged = hasFlag ? ' with the payload flag' : level === 'extended' ? ' without the payload flag' : '';
      for (const write of WRITES) {
        test(`a write${flagged} ${write.what} has no effect beside the write itself`, async () => {
          const server = await startServer({ exports: everyExport() });
          const name = write.export ?? 'disk';
          const client = await connected(server, level, name);
          const exported = server.provider.exports.get(name) as TestExport;
          for (const size of SIZES) {
            const expected = Buffer.from(exported.disk);
            const data = blockOfRequests(size);
            const offset = write.offset ?? 300 * KIB;
            const flags = (write.flags ?? 0) | (hasFlag ? CMD_FLAG.PAYLOAD_LEN : 0);
            const request = headerOf(level, { type: CMD.WRITE, flags, offset, length: size, cookie: 7n });
            const message = Buffer.concat([request, data]);
            // Whole, with header and data apart, and in pieces that end inside the header and inside the data.
            for (const piece of [message.length, request.length, 19 * KIB]) {
              server.provider.calls.length = 0;
              await sendInPieces(client, message, piece);
              const chunk = await client.readChunk();
              expect(chunk.cookie).toBe(7n);
              expect(errnoOf(chunk)).toBe(write.errno);
              if (write.errno === 0) data.copy(expected, Number(offset));
              if (name === 'blocks') continue;
              await expectInStep(client, level);
              const methods = server.provider.calls.map(({ method }) => method);
              expect(methods).toEqual(write.errno === 0 ? ['write', 'read'] : ['read']);
            }
            expect(exported.disk.equals(expected)).toBe(true);
          }
          expect(server.provider.calls.filter(({ method }) => method !== 'read' && method !== 'write')).toEqual([]);
        });
      }

      test(`the data of a write${flagged} to a server that shuts down are consumed`, async () => {
        const server = await startServer();
        const client = await connected(server, level);
        const data = blockOfRequests(64 * KIB);
        let release = (): void => undefined;
        server.provider.hook = () => new Promise((resolve) => (release = resolve));
        client.send(headerOf(level, { type: CMD.FLUSH, cookie: 1n }));
        while (server.provider.unfinished === 0) await new Promise((resolve) => setTimeout(resolve, 1));
        const closed = server.server.close();
        const flags = hasFlag ? CMD_FLAG.PAYLOAD_LEN : 0;
        client.send(headerOf(level, { type: CMD.WRITE, flags, offset: 0, length: data.length, cookie: 7n }), data);
        client.send(headerOf(level, { type: CMD.FLUSH, cookie: 8n }));
        for (const cookie of [7n, 8n]) {
          const chunk = await client.readChunk();
          expect([chunk.cookie, errnoOf(chunk)]).toEqual([cookie, NBD_ERRNO.ESHUTDOWN]);
        }
        release();
        expect((await client.readChunk()).cookie).toBe(1n);
        await closed;
        expect(server.provider.calls.map(({ method }) => method)).toEqual(['flush']);
      });
    }
  });
}

test('a write of the largest size without the payload flag is accepted; an implausible length ends the connection', async () => {
  const server = await startServer({ exports: [new TestExport('disk', { size: MAX_PAYLOAD })] });
  const client = await connected(server, 'extended');
  const data = blockOfRequests(MAX_PAYLOAD);
  client.send(extendedRequestBytes({ type: CMD.WRITE, length: data.length, cookie: 1n }), data);
  expect(await client.readChunk()).toMatchObject({ cookie: 1n, type: REPLY_TYPE.NONE });
  const { disk } = server.provider.exports.get('disk') as TestExport;
  const hash = (bytes: Buffer): string => createHash('sha256').update(bytes).digest('hex');
  expect(hash(disk)).toBe(hash(data));
  client.send(extendedRequestBytes({ type: CMD.WRITE, length: 2n ** 40n, cookie: 2n }), data.subarray(0, 64 * KIB));
  expect(await client.readToEnd()).toHaveLength(0);
  await server.allOver();
  expect(server.provider.calls.map(({ method }) => method)).toEqual(['write']);
  expect(server.closes.at(-1)?.reason).toMatch(/^protocol violation: .*1099511627776 bytes/);
});

/**
 * What qemu-io 10.0.13 (Debian 13) and 11.1.3 send for `-f raw -c 'write -P 5 0 4096'`, seen on the wire: handshake, a write
 * with FUA and without the payload flag, a flush, and the end.
 */
const QEMU_SESSION = [
  '00000003 49484156454f5054 0000000b 00000000',
  '49484156454f5054 0000000a 0000001f 00000004 6469736b 00000001 0000000f 626173653a616c6c6f636174696f6e',
  '49484156454f5054 00000007 0000000c 00000004 6469736b 0001 0003',
  `21e41c71 0001 0001 0000000000000001 0000000000000000 0000000000001000 ${'05'.repeat(4096)}`,
  '21e41c71 0000 0003 0000000000000001 0000000000000000 0000000000000000',
  '21e41c71 0000 0002 0000000000000000 0000000000000000 0000000000000000',
].map((hex) => Buffer.from(hex.replaceAll(' ', ''), 'hex'));

test("qemu's session of one write, byte for byte, is answered and carried out", async () => {
  const server = await startServer();
  const client = await server.raw();
  await client.read(GREETING_SIZE);
  const [headers, contexts, go, write, flush, disconnect] = QEMU_SESSION as [
    Buffer,
    Buffer,
    Buffer,
    Buffer,
    Buffer,
    Buffer,
  ];
  client.send(headers);
  expect((await client.readOptionReply()).type).toBe(REP.ACK);
  client.send(contexts);
  for (const type of [REP.META_CONTEXT, REP.ACK]) expect((await client.readOptionReply()).type).toBe(type);
  client.send(go);
  for (const type of [REP.INFO, REP.INFO, REP.ACK]) expect((await client.readOptionReply()).type).toBe(type);
  for (const message of [write, flush]) {
    client.send(message);
    expect(await client.readChunk()).toMatchObject({
      kind: 'extended',
      cookie: 1n,
      type: REPLY_TYPE.NONE,
      isDone: true,
    });
  }
  client.send(disconnect);
  expect(await client.readToEnd()).toHaveLength(0);
  const { disk } = server.provider.exports.get('disk') as TestExport;
  expect(disk.subarray(0, 4096).equals(Buffer.alloc(4096, 5))).toBe(true);
  expect(server.provider.calls).toEqual([
    { method: 'write', offset: 0, length: 4096, fua: true },
    { method: 'flush', offset: 0, length: 0 },
  ]);
  await server.allOver();
  expect(server.closes[0]).toMatchObject({ reason: 'the client disconnected', errors: 0, violations: 0 });
});
