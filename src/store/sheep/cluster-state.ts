/** The state of a cluster in words: whether it serves, and what to do if it does not. Sends nothing. */
import { STATUS_RUNNING, STATUS_WAITING } from '../../sheepdog/protocol.js';
import type { ClusterInfo } from '../../sheepdog/cluster-info.js';

export type StateName = 'running' | 'not-formatted' | 'waiting' | 'shutting-down';

export function clusterStateName({ status, createdAt }: Pick<ClusterInfo, 'status' | 'createdAt'>): StateName {
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

/** The state, and what to do if it is not "running". */
export function clusterState(info: Pick<ClusterInfo, 'status' | 'createdAt'>): string {
  return IN_WORDS[clusterStateName(info)];
}
