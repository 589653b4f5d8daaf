/** Clients that violate the protocol once or repeatedly, beside other clients. */
import { PassThrough } from 'node:stream';
import { describe, expect, test, vi } from 'vitest';
import { CMD } from '../src/protocol/wire.js';
import { HeldSockets } from '../src/server/held-sockets.js';
import { Offenders } from '../src/server/offenders.js';
import { RawClient, requestBytes, uint32 } from './raw-client.js';
import { Gate, TestExport } from './test-device.js';
import { startServer, until, type TestServer } from './test-server.js';

const MINUTE_MS = 60_000;

describe('the violation count of a peer', () => {
  test('delays the close of a connection by nothing at first, then by 100 ms, doubled each time up to the bound', () => {
    const offenders = new Offenders(10_000);
    const delays = Array.from({ length: 12 }, (_, n) => offenders.record('one', n).delayMs);
    expect(delays).toEqual([0, 100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000, 10_000, 10_000]);
    expect(offenders.countOf('one', 12)).toBe(12);
    expect(offenders.record('another', 12)).toEqual({ count: 1, delayMs: 0 });
    for (let n = 0; n < 2000; n++) offenders.record('one', n);
    expect(offenders.record('one', 2000)).toEqual({ count: 2013, delayMs: 10_000 });
  });

  test('is forgotten ten minutes after the last violation', () => {
    const offenders = new Offenders(10_000);
    for (const at of [0, 9 * MINUTE_MS, 18 * MINUTE_MS]) offenders.record('one', at);
    expect(offenders.countOf('one', 28 * MINUTE_MS)).toBe(3);
    expect(offenders.countOf('one', 28 * MINUTE_MS + 1)).toBe(0);
    expect(offenders.record('one', 29 * MINUTE_MS)).toEqual({ count: 1, delayMs: 0 });
  });

  test('uses bounded memory: the peers seen longest ago are forgotten', () => {
    const offenders = new Offenders(10_000);
    for (const name of ['first', 'second', 'first']) offenders.record(name, 0);
    for (let n = 0; n < 1023; n++) offenders.record(`other ${n}`, 1);
    expect(offenders.countOf('second', 1)).toBe(0);
    expect(offenders.countOf('first', 1)).toBe(2);
  });

  test('is not kept if the bound is 0', () => {
    const offenders = new Offenders(0);
    for (let n = 0; n < 5; n++) expect(offenders.record('one', n).delayMs).toBe(0);
  });
});

describe('sockets that wait for their close', () => {
  test('are 64 at most, the oldest is closed first; ended sockets and those with much to send are not kept; all can be released', () => {
    vi.useFakeTimers();
    try {
      const waiting = new HeldSockets();
      const sockets = Array.from({ length: 70 }, () => new PassThrough());
      for (const socket of sockets) expect(waiting.hold(socket, 1000)).toBe(true);
      expect(sockets[69]?.isPaused()).toBe(true);
      expect(sockets.filter(({ destroyed }) => destroyed)).toEqual(sockets.slice(0, 6));
      const gone = new PassThrough();
      gone.destroy();
      expect(waiting.hold(gone, 1000)).toBe(false);
      const busy = new PassThrough({ writableHighWaterMark: 1, readableHighWaterMark: 1 });
      busy.write(Buffer.alloc(100));
      busy.write(Buffer.alloc(70_000));
      expect(waiting.hold(busy, 1000)).toBe(false);
      expect(busy.destroyed).toBe(false);
      vi.advanceTimersByTime(999);
      expect(sockets[69]?.destroyed).toBe(false);
      vi.advanceTimersByTime(1);
      expect(sockets.every(({ destroyed }) => destroyed)).toBe(true);

      const last = new PassThrough();
      waiting.hold(last, 1000);
      waiting.release();
      expect(last.destroyed).toBe(true);
      // Nothing is left that would keep the process running.
    } finally {
      vi.useRealTimers();
    }
  });

  test('leave no timer behind when they are closed', async () => {
    const waiting = new HeldSockets();
    const socket = new PassThrough();
    const cleared = vi.spyOn(globalThis, 'clearTimeout');
    waiting.hold(socket, 1_000_000);
    waiting.release();
    await new Promise((resolve) => socket.once('close', resolve));
    expect(cleared).toHaveBeenCalled();
    cleared.mockRestore();
  });
});

describe('a client that violates the protocol repeatedly', () => {
  /** Opens `name`, sends bytes that are not a request, and waits for the end. Returns the time, milliseconds. */
  async function violate({ opened }: TestServer, name = 'disk'): Promise<number> {
    const client = await opened(name);
    const before = performance.now();
    client.send(requestBytes({ type: CMD.READ, magic: 0x5050505 }));
    expect(await client.readToEnd()).toHaveLength(0);
    return performance.now() - before;
  }

  test('waits longer each time for the close of its connection, and is reported with its count', async () => {
    const server = await startServer({ limits: { maxViolationDelayMs: 300 } });
    const took: number[] = [];
    for (let n = 0; n < 5; n++) took.push(await violate(server));
    await server.allOver();
    // Timers may fire a millisecond early.
    for (const [n, atLeast] of [0, 100, 200, 300, 300].entries()) expect(took[n]).toBeGreaterThanOrEqual(atLeast - 2);
    expect(server.closes.map(({ violations }) => violations)).toEqual([1, 2, 3, 4, 5]);
    expect(server.opens.map(({ violations }) => violations)).toEqual([0, 1, 2, 3, 4]);
    for (const { reason } of server.closes) expect(reason).toBe('protocol violation: bad request magic 0x5050505');
  });

  /** Violates the protocol `times` times; the last connections still wait for their close. */
  async function offend(server: TestServer, times: number): Promise<RawClient[]> {
    const clients: RawClient[] = [];
    for (let n = 0; n < times; n++) {
      const client = await server.opened();
      client.send(requestBytes({ type: CMD.READ, magic: 1 }), Buffer.alloc(100_000));
      await until(() => server.closes.length === n + 1, 'it is told of');
      clients.push(client);
    }
    return clients;
  }

  test('has one count for several names of one export, if the export says so', async () => {
    const forms = ['disk', 'disk/since=a', 'disk/since=b'].map((name) => new TestExport(name));
    for (const { info } of forms) Object.assign(info, { countedAs: 'disk' });
    const server = await startServer({
      exports: [...forms, new TestExport('other')],
      limits: { maxViolationDelayMs: 100 },
    });
    for (const name of ['disk', 'disk/since=a', 'other', 'disk/since=b']) await violate(server, name);
    await server.allOver();
    expect(server.closes.map(({ exportName, violations }) => [exportName, violations])).toEqual([
      ['disk', 1],
      ['disk/since=a', 2],
      ['other', 1],
      ['disk/since=b', 3],
    ]);
  });

  test('holds no device and delays no other connection while it waits', async () => {
    const server = await startServer({
      exports: [new TestExport('disk'), new TestExport('other')],
      limits: { maxViolationDelayMs: 60 * MINUTE_MS, maxConnections: 3, maxConnectionsPerPeer: 3 },
    });
    const neighbour = await server.opened();
    const offenders = await offend(server, 12);
    expect(server.provider.openNow).toBe(1);
    expect(server.server.connections.size).toBe(1);
    neighbour.request({ type: CMD.READ, offset: 4, length: 4, cookie: 5n });
    expect(await neighbour.readReply(4)).toEqual({ errno: 0, cookie: 5n, data: uint32(5) });
    // The same peer with another export does not wait.
    await violate(server, 'other');
    await until(() => server.closes.length === 13, 'it is told of');
    expect(server.closes.at(-1)).toMatchObject({ exportName: 'other', violations: 1 });
    neighbour.request({ type: CMD.DISC });
    await neighbour.readToEnd();
    // It does not delay the end of the server either.
    const before = performance.now();
    await server.server.close({ graceMs: 30_000 });
    expect(performance.now() - before).toBeLessThan(20_000);
    for (const each of offenders) await each.readToEnd();
    await server.allOver();
  });

  test('is not read any more: its further input has no effect', async () => {
    const server = await startServer({ limits: { maxViolationDelayMs: 60 * MINUTE_MS } });
    const clients = await offend(server, 12);
    const last = clients.at(-1);
    last?.request({ type: CMD.WRITE, offset: 0, length: 4, cookie: 1n }, uint32(7));
    // After that a request of another client is answered.
    const other = await server.opened();
    for (let n = 0; n < 20; n++) {
      other.request({ type: CMD.FLUSH, cookie: 2n });
      await other.readReply();
    }
    expect(server.provider.calls.filter(({ method }) => method !== 'flush')).toEqual([]);
  });

  test('and leaves before the close uses no room of other sockets', async () => {
    const server = await startServer({ limits: { maxConnections: 8, maxViolationDelayMs: 60 * MINUTE_MS } });
    for (let n = 0; n < 200; n++) {
      const client = await server.raw();
      client.send(Buffer.from('GET / HTTP/1.1\r\n\r\n'));
      await until(() => server.closes.length === n + 1, 'it is told of');
      client.vanish();
    }
    await violatesNothing(server);
  });

  async function violatesNothing(server: TestServer): Promise<void> {
    const client = await server.opened();
    client.request({ type: CMD.READ, offset: 4, length: 4, cookie: 5n });
    expect(await client.readReply(4)).toMatchObject({ errno: 0, cookie: 5n });
  }

  test('while the server shuts down is closed at once', async () => {
    const server = await startServer({ limits: { maxViolationDelayMs: 60 * MINUTE_MS } });
    await offend(server, 12);
    const gate = new Gate();
    server.provider.hook = () => gate.opened;
    const client = await server.opened();
    client.request({ type: CMD.FLUSH, cookie: 1n });
    await until(() => server.provider.unfinished === 1, 'a request is under way');
    const closed = server.server.close();
    client.send(requestBytes({ type: CMD.READ, magic: 1 }));
    await client.readToEnd();
    gate.open();
    await closed;
    await server.allOver();
    expect(server.closes.at(-1)?.violations).toBe(13);
  });

  test('gets its earlier requests finished', async () => {
    const server = await startServer({ limits: { maxViolationDelayMs: 60 * MINUTE_MS } });
    for (let n = 0; n < 3; n++) {
      const gate = new Gate();
      server.provider.hook = () => gate.opened;
      const client = await server.opened();
      client.request({ type: CMD.WRITE, offset: n, length: 1, cookie: 1n }, Buffer.of(0x77));
      client.send(requestBytes({ type: CMD.READ, magic: 1 }));
      await until(() => server.provider.unfinished === 1, 'the write is under way');
      gate.open();
      await until(() => server.closes.length === n + 1, 'it is told of');
    }
    expect(server.provider.exports.get('disk')?.disk.subarray(0, 3)).toEqual(Buffer.of(0x77, 0x77, 0x77));
    await server.allOver();
  });

  test('does not wait in addition for its requests in flight', async () => {
    const server = await startServer({ limits: { maxViolationDelayMs: 200 } });
    const gate = new Gate();
    server.provider.hook = () => gate.opened;
    for (let n = 0; n < 3; n++) {
      const client = await server.opened();
      client.request({ type: CMD.FLUSH, cookie: 1n });
      client.send(requestBytes({ type: CMD.READ, magic: 1 }));
      // The device does not answer them.
      expect(await client.readToEnd()).toHaveLength(0);
    }
    expect(server.provider.unfinished).toBe(3);
    gate.open();
    await server.allOver();
  });

  test('in the handshake is treated the same way', async () => {
    const server = await startServer();
    for (let n = 0; n < 3; n++) {
      const client = await server.raw();
      const before = performance.now();
      client.send(Buffer.from('GET / HTTP/1.1\r\n\r\n'));
      await client.readToEnd();
      expect(performance.now() - before).toBeGreaterThanOrEqual([0, 98, 198][n] ?? 0);
    }
    await server.allOver();
    expect(server.closes.map(({ violations, exportName }) => [violations, exportName])).toEqual([
      [1, undefined],
      [2, undefined],
      [3, undefined],
    ]);
  });
});

test('leaving, being idle, or being refused an export is no violation', async () => {
  const server = await startServer();
  (await server.opened()).vanish();
  const client = await server.raw();
  await client.greet();
  client.vanish();
  const other = await server.opened();
  other.request({ type: 0x77, length: 1, cookie: 1n });
  await other.readReply();
  other.halfClose();
  await server.allOver();
  expect(server.closes.map(({ violations }) => violations)).toEqual([0, 0, 0]);
});
