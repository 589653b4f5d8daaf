/**
 * Priorities for systemd's journal: where stderr is the journal, each line begins with its priority (sd-daemon(3)), so that
 * `journalctl -p warning` shows the lines to act upon. Owns how levels of the log become priorities. Writes nothing itself.
 */
import fs from 'node:fs';

/** sd-daemon(3), SD_ERR */
const ERROR = 3;
/** By pino's levels: fatal, error, warn, info; lower levels are SD_DEBUG. */
const PRIORITIES: readonly (readonly [level: number, priority: number])[] = [
  [60, 2],
  [50, ERROR],
  [40, 4],
  [30, 6],
];
const DEBUG = 7;
/** The beginning of a line of the log. */
const LEVEL = /^\{"level":(\d+),/;

/**
 * Whether a descriptor is the journal. JOURNAL_STREAM has device and inode of the journal's socket (systemd.exec(5)); stderr may have
 * been redirected since.
 */
export function isJournal(fd: number, env: Readonly<Record<string, string | undefined>> = process.env): boolean {
  const [, device, inode] = /^(\d+):(\d+)$/.exec(env.JOURNAL_STREAM ?? '') ?? [];
  if (device === undefined || inode === undefined) return false;
  try {
    const { dev, ino } = fs.fstatSync(fd, { bigint: true });
    return dev === BigInt(device) && ino === BigInt(inode);
  } catch {
    return false;
  }
}

/** Whole lines with their priorities: lines of the log by their level; any other line is a command's error. */
export function withPriorities(text: string): string {
  // Split at \n only, as the journal does: names may contain other line separators.
  const lines = text.split('\n').map((line) => (line === '' ? line : `<${priorityOf(line)}>${line}`));
  return lines.join('\n');
}

function priorityOf(line: string): number {
  const level = LEVEL.exec(line)?.[1];
  if (level === undefined) return ERROR;
  return PRIORITIES.find(([least]) => Number(level) >= least)?.[1] ?? DEBUG;
}
