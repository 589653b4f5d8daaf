/**
 * A server that accepts connections in this thread and lets worker threads serve them, each with its own loop. Admission,
 * limits and shutdown stay with the server.
 */

import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { Worker } from 'node:worker_threads';
import { expect, onTestFinished, test } from 'vitest';
import {
  MIN_MEMORY_BYTES,
  NbdClient,
  NbdServer,
  type AcceptedConnection,
  type ConnectionInfo,
  type Limits,
  type MemoryUse,
  type Peer,
  type ServedConnection,
  type ServingLoop,
} from '../src/index.js';
import { OPT } from '../src/protocol/wire.js';
import { duplicate } from './duplicate.js';
import { RawClient } from './raw-client.js';
import { TestProvider } from './test-device.js';
import { temporaryDirectory, until } from './test-server.js';

interface Told {
  readonly id?: number;
  readonly what?: 'advanced' | 'settled' | 'leaving' | 'left' | 'over';
  readonly exportName?: string;
  readonly memory?: MemoryUse;
  readonly flushing?: boolean;
}

/** A connection that a worker serves: its state as known here, and messages to it. */
class RemoteConnection implements ServedConnection {
  readonly id: number;
  readonly peer: Peer;
  exportName: string | undefined = undefined;
  phase: ConnectionInfo['phase'] = 'handshake';
  readonly hasEnded = false;
  readonly openedAt = Date.now();
  readonly bytesRead = 0;
  readonly bytesWritten = 0;
  readonly requests = 0;
  readonly errors = 0;
  readonly inFlight = 0;
  readonly transport = undefined;
  readonly over: Promise<void>;
  end: () => void = () => undefined;

  constructor(
    private readonly loop: WorkerLoop,
    readonly accepted: AcceptedConnection,
  ) {
    this.id = accepted.id;
    this.peer = accepted.peer;
    this.over = new Promise((resolve) => (this.end = resolve));
  }

  get isWaitedFor(): boolean {
    return this.phase !== 'transmission';
  }

  crowdOut(reason: string): void {
    this.abort(reason);
  }

  shutdown(options: { readonly refuse: boolean }): void {
    this.loop.worker.postMessage({ id: this.id, shutdown: options });
  }

  abort(reason: string): void {
    this.loop.worker.postMessage({ id: this.id, abort: reason });
  }

  disconnect(reason: string): void {
    this.loop.worker.postMessage({ id: this.id, disconnect: reason });
  }

  handOver(): never {
    throw new Error('not in this test');
  }
}

class WorkerLoop implements ServingLoop {
  readonly worker: Worker;
  readonly connections = new Map<number, RemoteConnection>();
  memory: MemoryUse = { usedBytes: 0, maxBytes: 0, keptBytes: 0, waiting: 0 };
  flushes = 0;

  constructor(limits: Partial<Limits> = {}) {
    this.worker = new Worker(fileURLToPath(new URL('serving-worker.mjs', import.meta.url)), { workerData: limits });
    onTestFinished(() => void this.worker.terminate());
    this.worker.on('error', () => undefined);
    // The connections of a worker end with it.
    this.worker.on('exit', () => {
      for (const connection of this.connections.values()) connection.end();
    });
    this.worker.on('message', ({ id, what, memory, flushing, exportName }: Told) => {
      if (memory !== undefined) this.memory = memory;
      if (flushing === true) this.flushes++;
      const connection = this.connections.get(id ?? NaN);
      if (connection === undefined) return;
      if (exportName !== undefined) connection.exportName = exportName;
      if (what === 'over') {
        this.connections.delete(connection.id);
        connection.end();
        return;
      }
      if (what === undefined) return;
      if (what === 'settled') connection.phase = 'transmission';
      if (what === 'leaving') connection.phase = 'closing';
      connection.accepted.progress[what]?.();
    });
  }

  shareMemory(bytes: number): void {
    this.worker.postMessage({ memory: bytes });
  }

  serve(accepted: AcceptedConnection): RemoteConnection {
    const connection = new RemoteConnection(this, accepted);
    this.connections.set(accepted.id, connection);
    const { id, peer, offender, state } = accepted;
    this.worker.postMessage({ serve: { id, fd: duplicate(accepted.socket), peer, offender, state } });
    accepted.socket.destroy();
    return connection;
  }

  stop(): void {
    this.worker.postMessage({ stop: true });
  }
}

async function serverWith(loops: readonly WorkerLoop[], limits: Partial<Limits> = {}) {
  const path = join(await temporaryDirectory(), 'nbd.sock');
  const server = new NbdServer({ provider: new TestProvider([]), limits, loops });
  onTestFinished(() => server.destroy());
  await server.listen({ path });
  const connect = async (): Promise<NbdClient> => {
    const client = await NbdClient.connect({ path });
    onTestFinished(() => client.destroy());
    return client;
  };
  return { server, connect, raw: () => RawClient.connect({ path }) };
}

test('worker threads serve connections from the greeting on, the worker with the fewest connections first', async () => {
  const loops = [new WorkerLoop(), new WorkerLoop()];
  const { server, connect } = await serverWith(loops);
  const clients = [await connect(), await connect(), await connect(), await connect()];
  const threads: (string | undefined)[] = [];
  for (const client of clients) threads.push((await client.go('disk')).description);
  expect(new Set(threads)).toEqual(new Set(loops.map(({ worker }) => `thread ${worker.threadId}`)));
  expect(loops.map(({ connections }) => connections.size)).toEqual([2, 2]);
  expect(server.connections.size).toBe(4);
  for (const [n, client] of clients.entries()) {
    const data = Buffer.alloc(300_000, n + 1);
    await client.write(5, data);
    expect((await client.read(5, data.length)).equals(data)).toBe(true);
    await client.disconnect();
  }
  await until(() => server.connections.size === 0, 'all are over');
});

test('the memory of the server is divided among its loops, and too little memory for all loops is refused', async () => {
  const loops = [new WorkerLoop(), new WorkerLoop()];
  const { server } = await serverWith(loops, { maxMemoryBytes: 6 * MIN_MEMORY_BYTES });
  await until(() => loops.every(({ memory }) => memory.maxBytes === 2 * MIN_MEMORY_BYTES), 'each has its part');
  expect(server.memory.maxBytes).toBe(6 * MIN_MEMORY_BYTES);
  const tooLittle = { maxMemoryBytes: 2 * MIN_MEMORY_BYTES };
  expect(() => new NbdServer({ provider: new TestProvider([]), limits: tooLittle, loops })).toThrow(RangeError);
});

test('the limits of connections also apply to those that workers serve', async () => {
  const loops = [new WorkerLoop(), new WorkerLoop()];
  const { server, connect, raw } = await serverWith(loops, {
    maxConnections: 4,
    maxConnectionsPerPeer: 4,
    maxHandshakes: 2,
  });
  const quiet = await raw();
  await quiet.greet();
  const asking = await raw();
  await asking.greet();
  await asking.option(OPT.LIST);
  // With a third one in the handshake the one that was silent for longest is closed.
  const third = await connect();
  await quiet.readToEnd();
  const served = (): number => [...server.connections.values()].filter(({ phase }) => phase === 'transmission').length;
  await third.go('disk');
  await until(() => served() === 1, 'it counts as served');
  await (await connect()).go('disk');
  await until(() => served() === 2, 'so does this one');
  expect(asking.isOver).toBe(false);
});

test('close() waits for the requests in flight of all loops, and closes no connection before its grace time', async () => {
  const loop = new WorkerLoop();
  const { server, connect } = await serverWith([loop]);
  const client = await connect();
  await client.go('disk');
  const flushed = client.flush();
  await until(() => loop.flushes === 1, 'the flush has begun');
  let isClosed = false;
  const closed = server.close().then(() => (isClosed = true));
  // The worker learns of it a little later.
  let refused: unknown;
  while (refused === undefined) {
    await client.write(0, Buffer.alloc(1)).catch((error: unknown) => (refused = (error as { code: unknown }).code));
  }
  expect(refused).toBe('ESHUTDOWN');
  expect(isClosed).toBe(false);
  loop.worker.postMessage({ finishFlush: true });
  await flushed;
  await closed;
  expect(server.connections.size).toBe(0);
});

test('a device of a worker that never answers: the place of a client that is gone is released', async () => {
  const loop = new WorkerLoop({ requestTimeoutMs: 50, lingerMs: 20 });
  const { server, connect } = await serverWith([loop], { maxConnections: 1, maxConnectionsPerPeer: 1 });
  const client = await connect();
  await client.go('disk');
  await expect(client.flush()).rejects.toMatchObject({ code: 'EIO' });
  client.destroy();
  let next: NbdClient | undefined;
  while (next === undefined) next = await connect().catch(() => undefined);
  await next.go('disk');
  expect(server.connections.size).toBe(2);
  const { unfinished } = await server.close({ graceMs: 10 });
  expect(unfinished).toHaveLength(1);
  loop.worker.postMessage({ finishFlush: true });
  await until(() => server.connections.size === 0, 'it is over');
});

test('closeExport() and drain() count connections that workers serve', async () => {
  const { server, connect } = await serverWith([new WorkerLoop(), new WorkerLoop()]);
  const clients = [await connect(), await connect()];
  for (const client of clients) await client.go('disk');
  await until(() => [...server.connections.values()].every(({ exportName }) => exportName === 'disk'), 'it is known');
  expect(await server.closeExport('disk', 'it is deleted')).toBe(2);
  const last = await connect();
  await last.go('disk');
  const drained = server.drain();
  await expect(connect()).rejects.toThrow();
  expect(await last.read(0, 512)).toHaveLength(512);
  await last.disconnect();
  expect(await drained).toEqual({ unfinished: [] });
});

test('the end of a worker ends its connections only', async () => {
  const loops = [new WorkerLoop(), new WorkerLoop()];
  const { server, connect } = await serverWith(loops);
  const clients = [await connect(), await connect()];
  for (const client of clients) await client.go('disk');
  await loops[0]?.worker.terminate();
  await until(() => server.connections.size === 1, 'its connection is over');
  const answers = await Promise.allSettled(clients.map((client) => client.read(0, 512)));
  expect(answers.map(({ status }) => status).sort()).toEqual(['fulfilled', 'rejected']);
});
