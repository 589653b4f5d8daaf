/** The division of the daemon's file descriptors: too many clients never use up those of others. */
import net from 'node:net';
import { describe, expect, onTestFinished, test } from 'vitest';
import { NbdClient } from 'nbd-server-ts';
import { divideDescriptors, shortageOf } from '../../src/daemon/descriptor-budget.js';
import { cli, startDaemon, waitUntil } from '../harness/daemon.js';

const OBJECT = 4 * 2 ** 20;
const LIMIT = 256;
const TIGHT = ['/bin/sh', '-c', `ulimit -n ${LIMIT} && exec "$@"`, 'sh'];

describe('the division', () => {
  test('never exceeds the limit of descriptors, with any options', () => {
    for (let limit = LIMIT; limit < 70_000; limit = Math.ceil(limit * 1.3)) {
      for (const wanted of [1, 16, 1024, 1_000_000]) {
        const { connections, controlConnections, objectFiles, keptMoments } = divideDescriptors(limit, wanted);
        const given = 2 * connections + controlConnections + objectFiles + 2 * keptMoments;
        expect(given, `${limit}, ${wanted}`).toBeLessThanOrEqual(limit - 128);
        expect(Math.min(connections, controlConnections), `${limit}, ${wanted}`).toBeGreaterThan(0);
        expect(objectFiles, `${limit}, ${wanted}`).toBeGreaterThanOrEqual(16);
      }
    }
  });

  test('gives all wanted connections with the limit that it recommends, and not with less', () => {
    for (const wanted of [100, 1024, 10_000]) {
      const { neededLimit } = divideDescriptors(128, wanted);
      expect(divideDescriptors(neededLimit, wanted)).toMatchObject({ connections: wanted, neededLimit: undefined });
      expect(divideDescriptors((neededLimit ?? 0) - 128, wanted).connections).toBeLessThan(wanted);
    }
  });

  test('does not warn if the limit suffices', () => {
    expect(shortageOf(divideDescriptors(65_536, 1024), 1024)).toBeUndefined();
    expect(shortageOf(divideDescriptors(1024, 1024), 1024)).toContain('allows 308 connections, not 1024');
  });
});

test('idle connections are refused before others lack a file, and the start says how many are possible', async () => {
  const daemon = await startDaemon({
    args: ['--create', 'disk:1G', '--max-connections-per-peer', '1000'],
    under: TIGHT,
  });
  const { connections } = divideDescriptors(LIMIT, 1024);
  await daemon.logged(`the limit of ${LIMIT} open files allows ${connections} connections, not 1024`);
  await daemon.logged(new RegExp(`"openFiles":${LIMIT},"maxConnections":${connections},"objectFiles":\\d+`));
  const open = async (): Promise<NbdClient> => {
    const client = await NbdClient.connect({ path: daemon.socket });
    onTestFinished(() => client.destroy());
    await client.go('disk');
    return client;
  };
  const client = await open();
  let refused = 0;
  for (let n = 0; n < LIMIT; n++) await open().catch(() => refused++);
  expect(refused).toBe(LIMIT - (connections - 1));
  // More objects at once than there are descriptors for.
  const objects = Array.from({ length: 250 }, (_, n) => n * OBJECT);
  await Promise.all(objects.map((offset) => client.write(offset, Buffer.alloc(4096, 7))));
  await client.flush();
  const data = await Promise.all(objects.map((offset) => client.read(offset, 4096)));
  expect(data.every((each) => each.equals(Buffer.alloc(4096, 7)))).toBe(true);
  expect((await cli(['vdi', 'snapshot', 'disk', 's'], { store: daemon.store })).code).toBe(0);
  await Promise.all(objects.map((offset) => client.write(offset + 8192, Buffer.alloc(512, 8))));
  await client.flush();
  await waitUntil(() => daemon.log().includes('connection refused'), 'the refusals are logged');
  expect(daemon.log()).not.toContain('"level":50');
  expect((await daemon.stop()).code).toBe(0);
});

test('with the lowest limit, clients with a disk each lack nothing, even beside clients that break the protocol', async () => {
  const { connections } = divideDescriptors(LIMIT, 1024);
  const names = Array.from({ length: connections - 1 }, (_, n) => `d${n}`);
  const daemon = await startDaemon({
    args: [...names.flatMap((name) => ['--create', `${name}:1G`]), '--max-connections-per-peer', '1000'],
    under: TIGHT,
  });
  const clients: NbdClient[] = [];
  for (const name of names) {
    const client = await NbdClient.connect({ path: daemon.socket });
    onTestFinished(() => client.destroy());
    await client.go(name);
    clients.push(client);
  }
  // Sockets that are held open for a while and are no connections any more: 64 of them.
  for (let n = 0; n < 80; n++) {
    const socket = net.connect(daemon.socket);
    onTestFinished(() => void socket.destroy());
    socket.on('error', () => undefined).write(Buffer.alloc(20, 'x'));
    await waitUntil(() => socket.bytesRead > 0 || socket.destroyed, 'it was greeted, or refused');
  }
  for (let n = 0; n < 4; n++) {
    await Promise.all(
      clients.flatMap((client) =>
        [0, 1, 2, 3].map((m) => client.write((4 * n + m) * OBJECT, Buffer.alloc(512, n + 1))),
      ),
    );
    await Promise.all(clients.map((client) => client.flush()));
    const read = await Promise.all(clients.map((client) => client.read(4 * n * OBJECT, 512)));
    expect(read.every((each) => each.equals(Buffer.alloc(512, n + 1)))).toBe(true);
  }
  expect(daemon.log()).not.toContain('"level":50');
  expect((await daemon.stop()).code).toBe(0);
});

test('too low a limit is an error at the start', async () => {
  await expect(startDaemon({ under: ['/bin/sh', '-c', 'ulimit -n 255 && exec "$@"', 'sh'] })).rejects.toThrow(
    /the limit of 255 open files is too low/,
  );
});
