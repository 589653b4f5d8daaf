/**
 * Deviations from proto.md by clients of other projects that have only one meaning: the server accepts them. Each test sends the
 * bytes that the client's source sends (see docs/conformance.md, "Strict and tolerant").
 */
import { describe, expect, test } from 'vitest';
import { CMD, EXPORT_NAME_PADDING, OPT, REP, REPLY_TYPE } from '../src/protocol/wire.js';
import { extendedRequestBytes, infoQuery, optionBytes, requestBytes, uint32, type RawClient } from './raw-client.js';
import { TestExport } from './test-device.js';
import { startServer } from './test-server.js';

async function readsAWord(client: RawClient): Promise<void> {
  client.request({ type: CMD.READ, offset: 4, length: 4, cookie: 9n });
  expect(await client.readReply(4)).toEqual({ errno: 0, cookie: 9n, data: uint32(5) });
}

describe("WNBD's flush with the range of a SYNCHRONIZE CACHE", () => {
  for (const level of ['simple', 'structured', 'extended'] as const) {
    for (const [offset, length] of [
      [4096, 65536],
      [1, 1],
      [2n ** 64n - 1n, 0xffff_ffffn],
      [0, 0],
      ...(level === 'extended' ? ([[2n ** 64n - 3n, 2n ** 64n - 1n]] as const) : []),
    ] as const) {
      for (const isLate of [false, true]) {
        const how = `${level} replies, device ${isLate ? 'late' : 'at once'}`;
        test(`at ${offset} of ${length} bytes flushes all (${how})`, async () => {
          const server = await startServer({ exports: [new TestExport('disk', { minimumBlockSize: 512 })] });
          if (isLate) server.provider.hook = () => new Promise((resolve) => setImmediate(resolve));
          const client = await server.raw();
          if (level === 'simple') await client.open('disk');
          else await client.openWith(level);
          const fields = { type: CMD.FLUSH, offset, length, cookie: 3n };
          client.send(level === 'extended' ? extendedRequestBytes(fields) : requestBytes(fields));
          // An extended reply repeats the offset unchanged, also above 2^53.
          expect(await client.readChunk()).toMatchObject({
            ...{ errno: 0, cookie: 3n, type: REPLY_TYPE.NONE, isDone: true },
            ...(level === 'extended' && { offset: BigInt(offset) }),
          });
          expect(server.provider.calls).toEqual([{ method: 'flush', offset: 0, length: 0 }]);
        });
      }
    }
  }
});

test("tapdisk's export name with the NUL of a C string opens the export", async () => {
  const server = await startServer({ exports: [new TestExport('tapdisk_client')] });
  const client = await server.raw();
  await client.greet(1);
  client.send(optionBytes(OPT.EXPORT_NAME, Buffer.from('tapdisk_client\0')));
  await client.read(10 + EXPORT_NAME_PADDING);
  await readsAWord(client);
  expect(server.opens[0]?.exportName).toBe('tapdisk_client');
});

describe('go-nbd with client flags of zero', () => {
  test('may list', async () => {
    const client = await (await startServer()).raw();
    await client.greet(0);
    const replies = await client.option(OPT.LIST);
    expect(replies.map(({ type }) => type)).toEqual([REP.SERVER, REP.ACK]);
  });

  test('may open an export by GO, abort, and send unknown options', async () => {
    const server = await startServer();
    const client = await server.raw();
    await client.greet(0);
    expect((await client.option(0x4e)).map(({ type }) => type)).toEqual([REP.ERR_UNSUP]);
    expect((await client.option(OPT.GO, infoQuery('disk'))).at(-1)?.type).toBe(REP.ACK);
    await readsAWord(client);
    const other = await server.raw();
    await other.greet(0);
    expect((await other.option(OPT.ABORT)).map(({ type }) => type)).toEqual([REP.ACK]);
    expect(await other.readToEnd()).toHaveLength(0);
  });
});

test('a write to a read-only export is EPERM with any flags', async () => {
  const server = await startServer({ exports: [new TestExport('disk', { readOnly: true, canFua: false })] });
  const client = await server.opened();
  client.send(requestBytes({ type: CMD.WRITE, flags: 1, length: 4, cookie: 1n }), uint32(7));
  expect(await client.readReply()).toMatchObject({ errno: 1, cookie: 1n });
  await readsAWord(client);
});
