/** Access rules of a running daemon with all forms of export names: a peer learns only about exports that it may open. */
import fs from 'node:fs';
import path from 'node:path';
import { NbdClient } from 'nbd-server-ts';
import { expect, test } from 'vitest';
import { ControlClient } from '../../src/operations/control-client.js';
import { cli, cliJson, startDaemon, temporaryDirectory, waitUntil } from '../harness/daemon.js';

test('a peer learns nothing about snapshots that it may not open, by contexts, options or ids, and the log names opened exports', async () => {
  const file = path.join(temporaryDirectory(), 'access');
  const me = `uid:${process.getuid?.()}`;
  fs.writeFileSync(file, `allow disk@now ro from ${me}\nallow disk@one ro from ${me}\n`);
  const daemon = await startDaemon({ args: ['--create', 'disk:64M', '--access', file] });
  const { store } = daemon;
  const ids = new Map<string, string>();
  for (const tag of ['one', 'two']) {
    const { vid } = await cliJson<{ vid: number }>(['vdi', 'snapshot', 'disk', tag], { store });
    ids.set(tag, `@${vid.toString(16)}`);
  }
  const connect = (): Promise<NbdClient> => NbdClient.connect({ path: daemon.socket });

  const client = await connect();
  expect((await client.list()).map(({ name }) => name)).toEqual(['disk@one']);
  const contexts = ['sheepgate:changed:one', 'qemu:dirty-bitmap:one'];
  expect(await client.listContexts('disk@now')).toEqual(['base:allocation', ...contexts]);
  const asked = ['sheepgate:changed:two', 'sheepgate:changed:none', 'sheepgate:changed:one'];
  expect(await client.listContexts('disk@now', asked)).toEqual(['sheepgate:changed:one']);
  expect(await client.selectContexts('disk@now', asked)).toEqual(['sheepgate:changed:one']);

  const refusalOf = async (name: string): Promise<string> => {
    const refused: unknown = await client.go(name).then(
      () => undefined,
      (error: unknown) => error,
    );
    return (refused as Error | undefined)?.message.replace(JSON.stringify(name), 'EXPORT') ?? 'opened';
  };
  const words = await refusalOf('disk@two');
  expect(words).toContain('you are not allowed to open EXPORT');
  for (const name of [
    'disk',
    '@=disk',
    '@=d%69sk',
    'disk@none',
    'disk@now/since=two',
    'disk@now/since=none',
    'disk/x',
  ]) {
    expect(await refusalOf(name), name).toBe(words);
  }
  const byId = await refusalOf(ids.get('two') ?? '');
  expect(byId).toContain('or there is nothing with this id');
  expect(await refusalOf('@fffff')).toBe(byId);
  await expect(client.go('disk@now/x')).rejects.toThrow('"x" after the slash is not an option; there are since=TAG');

  await client.go('disk@now/since=one');
  const { connections } = await new ControlClient(daemon.control).status();
  expect(connections.map((connection) => connection.export)).toContain('disk@now/since=one');
  await client.disconnect();
  await waitUntil(() => daemon.log().includes('"export":"disk@now/since=one"'), 'the log has the name');
  const other = await connect();
  await other.go(ids.get('one') ?? '');
  await other.disconnect();
  await waitUntil(() => daemon.log().includes('"export":"disk@one"'), 'the log says what the id led to');

  // The daemon's own user is not subject to rules.
  const image = path.join(temporaryDirectory(), 'disk.img');
  expect((await cli(['export', ids.get('two') ?? '', image], { store })).code).toBe(0);
  expect(fs.statSync(image).size).toBe(64 * 2 ** 20);
  expect((await cliJson<{ tag: string }>(['vdi', 'show', ids.get('two') ?? ''], { store })).tag).toBe('two');
  expect((await daemon.stop()).code, daemon.log()).toBe(0);
  // The same without a daemon.
  expect((await cli(['export', '--force', ids.get('two') ?? '', image], { store })).code).toBe(0);
  expect((await cli(['export', '--force', 'disk@one/rw', image], { store })).stderr).toContain(
    '"rw" after the slash is not an option',
  );
});
