/** The client with each kind of replies, against this library's server and against servers that violate the protocol. */

import net from 'node:net';
import { join } from 'node:path';
import { describe, expect, onTestFinished, test } from 'vitest';
import {
  ALLOCATION_CONTEXT,
  DeviceError,
  NbdClient,
  NbdClientError,
  STATE_HOLE,
  STATE_ZERO,
  type Extent,
  type ReplyLevel,
} from '../src/index.js';
import {
  CMD_FLAG,
  EXTENDED_REPLY_MAGIC,
  EXTENDED_REQUEST_SIZE,
  OPT,
  OPTION_HEADER_SIZE,
  REP,
  REPLY_TYPE,
  REQUEST_HEADER_SIZE,
  SIMPLE_REPLY_MAGIC,
  STRUCTURED_REPLY_MAGIC,
} from '../src/protocol/wire.js';
import { RawClient, uint16, uint32, uint64 } from './raw-client.js';
import { DISK_SIZE, TestExport } from './test-device.js';
import { startServer, temporaryDirectory, type TestServer } from './test-server.js';

const KIB = 1024;
const MIB = 1024 * KIB;
const LEVELS = ['simple', 'structured', 'extended'] as const;
const CHANGED = 'x-test:changed';
const ZERO_HOLE = STATE_HOLE | STATE_ZERO;

async function opened(server: TestServer, replies?: ReplyLevel, contexts?: readonly string[]): Promise<NbdClient> {
  const client = await NbdClient.connect({ path: server.path, replies });
  onTestFinished(() => client.destroy());
  if (contexts !== undefined) await client.selectContexts('disk', contexts);
  await client.go('disk');
  return client;
}

async function failureOf(work: Promise<unknown>): Promise<NbdClientError> {
  const error: unknown = await work.then(
    () => undefined,
    (reason: unknown) => reason,
  );
  if (!(error instanceof NbdClientError)) throw new Error(`was to fail with an NbdClientError, not ${String(error)}`);
  return error;
}

function optionReply(option: number, type: number, data: Buffer = Buffer.alloc(0)): Buffer {
  return Buffer.concat([
    Buffer.from('0003e889045565a9', 'hex'),
    uint32(option),
    uint32(type),
    uint32(data.length),
    data,
  ]);
}

/**
 * A server that supports the requested level and one context, selected with `id`. After the handshake it does what
 * `behave` says. `refused` options are answered UNSUP.
 */
async function fakeServer(
  behave: (peer: RawClient) => Promise<void>,
  { refused = [], id = 7, flags = 0x1085 }: { refused?: readonly number[]; id?: number; flags?: number } = {},
): Promise<string> {
  const path = join(await temporaryDirectory(), 'fake.sock');
  const failures: unknown[] = [];
  const sockets = new Set<net.Socket>();
  const serve = async (peer: RawClient): Promise<void> => {
    peer.send(Buffer.from('NBDMAGICIHAVEOPT'), uint16(3));
    await peer.read(4);
    for (;;) {
      const header = await peer.read(OPTION_HEADER_SIZE);
      await peer.read(header.readUInt32BE(12));
      const option = header.readUInt32BE(8);
      if (refused.includes(option)) {
        peer.send(optionReply(option, REP.ERR_UNSUP));
        continue;
      }
      if (option === OPT.SET_META_CONTEXT) {
        peer.send(optionReply(option, REP.META_CONTEXT, Buffer.concat([uint32(id), Buffer.from(ALLOCATION_CONTEXT)])));
      }
      if (option === OPT.GO) {
        peer.send(optionReply(option, REP.INFO, Buffer.concat([uint16(0), uint64(DISK_SIZE), uint16(flags)])));
      }
      peer.send(optionReply(option, REP.ACK));
      if (option === OPT.GO) return behave(peer);
    }
  };
  const listener = net.createServer((socket) => {
    sockets.add(socket);
    serve(new RawClient(socket)).catch((error: unknown) => failures.push(error));
  });
  onTestFinished(() => {
    for (const socket of sockets) socket.destroy();
    listener.close();
    expect(failures).toEqual([]);
  });
  await new Promise<void>((resolve) => listener.listen(path, resolve));
  return path;
}

describe('negotiation', () => {
  for (const { refused, expected } of [
    { refused: [], expected: 'extended' },
    { refused: [OPT.EXTENDED_HEADERS], expected: 'structured' },
    { refused: [OPT.EXTENDED_HEADERS, OPT.STRUCTURED_REPLY], expected: 'simple' },
  ]) {
    test(`a client of a server that refuses options ${JSON.stringify(refused)} has ${expected} replies`, async () => {
      const path = await fakeServer(() => Promise.resolve(), { refused });
      const client = await NbdClient.connect({ path });
      expect(client.replyLevel).toBeUndefined();
      await client.go('disk');
      expect(client.replyLevel).toBe(expected);
      expect(client.contexts).toEqual(expected === 'simple' ? [] : [ALLOCATION_CONTEXT]);
      client.destroy();
    });
  }

  for (const replies of LEVELS) {
    test(`a client that must use ${replies} replies does so`, async () => {
      const client = await opened(await startServer(), replies);
      expect(client.replyLevel).toBe(replies);
      expect(await client.read(4, 4)).toEqual(uint32(5));
    });
  }

  for (const replies of ['structured', 'extended'] as const) {
    test(`a client that must use ${replies} replies fails if the server does not support them`, async () => {
      const path = await fakeServer(() => Promise.resolve(), { refused: [OPT.EXTENDED_HEADERS, OPT.STRUCTURED_REPLY] });
      const client = await NbdClient.connect({ path, replies });
      expect((await failureOf(client.go('disk'))).code).toBe('UNSUPPORTED');
      client.destroy();
    });
  }

  test('contexts are listed, all or by query, and selected; unknown contexts are left out', async () => {
    const server = await startServer({
      exports: [new TestExport('disk', { contexts: [ALLOCATION_CONTEXT, CHANGED] })],
    });
    const client = await NbdClient.connect({ path: server.path });
    expect(await client.listContexts('disk')).toEqual([ALLOCATION_CONTEXT, CHANGED]);
    expect(await client.listContexts('disk', ['x-test:'])).toEqual([CHANGED]);
    expect(await client.selectContexts('disk', [CHANGED, 'x-test:nothing'])).toEqual([CHANGED]);
    await client.go('disk');
    expect(client.contexts).toEqual([CHANGED]);
    expect((await failureOf(client.blockStatus(ALLOCATION_CONTEXT, 0, 4096))).code).toBe('UNSUPPORTED');
    client.destroy();
  });

  test('a selection that was refused is none: go() selects base:allocation', async () => {
    const { path } = await startServer();
    const client = await NbdClient.connect({ path });
    onTestFinished(() => client.destroy());
    await client.selectContexts('disk', []);
    expect((await failureOf(client.selectContexts('missing', ['base:allocation']))).code).toBe('UNKNOWN_EXPORT');
    await client.go('disk');
    expect(client.contexts).toEqual(['base:allocation']);
  });

  test('no contexts can be selected of any server, also of one that has none', async () => {
    const path = await fakeServer(() => Promise.resolve(), { refused: [OPT.SET_META_CONTEXT] });
    const client = await NbdClient.connect({ path });
    onTestFinished(() => client.destroy());
    expect(await client.selectContexts('disk', [])).toEqual([]);
    await client.go('disk');
    expect(client.contexts).toEqual([]);
  });

  test('an answer to an option that never ends fails', async () => {
    const path = join(await temporaryDirectory(), 'fake.sock');
    const listener = net.createServer((socket) => {
      socket.on('error', () => undefined);
      socket.write(Buffer.concat([Buffer.from('NBDMAGICIHAVEOPT'), uint16(3)]));
      const entry = optionReply(OPT.LIST, REP.SERVER, Buffer.concat([uint32(1), Buffer.alloc(60_000, 0x61)]));
      const more = (): void => {
        while (!socket.destroyed && socket.write(entry));
      };
      socket.once('data', more).on('drain', more);
    });
    onTestFinished(() => void listener.close());
    await new Promise<void>((resolve) => listener.listen(path, resolve));
    const client = await NbdClient.connect({ path });
    expect((await failureOf(client.list())).code).toBe('PROTOCOL');
  });
});

for (const level of LEVELS) {
  describe(`with ${level} replies`, () => {
    test('every request is answered', async () => {
      const server = await startServer();
      const client = await opened(server, level);
      const data = Buffer.from('a few bytes, at an odd place');
      await client.write(1001, data, { fua: true });
      expect((await client.read(1001, data.length)).toString()).toBe(data.toString());
      await client.zero(1003, 5, { noHole: true });
      await client.trim(1010, 2);
      await client.flush();
      await client.cache(0, 4096);
      expect(await client.read(1001, data.length)).toEqual(Buffer.from(data).fill(0, 2, 7).fill(0, 9, 11));
      expect(await client.read(0, 0)).toHaveLength(0);
      await client.write(0, Buffer.alloc(0));
      await client.disconnect();
      await server.allOver();
    });

    test('reads with holes are assembled, and the holes are reported', async () => {
      const exported = new TestExport('disk');
      exported.disk.fill(0, 100 * KIB, 300 * KIB);
      exported.disk.fill(0, 900 * KIB, MIB);
      const client = await opened(await startServer({ exports: [exported] }), level);
      const holes: [number, number][] = [];
      const into = Buffer.alloc(MIB - 777, 0xee);
      await client.readInto(777, into, { onHole: (offset, length) => holes.push([offset, length]) });
      expect(into.equals(exported.disk.subarray(777))).toBe(true);
      const expected = [
        [100 * KIB, 200 * KIB],
        [900 * KIB, 124 * KIB],
      ];
      expect(holes).toEqual(level === 'simple' ? [] : expected);
    });

    test('a read with DF is a single chunk at levels with chunks', async () => {
      const exported = new TestExport('disk');
      exported.disk.fill(0, 100 * KIB, 300 * KIB);
      const server = await startServer({ exports: [exported] });
      const client = await NbdClient.connect({ path: server.path, replies: level });
      const { canDf } = await client.go('disk');
      expect(canDf).toBe(level !== 'simple');
      const holes: number[] = [];
      const data = await client.read(0, MIB, { df: canDf, onHole: (offset) => holes.push(offset) });
      expect(data.equals(exported.disk)).toBe(true);
      expect(holes).toEqual([]);
      client.destroy();
    });

    test("an error has the server's message, if any, and the connection continues", async () => {
      const server = await startServer();
      const client = await opened(server, level);
      server.provider.hook = () => {
        throw new DeviceError('ENOSPC', 'the pool is full', { offset: 6000 });
      };
      const failure = await failureOf(client.write(4096, Buffer.alloc(4096)));
      expect(failure.code).toBe('ENOSPC');
      if (level === 'simple') {
        expect(failure.message).toBe('write of 4096 bytes at 4096: the server answered ENOSPC');
        expect(failure.offset).toBeUndefined();
      } else {
        expect(failure.message).toBe(
          'write of 4096 bytes at 4096: the server answered ENOSPC for what is at 6000: the pool is full',
        );
        expect(failure.offset).toBe(6000);
      }
      server.provider.hook = () => undefined;
      expect(await client.read(4, 4)).toEqual(uint32(5));
    });

    test('a thousand concurrent requests each get their own answer', async () => {
      const exported = new TestExport('disk', { size: 4 * MIB });
      exported.disk.fill(0, MIB, 2 * MIB);
      const server = await startServer({ exports: [exported] });
      server.provider.hook = ({ offset }) => (offset % 3 === 0 ? Promise.resolve() : undefined);
      const client = await opened(server, level);
      const reads = Array.from({ length: 1000 }, (_, i) => ({
        offset: i * 4096,
        length: i % 10 === 0 ? 160_000 : 512,
      }));
      const fitting = reads.map(({ offset, length }) => ({ offset, length: Math.min(length, 4 * MIB - offset) }));
      const data = await Promise.all(fitting.map(({ offset, length }) => client.read(offset, length)));
      data.forEach((bytes, i) => {
        const { offset, length } = fitting[i] ?? { offset: 0, length: 0 };
        expect(bytes.equals(exported.disk.subarray(offset, offset + length))).toBe(true);
      });
    });

    test('zeroes and trims of more than 4 GiB are done, in one request or in several', async () => {
      const huge = new TestExport('disk', { size: 0 });
      const server = await startServer({
        exports: [Object.assign(huge, { geometry: { ...huge.geometry, size: 2 ** 50 } })],
      });
      const client = await opened(server, level);
      await client.trim(4096, 5 * 2 ** 31);
      await client.zero(4096, 2 ** 32 + 4096, { fua: true });
      const covered = { trim: 0, zero: 0 };
      for (const call of server.provider.calls) {
        if (call.method !== 'trim' && call.method !== 'zero') throw new Error(call.method);
        expect(call.offset).toBe(4096 + covered[call.method]);
        covered[call.method] += call.length;
      }
      expect(covered).toEqual({ trim: 5 * 2 ** 31, zero: 2 ** 32 + 4096 });
      expect(server.provider.calls.length === 2).toBe(level === 'extended');
    });

    test('block status returns the extents, or an error', async () => {
      const exported = new TestExport('disk');
      exported.disk.fill(0, 64 * KIB, 128 * KIB);
      const server = await startServer({ exports: [exported] });
      const client = await opened(server, level);
      if (level === 'simple') {
        expect((await failureOf(client.blockStatus(ALLOCATION_CONTEXT, 0, 4096))).code).toBe('UNSUPPORTED');
        return;
      }
      expect(await client.blockStatus(ALLOCATION_CONTEXT, 4096, 200 * KIB)).toEqual([
        { offset: 4096, length: 60 * KIB, flags: 0 },
        { offset: 64 * KIB, length: 64 * KIB, flags: ZERO_HOLE },
        { offset: 128 * KIB, length: 76 * KIB, flags: 0 },
      ]);
      expect(await client.blockStatus(ALLOCATION_CONTEXT, 64 * KIB, MIB / 2, { one: true })).toEqual([
        { offset: 64 * KIB, length: 64 * KIB, flags: ZERO_HOLE },
      ]);
      const failure = await failureOf(client.blockStatus(ALLOCATION_CONTEXT, MIB, 1));
      expect(failure.message).toContain('beyond the end');
    });

    test('the extents of several contexts each have their own flags', async () => {
      if (level === 'simple') return;
      const exported = new TestExport('disk', { contexts: [ALLOCATION_CONTEXT, CHANGED] });
      exported.extents = (context, offset, length, sink) => void sink(offset, length, context === CHANGED ? 5 : 3);
      const server = await startServer({ exports: [exported] });
      const client = await opened(server, level, [ALLOCATION_CONTEXT, CHANGED]);
      expect(await client.blockStatus(CHANGED, 0, 4096)).toEqual([{ offset: 0, length: 4096, flags: 5 }]);
      expect(await client.blockStatus(ALLOCATION_CONTEXT, 0, 4096)).toEqual([{ offset: 0, length: 4096, flags: 3 }]);
      // With extended headers the client requests one context only.
      expect(server.provider.calls).toHaveLength(level === 'extended' ? 2 : 4);
    });
  });
}

describe('servers that violate the protocol', () => {
  const DONE = 1;

  interface Header {
    readonly level: 'structured' | 'extended';
    readonly request: Buffer;
  }

  function chunk({ level, request }: Header, flags: number, type: number, payload: Buffer = Buffer.alloc(0)): Buffer {
    const cookie = request.subarray(8, 16);
    if (level === 'structured') {
      return Buffer.concat([
        uint32(STRUCTURED_REPLY_MAGIC),
        uint16(flags),
        uint16(type),
        cookie,
        uint32(payload.length),
        payload,
      ]);
    }
    const offset = request.subarray(16, 24);
    return Buffer.concat([
      uint32(EXTENDED_REPLY_MAGIC),
      uint16(flags),
      uint16(type),
      cookie,
      offset,
      uint64(payload.length),
      payload,
    ]);
  }

  const data = (offset: number, length: number): Buffer => Buffer.concat([uint64(offset), Buffer.alloc(length, 0xda)]);
  const hole = (offset: number, length: number): Buffer => Buffer.concat([uint64(offset), uint32(length)]);
  const error = (errno: number, message: string, rest: Buffer = Buffer.alloc(0)): Buffer =>
    Buffer.concat([uint32(errno), uint16(Buffer.byteLength(message)), Buffer.from(message), rest]);
  const status = (level: Header['level'], extents: readonly (readonly [number, number])[], id = 7): Buffer =>
    level === 'structured'
      ? Buffer.concat([uint32(id), ...extents.flatMap(([length, flags]) => [uint32(length), uint32(flags)])])
      : Buffer.concat([
          ...[uint32(id), uint32(extents.length)],
          ...extents.flatMap(([length, flags]) => [uint64(length), uint64(flags)]),
        ]);

  /** A client whose server answers one request with `answer`. */
  async function answered(
    level: Header['level'],
    answer: (header: Header) => Buffer | readonly Buffer[],
  ): Promise<NbdClient> {
    const path = await fakeServer(async (peer) => {
      const size = level === 'extended' ? EXTENDED_REQUEST_SIZE : REQUEST_HEADER_SIZE;
      const bytes = answer({ level, request: await peer.read(size) });
      // In the worst pieces that are fast enough: byte by byte would take too long for larger answers.
      const all = Buffer.isBuffer(bytes) ? bytes : Buffer.concat(bytes);
      peer.send(all.subarray(0, 17));
      await new Promise((resolve) => setImmediate(resolve));
      peer.send(all.subarray(17));
    });
    const client = await NbdClient.connect({ path, replies: level });
    onTestFinished(() => client.destroy());
    await client.go('disk');
    return client;
  }

  for (const level of ['structured', 'extended'] as const) {
    const badReads: { what: string; answer: (header: Header) => Buffer | Buffer[]; df?: boolean }[] = [
      { what: 'less data than requested', answer: (h) => chunk(h, DONE, REPLY_TYPE.OFFSET_DATA, data(4096, 4000)) },
      { what: 'no data at all', answer: (h) => chunk(h, DONE, REPLY_TYPE.NONE) },
      {
        what: 'data before the requested range',
        answer: (h) => chunk(h, DONE, REPLY_TYPE.OFFSET_DATA, data(4095, 4096)),
      },
      {
        what: 'data behind the requested range',
        answer: (h) => chunk(h, DONE, REPLY_TYPE.OFFSET_DATA, data(4097, 4096)),
      },
      { what: 'more data than requested', answer: (h) => chunk(h, DONE, REPLY_TYPE.OFFSET_DATA, data(4096, 4097)) },
      {
        what: 'data at an offset above 2^53',
        answer: (h) => chunk(h, DONE, REPLY_TYPE.OFFSET_DATA, Buffer.alloc(16, 0xff)),
      },
      { what: 'a data chunk without data', answer: (h) => chunk(h, DONE, REPLY_TYPE.OFFSET_DATA, data(4096, 0)) },
      { what: 'a data chunk of 3 bytes', answer: (h) => chunk(h, DONE, REPLY_TYPE.OFFSET_DATA, Buffer.alloc(3)) },
      {
        what: 'the same data twice',
        answer: (h) => [
          chunk(h, 0, REPLY_TYPE.OFFSET_DATA, data(4096, 4096)),
          chunk(h, DONE, REPLY_TYPE.OFFSET_DATA, data(4096, 4096)),
        ],
      },
      {
        what: 'data over a hole',
        answer: (h) => [
          chunk(h, 0, REPLY_TYPE.OFFSET_HOLE, hole(5000, 100)),
          chunk(h, DONE, REPLY_TYPE.OFFSET_DATA, data(4096, 4096)),
        ],
      },
      {
        what: 'a hole that ends in data',
        answer: (h) => [
          chunk(h, 0, REPLY_TYPE.OFFSET_DATA, data(5000, 100)),
          chunk(h, DONE, REPLY_TYPE.OFFSET_HOLE, hole(4096, 1000)),
        ],
      },
      { what: 'an empty hole', answer: (h) => chunk(h, DONE, REPLY_TYPE.OFFSET_HOLE, hole(4096, 0)) },
      { what: 'a hole of 4 GiB', answer: (h) => chunk(h, DONE, REPLY_TYPE.OFFSET_HOLE, hole(4096, 0xffff_ffff)) },
      { what: 'a hole of 13 bytes payload', answer: (h) => chunk(h, DONE, REPLY_TYPE.OFFSET_HOLE, Buffer.alloc(13)) },
      { what: 'an empty chunk that is not the last', answer: (h) => chunk(h, 0, REPLY_TYPE.NONE) },
      { what: 'an empty chunk with a payload', answer: (h) => chunk(h, DONE, REPLY_TYPE.NONE, Buffer.alloc(1)) },
      { what: 'a chunk of an unknown type', answer: (h) => chunk(h, DONE, 3, Buffer.alloc(8)) },
      {
        what: 'a block status',
        answer: (h) => chunk(h, DONE, level === 'structured' ? 5 : 6, status(level, [[4096, 0]])),
      },
      { what: 'an error chunk with error number 0', answer: (h) => chunk(h, DONE, REPLY_TYPE.ERROR, error(0, 'fine')) },
      { what: 'an error of 5 bytes', answer: (h) => chunk(h, DONE, REPLY_TYPE.ERROR, Buffer.alloc(5, 1)) },
      {
        what: 'an error shorter than its message',
        answer: (h) => chunk(h, DONE, REPLY_TYPE.ERROR, Buffer.concat([uint32(5), uint16(9), Buffer.from('short')])),
      },
      {
        what: 'an error with 4097 bytes of message',
        answer: (h) => chunk(h, DONE, REPLY_TYPE.ERROR, error(5, 'a'.repeat(4097))),
      },
      {
        what: 'an error with an offset and no room for it',
        answer: (h) => chunk(h, DONE, REPLY_TYPE.ERROR_OFFSET, error(5, 'words', Buffer.alloc(7))),
      },
      {
        what: 'an error outside its request',
        answer: (h) => chunk(h, DONE, REPLY_TYPE.ERROR_OFFSET, error(5, '', uint64(8192))),
      },
      {
        what: 'two chunks for a read with DF',
        df: true,
        answer: (h) => [
          chunk(h, 0, REPLY_TYPE.OFFSET_DATA, data(4096, 512)),
          chunk(h, DONE, REPLY_TYPE.OFFSET_DATA, data(4608, 3584)),
        ],
      },
      {
        what: 'a simple reply',
        answer: ({ request }) => [uint32(SIMPLE_REPLY_MAGIC), uint32(0), request.subarray(8, 16), Buffer.alloc(4096)],
      },
      {
        what: 'the other kind of chunk',
        answer: ({ request }) =>
          chunk(
            { level: level === 'structured' ? 'extended' : 'structured', request },
            DONE,
            REPLY_TYPE.ERROR,
            error(5, 'some words to fill it up'),
          ),
      },
      {
        what: 'endless chunks',
        answer: (h) =>
          Array.from({ length: 9000 }, (_, i) => chunk(h, 0, REPLY_TYPE.OFFSET_DATA, data(4096 + (i % 2048) * 2, 1))),
      },
      {
        what: 'an unknown cookie',
        answer: (h) => chunk({ ...h, request: Buffer.alloc(28, 0x55) }, DONE, REPLY_TYPE.NONE),
      },
    ];
    for (const { what, answer, df } of badReads) {
      test(`${what} (${level}) in answer to a read fails everything with PROTOCOL`, async () => {
        const client = await answered(level, answer);
        const failures = [client.read(4096, 4096, { df: df ?? false }), client.flush()].map(failureOf);
        for (const failure of failures) expect((await failure).code).toBe('PROTOCOL');
        expect((await failureOf(client.read(0, 1))).code).toBe('PROTOCOL');
      });
    }

    for (const { what, extents, one } of [
      { what: 'no extent', extents: [] },
      {
        what: 'an empty extent',
        extents: [
          [512, 0],
          [0, 1],
        ],
      },
      {
        what: 'an extent behind the requested range',
        extents: [
          [4096, 0],
          [512, 1],
        ],
      },
      {
        what: 'two extents for REQ_ONE',
        extents: [
          [512, 0],
          [512, 1],
        ],
        one: true,
      },
      { what: 'an extent longer than the requested range with REQ_ONE', extents: [[8192, 0]], one: true },
    ] as { what: string; extents: [number, number][]; one?: boolean }[]) {
      test(`${what} (${level}) in answer to a block status fails with PROTOCOL`, async () => {
        const type = level === 'structured' ? REPLY_TYPE.BLOCK_STATUS : REPLY_TYPE.BLOCK_STATUS_EXT;
        const client = await answered(level, (h) => chunk(h, DONE, type, status(level, extents)));
        const asked = client.blockStatus(ALLOCATION_CONTEXT, 0, 4096, { one: one ?? false });
        expect((await failureOf(asked)).code).toBe('PROTOCOL');
      });
    }

    for (const { what, answer } of [
      {
        what: 'a context that was not selected',
        answer: (h: Header, type: number) => chunk(h, DONE, type, status(level, [[512, 0]], 8)),
      },
      {
        what: 'a context twice',
        answer: (h: Header, type: number) =>
          Buffer.concat([
            chunk(h, 0, type, status(level, [[512, 0]])),
            chunk(h, DONE, type, status(level, [[512, 0]])),
          ]),
      },
      { what: 'no context', answer: (h: Header) => chunk(h, DONE, REPLY_TYPE.NONE) },
      { what: 'data', answer: (h: Header) => chunk(h, DONE, REPLY_TYPE.OFFSET_DATA, data(0, 4096)) },
      {
        what: 'the type of the other level',
        answer: (h: Header, type: number) => chunk(h, DONE, 11 - type, status(level, [[512, 0]])),
      },
      {
        what: 'half an extent',
        answer: (h: Header, type: number) => chunk(h, DONE, type, status(level, [[512, 0]]).subarray(0, -1)),
      },
    ]) {
      test(`${what} (${level}) in answer to a block status fails with PROTOCOL`, async () => {
        const type = level === 'structured' ? REPLY_TYPE.BLOCK_STATUS : REPLY_TYPE.BLOCK_STATUS_EXT;
        const client = await answered(level, (h) => answer(h, type));
        expect((await failureOf(client.blockStatus(ALLOCATION_CONTEXT, 0, 4096))).code).toBe('PROTOCOL');
      });
    }

    test(`data and hole chunks in any order, with unknown flags, are assembled to a read (${level})`, async () => {
      const client = await answered(level, (h) => [
        chunk(h, 0x80, REPLY_TYPE.OFFSET_DATA, data(8000, 192)),
        chunk(h, 0, REPLY_TYPE.OFFSET_HOLE, hole(4096, 904)),
        chunk(h, 0, REPLY_TYPE.OFFSET_HOLE, hole(6000, 2000)),
        chunk(h, 0, REPLY_TYPE.OFFSET_DATA, data(5000, 1000)),
        chunk(h, DONE, REPLY_TYPE.NONE),
      ]);
      const expected = Buffer.alloc(4096).fill(0xda, 904, 1904).fill(0xda, 3904);
      expect((await client.read(4096, 4096)).equals(expected)).toBe(true);
    });

    test(`the first of several errors counts, also one of an unknown kind, and the connection continues (${level})`, async () => {
      const client = await answered(level, (h) => [
        chunk(h, 0, REPLY_TYPE.OFFSET_DATA, data(4096, 1000)),
        chunk(h, 0, 0x8765, error(28, 'something new', Buffer.alloc(100))),
        chunk(h, 0, REPLY_TYPE.ERROR_OFFSET, error(5, 'later', uint64(4100))),
        chunk(h, DONE, REPLY_TYPE.ERROR, error(12, '')),
      ]);
      const failure = await failureOf(client.read(4096, 4096));
      expect(failure).toMatchObject({ code: 'ENOSPC', offset: undefined });
      expect(failure.message).toMatch(/something new$/);
      const next = client.flush();
      client.destroy();
      expect((await failureOf(next)).code).toBe('CLOSED');
    });

    test(`an extent that reaches beyond the requested range is cut (${level})`, async () => {
      const type = level === 'structured' ? REPLY_TYPE.BLOCK_STATUS : REPLY_TYPE.BLOCK_STATUS_EXT;
      const client = await answered(level, (h) =>
        chunk(
          h,
          DONE,
          type,
          status(level, [
            [512, 1],
            [2 ** 31, 0xff],
          ]),
        ),
      );
      expect(await client.blockStatus(ALLOCATION_CONTEXT, 4096, 1024)).toEqual([
        { offset: 4096, length: 512, flags: 1 },
        { offset: 4608, length: 512, flags: 0xff },
      ] satisfies Extent[]);
    });
  }

  test('a count that does not match the extents (extended) fails with PROTOCOL', async () => {
    const client = await answered('extended', (h) => {
      const payload = status('extended', [[512, 0]]);
      payload.writeUInt32BE(2, 4);
      return chunk(h, DONE, REPLY_TYPE.BLOCK_STATUS_EXT, payload);
    });
    expect((await failureOf(client.blockStatus(ALLOCATION_CONTEXT, 0, 4096))).code).toBe('PROTOCOL');
  });

  test('an offset of another request (extended) fails with PROTOCOL', async () => {
    const client = await answered('extended', ({ level, request }) => {
      request.writeUInt8(1, 23);
      return chunk({ level, request }, DONE, REPLY_TYPE.ERROR, error(5, ''));
    });
    expect((await failureOf(client.read(4096, 4096))).code).toBe('PROTOCOL');
  });

  test('a reply of 2^64 bytes (extended) fails with PROTOCOL', async () => {
    const client = await answered('extended', (h) => chunk(h, DONE, REPLY_TYPE.OFFSET_DATA).fill(0xff, 24));
    expect((await failureOf(client.read(4096, 4096))).code).toBe('PROTOCOL');
  });

  test('flags above 2^53 (extended) fail the request, not the connection', async () => {
    const client = await answered('extended', (h) => {
      const payload = status('extended', [[512, 0]]).fill(0xff, 16);
      return chunk(h, DONE, REPLY_TYPE.BLOCK_STATUS_EXT, payload);
    });
    expect((await failureOf(client.blockStatus(ALLOCATION_CONTEXT, 0, 4096))).code).toBe('EOVERFLOW');
  });

  test('a simple reply to a block status (structured) fails with PROTOCOL unless it is an error', async () => {
    for (const errno of [0, 22]) {
      const client = await answered('structured', ({ request }) =>
        Buffer.concat([uint32(SIMPLE_REPLY_MAGIC), uint32(errno), request.subarray(8, 16), Buffer.alloc(4)]),
      );
      const failure = await failureOf(client.blockStatus(ALLOCATION_CONTEXT, 0, 4096));
      expect(failure.code).toBe(errno === 0 ? 'PROTOCOL' : 'EINVAL');
    }
  });

  test('one of several contexts is requested alone, with a payload, if the server announced that', async () => {
    const exported = new TestExport('disk', { contexts: [ALLOCATION_CONTEXT, CHANGED] });
    const server = await startServer({ exports: [exported] });
    for (const level of ['structured', 'extended'] as const) {
      const client = await opened(server, level, [ALLOCATION_CONTEXT, CHANGED]);
      await client.blockStatus(CHANGED, 0, 4096);
      const flags = server.requests.at(-1)?.flags ?? 0;
      expect((flags & CMD_FLAG.PAYLOAD_LEN) !== 0).toBe(level === 'extended');
    }
  });
});
