/**
 * Whose a temporary snapshot is: eight bytes in its inode that name this machine, the cluster and the process that keeps
 * it up to date. What a process of this machine has left behind that is not there any more is for any other to remove.
 */
import { createHash } from 'node:crypto';
import fs from 'node:fs';
import os from 'node:os';

const HOST_BYTES = 4;
/** Process ids are smaller than 2^22 (PID_MAX_LIMIT); above it is when the process began, as far as there is room. */
const PID_BITS = 22;
const STARTED_MASK = 2 ** (32 - PID_BITS) - 1;
/** Fields of /proc/PID/stat behind the command's name, which may hold anything, up to starttime. */
const STARTTIME_FIELD = 19;

/** The mark of this process for a cluster made at this time, milliseconds since the epoch. */
export function ownerMark(clusterCreatedAt: number): Buffer {
  const mark = Buffer.alloc(HOST_BYTES + 4);
  createHash('sha256').update(`${os.hostname()}\0${clusterCreatedAt}`).digest().copy(mark, 0, 0, HOST_BYTES);
  mark.writeUInt32LE(processMark(process.pid) ?? process.pid, HOST_BYTES);
  return mark;
}

/** Whether a snapshot with this mark is ours, or was a process's of this machine that has ended. */
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
