/**
 * The state of a process at this moment, in words for the report of a failed test: its threads, the system call of each, and
 * its TCP connections. Read from /proc; the process is not stopped, and need not be ours. Never fails.
 */
import fs from 'node:fs';

/** Threads beyond this are only counted: idle threads of a pool look alike. */
const MAX_THREADS = 40;
/** include/net/tcp_states.h */
const TCP_STATES = [
  ...['ESTABLISHED', 'SYN_SENT', 'SYN_RECV', 'FIN_WAIT1', 'FIN_WAIT2', 'TIME_WAIT', 'CLOSE', 'CLOSE_WAIT'],
  ...['LAST_ACK', 'LISTEN', 'CLOSING'],
];

/** Several lines. */
export function processState(pid: number): string {
  if (!fs.existsSync(`/proc/${pid}`)) return `process ${pid} is gone`;
  return [`process ${pid}:`, ...threadsOf(pid), ...connectionsOf(pid)].join('\n  ');
}

/** Whether every thread of it is stopped (SIGSTOP) until SIGCONT. */
export function isStopped(pid: number): boolean {
  const threads = namesIn(`/proc/${pid}/task`);
  return threads.length > 0 && threads.every((tid) => /^State:\s*T/m.test(textOf(`/proc/${pid}/task/${tid}/status`)));
}

/** One line for threads in the same state. The numbers of system calls are those of /proc/PID/syscall (proc(5)). */
function threadsOf(pid: number): string[] {
  const counts = new Map<string, number>();
  const threads = namesIn(`/proc/${pid}/task`);
  for (const tid of threads.slice(0, MAX_THREADS)) {
    const task = `/proc/${pid}/task/${tid}`;
    const state = /^State:\s*(.*)$/m.exec(textOf(`${task}/status`))?.[1] ?? 'gone';
    const [call = ''] = textOf(`${task}/syscall`).split(' ');
    const where = textOf(`${task}/wchan`);
    const which = tid === String(pid) ? 'main thread' : 'thread';
    const line = `${which} ${textOf(`${task}/comm`)}: ${state}, system call ${call}, in ${where}`;
    counts.set(line, (counts.get(line) ?? 0) + 1);
  }
  const lines = Array.from(counts, ([line, count]) => (count > 1 ? `${line} (${count} of them)` : line));
  if (threads.length > MAX_THREADS) lines.push(`${threads.length - MAX_THREADS} more threads`);
  return lines;
}

/** Includes connections that are not accepted yet: for a listener, waiting bytes are connections. */
function connectionsOf(pid: number): string[] {
  const inodes = new Set<string>();
  for (const fd of namesIn(`/proc/${pid}/fd`)) {
    const inode = /^socket:\[(\d+)\]$/.exec(linkOf(`/proc/${pid}/fd/${fd}`))?.[1];
    if (inode !== undefined) inodes.add(inode);
  }
  return ['tcp', 'tcp6'].flatMap((kind) =>
    textOf(`/proc/${pid}/net/${kind}`)
      .split('\n')
      .slice(1)
      .map((line) => line.trim().split(/\s+/))
      .filter((fields) => inodes.has(fields[9] ?? ''))
      .map(([, local = '', remote = '', state = '', queues = '']) => {
        const [unsent = '', unread = ''] = queues.split(':').map((bytes) => parseInt(bytes, 16));
        const name = TCP_STATES[parseInt(state, 16) - 1] ?? state;
        return `${kind} port ${portOf(local)} to ${portOf(remote)}: ${name}, ${unsent} bytes unsent, ${unread} unread or unaccepted`;
      }),
  );
}

function portOf(address: string): number {
  return parseInt(address.split(':')[1] ?? '', 16);
}

function namesIn(directory: string): string[] {
  try {
    return fs.readdirSync(directory);
  } catch {
    return [];
  }
}

function textOf(file: string): string {
  try {
    return fs.readFileSync(file, 'utf8').trim();
  } catch {
    return '?';
  }
}

function linkOf(file: string): string {
  try {
    return fs.readlinkSync(file);
  } catch {
    return '';
  }
}
