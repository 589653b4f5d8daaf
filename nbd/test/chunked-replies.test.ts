/** Structured replies and extended headers, in bytes: reads with data and holes, success, and errors with messages. */

import { describe, expect, test } from 'vitest';
import { DeviceError, MAX_PAYLOAD, STATE_HOLE, STATE_ZERO, type ExtentSink } from '../src/index.js';
import {
  CMD,
  CMD_FLAG,
  EXTENDED_REQUEST_MAGIC,
  INFO,
  NBD_ERRNO,
  OPT,
  REP,
  REPLY_TYPE,
  REQUEST_MAGIC,
  TRANSMISSION_FLAG,
} from '../src/protocol/wire.js';
import {
  errorOf,
  extendedRequestBytes,
  infoQuery,
  optionBytes,
  requestBytes,
  uint32,
  uint64,
  type Chunk,
  type RawClient,
  type RequestFields,
} from './raw-client.js';
import { DISK_SIZE, Gate, TestExport } from './test-device.js';
import { startServer, until, type TestServer } from './test-server.js';

const KIB = 1024;
const MIB = 1024 * KIB;
const LEVELS = ['structured', 'extended'] as const;
type Level = (typeof LEVELS)[number];

async function opened(server: TestServer, level: Level, contexts: readonly string[] = []): Promise<RawClient> {
  const client = await server.raw();
  await client.openWith(level, 'disk', contexts);
  return client;
}

function ask(client: RawClient, level: Level, fields: RequestFields, payload?: Buffer): void {
  if (level === 'extended') client.extendedRequest(fields, payload);
  else client.request({ ...fields, length: payload?.length ?? fields.length ?? 0 }, payload);
}

/** A chunk in short: its type and its length. */
function brief({ type, payload, isDone }: Chunk): [string, number, number, boolean] {
  const offset = payload.length >= 8 ? Number(payload.readBigUInt64BE(0)) : 0;
  if (type === REPLY_TYPE.OFFSET_DATA) return ['data', offset, payload.length - 8, isDone];
  if (type === REPLY_TYPE.OFFSET_HOLE) return ['hole', offset, payload.readUInt32BE(8), isDone];
  return [`type ${type}`, 0, payload.length, isDone];
}

/** The bytes of a read, assembled from its chunks. */
function assemble(chunks: readonly Chunk[], offset: number, length: number): Buffer {
  const bytes = Buffer.alloc(length, 0xee);
  for (const { type, payload } of chunks) {
    const at = Number(payload.readBigUInt64BE(0)) - offset;
    if (type === REPLY_TYPE.OFFSET_DATA) payload.copy(bytes, at, 8);
    if (type === REPLY_TYPE.OFFSET_HOLE) bytes.fill(0, at, at + payload.readUInt32BE(8));
  }
  return bytes;
}

/** A disk of 1 MiB with these ranges zeroed. */
function sparse(...holes: readonly [number, number][]): TestExport {
  const exported = new TestExport('disk');
  for (const [offset, length] of holes) exported.disk.fill(0, offset, offset + length);
  return exported;
}

describe('options', () => {
  test('STRUCTURED_REPLY and EXTENDED_HEADERS are acknowledged, in this order, alone, or twice', async () => {
    const client = await (await startServer()).raw();
    await client.greet();
    for (const option of [OPT.STRUCTURED_REPLY, OPT.STRUCTURED_REPLY, OPT.EXTENDED_HEADERS, OPT.EXTENDED_HEADERS]) {
      expect((await client.option(option)).map(({ type }) => type)).toEqual([REP.ACK]);
    }
  });

  test('STRUCTURED_REPLY after EXTENDED_HEADERS is refused: they take precedence', async () => {
    const client = await (await startServer()).raw();
    await client.greet();
    await client.option(OPT.EXTENDED_HEADERS);
    expect((await client.option(OPT.STRUCTURED_REPLY)).map(({ type }) => type)).toEqual([REP.ERR_EXT_HEADER_REQD]);
    await client.option(OPT.GO, infoQuery('disk'));
    client.extendedRequest({ type: CMD.FLUSH });
    expect((await client.readChunk()).kind).toBe('extended');
  });

  for (const option of [OPT.STRUCTURED_REPLY, OPT.EXTENDED_HEADERS]) {
    test(`option ${option} with data is INVALID and changes nothing`, async () => {
      const client = await (await startServer()).raw();
      await client.greet();
      expect((await client.option(option, Buffer.of(1))).map(({ type }) => type)).toEqual([REP.ERR_INVALID]);
      await client.option(OPT.GO, infoQuery('disk'));
      client.request({ type: CMD.READ, length: 4 });
      expect((await client.readReply(4)).data).toEqual(uint32(1));
    });
  }

  test('EXPORT_NAME after EXTENDED_HEADERS closes the connection without an answer, and no device is opened', async () => {
    const { raw, provider, allOver, closes } = await startServer();
    const client = await raw();
    await client.greet();
    await client.option(OPT.EXTENDED_HEADERS);
    client.send(optionBytes(OPT.EXPORT_NAME, Buffer.from('disk')));
    expect(await client.readToEnd()).toHaveLength(0);
    await allOver();
    expect(provider.opened).toBe(0);
    expect(closes[0]?.reason).toMatch(/protocol violation/);
  });

  test('EXPORT_NAME after STRUCTURED_REPLY leads to structured replies', async () => {
    const client = await (await startServer()).raw();
    await client.greet();
    await client.option(OPT.STRUCTURED_REPLY);
    client.send(optionBytes(OPT.EXPORT_NAME, Buffer.from('disk')));
    expect((await client.read(10)).readUInt16BE(8) & TRANSMISSION_FLAG.SEND_DF).not.toBe(0);
    client.request({ type: CMD.READ, length: 4 });
    expect((await client.readChunk()).kind).toBe('structured');
  });

  for (const option of [undefined, OPT.STRUCTURED_REPLY, OPT.EXTENDED_HEADERS]) {
    test(`SEND_DF is announced ${option === undefined ? 'not without' : 'with'} option ${option ?? 8}`, async () => {
      const client = await (await startServer()).raw();
      await client.greet();
      if (option !== undefined) await client.option(option);
      const [info] = await client.option(OPT.INFO, infoQuery('disk'));
      expect(info?.data.readUInt16BE(0)).toBe(INFO.EXPORT);
      const flags = info?.data.readUInt16BE(10) ?? 0;
      expect((flags & TRANSMISSION_FLAG.SEND_DF) !== 0).toBe(option !== undefined);
      expect(flags & TRANSMISSION_FLAG.BLOCK_STATUS_PAYLOAD).toBe(0);
    });
  }
});

for (const level of LEVELS) {
  describe(`${level} replies`, () => {
    test('a read is one data chunk with its offset, flagged as the last', async () => {
      const server = await startServer();
      const client = await opened(server, level);
      for (const delay of [undefined, Promise.resolve()]) {
        server.provider.hook = () => delay;
        ask(client, level, { type: CMD.READ, offset: 4096, length: 8, cookie: 0x1122334455667788n });
        const chunk = await client.readChunk();
        expect(chunk).toMatchObject({
          kind: level,
          flags: 1,
          type: REPLY_TYPE.OFFSET_DATA,
          cookie: 0x1122334455667788n,
        });
        expect(chunk.payload).toEqual(Buffer.concat([uint64(4096), uint32(4097), uint32(4101)]));
        expect(chunk.offset).toBe(level === 'extended' ? 4096n : 0n);
      }
    });

    test('reads of every size, answered at once or later, have the right data', async () => {
      const server = await startServer({ exports: [new TestExport('disk', { size: 4 * MIB })] });
      const client = await opened(server, level);
      const disk = server.provider.exports.get('disk')?.disk ?? Buffer.alloc(0);
      for (const length of [1, 512, 4096, 128 * KIB - 1, 128 * KIB, 128 * KIB + 1, 3 * MIB]) {
        for (const delay of [undefined, Promise.resolve()]) {
          server.provider.hook = () => delay;
          ask(client, level, { type: CMD.READ, offset: 777, length, flags: CMD_FLAG.DF });
          ask(client, level, { type: CMD.READ, offset: 777, length });
          for (let round = 0; round < 2; round++) {
            const chunks = await client.readChunks();
            expect(chunks.map(brief)).toEqual([['data', 777, length, true]]);
            expect(assemble(chunks, 777, length).equals(disk.subarray(777, 777 + length))).toBe(true);
          }
        }
      }
    });

    test('success of all other commands has no payload', async () => {
      const server = await startServer();
      const client = await opened(server, level);
      for (const delay of [undefined, Promise.resolve()]) {
        server.provider.hook = () => delay;
        for (const fields of [
          { type: CMD.FLUSH },
          { type: CMD.TRIM, offset: 512, length: 4096 },
          { type: CMD.WRITE_ZEROES, offset: 512, length: 4096 },
          { type: CMD.CACHE, offset: 512, length: 4096 },
          { type: CMD.TRIM, offset: 512, length: 0 },
        ]) {
          ask(client, level, { ...fields, cookie: 9n });
          const reply = await client.readChunk();
          // "a simple reply MAY be used as a reply to any request other than READ"; with extended headers it must not.
          expect(reply).toMatchObject({ kind: level === 'extended' ? 'extended' : 'simple', errno: 0, cookie: 9n });
          expect(reply.type).toBe(REPLY_TYPE.NONE);
          if (level === 'extended') expect(reply).toMatchObject({ isDone: true, offset: BigInt(fields.offset ?? 0) });
        }
        ask(client, level, { type: CMD.WRITE, offset: 100 }, Buffer.from('data'));
        expect((await client.readChunk()).payload).toHaveLength(0);
      }
    });

    test('a read of length 0 is an empty chunk, never a simple reply', async () => {
      const client = await opened(await startServer(), level);
      ask(client, level, { type: CMD.READ, offset: 100, length: 0, cookie: 5n });
      expect(await client.readChunk()).toMatchObject({ kind: level, type: REPLY_TYPE.NONE, isDone: true, cookie: 5n });
    });

    test('a known hole is sent as a hole, with and without DF, without a read of the device', async () => {
      const exported = new TestExport('disk');
      exported.isHole = (offset, length) => offset >= 512 * KIB && offset + length <= 768 * KIB;
      const server = await startServer({ exports: [exported] });
      const client = await opened(server, level);
      for (const flags of [0, CMD_FLAG.DF]) {
        for (const length of [1, 4096, 256 * KIB]) {
          ask(client, level, { type: CMD.READ, offset: 512 * KIB, length, flags });
          expect((await client.readChunks()).map(brief)).toEqual([['hole', 512 * KIB, length, true]]);
        }
      }
      expect(server.provider.calls).toEqual([]);
      ask(client, level, { type: CMD.READ, offset: 512 * KIB - 1, length: 2 });
      expect((await client.readChunks()).map(brief)).toEqual([['data', 512 * KIB - 1, 2, true]]);
    });

    for (const when of ['at once', 'later'] as const) {
      test(`a long read is sent as data and holes if the device reports them ${when}`, async () => {
        const exported = sparse([0, 8192], [300 * KIB, 4096], [400 * KIB, 100], [600 * KIB, 424 * KIB]);
        const server = await startServer({ exports: [exported] });
        if (when === 'later') server.provider.hook = () => Promise.resolve();
        const client = await opened(server, level);
        ask(client, level, { type: CMD.READ, offset: 0, length: MIB });
        const chunks = await client.readChunks();
        expect(chunks.map(brief)).toEqual([
          ['hole', 0, 8192, false],
          ['data', 8192, 300 * KIB - 8192, false],
          ['hole', 300 * KIB, 4096, false],
          ['data', 304 * KIB, 296 * KIB, false],
          ['hole', 600 * KIB, 424 * KIB, true],
        ]);
        expect(assemble(chunks, 0, MIB).equals(exported.disk)).toBe(true);
        expect(server.server.connections.get(1)?.bytesRead).toBe(MIB);
      });
    }

    test('an unaligned long read has its odd ends in the first and last chunk only', async () => {
      const exported = sparse([0, 128 * KIB], [900 * KIB, 124 * KIB]);
      const client = await opened(await startServer({ exports: [exported] }), level);
      ask(client, level, { type: CMD.READ, offset: 777, length: MIB - 1000 });
      const chunks = await client.readChunks();
      expect(chunks.map(brief)).toEqual([
        ['hole', 777, 128 * KIB - 777, false],
        ['data', 128 * KIB, 772 * KIB, false],
        ['hole', 900 * KIB, 124 * KIB - 223, true],
      ]);
    });

    test('with DF a long read of data and holes is one chunk of data, zeros written out', async () => {
      const exported = sparse([64 * KIB, 512 * KIB]);
      const client = await opened(await startServer({ exports: [exported] }), level);
      ask(client, level, { type: CMD.READ, offset: 0, length: MIB, flags: CMD_FLAG.DF });
      const chunks = await client.readChunks();
      expect(chunks.map(brief)).toEqual([['data', 0, MIB, true]]);
      expect(assemble(chunks, 0, MIB).equals(exported.disk)).toBe(true);
    });

    test('for a read shorter than 128 KiB the device is not asked for holes', async () => {
      const server = await startServer({ exports: [sparse([0, MIB])] });
      const client = await opened(server, level);
      ask(client, level, { type: CMD.READ, offset: 0, length: 128 * KIB - 1 });
      expect((await client.readChunks()).map(brief)).toEqual([['data', 0, 128 * KIB - 1, true]]);
      expect(server.provider.calls.map(({ method }) => method)).toEqual(['read']);
    });

    test('a long read of a single hole is one chunk', async () => {
      const server = await startServer({ exports: [sparse([0, MIB])] });
      const client = await opened(server, level);
      ask(client, level, { type: CMD.READ, offset: 4096, length: MIB - 8192 });
      expect((await client.readChunks()).map(brief)).toEqual([['hole', 4096, MIB - 8192, true]]);
      expect(server.provider.calls.map(({ method }) => method)).toEqual(['extents']);
    });

    test('a long read of very many holes is sent in a bounded number of chunks', async () => {
      const exported = new TestExport('disk', { size: 8 * MIB });
      for (let at = 0; at < 8 * MIB; at += 8192) exported.disk.fill(0, at, at + 4096);
      const client = await opened(await startServer({ exports: [exported] }), level);
      ask(client, level, { type: CMD.READ, offset: 0, length: 8 * MIB });
      const chunks = await client.readChunks();
      expect(chunks.length).toBeGreaterThan(100);
      expect(chunks.length).toBeLessThanOrEqual(128);
      expect(assemble(chunks, 0, 8 * MIB).equals(exported.disk)).toBe(true);
    });

    for (const [what, extents] of [
      ['says nothing', () => undefined],
      [
        'throws',
        () => {
          throw new DeviceError('EIO', 'no map');
        },
      ],
      ['begins too late', (sink: ExtentSink) => void sink(8192, MIB, STATE_HOLE | STATE_ZERO)],
      ['begins too early', (sink: ExtentSink) => void sink(-4096, MIB, STATE_HOLE | STATE_ZERO)],
      ['reports nothing at all', (sink: ExtentSink) => void sink(0, 0, STATE_HOLE | STATE_ZERO)],
    ] as const) {
      test(`a long read of a device whose map ${what} is all data`, async () => {
        const exported = new TestExport('disk');
        exported.extents = (_context, _offset, _length, sink) => extents(sink);
        const server = await startServer({ exports: [exported] });
        const client = await opened(server, level);
        for (const delay of [undefined, Promise.resolve()]) {
          server.provider.hook = () => delay;
          ask(client, level, { type: CMD.READ, offset: 0, length: MIB });
          const chunks = await client.readChunks();
          expect(chunks.map(brief)).toEqual([['data', 0, MIB, true]]);
          expect(assemble(chunks, 0, MIB).equals(exported.disk)).toBe(true);
        }
      });
    }

    test('a device that reports only data, and late, is asked ever less often, and every time again once it reports a hole', async () => {
      const exported = new TestExport('disk');
      const server = await startServer({ exports: [exported] });
      server.provider.hook = () => Promise.resolve();
      const client = await opened(server, level);
      const asked = async (reads: number): Promise<number> => {
        server.provider.calls.length = 0;
        for (let count = 0; count < reads; count++) {
          ask(client, level, { type: CMD.READ, length: 128 * KIB });
          await client.readChunks();
        }
        return server.provider.calls.filter(({ method }) => method === 'extents').length;
      };
      expect(await asked(62)).toBe(5);
      expect(await asked(64)).toBe(2);
      exported.disk.fill(0, 0, 8192);
      await asked(32);
      expect(await asked(10)).toBe(10);
      // A device that answers at once is always asked.
      server.provider.hook = () => undefined;
      exported.disk.fill(1, 0, 8192);
      expect(await asked(10)).toBe(10);
    });

    test('without base:allocation a long read is data, and the device is not asked for holes', async () => {
      const server = await startServer({ exports: [new TestExport('disk', { contexts: [] })] });
      const client = await opened(server, level);
      ask(client, level, { type: CMD.READ, offset: 0, length: MIB });
      expect((await client.readChunks()).map(brief)).toEqual([['data', 0, MIB, true]]);
      expect(server.provider.calls.map(({ method }) => method)).toEqual(['read']);
    });

    for (const delay of [undefined, Promise.resolve()]) {
      const when = delay === undefined ? 'at once' : 'later';

      test(`a read that fails ${when} is one error chunk with the device's message`, async () => {
        const server = await startServer();
        const client = await opened(server, level);
        for (const length of [4, 4096, 100 * KIB, 127 * KIB]) {
          server.provider.hook = async () => {
            await delay;
            throw new DeviceError('EIO', 'the disk is on fire');
          };
          if (delay === undefined) {
            server.provider.hook = () => {
              throw new DeviceError('EIO', 'the disk is on fire');
            };
          }
          ask(client, level, { type: CMD.READ, offset: 4096, length, cookie: 3n });
          const chunk = await client.readChunk();
          expect(chunk).toMatchObject({ kind: level, type: REPLY_TYPE.ERROR, isDone: true, cookie: 3n });
          expect(errorOf(chunk)).toEqual({
            errno: NBD_ERRNO.EIO,
            message: 'the disk is on fire',
            rest: Buffer.alloc(0),
          });
          server.provider.hook = () => delay;
          ask(client, level, { type: CMD.READ, offset: 4096, length: 4 });
          expect((await client.readChunk()).payload.subarray(8)).toEqual(uint32(4097));
        }
      });

      test(`an error ${when} at a known offset is sent with the offset, for every command with a range`, async () => {
        const server = await startServer();
        const client = await opened(server, level);
        server.provider.hook = async () => {
          await delay;
          throw new DeviceError('ENOSPC', 'full', { offset: 6000 });
        };
        if (delay === undefined) {
          server.provider.hook = () => {
            throw new DeviceError('ENOSPC', 'full', { offset: 6000 });
          };
        }
        for (const type of [CMD.READ, CMD.WRITE, CMD.TRIM, CMD.WRITE_ZEROES, CMD.CACHE]) {
          ask(client, level, { type, offset: 4096, length: 4096 }, type === CMD.WRITE ? Buffer.alloc(4096) : undefined);
          const chunk = await client.readChunk();
          expect(chunk.type).toBe(REPLY_TYPE.ERROR_OFFSET);
          expect(errorOf(chunk)).toEqual({ errno: NBD_ERRNO.ENOSPC, message: 'full', rest: uint64(6000) });
          // An offset outside the request would be wrong.
          ask(client, level, { type, offset: 0, length: 4096 }, type === CMD.WRITE ? Buffer.alloc(4096) : undefined);
          expect((await client.readChunk()).type).toBe(REPLY_TYPE.ERROR);
        }
        ask(client, level, { type: CMD.FLUSH });
        expect((await client.readChunk()).type).toBe(REPLY_TYPE.ERROR);
      });

      test(`if a part of a long read fails ${when}, the error has its offset, and no data of the read are sent`, async () => {
        const server = await startServer({ exports: [sparse([100 * KIB, 100 * KIB], [500 * KIB, 100 * KIB])] });
        const client = await opened(server, level);
        const fail = (): never => {
          throw new DeviceError('EIO', 'a bad block');
        };
        server.provider.hook = ({ method, offset }) => {
          const isBad = method === 'read' && offset === 200 * KIB;
          if (delay === undefined) return isBad ? fail() : undefined;
          return delay.then(() => (isBad ? fail() : undefined));
        };
        ask(client, level, { type: CMD.READ, offset: 0, length: MIB, cookie: 8n });
        const [chunk, ...others] = await client.readChunks();
        expect(others).toEqual([]);
        expect(chunk).toMatchObject({ type: REPLY_TYPE.ERROR_OFFSET, cookie: 8n });
        expect(chunk && errorOf(chunk)).toEqual({
          errno: NBD_ERRNO.EIO,
          message: 'a bad block',
          rest: uint64(200 * KIB),
        });
        await until(() => server.server.connections.get(1)?.inFlight === 0, 'nothing is in flight');
        server.provider.hook = () => undefined;
        ask(client, level, { type: CMD.READ, offset: 0, length: MIB });
        expect(await client.readChunks()).toHaveLength(5);
      });
    }

    test("a device's message is cut to 256 bytes, between characters and without NUL", async () => {
      const server = await startServer();
      const client = await opened(server, level);
      for (const { message, expected } of [
        { message: '€'.repeat(300), expected: '€'.repeat(85) },
        { message: 'a\0b', expected: 'a b' },
        { message: '', expected: '' },
        { message: 'half \ud800', expected: 'half \ufffd' },
      ]) {
        server.provider.hook = () => {
          throw new DeviceError('EIO', message);
        };
        ask(client, level, { type: CMD.READ, length: 4096 });
        expect(errorOf(await client.readChunk()).message).toBe(expected);
      }
    });

    test('the text of an error that is not a DeviceError is not sent', async () => {
      const server = await startServer();
      const client = await opened(server, level);
      server.provider.hook = () => {
        throw new Error('secret');
      };
      ask(client, level, { type: CMD.READ, length: 4096 });
      const { errno, message } = errorOf(await client.readChunk());
      expect({ errno, message }).toEqual({ errno: NBD_ERRNO.EIO, message: 'internal error of the export' });
      expect(server.deviceErrors).toHaveLength(1);
    });

    for (const { what, fields, errno, message } of [
      {
        what: 'beyond the end',
        fields: { type: CMD.READ, offset: DISK_SIZE, length: 1 },
        errno: 'EINVAL',
        message: /beyond the end/,
      },
      {
        what: 'with an unknown flag',
        fields: { type: CMD.READ, length: 1, flags: 0x80 },
        errno: 'EINVAL',
        message: /flag/,
      },
      {
        what: 'with DF on a write-zeroes',
        fields: { type: CMD.WRITE_ZEROES, length: 1, flags: CMD_FLAG.DF },
        errno: 'EINVAL',
        message: /flag/,
      },
      {
        what: 'with REQ_ONE on a read',
        fields: { type: CMD.READ, length: 1, flags: CMD_FLAG.REQ_ONE },
        errno: 'EINVAL',
        message: /flag/,
      },
      {
        what: 'of more than a payload',
        fields: { type: CMD.READ, length: MAX_PAYLOAD + 1 },
        errno: 'EOVERFLOW',
        message: /more than/,
      },
      { what: 'of an unknown command', fields: { type: 0x4e4 }, errno: 'EINVAL', message: /unknown/ },
      { what: 'RESIZE', fields: { type: 8, length: 4096 }, errno: 'EINVAL', message: /unknown/ },
      {
        what: 'BLOCK_STATUS without a context',
        fields: { type: CMD.BLOCK_STATUS, length: 1 },
        errno: 'EINVAL',
        message: /context/,
      },
    ] as const) {
      test(`a request ${what} is refused in a chunk with the reason`, async () => {
        const client = await opened(await startServer(), level);
        ask(client, level, { ...fields, cookie: 77n });
        const chunk = await client.readChunk();
        expect(chunk).toMatchObject({ kind: level, type: REPLY_TYPE.ERROR, isDone: true, cookie: 77n });
        expect(errorOf(chunk).errno).toBe(NBD_ERRNO[errno]);
        expect(errorOf(chunk).message).toMatch(message);
        ask(client, level, { type: CMD.READ, length: 4 });
        expect((await client.readChunk()).payload.subarray(8)).toEqual(uint32(1));
      });
    }

    test('chunks of requests that finish in any order are not mixed up', async () => {
      const server = await startServer({ exports: [sparse([256 * KIB, 256 * KIB])] });
      const gates = new Map<string, Gate>();
      server.provider.hook = ({ method, offset }) => {
        const gate = new Gate();
        gates.set(`${method} ${offset}`, gate);
        return gate.opened;
      };
      const client = await opened(server, level);
      ask(client, level, { type: CMD.READ, offset: 0, length: MIB, cookie: 1n });
      ask(client, level, { type: CMD.READ, offset: 4096, length: 4096, cookie: 2n });
      await until(() => gates.size === 2, 'both have begun');
      gates.get('read 4096')?.open();
      expect(await client.readChunk()).toMatchObject({ cookie: 2n, isDone: true });
      gates.get('extents 0')?.open();
      await until(() => gates.has(`read ${512 * KIB}`), 'the data is being read');
      gates.get('read 0')?.open();
      gates.get(`read ${512 * KIB}`)?.open();
      expect((await client.readChunks()).map(({ cookie }) => cookie)).toEqual([1n, 1n, 1n]);
    });

    test('a connection that is lost within a long read leaves no device open', async () => {
      const server = await startServer({ exports: [sparse([256 * KIB, 256 * KIB])] });
      const gate = new Gate();
      server.provider.hook = () => gate.opened;
      const client = await opened(server, level);
      ask(client, level, { type: CMD.READ, offset: 0, length: MIB });
      await until(() => server.provider.unfinished === 1, 'the map is asked for');
      client.vanish();
      gate.open();
      await server.allOver();
    });

    test('while a client reads no replies, the device gets no more requests than replies may wait', async () => {
      const server = await startServer({ exports: [sparse([256 * KIB, 4096])], limits: { maxUnsentBytes: MIB } });
      const client = await opened(server, level);
      client.socket.pause();
      const bytes = level === 'extended' ? extendedRequestBytes : requestBytes;
      client.send(...Array.from({ length: 200 }, (_, i) => bytes({ type: CMD.READ, length: MIB, cookie: BigInt(i) })));
      await until(() => server.provider.calls.length > 2, 'the first reads are done');
      await until(() => server.server.connections.get(1)?.inFlight === 0, 'nothing is in flight');
      expect(server.requests.length).toBeLessThan(100);
      client.socket.resume();
      for (let done = 0; done < 200;) done += (await client.readChunk()).isDone ? 1 : 0;
      client.vanish();
      await server.allOver();
    });

    test('a server that shuts down says so in its error message', async () => {
      const server = await startServer();
      const gate = new Gate();
      server.provider.hook = () => gate.opened;
      const client = await opened(server, level);
      ask(client, level, { type: CMD.READ, length: 4, cookie: 1n });
      await until(() => server.provider.unfinished === 1, 'a read is in flight');
      const closed = server.server.close();
      ask(client, level, { type: CMD.READ, length: 4, cookie: 2n });
      const refused = await client.readChunk();
      expect(refused.cookie).toBe(2n);
      expect(errorOf(refused)).toMatchObject({ errno: NBD_ERRNO.ESHUTDOWN, message: 'the server is shutting down' });
      gate.open();
      expect(await client.readChunk()).toMatchObject({ cookie: 1n, type: REPLY_TYPE.OFFSET_DATA });
      await closed;
    });
  });
}

describe('extended requests', () => {
  test('without extended headers the payload flag is unknown, and a write has a payload anyway', async () => {
    const client = await opened(await startServer(), 'structured');
    client.request({ type: CMD.WRITE, length: 4, flags: CMD_FLAG.PAYLOAD_LEN, cookie: 1n }, Buffer.from('data'));
    expect(errorOf(await client.readChunk()).errno).toBe(NBD_ERRNO.EINVAL);
    client.request({ type: CMD.READ, length: 4, flags: CMD_FLAG.PAYLOAD_LEN, cookie: 2n });
    expect(errorOf(await client.readChunk()).errno).toBe(NBD_ERRNO.EINVAL);
    client.request({ type: CMD.READ, length: 4, cookie: 3n });
    expect((await client.readChunk()).payload.subarray(8)).toEqual(uint32(1));
  });

  for (const type of [CMD.READ, CMD.FLUSH, CMD.TRIM, CMD.CACHE, CMD.WRITE_ZEROES, CMD.BLOCK_STATUS, 8, 0x1234]) {
    test(`a payload that command ${type} must not have is drained, and the next request is served`, async () => {
      const server = await startServer();
      const client = await opened(server, 'extended');
      for (const size of [1, 28, 70_000]) {
        client.extendedRequest({ type, cookie: 1n }, Buffer.alloc(size, 0x25));
        const chunk = await client.readChunk();
        expect(chunk).toMatchObject({ cookie: 1n, isDone: true, type: REPLY_TYPE.ERROR });
        expect(errorOf(chunk).errno).toBe(NBD_ERRNO.EINVAL);
        client.extendedRequest({ type: CMD.READ, length: 4, cookie: 2n });
        expect((await client.readChunk()).payload.subarray(8)).toEqual(uint32(1));
      }
      expect(server.provider.calls.every(({ method }) => method === 'read')).toBe(true);
    });
  }

  test('a refused write of the largest payload is drained; one byte more ends the connection', async () => {
    const { raw, allOver, closes } = await startServer({ exports: [new TestExport('disk', { readOnly: true })] });
    const client = await raw();
    await client.openWith('extended');
    client.extendedRequest({ type: CMD.WRITE, cookie: 1n }, Buffer.alloc(MAX_PAYLOAD));
    expect(errorOf(await client.readChunk()).errno).toBe(NBD_ERRNO.EPERM);
    client.send(extendedRequestBytes({ type: CMD.WRITE, flags: CMD_FLAG.PAYLOAD_LEN, length: MAX_PAYLOAD + 1 }));
    expect(await client.readToEnd()).toHaveLength(0);
    await allOver();
    expect(closes[0]?.reason).toMatch(/protocol violation/);
  });

  for (const length of [2n ** 32n, 2n ** 53n, 2n ** 64n - 1n]) {
    test(`a payload of ${length} bytes ends the connection`, async () => {
      const { raw, allOver } = await startServer();
      const client = await raw();
      await client.openWith('extended');
      client.send(extendedRequestBytes({ type: CMD.WRITE, flags: CMD_FLAG.PAYLOAD_LEN, length }));
      expect(await client.readToEnd()).toHaveLength(0);
      await allOver();
    });
  }

  test('an offset above 2^53 is repeated unchanged', async () => {
    const client = await opened(await startServer(), 'extended');
    client.extendedRequest({ type: CMD.READ, offset: 2n ** 64n - 3n, length: 2n ** 64n - 1n, cookie: 2n ** 64n - 5n });
    expect(await client.readChunk()).toMatchObject({
      ...{ type: REPLY_TYPE.ERROR, offset: 2n ** 64n - 3n, cookie: 2n ** 64n - 5n },
    });
  });

  test('trims and zeros of more than 4 GiB are one request; a cache of that much is EOVERFLOW', async () => {
    const huge = new TestExport('disk', { size: 0 });
    const geometry = { ...huge.geometry, size: 2 ** 50 };
    const server = await startServer({ exports: [Object.assign(huge, { geometry })] });
    const client = await opened(server, 'extended');
    for (const type of [CMD.TRIM, CMD.WRITE_ZEROES]) {
      client.extendedRequest({ type, offset: 4096, length: 2 ** 49 });
      expect((await client.readChunk()).type).toBe(REPLY_TYPE.NONE);
    }
    expect(server.provider.calls.map(({ offset, length }) => [offset, length])).toEqual([
      [4096, 2 ** 49],
      [4096, 2 ** 49],
    ]);
    client.extendedRequest({ type: CMD.CACHE, length: 2 ** 32 });
    expect(errorOf(await client.readChunk()).errno).toBe(NBD_ERRNO.EOVERFLOW);
    client.extendedRequest({ type: CMD.CACHE, length: 2 ** 32 - 1 });
    expect((await client.readChunk()).type).toBe(REPLY_TYPE.NONE);
  });

  test('requests and payloads that arrive byte by byte are understood', async () => {
    const client = await opened(await startServer(), 'extended');
    const bytes = Buffer.concat([
      extendedRequestBytes({ type: CMD.WRITE, flags: CMD_FLAG.PAYLOAD_LEN, offset: 4, length: 6, cookie: 1n }),
      Buffer.from('abcdef'),
      extendedRequestBytes({ type: CMD.READ, offset: 4, length: 6, cookie: 2n }),
    ]);
    for (const byte of bytes) await new Promise((resolve) => client.socket.write(Buffer.of(byte), resolve));
    expect(await client.readChunk()).toMatchObject({ cookie: 1n, type: REPLY_TYPE.NONE });
    expect((await client.readChunk()).payload.toString('latin1', 8)).toBe('abcdef');
  });

  for (const { level, magic } of [
    { level: 'extended', magic: REQUEST_MAGIC },
    { level: 'structured', magic: EXTENDED_REQUEST_MAGIC },
  ] as const) {
    test(`a ${level === 'extended' ? 'compact' : 'extended'} request on a ${level} connection ends it`, async () => {
      const { raw, allOver } = await startServer();
      const client = await raw();
      await client.openWith(level);
      client.send(extendedRequestBytes({ type: CMD.FLUSH, magic }));
      expect(await client.readToEnd()).toHaveLength(0);
      await allOver();
    });
  }

  test('DISC ends the connection', async () => {
    const { raw, allOver, closes } = await startServer();
    const client = await raw();
    await client.openWith('extended');
    client.extendedRequest({ type: CMD.DISC });
    expect(await client.readToEnd()).toHaveLength(0);
    await allOver();
    expect(closes[0]?.reason).toBe('the client disconnected');
  });
});
