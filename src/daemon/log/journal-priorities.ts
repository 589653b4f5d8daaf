/**
 * The journal of systemd: where stderr leads there, each line begins with its priority (sd-daemon(3)), so that
 * `journalctl -p warning` shows what must be acted upon. Owns how levels become priorities. Writes nothing itself.
 */
import fs from 'node:fs';

/** sd-daemon(3), SD_ERR */
const ERROR = 3;
/** By levels of pino: fatal, error, warn, info; what is lower is SD_DEBUG. */
const PRIORITIES: readonly (readonly [level: number, priority: number])[] = [
  [60, 2],
  [50, ERROR],
  [40, 4],
  [30, 6],
];
const DEBUG = 7;
/** How a line of the log begins. */
const LEVEL = /^\{"level":(\d+),/;

/**
 * Whether a descriptor is the journal's: systemd.exec(5) says in JOURNAL_STREAM which file it has made for that, and stderr
 * may have been led elsewhere since.
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

/** Whole lines with their priorities: lines of the log by their level, all others are what a command has failed of. */
export function withPriorities(text: string): string {
  // Lines as the journal has them: names in them may have separators of their own.
  const lines = text.split('\n').map((line) => (line === '' ? line : `<${priorityOf(line)}>${line}`));
  return lines.join('\n');
}

function priorityOf(line: string): number {
  const level = LEVEL.exec(line)?.[1];
  if (level === undefined) return ERROR;
  return PRIORITIES.find(([least]) => Number(level) >= least)?.[1] ?? DEBUG;
}
