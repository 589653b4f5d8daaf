/**
 * What nodes say of their cluster (internal_proto.h, struct cluster_info; of 0.8, struct epoch_log). Owns its byte offsets.
 */
import { blob, nu64, s16, struct, u16, u32, u8 } from 'buffer-layout';
import {
  DEFAULT_BLOCK_SIZE_SHIFT,
  Result,
  STATUS_RUNNING,
  STATUS_SHUTTING_DOWN,
  STATUS_WAITING,
  type SheepVersion,
} from './protocol.js';
import { decodeText } from './text-fields.js';
import { milliseconds } from './times.js';

export interface ClusterInfo {
  readonly epoch: number;
  readonly createdAt: number;
  readonly flags: number;
  readonly copies: number;
  readonly copyPolicy: number;
  /** enum sd_status. */
  readonly status: number;
  readonly blockSizeShift: number;
  readonly store: string;
  readonly nodeCount: number;
  readonly version: SheepVersion;
}

interface ClusterInfoLayout {
  nrNodes: number;
  epoch: number;
  ctimeNsec: number;
  ctimeSec: number;
  flags: number;
  nrCopies: number;
  copyPolicy: number;
  status: number;
  blockSizeShift: number;
  store: Buffer;
}

/** internal_proto.h, struct cluster_info, up to its nodes. */
const clusterInfoLayout = struct<ClusterInfoLayout>([
  u8('protoVer'),
  u8('disableRecovery'),
  s16('nrNodes'),
  u32('epoch'),
  u32('ctimeNsec'),
  u32('ctimeSec'),
  u16('flags'),
  u8('nrCopies'),
  u8('copyPolicy'),
  u8('status'),
  u8('blockSizeShift'),
  blob(3, 'pad'),
  blob(16, 'store'),
]);

/** internal_proto.h of 0.8, struct epoch_log, which 0.8 has in place of struct cluster_info. */
const oldEpochLogLayout = struct<OldEpochLogLayout>([
  u32('ctimeNsec'),
  u32('ctimeSec'),
  nu64('time'),
  u32('epoch'),
  u32('nrNodes'),
  u8('disableRecovery'),
  u8('nrCopies'),
  u8('copyPolicy'),
  u8('pad'),
  blob(16, 'store'),
]);

/** A time that a node does not report. */
export const UNKNOWN_TIME = -1;
/** The status by the result of STAT_CLUSTER. */
const OLD_STATUS: ReadonlyMap<number, number> = new Map([
  [Result.SUCCESS, STATUS_RUNNING],
  [Result.WAIT_FOR_FORMAT, STATUS_WAITING],
  [Result.WAIT_FOR_JOIN, STATUS_WAITING],
]);

interface OldEpochLogLayout {
  ctimeNsec: number;
  ctimeSec: number;
  epoch: number;
  nrNodes: number;
  nrCopies: number;
  copyPolicy: number;
  store: Buffer;
}

/**
 * The answer of a node of 0.8 to STAT_CLUSTER. The result tells whether the cluster serves. If it does not, `bytes` may be
 * empty: then `createdAt` of a formatted cluster is UNKNOWN_TIME.
 */
export function decodeOldClusterInfo(bytes: Buffer, result: number = Result.SUCCESS): ClusterInfo {
  const log = oldEpochLogLayout.decode(bytes);
  const createdAt = milliseconds(log.ctimeSec, log.ctimeNsec);
  return {
    epoch: log.epoch,
    createdAt: result === Result.WAIT_FOR_FORMAT ? 0 : createdAt || UNKNOWN_TIME,
    flags: 0,
    copies: log.nrCopies,
    copyPolicy: log.copyPolicy,
    status: OLD_STATUS.get(result) ?? STATUS_SHUTTING_DOWN,
    blockSizeShift: DEFAULT_BLOCK_SIZE_SHIFT,
    store: decodeText(log.store),
    nodeCount: log.nrNodes,
    version: '0.8',
  };
}

/** Offset of the store's name in 0.9, which has objects of one size only. */
const OLD_STORE_OFFSET = 28;

export function decodeClusterInfo(bytes: Buffer, version: SheepVersion = '1.0'): ClusterInfo {
  const info = clusterInfoLayout.decode(bytes);
  const isOld = version === '0.9';
  return {
    epoch: info.epoch,
    createdAt: milliseconds(info.ctimeSec, info.ctimeNsec),
    flags: info.flags,
    copies: info.nrCopies,
    copyPolicy: info.copyPolicy,
    status: info.status,
    blockSizeShift: isOld ? DEFAULT_BLOCK_SIZE_SHIFT : info.blockSizeShift,
    store: decodeText(isOld ? bytes.subarray(OLD_STORE_OFFSET, OLD_STORE_OFFSET + info.store.length) : info.store),
    nodeCount: info.nrNodes,
    version,
  };
}
