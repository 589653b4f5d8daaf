/** Admission of connections with many silent clients: which are admitted, refused, or closed to make room. */

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
import { LoopSlice } from '../src/loop-slices.js';
import { CMD, GREETING_SIZE, OPT, REP } from '../src/protocol/wire.js';
import { duplexPair } from './duplex-pair.js';
import { infoQuery, optionBytes, RawClient, uint32 } from './raw-client.js';
import { Gate, TestExport, TestProvider } from './test-device.js';
import { temporaryDirectory, until } from './test-server.js';

const UNKNOWN_OPTION = 99;

interface Crowd {
  readonly server: NbdServer;
  readonly provider: TestProvider;
  readonly closes: ConnectionCloseEvent[];
  readonly refusals: ConnectionRefusedEvent[];
  /** A connection of this user that has read the greeting and sent nothing. */
  comes(uid: number): Promise<RawClient>;
  overTcp(): Promise<RawClient>;
}

async function crowd(limits: Partial<Limits>): Promise<Crowd> {
  let uid = 0;
  const provider = new TestProvider([new TestExport('disk')]);
  const closes: ConnectionCloseEvent[] = [];
  const refusals: ConnectionRefusedEvent[] = [];
  const server = new NbdServer({
    provider,
    limits,
    peerCredentials: (): PeerCredentials => ({ pid: 1, uid, gid: uid }),
    observer: {
      onConnectionClose: (event) => closes.push(event),
      onConnectionRefused: (event) => refusals.push(event),
    },
  });
  onTestFinished(() => server.destroy());
  const path = join(await temporaryDirectory(), 'nbd.sock');
  await server.listen({ path });
  const tcp = await server.listen({ host: '127.0.0.1', port: 0 });
  if (tcp.transport !== 'tcp') throw new Error('not a TCP address');
  return {
    ...{ server, provider, closes, refusals },
    comes: async (as) => {
      uid = as;
      // Half-open: the client does not close its side when the server does.
      const client = new RawClient(net.connect({ path, allowHalfOpen: true }));
      // The server accepts it before the next one connects as another user.
      await until(() => client.available > 0 || client.isOver, 'it is greeted or closed');
      return client;
    },
    overTcp: async () => {
      const client = await RawClient.connect({ host: '127.0.0.1', port: tcp.port });
      await until(() => client.available > 0 || client.isOver, 'it is greeted or closed');
      return client;
    },
  };
}

/** Blocks the event loop for so many milliseconds. */
function work(ms: number): void {
  const end = performance.now() + ms;
  while (performance.now() < end);
}

async function isServed(client: RawClient): Promise<void> {
  client.request({ type: CMD.READ, offset: 8, length: 4 });
  expect((await client.readReply(4)).data).toEqual(uint32(9));
}

async function wasTurnedAway(client: RawClient): Promise<void> {
  expect(await client.readToEnd()).toHaveLength(0);
}

describe('connections without an export', () => {
  test('make room for a new client: the one that was silent for longest is closed', async () => {
    const { comes, closes, server } = await crowd({ maxConnections: 4, maxConnectionsPerPeer: 4 });
    const quiet = await comes(7);
    const talks = await comes(7);
    await comes(7);
    await comes(7);
    await talks.greet();
    await talks.option(UNKNOWN_OPTION);
    const visitor = await comes(8);
    expect(await quiet.readToEnd()).toHaveLength(GREETING_SIZE);
    await visitor.open('disk');
    await isServed(visitor);
    // Of the remaining three, the connection that has sent something is closed last.
    for (let i = 0; i < 2; i++) await (await comes(8)).open('disk');
    expect((await talks.option(OPT.GO, infoQuery('disk'))).at(-1)?.type).toBe(REP.ACK);
    await isServed(talks);
    await until(() => closes.length === 3, 'three have made room');
    expect(closes).toMatchObject(
      Array(3).fill({ isCrowdedOut: true, reason: expect.stringContaining('made room') as unknown }),
    );
    expect(server.connections.size).toBe(4);
  });

  test('have a lower limit than connections, and a peer with many of them loses one before a peer with few', async () => {
    const { comes, closes } = await crowd({ maxHandshakes: 3 });
    const few = await comes(8);
    const many = [await comes(7), await comes(7)];
    await comes(9);
    expect(await many[0]?.readToEnd()).toHaveLength(GREETING_SIZE);
    await few.open('disk');
    await isServed(few);
    await until(() => closes.length === 1, 'one has made room');
    expect(closes[0]).toMatchObject({ peer: { credentials: { uid: 7 } } });
  });

  test('are not closed to make room while the server works for them', async () => {
    const { comes, closes, provider } = await crowd({ maxHandshakes: 1 });
    const gate = new Gate();
    let isOpening = false;
    provider.openHook = () => {
      isOpening = true;
      return gate.opened;
    };
    const waiting = await comes(7);
    await waiting.greet();
    waiting.send(optionBytes(OPT.GO, infoQuery('disk')));
    await until(() => isOpening, 'its export is being opened');
    await comes(7);
    await comes(7);
    await until(() => closes.length === 1, 'the quiet one has made room');
    gate.open();
    while ((await waiting.readOptionReply()).type !== REP.ACK);
    await isServed(waiting);
  });

  test('of a peer at its limit make room only for that peer', async () => {
    const { comes, refusals, closes } = await crowd({ maxConnectionsPerPeer: 2 });
    const others = await comes(8);
    await (await comes(7)).open('disk');
    const own = await comes(7);
    await (await comes(7)).open('disk');
    expect(await own.readToEnd()).toHaveLength(GREETING_SIZE);
    await wasTurnedAway(await comes(7));
    expect(refusals).toMatchObject([{ peer: { credentials: { uid: 7 } } }]);
    expect(closes).toHaveLength(1);
    await others.open('disk');
  });
});

describe('connections with an export', () => {
  test('are never closed to make room', async () => {
    const { comes, refusals } = await crowd({ maxConnections: 3 });
    const clients = [await comes(7), await comes(7), await comes(8)];
    for (const client of clients) await client.open('disk');
    await wasTurnedAway(await comes(9));
    for (const client of clients) await isServed(client);
    expect(refusals.map(({ reason }) => reason)).toEqual(['3 connections are open, as many as allowed']);
  });

  test('of one peer are by default limited to three quarters of all', async () => {
    const { comes, refusals } = await crowd({ maxConnections: 8 });
    for (let i = 0; i < 6; i++) await (await comes(7)).open('disk');
    await wasTurnedAway(await comes(7));
    for (let i = 0; i < 2; i++) await (await comes(8)).open('disk');
    expect(refusals).toMatchObject([{ reason: '6 connections of this peer are open, as many as allowed' }]);
  });

  test('over TCP leave an eighth of the connections for unix sockets', async () => {
    const { comes, overTcp, refusals } = await crowd({ maxConnections: 8, maxConnectionsPerPeer: 8 });
    for (let i = 0; i < 7; i++) await (await overTcp()).open('disk');
    await wasTurnedAway(await overTcp());
    expect(refusals).toMatchObject([
      { reason: expect.stringMatching(/^7 TCP connections are open.* 1 more/) as unknown },
    ]);
    const local = await comes(7);
    await local.open('disk');
    await isServed(local);
  });

  test('leave room for other peers also while they end slowly', async () => {
    const { server, provider, refusals, comes } = await crowd({ maxConnections: 8 });
    const gate = new Gate();
    provider.hook = () => gate.opened;
    const comesAndGoes = async (): Promise<void> => {
      const client = await comes(1);
      if (client.isOver) return;
      await client.open('disk');
      client.request({ type: CMD.READ, length: 4 });
      client.halfClose();
      await until(
        () => [...server.connections.values()].every(({ phase, inFlight }) => phase === 'closing' && inFlight === 1),
        'it has gone, and is not answered yet',
      );
    };
    for (let i = 0; i < 8; i++) await comesAndGoes();
    await (await comes(2)).open('disk');
    expect(server.connections.size).toBe(7);
    expect(refusals).toHaveLength(2);
    gate.open();
  });

  test('of a peer that have said goodbye count up to its limit again, and are closed if room is needed', async () => {
    const { comes, closes, provider, refusals } = await crowd({ maxConnections: 3, maxConnectionsPerPeer: 1 });
    const gate = new Gate();
    provider.hook = () => gate.opened;
    const leaving: RawClient[] = [];
    for (let i = 1; i <= 2; i++) {
      const one = await comes(7);
      leaving.push(one);
      await one.open('disk');
      one.request({ type: CMD.READ, length: 4 });
      one.request({ type: CMD.DISC });
      await until(() => provider.unfinished === i, 'it asks and leaves');
    }
    await wasTurnedAway(await comes(7));
    expect(refusals).toMatchObject([
      { reason: expect.stringMatching(/^2 connections of this peer that are leaving/) as unknown },
    ]);
    gate.open();
    for (const one of leaving) {
      await one.readReply(4);
      // The server has closed its side; the client never does.
      expect(await one.readToEnd()).toHaveLength(0);
    }
    for (let i = 0; i < 2; i++) {
      const next = await comes(7);
      await next.open('disk');
      await isServed(next);
      next.request({ type: CMD.DISC });
      await next.readToEnd();
    }
    await until(() => closes.length > 0, 'one is over');
    expect(closes[0]).toMatchObject({ exportName: 'disk', reason: 'the client disconnected', isCrowdedOut: true });
  });
});

test('the limits of listeners do not refuse connections that are handed over', async () => {
  const { comes, server } = await crowd({ maxConnections: 1 });
  await (await comes(7)).open('disk');
  const pair = duplexPair();
  expect(server.serveConnection(pair.server)).toBeTypeOf('number');
  const handed = new RawClient(pair.client);
  await handed.open('disk');
  await isServed(handed);
});

test('many options in one send leave turns of the event loop to other clients', async () => {
  const { comes, provider } = await crowd({});
  const describeExport = provider.describe.bind(provider);
  provider.describe = (...of) => {
    work(2);
    return describeExport(...of);
  };
  const sender = await comes(7);
  await sender.greet();
  const visitor = await comes(8);
  await visitor.open('disk');
  const count = 40;
  sender.send(...Array.from({ length: count }, () => optionBytes(OPT.INFO, infoQuery('disk'))));
  const options = { areAnswered: false };
  const answered = (async () => {
    for (let left = count; left > 0;) if ((await sender.readOptionReply()).type === REP.ACK) left--;
    options.areAnswered = true;
  })();
  let turns = 0;
  for (; !options.areAnswered; turns++) await isServed(visitor);
  await answered;
  // All forty arrive together: without turns for others it would be one or two.
  expect(turns).toBeGreaterThan(count / 4);
});

test('slices of work run in the order of arrival, with turns for others in between', async () => {
  const order: string[] = [];
  const worker = async (name: string): Promise<void> => {
    const slice = new LoopSlice();
    for (let step = 0; step < 3; step++) {
      work(1.5);
      order.push(name);
      if (slice.isOver) await slice.next();
    }
  };
  let turns = 0;
  let isDone = false;
  const count = (): void => {
    turns++;
    if (!isDone) setImmediate(count);
  };
  setImmediate(count);
  await Promise.all([worker('a'), worker('b'), worker('c')]);
  isDone = true;
  expect(order.join('')).toBe('abcabcabc');
  expect(turns).toBeGreaterThanOrEqual(5);
});
