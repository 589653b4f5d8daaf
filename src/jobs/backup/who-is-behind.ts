/**
 * A target and a store that do not fit together: which of the two is the older copy, and by how much. The snapshot of the last
 * backup should be in the store; if not, the target's other snapshots in the store show what happened. Pure: reads nothing.
 */
import type { BaseSnapshot, Point } from './manifest.js';

export interface Sides {
  readonly vdi: string;
  /** The path of the target as the operator gave it. */
  readonly to: string;
  readonly store: string;
  /** The snapshot of the target's last backup. */
  readonly base: BaseSnapshot;
  /** Backups in the target, the oldest first. */
  readonly points: readonly Point[];
  /** The target's snapshots in the store; their tags end with the number of the backup. */
  readonly snapshots: readonly { readonly tag: string; readonly vid: number; readonly snapshotAt: number }[];
}

/** undefined if they fit; else a message with what is wrong and what to do. */
export function whoIsBehind({ vdi, to, store, base, points, snapshots }: Sides): string | undefined {
  const found = snapshots.find(({ tag }) => tag === base.tag);
  if (found && found.vid === base.vid && found.snapshotAt === base.snapshotAt) return undefined;
  const last = points.at(-1);
  if (!last) return undefined;
  const goOn = `use --compare to read all of ${vdi} and store the differences in ${to}, or --full to start there with a full backup`;
  const numbered = snapshots.map((snapshot) => ({ ...snapshot, id: Number(/\d+$/.exec(snapshot.tag)?.[0]) }));
  const newest = numbered.reduce((one, other) => (one && !(other.id > one.id) ? one : other), numbered[0]);
  if (newest === undefined) {
    return (
      `${vdi} in ${store} has no snapshot "${base.tag}", from which backup ${last.id} of ${last.time} was taken, and no ` +
      `older snapshot of ${to}: they were deleted, or ${vdi} is now another disk, or the store is an older copy; ${goOn}`
    );
  }
  const stored = `the snapshot "${newest.tag}" of ${timeOf(newest.snapshotAt)}`;
  if (newest.id > last.id) {
    return (
      `the target is behind: ${to} ends with backup ${last.id} of ${last.time}, and ${vdi} in ${store} has ${stored}, ` +
      `${backups(newest.id - last.id)} later; ${to} is an older copy of a target in use: back up to that one, or ${goOn}`
    );
  }
  if (found) {
    return (
      `the snapshot ${vdi}@${base.tag} is not the snapshot of the last backup in ${to}: it was taken at ` +
      `${timeOf(found.snapshotAt)}, backup ${last.id} at ${last.time}; ${vdi} is another disk, or the store and the ` +
      `target were copied and have diverged; ${goOn}`
    );
  }
  const newer = points.filter(({ id }) => id > newest.id).length;
  return (
    `the store is behind: ${vdi} in ${store} ends with ${stored}, and ${to} has ${backups(newer)} after that, up to ` +
    `backup ${last.id} of ${last.time}; the store is an older copy, and the target has newer data: ` +
    `'sheepgate restore ${to} NEW-NAME' restores it; if the current content of ${vdi} is the right one, ${goOn}`
  );
}

function backups(count: number): string {
  return `${count} backup${count === 1 ? '' : 's'}`;
}

function timeOf(ms: number): string {
  const date = new Date(ms);
  return Number.isNaN(date.getTime()) ? 'an unknown time' : date.toISOString();
}
