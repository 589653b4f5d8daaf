/** The handshake with clients that follow the protocol: the answers, and the export that clients get. */

import { describe, expect, test, vi } from 'vitest';
import { DeviceError, ExportError, type ExportInfo, type ExportProvider } from '../src/index.js';
import { CMD, GREETING_SIZE, INFO, OPT, REP, TRANSMISSION_FLAG } from '../src/protocol/wire.js';
import { infoQuery, optionBytes, RawClient, requestBytes, uint16, uint32, type OptionReply } from './raw-client.js';
import { DISK_SIZE, Gate, TestExport } from './test-device.js';
import { startServer, until } from './test-server.js';

const UNKNOWN_OPTION = 0x4e;

const ALL_FLAGS =
  TRANSMISSION_FLAG.HAS_FLAGS |
  TRANSMISSION_FLAG.SEND_FLUSH |
  TRANSMISSION_FLAG.SEND_FUA |
  TRANSMISSION_FLAG.SEND_TRIM |
  TRANSMISSION_FLAG.SEND_WRITE_ZEROES |
  TRANSMISSION_FLAG.SEND_FAST_ZERO |
  TRANSMISSION_FLAG.SEND_CACHE |
  TRANSMISSION_FLAG.CAN_MULTI_CONN;

/** Data of the only NBD_REP_INFO of type `info`, without the type. */
function infoOf(replies: readonly OptionReply[], info: number): Buffer | undefined {
  const found = replies.filter(({ type, data }) => type === REP.INFO && data.readUInt16BE(0) === info);
  expect(found.length).toBeLessThanOrEqual(1);
  return found[0]?.data.subarray(2);
}

function lastType(replies: readonly OptionReply[]): number | undefined {
  return replies.at(-1)?.type;
}

async function announcedFlags(exported: TestExport): Promise<number | undefined> {
  const { raw } = await startServer({ exports: [exported] });
  const client = await raw();
  await client.greet();
  return infoOf(await client.option(OPT.INFO, infoQuery(exported.info.name)), INFO.EXPORT)?.readUInt16BE(8);
}

describe('greeting', () => {
  test('the server sends both magics, fixed newstyle and no zeroes first', async () => {
    const client = await (await startServer()).raw();
    const greeting = await client.read(GREETING_SIZE);
    expect(greeting.toString('latin1', 0, 16)).toBe('NBDMAGICIHAVEOPT');
    expect(greeting.readUInt16BE(16)).toBe(3);
  });

  test('a client that sends its handshake and a request before it reads is served', async () => {
    const client = await (await startServer()).raw();
    client.send(
      uint32(3),
      optionBytes(OPT.LIST),
      optionBytes(OPT.GO, infoQuery('disk')),
      requestBytes({ type: CMD.READ, offset: 8, length: 4, cookie: 7n }),
    );
    await client.read(GREETING_SIZE);
    const types = [];
    for (let count = 0; count < 4; count++) types.push((await client.readOptionReply()).type);
    expect(types).toEqual([REP.SERVER, REP.ACK, REP.INFO, REP.ACK]);
    expect(await client.readReply(4)).toEqual({ errno: 0, cookie: 7n, data: uint32(9) });
  });

  test('a handshake that arrives byte by byte is understood', async () => {
    const client = await (await startServer()).raw();
    const bytes = Buffer.concat([uint32(3), optionBytes(OPT.GO, infoQuery('disk', [INFO.NAME]))]);
    for (const byte of bytes) {
      await new Promise((resolve) => client.socket.write(Buffer.of(byte), resolve));
    }
    await client.read(GREETING_SIZE);
    expect((await client.readOptionReply()).type).toBe(REP.INFO);
    expect((await client.readOptionReply()).data.toString('utf8', 2)).toBe('disk');
    expect((await client.readOptionReply()).type).toBe(REP.ACK);
  });
});

describe('options', () => {
  test('an unknown option is answered UNSUP, its data is skipped, and the handshake continues', async () => {
    const client = await (await startServer()).raw();
    await client.greet();
    for (const data of [Buffer.alloc(0), Buffer.from('whatever'), Buffer.alloc(60_000, 0xff)]) {
      const replies = await client.option(UNKNOWN_OPTION, data);
      expect(replies.map(({ option, type }) => ({ option, type }))).toEqual([
        { option: UNKNOWN_OPTION, type: REP.ERR_UNSUP },
      ]);
    }
    expect(lastType(await client.option(OPT.GO, infoQuery('disk')))).toBe(REP.ACK);
  });

  test('LIST returns every export with name and description, then ACK', async () => {
    const exports = [new TestExport('disk', {}, 'the first'), new TestExport('größe ☃', {}, ''), new TestExport('')];
    const client = await (await startServer({ exports })).raw();
    await client.greet();
    const replies = await client.option(OPT.LIST);
    const entries = replies.slice(0, -1).map(({ type, data }) => {
      expect(type).toBe(REP.SERVER);
      const length = data.readUInt32BE(0);
      return [data.toString('utf8', 4, 4 + length), data.toString('utf8', 4 + length)];
    });
    expect(entries).toEqual([
      ['disk', 'the first'],
      ['größe ☃', ''],
      ['', 'about '],
    ]);
    expect(lastType(replies)).toBe(REP.ACK);
  });

  test('a list of very many exports is sent completely and in order, while other clients are served', async () => {
    const { raw, opened, provider } = await startServer();
    const count = 50_000;
    let asked = 0;
    function* many(): Generator<ExportInfo> {
      for (; asked < count; asked++) yield { name: `disk-${asked}`, description: 'one of many' };
    }
    vi.spyOn(provider as ExportProvider, 'list').mockImplementation(many);
    const neighbour = await opened();
    const client = await raw();
    await client.greet();
    const listing = client.option(OPT.LIST);
    let reads = 0;
    for (; asked < count; reads++) {
      neighbour.request({ type: CMD.READ, offset: 4, length: 4 });
      expect((await neighbour.readReply(4)).data).toEqual(uint32(5));
    }
    expect(reads).toBeGreaterThan(10);
    const replies = await listing;
    expect(replies).toHaveLength(count + 1);
    expect(replies[1234]?.data.toString('utf8', 4)).toBe('disk-1234one of many');
  });

  test('LIST of a server without exports is an empty list', async () => {
    const client = await (await startServer({ exports: [] })).raw();
    await client.greet();
    expect((await client.option(OPT.LIST)).map(({ type }) => type)).toEqual([REP.ACK]);
  });

  test('a description longer than the limit for strings is cut between characters', async () => {
    const client = await (await startServer({ exports: [new TestExport('disk', {}, '€'.repeat(2000))] })).raw();
    await client.greet();
    const described = infoOf(await client.option(OPT.INFO, infoQuery('disk', [INFO.DESCRIPTION])), INFO.DESCRIPTION);
    expect(described?.toString()).toBe('€'.repeat(1365));
  });

  test('INFO reports size, flags, and if requested name, description and block sizes, and opens no device', async () => {
    const { raw, provider } = await startServer({ exports: [new TestExport('disk', { minimumBlockSize: 512 })] });
    const client = await raw();
    await client.greet();
    const replies = await client.option(
      OPT.INFO,
      infoQuery('disk', [INFO.EXPORT, INFO.NAME, INFO.DESCRIPTION, INFO.BLOCK_SIZE]),
    );
    const exported = infoOf(replies, INFO.EXPORT);
    expect(exported?.readBigUInt64BE(0)).toBe(BigInt(DISK_SIZE));
    expect(exported?.readUInt16BE(8)).toBe(ALL_FLAGS);
    expect(infoOf(replies, INFO.NAME)?.toString()).toBe('disk');
    expect(infoOf(replies, INFO.DESCRIPTION)?.toString()).toBe('about disk');
    const sizes = infoOf(replies, INFO.BLOCK_SIZE);
    expect([sizes?.readUInt32BE(0), sizes?.readUInt32BE(4), sizes?.readUInt32BE(8)]).toEqual([512, 4096, 33554432]);
    expect(lastType(replies)).toBe(REP.ACK);
    expect(provider.opened).toBe(0);
  });

  test('INFO without information requests reports size and flags, and block sizes only if requests must be aligned', async () => {
    const exports = [new TestExport('any'), new TestExport('aligned', { minimumBlockSize: 4096 })];
    const client = await (await startServer({ exports })).raw();
    await client.greet();
    const any = await client.option(OPT.INFO, infoQuery('any'));
    expect(any.map(({ type }) => type)).toEqual([REP.INFO, REP.ACK]);
    const aligned = await client.option(OPT.INFO, infoQuery('aligned'));
    expect(infoOf(aligned, INFO.BLOCK_SIZE)?.readUInt32BE(0)).toBe(4096);
  });

  test('unknown information requests are ignored, and repeated ones are answered once', async () => {
    const client = await (await startServer()).raw();
    await client.greet();
    const replies = await client.option(OPT.INFO, infoQuery('disk', [0x7777, INFO.NAME, INFO.NAME, INFO.EXPORT]));
    expect(replies.map(({ type }) => type)).toEqual([REP.INFO, REP.INFO, REP.ACK]);
  });

  test('after a failed GO another GO succeeds on the same connection', async () => {
    const { raw, provider } = await startServer();
    const client = await raw();
    await client.greet();
    expect(lastType(await client.option(OPT.GO, infoQuery('nothing')))).toBe(REP.ERR_UNKNOWN);
    expect(lastType(await client.option(OPT.GO, infoQuery('disk')))).toBe(REP.ACK);
    expect(provider.openNow).toBe(1);
  });

  test('ABORT is acknowledged and the connection closed', async () => {
    const { raw, allOver, closes } = await startServer();
    const client = await raw();
    await client.greet();
    expect((await client.option(OPT.ABORT)).map(({ type }) => type)).toEqual([REP.ACK]);
    expect(await client.readToEnd()).toHaveLength(0);
    await allOver();
    expect(closes[0]).toMatchObject({
      ...{ exportName: undefined, refused: undefined },
      reason: 'the client aborted the handshake',
    });
  });

  for (const [how, leave] of [
    ['aborts', (client: RawClient) => client.option(OPT.ABORT)],
    ['closes its end', (client: RawClient) => client.socket.end()],
  ] as const) {
    test(`the close report of a client that is refused an export and ${how} names the export`, async () => {
      const { raw, allOver, closes } = await startServer();
      const client = await raw();
      await client.greet();
      expect(lastType(await client.option(OPT.GO, infoQuery('nothing')))).toBe(REP.ERR_UNKNOWN);
      await leave(client);
      await allOver();
      expect(closes[0]).toMatchObject({
        ...{ exportName: undefined, refused: 'nothing' },
        reason: 'the client left when it was refused "nothing"',
      });
    });
  }

  test('a client that is refused an export and opens another one has no refused export in its close report', async () => {
    const { raw, allOver, closes } = await startServer();
    const client = await raw();
    await client.greet();
    expect(lastType(await client.option(OPT.GO, infoQuery('nothing')))).toBe(REP.ERR_UNKNOWN);
    expect(lastType(await client.option(OPT.GO, infoQuery('disk')))).toBe(REP.ACK);
    client.socket.end();
    await allOver();
    expect(closes[0]).toMatchObject({ exportName: 'disk', refused: undefined });
  });

  test('a name of 4096 bytes is accepted', async () => {
    const longest = 'é'.repeat(2048);
    const client = await (await startServer({ exports: [new TestExport(longest)] })).raw();
    await client.greet();
    expect(lastType(await client.option(OPT.GO, infoQuery(longest)))).toBe(REP.ACK);
  });
});

describe('EXPORT_NAME', () => {
  for (const { clientFlags, zeroes, meaning } of [
    { clientFlags: 0, zeroes: 124, meaning: 'without any client flag has 124 zeros behind it' },
    { clientFlags: 1, zeroes: 124, meaning: 'with fixed newstyle has 124 zeros behind it' },
    { clientFlags: 2, zeroes: 0, meaning: 'with no zeroes has none behind it' },
    { clientFlags: 3, zeroes: 0, meaning: 'with both client flags has none behind it' },
  ]) {
    test(`the answer ${meaning}, and then requests are served`, async () => {
      const client = await (await startServer()).raw();
      await client.greet(clientFlags);
      client.send(optionBytes(OPT.EXPORT_NAME, Buffer.from('disk')));
      const answer = await client.read(10 + zeroes);
      expect(answer.readBigUInt64BE(0)).toBe(BigInt(DISK_SIZE));
      expect(answer.readUInt16BE(8)).toBe(ALL_FLAGS);
      expect(answer.subarray(10)).toEqual(Buffer.alloc(zeroes));
      client.request({ type: CMD.READ, offset: 4, length: 4, cookie: 1n });
      expect(await client.readReply(4)).toEqual({ errno: 0, cookie: 1n, data: uint32(5) });
    });
  }

  test('an empty name selects the export whose name is empty', async () => {
    const { raw, opens } = await startServer({ exports: [new TestExport('', { size: 8192 }), new TestExport('disk')] });
    const client = await raw();
    await client.greet();
    client.send(optionBytes(OPT.EXPORT_NAME));
    expect((await client.read(10)).readBigUInt64BE(0)).toBe(8192n);
    expect(opens[0]?.exportName).toBe('');
  });
});

describe('flags of an export', () => {
  test('a read-only export announces no command that changes it', async () => {
    const flags = await announcedFlags(new TestExport('disk', { readOnly: true }));
    const changing =
      TRANSMISSION_FLAG.SEND_TRIM | TRANSMISSION_FLAG.SEND_WRITE_ZEROES | TRANSMISSION_FLAG.SEND_FAST_ZERO;
    expect(flags).toBe((ALL_FLAGS & ~changing) | TRANSMISSION_FLAG.READ_ONLY);
  });

  for (const { can, flag } of [
    { can: { canFlush: false }, flag: TRANSMISSION_FLAG.SEND_FLUSH },
    { can: { canFua: false }, flag: TRANSMISSION_FLAG.SEND_FUA },
    { can: { canTrim: false }, flag: TRANSMISSION_FLAG.SEND_TRIM },
    { can: { canFastZero: false }, flag: TRANSMISSION_FLAG.SEND_FAST_ZERO },
    { can: { canCache: false }, flag: TRANSMISSION_FLAG.SEND_CACHE },
    { can: { multiConn: false }, flag: TRANSMISSION_FLAG.CAN_MULTI_CONN },
    { can: { canZero: false }, flag: TRANSMISSION_FLAG.SEND_WRITE_ZEROES | TRANSMISSION_FLAG.SEND_FAST_ZERO },
  ]) {
    test(`a device with ${JSON.stringify(can)} announces everything else`, async () => {
      expect(await announcedFlags(new TestExport('disk', can))).toBe(ALL_FLAGS & ~flag);
    });
  }

  test('a rotational device is announced as rotational', async () => {
    const flags = await announcedFlags(new TestExport('disk', { rotational: true }));
    expect(flags).toBe(ALL_FLAGS | TRANSMISSION_FLAG.ROTATIONAL);
  });
});

describe('providers that refuse', () => {
  for (const { code, type } of [
    { code: 'UNKNOWN', type: REP.ERR_UNKNOWN },
    { code: 'POLICY', type: REP.ERR_POLICY },
    { code: 'SHUTDOWN', type: REP.ERR_SHUTDOWN },
    { code: 'FAILED', type: REP.ERR_UNKNOWN },
  ] as const) {
    test(`an ExportError ${code} while opening is answered with its error reply and its message`, async () => {
      const { raw, provider, deviceErrors } = await startServer();
      provider.openHook = () => {
        throw new ExportError(code, 'not today');
      };
      const client = await raw();
      await client.greet();
      const [reply] = await client.option(OPT.GO, infoQuery('disk'));
      expect({ type: reply?.type, message: reply?.data.toString() }).toEqual({ type, message: 'not today' });
      expect(deviceErrors).toEqual([]);
      expect(lastType(await client.option(UNKNOWN_OPTION))).toBe(REP.ERR_UNSUP);
    });
  }

  test('any other error of a provider is reported, and its text is not sent to the client', async () => {
    const { raw, provider, deviceErrors } = await startServer();
    const secret = new Error('secret: /etc/passwd');
    provider.openHook = () => Promise.reject(secret);
    const client = await raw();
    await client.greet();
    const [reply] = await client.option(OPT.GO, infoQuery('disk'));
    expect(reply?.type).toBe(REP.ERR_UNKNOWN);
    expect(reply?.data.toString()).not.toContain('secret');
    expect(deviceErrors).toEqual([{ error: secret, exportName: 'disk' }]);
  });

  for (const geometry of [
    { size: -1 },
    { size: 2 ** 53 },
    { size: 0.5 },
    { minimumBlockSize: 3 },
    { minimumBlockSize: 131072, preferredBlockSize: 131072 },
    { preferredBlockSize: 256 },
    { minimumBlockSize: 8192, preferredBlockSize: 4096 },
  ]) {
    test(`a device with the impossible geometry ${JSON.stringify(geometry)} is refused and closed`, async () => {
      const { raw, provider, deviceErrors } = await startServer({
        exports: [new TestExport('odd', geometry), new TestExport('disk')],
      });
      const client = await raw();
      await client.greet();
      expect(lastType(await client.option(OPT.INFO, infoQuery('odd')))).toBe(REP.ERR_UNKNOWN);
      expect(lastType(await client.option(OPT.GO, infoQuery('odd')))).toBe(REP.ERR_UNKNOWN);
      expect(provider).toMatchObject({ opened: 1, closed: 1, breaches: [] });
      expect(deviceErrors).toHaveLength(2);
      expect(lastType(await client.option(OPT.GO, infoQuery('disk')))).toBe(REP.ACK);
    });
  }

  test('a device that fails to close is reported with the name of its export', async () => {
    const { opened, provider, allOver, deviceErrors } = await startServer();
    const failure = new DeviceError('EIO', 'no');
    provider.closeHook = () => Promise.reject(failure);
    const client = await opened();
    client.request({ type: CMD.DISC });
    await client.readToEnd();
    await allOver();
    expect(deviceErrors).toEqual([{ error: failure, exportName: 'disk' }]);
  });

  test('options sent while an export is being opened are answered after it, in order', async () => {
    const { raw, provider } = await startServer();
    const gate = new Gate();
    provider.openHook = (name) => (name === 'slow' ? gate.opened : undefined);
    const client = await raw();
    await client.greet();
    client.send(optionBytes(OPT.GO, infoQuery('slow')), optionBytes(UNKNOWN_OPTION, uint16(1)));
    await until(() => client.socket.writableLength === 0, 'both options are sent');
    gate.open();
    expect((await client.readOptionReply()).type).toBe(REP.ERR_UNKNOWN);
    expect((await client.readOptionReply()).option).toBe(UNKNOWN_OPTION);
  });
});
