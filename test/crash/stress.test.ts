/**
 * Eight connections write, trim and read one disk while snapshots of it are taken and deleted in any order, NAME@now comes and
 * goes, and overlays are merged: every read, every snapshot and the end are exact. `npm run test:long` takes 200 snapshots, and a
 * minute at least.
 */
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { NbdClient } from 'nbd-server-ts';
import { expect, test } from 'vitest';
import { cli, cliJson, startDaemon, temporaryDirectory, waitUntil } from '../harness/daemon.js';
import { byLength } from '../harness/length.js';
import { BLOCKS, checkSnapshots, Expectation, load, randomOf, readStamps, SIZE } from './stamps.js';

const CONNECTIONS = 8;
const SNAPSHOTS = byLength({ quick: 5, full: 12, long: 200 });
const AT_LEAST_MS = byLength({ quick: 0, full: 0, long: 60_000 });
/** Snapshots that exist at a time. */
const KEPT = 6;
/** Overlays of a deleted snapshot are merged within this time. */
const MERGED_MS = 60_000;

test(
  `${CONNECTIONS} connections, ${SNAPSHOTS} snapshots, deletions and merges: all of it exact`,
  async () => {
    const store = path.join(temporaryDirectory(), 'store');
    const run = async (...args: string[]): Promise<void> => expect((await cli(args, { store })).stderr).toBe('');
    await run('vdi', 'create', 'disk', String(SIZE), '--block-size-shift', '20');
    const daemon = await startDaemon({ store });
    const expected = new Expectation();
    const random = randomOf(99);
    const state = { isPaused: false, isOver: false };
    const clients = await Promise.all(
      Array.from({ length: CONNECTIONS }, async () => {
        const client = await NbdClient.connect({ path: daemon.socket });
        await client.go('disk');
        return client;
      }),
    );
    const loads = clients.map((client, remainder) =>
      load(client, expected, randomOf(remainder + 1), {
        remainder,
        of: CONNECTIONS,
        isPaused: () => state.isPaused,
        isOver: () => state.isOver,
      }),
    );
    const start = Date.now();
    const snapshots = new Map<string, Float64Array>();
    for (let n = 0; n < SNAPSHOTS || Date.now() - start < AT_LEAST_MS; n++) {
      const tag = `s${n}`;
      if (n % 2 === 0) {
        // Taken while nothing is under way: known exactly.
        state.isPaused = true;
        await waitUntil(() => expected.underWay.size === 0, 'no write is under way');
        snapshots.set(tag, expected.acknowledged.slice());
        await run('vdi', 'snapshot', 'disk', tag);
        state.isPaused = false;
      } else {
        const taken = expected.copying({ answered: true });
        await run('vdi', 'snapshot', 'disk', tag);
        const moment = taken();
        const seen = await readStamps(daemon, `disk@${tag}`);
        for (let block = 0; block < BLOCKS; block++)
          if (!moment.allowsUnflushed(block, seen[block] as number))
            expect.fail(`block ${block} of ${tag} is ${seen[block]}; ${moment.told(block)}`);
        snapshots.set(tag, seen);
      }
      if (n % 5 === 0) {
        const taken = expected.copying({ answered: true });
        const seen = await readStamps(daemon, 'disk@now');
        const moment = taken();
        for (let block = 0; block < BLOCKS; block++)
          if (!moment.allowsUnflushed(block, seen[block] as number))
            expect.fail(`block ${block} of a moment is ${seen[block]}; ${moment.told(block)}`);
      }
      await delay(random() * 100);
      if (snapshots.size < KEPT) continue;
      const gone = [...snapshots.keys()][Math.floor(random() * KEPT)] as string;
      await checkSnapshots(daemon, new Map([[gone, snapshots.get(gone) as Float64Array]]));
      await run('vdi', 'delete', `disk@${gone}`);
      snapshots.delete(gone);
    }
    state.isOver = true;
    await Promise.all(loads);
    expect(expected.problems).toEqual([]);
    await checkSnapshots(daemon, snapshots);
    for (const tag of snapshots.keys()) await run('vdi', 'delete', `disk@${tag}`);
    const left = async (): Promise<number> =>
      (await cliJson<{ merging?: { overlays: number } }>(['vdi', 'show', 'disk'], { store })).merging?.overlays ?? 0;
    await waitUntil(async () => (await left()) === 0, 'all overlays are merged', MERGED_MS);
    expect([...(await readStamps(daemon, 'disk'))]).toEqual([...expected.acknowledged]);
    await Promise.all(clients.map((client) => client.disconnect()));
    expect((await daemon.stop()).code).toBe(0);
    expect(await cliJson(['check'], { store })).toMatchObject({ problems: [] });
  },
  20 * 60_000,
);
