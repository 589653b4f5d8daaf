/**
 * What a cluster says of itself, whatever state it is in: for those who want to know why it does not serve. Owns a gateway
 * of its own for as long as somebody looks; serving disks is sheep-store.ts's.
 */
import { Cluster } from './cluster.js';
import { parseClusterAddress } from './cluster-address.js';
import { Gateway } from './gateway.js';
import type { ClusterInfo, ClusterNode } from './layouts.js';
import { STATUS_RUNNING, STATUS_WAITING } from './protocol.js';

export type StateName = 'running' | 'not-formatted' | 'waiting' | 'shutting-down';

export function clusterStateName({ status, createdAt }: ClusterInfo): StateName {
  if (status === STATUS_RUNNING) return 'running';
  if (status !== STATUS_WAITING) return 'shutting-down';
  return createdAt === 0 ? 'not-formatted' : 'waiting';
}

const IN_WORDS: Readonly<Record<StateName, string>> = {
  running: 'running',
  'not-formatted': "not formatted; 'dog cluster format' does that",
  waiting: "waiting for its other nodes: start all that were members, or see 'dog cluster recover'",
  'shutting-down': 'shutting down',
};

/** What it is, and what to do if that is not "running". */
export function clusterState(info: ClusterInfo): string {
  return IN_WORDS[clusterStateName(info)];
}

export interface ClusterView {
  info(): Promise<ClusterInfo>;
  nodes(): Promise<ClusterNode[]>;
}

/** `nodes` as in SheepStore.open, repeated for up to `retryMs`. Errors (StoreError): ADDRESS, IO. */
export async function lookAtCluster<T>(
  nodes: string,
  retryMs: number,
  work: (view: ClusterView) => Promise<T>,
): Promise<T> {
  const gateway = new Gateway(parseClusterAddress(nodes), { retryMs });
  const cluster = new Cluster(gateway);
  try {
    return await work({ info: () => cluster.info(), nodes: () => gateway.listNodes() });
  } finally {
    gateway.close();
  }
}
