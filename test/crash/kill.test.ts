/**
 * SIGKILL under load, again and again on one store: acknowledged writes are there after the kill, flushed or not, blocks hold
 * only data that was written to them, and snapshots stay unchanged.
 */
import fs from 'node:fs';
import path from 'node:path';
import { NbdClient } from 'nbd-server-ts';
import { expect, test } from 'vitest';
import { cli, startDaemon, temporaryDirectory, type Daemon } from '../harness/daemon.js';
import { byLength } from '../harness/length.js';

const KILLS = byLength({ quick: 5, full: 15, long: 500 });
const BLOCK = 4096;
const BLOCKS = 4096; // 16 MiB in 1 MiB objects
const SIZE = BLOCK * BLOCKS;
const IN_FLIGHT = 16;

/** The possible content of a block: the last acknowledged stamp, or the one in flight after it. 0 means zeros. */
class Expectation {
  acknowledged = new Float64Array(BLOCKS);
  /** Stamps issued and not acknowledged: one at most, since a block has one writer at a time. */
  readonly underWay = new Map<number, number>();
  sequence = 0;

  issue(block: number, zero: boolean): number {
    const stamp = zero ? 0 : ++this.sequence;
    this.underWay.set(block, stamp);
    return stamp;
  }

  done(block: number, stamp: number): void {
    this.acknowledged[block] = stamp;
    this.underWay.delete(block);
  }

  allows(block: number, stamp: number): boolean {
    return this.acknowledged[block] === stamp || this.underWay.get(block) === stamp;
  }

  /** The disk was read after the kill: its content counts from now on. */
  restart(seen: Float64Array): void {
    this.acknowledged = seen.slice();
    this.underWay.clear();
  }
}

async function load(client: NbdClient, expected: Expectation, random: () => number): Promise<void> {
  let flushing = false;
  const busy = new Set<number>();
  const one = async (): Promise<void> => {
    for (;;) {
      const block = Math.floor(random() * BLOCKS);
      if (busy.has(block)) continue;
      busy.add(block);
      const zero = random() < 0.15;
      const stamp = expected.issue(block, zero);
      if (zero) await client.trim(block * BLOCK, BLOCK);
      else {
        const data = Buffer.alloc(BLOCK);
        data.writeDoubleLE(stamp, 0);
        data.writeUInt32LE(block, 8);
        data.writeDoubleLE(stamp, BLOCK - 8);
        await client.write(block * BLOCK, data);
      }
      expected.done(block, stamp);
      busy.delete(block);
      if (!flushing && random() < 0.02) {
        flushing = true;
        await client.flush();
        flushing = false;
      }
    }
  };
  await Promise.allSettled(Array.from({ length: IN_FLIGHT }, one));
}

async function readStamps(daemon: Daemon, name: string): Promise<Float64Array> {
  const client = await NbdClient.connect({ path: daemon.socket });
  await client.go(name);
  const all = Buffer.alloc(SIZE);
  for (let at = 0; at < SIZE; at += 2 ** 20) (await client.read(at, 2 ** 20)).copy(all, at);
  await client.disconnect();
  const stamps = new Float64Array(BLOCKS);
  for (let block = 0; block < BLOCKS; block++) {
    const stamp = all.readDoubleLE(block * BLOCK);
    stamps[block] = stamp;
    // Plain comparisons: an `expect` for each of a million blocks takes half a minute.
    const end = all.readDoubleLE((block + 1) * BLOCK - 8);
    if (end !== stamp) expect.fail(`block ${block} is torn: it begins with ${stamp} and ends with ${end}`);
    const number = all.readUInt32LE(block * BLOCK + 8);
    if (stamp !== 0 && number !== block) expect.fail(`block ${block} has the bytes of block ${number}`);
  }
  return stamps;
}

test(
  `${KILLS} times killed under load and started again, nothing that was acknowledged is lost`,
  async () => {
    const store = path.join(temporaryDirectory(), 'store');
    expect((await cli(['vdi', 'create', 'disk', String(SIZE), '--block-size-shift', '20'], { store })).code).toBe(0);
    const expected = new Expectation();
    const snapshots = new Map<string, Float64Array>();
    let seed = 12345;
    const random = (): number => ((seed = (Math.imul(seed, 1103515245) + 12345) >>> 0) >>> 8) / 2 ** 24;
    for (let n = 0; n <= KILLS; n++) {
      const daemon = await startDaemon({ store });
      const seen = await readStamps(daemon, 'disk');
      for (let block = 0; block < BLOCKS; block++) {
        if (!expected.allows(block, seen[block] as number)) {
          throw new Error(
            `after kill ${n}, block ${block} holds ${seen[block]}; acknowledged was ${expected.acknowledged[block]}, ` +
              `under way ${expected.underWay.get(block)}`,
          );
        }
      }
      for (const [tag, frozen] of snapshots) {
        const found = await readStamps(daemon, `disk@${tag}`);
        const changed = found.findIndex((stamp, block) => stamp !== frozen[block]);
        if (changed >= 0) expect.fail(`block ${changed} of ${tag} is ${found[changed]}, was ${frozen[changed]}`);
      }
      expected.restart(seen);
      if (n === KILLS) {
        expect((await daemon.stop()).code).toBe(0);
        break;
      }
      const client = await NbdClient.connect({ path: daemon.socket });
      await client.go('disk');
      const loading = load(client, expected, random);
      if (n % 5 === 1) {
        const tag = `s${n}`;
        expect((await cli(['vdi', 'snapshot', 'disk', tag], { store })).stderr).toBe('');
        snapshots.set(tag, await readStamps(daemon, `disk@${tag}`));
        const [oldest] = snapshots.keys();
        if (snapshots.size > 3 && oldest) {
          expect((await cli(['vdi', 'delete', `disk@${oldest}`], { store })).stderr).toBe('');
          snapshots.delete(oldest);
        }
      } else {
        const target = expected.sequence + 200 + Math.floor(random() * 2500);
        while (expected.sequence < target) await new Promise((resolve) => setTimeout(resolve, 1));
      }
      await daemon.kill();
      await loading;
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
