/** A TCP client that does not read is not taken for a dead one. */
import net from 'node:net';
import { expect, onTestFinished, test } from 'vitest';
import { DeadPeerTimeouts } from '../../src/daemon/dead-peer-timeouts.js';
import { sendState, setUserTimeout } from '../../src/system/socket-calls.js';
import { waitUntil } from '../harness/daemon.js';

const TIMEOUT_MS = 1000;
const LOOK_MS = 100;
/** More than all buffers between the two can hold. */
const BYTES = 64 * 1024 * 1024;

/** What a server sends to a client that does not read, over TCP. */
async function unread(prepare: (socket: net.Socket) => void): Promise<{ server: net.Socket; client: net.Socket }> {
  const listener = net.createServer();
  await new Promise<void>((resolve) => listener.listen(0, '127.0.0.1', resolve));
  const accepted = new Promise<net.Socket>((resolve) => listener.once('connection', resolve));
  const client = net.connect((listener.address() as net.AddressInfo).port, '127.0.0.1');
  client.on('error', () => undefined);
  client.pause();
  const server = await accepted;
  server.on('error', () => undefined);
  onTestFinished(() => {
    client.destroy();
    server.destroy();
    listener.close();
  });
  prepare(server);
  server.write(Buffer.alloc(BYTES));
  await waitUntil(() => sendState(server)?.isWindowClosed === true, 'the client has no more room');
  return { server, client };
}

test('a TCP client that reads nothing for longer than the time-out is served when it reads again', async () => {
  const windows = new DeadPeerTimeouts(TIMEOUT_MS, LOOK_MS);
  onTestFinished(() => windows.stop());
  const { server, client } = await unread((socket) => windows.watch(socket));
  const began = performance.now();
  await waitUntil(() => performance.now() - began > 3 * TIMEOUT_MS, 'three times the time-out has passed');
  expect(server.destroyed).toBe(false);
  let received = 0;
  client.on('data', (chunk: Buffer) => (received += chunk.length));
  client.resume();
  await waitUntil(() => received === BYTES, 'all has come');
  await waitUntil(() => sendState(server)?.isWindowClosed === false, 'there is room again');
});

test('without DeadPeerTimeouts the kernel closes its connection', async () => {
  const { server } = await unread((socket) => setUserTimeout(socket, TIMEOUT_MS));
  await waitUntil(() => server.destroyed, 'the kernel has given it up');
});

test('a unix socket has no such state', () => {
  const socket = new net.Socket();
  expect(sendState(socket)).toBeUndefined();
  const windows = new DeadPeerTimeouts(TIMEOUT_MS, LOOK_MS);
  windows.watch(socket);
  windows.stop();
  socket.destroy();
});
