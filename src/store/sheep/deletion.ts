/** Deletes VDIs and snapshots: their table first, the record last. Owns this order, and what is left over when members change. */
import type { Inode } from '../../sheepdog/inode.js';
import { MAX_DATA_OBJECTS } from '../../sheepdog/protocol.js';
import { inParallel } from '../../system/in-parallel.js';
import { StoreError } from '../store-error.js';
import { deleteByName, nameToDelete } from './by-name.js';
import { clearTable } from './clear-table.js';
import type { ClusterClient } from './cluster-client.js';
import { clearHyper } from './hyper-index.js';
import { shadowInodesOf } from './shadow-inodes.js';
import { isShadow } from './shadow-names.js';
import { presentIn } from './table-scan.js';

/** Attempts to delete a VDI that another client writes to at the same time. */
const MAX_DELETE_ATTEMPTS = 5;
const PARALLEL_REMOVALS = 64;

/** What a deletion needs of its store. */
export interface DeletingHost {
  readonly cluster: ClusterClient;
  readonly recyclesVids: boolean;
  readEpoch(): Promise<number>;
}

/**
 * Deletes the VDI and gives up its references. Errors: IO (another client keeps making objects in it: nodes only half delete
 * such a VDI, and report success, see deleted-vdi.ts), DAMAGED (the nodes cannot find it by its name).
 */
export async function deleteVdi(host: DeletingHost, found: Inode): Promise<void> {
  const { cluster } = host;
  // Before its table is cleared: nodes delete by name, and must find it.
  await cluster.mustBeFoundByNodes(found.name, found.isSnapshot ? found.snapId : 0);
  const inode = await nameToDelete(cluster, found, host.recyclesVids);
  const epoch = await host.readEpoch();
  for (let attempt = 0; attempt < MAX_DELETE_ATTEMPTS; attempt++) {
    const own = await clear(cluster, inode);
    const isGone = await deleteByName(cluster, inode);
    if ((await host.readEpoch()) !== epoch) await removeOwn(cluster, inode, own);
    if (isGone) return;
  }
  throw new StoreError(
    'IO',
    `${inode.name} is only half deleted, because another client writes to it; stop that client, and delete it again`,
  );
}

/** Clears the whole table, because the disk may have been larger. Returns the idx of its own objects. */
async function clear(cluster: ClusterClient, inode: Inode): Promise<number[]> {
  if (inode.storePolicy !== 0) {
    await clearHyper(cluster, inode);
    return [];
  }
  const table = await cluster.readTable(inode.vid, MAX_DATA_OBJECTS);
  const own = presentIn(table).filter((idx) => table[idx] === inode.vid);
  await clearTable(cluster, inode.vid, table);
  return own;
}

/**
 * The members changed while the table was cleared: nodes may have forgotten to remove objects (sheep-vdi.ts). Apart from
 * temporary snapshots, no other table has the objects that a working VDI owns.
 */
async function removeOwn(cluster: ClusterClient, inode: Inode, own: readonly number[]): Promise<void> {
  if (inode.isSnapshot || isShadow(inode)) return;
  if ((await shadowInodesOf(cluster, inode.name)).some(({ isSnapshot }) => isSnapshot)) return;
  await inParallel(PARALLEL_REMOVALS, own, (idx) => cluster.removeData(inode.vid, idx));
}
