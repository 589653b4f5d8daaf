/**
 * SIGKILL under load, again and again on one store: what was flushed before the kill is there after it, blocks hold
 * nothing but what was written to them, and snapshots stay as they were.
 */
import fs from 'node:fs';
import path from 'node:path';
import { NbdClient } from 'nbd-server-ts';
import { expect, test } from 'vitest';
import { cli, startDaemon, temporaryDirectory, type Daemon } from '../harness/daemon.js';

const KILLS = Number(process.env.SHEEPGATE_KILLS ?? 50);
const BLOCK = 4096;
const BLOCKS = 4096; // 16 MiB in 1 MiB objects
const SIZE = BLOCK * BLOCKS;
const IN_FLIGHT = 16;

/** What may be in a block: the stamp of the last flush that covered it, or any issued since. 0 is "zeros". */
class Expectation {
  flushed = new Float64Array(BLOCKS);
  acknowledged = new Float64Array(BLOCKS);
  /** All stamps issued to the block since `flushed`. */
  readonly since = new Map<number, number[]>();
  sequence = 0;

  issue(block: number, zero: boolean): number {
    const stamp = zero ? 0 : ++this.sequence;
    const list = this.since.get(block);
    if (list) list.push(stamp);
    else this.since.set(block, [stamp]);
    return stamp;
  }

  allows(block: number, stamp: number): boolean {
    return this.flushed[block] === stamp || (this.since.get(block)?.includes(stamp) ?? false);
  }

  /** The disk was read after the kill: that is what counts now. */
  restart(seen: Float64Array): void {
    this.flushed = seen.slice();
    this.acknowledged = seen.slice();
    this.since.clear();
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
      expected.acknowledged[block] = stamp;
      busy.delete(block);
      if (!flushing && random() < 0.02) {
        flushing = true;
        const covered = expected.acknowledged.slice();
        const lists = new Map([...expected.since].map(([key, list]) => [key, list.length]));
        const writing = new Set(busy);
        await client.flush();
        for (let n = 0; n < BLOCKS; n++) {
          if (writing.has(n)) continue; // its last write was not acknowledged when the flush was asked for
          expected.flushed[n] = covered[n] as number;
          const list = expected.since.get(n);
          if (list) list.splice(0, lists.get(n) ?? 0);
        }
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
    expect(all.readDoubleLE((block + 1) * BLOCK - 8), `block ${block} is torn`).toBe(stamp);
    if (stamp !== 0)
      expect(all.readUInt32LE(block * BLOCK + 8), `block ${block} has another block's bytes`).toBe(block);
  }
  return stamps;
}

test(
  `${KILLS} times killed under load and started again, nothing that was flushed is lost`,
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
            `after kill ${n}, block ${block} holds ${seen[block]}; flushed ${expected.flushed[block]}, ` +
              `since then ${expected.since.get(block)?.join(' ')}`,
          );
        }
      }
      for (const [tag, frozen] of snapshots) expect(await readStamps(daemon, `disk@${tag}`)).toEqual(frozen);
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
  10 * 60_000,
);
