/** Limits of connections: their number, their idle time, and their end, at which no client loses a reply. */

import net from 'node:net';
import { join } from 'node:path';
import { describe, expect, onTestFinished, test } from 'vitest';
import {
  NbdServer,
  type ConnectionCloseEvent,
  type ConnectionRefusedEvent,
  type Limits,
  type PeerCredentials,
} from '../src/index.js';
import { CMD, NBD_ERRNO } from '../src/protocol/wire.js';
import { RawClient, requestBytes, uint32 } from './raw-client.js';
import { Gate, TestExport, TestProvider } from './test-device.js';
import { startServer, temporaryDirectory, until } from './test-server.js';

interface Tcp {
  readonly server: NbdServer;
  readonly provider: TestProvider;
  readonly closes: ConnectionCloseEvent[];
  readonly refusals: ConnectionRefusedEvent[];
  connect(localAddress?: string): Promise<RawClient>;
}

async function overTcp(limits: Partial<Limits> = {}, host = '127.0.0.1'): Promise<Tcp> {
  const provider = new TestProvider([new TestExport('disk')]);
  const closes: ConnectionCloseEvent[] = [];
  const refusals: ConnectionRefusedEvent[] = [];
  const server = new NbdServer({
    provider,
    limits,
    observer: {
      onConnectionClose: (event) => closes.push(event),
      onConnectionRefused: (event) => refusals.push(event),
    },
  });
  onTestFinished(() => server.destroy());
  const bound = await server.listen({ host, port: 0 });
  if (bound.transport !== 'tcp') throw new Error('not a TCP address');
  const connect = (localAddress?: string): Promise<RawClient> =>
    RawClient.connect({ host: '127.0.0.1', port: bound.port, localAddress });
  return { server, provider, closes, refusals, connect };
}

describe('connections of one peer', () => {
  test('are bounded per address, and a refused one is reported', async () => {
    const { connect, refusals, closes, server } = await overTcp({ maxConnectionsPerPeer: 2 });
    const first = await connect('127.0.0.1');
    await first.open('disk');
    await (await connect('127.0.0.1')).open('disk');
    expect(await (await connect('127.0.0.1')).readToEnd()).toHaveLength(0);
    expect(refusals).toMatchObject([
      { peer: { host: '127.0.0.1' }, reason: expect.stringContaining('2 connections') as unknown },
    ]);
    await (await connect('127.0.0.2')).open('disk');
    first.request({ type: CMD.DISC });
    await until(() => closes.length === 1 && server.connections.size === 2, 'one has left');
    await (await connect('127.0.0.1')).open('disk');
  });

  test('a client that has said goodbye, or closed its side, may connect again although its old socket is still open', async () => {
    const { path, server } = await startServer({ limits: { maxConnectionsPerPeer: 1, lingerMs: 60_000 } });
    // The client does not close it: the server waits for its end.
    const connect = (): RawClient => new RawClient(net.connect({ path, allowHalfOpen: true }));
    const first = connect();
    await first.open('disk');
    first.request({ type: CMD.DISC });
    expect(await first.readToEnd()).toHaveLength(0);
    const second = connect();
    await second.open('disk');
    expect(server.connections.size).toBe(2);
    // But it must not leave a socket behind each time.
    second.request({ type: CMD.DISC });
    await second.readToEnd();
    await connect().open('disk');
    await until(() => server.connections.size === 2, 'the first one has made room');
    await connect()
      .readToEnd()
      .then((all) => expect(all).toHaveLength(0));
  });

  test('a client that has closed its side during a long request may connect again', async () => {
    const { connect, server, provider } = await overTcp({ maxConnectionsPerPeer: 1 });
    const gate = new Gate();
    provider.hook = ({ offset }) => (offset === 8 ? gate.opened : undefined);
    const first = await connect();
    await first.open('disk');
    first.request({ type: CMD.READ, offset: 8, length: 4 });
    await until(() => provider.unfinished === 1, 'its request is in flight');
    first.halfClose();
    await until(() => [...server.connections.values()][0]?.inFlight === 1, 'it is not answered yet');
    let second: RawClient | undefined;
    const again = async (): Promise<boolean> => {
      second = await connect();
      return second.open('disk').then(
        () => true,
        () => false,
      );
    };
    while (!(await again()));
    gate.open();
    expect((await first.readReply(4)).data).toEqual(uint32(9));
  });

  test('of one IPv4 address count together, through an IPv4 or an IPv6 socket', async () => {
    const { connect, server } = await overTcp({}, '::');
    await (await connect()).open('disk');
    expect([...server.connections.values()][0]?.peer.host).toBe('127.0.0.1');
  });

  test('are bounded per user on unix sockets, if the program identifies users', async () => {
    let next: PeerCredentials | undefined = { pid: 1, uid: 7, gid: 7 };
    const server = new NbdServer({
      provider: new TestProvider([new TestExport('disk')]),
      limits: { maxConnectionsPerPeer: 1 },
      peerCredentials: () => next,
    });
    onTestFinished(() => server.destroy());
    const path = join(await temporaryDirectory(), 'nbd.sock');
    await server.listen({ path });
    await (await RawClient.connect({ path })).open('disk');
    expect(await (await RawClient.connect({ path })).readToEnd()).toHaveLength(0);
    next = { pid: 2, uid: 8, gid: 8 };
    await (await RawClient.connect({ path })).open('disk');
    next = undefined;
    await (await RawClient.connect({ path })).open('disk');
    expect(await (await RawClient.connect({ path })).readToEnd()).toHaveLength(0);
    expect(Array.from(server.connections.values(), ({ peer }) => peer.credentials?.uid)).toEqual([7, 8, undefined]);
  });

  test('a limit given as undefined has its default', async () => {
    const { connect, server } = await overTcp({ maxConnections: undefined, handshakeTimeoutMs: undefined });
    const client = await connect();
    await client.open('disk');
    client.request({ type: CMD.READ, offset: 4, length: 4 });
    expect((await client.readReply(4)).data).toEqual(uint32(5));
    expect(server.connections.size).toBe(1);
  });
});

describe('an idle connection', () => {
  test('is closed after its time limit, and a client that sends requests is not', async () => {
    const { opened, closes, server } = await startServer({ limits: { idleTimeoutMs: 300 } });
    const quiet = await opened();
    const busy = await opened();
    const quietOne = { isOver: false };
    const over = quiet.readToEnd().then(() => (quietOne.isOver = true));
    while (!quietOne.isOver) {
      busy.request({ type: CMD.READ, length: 4 });
      await busy.readReply(4);
      await new Promise((resolve) => setTimeout(resolve, 5));
    }
    await over;
    await until(() => closes.length === 1, 'one is over');
    expect(closes[0]?.reason).toBe('idle for 300 ms');
    expect(server.connections.size).toBe(1);
  });

  test('is not a connection with a long request in flight', async () => {
    const { opened, provider, closes } = await startServer({ limits: { idleTimeoutMs: 30 } });
    const gate = new Gate();
    provider.hook = ({ offset }) => (offset === 8 ? gate.opened : undefined);
    const waiting = await opened();
    waiting.request({ type: CMD.READ, offset: 8, length: 4 });
    await until(() => provider.unfinished === 1, 'the request is in flight');
    await (await opened()).readToEnd();
    await until(() => closes.length === 1, 'the other one is over');
    gate.open();
    expect((await waiting.readReply(4)).data).toEqual(uint32(9));
    expect(await waiting.readToEnd()).toHaveLength(0);
  });
});

describe('a client that stalls', () => {
  test('is served when it continues, however late, if there is no limit', async () => {
    const { opened, closes } = await startServer({ limits: { stallTimeoutMs: 0, memoryStallMs: 100 } });
    const client = await opened();
    client.socket.pause();
    client.send(...Array.from({ length: 20 }, () => requestBytes({ type: CMD.READ, length: 1024 * 1024 })));
    const began = performance.now();
    await until(() => performance.now() - began > 1500, 'it has read nothing for a while');
    expect(closes).toHaveLength(0);
    client.socket.resume();
    for (let i = 0; i < 20; i++) expect((await client.readReply(1024 * 1024)).errno).toBe(0);
  });

  test('is closed after stallTimeoutMs without reading, or within a write; an idle client is not', async () => {
    const { opened, closes, server } = await startServer({ limits: { stallTimeoutMs: 1000 } });
    const quiet = await opened();
    const unread = await opened();
    unread.socket.pause();
    unread.send(...Array.from({ length: 20 }, () => requestBytes({ type: CMD.READ, length: 1024 * 1024 })));
    const unsent = await opened();
    unsent.send(requestBytes({ type: CMD.WRITE, length: 65536 }), Buffer.alloc(1000));
    await until(() => closes.length === 2, 'both are closed');
    for (const { reason } of closes) expect(reason).toMatch(/read no replies, and sent nothing, for 1000 ms/);
    expect(server.connections.size).toBe(1);
    quiet.request({ type: CMD.READ, length: 4 });
    expect((await quiet.readReply(4)).errno).toBe(0);
  });
});

describe('the end of a connection', () => {
  test('refuses requests beyond the limit in flight with ESHUTDOWN instead of dropping them', async () => {
    const { opened, provider, server, allOver } = await startServer({ limits: { maxInFlightRequests: 2 } });
    const gate = new Gate();
    provider.hook = () => gate.opened;
    const client = await opened();
    const count = 10;
    client.send(
      ...Array.from({ length: count }, (_, i) => [
        requestBytes({ type: CMD.WRITE, offset: i * 4096, length: 4096, cookie: BigInt(i) }),
        Buffer.alloc(4096),
      ]).flat(),
    );
    await until(() => provider.unfinished === 2, 'two are in flight');
    const closed = server.close();
    for (let i = 2; i < count; i++) {
      expect(await client.readReply()).toMatchObject({ errno: NBD_ERRNO.ESHUTDOWN, cookie: BigInt(i) });
    }
    gate.open();
    expect(await client.readReply()).toMatchObject({ errno: 0, cookie: 0n });
    expect(await client.readReply()).toMatchObject({ errno: 0, cookie: 1n });
    expect(await client.readToEnd()).toHaveLength(0);
    await closed;
    await allOver();
    expect(provider.calls).toHaveLength(2);
  });

  test('comes after the answers to requests that waited for unread replies', async () => {
    const { opened, server, allOver, provider } = await startServer({ limits: { maxUnsentBytes: 64 * 1024 } });
    const client = await opened();
    client.socket.pause();
    const count = 200;
    client.send(
      ...Array.from({ length: count }, (_, i) => requestBytes({ type: CMD.READ, length: 65536, cookie: BigInt(i) })),
    );
    await until(() => provider.calls.length > 0, 'reads are made');
    const closed = server.close();
    client.socket.resume();
    let served = 0;
    for (let i = 0; i < count; i++) {
      const reply = await client.readReply(65536);
      expect([0, NBD_ERRNO.ESHUTDOWN]).toContain(reply.errno);
      expect(reply.cookie).toBe(BigInt(i));
      if (reply.errno === 0) served++;
    }
    expect(served).toBe(provider.calls.length);
    expect(served).toBeLessThan(count);
    await closed;
    await allOver();
  });

  test('is not delayed beyond the grace time by a client that reads nothing', async () => {
    const { opened, server, provider, allOver } = await startServer({
      limits: { maxUnsentBytes: 16 * 1024, lingerMs: 50 },
    });
    const client = await opened();
    client.socket.pause();
    const count = 1000;
    client.send(...Array.from({ length: count }, () => requestBytes({ type: CMD.READ, length: 65536 })));
    await until(() => provider.calls.length > 0, 'reads are made');
    await server.close({ graceMs: 5000 });
    await allOver();
  });

  test('over TCP comes after the last replies, although requests are left unread', async () => {
    // Unread input makes the kernel reset a connection that is closed; the reset may overtake what was sent before it.
    const { connect, provider, server, closes } = await overTcp({ maxUnsentBytes: 256 * 1024 });
    const client = await connect();
    await client.open('disk');
    const count = 40;
    client.send(
      ...Array.from({ length: count }, (_, i) => requestBytes({ type: CMD.READ, length: 65536, cookie: BigInt(i) })),
      requestBytes({ type: CMD.DISC }),
      Buffer.alloc(4 * 1024 * 1024),
    );
    let error: Error | undefined;
    client.socket.on('error', (reason) => (error = reason));
    for (let i = 0; i < count; i++) expect((await client.readReply(65536)).cookie).toBe(BigInt(i));
    expect(await client.readToEnd()).toHaveLength(0);
    client.halfClose();
    await until(() => closes.length === 1, 'the connection is over');
    expect(error).toBeUndefined();
    expect(provider.openNow).toBe(0);
    expect(server.connections.size).toBe(0);
  });

  test('does not wait longer than the linger time for a client that never closes its side', async () => {
    const { path, allOver, closes } = await startServer({ limits: { lingerMs: 50 } });
    const socket = net.connect({ path, allowHalfOpen: true });
    const client = new RawClient(socket);
    await client.open('disk');
    client.request({ type: CMD.DISC });
    await client.readToEnd();
    await allOver();
    expect(closes[0]?.reason).toBe('the client disconnected');
  });
});

test('new connections get the new size of an export, and open connections keep the old one', async () => {
  const { opened, provider, client } = await startServer();
  const before = await opened();
  provider.exports.set('disk', new TestExport('disk', { size: 2 * 1024 * 1024 }));
  const after = await client();
  expect((await after.read(1536 * 1024, 4)).readUInt32BE(0)).toBe(1536 * 1024 + 1);
  before.request({ type: CMD.READ, offset: 1536 * 1024, length: 4 });
  expect((await before.readReply(4)).errno).toBe(NBD_ERRNO.EINVAL);
});

test('a descriptor that is not a socket is refused', async () => {
  const server = new NbdServer({ provider: new TestProvider([]) });
  onTestFinished(() => server.destroy());
  await expect(server.listen({ fd: 0x7fff })).rejects.toMatchObject({ code: 'FAILED' });
});
