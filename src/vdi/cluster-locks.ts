/**
 * Locks that the nodes of a cluster keep on VDIs: how they are reported, and which may be taken away. A lock says through which
 * node a client has opened a VDI, and not whether the client is still there. When that node ends, the client continues through
 * another node. When another client takes a snapshot, the client keeps the lock on the VDI's old id. So only a deleted VDI is
 * unlocked without naming the holder. Sends nothing.
 */
import type { LockHolder, ObjectStore, VdiLock, VdiLocks } from '../store/object-store.js';
import type { VdiRecord } from '../store/vdi-record.js';
import { shellWord } from '../text/shell-word.js';
import { CatalogError } from './catalog-error.js';
import { specOf } from './names.js';

export interface LockStatus extends VdiLock {
  /** Null of a deleted VDI, and of one whose record cannot be read. */
  readonly name: string | null;
  /** Null of a working VDI. */
  readonly tag: string | null;
  readonly isSnapshot: boolean;
  /** Its name on a command line. */
  readonly spec: string | null;
  /** Clients that have the VDI of this name open through daemons of this machine. Nothing is known of other machines. */
  readonly usedBy: readonly string[];
}

export interface LockReport {
  /** Whether the cluster locks VDIs at all. */
  readonly areEnforced: boolean;
  readonly locks: readonly LockStatus[];
}

export interface UnlockOptions {
  /** HOST:PORT of the node whose lock it is: the operator says that no client writes through it any more. */
  readonly heldBy?: string | undefined;
}

/** Errors: UNSUPPORTED of a local store. */
export function locksOf({ catalog, location }: Pick<ObjectStore, 'catalog' | 'location'>): VdiLocks {
  if (catalog.locks) return catalog.locks;
  throw new CatalogError(
    'UNSUPPORTED',
    `${location} is a local store, which one process has at a time: only clusters have locks on VDIs`,
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

/**
 * Which holder loses the lock. Errors: UNSUPPORTED (the cluster keeps no locks), NOT_LOCKED (or not by this holder), NEEDS_FORCE
 * (the holder must be named).
 */
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
    throw new CatalogError('NOT_LOCKED', `${label} is not locked; 'sheepgate vdi lock list' shows all locks`);
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
  // No client writes a deleted VDI.
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
  // A lock stays on the old id when another client takes a snapshot: an idle client still relies on it.
  const what = isSnapshot ? `; a client that had the VDI open when this snapshot was taken may rely on the lock` : '';
  const state = isMember
    ? 'a member of the cluster, so the client that asked it for the lock may be writing'
    : 'no longer a member, but the client that asked it for the lock may be writing through another node';
  return new CatalogError(
    'NEEDS_FORCE',
    `${label} is locked through ${through}, ${state}${what}; two writers destroy a disk; if you are sure that there is no writer, ` +
      `'sheepgate vdi lock unlock ${shellWord(spec)} --held-by ${node}' ends the lock`,
  );
}
