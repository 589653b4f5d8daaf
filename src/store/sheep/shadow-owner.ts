/**
 * The owner mark of a temporary snapshot: eight bytes in its inode (`mark` in src/sheepdog/inode.ts) that name the machine, the
 * cluster and the process that keeps it up to date. When that process has ended, any process of the same machine may drop the snapshot.
 */
import { createHash } from 'node:crypto';
import fs from 'node:fs';
import os from 'node:os';

const HOST_BYTES = 4;
/** Process ids are smaller than 2^22 (PID_MAX_LIMIT); the bits above hold the low bits of the process's start time. */
const PID_BITS = 22;
const STARTED_MASK = 2 ** (32 - PID_BITS) - 1;
/** Index of starttime among the fields of /proc/PID/stat after the command's name, which may contain anything. */
const STARTTIME_FIELD = 19;

/** The mark of this process for a cluster made at this time, milliseconds since the epoch. */
export function ownerMark(clusterCreatedAt: number): Buffer {
  const mark = Buffer.alloc(HOST_BYTES + 4);
  createHash('sha256').update(`${os.hostname()}\0${clusterCreatedAt}`).digest().copy(mark, 0, 0, HOST_BYTES);
  mark.writeUInt32LE(processMark(process.pid) ?? process.pid, HOST_BYTES);
  return mark;
}

/** Whether this mark is ours, or of a process of this machine that has ended. */
export function isOursToDrop(mark: Buffer, ours: Buffer): boolean {
  if (mark.equals(ours)) return true;
  if (!mark.subarray(0, HOST_BYTES).equals(ours.subarray(0, HOST_BYTES))) return false;
  const theirs = mark.readUInt32LE(HOST_BYTES);
  return processMark(theirs % 2 ** PID_BITS) !== theirs;
}

/** Process id and start in one number; undefined if there is no such process. */
function processMark(pid: number): number | undefined {
  let stat: string;
  try {
    stat = fs.readFileSync(`/proc/${pid}/stat`, 'utf8');
  } catch {
    return undefined;
  }
  const started = Number(stat.slice(stat.lastIndexOf(')') + 2).split(' ')[STARTTIME_FIELD]);
  return (started % (STARTED_MASK + 1)) * 2 ** PID_BITS + pid;
}
