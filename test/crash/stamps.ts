/**
 * A disk of stamped blocks under load, and what each block may hold after the daemon was killed or its disk was lost. Every block
 * says which write it is of, and which block it is. Owns the rules; who kills what is up to the test.
 */
import { setTimeout as delay } from 'node:timers/promises';
import { NbdClient } from 'nbd-server-ts';
import { expect } from 'vitest';
import type { Daemon } from '../harness/daemon.js';

export const BLOCK = 4096;
export const BLOCKS = 4096; // 16 MiB in 1 MiB objects
export const SIZE = BLOCK * BLOCKS;
const IN_FLIGHT = 16;

/** Repeatable numbers in [0, 1). */
export function randomOf(seed: number): () => number {
  let state = seed;
  return () => ((state = (Math.imul(state, 1103515245) + 12345) >>> 0) >>> 8) / 2 ** 24;
}

/** The possible contents of a block: its stamp at the last flush, and all after it. 0 means zeros. */
export class Expectation {
  acknowledged = new Float64Array(BLOCKS);
  /** Stamps issued and not acknowledged: one at most, since a block has one writer at a time. */
  readonly underWay = new Map<number, number>();
  sequence = 0;
  flushes = 0;
  /** What reads under the load have found wrong. */
  readonly problems: string[] = [];
  #copies = 0;
  /** Stamps of each block since the last flush: the first is the flushed one. */
  #history: number[][] = Array.from({ length: BLOCKS }, () => [0]);

  issue(block: number, zero: boolean): number {
    const stamp = zero ? 0 : ++this.sequence;
    this.underWay.set(block, stamp);
    this.#history[block]?.push(stamp);
    return stamp;
  }

  done(block: number, stamp: number): void {
    this.acknowledged[block] = stamp;
    this.underWay.delete(block);
  }

  /** To be called before a flush is sent; the returned function when it was answered. */
  flushing(): () => void {
    const lengths = this.#history.map((_, block) => this.#answered(block));
    return () => {
      this.flushes++;
      // A copy that is under way may have any of them.
      if (this.#copies > 0) return;
      for (const [block, count] of lengths.entries()) this.#history[block]?.splice(0, count);
    };
  }

  /** After the death of the process: the last answered write, or the one that was under way. */
  allows(block: number, stamp: number): boolean {
    return this.acknowledged[block] === stamp || this.underWay.get(block) === stamp;
  }

  /** After the loss of the disk: the last flushed write, or a later one. */
  allowsUnflushed(block: number, stamp: number): boolean {
    return this.#history[block]?.includes(stamp) ?? false;
  }

  /**
   * The disk is copied from now on, as a power loss leaves it: the returned function, called when the copy is complete, returns
   * what the copy may hold. `answered`: it is a snapshot, which has all that was answered.
   */
  copying({ answered = false } = {}): () => Expectation {
    const from = this.#history.map((_, block) => (answered ? this.#answered(block) : 0));
    this.#copies++;
    return () => {
      this.#copies--;
      const copy = new Expectation();
      copy.#history = this.#history.map((stamps, block) => stamps.slice(from[block]));
      return copy;
    };
  }

  /** The place of the last answered stamp in the block's history. */
  #answered(block: number): number {
    return (this.#history[block]?.length ?? 0) - (this.underWay.has(block) ? 2 : 1);
  }

  /** What the block may hold, for messages. */
  told(block: number): string {
    return `${String(this.#history[block])} since the last flush, ${this.acknowledged[block]} answered, ${this.underWay.get(block)} under way`;
  }

  /** The disk was read after the loss: its content counts from now on. */
  restart(seen: Float64Array): void {
    this.acknowledged = seen.slice();
    this.#history = Array.from(seen, (stamp) => [stamp]);
    this.underWay.clear();
  }
}

/** Several connections share a disk: each has the blocks with this remainder. */
export interface Share {
  readonly remainder: number;
  readonly of: number;
  /** Nothing is sent while this says so. */
  readonly isPaused?: () => boolean;
  readonly isOver?: () => boolean;
}

const ALL: Share = { remainder: 0, of: 1 };

/** Writes, trims, reads and flushes until the connection ends, or the share says so. Resolves then. */
export async function load(
  client: NbdClient,
  expected: Expectation,
  random: () => number,
  share: Share = ALL,
): Promise<void> {
  let flushing = share.remainder > 0; // one connection flushes
  const busy = new Set<number>();
  const one = async (): Promise<void> => {
    while (share.isOver?.() !== true) {
      if (share.isPaused?.() === true) {
        await delay(1);
        continue;
      }
      const block = Math.floor((random() * BLOCKS) / share.of) * share.of + share.remainder;
      if (busy.has(block)) continue;
      busy.add(block);
      if (random() < 0.1) {
        const stamp = (await client.read(block * BLOCK, BLOCK)).readDoubleLE(0);
        const right = expected.acknowledged[block];
        if (stamp !== right) expected.problems.push(`block ${block} was read as ${stamp}, and is ${right}`);
      }
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
        const flushed = expected.flushing();
        await client.flush();
        flushed();
        flushing = false;
      }
    }
  };
  await Promise.allSettled(Array.from({ length: IN_FLIGHT }, one));
}

/** Errors: a block that is torn, or has the bytes of another one. */
export async function readStamps(daemon: Pick<Daemon, 'socket'>, name: string): Promise<Float64Array> {
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
    if (end !== stamp) expect.fail(`block ${block} of ${name} is torn: it begins with ${stamp} and ends with ${end}`);
    const number = all.readUInt32LE(block * BLOCK + 8);
    if (stamp !== 0 && number !== block) expect.fail(`block ${block} of ${name} has the bytes of block ${number}`);
  }
  return stamps;
}

/** Errors: a snapshot that is not what it was. */
export async function checkSnapshots(
  daemon: Pick<Daemon, 'socket'>,
  snapshots: ReadonlyMap<string, Float64Array>,
): Promise<void> {
  for (const [tag, frozen] of snapshots) {
    const found = await readStamps(daemon, `disk@${tag}`);
    const changed = found.findIndex((stamp, block) => stamp !== frozen[block]);
    if (changed >= 0) expect.fail(`block ${changed} of ${tag} is ${found[changed]}, was ${frozen[changed]}`);
  }
}
