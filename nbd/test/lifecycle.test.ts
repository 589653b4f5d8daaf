/** Begin and end of connections, listeners and servers. In every case each device is closed exactly once. */

import { fork } from 'node:child_process';
import { renameSync } from 'node:fs';
import { lstat, mkdir, readdir, readFile, stat, writeFile } from 'node:fs/promises';
import net from 'node:net';
import { join } from 'node:path';
import { describe, expect, onTestFinished, test } from 'vitest';
import { ListenError, NbdClient, NbdServer } from '../src/index.js';
import { CMD, GREETING_SIZE, NBD_ERRNO, OPT, REP, REQUEST_MAGIC } from '../src/protocol/wire.js';
import { duplexPair } from './duplex-pair.js';
import { infoQuery, optionBytes, RawClient, requestBytes, uint32 } from './raw-client.js';
import { Gate, TestExport, TestProvider } from './test-device.js';
import { startServer, temporaryDirectory, until } from './test-server.js';

const UNKNOWN_OPTION = 0x4e;

/** A server without a listener. */
function idleServer(): { readonly server: NbdServer; readonly provider: TestProvider } {
  const provider = new TestProvider([new TestExport('disk')]);
  const server = new NbdServer({ provider });
  onTestFinished(() => server.destroy());
  return { server, provider };
}

/** The umask of this process; process.umask() would set it for a moment. */
async function ownUmask(): Promise<string | undefined> {
  return /^Umask:\s*(\d+)$/m.exec(await readFile('/proc/self/status', 'utf8'))?.[1];
}

async function listenError(server: NbdServer, options: Parameters<NbdServer['listen']>[0]): Promise<ListenError> {
  const error: unknown = await server.listen(options).catch((reason: unknown) => reason);
  if (!(error instanceof ListenError)) throw new Error(`listen() was to fail, and gave ${JSON.stringify(error)}`);
  return error;
}

/** Blocks the event loop, as a stop of the process does (a debugger, a frozen cgroup). */
function standStill(ms: number): void {
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, ms);
}

async function isServed(address: net.NetConnectOpts): Promise<void> {
  const client = await RawClient.connect(address);
  await client.open('disk');
  client.request({ type: CMD.READ, offset: 4, length: 4, cookie: 1n });
  expect(await client.readReply(4)).toEqual({ errno: 0, cookie: 1n, data: uint32(5) });
  client.vanish();
}

/** A socket file that a killed process left behind. */
async function leaveStaleSocket(path: string): Promise<void> {
  const script = join(await temporaryDirectory(), 'listen.cjs');
  await writeFile(script, `require('net').createServer().listen(process.argv[2], () => process.send('listening'))`);
  const child = fork(script, [path]);
  await new Promise((resolve) => child.once('message', resolve));
  const gone = new Promise((resolve) => child.once('exit', resolve));
  child.kill('SIGKILL');
  await gone;
  expect((await lstat(path)).isSocket()).toBe(true);
}

describe('a connection', () => {
  test('that is cut off ends when its requests in flight are finished; held and later requests are not executed', async () => {
    const { opened, provider, server, closes } = await startServer({ limits: { maxInFlightRequests: 2 } });
    const gate = new Gate();
    provider.hook = () => gate.opened;
    const client = await opened();
    const other = await opened();
    const write = (offset: number): Buffer =>
      Buffer.concat([requestBytes({ type: CMD.WRITE, offset, length: 4 }), Buffer.from('new!')]);
    client.send(write(0), write(4096), write(8192), write(12288));
    // Half of a payload, received directly into its buffer.
    client.send(requestBytes({ type: CMD.WRITE, offset: 16384, length: 65536 }), Buffer.alloc(40_000));
    await until(() => provider.unfinished === 2, 'two writes are in flight');
    const [id] = server.connections.keys();
    let isOver = false;
    const over = server.disconnect(id ?? 0, 'told to').then((wasThere) => {
      isOver = true;
      return wasThere;
    });
    await until(() => server.connections.get(id ?? 0)?.phase === 'closing', 'it is closing');
    await new Promise((resolve) => setImmediate(() => setImmediate(resolve)));
    expect(isOver).toBe(false);
    gate.open();
    expect(await over).toBe(true);
    expect(provider.calls.map(({ offset }) => offset)).toEqual([0, 4096]);
    expect(provider).toMatchObject({ closed: 1, endings: ['lost'], breaches: [] });
    expect(closes).toMatchObject([{ id, reason: 'told to' }]);
    expect(await server.disconnect(id ?? 0, 'again')).toBe(false);
    // Other connections continue.
    other.request({ type: CMD.READ, offset: 4, length: 4, cookie: 1n });
    expect(await other.readReply(4)).toMatchObject({ errno: 0 });
    client.vanish();
  });

  test('is in the phase "closing" from its goodbye on, while its last requests are in flight', async () => {
    const { opened, provider, server, allOver } = await startServer();
    const gate = new Gate();
    provider.hook = () => gate.opened;
    const client = await opened();
    client.send(requestBytes({ type: CMD.READ, offset: 0, length: 4 }));
    await until(() => provider.unfinished === 1, 'it is in flight');
    const [connection] = server.connections.values();
    expect(connection?.phase).toBe('transmission');
    client.send(requestBytes({ type: CMD.DISC }));
    await until(() => connection?.phase === 'closing', 'it is closing');
    expect(provider.unfinished).toBe(1);
    gate.open();
    client.vanish();
    await allOver();
  });
});

describe('clients that are lost', () => {
  test('with requests in flight: the device is closed once, after the last of them has finished', async () => {
    const { opened, provider, server, allOver, closes } = await startServer();
    const gates = new Map<number, Gate>();
    provider.hook = ({ offset }) => {
      const gate = new Gate();
      gates.set(offset, gate);
      return gate.opened;
    };
    const client = await opened();
    client.send(
      requestBytes({ type: CMD.READ, offset: 0, length: 512 }),
      requestBytes({ type: CMD.READ, offset: 4096, length: 300_000 }),
      requestBytes({ type: CMD.WRITE, offset: 8192, length: 512 }),
      Buffer.alloc(512),
    );
    await until(() => gates.size === 3, 'three requests are in flight');
    client.vanish();
    gates.get(8192)?.open();
    gates.get(4096)?.open();
    await until(() => provider.unfinished === 1, 'one is left');
    expect({ closed: provider.closed, connections: server.connections.size }).toEqual({ closed: 0, connections: 1 });
    gates.get(0)?.open();
    await allOver();
    expect(provider).toMatchObject({ opened: 1, closed: 1, breaches: [] });
    expect(closes).toHaveLength(1);
  });

  test('during the handshake: no device was opened, and the close is reported without an export', async () => {
    const { raw, provider, allOver, closes, opens } = await startServer();
    const client = await raw();
    await client.greet();
    client.vanish();
    await until(() => closes.length === 1, 'the close is reported');
    await allOver();
    expect(provider.opened).toBe(0);
    expect(opens).toEqual([]);
    expect(closes[0]).toMatchObject({ exportName: undefined, requests: 0 });
  });

  test('while their export is being opened: the device is closed as soon as it is open', async () => {
    const { raw, provider, server, allOver, closes } = await startServer();
    const gate = new Gate();
    provider.openHook = () => gate.opened;
    const client = await raw();
    await client.greet();
    client.send(optionBytes(OPT.GO, infoQuery('disk')));
    client.vanish();
    expect(server.connections.size).toBe(1);
    gate.open();
    await until(() => closes.length === 1, 'the close is reported');
    await allOver();
    expect(provider).toMatchObject({ opened: 1, closed: 1 });
  });

  test('within a payload: the device never gets the write', async () => {
    const { opened, provider, allOver, closes } = await startServer();
    const client = await opened();
    client.send(requestBytes({ type: CMD.WRITE, length: 300_000 }), Buffer.alloc(299_999));
    client.halfClose();
    await client.readToEnd();
    await allOver();
    expect(provider.calls).toEqual([]);
    expect(closes[0]?.reason).toBe('the client left in the middle of a request');
  });

  test('with unread replies: the device is closed', async () => {
    const { opened, provider, allOver } = await startServer({ limits: { maxUnsentBytes: 64 * 1024 } });
    const client = await opened();
    client.socket.pause();
    client.send(
      ...Array.from({ length: 1000 }, (_, i) => requestBytes({ type: CMD.READ, length: 65536, cookie: BigInt(i) })),
    );
    await until(() => provider.calls.length > 0, 'reads are made');
    client.vanish();
    await allOver();
  });
});

describe('the ending that a device is closed with', () => {
  test('is "disconnect" after NBD_CMD_DISC, also with requests in flight', async () => {
    const { opened, provider, allOver } = await startServer();
    const client = await opened();
    client.send(requestBytes({ type: CMD.READ, length: 512 }), requestBytes({ type: CMD.DISC }));
    await allOver();
    expect(provider.endings).toEqual(['disconnect']);
  });

  test('is "lost" if the client is lost, closes its side, breaks the protocol, or the server ends the connection', async () => {
    const { opened, server, provider, allOver } = await startServer();
    (await opened()).vanish();
    await until(() => provider.closed === 1, 'the first is closed');
    (await opened()).halfClose();
    await until(() => provider.closed === 2, 'the second is closed');
    (await opened()).send(Buffer.alloc(28, 0xff));
    await until(() => provider.closed === 3, 'the third is closed');
    await opened();
    await server.close();
    await allOver();
    expect(provider.endings).toEqual(['lost', 'lost', 'lost', 'lost']);
  });

  test('left() is called at the end of every connection that called the provider, with or without an open export', async () => {
    const { raw, opened, provider, allOver } = await startServer();
    const asking = await raw();
    await asking.greet();
    asking.send(optionBytes(OPT.INFO, infoQuery('disk')));
    await until(() => provider.askers.size === 1, 'it has asked');
    asking.send(optionBytes(OPT.ABORT));
    await until(() => provider.gone.length === 1, 'it is over');
    (await opened()).vanish();
    await until(() => provider.gone.length === 2, 'the other is over');
    await allOver();
    expect(new Set(provider.gone)).toEqual(provider.askers);
    expect([...provider.askers].every((peer) => provider.gone.includes(peer))).toBe(true);
  });
});

describe('close()', () => {
  test('answers requests in flight, refuses later ones with ESHUTDOWN, and resolves when all is closed', async () => {
    const { opened, provider, server, allOver, closes } = await startServer();
    const gate = new Gate();
    provider.hook = () => gate.opened;
    const client = await opened();
    client.request({ type: CMD.READ, offset: 4, length: 4, cookie: 1n });
    await until(() => provider.unfinished === 1, 'a read is in flight');
    const closed = server.close();
    client.request({ type: CMD.READ, offset: 8, length: 4, cookie: 2n });
    client.request({ type: CMD.WRITE, offset: 8, length: 4, cookie: 3n }, uint32(REQUEST_MAGIC));
    client.request({ type: CMD.FLUSH, cookie: 4n });
    for (const cookie of [2n, 3n, 4n]) {
      expect(await client.readReply()).toMatchObject({ errno: NBD_ERRNO.ESHUTDOWN, cookie });
    }
    gate.open();
    expect(await client.readReply(4)).toEqual({ errno: 0, cookie: 1n, data: uint32(5) });
    expect(await client.readToEnd()).toHaveLength(0);
    await closed;
    expect(provider.calls).toHaveLength(1);
    expect(provider.openNow).toBe(0);
    await allOver();
    expect(closes[0]?.reason).toBe('the server is shutting down');
  });

  test('with refuse: false answers requests in flight, and neither executes nor answers later ones', async () => {
    const { opened, provider, server } = await startServer();
    const gate = new Gate();
    provider.hook = () => gate.opened;
    const client = await opened();
    client.request({ type: CMD.READ, offset: 4, length: 4, cookie: 1n });
    await until(() => provider.unfinished === 1, 'a read is in flight');
    const closed = server.close({ refuse: false });
    await new Promise((resolve) => setImmediate(resolve));
    client.request({ type: CMD.READ, offset: 8, length: 4, cookie: 2n });
    client.request({ type: CMD.WRITE, offset: 8, length: 4, cookie: 3n }, uint32(REQUEST_MAGIC));
    gate.open();
    expect(await client.readReply(4)).toEqual({ errno: 0, cookie: 1n, data: uint32(5) });
    expect(await client.readToEnd()).toHaveLength(0);
    await closed;
    expect(provider.calls).toHaveLength(1);
    expect(provider.openNow).toBe(0);
  });

  test('with refuse: false drops requests beyond the limit in flight', async () => {
    const { opened, provider, server } = await startServer({ limits: { maxInFlightRequests: 2 } });
    const gate = new Gate();
    provider.hook = () => gate.opened;
    const client = await opened();
    for (const cookie of [1n, 2n, 3n, 4n]) client.request({ type: CMD.READ, offset: 4, length: 4, cookie });
    await until(() => provider.unfinished === 2, 'two reads are in flight');
    const closed = server.close({ refuse: false });
    await new Promise((resolve) => setImmediate(() => setImmediate(resolve)));
    gate.open();
    expect(await client.readReply(4)).toMatchObject({ errno: 0, cookie: 1n });
    expect(await client.readReply(4)).toMatchObject({ errno: 0, cookie: 2n });
    expect(await client.readToEnd()).toHaveLength(0);
    await closed;
    expect(provider.calls).toHaveLength(2);
  });

  test('waits for the device to be closed', async () => {
    const { opened, provider, server } = await startServer();
    await opened();
    const gate = new Gate();
    let isResolved = false;
    provider.closeHook = () => gate.opened;
    const closed = server.close().then(() => {
      isResolved = true;
    });
    await until(() => provider.closed === 1, 'the device is being closed');
    expect(isResolved).toBe(false);
    gate.open();
    await closed;
    expect(server.connections.size).toBe(0);
  });

  test('ends idle connections and handshakes, removes the socket file and accepts no client afterwards', async () => {
    const { opened, raw, server, path, allOver } = await startServer();
    const idle = await opened();
    const haggling = await raw();
    await haggling.greet();
    await haggling.option(UNKNOWN_OPTION);
    const silent = await raw();
    await silent.read(GREETING_SIZE);
    await server.close();
    for (const client of [idle, haggling, silent]) expect(await client.readToEnd()).toHaveLength(0);
    await allOver();
    await expect(lstat(path)).rejects.toMatchObject({ code: 'ENOENT' });
    await expect(RawClient.connect({ path })).rejects.toMatchObject({ code: 'ENOENT' });
    expect((await listenError(server, { path })).code).toBe('CLOSED');
    expect(server.serveConnection(duplexPair().server)).toBeUndefined();
  });

  test('a time for drain that is none is refused, and the server goes on', async () => {
    const { server, path } = await startServer();
    for (const timeoutMs of [-1, NaN, '5' as unknown as number]) {
      await expect(server.drain({ timeoutMs })).rejects.toThrow(/timeoutMs must be a number/);
    }
    await isServed({ path });
  });

  test('of a server without connections, called twice, resolves twice', async () => {
    const { server } = await startServer();
    await Promise.all([server.close(), server.close()]);
    await server.close();
  });

  test('gives no export to a client whose GO is being answered, and closes the device opened for it', async () => {
    const { raw, provider, server, allOver } = await startServer();
    const gate = new Gate();
    let isAsked = false;
    provider.openHook = () => {
      isAsked = true;
      return gate.opened;
    };
    const client = await raw();
    await client.greet();
    client.send(optionBytes(OPT.GO, infoQuery('disk')));
    await until(() => isAsked, 'the export is being opened');
    const closed = server.close();
    gate.open();
    await closed;
    await client.readToEnd();
    await allOver();
    expect(provider).toMatchObject({ opened: 1, closed: 1 });
  });

  test('closes unfinished connections after the grace time, and their devices when their requests finish', async () => {
    const { opened, provider, server, allOver, closes } = await startServer();
    const gate = new Gate();
    provider.hook = () => gate.opened;
    const client = await opened();
    client.request({ type: CMD.READ, length: 4 });
    await until(() => provider.unfinished === 1, 'a read is in flight');
    await server.close({ graceMs: 10 });
    expect(await client.readToEnd()).toHaveLength(0);
    expect({ open: provider.openNow, connections: server.connections.size }).toEqual({ open: 1, connections: 1 });
    gate.open();
    await allOver();
    expect(closes).toHaveLength(1);
  });

  test('waits for the device of a client that broke the protocol with a request in flight', async () => {
    const { opened, provider, server, allOver } = await startServer();
    const gate = new Gate();
    provider.hook = () => gate.opened;
    const client = await opened();
    client.send(requestBytes({ type: CMD.READ, length: 4 }), requestBytes({ type: CMD.READ, magic: 0 }));
    await client.readToEnd();
    await until(() => provider.unfinished === 1, 'a read is in flight');
    const closed = server.close();
    gate.open();
    await closed;
    await allOver();
    expect(provider.closed).toBe(1);
  });
});

describe('limits', () => {
  test('a client that chooses no export in time is closed', async () => {
    const { raw, allOver, closes } = await startServer({ limits: { handshakeTimeoutMs: 30 } });
    const silent = await raw();
    const talkative = await raw();
    await talkative.greet();
    await silent.readToEnd();
    await talkative.readToEnd();
    await allOver();
    const reason = 'no export chosen within 30 ms';
    expect(closes.map((event) => event.reason)).toEqual([reason, reason]);
  });

  test('the handshake timeout does not apply after a client has chosen its export', async () => {
    const { raw, opened, closes } = await startServer({ limits: { handshakeTimeoutMs: 1000 } });
    const client = await opened();
    const silent = await raw();
    await silent.readToEnd();
    client.request({ type: CMD.READ, offset: 4, length: 4 });
    expect((await client.readReply(4)).data).toEqual(uint32(5));
    expect(closes).toHaveLength(1);
  });

  test('the number of options is not limited', async () => {
    const { raw } = await startServer();
    const client = await raw();
    await client.greet();
    client.send(Buffer.concat(Array.from({ length: 5000 }, () => optionBytes(99))));
    for (let n = 0; n < 5000; n++) expect((await client.readOptionReply()).type).toBe(REP.ERR_UNSUP);
  });

  test('options are limited in time, also if many are sent at once, and other clients are served meanwhile', async () => {
    const { raw, opened, closes, allOver } = await startServer({ limits: { handshakeTimeoutMs: 1000 } });
    const neighbour = await opened();
    const pushy = await raw();
    await pushy.greet();
    const many = Buffer.concat(Array.from({ length: 4096 }, () => optionBytes(99)));
    let answered = 0;
    const push = async (): Promise<void> => {
      for (;;) {
        pushy.send(many);
        for (let n = 0; n < 4096; n++) {
          await pushy.readOptionReply();
          answered++;
        }
      }
    };
    const pushing = push().catch(() => undefined);
    // The other client is answered all the time.
    let reads = 0;
    for (; closes.length === 0; reads++) {
      neighbour.request({ type: CMD.READ, offset: 4, length: 4 });
      expect((await neighbour.readReply(4)).data).toEqual(uint32(5));
    }
    await pushing;
    expect(answered / reads).toBeLessThan(1000);
    expect(closes[0]?.reason).toBe('no export chosen within 1000 ms');
    neighbour.request({ type: CMD.DISC });
    await allOver();
  });

  test('a client that lists many exports has time to query each', async () => {
    const exports = Array.from({ length: 200 }, (_, n) => new TestExport(`disk-${n}`));
    const { raw, closes, allOver } = await startServer({
      exports,
      limits: { handshakeTimeoutMs: 200, handshakeMsPerListedExport: 20 },
    });
    const client = await raw();
    await client.greet();
    expect(await client.option(OPT.LIST)).toHaveLength(exports.length + 1);
    const end = performance.now() + 600;
    while (performance.now() < end) {
      const replies = await client.option(OPT.INFO, infoQuery('disk-7'));
      expect(replies.at(-1)?.type).toBe(REP.ACK);
    }
    // The limit for silence is not extended.
    await client.readToEnd();
    await allOver();
    expect(closes[0]?.reason).toBe('no export chosen within 200 ms');
  });

  test('the time in which the server opens an export does not count against the client', async () => {
    const { raw, provider, closes } = await startServer({ limits: { handshakeTimeoutMs: 200 } });
    const gate = new Gate();
    provider.openHook = () => gate.opened;
    const client = await raw();
    await client.greet();
    client.send(optionBytes(OPT.GO, infoQuery('disk')));
    const from = performance.now();
    await until(() => performance.now() > from + 500, 'more than its time has passed');
    expect(closes).toEqual([]);
    gate.open();
    expect((await client.readOptionReply()).type).toBe(REP.INFO);
  });

  test('time in which the server was stopped does not count against a client, in the handshake or idle', async () => {
    const { raw, opened, closes } = await startServer({ limits: { handshakeTimeoutMs: 1300, idleTimeoutMs: 1300 } });
    const idle = await opened();
    const client = await raw();
    await client.greet();
    client.send(optionBytes(OPT.INFO, infoQuery('disk')));
    idle.request({ type: CMD.READ, offset: 4, length: 4 });
    standStill(1600);
    expect((await client.readOptionReply()).type).toBe(REP.INFO);
    expect((await idle.readReply(4)).data).toEqual(uint32(5));
    expect(closes).toEqual([]);
  });

  test('if the server does not open an export in time, the close reason says so, and the device is closed once it is open', async () => {
    const { raw, provider, allOver, closes } = await startServer({ limits: { openTimeoutMs: 1000 } });
    const gate = new Gate();
    provider.openHook = () => gate.opened;
    const client = await raw();
    await client.greet();
    client.send(optionBytes(OPT.GO, infoQuery('disk')));
    await client.readToEnd();
    gate.open();
    await allOver();
    expect(provider).toMatchObject({ opened: 1, closed: 1 });
    expect(closes[0]?.reason).toBe('the server has not opened the export "disk" within 1000 ms');
  });

  test('a connection beyond the limit is closed at once, and admitted when another has left', async () => {
    const { opened, raw, server, closes } = await startServer({ limits: { maxConnections: 2 } });
    const first = await opened();
    const second = await opened();
    expect(await (await raw()).readToEnd()).toHaveLength(0);
    expect(server.connections.size).toBe(2);
    second.request({ type: CMD.DISC });
    await until(() => closes.length === 1 && server.connections.size === 1, 'one has left');
    const third = await opened();
    for (const client of [first, third]) {
      client.request({ type: CMD.READ, offset: 8, length: 4 });
      expect((await client.readReply(4)).data).toEqual(uint32(9));
    }
  });
});

describe('listening', () => {
  test('a stale socket file is replaced', async () => {
    const path = join(await temporaryDirectory(), 'nbd.sock');
    await leaveStaleSocket(path);
    const { server } = idleServer();
    expect(await server.listen({ path })).toEqual({ transport: 'unix', path });
    await isServed({ path });
  });

  test('a socket path with a listener is refused, and the listener continues to work', async () => {
    const { path } = await startServer();
    const error = await listenError(idleServer().server, { path });
    expect(error).toMatchObject({ code: 'IN_USE', message: `another server is listening on ${path}` });
    await isServed({ path });
  });

  test('a regular file is refused and left alone', async () => {
    const path = join(await temporaryDirectory(), 'precious');
    await writeFile(path, 'data');
    const error = await listenError(idleServer().server, { path });
    expect(error.code).toBe('NOT_A_SOCKET');
    expect(error.message).toContain(`${path} exists and is not a socket`);
    expect(await readFile(path, 'utf8')).toBe('data');
  });

  test('a directory is refused', async () => {
    const path = join(await temporaryDirectory(), 'directory');
    await mkdir(path);
    expect((await listenError(idleServer().server, { path })).code).toBe('NOT_A_SOCKET');
  });

  test('a path too long for a unix socket is refused by server and client, not cut off', async () => {
    const directory = await temporaryDirectory();
    const path = join(directory, 'x'.repeat(108));
    const says = new RegExp(`${path}: the path has \\d+ bytes, and that of a unix socket at most \\d+$`);
    expect(await listenError(idleServer().server, { path })).toMatchObject({
      code: 'FAILED',
      message: expect.stringMatching(says) as unknown,
    });
    expect(await readdir(directory)).toEqual([]);
    await expect(NbdClient.connect({ path })).rejects.toMatchObject({
      code: 'CLOSED',
      message: expect.stringMatching(says) as unknown,
    });
  });

  test('a path in a directory that does not exist is refused with the path in the message', async () => {
    const path = join(await temporaryDirectory(), 'nowhere', 'nbd.sock');
    const error = await listenError(idleServer().server, { path });
    expect(error.code).toBe('FAILED');
    expect(error.message).toContain(path);
  });

  test('after an address that cannot be used a server can listen at another one', async () => {
    const directory = await temporaryDirectory();
    const { server } = idleServer();
    await listenError(server, { path: join(directory, 'nowhere', 'nbd.sock') });
    const path = join(directory, 'nbd.sock');
    await server.listen({ path });
    await isServed({ path });
  });

  test('a socket file whose permissions cannot be set is not listened on', async () => {
    const path = join(await temporaryDirectory(), 'nbd.sock');
    const { server } = idleServer();
    const failing = listenError(server, { path, mode: 0o600 });
    // It is there already. A second name, by which it can still be reached.
    const second = `${path}2`;
    renameSync(path, second);
    expect((await failing).message).toContain('ENOENT');
    const refused = await new Promise((resolve) =>
      net.connect({ path: second }, () => resolve('no')).on('error', resolve),
    );
    expect(refused).toMatchObject({ code: 'ECONNREFUSED' });
  });

  for (const mode of [0o600, 0o660, 0o666]) {
    test(`a socket file has mode ${mode.toString(8)} if requested, whatever the umask`, async () => {
      const path = join(await temporaryDirectory(), 'nbd.sock');
      const umask = await ownUmask();
      await idleServer().server.listen({ path, mode });
      expect((await stat(path)).mode & 0o777).toBe(mode);
      expect(await ownUmask()).toBe(umask);
    });
  }

  test('TCP port 0 is any free port, which listen() returns', async () => {
    const { server } = idleServer();
    const bound = await server.listen({ host: '127.0.0.1', port: 0 });
    if (bound.transport !== 'tcp') throw new Error('not a TCP address');
    expect(bound.port).toBeGreaterThan(0);
    await isServed({ host: bound.host, port: bound.port });
  });

  test('a TCP port in use is refused with the address in the message', async () => {
    const bound = await idleServer().server.listen({ host: '127.0.0.1', port: 0 });
    if (bound.transport !== 'tcp') throw new Error('not a TCP address');
    const error = await listenError(idleServer().server, { host: '127.0.0.1', port: bound.port });
    expect(error.code).toBe('IN_USE');
    expect(error.message).toContain(`127.0.0.1:${bound.port}`);
  });

  test('a server listens at several addresses, and close() ends all listeners', async () => {
    const directory = await temporaryDirectory();
    const { server } = idleServer();
    const paths = [join(directory, 'a.sock'), join(directory, 'b.sock')];
    for (const path of paths) await server.listen({ path });
    const tcp = await server.listen({ host: '127.0.0.1', port: 0 });
    if (tcp.transport !== 'tcp') throw new Error('not a TCP address');
    for (const path of paths) await isServed({ path });
    await isServed({ host: tcp.host, port: tcp.port });
    await server.close();
    for (const path of paths) await expect(RawClient.connect({ path })).rejects.toThrow();
    await expect(RawClient.connect({ host: tcp.host, port: tcp.port })).rejects.toThrow('ECONNREFUSED');
  });
});

describe('serveConnection()', () => {
  test('serves a stream from the greeting on, with the given peer', async () => {
    const { server, opens } = await startServer();
    const pair = duplexPair();
    const id = server.serveConnection(pair.server);
    const client = new RawClient(pair.client);
    await client.open('disk');
    client.request({ type: CMD.READ, offset: 4, length: 4 });
    expect((await client.readReply(4)).data).toEqual(uint32(5));
    const peer = { transport: 'internal', address: `connection ${id}` };
    expect(opens).toEqual([{ id, exportName: 'disk', peer, violations: 0 }]);
  });

  test('takes bytes that were already read from the socket as the first input', async () => {
    const { server, opens } = await startServer();
    const pair = duplexPair();
    const peer = { transport: 'tcp', address: '192.0.2.1:4242' } as const;
    const sent = Buffer.concat([uint32(3), optionBytes(OPT.GO, infoQuery('disk'))]);
    server.serveConnection(pair.server, { peer, head: sent.subarray(0, 21) });
    const client = new RawClient(pair.client);
    client.send(sent.subarray(21), requestBytes({ type: CMD.READ, offset: 8, length: 4 }));
    await client.read(GREETING_SIZE);
    await client.readOptionReply();
    await client.readOptionReply();
    expect((await client.readReply(4)).data).toEqual(uint32(9));
    expect(opens[0]?.peer).toEqual(peer);
  });

  test('serves a socket that was paused after its head was read', async () => {
    const { server } = await startServer();
    const path = join(await temporaryDirectory(), 'front.sock');
    const front = net.createServer((socket) => {
      socket.once('data', (head: Buffer) => {
        socket.pause();
        server.serveConnection(socket, { head });
      });
    });
    onTestFinished(() => void front.close());
    await new Promise<void>((resolve) => front.listen(path, resolve));
    const client = await RawClient.connect({ path });
    client.send(uint32(3));
    await client.read(GREETING_SIZE);
    await client.option(OPT.GO, infoQuery('disk'));
    client.request({ type: CMD.READ, offset: 8, length: 4 });
    expect((await client.readReply(4)).data).toEqual(uint32(9));
  });

  test('with a destroyed socket ends like a lost client', async () => {
    const { server, closes, allOver } = await startServer();
    const pair = duplexPair();
    pair.server.destroy();
    server.serveConnection(pair.server);
    await until(() => closes.length === 1, 'the close is reported');
    await allOver();
  });
});

describe('reports', () => {
  test('every connection is reported opened and closed once, with its counts', async () => {
    const { opened, opens, closes, path, allOver } = await startServer();
    const client = await opened();
    client.request({ type: CMD.READ, length: 1000 });
    await client.readReply(1000);
    client.request({ type: CMD.WRITE, offset: 4096, length: 300 }, Buffer.alloc(300));
    await client.readReply();
    client.request({ type: CMD.FLUSH });
    await client.readReply();
    client.request({ type: 0xffff });
    await client.readReply();
    client.request({ type: CMD.DISC });
    await client.readToEnd();
    await allOver();
    const peer = { transport: 'unix', address: path };
    expect(opens).toEqual([{ id: 1, peer, exportName: 'disk', violations: 0 }]);
    expect(closes).toHaveLength(1);
    expect(closes[0]).toMatchObject({
      ...{ id: 1, peer, exportName: 'disk', reason: 'the client disconnected' },
      ...{ bytesRead: 1000, bytesWritten: 300, requests: 4, errors: 1, violations: 0 },
    });
  });

  test('every request is reported, refused ones with their error', async () => {
    const { opened, requests } = await startServer();
    const client = await opened();
    client.request({ type: CMD.WRITE, flags: 1, offset: 4096, length: 4 }, uint32(1));
    client.request({ type: CMD.READ, offset: 2 ** 40, length: 4 });
    await client.readReply();
    await client.readReply();
    expect(requests).toEqual([
      { id: 1, type: CMD.WRITE, command: 'WRITE', flags: 1, offset: 4096, length: 4, refusedWith: 0 },
      { id: 1, type: CMD.READ, command: 'READ', flags: 0, offset: 2 ** 40, length: 4, refusedWith: NBD_ERRNO.EINVAL },
    ]);
  });

  test('`connections` has phase, export, counts and requests in flight', async () => {
    const { raw, server, provider } = await startServer();
    const gate = new Gate();
    provider.hook = () => gate.opened;
    const client = await raw();
    await client.read(GREETING_SIZE);
    const [connection] = server.connections.values();
    expect(connection).toMatchObject({ phase: 'handshake', exportName: undefined, inFlight: 0, requests: 0 });
    client.send(uint32(3));
    await client.option(OPT.GO, infoQuery('disk'));
    client.request({ type: CMD.READ, length: 512 });
    await until(() => connection?.inFlight === 1, 'a read is in flight');
    expect(connection).toMatchObject({ phase: 'transmission', exportName: 'disk', requests: 1, bytesRead: 0 });
    gate.open();
    await client.readReply(512);
    expect(connection).toMatchObject({ inFlight: 0, bytesRead: 512, errors: 0 });
  });

  test('a program without listeners for the reports is served all the same', async () => {
    const { server } = idleServer();
    const path = join(await temporaryDirectory(), 'nbd.sock');
    await server.listen({ path });
    const client = await NbdClient.connect({ path });
    await client.go('disk');
    await client.disconnect();
  });
});
