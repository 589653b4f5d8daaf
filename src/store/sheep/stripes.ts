/**
 * Writes to erasure-coded objects. Nodes keep those in stripes of a sector, spread over several of them, and a write of
 * a part of one is not safe to leave to them: the rest of a stripe becomes zeros if the write begins where the stripe
 * does (sheep/gateway.c, init_erasure_buffer), and two writes into one stripe may each undo the other. So whole stripes
 * are made here. Owns no state; who may write when is the caller's affair.
 */
import { STRIPE_BYTES } from '../../sheepdog/erasure-code.js';
import type { ClusterClient } from './cluster-client.js';

/** Bytes that cannot be written apart from each other. `copyPolicy` is the inode's; 0 says that it keeps plain copies. */
export function writeUnit(copyPolicy: number): number {
  return copyPolicy === 0 ? 1 : STRIPE_BYTES;
}

/** Write in whole stripes, the rest of the first and the last as it is now. Nobody else may write them meanwhile. */
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
