/** Ends that the program asks for: closing one connection, one export, draining, and what close() says when devices never finish. */

import { describe, expect, test } from 'vitest';
import { NbdClient, NbdServer } from '../src/index.js';
import { CMD } from '../src/protocol/wire.js';
import { duplexPair } from './duplex-pair.js';
import { requestBytes, type RawClient } from './raw-client.js';
import { stuckServer, StuckProvider, type StuckServer } from './stuck-device.js';
import { until } from './test-server.js';

async function waitingRead({ provider }: StuckServer, client: RawClient): Promise<void> {
  const before = provider.calls.length;
  client.request({ type: CMD.READ, length: 512 });
  await until(() => provider.calls.length > before, 'it reads');
}

const idsOf = ({ server }: StuckServer): number[] => [...server.connections.keys()];

describe('close()', () => {
  test('says which connections wait for their devices, and reports each of them', async () => {
    const stuck = await stuckServer();
    await waitingRead(stuck, await stuck.opened('one'));
    const [id] = idsOf(stuck);
    await stuck.opened('two');
    const { unfinished } = await stuck.server.close({ graceMs: 10 });
    expect(unfinished).toMatchObject([{ id, exportName: 'one', phase: 'closing', inFlight: 1, requests: 1 }]);
    expect(stuck.errors).toMatchObject([
      { message: 'the server was closed, but this connection waits for 1 request that its device has not finished' },
    ]);
    // A copy: it tells what was.
    stuck.provider.calls[0]?.answer();
    await until(() => stuck.server.connections.size === 0, 'it is over');
    expect(unfinished[0]?.inFlight).toBe(1);
    expect(stuck.provider.endings).toEqual(['lost', 'lost']);
  });

  test('resolves with nothing if all is finished', async () => {
    const stuck = await stuckServer();
    await stuck.opened();
    expect(await stuck.server.close()).toEqual({ unfinished: [] });
    expect(stuck.errors).toEqual([]);
  });

  test('with graceMs: Infinity, or longer than a timer can be, waits', async () => {
    for (const graceMs of [Infinity, 2 ** 31, Number.MAX_SAFE_INTEGER]) {
      const stuck = await stuckServer();
      const client = await stuck.opened();
      await waitingRead(stuck, client);
      let isClosed = false;
      const closed = stuck.server.close({ graceMs }).then((result) => {
        isClosed = true;
        return result;
      });
      // Node's timer would be due after 1 ms.
      await new Promise((resolve) => setTimeout(resolve, 20));
      expect({ isClosed, aborted: stuck.provider.calls[0]?.signal?.aborted }).toEqual({
        isClosed: false,
        aborted: false,
      });
      stuck.provider.calls[0]?.answer();
      expect(await client.readReply(512)).toMatchObject({ errno: 0 });
      expect(await closed).toEqual({ unfinished: [] });
    }
  });
});

describe('disconnect()', () => {
  test('waits for the device, or until its signal is aborted; the connection is closed all the same', async () => {
    const stuck = await stuckServer();
    const client = await stuck.opened();
    await waitingRead(stuck, client);
    const [id = 0] = idsOf(stuck);
    const signal = AbortSignal.timeout(10);
    await expect(stuck.server.disconnect(id, 'told to', { signal })).rejects.toMatchObject({ name: 'TimeoutError' });
    await client.readToEnd();
    expect(stuck.server.connections.get(id)).toMatchObject({ phase: 'closing', inFlight: 1 });
    expect(stuck.provider.calls[0]?.signal?.aborted).toBe(true);
    const again = stuck.server.disconnect(id, 'told to');
    stuck.provider.calls[0]?.answer();
    expect(await again).toBe(true);
    expect(await stuck.server.disconnect(id, 'told to')).toBe(false);
    expect(stuck.closes).toMatchObject([{ reason: 'told to' }]);
  });
});

describe('closeExport()', () => {
  test('closes all connections of the export and resolves when their devices are closed; others continue', async () => {
    const stuck = await stuckServer();
    const clients = [await stuck.opened('one'), await stuck.opened('one'), await stuck.opened('two')];
    const [first, second, other] = clients as [RawClient, RawClient, RawClient];
    await waitingRead(stuck, first);
    let count: number | undefined;
    const closed = stuck.server.closeExport('one', 'it is deleted').then((closedCount) => (count = closedCount));
    await second.readToEnd();
    await until(() => stuck.provider.endings.length === 1, 'one device is closed');
    expect(count).toBeUndefined();
    stuck.provider.calls[0]?.answer();
    await closed;
    expect({ count, endings: stuck.provider.endings }).toEqual({ count: 2, endings: ['lost', 'lost'] });
    expect(stuck.closes.map(({ reason, exportName }) => [reason, exportName])).toEqual([
      ['it is deleted', 'one'],
      ['it is deleted', 'one'],
    ]);
    stuck.provider.isStuck = () => false;
    other.request({ type: CMD.READ, length: 512 });
    expect(await other.readReply(512)).toMatchObject({ errno: 0 });
    // It can still be opened: the provider decides that.
    await stuck.opened('one');
    expect(await stuck.server.closeExport('nothing', 'x')).toBe(0);
    expect(await stuck.server.closeExport('one', 'x')).toBe(1);
  });

  test('does not wait longer than its signal', async () => {
    const stuck = await stuckServer();
    await waitingRead(stuck, await stuck.opened('one'));
    const controller = new AbortController();
    const closed = stuck.server.closeExport('one', 'x', { signal: controller.signal });
    const reason = new Error('no more');
    controller.abort(reason);
    await expect(closed).rejects.toBe(reason);
  });
});

describe('drain()', () => {
  test('accepts no more clients, lets the present ones work, and resolves when they have left', async () => {
    const stuck = await stuckServer({ tcp: true });
    stuck.provider.isStuck = () => false;
    const working = await stuck.opened();
    // In the handshake: it may still choose an export.
    const haggling = await stuck.raw();
    await haggling.greet();
    const handed = duplexPair();
    stuck.server.serveConnection(handed.server);
    const internal = new (working.constructor as typeof RawClient)(handed.client);
    await internal.open('disk');
    let left: unknown;
    const drained = stuck.server.drain().then((result) => (left = result));
    await expect(NbdClient.connect(stuck.address as { host: string; port: number })).rejects.toThrow('ECONNREFUSED');
    await expect(stuck.server.listen({ host: '127.0.0.1', port: 0 })).rejects.toMatchObject({
      code: 'CLOSED',
      message: 'the server is draining',
    });
    expect(stuck.server.serveConnection(duplexPair().server)).toBeUndefined();
    await haggling.option(7, Buffer.concat([Buffer.from([0, 0, 0, 4]), Buffer.from('disk'), Buffer.alloc(2)]));
    for (const client of [working, haggling, internal]) {
      client.request({ type: CMD.READ, length: 512 });
      expect(await client.readReply(512)).toMatchObject({ errno: 0 });
    }
    for (const client of [working, haggling, internal]) {
      expect(left).toBeUndefined();
      client.send(requestBytes({ type: CMD.DISC }));
      await client.readToEnd();
      client.vanish();
    }
    await drained;
    expect(left).toEqual({ unfinished: [] });
    expect(stuck.provider.endings).toEqual(['disconnect', 'disconnect', 'disconnect']);
    // It is closed then.
    expect(await stuck.server.close()).toEqual({ unfinished: [] });
    await expect(stuck.server.listen({ host: '127.0.0.1', port: 0 })).rejects.toMatchObject({ code: 'CLOSED' });
  });

  test('of a server without clients resolves at once', async () => {
    const server = new NbdServer({ provider: new StuckProvider() });
    expect(await server.drain()).toEqual({ unfinished: [] });
  });

  test('does not wait longer than it is told, and clients continue', async () => {
    const stuck = await stuckServer();
    stuck.provider.isStuck = () => false;
    const client = await stuck.opened();
    const [id] = idsOf(stuck);
    expect(await stuck.server.drain({ timeoutMs: 10 })).toMatchObject({
      unfinished: [{ id, exportName: 'disk', phase: 'transmission' }],
    });
    const signal = AbortSignal.abort(new Error('no more'));
    await expect(stuck.server.drain({ signal })).rejects.toThrow('no more');
    client.request({ type: CMD.READ, length: 512 });
    expect(await client.readReply(512)).toMatchObject({ errno: 0 });
  });

  test('is cut short by close()', async () => {
    const stuck = await stuckServer();
    const client = await stuck.opened();
    const drained = stuck.server.drain();
    await stuck.server.close();
    expect(await drained).toEqual({ unfinished: [] });
    await client.readToEnd();
  });
});
