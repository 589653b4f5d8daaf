/**
 * Random and broken input for the control socket: requests, upgrades, parts of them, several at once, and clients that leave at any
 * moment. The daemon survives, logs no fault of its own, and keeps nothing of them. For a longer run:
 * SHEEPGATE_FUZZ_INPUTS=100000 SHEEPGATE_FUZZ_SEED=7 npx vitest run --project own test/daemon/control-fuzz.test.ts
 */
import fs from 'node:fs';
import net from 'node:net';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { Random } from '../../nbd/test/fuzz/random.js';
import { ControlClient } from '../../src/operations/control-client.js';
import { startDaemon, waitUntil, type Daemon } from '../harness/daemon.js';

const INPUTS = Number(process.env.SHEEPGATE_FUZZ_INPUTS ?? 2_000);
const SEED = Number(process.env.SHEEPGATE_FUZZ_SEED ?? 1);
const AT_ONCE = 8;
/** After this time an input is given up whose connection both sides leave open. */
const PATIENCE_MS = 50;

const METHODS = ['GET', 'POST', 'DELETE', 'PUT', 'CONNECT', 'OPTIONS', 'HEAD', 'TRACE', 'PRI', ''];
const PATHS = [
  '/status',
  '/vdis',
  '/vdis?details=1',
  '/vdis/disk',
  '/vdis/disk/changes?since=disk&offset=0',
  '/vdis/disk/resize',
  '/vdis/disk/snapshots',
  '/vdis/disk/begin',
  '/vdis/disk/finish',
  '/vdis/disk%40tag/clone',
  '/vdis/disk%40tag/rollback',
  '/exports/disk%40now',
  '/sessions/1',
  '/check',
  '/reload',
  '/nbd',
  '//',
  '/%',
  'http://[',
  '*',
  '',
];
const BODIES: readonly string[] = [
  '',
  '{}',
  'null',
  '[',
  '{"name":"disk2","size":4194304}',
  '{"tag":"tag"}',
  '{"size":8388608,"force":true,"forceInUse":true}',
  '{"by":"import","run":"ab","of":"","size":4194304}',
  '{"run":"ab"}',
  '{"repair":true}',
  `{"name":"${'n'.repeat(70_000)}"}`,
];
const HEADERS = [
  'Connection: close',
  'Connection: Upgrade\r\nUpgrade: nbd',
  'Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==',
  'Connection: Upgrade\r\nUpgrade: h2c',
  'Expect: 100-continue',
  'Transfer-Encoding: chunked',
  'Content-Length: -1',
  'Content-Length: 99999999999',
  `Cookie: ${'c'.repeat(20_000)}`,
  'Host: a\r\nHost: b',
];

function request(random: Random): Buffer {
  const body = random.pick(BODIES);
  const headers = Array.from({ length: random.below(3) }, () => random.pick(HEADERS));
  if (!random.oneIn(8)) headers.push(`Content-Length: ${Buffer.byteLength(body)}`);
  const version = random.oneIn(20) ? 'HTTP/9.9' : 'HTTP/1.1';
  const head = [`${random.pick(METHODS)} ${random.pick(PATHS)} ${version}`, 'Host: control', ...headers].join('\r\n');
  const whole = Buffer.from(`${head}\r\n\r\n${body}`);
  if (random.oneIn(3)) return whole;
  // The beginning of an NBD client: its flags and the beginning of an option.
  if (random.oneIn(3)) return Buffer.concat([whole, Buffer.from([0, 0, 0, 3]), random.bytes(random.below(64))]);
  return random.mutate(whole);
}

/** Resolves when the connection is over. */
function send(socketPath: string, random: Random): Promise<void> {
  const input = Buffer.concat(Array.from({ length: 1 + random.below(3) }, () => request(random)));
  const leaving = random.below(4);
  return new Promise((resolve) => {
    const socket = net.connect(socketPath, () => {
      for (const chunk of random.split(input)) socket.write(chunk);
      if (leaving === 0) socket.destroy();
      else if (leaving === 1) socket.end();
    });
    // The connection may be reset, or closed while we write.
    socket.on('error', () => undefined).on('close', () => resolve());
    if (leaving === 2) socket.once('data', () => socket.destroy());
    else socket.resume();
    socket.setTimeout(PATIENCE_MS, () => socket.destroy());
  });
}

function descriptorsOf(pid: number): string[] {
  const directory = `/proc/${pid}/fd`;
  return fs.readdirSync(directory).flatMap((fd) => {
    try {
      return [fs.readlinkSync(`${directory}/${fd}`)];
    } catch {
      return []; // closed since
    }
  });
}

/** The other descriptors belong to the store, which keeps the files that it has used. */
function socketsOf(pid: number): number {
  return descriptorsOf(pid).filter((target) => target.startsWith('socket:')).length;
}

test('random and broken requests on the control socket do not harm the daemon', async () => {
  const daemon = await startDaemon({ args: ['--create', 'disk:4M'] });
  const pid = daemon.child.pid ?? 0;
  const control = new ControlClient(daemon.control);
  await control.status();
  const before = socketsOf(pid);
  let next = 0;
  const client = async (): Promise<void> => {
    while (next < INPUTS) {
      const seed = SEED + next++;
      await send(daemon.control, new Random(seed));
      if (daemon.child.exitCode !== null || daemon.child.signalCode !== null) {
        throw new Error(`it ended at seed ${seed} or a few before: ${daemon.log().slice(-2_000)}`);
      }
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, client));
  // Nothing of them is left, and the daemon still works.
  await waitUntil(async () => (await control.status()).connections.length === 0, 'all connections are over');
  await waitUntil(() => socketsOf(pid) <= before, 'their sockets are closed').catch((e: unknown) => {
    console.log(before, descriptorsOf(pid));
    throw e;
  });
  const vdis = await control.call<{ name: string }[]>('GET', '/vdis');
  expect(vdis).toEqual(expect.any(Array));
  expect(daemon.log()).not.toMatch(/"level":[56]0/);
  expect(await daemon.stop()).toEqual({ code: 0, signal: null });
}, 600_000);

describe('a client that requests an upgrade and leaves at once ends only its own connection', () => {
  let daemon: Daemon;
  beforeAll(async () => {
    daemon = await startDaemon();
  });
  afterAll(async () => expect(await daemon.stop()).toEqual({ code: 0, signal: null }));

  test.each(['websocket', 'h2c', 'nbd'])('to %s', async (protocol) => {
    for (let n = 0; n < 50; n++) {
      await new Promise<void>((resolve) => {
        const socket = net.connect(daemon.control, () => {
          socket.write(`GET /nbd HTTP/1.1\r\nHost: c\r\nConnection: Upgrade\r\nUpgrade: ${protocol}\r\n\r\n`, () =>
            socket.destroy(),
          );
        });
        socket.on('error', () => undefined).on('close', () => resolve());
      });
    }
    expect((await new ControlClient(daemon.control).status()).pid).toBe(daemon.child.pid);
  });
});
