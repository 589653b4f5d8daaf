/** Signals and time-outs of the client: an abort ends one call and nothing else, a silent server ends the connection. */

import { getEventListeners } from 'node:events';
import net from 'node:net';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { describe, expect, onTestFinished, test } from 'vitest';
import { NbdClient } from '../src/index.js';
import { CMD, OPT, OPTION_HEADER_SIZE, REP } from '../src/protocol/wire.js';
import { duplexPair } from './duplex-pair.js';
import { failureOf, fakeServer, GREETING, hear, letIn, optionReply, reply } from './fake-server.js';
import { uint32 } from './raw-client.js';
import { DISK_SIZE, Gate, TestExport } from './test-device.js';
import { startServer, temporaryDirectory, until } from './test-server.js';

const MIB = 1024 * 1024;

async function opened(path: string, timeoutMs?: number): Promise<NbdClient> {
  const client = await NbdClient.connect({ path, timeoutMs });
  onTestFinished(() => client.destroy());
  await client.go('disk');
  return client;
}

describe('options', () => {
  test('any number at once are answered in their order', async () => {
    const client = await NbdClient.connect({ path: (await startServer()).path });
    onTestFinished(() => client.destroy());
    const order: string[] = [];
    const note = (what: string) => () => void order.push(what);
    const [list, info, missing, contexts, details] = await Promise.all([
      client.list().finally(note('list')),
      client.info('disk').finally(note('info')),
      failureOf(client.info('nothing').finally(note('missing'))),
      client.listContexts('disk').finally(note('contexts')),
      client.go('disk').finally(note('go')),
    ]);
    expect(order).toEqual(['list', 'info', 'missing', 'contexts', 'go']);
    expect(list).toHaveLength(1);
    expect(info).toEqual(details);
    expect(missing.code).toBe('UNKNOWN_EXPORT');
    expect(contexts).toEqual(['base:allocation']);
    expect(await client.read(4, 4)).toEqual(uint32(5));
  });

  test('an aborted option rejects at once, its late answer is dropped, and the next one gets its own', async () => {
    const gate = new Gate();
    let isAsked = false;
    const path = await fakeServer(async (peer) => {
      peer.send(GREETING);
      await peer.read(4 + OPTION_HEADER_SIZE);
      isAsked = true;
      await gate.opened;
      peer.send(optionReply(OPT.LIST, REP.SERVER, Buffer.from('0000000161', 'hex')));
      peer.send(optionReply(OPT.LIST, REP.ACK));
      await peer.read(OPTION_HEADER_SIZE);
      peer.send(optionReply(OPT.LIST, REP.SERVER, Buffer.from('0000000162', 'hex')), optionReply(OPT.LIST, REP.ACK));
    });
    const client = await NbdClient.connect({ path });
    onTestFinished(() => client.destroy());
    const controller = new AbortController();
    const first = failureOf(client.list({ signal: controller.signal }));
    const never = failureOf(client.list({ signal: controller.signal }));
    const second = client.list();
    await until(() => isAsked, 'the server was asked');
    controller.abort('enough');
    expect(await first).toMatchObject({ code: 'ABORTED', cause: 'enough' });
    // It was not sent at all: the server expects two lists.
    expect((await never).code).toBe('ABORTED');
    gate.open();
    expect(await second).toEqual([{ name: 'b', description: '' }]);
    expect(getEventListeners(controller.signal, 'abort')).toHaveLength(0);
  });

  test('an aborted go() closes the connection, because the export may be open', async () => {
    const { path, provider, allOver } = await startServer();
    const gate = new Gate();
    provider.openHook = () => gate.opened;
    const client = await NbdClient.connect({ path });
    const controller = new AbortController();
    const going = failureOf(client.go('disk', { signal: controller.signal }));
    await until(() => provider.askers.size > 0, 'the server was asked');
    controller.abort();
    expect((await going).code).toBe('ABORTED');
    expect((await client.closed).message).toBe('go() was aborted');
    gate.open();
    await allOver();
  });

  test('a silent server: the option fails with TIMED_OUT, everything behind it too, and the connection is closed', async () => {
    const path = await fakeServer(async (peer) => {
      peer.send(GREETING);
      await peer.read(4 + OPTION_HEADER_SIZE);
    });
    const client = await NbdClient.connect({ path, timeoutMs: 300 });
    const failures = [client.list(), client.info('disk'), client.go('disk')].map(failureOf);
    for (const failure of failures) expect((await failure).code).toBe('TIMED_OUT');
    expect((await client.closed).code).toBe('TIMED_OUT');
  });
});

describe('connect()', () => {
  test('to a silent server fails after connectTimeoutMs', async () => {
    const path = await fakeServer(() => Promise.resolve());
    const failure = await failureOf(NbdClient.connect({ path, connectTimeoutMs: 300 }));
    expect(failure).toMatchObject({ code: 'TIMED_OUT', message: `connect() to ${path} took more than 300 ms` });
  });

  test('to a server that is silent after STARTTLS fails after connectTimeoutMs', async () => {
    const path = await fakeServer(async (peer) => {
      peer.send(GREETING);
      await peer.read(4 + OPTION_HEADER_SIZE);
      peer.send(optionReply(OPT.STARTTLS, REP.ACK));
    });
    const failure = await failureOf(NbdClient.connect({ path, tls: {}, connectTimeoutMs: 300 }));
    expect(failure.code).toBe('TIMED_OUT');
  });

  test('ends when its signal is aborted, before and during the greeting, and leaves no listener', async () => {
    let connections = 0;
    const path = await fakeServer(() => {
      connections++;
      return Promise.resolve();
    });
    const controller = new AbortController();
    const connecting = failureOf(NbdClient.connect({ path, signal: controller.signal }));
    await until(() => connections === 1, 'it is connected');
    controller.abort(new Error('changed my mind'));
    expect(await connecting).toMatchObject({ code: 'ABORTED', cause: { message: 'changed my mind' } });
    expect((await failureOf(NbdClient.connect({ path, signal: controller.signal }))).code).toBe('ABORTED');
    expect(connections).toBe(1);
    expect(getEventListeners(controller.signal, 'abort')).toHaveLength(0);
  });

  test('its signal has no effect once it is connected', async () => {
    const controller = new AbortController();
    const client = await NbdClient.connect({ path: (await startServer()).path, signal: controller.signal });
    onTestFinished(() => client.destroy());
    controller.abort();
    expect((await client.go('disk')).size).toBe(DISK_SIZE);
  });

  test('a socket that is already closed fails at once', async () => {
    const { client: socket } = duplexPair();
    socket.destroy();
    expect((await failureOf(NbdClient.connect({ socket }))).code).toBe('CLOSED');
  });
});

describe('requests', () => {
  test('an aborted read rejects alone; late data go nowhere, and later replies reach their requests', async () => {
    const gate = new Gate();
    const path = await fakeServer(async (peer) => {
      await letIn(peer);
      const first = await hear(peer);
      const second = await hear(peer);
      // The first half, then the abort, then the rest.
      peer.send(uint32(0x67446698), uint32(0), first.cookie, Buffer.alloc(2048, 0xaa));
      await gate.opened;
      peer.send(Buffer.alloc(2048, 0xaa));
      reply(peer, second, Buffer.alloc(8, 0xbb));
      const third = await hear(peer);
      reply(peer, third, Buffer.alloc(8, 0xcc));
    });
    const client = await opened(path);
    const controller = new AbortController();
    const into = Buffer.alloc(4096, 0x11);
    const aborted = failureOf(client.readInto(0, into, { signal: controller.signal }));
    const other = client.read(8192, 8);
    await until(() => into[2047] === 0xaa, 'half of the data is there');
    controller.abort('late');
    into.fill(0x22);
    expect(await aborted).toMatchObject({
      code: 'ABORTED',
      cause: 'late',
      message: 'read of 4096 bytes at 0 was aborted',
    });
    gate.open();
    expect(await other).toEqual(Buffer.alloc(8, 0xbb));
    expect(await client.read(0, 8)).toEqual(Buffer.alloc(8, 0xcc));
    expect(into).toEqual(Buffer.alloc(4096, 0x22));
    expect(getEventListeners(controller.signal, 'abort')).toHaveLength(0);
  });

  test('a read that is aborted before it was sent is not sent', async () => {
    const { client: open, requests } = await startServer();
    const client = await open();
    expect((await failureOf(client.read(0, 4, { signal: AbortSignal.abort() }))).code).toBe('ABORTED');
    await client.flush();
    expect(requests).toHaveLength(1);
  });

  test('an aborted write rejects once its bytes have left, and what was on the wire is what was to be written', async () => {
    const length = 8 * MIB;
    const gate = new Gate();
    let written: Buffer | undefined;
    const path = await fakeServer(async (peer, _, socket) => {
      await letIn(peer, { size: length });
      socket.pause();
      await gate.opened;
      socket.resume();
      const write = await hear(peer);
      written = write.data;
      reply(peer, write);
      reply(peer, await hear(peer), Buffer.alloc(4, 7));
    });
    const client = await opened(path);
    const controller = new AbortController();
    const data = Buffer.alloc(length, 'what is to be written');
    const wanted = Buffer.from(data);
    let isOver = false;
    const aborted = failureOf(client.write(0, data, { signal: controller.signal })).then((failure) => {
      isOver = true;
      // The caller may use its memory from now on.
      data.fill(0);
      return failure;
    });
    controller.abort();
    await new Promise(setImmediate);
    expect(isOver).toBe(false);
    gate.open();
    expect((await aborted).code).toBe('ABORTED');
    expect(await client.read(0, 4)).toEqual(Buffer.alloc(4, 7));
    expect(written?.equals(wanted)).toBe(true);
  });

  test('an aborted write whose bytes never leave rejects when the connection ends', async () => {
    const path = await fakeServer(async (peer, _, socket) => {
      await letIn(peer, { size: 8 * MIB });
      socket.pause();
    });
    const client = await opened(path);
    const controller = new AbortController();
    const aborted = failureOf(client.write(0, Buffer.alloc(8 * MIB), { signal: controller.signal }));
    controller.abort();
    client.destroy();
    expect((await aborted).code).toBe('ABORTED');
  });

  test('each kind of request can be aborted, and listeners are removed when requests settle', async () => {
    const { client: open, provider } = await startServer();
    const client = await open();
    const { signal } = new AbortController();
    for (let round = 0; round < 3; round++) {
      await client.read(0, 4, { signal });
      await client.write(0, Buffer.alloc(4), { signal });
      await client.zero(0, 4, { signal });
      await client.flush({ signal });
      expect(getEventListeners(signal, 'abort')).toHaveLength(0);
    }
    const gate = new Gate();
    provider.hook = () => gate.opened;
    const controller = new AbortController();
    const options = { signal: controller.signal };
    const calls = [
      client.read(0, 4, options),
      client.write(0, Buffer.alloc(4), options),
      client.zero(0, 4, options),
      client.trim(0, 4, options),
      client.cache(0, 4, options),
      client.flush(options),
      client.blockStatus('base:allocation', 0, 4096, options),
    ].map(failureOf);
    await until(() => provider.unfinished === 7, 'all are in flight');
    controller.abort();
    for (const call of calls) expect((await call).code).toBe('ABORTED');
    expect(getEventListeners(controller.signal, 'abort')).toHaveLength(0);
    gate.open();
    expect(await client.read(4096, 4)).toEqual(uint32(4097));
  });

  test('one signal for many calls is no leak that Node warns of', async () => {
    const { client: open, provider } = await startServer();
    const client = await open();
    const gate = new Gate();
    provider.hook = () => gate.opened;
    const { signal } = new AbortController();
    const calls = Array.from({ length: 100 }, () => client.read(0, 4, { signal }));
    expect(getEventListeners(signal, 'abort')).toHaveLength(1);
    gate.open();
    await Promise.all(calls);
    expect(getEventListeners(signal, 'abort')).toHaveLength(0);
  });

  test('disconnect() does not wait for a request that was aborted', async () => {
    const path = await fakeServer(async (peer) => {
      await letIn(peer);
      await hear(peer);
      expect((await hear(peer)).type).toBe(CMD.DISC);
      peer.halfClose();
    });
    const client = await opened(path);
    const controller = new AbortController();
    const read = failureOf(client.read(0, 4, { signal: controller.signal }));
    controller.abort();
    await read;
    await client.disconnect();
    expect(await client.closed).toMatchObject({ code: 'CLOSED', message: 'this client has disconnected' });
  });

  test('disconnect() of a server that answers nothing ends with its signal', async () => {
    const path = await fakeServer(async (peer) => {
      await letIn(peer);
      await hear(peer);
    });
    const client = await opened(path);
    const read = failureOf(client.read(0, 4));
    const controller = new AbortController();
    const leaving = failureOf(client.disconnect({ signal: controller.signal }));
    expect((await failureOf(client.flush())).message).toContain('disconnecting');
    controller.abort();
    expect((await leaving).code).toBe('ABORTED');
    expect((await read).code).toBe('CLOSED');
    await client.closed;
  });

  test('a silent server: everything pending fails with TIMED_OUT, also what is asked later', async () => {
    const path = await fakeServer(async (peer) => {
      await letIn(peer);
    });
    const client = await opened(path, 300);
    const began = performance.now();
    const failures = [client.read(0, 4), client.write(0, Buffer.alloc(4)), client.flush()].map(failureOf);
    for (const failure of failures) expect((await failure).code).toBe('TIMED_OUT');
    expect(performance.now() - began).toBeGreaterThanOrEqual(299);
    expect((await failureOf(client.flush())).code).toBe('TIMED_OUT');
    expect((await client.closed).message).toBe('the server did not answer for 300 ms');
  });

  test('a server that reads nothing is silent too', async () => {
    const path = await fakeServer(async (peer, _, socket) => {
      await letIn(peer, { size: 32 * MIB });
      socket.pause();
    });
    const client = await opened(path, 300);
    expect((await failureOf(client.write(0, Buffer.alloc(32 * MIB)))).code).toBe('TIMED_OUT');
  });

  test('a request that was aborted does not hide a silent server', async () => {
    const path = await fakeServer(async (peer) => {
      await letIn(peer);
    });
    const client = await opened(path, 300);
    expect((await failureOf(client.read(0, 4, { signal: AbortSignal.timeout(1) }))).code).toBe('ABORTED');
    expect((await client.closed).code).toBe('TIMED_OUT');
  });

  test('a slow reply is no silence, nor is a request behind it', async () => {
    const path = await fakeServer(async (peer) => {
      await letIn(peer);
      const first = await hear(peer);
      const second = await hear(peer);
      peer.send(uint32(0x67446698), uint32(0), first.cookie);
      // Far longer than the time-out, a byte at a time. The pauses are what is tested.
      for (let sent = 0; sent < 40; sent++) {
        peer.send(Buffer.of(sent));
        await sleep(20);
      }
      reply(peer, second);
    });
    const client = await opened(path, 400);
    const read = client.read(0, 40);
    const flush = client.flush();
    expect((await read)[39]).toBe(39);
    await flush;
  });

  test('an idle connection has no timer and does not time out', async () => {
    const { path } = await startServer();
    const client = await opened(path, 300);
    await client.read(0, 4);
    await sleep(500);
    expect(await client.read(4, 4)).toEqual(uint32(5));
  });
});

describe('the end', () => {
  test('`closed` resolves with the reason, whatever it is', async () => {
    const { path, server } = await startServer();
    const [left, destroyed, lost] = [await opened(path), await opened(path), await opened(path)];
    await left.disconnect();
    expect(await left.closed).toMatchObject({ code: 'CLOSED', message: 'this client has disconnected' });
    destroyed.destroy();
    expect(await destroyed.closed).toMatchObject({ code: 'CLOSED', message: 'this client has closed the connection' });
    server.destroy();
    expect((await lost.closed).code).toBe('CLOSED');
    expect((await lost.closed).message).not.toContain('this client');
  });

  test('Symbol.asyncDispose disconnects, in each phase and twice', async () => {
    const { path, closes, allOver } = await startServer();
    const client = await opened(path);
    await client[Symbol.asyncDispose]();
    await client[Symbol.asyncDispose]();
    const early = await NbdClient.connect({ path });
    await early[Symbol.asyncDispose]();
    await allOver();
    expect(closes.map(({ reason }) => reason)).toEqual(['the client disconnected', 'the client aborted the handshake']);
  });

  test('an `onHole` that throws fails its read, and neither the process nor other requests', async () => {
    const exported = new TestExport('disk');
    exported.disk.fill(0, 0, 512 * 1024);
    const { path } = await startServer({ exports: [exported] });
    const client = await opened(path);
    const broken = new Error('my callback is broken');
    const read = client.read(0, 256 * 1024, {
      onHole: () => {
        throw broken;
      },
    });
    const other = client.read(DISK_SIZE - 4, 4);
    await expect(read).rejects.toBe(broken);
    expect(await other).toEqual(uint32(DISK_SIZE - 3));
    expect(await client.read(0, 4)).toEqual(uint32(0));
  });
});

describe('addresses', () => {
  test('{ port }, { host, port } and URIs of both transports, with the export that the URI names', async () => {
    const { server, path } = await startServer({ exports: [new TestExport('größe/a b')] });
    const bound = await server.listen({ host: '127.0.0.1', port: 0 });
    const { port } = bound as { readonly port: number };
    const name = encodeURIComponent('größe/a b');
    for (const options of [
      { port, host: undefined },
      { host: '127.0.0.1', port },
      { uri: `nbd://127.0.0.1:${port}/${name}` },
      { uri: `nbd+unix:///${name}?socket=${encodeURIComponent(path)}` },
    ]) {
      const client = await NbdClient.connect(options);
      onTestFinished(() => client.destroy());
      const given = 'uri' in options ? undefined : 'größe/a b';
      expect((await client.info(given)).name).toBe('größe/a b');
      expect((await client.go(given)).size).toBe(DISK_SIZE);
      expect(client.details?.size).toBe(DISK_SIZE);
    }
  });

  test('an nbds URI requires TLS of the server', async () => {
    const { path } = await startServer();
    const failure = await failureOf(NbdClient.connect({ uri: `nbds+unix:///disk?socket=${path}` }));
    expect(failure.code).toBe('TLS_FAILED');
  });

  test('a refused connection names the address', async () => {
    const listener = net.createServer().listen(0, '127.0.0.1');
    await until(() => listener.listening, 'it listens');
    const { port } = listener.address() as net.AddressInfo;
    await new Promise((resolve) => listener.close(resolve));
    const failure = await failureOf(NbdClient.connect({ host: '127.0.0.1', port }));
    expect(failure).toMatchObject({ code: 'CLOSED' });
    expect(failure.message).toContain(`cannot connect to 127.0.0.1:${port}: connect ECONNREFUSED`);
    const path = join(await temporaryDirectory(), `${'x'.repeat(120)}.sock`);
    expect((await failureOf(NbdClient.connect({ path }))).message).toContain('the path has');
  });
});
