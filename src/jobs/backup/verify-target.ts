/** All backups of a target, compared with their hashes: which of them are whole, and what is wrong with the others. */
import type { JobContext } from '../reporting.js';
import { bytesOf, type BackupTarget } from './target.js';

export interface VerifiedBackup {
  readonly id: number;
  readonly isWhole: boolean;
  /** The first thing that was found wrong; null if it is whole. */
  readonly damage: string | null;
}

/** `given`: what the operator calls the target. */
export async function verifyTarget(
  target: BackupTarget,
  given: string,
  { progress, signal }: JobContext,
): Promise<VerifiedBackup[]> {
  const { points } = target;
  const damage = new Map<number, string>();
  const hashed = points.filter(({ sha256 }) => sha256 !== undefined);
  const doing = progress(`verifying ${given}`, bytesOf(points) + bytesOf(hashed));
  try {
    for await (const { id, message } of target.verify(points, doing.advance, signal, { sha256: true })) {
      if (!damage.has(id)) damage.set(id, message);
    }
  } finally {
    doing.end();
  }
  return points.map(({ id }) => ({ id, isWhole: !damage.has(id), damage: damage.get(id) ?? null }));
}
