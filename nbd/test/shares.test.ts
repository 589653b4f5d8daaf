/** The share of the event loop and of the server's memory that one client may use while others need them. */

import { describe, expect, test } from 'vitest';
import { BufferPool, MemoryAccount, OWN_BYTES, SLAB_BYTES, type Block } from '../src/server/buffer-pool.js';
import { DEFAULT_LIMITS, MIN_MEMORY_BYTES, NbdServer, type ConnectionInfo } from '../src/index.js';
import { LoopShare, LoopUser, UNITS_PER_LOOK, type LoopTask } from '../src/server/loop-share.js';
import { CMD, NBD_ERRNO } from '../src/protocol/wire.js';
import { releaseMemory } from '../src/server/release-memory.js';
import { extendedRequestBytes, RawClient, requestBytes } from './raw-client.js';
import { Gate, TestExport, TestProvider } from './test-device.js';
import { startServer, until } from './test-server.js';

const KIB = 1024;
const MIB = 1024 * KIB;
/** Bytes of receive buffers that connections keep after they were busy. */
const LITTLE = 4 * MIB;

/** Blocks the event loop. */
function work(ms: number): void {
  for (const end = performance.now() + ms; performance.now() < end;);
}

/** A disk that is announced with a larger size than its memory. */
function wideExport(): TestExport {
  const exported = new TestExport('wide', { size: 4096 });
  return Object.assign(Object.create(exported) as TestExport, { geometry: { ...exported.geometry, size: 2 ** 40 } });
}

const disk = new TestExport('disk', { size: 64 * MIB });

async function withMemory(maxMemoryBytes = MIN_MEMORY_BYTES, memoryStallMs = 60_000) {
  const server = await startServer({
    exports: [disk],
    limits: { maxMemoryBytes, memoryStallMs },
  });
  /** Length of the large requests. */
  const room = Math.floor((maxMemoryBytes * 3) / 4 / (32 * MIB));
  return { ...server, room };
}

/** Uses all memory of the server, with unread large and small replies. */
async function exhaust(server: NbdServer, opened: () => Promise<RawClient>): Promise<void> {
  const hoard = async (length: number): Promise<number> => {
    const client = await opened();
    client.socket.pause();
    const before = server.memory.usedBytes;
    client.send(...Array.from({ length: 64 }, () => requestBytes({ type: CMD.READ, length })));
    await until(() => [...server.connections.values()].at(-1)?.requests !== 0, 'its requests are there');
    return server.memory.usedBytes - before;
  };
  while ((await hoard(32 * MIB)) > 0);
  while ((await hoard(64 * KIB)) >= SLAB_BYTES);
}

describe('the event loop', () => {
  test.each(['BLOCK_STATUS', 'TRIM', 'CACHE', 'WRITE_ZEROES'] as const)(
    'hundreds of slow %s that the device answers synchronously leave another client its turns',
    async (command) => {
      const { raw, provider, opened } = await startServer({ exports: [wideExport(), new TestExport('disk')] });
      const greedy = await raw();
      await greedy.openWith('extended', 'wide', ['base:allocation']);
      const other = await opened();
      let done = 0;
      provider.hook = ({ method }) => {
        if (method === 'read') return;
        done++;
        work(2);
      };
      const count = 64;
      greedy.socket.resume();
      greedy.send(
        ...Array.from({ length: count }, (_, i) =>
          extendedRequestBytes({ type: CMD[command], length: 4096, cookie: BigInt(i) }),
        ),
      );
      await until(() => done > 0, 'the greedy one is at it');
      for (let i = 0; i < 20; i++) {
        const before = done;
        other.request({ type: CMD.READ, length: 4 });
        await other.readReply(4);
        // One slice, and requests begun before it; not all of them.
        expect(done - before).toBeLessThan(10);
      }
      expect(done).toBeLessThan(count);
      await until(() => done === count, 'all are answered');
    },
  );

  test('at most the limit of requests in flight is answered synchronously before other clients have their turn', async () => {
    const { opened, provider } = await startServer({ limits: { maxInFlightRequests: 4 } });
    const client = await opened();
    let turns = 0;
    const inTurn: number[] = [0];
    let isOver = false;
    const count = (): void => {
      if (isOver) return;
      turns++;
      inTurn[turns] = 0;
      setImmediate(count);
    };
    setImmediate(count);
    provider.hook = () => void (inTurn[turns] = (inTurn[turns] ?? 0) + 1);
    client.send(...Array.from({ length: 100 }, () => requestBytes({ type: CMD.READ, length: 4 })));
    for (let i = 0; i < 100; i++) await client.readReply(4);
    isOver = true;
    expect(Math.max(...inTurn)).toBeLessThanOrEqual(8);
  });

  test('the connection with the least recent use is served first, and every connection is served in the end', async () => {
    const loop = new LoopShare();
    const served: string[] = [];
    const task = (name: string, used: number): LoopTask => {
      const loopUser = new LoopUser();
      Object.assign(loopUser, { used, period: Math.floor(performance.now() / 100) });
      return { loopUser, serveTurn: () => void served.push(name) };
    };
    for (const [name, used] of [
      ['much', 50],
      ['some', 5],
      ['none', 0],
      ['none too', 0],
    ] as const) {
      loop.enqueue(task(name, used));
    }
    await until(() => served.length === 4, 'all are served');
    expect(served).toEqual(['none', 'none too', 'some', 'much']);
  });

  test('a turn that has lasted too long ends for all connections', async () => {
    const loop = new LoopShare();
    const users = Array.from({ length: 5 }, () => new LoopUser());
    let yielded = 0;
    for (const user of users) {
      if (loop.mustYield(user, UNITS_PER_LOOK)) yielded++;
      else work(2);
      loop.finish(user);
    }
    expect(yielded).toBeGreaterThan(0);
    expect(loop.isSpent).toBe(true);
    await new Promise((resolve) => setImmediate(resolve));
    expect(loop.isSpent).toBe(false);
  });

  test('a block status of sixteen contexts gives other clients turns between two contexts', async () => {
    const contexts = Array.from({ length: 16 }, (_, i) => `x-test:${i}`);
    const { raw, provider, opened } = await startServer({
      exports: [new TestExport('many', { contexts }), new TestExport('disk')],
    });
    const greedy = await raw();
    await greedy.openWith('extended', 'many', contexts);
    const other = await opened();
    let done = 0;
    provider.hook = ({ method }) => {
      if (method !== 'extents') return;
      done++;
      work(5);
    };
    greedy.extendedRequest({ type: CMD.BLOCK_STATUS, length: 8192 });
    await until(() => done > 0, 'it is under way');
    other.request({ type: CMD.READ, length: 4 });
    await other.readReply(4);
    expect(done).toBeLessThan(16);
    expect(await greedy.readChunks()).toHaveLength(16);
  });
});

describe('the memory of a server', () => {
  test('clients that do not read replies get no more than the budget, and small requests of others make progress', async () => {
    const { opened, server, provider, room } = await withMemory();
    const silent = await Promise.all(Array.from({ length: room + 3 }, () => opened()));
    for (const client of silent) {
      client.socket.pause();
      client.request({ type: CMD.READ, length: 32 * MIB });
    }
    await until(() => server.memory.waiting > 0 && provider.calls.length === room, 'there is no memory left');
    const other = await opened();
    for (let i = 0; i < 50; i++) {
      other.request({ type: CMD.READ, length: 4096 });
      expect((await other.readReply(4096)).errno).toBe(0);
      other.request({ type: CMD.WRITE, length: 32 * KIB }, Buffer.alloc(32 * KIB));
      expect((await other.readReply()).errno).toBe(0);
    }
    expect(server.memory.usedBytes).toBeLessThanOrEqual(MIN_MEMORY_BYTES);
    // Clients that read get all their data, and so do waiting ones.
    for (const client of silent) client.socket.resume();
    for (const client of silent) expect((await client.readReply(32 * MIB)).errno).toBe(0);
    await until(() => server.memory.usedBytes < LITTLE, 'all of it is back');
  });

  test('a waiting request holds no memory: half-sent writes do not block each other', async () => {
    const { opened, server, provider, room } = await withMemory();
    const writers = await Promise.all(Array.from({ length: 2 * room + 2 }, () => opened()));
    const data = Buffer.alloc(32 * MIB, 7);
    for (const writer of writers) writer.request({ type: CMD.WRITE, length: data.length }, data.subarray(1));
    await until(() => server.memory.waiting > 0, 'there is no memory left');
    expect(server.memory.usedBytes).toBeLessThanOrEqual(MIN_MEMORY_BYTES);
    expect(provider.calls).toHaveLength(0);
    for (const writer of writers) writer.send(data.subarray(0, 1));
    for (const writer of writers) expect((await writer.readReply()).errno).toBe(0);
    expect(provider.calls).toHaveLength(writers.length);
    await until(() => server.memory.usedBytes < LITTLE, 'all of it is back');
  });

  test('a stalled connection that holds memory is closed when others wait for memory, and only then', async () => {
    const { opened, server, closes, room } = await withMemory(MIN_MEMORY_BYTES, 300);
    const silent = await Promise.all(Array.from({ length: room }, () => opened()));
    for (const client of silent) {
      client.socket.pause();
      client.request({ type: CMD.READ, length: 32 * MIB });
    }
    await until(() => server.memory.usedBytes > room * 32 * MIB, 'they hold all of it');
    const began = performance.now();
    await until(() => performance.now() - began > 1500, 'three times as long as it takes to be closed');
    expect(closes).toHaveLength(0);
    const other = await opened();
    other.request({ type: CMD.READ, length: 32 * MIB });
    expect((await other.readReply(32 * MIB)).errno).toBe(0);
    await until(() => closes.length > 0, 'one is closed');
    expect(closes).toHaveLength(1);
    expect(closes[0]?.reason).toMatch(/others wait for memory, and this client held 33 MiB for 300 ms/);
  });

  test('a client that reads a long reply slowly is not closed', async () => {
    const { opened, closes, server } = await startServer({
      exports: [disk],
      limits: { maxMemoryBytes: MIN_MEMORY_BYTES, stallTimeoutMs: 1200, memoryStallMs: 1200 },
    });
    const slow = await opened();
    slow.socket.pause();
    slow.request({ type: CMD.READ, length: 32 * MIB });
    const stopped = await opened();
    stopped.socket.pause();
    stopped.request({ type: CMD.READ, length: 32 * MIB });
    const waiting = await opened();
    waiting.request({ type: CMD.READ, length: 32 * MIB });
    await until(() => server.memory.waiting === 1 || closes.length > 0, 'one waits');
    const began = performance.now();
    while (performance.now() - began < 4000) {
      // about 2 MB/s
      slow.socket.read(200_000);
      await new Promise((resolve) => setTimeout(resolve, 100));
    }
    expect(closes).toHaveLength(1);
    expect((await waiting.readReply(32 * MIB)).errno).toBe(0);
    slow.socket.resume();
  });

  test('writes of 1 MiB and half-sent longer writes do not wait for each other', async () => {
    const { opened, server, room } = await withMemory();
    const writers = await Promise.all(Array.from({ length: 2 * room + 2 }, () => opened()));
    const data = Buffer.alloc(32 * MIB, 7);
    for (const writer of writers) writer.request({ type: CMD.WRITE, length: data.length }, data.subarray(0, 1));
    await until(() => server.memory.waiting === room + 2, 'there is no memory left');
    const other = await opened();
    for (const length of [128 * KIB, 256 * KIB, MIB]) {
      other.request({ type: CMD.WRITE, length }, Buffer.alloc(length - 1));
      const holder = [...server.connections.values()].at(-1) as ConnectionInfo & { readonly memoryBytes: number };
      await until(() => holder.memoryBytes !== 0, 'it has its memory');
      other.send(Buffer.alloc(1));
      expect((await other.readReply()).errno).toBe(0);
    }
    expect(server.memory.waiting).toBe(room + 2);
    for (const writer of writers) writer.send(data.subarray(1));
    for (const writer of writers) expect((await writer.readReply()).errno).toBe(0);
    await until(() => server.memory.usedBytes < LITTLE, 'all of it is back');
  });

  test('a connection that waits for memory continues to wait when an earlier request is answered', async () => {
    const { opened, raw, server, provider, room } = await withMemory();
    const silent = await Promise.all(Array.from({ length: room }, () => opened()));
    for (const client of silent) {
      client.socket.pause();
      client.request({ type: CMD.READ, length: 32 * MIB });
    }
    await until(() => server.memory.usedBytes > room * 32 * MIB, 'they hold most of it');
    const gate = new Gate();
    provider.hook = ({ method }) => (method === 'extents' ? gate.opened : undefined);
    const client = await raw();
    await client.openWith('structured', 'disk', ['base:allocation']);
    client.request({ type: CMD.READ, length: 512 * KIB, cookie: 1n });
    client.request({ type: CMD.READ, offset: 4 * MIB, length: 32 * MIB, cookie: 2n });
    await until(() => server.memory.waiting === 1, 'the second one waits');
    gate.open();
    expect((await client.readChunks()).at(-1)?.cookie).toBe(1n);
    expect(server.memory.waiting).toBe(1);
    for (const one of silent) one.socket.destroy();
    expect((await client.readChunks()).at(-1)?.cookie).toBe(2n);
    await until(() => server.memory.usedBytes < LITTLE, 'all of it is back');
  });

  test('a connection that waits for a slow device is not closed', async () => {
    const { opened, server, closes, provider, room } = await withMemory(MIN_MEMORY_BYTES, 200);
    const gate = new Gate();
    provider.hook = () => gate.opened;
    const clients = await Promise.all(Array.from({ length: room + 1 }, () => opened()));
    for (const client of clients) client.request({ type: CMD.READ, length: 32 * MIB });
    await until(() => server.memory.waiting === 1, 'one waits');
    const began = performance.now();
    await until(() => performance.now() - began > 1000, 'five times as long as it takes to be closed');
    expect(closes).toHaveLength(0);
    gate.open();
  });

  test('a request that waits for memory is refused when the server shuts down', async () => {
    const { opened, server, room, allOver } = await withMemory();
    const silent = await Promise.all(Array.from({ length: room }, () => opened()));
    for (const client of silent) {
      client.socket.pause();
      client.request({ type: CMD.READ, length: 32 * MIB });
    }
    await until(() => server.memory.usedBytes > room * 32 * MIB, 'there is no memory left');
    const waiting = await opened();
    waiting.request({ type: CMD.READ, length: 32 * MIB });
    await until(() => server.memory.waiting === 1, 'it waits');
    const closed = server.close({ graceMs: 1000 });
    expect((await waiting.readReply()).errno).toBe(NBD_ERRNO.ESHUTDOWN);
    await closed;
    await allOver();
    await until(() => server.memory.usedBytes === 0, 'all of it is back');
  });

  test('a lost connection leaks no memory in any state', async () => {
    const { opened, server, provider, room, allOver } = await withMemory();
    const gate = new Gate();
    provider.hook = ({ offset }) => (offset === 1024 ? gate.opened : undefined);
    const clients = await Promise.all(Array.from({ length: room + 4 }, () => opened()));
    clients.forEach((client, index) => {
      client.socket.pause();
      if (index % 3 === 0) client.request({ type: CMD.READ, length: 32 * MIB });
      if (index % 3 === 1) client.request({ type: CMD.WRITE, length: 32 * MIB }, Buffer.alloc(MIB));
      if (index % 3 === 2) client.request({ type: CMD.READ, offset: 1024, length: 20 * MIB });
    });
    await until(() => server.memory.waiting > 0, 'some wait');
    for (const client of clients) client.socket.destroy();
    gate.open();
    await allOver();
    await until(() => server.memory.usedBytes === 0 && server.memory.waiting === 0, 'all of it is back');
  });

  test('block status, small reads and small writes are answered even if no memory is left', async () => {
    const { opened, raw, server } = await withMemory();
    await exhaust(server, opened);
    const client = await raw();
    await client.openWith('structured', 'disk', ['base:allocation']);
    const batch = 64;
    client.send(
      ...Array.from({ length: batch }, (_, i) => [
        requestBytes({ type: CMD.READ, offset: 4096 * i, length: 4096, cookie: BigInt(3 * i) }),
        requestBytes({ type: CMD.WRITE, length: 4096, cookie: BigInt(3 * i + 1) }),
        Buffer.alloc(4096),
        requestBytes({ type: CMD.BLOCK_STATUS, length: 64 * MIB, cookie: BigInt(3 * i + 2) }),
      ]).flat(),
    );
    for (let i = 0; i < 3 * batch; i++) {
      const [chunk] = await client.readChunks();
      expect(chunk?.type).toBeLessThan(0x8000);
    }
  });

  test('slow writes of a client with only its own block of memory keep their data', async () => {
    const { opened, provider, server } = await withMemory();
    await exhaust(server, opened);
    const gates: Gate[] = [];
    provider.hook = ({ method }) => {
      if (method !== 'write') return;
      const gate = new Gate();
      gates.push(gate);
      return gate.opened;
    };
    const client = await opened();
    const count = 200;
    client.send(
      ...Array.from({ length: count }, (_, i) => [
        requestBytes({ type: CMD.WRITE, offset: 4096 * i, length: 4096, cookie: BigInt(i) }),
        Buffer.alloc(4096, i + 1),
      ]).flat(),
    );
    for (let i = 0; i < count; i++) {
      await until(() => gates.length > 0, 'a write has begun');
      gates.pop()?.open();
      await client.readReply();
    }
    for (let i = 0; i < count; i++) {
      client.request({ type: CMD.READ, offset: 4096 * i, length: 4096 });
      expect((await client.readReply(4096)).data[17]).toBe((i + 1) % 256);
    }
  });

  test('a budget too small for two of the longest requests is refused', () => {
    const provider = new TestProvider([]);
    expect(() => new NbdServer({ provider, limits: { maxMemoryBytes: MIN_MEMORY_BYTES - 1 } })).toThrow(RangeError);
    expect(DEFAULT_LIMITS.maxMemoryBytes).toBeGreaterThanOrEqual(MIN_MEMORY_BYTES);
  });
});

describe('the pool', () => {
  test('grants memory in the order of requests, each when all its memory is free', async () => {
    const pool = new BufferPool(MIN_MEMORY_BYTES);
    const granted: string[] = [];
    const accounts = new Map(
      ['holder', 'large', 'small'].map((name) => [name, new MemoryAccount(() => granted.push(name), 1)]),
    );
    const of = (name: string): MemoryAccount => accounts.get(name) as MemoryAccount;
    const held: Block[] = [];
    while (pool.hasRoom(of('holder'), 16 * MIB)) held.push(pool.takeLarge(of('holder'), 16 * MIB));
    pool.wait(of('large'), 32 * MIB);
    pool.wait(of('small'), 2 * MIB);
    expect(pool.hasRoom(of('holder'), 2 * MIB)).toBe(false);
    pool.give(held.pop() as Block);
    await new Promise((resolve) => setTimeout(resolve, 0));
    expect(granted).toEqual([]);
    pool.give(held.pop() as Block);
    await until(() => granted.length > 0, 'the first one has it');
    expect(granted[0]).toBe('large');
    // Reserved for it, even if others ask.
    expect(pool.hasRoom(of('holder'), 16 * MIB)).toBe(false);
    expect(pool.hasRoom(of('large'), 32 * MIB)).toBe(true);
    pool.endWait(of('large'));
    await until(() => granted.length === 2, 'the other one has it, too');
  });

  test('gives a connection its own block once, and no slab beyond the share of small requests', () => {
    const pool = new BufferPool(MIN_MEMORY_BYTES);
    const account = new MemoryAccount(() => undefined, 1);
    let slabs = 0;
    while (pool.takeSlab(account) !== undefined) slabs++;
    expect(slabs * SLAB_BYTES).toBeLessThanOrEqual(MIN_MEMORY_BYTES / 4);
    expect(pool.hasRoom(account, 32 * MIB)).toBe(true);
    const own = pool.takeOwn(account);
    expect(own?.buffer).toHaveLength(OWN_BYTES);
    expect(pool.takeOwn(account)).toBeUndefined();
    pool.give(own as Block);
    expect(pool.takeOwn(account)).toBeDefined();
  });

  test('frees blocks kept for reuse when new ones are needed, and never exceeds the budget', () => {
    const pool = new BufferPool(MIN_MEMORY_BYTES);
    const account = new MemoryAccount(() => undefined, 1);
    for (let i = 1; i < 200; i++) {
      const block = pool.takeLarge(account, i * 160 * KIB);
      expect(pool.use.usedBytes + pool.use.keptBytes).toBeLessThanOrEqual(MIN_MEMORY_BYTES);
      pool.give(block);
      expect(pool.use.usedBytes + pool.use.keptBytes).toBeLessThanOrEqual(MIN_MEMORY_BYTES);
    }
    const again = pool.takeLarge(account, 199 * 160 * KIB);
    pool.give(again);
    expect(pool.takeLarge(account, 199 * 160 * KIB)).toBe(again);
  });

  test('gives memory back to the system at once', () => {
    const buffer = Buffer.allocUnsafeSlow(64 * MIB);
    const before = process.memoryUsage().arrayBuffers;
    releaseMemory(buffer);
    expect(buffer).toHaveLength(0);
    // A garbage collection in between can only free more.
    expect(before - process.memoryUsage().arrayBuffers).toBeGreaterThan(60 * MIB);
  });

  test('gives blocks unused for a while back to the system', async () => {
    const pool = new BufferPool(MIN_MEMORY_BYTES);
    const account = new MemoryAccount(() => undefined, 1);
    const blocks = [pool.takeLarge(account, 8 * MIB), pool.takeLarge(account, 2 * MIB)];
    for (const block of blocks) pool.give(block);
    expect(pool.use.keptBytes).toBeGreaterThan(10 * MIB);
    await until(() => pool.use.keptBytes === 0, 'nothing is kept');
  });
});
