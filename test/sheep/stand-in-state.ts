/**
 * The state that the stand-in's nodes report: locks, space, recovery, members of earlier epochs, and that the cluster does
 * not serve. As in sheep/ops.c, requests about a node need a cluster that serves, requests about the cluster do not.
 */
import { VDI_STATE_BYTES } from '../../src/sheepdog/state-layouts.js';

const NODE_LIST_ENTRY = 80;
const EPOCH_LOG = 48;
const MIB = 2 ** 20;

export const StateOp = { STAT_SHEEP: 0x86, STAT_CLUSTER: 0x87, STAT_RECOVERY: 0x97, GET_VDI_COPIES: 0xab } as const;
export const StateRes = { WAIT_FOR_FORMAT: 0x16, WAIT_FOR_JOIN: 0x17, BUFFER_SMALL: 0x88 } as const;

export interface StateAnswer {
  readonly result: number;
  readonly data?: Buffer;
  readonly fill?: (header: Buffer) => void;
}

export class StandInState {
  /** By node: enum rw_state, objects recovered, objects in total. */
  readonly recovery = new Map<number, readonly [phase: number, done: number, total: number]>();
  /** Epochs, the newest first, with the ports of their members. */
  epochs: { readonly epoch: number; readonly sinceSec: number; readonly ports: readonly number[] }[] = [];
  /** Vid -> the nodes that share its lock. */
  readonly shared = new Map<number, number[]>();
  /** Vid -> the node through which the lock was taken. */
  readonly locked = new Map<number, number>();
  /** The result of all requests while the cluster does not serve. */
  notServing: number | undefined;
  isRecoveryDisabled = false;

  /** Completes struct cluster_info, in which the stand-in has already written the fields of a serving cluster. */
  describe(info: Buffer): void {
    if (this.notServing === undefined) return;
    info[20] = 2;
    if (this.notServing === StateRes.WAIT_FOR_FORMAT) info.fill(0, 8, 16);
    // A cluster that waits for nodes was formatted before: this one on 2023-11-14.
    if (this.notServing === StateRes.WAIT_FOR_JOIN) info.writeBigUInt64LE(1_700_000_000n << 32n, 8);
  }

  /** Undefined for requests that are not about the state. `ports`: of all nodes, members or not. `vids`: all ever used. */
  answer(
    opcode: number,
    node: number,
    header: Buffer,
    ports: readonly number[],
    vids: Iterable<number>,
  ): StateAnswer | undefined {
    switch (opcode) {
      case StateOp.STAT_SHEEP:
        if (this.notServing !== undefined) return { result: this.notServing };
        return {
          result: 0,
          fill: (h) => {
            h.writeBigUInt64LE(BigInt(1024 * MIB), 32);
            h.writeBigUInt64LE(BigInt((1000 - node) * MIB), 40);
          },
        };
      case StateOp.STAT_RECOVERY: {
        if (this.notServing !== undefined) return { result: this.notServing };
        const data = Buffer.alloc(24);
        const recovery = this.recovery.get(node);
        if (recovery) {
          data[0] = 1;
          data.writeUInt32LE(recovery[0], 4);
          data.writeBigUInt64LE(BigInt(recovery[1]), 8);
          data.writeBigUInt64LE(BigInt(recovery[2]), 16);
        }
        return { result: 0, data };
      }
      case StateOp.STAT_CLUSTER:
        return this.#epochLogs(header);
      case StateOp.GET_VDI_COPIES:
        return this.#vdiStates(header.readUInt32LE(12), ports, [...vids]);
      default:
        return undefined;
    }
  }

  #epochLogs(header: Buffer): StateAnswer {
    const room = header.readUInt32LE(40);
    const stride = EPOCH_LOG + room * NODE_LIST_ENTRY;
    const logs = this.epochs.slice(0, Math.floor(header.readUInt32LE(12) / stride));
    if (logs.some(({ ports }) => ports.length > room)) return { result: StateRes.BUFFER_SMALL };
    const data = Buffer.alloc(logs.length * stride);
    for (const [n, { epoch, sinceSec, ports }] of logs.entries()) {
      const at = n * stride;
      data.writeBigUInt64LE(BigInt(sinceSec), at + 8);
      data.writeUInt32LE(epoch, at + 16);
      data.writeUInt32LE(ports.length, at + 20);
      if (n === 0) data[at + 24] = this.isRecoveryDisabled ? 1 : 0;
      for (const [member, port] of ports.entries()) {
        const entry = at + EPOCH_LOG + member * NODE_LIST_ENTRY;
        writeNodeId(data, entry + 24, port);
        data.writeUInt16LE(128, entry + 64);
      }
    }
    return { result: this.notServing ?? 0, data };
  }

  #vdiStates(room: number, ports: readonly number[], vids: readonly number[]): StateAnswer {
    if (this.notServing !== undefined) return { result: this.notServing };
    if (room < vids.length * VDI_STATE_BYTES) return { result: StateRes.BUFFER_SMALL };
    const data = Buffer.alloc(vids.length * VDI_STATE_BYTES);
    for (const [n, vid] of vids.entries()) {
      const at = n * VDI_STATE_BYTES;
      const owner = this.locked.get(vid);
      const participants = this.shared.get(vid) ?? [];
      data.writeUInt32LE(vid, at);
      data.writeUInt32LE(participants.length > 0 ? 3 : owner !== undefined ? 2 : 1, at + 16);
      if (owner !== undefined) writeNodeId(data, at + 20, ports[owner] ?? 0);
      data.writeUInt32LE(participants.length, at + 60);
      for (const [p, node] of participants.entries()) {
        data.writeUInt32LE(2, at + 64 + p * 4);
        writeNodeId(data, at + 64 + 31 * 4 + p * 40, ports[node] ?? 0);
      }
    }
    return { result: 0, data };
  }

  /** sheep/vdi.c, vdi_unlock: any node ends an exclusive lock; each node ends its own part of a shared lock. */
  release(vid: number, node: number, isShared: boolean): void {
    if (!isShared) return void this.locked.delete(vid);
    const left = (this.shared.get(vid) ?? []).filter((other) => other !== node);
    if (left.length > 0) this.shared.set(vid, left);
    else this.shared.delete(vid);
  }
}

/** struct node_id of 127.0.0.1. */
function writeNodeId(into: Buffer, at: number, port: number): void {
  into.set([127, 0, 0, 1], at + 12);
  into.writeUInt16LE(port, at + 16);
}
