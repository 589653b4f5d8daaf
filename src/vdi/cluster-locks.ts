/**
 * Locks of VDIs that the nodes of a cluster keep: what is told of them, and whether one may be taken away. A lock says
 * through which node somebody has opened a VDI, and not whether he is still there: a client goes on through another node
 * when that one ends, and keeps the lock of the VDI's id of before when somebody else takes a snapshot. So nothing but what is
 * deleted is unlocked before its holder was named. Sends nothing.
 */
import type { LockHolder, ObjectStore, VdiLock, VdiLocks, VdiRecord } from '../store/object-store.js';
import { shellWord } from '../text/shell-word.js';
import { CatalogError } from './catalog-error.js';
import { specOf } from './names.js';

export interface LockStatus extends VdiLock {
  /** Null of a deleted VDI, and of one whose record cannot be read. */
  readonly name: string | null;
  /** Null of a working VDI. */
  readonly tag: string | null;
  readonly isSnapshot: boolean;
  /** How it is said on a command line. */
  readonly spec: string | null;
  /** Clients that have the VDI of this name open through daemons of this machine. Of other machines' nothing is known. */
  readonly usedBy: readonly string[];
}

export interface LockReport {
  /** Whether the cluster locks VDIs at all. */
  readonly areEnforced: boolean;
  readonly locks: readonly LockStatus[];
}

export interface UnlockOptions {
  /** HOST:PORT of the node whose lock it is: says that nobody writes there any more. */
  readonly heldBy?: string | undefined;
}

/** Errors: UNSUPPORTED of a local store. */
export function locksOf({ catalog, location }: Pick<ObjectStore, 'catalog' | 'location'>): VdiLocks {
  if (catalog.locks) return catalog.locks;
  throw new CatalogError(
    'UNSUPPORTED',
    `${location} is a local store, which one process has at a time: there are no locks of VDIs in it, only in clusters`,
  );
}

export function ofVid(record: VdiRecord | undefined): Pick<LockStatus, 'name' | 'tag' | 'isSnapshot' | 'spec'> {
  if (record === undefined) return { name: null, tag: null, isSnapshot: false, spec: null };
  const { name, tag, isSnapshot } = record;
  return { name, tag: isSnapshot ? tag : null, isSnapshot, spec: specOf(record) };
}

export interface UnlockCase {
  readonly areEnforced: boolean;
  readonly status: LockStatus | undefined;
  /** Undefined of a deleted VDI, and of one whose record cannot be read. */
  readonly record: VdiRecord | undefined;
  readonly options: UnlockOptions;
}

/** Which holder loses the lock. Errors: UNSUPPORTED, NOT_LOCKED, NEEDS_FORCE. */
export function mayUnlock(
  spec: string,
  { areEnforced, status, record, options: { heldBy } }: UnlockCase,
): { readonly lock: LockStatus; readonly holder: LockHolder } {
  if (!areEnforced) {
    throw new CatalogError(
      'UNSUPPORTED',
      "this cluster was formatted without locks ('dog cluster format -l'): nothing is locked",
    );
  }
  const label = record ? `${spec} (id ${record.vid.toString(16)})` : spec;
  if (status === undefined) {
    throw new CatalogError('NOT_LOCKED', `${label} is not locked; 'sheepgate vdi lock list' shows what is`);
  }
  const [first] = status.holders;
  const holder = heldBy === undefined ? first : status.holders.find(({ node }) => node === heldBy);
  const through = status.holders.map(({ node }) => node).join(', ');
  if (holder === undefined) {
    throw new CatalogError(
      'NOT_LOCKED',
      `${label} is locked through ${through}, not through ${heldBy}; nothing was done`,
    );
  }
  // Nobody writes what is deleted.
  if (heldBy === undefined && (!status.isDeleted || status.holders.length > 1)) {
    throw mustSayHolder(spec, label, through, holder, record?.isSnapshot ?? false);
  }
  return { lock: status, holder };
}

function mustSayHolder(
  spec: string,
  label: string,
  through: string,
  { node, isMember }: LockHolder,
  isSnapshot: boolean,
): CatalogError {
  // Locks do not go along when somebody else takes a snapshot: a client that is idle then has the old one.
  const what = isSnapshot ? `; whoever had the VDI open when this snapshot was taken may have the lock` : '';
  const state = isMember
    ? 'a member of the cluster, so whoever asked it for the lock may be writing'
    : 'no member any more, but whoever asked it for the lock may be writing through another node';
  return new CatalogError(
    'NEEDS_FORCE',
    `${label} is locked through ${through}, ${state}${what}; two writers destroy a disk. Once you are sure that there is none, ` +
      `'sheepgate vdi lock unlock ${shellWord(spec)} --held-by ${node}' ends the lock`,
  );
}
