/**
 * Writes to erasure-coded objects. Nodes keep those in stripes of a sector, spread over several nodes, and partial writes of a
 * stripe are not safe: the rest of the stripe becomes zeros if the write begins where the stripe does (sheep/gateway.c,
 * init_erasure_buffer), and two writes into one stripe may undo each other. So only whole stripes are written. Holds no state;
 * callers order the writes.
 */
import { STRIPE_BYTES } from '../../sheepdog/erasure-code.js';
import type { ClusterClient } from './cluster-client.js';

/** Size of the smallest range that can be written by itself. `copyPolicy`: the inode's; 0 means plain copies. */
export function writeUnit(copyPolicy: number): number {
  return copyPolicy === 0 ? 1 : STRIPE_BYTES;
}

/** Reads the rest of the first and the last stripe, and writes whole stripes. No other write to them may be in flight. */
export async function writeWholeStripes(
  cluster: ClusterClient,
  vid: number,
  idx: number,
  offset: number,
  data: Buffer,
): Promise<void> {
  const from = offset - (offset % STRIPE_BYTES);
  const to = Math.ceil((offset + data.length) / STRIPE_BYTES) * STRIPE_BYTES;
  const whole = Buffer.alloc(to - from);
  const edges: Promise<void>[] = [];
  if (from < offset) edges.push(cluster.readData(vid, idx, from, whole.subarray(0, STRIPE_BYTES)));
  if (offset + data.length < to && (to - from > STRIPE_BYTES || from === offset)) {
    edges.push(cluster.readData(vid, idx, to - STRIPE_BYTES, whole.subarray(whole.length - STRIPE_BYTES)));
  }
  for (const result of await Promise.allSettled(edges)) if (result.status === 'rejected') throw result.reason;
  data.copy(whole, offset - from);
  await cluster.writeData(vid, idx, from, whole);
}
