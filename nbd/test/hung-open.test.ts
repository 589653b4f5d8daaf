/** An `open`, `describe`, `list` or `close` of the program that never settles: connections end all the same, and nothing piles up. */

import { join } from 'node:path';
import { describe, expect, onTestFinished, test } from 'vitest';
import { createServer, NbdClient } from '../src/index.js';
import { MAX_LEFTOVERS_PER_EXPORT } from '../src/server/leftovers.js';
import { OPT, REP } from '../src/protocol/wire.js';
import { infoQuery, optionBytes, type RawClient } from './raw-client.js';
import { stuckServer, type StuckServer } from './stuck-device.js';
import { temporaryDirectory, until } from './test-server.js';

async function goOn({ raw, provider }: StuckServer, name: string): Promise<RawClient> {
  const before = provider.opens.length;
  const client = await raw();
  await client.greet();
  client.send(optionBytes(OPT.GO, infoQuery(name)));
  await until(() => provider.opens.length > before, 'it opens');
  return client;
}

describe('an open that never settles', () => {
  test('ends its connection when its time is up: it is over, though the provider still works', async () => {
    const stuck = await stuckServer({ limits: { openTimeoutMs: 30 } });
    const client = await goOn(stuck, 'stuck');
    await client.readToEnd();
    await until(() => stuck.server.connections.size === 0, 'it is over');
    const reason = 'the server has not opened the export "stuck" within 30 ms';
    expect(stuck.closes.map((event) => event.reason)).toEqual([reason]);
    expect(stuck.provider.opens[0]?.signal).toMatchObject({
      aborted: true,
      reason: { name: 'AbortError', message: reason },
    });
    // The provider still works for this peer: it is told later.
    expect(stuck.provider.gone).toEqual([]);
  });

  test('and then gives a device: it is closed at once, as lost, and once; then the provider is told that the peer left', async () => {
    const stuck = await stuckServer({ limits: { openTimeoutMs: 30 } });
    await goOn(stuck, 'stuck');
    await until(() => stuck.server.connections.size === 0, 'it is over');
    let goneWhenClosed: number | undefined;
    stuck.provider.closing = () => void (goneWhenClosed = stuck.provider.gone.length);
    stuck.provider.opens[0]?.answer();
    await until(() => stuck.provider.gone.length === 1, 'the provider is told');
    expect({ endings: stuck.provider.endings, goneWhenClosed }).toEqual({ endings: ['lost'], goneWhenClosed: 0 });
  });

  test('and then fails: the error is reported, unless it obeys the signal', async () => {
    const stuck = await stuckServer({ limits: { openTimeoutMs: 30 } });
    await goOn(stuck, 'stuck 1');
    await goOn(stuck, 'stuck 2');
    await until(() => stuck.server.connections.size === 0, 'both are over');
    stuck.errors.length = 0;
    stuck.provider.opens[0]?.fail(stuck.provider.opens[0].signal.reason);
    const late = new Error('too late');
    stuck.provider.opens[1]?.fail(late);
    await until(() => stuck.provider.gone.length === 2, 'both have settled');
    expect(stuck.errors).toEqual([late]);
  });

  test('of a client that is gone ends at that time, too', async () => {
    const stuck = await stuckServer({ limits: { openTimeoutMs: 200, lingerMs: 20 } });
    const client = await goOn(stuck, 'stuck');
    client.vanish();
    await until(() => stuck.provider.opens[0]?.signal.aborted === true, 'it is told');
    await until(() => stuck.server.connections.size === 0, 'it is over');
  });

  test('for hundreds of clients: they do not pile up, further ones are refused, and other exports are opened', async () => {
    const stuck = await stuckServer({ tcp: true, limits: { openTimeoutMs: 500, maxConnections: 100 } });
    const clients: RawClient[] = [];
    const attempts = Array.from({ length: 300 }, async (_, index) => {
      const client = await stuck.raw().catch(() => undefined);
      if (client === undefined) return;
      // Those that are refused at once, since there are too many connections, read nothing.
      client.send(Buffer.concat([Buffer.from([0, 0, 0, 3]), optionBytes(OPT.GO, infoQuery('stuck'))]));
      if (index % 2 === 0) client.vanish();
      else clients.push(client);
    });
    await Promise.all(attempts);
    await until(() => stuck.closes.some(({ reason }) => reason.includes('has not opened')), 'time is up for some');
    for (const client of clients) client.vanish();
    await until(() => stuck.server.connections.size === 0, 'all are over');
    expect(stuck.provider.opens.length).toBeGreaterThan(0);
    while (stuck.provider.opens.length < MAX_LEFTOVERS_PER_EXPORT) {
      await (await goOn(stuck, 'stuck')).readToEnd();
    }
    await until(() => stuck.server.connections.size === 0, 'all are over');
    const { length: opens } = stuck.provider.opens;
    const address = stuck.address as { host: string; port: number };
    const client = await NbdClient.connect(address);
    await expect(client.go('stuck')).rejects.toThrow(
      /"stuck" does not answer: \d+ earlier connections still wait for it/,
    );
    expect(stuck.provider.opens).toHaveLength(opens);
    expect(stuck.contexts.at(-1)).toMatchObject({ source: 'server', method: 'open', exportName: 'stuck' });
    await client.go('disk');
    client.destroy();
    // Once they settle, it can be opened again.
    for (const open of stuck.provider.opens) if (open.name === 'stuck') open.answer();
    await until(() => stuck.provider.endings.length === opens, 'late devices are closed');
    await goOn(stuck, 'stuck');
    stuck.provider.opens.at(-1)?.answer();
  });

  test('is waited for by close() and disconnect() until its time is up, as ever', async () => {
    const stuck = await stuckServer();
    await goOn(stuck, 'stuck');
    const [id] = stuck.server.connections.keys();
    let isOver = false;
    const over = stuck.server.disconnect(id ?? 0, 'told to').then(() => (isOver = true));
    await until(() => stuck.provider.opens[0]?.signal.aborted === true, 'it is told');
    const closed = stuck.server.close({ graceMs: Infinity });
    await new Promise((resolve) => setTimeout(resolve, 20));
    expect(isOver).toBe(false);
    stuck.provider.opens[0]?.answer();
    await over;
    expect(await closed).toEqual({ unfinished: [] });
    expect(stuck.provider.endings).toEqual(['lost']);
  });
});

test('a describe that never settles ends its connection when its time is up', async () => {
  const stuck = await stuckServer({ limits: { openTimeoutMs: 30 } });
  const client = await stuck.raw();
  await client.greet();
  client.send(optionBytes(OPT.INFO, infoQuery('stuck describe')));
  await client.readToEnd();
  await until(() => stuck.server.connections.size === 0, 'it is over');
  expect(stuck.closes[0]?.reason).toBe('the server has not described the export "stuck describe" within 30 ms');
  expect(stuck.provider.describes[0]?.signal.aborted).toBe(true);
});

test('lists that never settle do not pile up: further ones are refused, exports are opened, and later lists are given', async () => {
  const path = join(await temporaryDirectory(), 'nbd.sock');
  const answers: ((names: string[]) => void)[] = [];
  const server = createServer({
    exports: () => ({ size: 512, read: () => undefined }),
    list: () => new Promise<string[]>((resolve) => answers.push(resolve)),
    limits: { openTimeoutMs: 30 },
    observer: { onError: () => undefined },
  });
  onTestFinished(() => server.destroy());
  await server.listen({ path });
  for (let n = 0; n < MAX_LEFTOVERS_PER_EXPORT; n++) {
    const client = await NbdClient.connect({ path });
    await expect(client.list()).rejects.toThrow();
    client.destroy();
  }
  expect(answers).toHaveLength(MAX_LEFTOVERS_PER_EXPORT);
  const client = await NbdClient.connect({ path });
  await expect(client.list()).rejects.toThrow(/the list of exports does not answer: 64 earlier connections still wait/);
  expect(answers).toHaveLength(MAX_LEFTOVERS_PER_EXPORT);
  expect(await client.go('any')).toMatchObject({ size: 512 });
  client.destroy();
  for (const answer of answers) answer([]);
  await new Promise((resolve) => setImmediate(resolve));
  const later = await NbdClient.connect({ path });
  const listed = later.list();
  await until(() => answers.length > MAX_LEFTOVERS_PER_EXPORT, 'it is asked again');
  answers.at(-1)?.(['x']);
  expect(await listed).toMatchObject([{ name: 'x' }]);
  later.destroy();
});

test('a describe that was answered is nothing that is owed, when its client then waits too long: the export is opened', async () => {
  const stuck = await stuckServer({ tcp: true, limits: { handshakeTimeoutMs: 2000 } });
  const asking = Array.from({ length: MAX_LEFTOVERS_PER_EXPORT }, async () => {
    const client = await stuck.raw();
    await client.greet();
    client.send(optionBytes(OPT.INFO, infoQuery('stuck describe')));
    return client;
  });
  const clients = await Promise.all(asking);
  await until(() => stuck.provider.describes.length === clients.length, 'all have been asked');
  for (const { answer } of stuck.provider.describes) answer();
  await Promise.all(clients.map((client) => client.readToEnd()));
  expect(stuck.closes[0]?.reason).toBe('no export chosen within 2000 ms');
  const client = await goOn(stuck, 'stuck describe');
  stuck.provider.opens[0]?.answer();
  while ((await client.readOptionReply()).type !== REP.ACK);
});

test('an answer in time is not changed: the client gets its export', async () => {
  const stuck = await stuckServer({ limits: { openTimeoutMs: 10_000 } });
  const client = await goOn(stuck, 'stuck');
  stuck.provider.opens[0]?.answer();
  while ((await client.readOptionReply()).type !== REP.ACK);
  expect(stuck.provider.endings).toEqual([]);
});

describe('a close of a device that never settles', () => {
  test('is reported after a while; the connection stays visible, and does not count for the limits', async () => {
    const stuck = await stuckServer({
      tcp: true,
      limits: { openTimeoutMs: 30, maxConnections: 1, maxConnectionsPerPeer: 1, lingerMs: 10 },
    });
    let finish = (): void => undefined;
    stuck.provider.closing = () => new Promise((resolve) => (finish = resolve));
    const client = await stuck.opened();
    client.vanish();
    await until(() => stuck.errors.length === 1, 'it is reported');
    expect((stuck.errors[0] as Error).message).toBe('it has not closed within 30 ms');
    expect([...stuck.server.connections.values()]).toMatchObject([
      { phase: 'closing', exportName: 'disk', inFlight: 0 },
    ]);
    stuck.provider.closing = () => undefined;
    await stuck.opened();
    expect(stuck.server.connections.size).toBe(2);
    finish();
    await until(() => stuck.server.connections.size === 1, 'it is over');
    expect(stuck.provider.endings).toEqual(['lost']);
  });
});
