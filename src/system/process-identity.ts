/**
 * Which process: process numbers are reused, so a process is named by its number, its start time and the boot.
 * Owns the parsing of /proc/PID/stat; decides nothing.
 */
import fs from 'node:fs';
import { bootIdOfKernel } from './boot-id.js';

/** Index of starttime among the fields of /proc/PID/stat behind the command's name, which may hold anything (proc(5)). */
const STARTTIME_FIELD = 19;

export interface RunningProcess {
  /** Clock ticks since the boot. */
  readonly startTime: number;
  /** The name that the process gives itself. */
  readonly command: string;
}

/** Undefined if this process can see no such process, or only a zombie that its parent has not waited for. */
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

/** A process whose first thread has ended may continue with others. */
function threadsOf(pid: number): number {
  try {
    return fs.readdirSync(`/proc/${pid}/task`).length;
  } catch {
    return 0;
  }
}

/** The running kernel's; 'unknown' without procfs. Records with another boot id are about processes that are gone. */
export const bootId: string = bootIdOfKernel() ?? 'unknown';

/** Names one process and no other. */
export function processKey(pid: number, startTime: number): string {
  return `${bootId}:${pid}:${startTime}`;
}

/** Whether the process with this key still runs. */
export function isRunning(key: string): boolean {
  const [boot, pid, startTime] = key.split(':');
  return boot === bootId && lookAtProcess(Number(pid))?.startTime === Number(startTime);
}

/** This process. */
export const ownKey: string = processKey(process.pid, lookAtProcess(process.pid)?.startTime ?? 0);
