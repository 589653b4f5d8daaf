/** `requestTimeoutMs`: requests that a device does not answer. The client gets an error, and what the device still uses stays taken. */

import { describe, expect, test } from 'vitest';
import type { Limits, ServerOptions } from '../src/index.js';
import { MAX_LEFTOVERS_PER_EXPORT } from '../src/server/leftovers.js';
import { CMD, NBD_ERRNO, OPT, REP } from '../src/protocol/wire.js';
import { errorOf, infoQuery, requestBytes, type OptionReply, type RawClient } from './raw-client.js';
import { stuckServer, type StuckServer } from './stuck-device.js';
import { until } from './test-server.js';

const TIMEOUT_MS = 60;
const EIO = NBD_ERRNO.EIO;

function timedServer(limits: Partial<Limits> = {}, more: Partial<ServerOptions> & { tcp?: boolean } = {}) {
  return stuckServer({ ...more, limits: { requestTimeoutMs: TIMEOUT_MS, lingerMs: 20, ...limits } });
}

/** A write of 512 bytes that times out. */
async function timedOutWrite({ provider }: StuckServer, client: RawClient, offset: number): Promise<void> {
  const before = provider.calls.length;
  client.request({ type: CMD.WRITE, offset, length: 512 }, Buffer.alloc(512, 7));
  await until(() => provider.calls.length > before, 'it writes');
  expect(await client.readReply()).toMatchObject({ errno: EIO });
}

async function write(client: RawClient, offset: number, length = 512): Promise<number> {
  client.request({ type: CMD.WRITE, offset, length }, Buffer.alloc(length, 8));
  return (await client.readReply()).errno;
}

describe('a request that the device does not answer in time', () => {
  test('is answered EIO with the reason and reported, whichever command it is; others are answered as ever', async () => {
    const stuck = await timedServer();
    const client = await stuck.raw();
    await client.openWith('structured', 'disk', ['base:allocation']);
    stuck.provider.isStuck = (_method, offset) => offset < 2 ** 20;
    const commands = [CMD.READ, CMD.WRITE, CMD.FLUSH, CMD.TRIM, CMD.CACHE, CMD.WRITE_ZEROES, CMD.BLOCK_STATUS];
    for (const [index, type] of commands.entries()) {
      const isFlush = type === CMD.FLUSH;
      const fields = { type, offset: isFlush ? 0 : index * 1024, length: isFlush ? 0 : 512, cookie: BigInt(type) };
      client.request(fields, type === CMD.WRITE ? Buffer.alloc(512) : undefined);
    }
    // Long enough to be asked for holes first: the answer to that is missing.
    client.request({ type: CMD.READ, offset: 512 * 1024, length: 256 * 1024, cookie: 99n });
    // Stuck in the part that is read.
    stuck.provider.isStuck = (method, offset) => offset < 2 ** 20 || (method === 'read' && offset === 2 ** 21);
    client.request({ type: CMD.READ, offset: 2 ** 21, length: 256 * 1024, cookie: 100n });
    client.request({ type: CMD.READ, offset: 2 ** 22, length: 512, cookie: 101n });
    const seen = new Map<bigint, string>();
    for (let count = 0; count < 10; count++) {
      const chunk = await client.readChunk();
      seen.set(chunk.cookie, chunk.cookie === 101n ? 'data' : errorOf(chunk).message);
      if (chunk.cookie !== 101n) expect(errorOf(chunk).errno).toBe(EIO);
    }
    const message = `the export did not answer within ${TIMEOUT_MS} ms`;
    expect(seen.get(101n)).toBe('data');
    for (const cookie of [...commands.map(BigInt), 99n, 100n]) expect(seen.get(cookie)).toBe(message);
    expect(stuck.errors).toHaveLength(9);
    expect(stuck.errors[0]).toMatchObject({ name: 'DeviceError', code: 'EIO', message });
    const told = stuck.contexts.map(({ command, offset, length }) => `${command} ${offset} ${length}`);
    expect(told).toContain('WRITE 1024 512');
    expect(told).toContain('BLOCK_STATUS 6144 512');
    expect(told).toContain('READ 2097152 262144');
    const [connection] = stuck.server.connections.values();
    expect(connection).toMatchObject({ phase: 'transmission', inFlight: 9, errors: 9 });
    // What comes late is not sent; what it used is free again.
    for (const call of [...stuck.provider.calls]) call.answer();
    await until(() => connection?.inFlight === 0, 'nothing is in flight');
    stuck.provider.isStuck = () => false;
    client.request({ type: CMD.READ, length: 512, cookie: 102n });
    expect(await client.readChunk()).toMatchObject({ cookie: 102n, isDone: true });
    expect(connection?.errors).toBe(9);
    client.send(requestBytes({ type: CMD.DISC }));
    await client.readToEnd();
    await until(() => stuck.server.connections.size === 0, 'it is over');
    expect(stuck.server.memory.usedBytes).toBe(0);
  });

  test('keeps its memory until the device settles: nothing else is put there', async () => {
    const stuck = await timedServer();
    const client = await stuck.opened();
    client.request({ type: CMD.READ, offset: 0, length: 2 ** 20, cookie: 1n });
    client.request({ type: CMD.WRITE, offset: 2 ** 20, length: 2 ** 20, cookie: 2n }, Buffer.alloc(2 ** 20, 3));
    expect(await client.readReply()).toMatchObject({ errno: EIO });
    expect(await client.readReply()).toMatchObject({ errno: EIO });
    expect(stuck.server.memory.usedBytes).toBeGreaterThanOrEqual(2 ** 21);
    const [reading, writing] = stuck.provider.calls;
    reading?.buffer?.fill(9);
    stuck.provider.isStuck = () => false;
    for (let n = 0; n < 8; n++) {
      client.request({ type: CMD.READ, offset: 2 ** 22, length: 2 ** 20 });
      expect((await client.readReply(2 ** 20)).data.every((byte) => byte === 1)).toBe(true);
      expect(await write(client, 2 ** 22, 2 ** 20)).toBe(0);
    }
    expect(reading?.buffer?.every((byte) => byte === 9)).toBe(true);
    expect(writing?.buffer?.every((byte) => byte === 3)).toBe(true);
    reading?.answer();
    writing?.fail(new Error('failed late'));
    await until(() => [...stuck.server.connections.values()][0]?.inFlight === 0, 'both have settled');
    expect(stuck.errors.at(-1)).toMatchObject({ message: 'failed late' });
  });

  test('in time is not touched, and by default there is no limit', async () => {
    for (const requestTimeoutMs of [0, 10_000]) {
      const stuck = await timedServer({ requestTimeoutMs });
      const client = await stuck.opened();
      for (let cookie = 0n; cookie < 20n; cookie++) client.request({ type: CMD.READ, length: 512, cookie });
      await until(() => stuck.provider.calls.length === 20, 'all are in flight');
      await new Promise((resolve) => setTimeout(resolve, 2 * TIMEOUT_MS));
      for (const call of stuck.provider.calls.toReversed()) call.answer();
      for (let n = 0; n < 20; n++) expect(await client.readReply(512)).toMatchObject({ errno: 0 });
      expect(stuck.errors).toEqual([]);
    }
  });

  test('is never answered before its time, and not much later', async () => {
    const stuck = await timedServer({ requestTimeoutMs: 200 });
    const client = await stuck.opened();
    for (let n = 0; n < 5; n++) {
      const began = performance.now();
      client.request({ type: CMD.READ, length: 512 });
      await client.readReply();
      expect(performance.now() - began).toBeGreaterThanOrEqual(199);
      stuck.provider.calls.at(-1)?.answer();
    }
  });
});

describe('the range of a change that was not answered in time', () => {
  test('is not changed again until the device settles, on any connection of the export; reads and other ranges are', async () => {
    const stuck = await timedServer();
    const [one, two, other] = [await stuck.opened(), await stuck.opened(), await stuck.opened('other')] as const;
    await timedOutWrite(stuck, one, 4096);
    stuck.provider.isStuck = () => false;
    for (const client of [one, two]) {
      expect(await write(client, 4096 + 511, 1)).toBe(EIO);
      expect(await write(client, 4000, 97)).toBe(EIO);
      expect(await write(client, 0, 8192)).toBe(EIO);
      for (const type of [CMD.TRIM, CMD.WRITE_ZEROES]) {
        client.request({ type, offset: 4096, length: 512 });
        expect(await client.readReply()).toMatchObject({ errno: EIO });
      }
      expect(await write(client, 4096 + 512)).toBe(0);
      expect(await write(client, 4096 - 512)).toBe(0);
      client.request({ type: CMD.READ, offset: 4096, length: 512 });
      expect(await client.readReply(512)).toMatchObject({ errno: 0 });
    }
    expect(await write(other, 4096)).toBe(0);
    stuck.provider.calls[0]?.answer();
    await until(() => [...stuck.server.connections.values()][0]?.inFlight === 0, 'it has settled');
    expect(await write(two, 4096)).toBe(0);
  });

  test('stays taken when its client is gone, also for other names of the same disk; the client is told why', async () => {
    const stuck = await timedServer();
    stuck.provider.countedAs = () => 'the same disk';
    const client = await stuck.opened();
    for (const type of [CMD.TRIM, CMD.WRITE_ZEROES]) {
      client.request({ type, offset: type * 4096, length: 512 });
      expect(await client.readReply()).toMatchObject({ errno: EIO });
    }
    client.vanish();
    await until(() => [...stuck.server.connections.values()][0]?.phase === 'closing', 'it is closing');
    const again = await stuck.raw();
    await again.openWith('structured', 'another name');
    stuck.provider.isStuck = () => false;
    again.request({ type: CMD.WRITE, offset: CMD.TRIM * 4096, length: 512 }, Buffer.alloc(512));
    const refused = errorOf(await again.readChunk());
    expect(refused).toMatchObject({
      errno: EIO,
      message: 'an earlier change of this range was not answered by the export, and may still happen',
    });
    for (const call of stuck.provider.calls) call.answer();
    await until(() => stuck.server.connections.size === 1, 'the first is over');
    again.request({ type: CMD.WRITE, offset: CMD.TRIM * 4096, length: 512 }, Buffer.alloc(512));
    expect(await again.readChunk()).toMatchObject({ kind: 'simple', errno: 0 });
  });
});

describe('a device that hangs for good', () => {
  test('fills no connection: when all requests in flight have timed out, further ones are refused', async () => {
    const stuck = await timedServer({ maxInFlightRequests: 4 });
    const client = await stuck.opened();
    for (let cookie = 0n; cookie < 12n; cookie++) client.request({ type: CMD.READ, length: 512, cookie });
    client.request({ type: CMD.WRITE, length: 4, cookie: 12n }, Buffer.from('data'));
    for (let n = 0; n < 13; n++) expect(await client.readReply()).toMatchObject({ errno: EIO });
    expect(stuck.provider.calls).toHaveLength(4);
    stuck.provider.isStuck = () => false;
    stuck.provider.calls[0]?.answer();
    await until(() => [...stuck.server.connections.values()][0]?.inFlight === 3, 'one has settled');
    client.request({ type: CMD.READ, length: 512 });
    expect(await client.readReply(512)).toMatchObject({ errno: 0 });
  });

  test('does not keep a client that disconnects; its device is closed once, when the last request has settled', async () => {
    const stuck = await timedServer();
    const client = await stuck.opened();
    await timedOutWrite(stuck, client, 0);
    client.send(requestBytes({ type: CMD.DISC }));
    expect(await client.readToEnd()).toHaveLength(0);
    client.vanish();
    const [connection] = stuck.server.connections.values();
    await until(() => stuck.provider.calls[0]?.signal?.aborted === true, 'the device is told');
    expect(connection).toMatchObject({ phase: 'closing', inFlight: 1, exportName: 'disk' });
    expect(stuck.provider.endings).toEqual([]);
    stuck.provider.calls[0]?.answer();
    await until(() => stuck.server.connections.size === 0, 'it is over');
    expect(stuck.provider.endings).toEqual(['disconnect']);
  });

  for (const tcp of [false, true]) {
    test(`releases the places of clients that are gone, but not without limit, over ${tcp ? 'TCP' : 'unix'}`, async () => {
      const stuck = await timedServer({ maxConnections: 2, maxConnectionsPerPeer: 2 }, { tcp });
      const greeted = async (): Promise<RawClient> => {
        for (;;) {
          // Until the place of the last client is released, a connection is closed at once.
          const client = await stuck.raw();
          if (await client.greet().then(Boolean, () => false)) return client;
        }
      };
      for (let n = 1; n <= MAX_LEFTOVERS_PER_EXPORT; n++) {
        const client = await greeted();
        await client.option(OPT.GO, infoQuery('disk'));
        client.request({ type: CMD.READ, length: 512 });
        await until(() => stuck.provider.calls.length === n, 'it reads');
        client.vanish();
      }
      let last: OptionReply | undefined;
      while (last?.type !== REP.ERR_POLICY) {
        const client = await greeted();
        last = (await client.option(OPT.GO, infoQuery('disk'))).at(-1);
        client.vanish();
      }
      expect(last.data.toString()).toBe('the export "disk" does not answer: 64 earlier connections still wait for it');
      expect([...stuck.server.connections.values()].filter(({ inFlight }) => inFlight === 1)).toHaveLength(64);
      const other = await greeted();
      await other.option(OPT.GO, infoQuery('other'));
      stuck.provider.isStuck = () => false;
      other.request({ type: CMD.READ, length: 512 });
      expect(await other.readReply(512)).toMatchObject({ errno: 0 });
      for (const call of stuck.provider.calls) call.answer();
      await until(() => stuck.provider.endings.length >= MAX_LEFTOVERS_PER_EXPORT, 'all devices are closed');
      const again = await greeted();
      expect((await again.option(OPT.GO, infoQuery('disk'))).at(-1)?.type).toBe(REP.ACK);
    });
  }
});
