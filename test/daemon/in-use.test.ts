/**
 * A disk that was open when a daemon ended, or whose client was cut off, counts as in use: through a daemon, without one, and on a
 * cluster. No command replaces or removes its content without --force.
 */
import fs from 'node:fs';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, onTestFinished, test, vi } from 'vitest';
import { NbdClient } from 'nbd-server-ts';
import { startDaemon, temporaryDirectory, waitUntil, type Daemon } from '../harness/daemon.js';
import { attach, MIB, storeWith, WAYS, type TestStore } from '../cli/both-ways.js';
import { startStandIn, type TestCluster } from '../sheep/clusters.js';

const SIZE = 8 * MIB;
const IN_USE = /is in use by process \d+ \(.+\), which was cut off at \S+ and may come back until \S+: it cannot be/;

const image = path.join(temporaryDirectory(), 'image');
fs.writeFileSync(image, Buffer.alloc(SIZE, 7));

async function daemonWith(args: readonly string[] = []): Promise<Daemon> {
  return startDaemon({ args: ['--create', `disk:${SIZE}`, ...args] });
}

/** All commands that would replace or remove content which a client of `disk` relies on; there is a snapshot `before`. */
const REPLACING: readonly (readonly string[])[] = [
  ['vdi', 'rollback', 'disk@before'],
  ['vdi', 'resize', 'disk', '4M', '--force'],
  ['vdi', 'delete', 'disk'],
  ['import', image, 'disk', '--overwrite'],
];

for (const how of ['SIGKILL', 'SIGTERM'] as const) {
  for (const way of WAYS) {
    test(`after ${how} of the daemon a disk that was open is in use, ${way}, until its client has come back and left`, async () => {
      const daemon = await daemonWith();
      const { store } = daemon;
      const offline = storeWith(store, undefined);
      const guest = await attach(daemon, 'disk');
      await guest.write(0, Buffer.alloc(512, 1));
      await storeWith(store, daemon).ok('vdi', 'snapshot', 'disk', 'before');
      const backups = path.join(temporaryDirectory(), 'backups');
      await storeWith(store, daemon).ok('backup', 'disk', '--to', backups, '--no-base');
      await guest.write(0, Buffer.alloc(512, 2));
      await guest.flush();
      await (how === 'SIGKILL' ? daemon.kill() : daemon.stop());
      guest.destroy();

      const again = way === 'through a daemon' ? await startDaemon({ store }) : undefined;
      const target = again ? storeWith(store, again) : offline;
      await target.run(['vdi', 'list']); // says that the store was not shut down cleanly
      for (const command of [...REPLACING, ['restore', backups, 'disk', '--overwrite']]) {
        expect(await target.fails(...command), command.join(' ')).toMatch(IN_USE);
      }
      expect(await target.ok('vdi', 'show', 'disk')).toMatch(
        /in use +by process \d+ \(.+\), since \S+, cut off \S+, may come back until \S+\n/,
      );
      const shown = await target.json<{ clients: { client: string; until: string }[] }>('vdi', 'show', 'disk');
      expect(shown.clients).toHaveLength(1);
      await target.ok('vdi', 'resize', 'disk', '16M'); // growing takes nothing away

      const served = again ?? (await startDaemon({ store }));
      const back = await attach(served, 'disk');
      const head = Buffer.alloc(512);
      await back.readInto(0, head);
      expect(head.equals(Buffer.alloc(512, 2))).toBe(true);
      await back.disconnect();
      const online = storeWith(store, served);
      await waitUntil(async () => !/in use/.test(await online.ok('vdi', 'show', 'disk')), 'it is not in use');
      if (!again) await served.stop();
      await target.ok('vdi', 'rollback', 'disk@before');
      await target.ok('vdi', 'delete', 'disk');
    });
  }
}

/** Wait until the use that `vdi show` says to last until a time has ended, without asking all that time. */
async function usePasses(target: TestStore, pattern: RegExp): Promise<void> {
  const { clients } = await target.json<{ clients: { until?: string | null }[] }>('vdi', 'show', 'disk');
  const ends = clients.flatMap(({ until }) => (until ? [Date.parse(until)] : []));
  await new Promise((resolve) => setTimeout(resolve, Math.max(0, ...ends) - Date.now()));
  await waitUntil(async () => !pattern.test(await target.ok('vdi', 'show', 'disk')), 'its time has passed');
}

describe('a client that was cut off', () => {
  async function lost(daemon: Daemon, target: TestStore, name = 'disk'): Promise<void> {
    const client = await attach(daemon, name);
    client.destroy();
    await waitUntil(async () => /cut off/.test(await target.ok('vdi', 'show', name)), 'it is cut off');
  }

  test('does not count any more after --force', async () => {
    const daemon = await daemonWith();
    const target = storeWith(daemon.store, daemon);
    await target.ok('vdi', 'snapshot', 'disk', 'before');
    await lost(daemon, target);
    expect(await target.fails('vdi', 'rollback', 'disk@before')).toMatch(
      /unless --force says that no client will come back/,
    );
    await target.ok('vdi', 'rollback', 'disk@before', '--force');
    expect(await target.ok('vdi', 'show', 'disk')).not.toMatch(/in use/);
    await lost(daemon, target);
    expect(await target.fails('vdi', 'resize', 'disk', '4M', '--force')).toMatch(/unless --force-in-use says/);
    await target.ok('vdi', 'resize', 'disk', '4M', '--force', '--force-in-use');
    await lost(daemon, target);
    await target.ok('import', image, 'other');
    const small = path.join(temporaryDirectory(), 'small');
    fs.writeFileSync(small, Buffer.alloc(MIB, 3));
    await target.ok('import', small, 'disk', '--overwrite', '--force');
    await lost(daemon, target);
    await target.ok('vdi', 'delete', 'disk', '--force');
    await target.ok('vdi', 'delete', 'disk@before');
    await target.ok('vdi', 'create', 'disk', '8M');
  });

  test('after its time it does not count any more, also with the daemon stopped', async () => {
    const daemon = await daemonWith(['--in-use-time', '6']);
    const target = storeWith(daemon.store, daemon);
    const client = await attach(daemon, 'disk');
    await target.ok('vdi', 'snapshot', 'disk', 'before');
    await daemon.kill();
    client.destroy();
    const offline = storeWith(daemon.store, undefined);
    await offline.run(['vdi', 'list']); // says that the store was not shut down cleanly
    expect(await offline.fails('vdi', 'rollback', 'disk@before')).toMatch(IN_USE);
    await usePasses(offline, /in use/);
    await offline.ok('vdi', 'rollback', 'disk@before');
  });

  test('the tag of a snapshot whose reader was cut off is not reused, and the snapshot is not deleted', async () => {
    const daemon = await daemonWith();
    const target = storeWith(daemon.store, daemon);
    await target.ok('vdi', 'snapshot', 'disk', 'monday');
    await lost(daemon, target, 'disk@monday');
    expect(await target.fails('vdi', 'delete', 'disk@monday')).toMatch(IN_USE);
    expect(await target.fails('vdi', 'snapshot', 'disk', 'monday')).toMatch(/has a snapshot "monday" already|in use/);
    const back = await attach(daemon, 'disk@monday');
    await back.disconnect();
    await waitUntil(async () => !/in use/.test(await target.ok('vdi', 'show', 'disk@monday')), 'it has left');
    await target.ok('vdi', 'delete', 'disk@monday');
    await target.ok('vdi', 'snapshot', 'disk', 'monday');
  });

  test('its disk is still in use after kill -9, if its old connection ends only after it has come back', async () => {
    const daemon = await daemonWith(['--listen', 'tcp:127.0.0.1:0', '--in-use-time', '3']);
    const target = storeWith(daemon.store, daemon);
    const port = Number(/:(\d+)$/.exec(daemon.ready.listeners.find((each) => each.startsWith('tcp')) ?? '')?.[1]);
    const connect = async (): Promise<NbdClient> => {
      const client = await NbdClient.connect({ host: '127.0.0.1', port });
      await client.go('disk');
      return client;
    };
    const old = await connect();
    await old.write(0, Buffer.alloc(512, 1));
    const back = await connect();
    old.destroy();
    await waitUntil(async () => /cut off/.test(await target.ok('vdi', 'show', 'disk')), 'the old one is seen to end');
    await usePasses(target, /cut off/);
    await back.write(0, Buffer.alloc(512, 2));
    await back.flush();
    await daemon.kill();
    back.destroy();
    const offline = storeWith(daemon.store, undefined);
    const { code, stderr } = await offline.run(['vdi', 'delete', 'disk']);
    expect({ code, stderr }).toMatchObject({
      code: 1,
      stderr: expect.stringMatching(/is in use by tcp 127\.0\.0\.1,/) as unknown,
    });
  });

  test('another client at its address that only looks does not end its use', async () => {
    const daemon = await daemonWith(['--listen', 'tcp:127.0.0.1:0']);
    const target = storeWith(daemon.store, daemon);
    const port = Number(/:(\d+)$/.exec(daemon.ready.listeners.find((each) => each.startsWith('tcp')) ?? '')?.[1]);
    const connect = async (): Promise<NbdClient> => {
      const client = await NbdClient.connect({ host: '127.0.0.1', port });
      await client.go('disk');
      return client;
    };
    (await connect()).destroy();
    await waitUntil(async () => /cut off/.test(await target.ok('vdi', 'show', 'disk')), 'it is cut off');
    await (await connect()).disconnect();
    await waitUntil(async () => /open +no/.test(await target.ok('vdi', 'show', 'disk')), 'the other client is gone');
    expect(await target.fails('vdi', 'delete', 'disk')).toMatch(/is in use by tcp 127\.0\.0\.1,/);
    const back = await connect();
    await back.write(0, Buffer.alloc(512, 1));
    await back.disconnect();
    await waitUntil(async () => !/in use/.test(await target.ok('vdi', 'show', 'disk')), 'it has left');
    await target.ok('vdi', 'delete', 'disk');
  });
});

describe('a client that is connected', () => {
  let target: TestStore;
  let client: NbdClient;

  beforeAll(async () => {
    const daemon = await daemonWith();
    target = storeWith(daemon.store, daemon);
    await target.ok('vdi', 'snapshot', 'disk', 'before');
    client = await attach(daemon, 'disk');
  });
  afterAll(() => client.disconnect());

  for (const command of [...REPLACING, ['check', '--repair']]) {
    test(`${command.slice(0, 2).join(' ')} names the client that has the disk open, and --force does not help`, async () => {
      const says =
        command[0] === 'check'
          ? /disk is open; a check needs all clients disconnected: process \d+ \(.+\), since \S+\n$/
          : /disk is open by 1 connection and cannot be .* now; disconnect first: process \d+ \(.+\), since \S+\n$/;
      expect(await target.fails(...command)).toMatch(says);
      if (!command.includes('--force') && command[0] !== 'check') {
        expect(await target.fails(...command, '--force')).toMatch(says);
      }
    });
  }
});

describe('on a cluster', () => {
  const clusters: TestCluster[] = [];
  afterAll(async () => {
    for (const cluster of clusters) await cluster.stop();
  });

  test('it is remembered by this machine, also for commands without a daemon', async () => {
    const cluster = await startStandIn();
    clusters.push(cluster);
    const state = temporaryDirectory();
    vi.stubEnv('SHEEPGATE_STATE', state);
    onTestFinished(() => void vi.unstubAllEnvs());
    const daemon = await startDaemon({ cluster: cluster.address, args: ['--create', `disk:${SIZE}`] });
    const online = storeWith(daemon.store, daemon, ['--cluster', cluster.address, '--control', daemon.control]);
    await online.ok('vdi', 'snapshot', 'disk', 'before');
    const guest = await attach(daemon, 'disk');
    const reader = await attach(daemon, 'disk@now:run');
    await daemon.kill();
    guest.destroy();
    reader.destroy();
    const command = async (...args: string[]): Promise<{ code: number | null; stdout: string; stderr: string }> =>
      storeWith(daemon.store, undefined, ['--cluster', cluster.address]).run(args);
    for (const args of REPLACING) expect((await command(...args)).stderr, args.join(' ')).toMatch(IN_USE);
    const again = await startDaemon({ cluster: cluster.address });
    await expect(attach(again, 'disk@now:run')).rejects.toThrow(/has ended \(the daemon ended\)/);
    const back = await attach(again, 'disk');
    await back.disconnect();
    expect((await again.stop()).code, again.log()).toBe(0);
    expect((await command('vdi', 'rollback', 'disk@before')).stderr).toBe('');
    expect(fs.readdirSync(path.join(state, fs.readdirSync(state)[0] ?? '')).length).toBe(1); // the label
  });

  test('where nothing can be remembered, a label is refused at once', async () => {
    const cluster = await startStandIn();
    clusters.push(cluster);
    const state = path.join(temporaryDirectory(), 'file');
    fs.writeFileSync(state, '');
    const daemon = await startDaemon({
      cluster: cluster.address,
      args: ['--create', `disk:${SIZE}`],
      env: { SHEEPGATE_STATE: state },
    });
    await daemon.logged(/SHEEPGATE_STATE names another directory/);
    await expect(attach(daemon, 'disk@now:run')).rejects.toThrow(/because used labels cannot be stored here/);
    const plain = await attach(daemon, 'disk@now');
    await plain.disconnect();
  });
});
