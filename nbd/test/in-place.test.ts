/** Receiving into reused memory: data that a slow device still uses must not be overwritten. */
import { Duplex } from 'node:stream';
import { expect, test } from 'vitest';
import { BufferPool } from '../src/server/buffer-pool.js';
import { DEFAULT_LIMITS } from '../src/index.js';
import { GuardedObserver } from '../src/server/guarded-observer.js';
import { LoopShare } from '../src/server/loop-share.js';
import { CMD } from '../src/protocol/wire.js';
import { ClientSignal } from '../src/server/client-signal.js';
import { OverdueRequests } from '../src/server/overdue-requests.js';
import { Transmission } from '../src/server/transmission.js';
import { requestBytes } from './raw-client.js';
import { DISK_SIZE, Gate, TestExport, TestProvider } from './test-device.js';
import { startServer, until } from './test-server.js';

const ROUNDS = 12;
/** A client that sends nothing for so long is quiet at two looks (src/server/receive-memory.ts), milliseconds. */
const QUIET_MS = 2_100;
const PEER = { transport: 'internal', address: 'test' } as const;

/** Ranges that cover `size` bytes: small ones, several in one receive, and large ones in pieces. */
function ranges(size: number, random: () => number): { offset: number; length: number }[] {
  const found: { offset: number; length: number }[] = [];
  for (let at = 0; at < size;) {
    const most = [64, 4096, 20_000, 70_000, 200_000][Math.floor(random() * 5)] ?? 64;
    const length = Math.min(size - at, 1 + Math.floor(random() * most));
    found.push({ offset: at, length });
    at += length;
  }
  return found;
}

function generator(seed: number): () => number {
  let state = seed;
  return () => (state = (state * 48271) % 2147483647) / 2147483647;
}

test('writes of all sizes that finish late and in any order have the data that was sent', async () => {
  const exported = new TestExport('disk');
  const { provider, client, allOver } = await startServer({ exports: [exported] });
  const random = generator(20101);
  provider.hook = ({ method }) => {
    const turns = Math.floor(random() * 6);
    if (method !== 'write' || turns === 0) return undefined;
    return (async () => {
      for (let n = 0; n < turns; n++) await new Promise((resolve) => setImmediate(resolve));
    })();
  };
  const connection = await client();
  for (let round = 0; round < ROUNDS; round++) {
    const wanted = Buffer.alloc(DISK_SIZE);
    for (let at = 0; at < DISK_SIZE; at += 4) wanted.writeUInt32LE((at * 2654435761 + round * 97) >>> 0, at);
    const parts = ranges(DISK_SIZE, random);
    await Promise.all(
      parts.map(({ offset, length }) => connection.write(offset, wanted.subarray(offset, offset + length))),
    );
    expect(exported.disk.equals(wanted), `round ${round}`).toBe(true);
  }
  await connection.disconnect();
  await allOver();
});

test('a slow write keeps its data while thousands follow it', async () => {
  const exported = new TestExport('disk');
  const { provider, client } = await startServer({ exports: [exported] });
  const gate = new Gate();
  provider.hook = ({ method, offset }) => (method === 'write' && offset === 0 ? gate.opened : undefined);
  const connection = await client();
  const first = Buffer.alloc(512, 0xaa);
  const slow = connection.write(0, first);
  const other = Buffer.alloc(4096, 0xbb);
  for (let n = 0; n < 40; n++) {
    await Promise.all(Array.from({ length: 64 }, (_, at) => connection.write(4096 * (1 + at), other)));
  }
  gate.open();
  await slow;
  expect(exported.disk.subarray(0, 512).equals(first)).toBe(true);
  await connection.disconnect();
});

test('late writes of a client that writes in bursts keep their data while its block is taken away and given again', async () => {
  const exported = new TestExport('disk');
  const { provider, client } = await startServer({ exports: [exported] });
  const connection = await client();
  const wanted = Buffer.alloc(120 * 4096);
  const writes: Promise<void>[] = [];
  const gates: Gate[] = [];
  for (const burst of [0, 1, 2]) {
    const gate = new Gate();
    gates.push(gate);
    provider.hook = ({ method }) => (method === 'write' ? gate.opened : undefined);
    const begun = provider.calls.length;
    for (let n = 0; n < 40; n++) {
      const offset = (burst * 40 + n) * 4096;
      wanted.fill(1 + burst * 40 + n, offset, offset + 4096);
      writes.push(connection.write(offset, wanted.subarray(offset, offset + 4096)));
    }
    await until(() => provider.calls.length >= begun + 40, 'the writes have reached the device');
    await connection.read(0, 512);
    await new Promise((resolve) => setTimeout(resolve, QUIET_MS));
  }
  for (const gate of gates) gate.open();
  await Promise.all(writes);
  expect(exported.disk.subarray(0, wanted.length).equals(wanted)).toBe(true);
  await connection.disconnect();
});

test('a client lost within a large write does not damage the memory of other connections', async () => {
  const exported = new TestExport('disk');
  const { server, opened, client } = await startServer({ exports: [exported] });
  const connection = await client();
  const wanted = Buffer.alloc(300_000, 0xcc);
  for (let n = 0; n < 10; n++) {
    const raw = await opened();
    raw.send(requestBytes({ type: 1, offset: 0, length: 300_000 }), Buffer.alloc(150_000, 0xdd));
    await connection.write(0, wanted);
    raw.vanish();
    await connection.write(300_000, wanted);
    expect(exported.disk.subarray(0, 600_000).every((byte) => byte === 0xcc)).toBe(true);
  }
  await until(() => server.connections.size === 1, 'the others are over');
  await connection.disconnect();
});

test('input that waits for its turn within a payload is not overwritten by later input', async () => {
  const { disk, transmission, loop } = await transmissionOf(new TestExport('disk'));
  const wanted = Buffer.alloc(600_000);
  for (let at = 0; at < wanted.length; at += 4) wanted.writeUInt32LE(at, at);
  const sent = Buffer.concat([requestBytes({ type: CMD.WRITE, offset: 0, length: wanted.length }), wanted]);
  for (let at = 0, n = 0; at < sent.length; n++) {
    // The socket asks for this buffer right after the last piece, before any other turn of the loop.
    const into = transmission.nextBuffer();
    await new Promise((resolve) => setImmediate(resolve));
    const length = sent.copy(into, 0, at, Math.min(at + 20_000, sent.length));
    loop.isSpent = n % 3 !== 2;
    transmission.received(length);
    at += length;
  }
  while (transmission.requests === 0 || transmission.isMidRequest)
    await new Promise((resolve) => setImmediate(resolve));
  expect(disk.subarray(0, wanted.length).equals(wanted)).toBe(true);
});

async function transmissionOf(exported: TestExport) {
  const loop = new LoopShare();
  const socket = new Duplex({ read: () => undefined, write: (_chunk, _encoding, done) => done() });
  const host = {
    ...{ id: 1, peer: PEER, exportName: 'disk', socket, loop, observer: GuardedObserver.of(), limits: DEFAULT_LIMITS },
    clientSignal: new ClientSignal(),
    overdue: new OverdueRequests(0),
    exportKey: 'disk',
    pool: new BufferPool(2 ** 28),
    receiveElsewhere: () => undefined,
    disconnectRequested: () => undefined,
    protocolViolated: (reason: string) => expect.fail(reason),
    disconnect: (reason: string) => expect.fail(reason),
  };
  const provider = new TestProvider([exported]);
  const { device } = await provider.open('disk', PEER);
  const negotiated = { fixedNewstyle: true, noZeroes: true, structuredReplies: false, extendedHeaders: false };
  const transmission = new Transmission(host, device, {
    geometry: exported.geometry,
    negotiated: { ...negotiated, metaContexts: [], tls: false },
  });
  return { disk: exported.disk, transmission, loop };
}
