/**
 * Which process: a number alone is given out again, so it goes with the time the process began and the boot it belongs to.
 * Owns the reading of /proc for that; decides nothing.
 */
import fs from 'node:fs';
import { bootIdOfKernel } from './boot-id.js';

/** Fields of /proc/PID/stat behind the command's name, which may hold anything, up to starttime (proc(5)). */
const STARTTIME_FIELD = 19;

export interface RunningProcess {
  /** In clock ticks since the boot. */
  readonly startTime: number;
  /** As the process gives it. */
  readonly command: string;
}

/** Undefined if there is no such process that this one can see, or only what is left of it until its parent has looked. */
export function lookAtProcess(pid: number): RunningProcess | undefined {
  let stat: string;
  try {
    stat = fs.readFileSync(`/proc/${pid}/stat`, 'utf8');
  } catch {
    return undefined;
  }
  const end = stat.lastIndexOf(')');
  const fields = stat.slice(end + 2).split(' ');
  if (fields[0] === 'Z' && threadsOf(pid) <= 1) return undefined;
  const startTime = Number(fields[STARTTIME_FIELD]);
  return { startTime, command: stat.slice(stat.indexOf('(') + 1, end) };
}

/** A process whose first thread has ended may go on with others. */
function threadsOf(pid: number): number {
  try {
    return fs.readdirSync(`/proc/${pid}/task`).length;
  } catch {
    return 0;
  }
}

/** Of the kernel that runs now: what was noted under another one is of processes that are gone. */
export const bootId: string = bootIdOfKernel() ?? 'unknown';

/** Stands for one process and no other. */
export function processKey(pid: number, startTime: number): string {
  return `${bootId}:${pid}:${startTime}`;
}

/** Whether the process that `key` was made for still runs. */
export function isRunning(key: string): boolean {
  const [boot, pid, startTime] = key.split(':');
  return boot === bootId && lookAtProcess(Number(pid))?.startTime === Number(startTime);
}

/** This process. */
export const ownKey: string = processKey(process.pid, lookAtProcess(process.pid)?.startTime ?? 0);
