/**
 * What clients of other projects send that proto.md does not want from them, with only one meaning: it is done. Each with
 * the bytes that their sources say (see docs/conformance.md, "Strict and tolerant").
 */
import { describe, expect, test } from 'vitest';
import { CMD, EXPORT_NAME_PADDING, OPT, REP } from '../src/protocol.js';
import { infoQuery, optionBytes, requestBytes, uint32, type RawClient } from './raw-client.js';
import { TestExport } from './test-device.js';
import { startServer } from './test-server.js';

async function readsAWord(client: RawClient): Promise<void> {
  client.request({ type: CMD.READ, offset: 4, length: 4, cookie: 9n });
  expect(await client.readReply(4)).toEqual({ errno: 0, cookie: 9n, data: uint32(5) });
}

describe("WNBD's flush, which has the range of a SYNCHRONIZE CACHE", () => {
  for (const [offset, length] of [
    [4096, 65536],
    [1, 1],
    [2n ** 64n - 1n, 0xffff_ffff],
    [0, 0],
  ] as const) {
    test(`at ${offset} of ${length} bytes flushes all`, async () => {
      const server = await startServer({ exports: [new TestExport('disk', { minimumBlockSize: 512 })] });
      const client = await server.opened();
      client.request({ type: CMD.FLUSH, offset, length, cookie: 3n });
      expect(await client.readReply()).toMatchObject({ errno: 0, cookie: 3n });
      expect(server.provider.calls).toEqual([{ method: 'flush', offset: 0, length: 0 }]);
    });
  }
});

test("tapdisk's export name ends with the NUL of a C string", async () => {
  const server = await startServer({ exports: [new TestExport('tapdisk_client')] });
  const client = await server.raw();
  await client.greet(1);
  client.send(optionBytes(OPT.EXPORT_NAME, Buffer.from('tapdisk_client\0')));
  await client.read(10 + EXPORT_NAME_PADDING);
  await readsAWord(client);
  expect(server.opens[0]?.exportName).toBe('tapdisk_client');
});

describe('go-nbd, whose client flags are four zeros', () => {
  test('may list', async () => {
    const client = await (await startServer()).raw();
    await client.greet(0);
    const replies = await client.option(OPT.LIST);
    expect(replies.map(({ type }) => type)).toEqual([REP.SERVER, REP.ACK]);
  });

  test('may open by GO, abort, and ask what nobody knows', async () => {
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

test('a write to a read-only export is EPERM, whatever its flags', async () => {
  const server = await startServer({ exports: [new TestExport('disk', { readOnly: true, canFua: false })] });
  const client = await server.opened();
  client.send(requestBytes({ type: CMD.WRITE, flags: 1, length: 4, cookie: 1n }), uint32(7));
  expect(await client.readReply()).toMatchObject({ errno: 1, cookie: 1n });
  await readsAWord(client);
});
