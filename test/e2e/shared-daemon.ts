/**
 * One daemon for all tests of a file: starting one takes as long as a short test. Owns the daemon, and removes the disks of each
 * test; after a failed test the next one gets a new daemon.
 */
import { afterAll, expect } from 'vitest';
import { cliJson, startDaemon, type Daemon } from '../harness/daemon.js';

let shared: Daemon | undefined;
afterAll(async () => {
  if (shared !== undefined) expect((await shared.stop()).code, shared.log()).toBe(0);
});

/** Calls `use` with a new disk named "disk", alone in the store. */
export async function withDaemon(size: string, use: (daemon: Daemon) => Promise<void>): Promise<void> {
  const daemon = (shared ??= await startDaemon());
  const { store } = daemon;
  await cliJson(['vdi', 'create', 'disk', size], { store });
  try {
    await use(daemon);
  } catch (error) {
    // What a failed test leaves must not fail the next one.
    shared = undefined;
    throw error;
  }
  const vdis = await cliJson<{ name: string; tag: string | null }[]>(['vdi', 'list'], { store });
  const names = vdis.map(({ name, tag }) => (tag === null ? name : `${name}@${tag}`));
  // Some clients leave without a disconnect request, and then count as able to come back.
  for (const name of names.sort().reverse()) await cliJson(['vdi', 'delete', name, '--force'], { store });
}
