/**
 * Exclusive opening and two writers with a running daemon: real clients that get a read-only export or are refused, commands that
 * list and disconnect them, access rules and options of `serve`, and probes of clients over TCP and TLS.
 */
import fs from 'node:fs';
import path from 'node:path';
import { NbdClient } from 'nbd-server-ts';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { ControlClient, pathOf } from '../../src/operations/control-client.js';
import { attach, storeWith, testStore, type TestStore } from '../cli/both-ways.js';
import { cli, needs, ok, run, startDaemon, temporaryDirectory, waitUntil, type Daemon } from '../harness/daemon.js';

const BLOCK = 4096;
/** Well below the time that a client which is gone is given. */
const PROMPT_MS = 4_000;
const KEY = '00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff';
const ME = `process ${process.pid} \\(.*\\)`;

interface Listed {
  readonly id: number;
  readonly export: string | null;
  readonly client: string | null;
  readonly access: string | null;
}

describe('a daemon', () => {
  let daemon: Daemon;
  let target: TestStore;
  let port: number;

  beforeAll(async () => {
    const directory = temporaryDirectory();
    const access = path.join(directory, 'access');
    fs.writeFileSync(access, 'allow ruled exclusive=refuse from any\nallow * from any\n');
    const psk = path.join(directory, 'psk');
    fs.writeFileSync(psk, `me:${KEY}\n`, { mode: 0o600 });
    daemon = await startDaemon({
      args: [
        ...['--create', 'disk:64M', '--create', 'shared:64M', '--create', 'ruled:64M', '--access', access],
        ...['--listen', 'tcp:127.0.0.1:0', '--tls', 'on', '--tls-psk', psk],
      ],
    });
    target = storeWith(daemon.store, daemon);
    port = Number(daemon.ready.listeners.find((one) => one.startsWith('tcp:'))?.replace(/.*:/, ''));
  });
  afterAll(async () => {
    expect((await daemon.stop()).code, daemon.log()).toBe(0);
  });

  const idOf = async (name: string): Promise<string> => {
    const listed = await target.json<Listed[]>('client', 'list');
    return String(listed.find((one) => one.export === name)?.id);
  };

  needs(
    'qemu-io',
    'qemu-img',
    'nbdinfo',
  )(
    'lets one client write and others read; the operator sees the writer, cuts it off, and another client takes its place',
    async () => {
      const first = await attach(daemon, 'disk/exclusive');
      await first.write(0, Buffer.alloc(BLOCK, 1));
      const uri = daemon.uri('disk/exclusive');
      const write = ['-f', 'raw', '-c', 'write -P 2 0 4k', '-c', 'read -P 2 0 4k', uri];

      // qemu, which wants to write, is refused; a reader is not.
      const refused = await run('qemu-io', write);
      expect(refused.code, refused.stdout).not.toBe(0);
      expect(refused.stderr).toMatch(/read-only|permission/i);
      expect(await ok('qemu-io', ['-r', '-f', 'raw', '-c', 'read -P 1 0 4k', uri])).toContain('read 4096/4096');
      await ok('qemu-img', ['info', '-f', 'raw', daemon.uri('disk')]);
      const told = JSON.parse(await ok('nbdinfo', ['--json', uri])) as { exports: Record<string, unknown>[] };
      expect(told.exports[0]).toMatchObject({ is_read_only: true, can_multi_conn: false });
      const words = await run('qemu-io', ['-f', 'raw', '-c', 'quit', daemon.uri('disk/exclusive=refuse')]);
      expect(words.stderr).toMatch(new RegExp(`disk is open for writing by ${ME}.*only one client may write it`));
      await daemon.logged('export \\"disk/exclusive=refuse\\" refused: disk is open for writing by');

      const id = await idOf('disk/exclusive');
      const [header, ...rows] = (await target.ok('client', 'list')).trimEnd().split('\n');
      expect(header).toMatch(/^ *ID +EXPORT +ACCESS +CLIENT +SINCE +READ +WRITTEN$/);
      expect(rows).toHaveLength(1);
      expect(rows[0]).toMatch(new RegExp(`^ *${id} +disk/exclusive +exclusive +${ME} +20..-.* 0 B +4 KiB$`));
      const shown = await target.ok('vdi', 'show', 'disk');
      expect(shown).toMatch(new RegExp(`^writer +${ME}, exclusively, writes since 20`, 'm'));
      expect(shown).not.toContain('WARNING');
      expect(await target.json('vdi', 'show', 'disk')).toMatchObject({
        writers: [{ isExclusive: true, client: expect.stringMatching(ME) as string }],
        twoWriters: null,
      });

      expect(await target.fails('client', 'disconnect', '99999')).toContain(
        "there is no connection 99999; 'sheepgate client list' shows all connections",
      );
      expect((await target.run(['client', 'disconnect', 'disk'])).code).toBe(2);
      const control = new ControlClient(daemon.control);
      for (const [one, keepOutMs] of [
        ['x', 0],
        [id, -1],
        [id, 1.5],
        [id, 1e12],
      ] as const) {
        const call = control.call('POST', pathOf('connections', one, 'disconnect'), { body: { keepOutMs } });
        await expect(call).rejects.toMatchObject({ code: 'BAD_REQUEST' });
      }
      expect((await target.run(['client', 'disconnect', id, '--keep-out', 'x'])).code).toBe(2);
      expect(await target.ok('client', 'disconnect', id)).toMatch(
        new RegExp(`^cut off connection ${id} of ${ME} from disk/exclusive\n$`),
      );
      await expect(first.write(0, Buffer.alloc(BLOCK, 3))).rejects.toThrow();
      await expect(attach(daemon, 'disk')).rejects.toThrow(
        /was disconnected from disk at .* and is kept out for \d+ s/,
      );
      expect(await ok('qemu-io', write)).toContain('read 4096/4096');
      await daemon.logged('disconnected by the operator');
      const listed = (): Promise<Listed[]> => target.json('client', 'list');
      await waitUntil(async () => (await listed()).every((one) => one.export === null), 'qemu-io has left');
      expect(await target.ok('vdi', 'show', 'disk')).not.toMatch(/^writer/m);
    },
  );

  needs('qemu-io')(
    'warns in the log and in vdi show when a second client writes, and not when it only opens or reads',
    async () => {
      const first = await attach(daemon, 'shared');
      await first.write(0, Buffer.alloc(BLOCK, 1));
      const qemu = (command: string): Promise<string> =>
        ok('qemu-io', ['-f', 'raw', '-c', command, daemon.uri('shared')]);
      await qemu('read -P 1 0 4k');
      expect(await target.ok('vdi', 'show', 'shared')).not.toContain('WARNING');
      expect(daemon.log()).not.toContain('two clients at once');
      await qemu('write -P 2 0 4k');
      await waitUntil(() => daemon.log().includes('two clients at once'), 'the log warns');
      const line = daemon
        .log()
        .split('\n')
        .find((one) => one.includes('two clients at once'));
      expect(JSON.parse(line ?? '')).toMatchObject({
        level: 40,
        vdi: 'shared',
        clients: [expect.anything(), expect.anything()],
      });
      expect(line).toMatch(
        new RegExp(`shared is written by two clients at once, ${ME} and process \\d+ \\(qemu-io\\)`),
      );
      // Still there after one of them has left.
      const shown = await target.ok('vdi', 'show', 'shared');
      expect(shown).toMatch(
        new RegExp(`^WARNING +written by two clients at once, ${ME} and process \\d+ \\(qemu-io\\)`, 'm'),
      );
      expect(await target.json('vdi', 'show', 'shared')).toMatchObject({
        twoWriters: { clients: [expect.stringMatching(ME), expect.stringMatching(/qemu-io/)] },
      });
      await first.disconnect();
    },
  );

  test('with --keep-out 0 keeps no client out, and disconnects readers, and several clients at once', async () => {
    const writer = await attach(daemon, 'shared/exclusive');
    const reader = await attach(daemon, 'shared@now');
    const ids = [await idOf('shared/exclusive'), await idOf('shared@now')];
    const answer = await target.json<{ isOver: boolean; inFlight: number; connection: Listed }[]>(
      ...['client', 'disconnect', ...ids, '--keep-out', '0'],
    );
    expect(answer).toMatchObject([
      { isOver: true, inFlight: 0, connection: { export: 'shared/exclusive', access: 'exclusive' } },
      { isOver: true, inFlight: 0, connection: { export: 'shared@now', access: 'read-only' } },
    ]);
    for (const client of [writer, reader]) await expect(client.readInto(0, Buffer.alloc(1))).rejects.toThrow();
    const again = await attach(daemon, 'shared/exclusive');
    await again.write(0, Buffer.alloc(BLOCK));
    await again.disconnect();
  });

  test('follows the word of an access rule: the second client of that disk is refused', async () => {
    const first = await attach(daemon, 'ruled');
    expect((await target.json<Listed[]>('client', 'list')).map(({ access }) => access)).toContain('exclusive');
    await expect(attach(daemon, 'ruled')).rejects.toThrow(new RegExp(`ruled is open for writing by ${ME}`));
    await first.disconnect();
    await (await attach(daemon, 'ruled')).disconnect();
  });

  for (const how of ['TCP', 'TLS'] as const) {
    test(`probes the machine of a client over ${how}, and does not disconnect a reachable client`, async () => {
      const tls = how === 'TLS' ? { tls: { psk: { user: 'me', key: Buffer.from(KEY, 'hex') } } } : {};
      const first = await NbdClient.connect({ host: '127.0.0.1', port, ...tls });
      await first.go('disk/exclusive');
      const second = await NbdClient.connect({ host: '127.0.0.1', port });
      const begun = performance.now();
      await expect(second.go('disk/exclusive=take-over')).rejects.toThrow(
        /disk is open for writing by tcp 127\.0\.0\.1.*, which still answers/,
      );
      expect(performance.now() - begun).toBeLessThan(PROMPT_MS);
      await first.write(0, Buffer.alloc(BLOCK, 4));
      await first.disconnect();
      expect((await second.go('disk/exclusive=take-over')).readOnly).toBe(false);
      await second.disconnect();
    });
  }
});

test('serve --exclusive applies to all disks, and an unknown mode is an error', async () => {
  const daemon = await startDaemon({ args: ['--create', 'disk:64M', '--exclusive', 'refuse'] });
  const first = await attach(daemon, 'disk');
  await expect(attach(daemon, 'disk')).rejects.toThrow(/only one client may write it/);
  // A command can read a disk that a client has exclusively.
  const image = path.join(temporaryDirectory(), 'disk.img');
  expect((await cli(['export', 'disk', image], { store: daemon.store })).code).toBe(0);
  await first.disconnect();
  expect((await daemon.stop()).code, daemon.log()).toBe(0);
  const wrong = await cli(['serve', '--exclusive', 'please'], { store: daemon.store });
  expect({ code: wrong.code, stderr: wrong.stderr }).toEqual({
    code: 2,
    stderr: expect.stringContaining('Give read-only, refuse, take-over, or nothing.') as string,
  });
});

test('without a daemon there are no clients, and nothing to disconnect', async () => {
  const target = await testStore('directly on the store');
  await target.ok('vdi', 'create', 'disk', '64M');
  const listed = await target.run(['client', 'list']);
  expect(listed.stderr).toBe('sheepgate: note: no daemon serves this store, so it has no clients\n');
  expect(listed.stdout).toMatch(/^ID +EXPORT.*\n$/);
  expect(await target.json('client', 'list')).toEqual([]);
  expect(await target.fails('client', 'disconnect', '1')).toMatch(/no daemon serves .*, so no client is connected/);
  expect(await target.json('vdi', 'show', 'disk')).toMatchObject({ writers: [], twoWriters: null });
});
