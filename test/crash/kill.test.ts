/**
 * SIGKILL under load, again and again on one store: acknowledged writes are there after the kill, flushed or not, blocks hold
 * only data that was written to them, and snapshots stay unchanged, also while overlays are merged.
 */
import fs from 'node:fs';
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { NbdClient } from 'nbd-server-ts';
import { expect, test } from 'vitest';
import { cli, startDaemon, temporaryDirectory } from '../harness/daemon.js';
import { byLength } from '../harness/length.js';
import { BLOCKS, checkSnapshots, Expectation, load, randomOf, readStamps, SIZE } from './stamps.js';

const KILLS = byLength({ quick: 5, full: 10, long: 500 });
/** Within this time after a snapshot was deleted, most of its overlays are merged. */
const MERGE_MS = 2500;

test(
  `${KILLS} times killed under load and started again, nothing that was acknowledged is lost`,
  async () => {
    const store = path.join(temporaryDirectory(), 'store');
    expect((await cli(['vdi', 'create', 'disk', String(SIZE), '--block-size-shift', '20'], { store })).code).toBe(0);
    const expected = new Expectation();
    const snapshots = new Map<string, Float64Array>();
    const random = randomOf(12345);
    for (let n = 0; n <= KILLS; n++) {
      const daemon = await startDaemon({ store });
      const seen = await readStamps(daemon, 'disk');
      for (let block = 0; block < BLOCKS; block++) {
        if (!expected.allows(block, seen[block] as number)) {
          throw new Error(`after kill ${n}, block ${block} holds ${seen[block]}; ${expected.told(block)}`);
        }
      }
      await checkSnapshots(daemon, snapshots);
      expected.restart(seen);
      if (n === KILLS) {
        expect((await daemon.stop()).code).toBe(0);
        break;
      }
      const client = await NbdClient.connect({ path: daemon.socket });
      await client.go('disk');
      const loading = load(client, expected, random);
      if (n % 3 === 1) {
        const tag = `s${n}`;
        expect((await cli(['vdi', 'snapshot', 'disk', tag], { store })).stderr).toBe('');
        snapshots.set(tag, await readStamps(daemon, `disk@${tag}`));
        const [oldest] = snapshots.keys();
        if (snapshots.size > 1 && oldest) {
          expect((await cli(['vdi', 'delete', `disk@${oldest}`], { store })).stderr).toBe('');
          snapshots.delete(oldest);
          // Its overlays are merged from here on: the kill comes before, during or after that.
          await delay(random() * MERGE_MS);
        }
      } else {
        const target = expected.sequence + 200 + Math.floor(random() * 2500);
        while (expected.sequence < target) await new Promise((resolve) => setTimeout(resolve, 1));
      }
      await daemon.kill();
      await loading;
      expect(expected.problems).toEqual([]);
      await client.disconnect().catch(() => undefined);
    }
    const report = await cli(['check', '--json'], { store });
    expect(JSON.parse(report.stdout)).toMatchObject({ problems: [] });
    expect(fs.existsSync(path.join(store, 'meta.mdb'))).toBe(true);
  },
  60 * 60_000,
);

test('acknowledged writes without a flush are there after SIGKILL: new, copied, overwritten and zeroed objects', async () => {
  const store = path.join(temporaryDirectory(), 'store');
  const MIB = 2 ** 20;
  const COUNT = 12;
  expect((await cli(['vdi', 'create', 'disk', `${COUNT}M`, '--block-size-shift', '20'], { store })).code).toBe(0);
  const model = Buffer.alloc(COUNT * MIB);
  for (let round = 0; round < 3; round++) {
    const daemon = await startDaemon({ store });
    const client = await NbdClient.connect({ path: daemon.socket });
    await client.go('disk');
    for (let at = 0; at < model.length; at += MIB) {
      expect((await client.read(at, MIB)).equals(model.subarray(at, at + MIB)), `round ${round}, byte ${at}`).toBe(
        true,
      );
    }
    const write = async (idx: number, fill: number): Promise<void> => {
      await client.write(idx * MIB + 8192, Buffer.alloc(4096, fill));
      model.fill(fill, idx * MIB + 8192, idx * MIB + 12288);
    };
    for (let idx = 0; idx < COUNT; idx += 2) await write(idx, 16 * round + 1);
    // A snapshot makes earlier writes durable, so the first round has none.
    if (round > 0) {
      expect((await cli(['vdi', 'snapshot', 'disk', `s${round}`], { store })).stderr).toBe('');
      for (let idx = round; idx < COUNT; idx += 4) await write(idx, 16 * round + 2);
      await client.zero(5 * MIB, MIB);
      await client.zero(2 * MIB, MIB);
      model.fill(0, 5 * MIB, 6 * MIB).fill(0, 2 * MIB, 3 * MIB);
      await write(2, 16 * round + 3);
    }
    await daemon.kill();
    await client.disconnect().catch(() => undefined);
  }
  const check = await cli(['check', '--json'], { store });
  expect(JSON.parse(check.stdout)).toMatchObject({ problems: [] });
});
