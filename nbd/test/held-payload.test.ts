/** A payload that arrives when the turn of the loop is used up: its bytes wait, and later input is queued behind them. */
import { PassThrough } from 'node:stream';
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
import { TestExport, TestProvider } from './test-device.js';
import { startServer } from './test-server.js';

const PEER = { transport: 'internal', address: 'test' } as const;

const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve));

test('a payload that has to wait in the middle is written as it was sent', async () => {
  const exported = new TestExport('disk');
  const { device } = await new TestProvider([exported]).open('disk', PEER);
  const loop = new LoopShare();
  const transmission = new Transmission(
    {
      ...{
        id: 1,
        peer: PEER,
        exportName: 'disk',
        socket: new PassThrough(),
        pool: new BufferPool(DEFAULT_LIMITS.maxMemoryBytes),
      },
      ...{
        loop,
        limits: DEFAULT_LIMITS,
        observer: GuardedObserver.of(),
        clientSignal: new ClientSignal(),
        overdue: new OverdueRequests(0),
        exportKey: 'disk',
      },
      receiveElsewhere: () => undefined,
      disconnectRequested: () => undefined,
      protocolViolated: (reason) => expect.unreachable(reason),
      disconnect: (reason) => expect.unreachable(reason),
    },
    device,
    {
      geometry: exported.geometry,
      negotiated: { structuredReplies: false, extendedHeaders: false, noZeroes: true, metaContexts: [] } as never,
    },
  );
  const wanted = Buffer.from(Array.from({ length: 200_000 }, (_, i) => (i * 7 + (i >> 8)) & 0xff));
  const sent = Buffer.concat([requestBytes({ type: CMD.WRITE, length: wanted.length }), wanted]);
  let at = 0;
  let into = transmission.nextBuffer();
  const come = (most: number): void => {
    const length = sent.copy(into, 0, at, at + Math.min(most, into.length));
    at += length;
    transmission.received(length);
    into = transmission.nextBuffer();
  };
  // As earlier sockets in this turn would leave it.
  loop.isSpent = true;
  come(28);
  await turn();
  await turn();
  expect(transmission.isMidRequest).toBe(true);
  while (at < sent.length) {
    loop.isSpent = true;
    come(30_000);
    await turn();
    await turn();
  }
  expect(transmission.isMidRequest).toBe(false);
  expect(exported.disk.subarray(0, wanted.length).equals(wanted)).toBe(true);
});

test('the data of many clients that together use up the turn are written as they were sent', async () => {
  const CLIENTS = 16;
  const SIZE = 256 * 1024;
  const exported = new TestExport('disk', { size: CLIENTS * SIZE });
  const { provider, opened } = await startServer({ exports: [exported] });
  provider.hook = ({ method }) => {
    if (method === 'write') for (const end = performance.now() + 0.7; performance.now() < end;);
  };
  const clients = await Promise.all(Array.from({ length: CLIENTS }, () => opened()));
  for (let round = 0; round < 10; round++) {
    const wanted = Buffer.alloc(CLIENTS * SIZE);
    for (let at = 0; at < wanted.length; at += 4) wanted.writeUInt32LE((at * 2654435761 + round * 97) >>> 0, at);
    clients.forEach((client, i) => {
      const offset = i * SIZE;
      client.send(requestBytes({ type: CMD.WRITE, offset, length: SIZE }), wanted.subarray(offset, offset + SIZE));
    });
    for (const client of clients) expect((await client.readReply(0)).errno).toBe(0);
    expect(exported.disk.equals(wanted), `round ${round}`).toBe(true);
  }
});
