/**
 * The state and the copies of a cluster's nodes, read from the nodes directly and not through a daemon: for when something is
 * wrong, and for work that would burden a daemon. Owns the access of the command line to a cluster beside Operations.
 */
export { addressLabel } from '../store/sheep/cluster-address.js';
export { readClusterReport, type ClusterReport, type NodeState } from '../store/sheep/cluster-report.js';
export { clusterState } from '../store/sheep/cluster-state.js';
import { SheepStore } from '../store/sheep/sheep-store.js';
import { deepCheck, type DeepCheckOptions, type DeepReport } from '../store/sheep/deep/deep-check.js';

export type { DeepCheckOptions, DeepReport };

/** Compare all copies that the nodes of a cluster have. Errors: those of reaching the cluster; the signal's reason. */
export async function deepCheckCluster(location: string, options: DeepCheckOptions): Promise<DeepReport> {
  const { note, signal } = options;
  const store = await SheepStore.open(location, { log: note, signal });
  try {
    return await deepCheck(store.cluster, options);
  } catch (error) {
    signal?.throwIfAborted();
    throw error;
  } finally {
    await store.close();
  }
}
