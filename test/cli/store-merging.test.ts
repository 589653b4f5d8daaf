/** `sheepgate store merging`: what it says, and that a pause lasts until it is ended. */
import path from 'node:path';
import { NbdClient } from 'nbd-server-ts';
import { expect, test } from 'vitest';
import { cli, cliJson, startDaemon, temporaryDirectory, waitUntil } from '../harness/daemon.js';

const MIB = 2 ** 20;

interface State {
  readonly overlays: number;
  readonly bytes: number;
  readonly isPaused: boolean;
}

test('merging is paused, resumed and told; without a daemon there is nothing to pause', async () => {
  const store = path.join(temporaryDirectory(), 'store');
  const run = (...args: string[]): ReturnType<typeof cli> => cli(args, { store });
  const daemon = await startDaemon({ store, args: ['--create', 'disk:8M'] });
  const client = await NbdClient.connect({ path: daemon.socket });
  await client.go('disk');
  for (let at = 0; at < 8 * MIB; at += MIB) await client.write(at, Buffer.alloc(MIB, 1));
  expect(await run('store', 'merging')).toMatchObject({ code: 0, stdout: 'nothing to merge\n' });
  expect(await run('store', 'merging', 'pause')).toMatchObject({ code: 0, stdout: 'nothing to merge; paused\n' });
  expect((await run('vdi', 'snapshot', 'disk', 's')).code).toBe(0);
  await client.write(0, Buffer.alloc(4096, 2));
  await client.write(5 * MIB, Buffer.alloc(8192, 2));
  expect((await run('vdi', 'delete', 'disk@s')).code).toBe(0);
  const state = (): Promise<State> => cliJson<State>(['store', 'merging'], { store });
  await waitUntil(async () => (await state()).overlays > 0, 'the deleted snapshot has left something to merge');
  expect(await run('store', 'merging')).toMatchObject({ stdout: 'to merge: 2 objects, 12 KiB to move; paused\n' });
  expect(await cliJson(['store', 'merging', 'resume'], { store })).toMatchObject({ isPaused: false });
  await waitUntil(async () => (await state()).overlays === 0, 'all is merged');
  await client.disconnect();
  await daemon.stop();
  expect(await run('store', 'merging')).toMatchObject({ code: 0, stdout: 'nothing to merge\n' });
  const alone = await run('store', 'merging', 'pause');
  expect(alone).toMatchObject({ code: 1, stdout: '' });
  expect(alone.stderr).toContain('no daemon serves');
  expect(await run('store', 'merging', 'later')).toMatchObject({ code: 2, stdout: '' });
});
