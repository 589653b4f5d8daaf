/** What becomes of those who break the protocol: once, again, and while others work beside them. */
import { describe, expect, test } from 'vitest';
import { CMD } from '../src/protocol.js';
import { Violations } from '../src/violations.js';
import { requestBytes, uint32 } from './raw-client.js';
import { TestExport } from './test-device.js';
import { startServer, until, type TestServer } from './test-server.js';

const MINUTE_MS = 60_000;

describe('the count of an offender', () => {
  test('begins with no delay, doubles it from 100 ms on, and ends at the bound', () => {
    const violations = new Violations(10_000);
    const delays = Array.from({ length: 12 }, (_, n) => violations.record('one', n).delayMs);
    expect(delays).toEqual([0, 100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000, 10_000, 10_000]);
    expect(violations.countOf('one', 12)).toBe(12);
    expect(violations.record('another', 12)).toEqual({ count: 1, delayMs: 0 });
    for (let n = 0; n < 2000; n++) violations.record('one', n);
    expect(violations.record('one', 2000)).toEqual({ count: 2013, delayMs: 10_000 });
  });

  test('is forgotten ten minutes after the last time', () => {
    const violations = new Violations(10_000);
    for (const at of [0, 9 * MINUTE_MS, 18 * MINUTE_MS]) violations.record('one', at);
    expect(violations.countOf('one', 28 * MINUTE_MS)).toBe(3);
    expect(violations.countOf('one', 28 * MINUTE_MS + 1)).toBe(0);
    expect(violations.record('one', 29 * MINUTE_MS)).toEqual({ count: 1, delayMs: 0 });
  });

  test('takes bounded memory: those seen longest ago make room', () => {
    const violations = new Violations(10_000);
    for (const name of ['first', 'second', 'first']) violations.record(name, 0);
    for (let n = 0; n < 1023; n++) violations.record(`other ${n}`, 1);
    expect(violations.countOf('second', 1)).toBe(0);
    expect(violations.countOf('first', 1)).toBe(2);
  });

  test('costs nothing where the bound is 0', () => {
    const violations = new Violations(0);
    for (let n = 0; n < 5; n++) expect(violations.record('one', n).delayMs).toBe(0);
  });
});

describe('a client that breaks the protocol again and again', () => {
  /** Opens `name`, sends bytes that are no request, and waits for the end. Returns how long that took, milliseconds. */
  async function violate({ opened }: TestServer, name = 'disk'): Promise<number> {
    const client = await opened(name);
    const before = performance.now();
    client.send(requestBytes({ type: CMD.READ, magic: 0x5050505 }));
    expect(await client.readToEnd()).toHaveLength(0);
    return performance.now() - before;
  }

  test('waits longer each time for the end of its connection, and is told of with its count', async () => {
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

  test('holds no device, and no other connection, while it waits', async () => {
    const server = await startServer({
      exports: [new TestExport('disk'), new TestExport('other')],
      limits: { maxViolationDelayMs: 60 * MINUTE_MS },
    });
    const neighbour = await server.opened();
    for (let n = 0; n < 3; n++) await violate(server);
    // Eight more would take their time: their connections are left as they are.
    for (let n = 0; n < 8; n++) {
      const client = await server.opened();
      client.send(requestBytes({ type: CMD.READ, magic: 1 }), Buffer.alloc(100_000));
      await until(() => server.closes.length === 4 + n, 'it is told of');
    }
    expect(server.provider.openNow).toBe(1);
    neighbour.request({ type: CMD.READ, offset: 4, length: 4, cookie: 5n });
    expect(await neighbour.readReply(4)).toEqual({ errno: 0, cookie: 5n, data: uint32(5) });
    // The same peer, another export: nobody who has to wait.
    await violate(server, 'other');
    await until(() => server.closes.length === 12, 'it is told of');
    expect(server.closes.at(-1)).toMatchObject({ exportName: 'other', violations: 1 });
    const waiting = Array.from(server.server.connections.values()).filter(({ phase }) => phase === 'closing');
    expect(waiting.length).toBeGreaterThanOrEqual(1);
    neighbour.request({ type: CMD.DISC });
    await neighbour.readToEnd();
    // It does not hold up the end of the server either.
    await server.server.close();
    await server.allOver();
  });

  test('has what was asked before finished and answered', async () => {
    const server = await startServer();
    for (let n = 0; n < 2; n++) {
      let release = (): void => undefined;
      server.provider.hook = () => new Promise((resolve) => (release = resolve));
      const client = await server.opened();
      client.request({ type: CMD.WRITE, offset: n, length: 1, cookie: 1n }, Buffer.of(0x77));
      client.send(requestBytes({ type: CMD.READ, magic: 1 }));
      await until(() => server.provider.unfinished === 1, 'the write is under way');
      release();
      await client.readToEnd();
      await until(() => server.closes.length === n + 1, 'it is told of');
    }
    expect(server.provider.exports.get('disk')?.disk.subarray(0, 2)).toEqual(Buffer.of(0x77, 0x77));
    await server.allOver();
  });

  test('in the handshake is treated alike', async () => {
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

test('who leaves, is idle, or is refused an export breaks nothing', async () => {
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
