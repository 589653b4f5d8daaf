/** The signal that devices and `open` get, one for each connection: it is aborted when their client is gone, and once. */

import net from 'node:net';
import { describe, expect, test } from 'vitest';
import { NbdClient } from '../src/index.js';
import { CMD, OPT } from '../src/protocol/wire.js';
import { strays, turns } from './careless.js';
import { duplexPair } from './duplex-pair.js';
import { infoQuery, metaQueries, optionBytes, RawClient, requestBytes } from './raw-client.js';
import { stuckServer, type StuckCall, type StuckServer } from './stuck-device.js';
import { until } from './test-server.js';

const KEY = Buffer.from('00112233445566778899aabbccddeeff', 'hex');

/** A read that waits, and its signal. */
async function waitingRead(
  { provider }: StuckServer,
  client: RawClient,
): Promise<StuckCall & { readonly signal: AbortSignal }> {
  const before = provider.calls.length;
  client.request({ type: CMD.READ, length: 512 });
  await until(() => provider.calls.length > before, 'it reads');
  const call = provider.calls.at(-1);
  if (call?.signal === undefined) throw new Error('read() was given no signal');
  return { ...call, signal: call.signal };
}

/** The client's end breaks the connection, as its kernel does if the client is killed with input unread. */
function reset({ socket }: RawClient): void {
  if (!(socket instanceof net.Socket)) throw new Error('not a socket');
  socket.resetAndDestroy();
}

describe('the signal', () => {
  test('is one for the connection: the same for open, describe and each method', async () => {
    const stuck = await stuckServer();
    const client = await stuck.raw();
    await client.greet();
    await client.option(OPT.STRUCTURED_REPLY);
    client.send(optionBytes(OPT.INFO, infoQuery('stuck describe')));
    await until(() => stuck.provider.describes.length === 1, 'it is described');
    stuck.provider.describes[0]?.answer();
    while ((await client.readOptionReply()).type !== 1);
    await client.option(OPT.SET_META_CONTEXT, metaQueries('disk', ['base:allocation']));
    await client.option(OPT.GO, infoQuery('disk'));
    for (const type of [CMD.READ, CMD.FLUSH, CMD.TRIM, CMD.CACHE, CMD.WRITE_ZEROES, CMD.BLOCK_STATUS]) {
      client.request({ type, length: type === CMD.FLUSH ? 0 : 512 });
    }
    client.request({ type: CMD.WRITE, length: 4 }, Buffer.from('data'));
    // Asked for holes first, then read in parts.
    client.request({ type: CMD.READ, length: 256 * 1024 });
    await until(() => stuck.provider.calls.length === 8, 'all are in flight');
    stuck.provider.calls.at(-1)?.answer();
    await until(() => stuck.provider.calls.length === 9, 'it reads the part');
    const signals = new Set(stuck.provider.calls.map(({ signal }) => signal));
    for (const { signal } of [...stuck.provider.opens, ...stuck.provider.describes]) signals.add(signal);
    expect(signals.size).toBe(1);
    const [signal] = signals;
    expect(signal?.aborted).toBe(false);
    const [id] = stuck.server.connections.keys();
    expect(stuck.provider.opens[0]?.id).toBe(id);
    const other = await stuck.opened();
    expect((await waitingRead(stuck, other)).signal).not.toBe(signal);
  });

  for (const tcp of [false, true]) {
    test(`is aborted when the client is killed, over ${tcp ? 'TCP' : 'a unix socket'}`, async () => {
      const stuck = await stuckServer({ tcp, limits: { lingerMs: 50 } });
      const client = await stuck.opened();
      const { signal } = await waitingRead(stuck, client);
      client.vanish();
      await until(() => signal.aborted, 'it is aborted');
      expect(signal.reason).toBeInstanceOf(Error);
      expect(signal.reason).toMatchObject({
        name: 'AbortError',
        message: 'the client left without a disconnect request',
      });
      expect(stuck.provider.endings).toEqual([]);
    });
  }

  test('is aborted when a TLS client is killed', async () => {
    const stuck = await stuckServer({
      tcp: true,
      limits: { lingerMs: 50 },
      tls: { mode: 'require', material: () => ({ verifyPeer: false, pskKey: () => KEY }) },
    });
    const client = await NbdClient.connect({
      ...(stuck.address as { host: string; port: number }),
      tls: { psk: { user: 'alice', key: KEY } },
    });
    await client.go('disk');
    const read = client.read(0, 512).catch((error: unknown) => error);
    await until(() => stuck.provider.calls.length === 1, 'it reads');
    const signal = stuck.provider.calls[0]?.signal;
    expect(signal?.aborted).toBe(false);
    client.destroy();
    await until(() => signal?.aborted === true, 'it is aborted');
    await read;
  });

  test('is aborted at once when the connection breaks, is closed by the server, or violates the protocol', async () => {
    const stuck = await stuckServer({ tcp: true });
    const broken = await stuck.opened();
    const one = await waitingRead(stuck, broken);
    reset(broken);
    await until(() => one.signal.aborted, 'it is aborted');
    expect((one.signal.reason as Error).message).toMatch(/ECONNRESET/);

    const two = await waitingRead(stuck, await stuck.opened());
    const id = [...stuck.server.connections.keys()].at(-1) ?? 0;
    const gone = stuck.server.disconnect(id, 'told to');
    await until(() => two.signal.aborted, 'it is aborted');
    expect(two.signal.reason).toMatchObject({ name: 'AbortError', message: 'told to' });
    two.answer();
    await gone;

    const violating = await stuck.opened();
    const three = await waitingRead(stuck, violating);
    violating.send(requestBytes({ type: CMD.READ, magic: 0 }));
    await until(() => three.signal.aborted, 'it is aborted');
    expect((three.signal.reason as Error).message).toMatch(/^protocol violation: bad request magic/);

    const four = await waitingRead(stuck, await stuck.opened());
    stuck.server.destroy();
    await until(() => four.signal.aborted, 'it is aborted');
    expect((four.signal.reason as Error).message).toBe('the server was stopped');
  });

  test('is not aborted while a client that has disconnected is owed its requests; then, before the device is closed', async () => {
    const stuck = await stuckServer();
    const client = await stuck.opened();
    const { signal, answer } = await waitingRead(stuck, client);
    client.send(requestBytes({ type: CMD.DISC }));
    await until(() => [...stuck.server.connections.values()][0]?.phase === 'closing', 'it is closing');
    client.vanish();
    await new Promise((resolve) => setTimeout(resolve, 20));
    expect(signal.aborted).toBe(false);
    let wasAborted: boolean | undefined;
    stuck.provider.closing = () => void (wasAborted = signal.aborted);
    answer();
    await until(() => stuck.server.connections.size === 0, 'it is over');
    expect({ wasAborted, endings: stuck.provider.endings }).toEqual({ wasAborted: true, endings: ['disconnect'] });
  });

  test('is not aborted at once when a client closes its side: it may still read its answers', async () => {
    const stuck = await stuckServer({ limits: { lingerMs: 60_000 } });
    const client = await stuck.opened();
    const { signal, answer } = await waitingRead(stuck, client);
    client.halfClose();
    await until(() => [...stuck.server.connections.values()][0]?.phase === 'closing', 'it is closing');
    expect(signal.aborted).toBe(false);
    answer();
    expect(await client.readReply(512)).toMatchObject({ errno: 0 });
  });

  test('is aborted by the grace time of close(), not before', async () => {
    const stuck = await stuckServer();
    const { signal, answer } = await waitingRead(stuck, await stuck.opened());
    signal.addEventListener('abort', answer);
    const closed = stuck.server.close({ graceMs: 50 });
    expect(signal.aborted).toBe(false);
    await closed;
    expect(signal.aborted).toBe(true);
    expect(stuck.server.connections.size).toBe(0);
  });

  test('is given to an open that waits, and aborted when its client is gone', async () => {
    const stuck = await stuckServer({ limits: { lingerMs: 50 } });
    const client = await stuck.raw();
    await client.greet();
    client.send(optionBytes(OPT.GO, infoQuery('stuck')));
    await until(() => stuck.provider.opens.length === 1, 'it opens');
    const [open] = stuck.provider.opens;
    client.vanish();
    await until(() => open?.signal.aborted === true, 'it is aborted');
    // It obeys: it fails with the signal's reason, as fetch does. This is no error to report.
    open?.fail(open.signal.reason);
    await until(() => stuck.server.connections.size === 0, 'it is over');
    expect(stuck.errors).toEqual([]);
  });

  test('listeners may close the server and other connections; each is called once and never inside a request', async () => {
    const stuck = await stuckServer();
    const [one, two] = [await stuck.opened(), await stuck.opened()];
    const first = await waitingRead(stuck, one);
    const second = await waitingRead(stuck, two);
    const [firstId, secondId] = [...stuck.server.connections.keys()];
    let isInside = false;
    const seen: string[] = [];
    first.signal.addEventListener('abort', () => {
      seen.push(`first ${isInside ? 'inside' : 'outside'}`);
      void stuck.server.disconnect(secondId ?? 0, 'by a listener');
      void stuck.server.disconnect(firstId ?? 0, 'by a listener');
    });
    second.signal.addEventListener('abort', () => {
      seen.push('second');
      void stuck.server.close({ graceMs: 20 });
      stuck.server.destroy();
      second.answer();
    });
    stuck.provider.onCall = () => {
      isInside = true;
      void stuck.server.disconnect(firstId ?? 0, 'inside a request');
      isInside = false;
      first.answer();
    };
    one.request({ type: CMD.READ, length: 512 });
    // Not executed: the connection ends inside the request before it.
    one.request({ type: CMD.READ, length: 512 });
    await until(() => seen.length === 2, 'both are aborted');
    stuck.provider.calls.at(-1)?.answer();
    await until(() => stuck.server.connections.size === 0, 'all is over');
    expect(seen).toEqual(['first outside', 'second']);
    expect(stuck.provider.calls).toHaveLength(3);
    expect(stuck.provider.endings).toEqual(['lost', 'lost']);
  });

  test('is aborted for a stream of this process, too', async () => {
    const stuck = await stuckServer();
    const { client: near, server: far } = duplexPair();
    stuck.server.serveConnection(far);
    const client = new RawClient(near);
    await client.open('disk');
    const { signal } = await waitingRead(stuck, client);
    near.destroy();
    far.destroy();
    await until(() => signal.aborted, 'it is aborted');
  });
});

test('work that is given up for a client that is gone is no error to report; a bug then still is', async () => {
  const stuck = await stuckServer({ tcp: true });
  const client = await stuck.opened();
  const first = await waitingRead(stuck, client);
  const second = await waitingRead(stuck, client);
  const third = await waitingRead(stuck, client);
  reset(client);
  await until(() => first.signal.aborted, 'it is aborted');
  // As fetch does, with the reason and with an error of its own.
  first.fail(first.signal.reason);
  second.fail(new DOMException('This operation was aborted', 'AbortError'));
  const bug = new TypeError('a bug');
  third.fail(bug);
  await until(() => stuck.server.connections.size === 0, 'it is over');
  expect(stuck.errors).toEqual([bug]);
});

test('what a device then throws may be anything', async () => {
  const uncaught = strays();
  const stuck = await stuckServer({ tcp: true });
  const client = await stuck.opened();
  const boom = (): never => {
    throw new Error('boom');
  };
  const thrown = [
    new Proxy({}, { get: boom, has: boom, getPrototypeOf: boom }),
    Object.defineProperty(new Error('unnamed'), 'name', { get: boom }),
    Object.defineProperty(new Error('without cause'), 'cause', { get: boom }),
  ];
  const reads: Awaited<ReturnType<typeof waitingRead>>[] = [];
  while (reads.length < thrown.length) reads.push(await waitingRead(stuck, client));
  reset(client);
  await until(() => reads.every(({ signal }) => signal.aborted), 'it is aborted');
  for (const [index, { fail }] of reads.entries()) fail(thrown[index]);
  await until(() => stuck.server.connections.size === 0, 'it is over');
  expect(stuck.errors).toHaveLength(3);
  await turns();
  expect(uncaught).toEqual([]);
});
