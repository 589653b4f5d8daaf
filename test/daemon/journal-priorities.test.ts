/**
 * Lines of the log have priorities in the journal, and are pure JSON everywhere else. Where this machine has systemd, the journal is
 * a real one, in a mount namespace, so that the machine's own is not touched.
 */
import fs from 'node:fs';
import path from 'node:path';
import { describe, expect, test } from 'vitest';
import { isJournal, withPriorities } from '../../src/daemon/log/journal-priorities.js';
import {
  BIN,
  ended,
  haveCommand,
  run,
  skipBecause,
  startDaemon,
  temporaryDirectory,
  waitUntil,
  spawn,
} from '../harness/daemon.js';

const JOURNALD = '/lib/systemd/systemd-journald';

function streamOf(fd: number): string {
  const { dev, ino } = fs.fstatSync(fd, { bigint: true });
  return `${dev}:${ino}`;
}

describe('a line', () => {
  test.each([
    ['{"level":60,"msg":"x"}\n', '<2>{"level":60,"msg":"x"}\n'],
    ['{"level":50,"msg":"x"}\n', '<3>{"level":50,"msg":"x"}\n'],
    ['{"level":40,"msg":"x"}\n', '<4>{"level":40,"msg":"x"}\n'],
    ['{"level":30,"msg":"{\\"level\\":60,"}\n', '<6>{"level":30,"msg":"{\\"level\\":60,"}\n'],
    ['{"level":20,"msg":"x"}\n', '<7>{"level":20,"msg":"x"}\n'],
    ['{"level":10,"msg":"x"}\n', '<7>{"level":10,"msg":"x"}\n'],
    ['sheepgate: it failed\n', '<3>sheepgate: it failed\n'],
    ['Error: x\n    at y\n', '<3>Error: x\n<3>    at y\n'],
    ['a\n\nb', '<3>a\n\n<3>b'],
    ['{"level":30,"msg":"a\u2028b\rc"}\n', '<6>{"level":30,"msg":"a\u2028b\rc"}\n'],
  ])('%j is %j', (line, expected) => {
    expect(withPriorities(line)).toBe(expected);
  });
});

test('stderr is the journal only if it is the very file that systemd names', () => {
  const fd = fs.openSync(path.join(temporaryDirectory(), 'log'), 'w');
  const stream = streamOf(fd);
  expect(isJournal(fd, { JOURNAL_STREAM: stream })).toBe(true);
  for (const JOURNAL_STREAM of [undefined, '', 'x', '1:2', `${stream}0`, `${stream}:1`, ` ${stream}`]) {
    expect(isJournal(fd, { JOURNAL_STREAM })).toBe(false);
  }
  const other = fs.openSync(path.join(temporaryDirectory(), 'other'), 'w');
  expect(isJournal(other, { JOURNAL_STREAM: stream })).toBe(false);
  fs.closeSync(other);
  fs.closeSync(fd);
  expect(isJournal(fd, { JOURNAL_STREAM: stream })).toBe(false);
});

/** Run `sheepgate` with its stderr in a file that JOURNAL_STREAM names. */
async function inFile(args: readonly string[], until: (text: string) => boolean): Promise<string> {
  const file = path.join(temporaryDirectory(), 'log');
  const fd = fs.openSync(file, 'w');
  const child = spawn(process.execPath, [BIN, ...args], {
    env: { ...process.env, JOURNAL_STREAM: streamOf(fd) },
    stdio: ['ignore', 'ignore', fd],
  });
  fs.closeSync(fd);
  const read = (): string => fs.readFileSync(file, 'utf8');
  try {
    await waitUntil(() => until(read()) || child.exitCode !== null, 'it has said so, or has ended');
    child.kill('SIGTERM');
    await ended(child);
    return read();
  } finally {
    child.kill('SIGKILL');
  }
}

test('every line of serve has a priority, also its error at the start; errors of commands have one, too', async () => {
  const directory = temporaryDirectory();
  const store = path.join(directory, 'store');
  const serving = ['serve', '--store', store, '--listen', 'tcp:127.0.0.1:0', '--create', 'disk:1M'];
  const log = await inFile(serving, (text) => text.includes('"ready"'));
  const lines = log.trimEnd().split('\n');
  for (const line of lines) expect(line).toMatch(/^<[346]>\{"level":[345]0,/);
  // The warning that every user of the machine can connect.
  expect(lines.some((line) => line.startsWith('<4>{"level":40,'))).toBe(true);
  expect(lines.some((line) => line.startsWith('<6>{"level":30,') && line.includes('"stopped"'))).toBe(true);
  const missing = ['--store', path.join(directory, 'none'), '--create-store', 'no'];
  const failing = ['serve', ...missing, '--listen', `unix:${path.join(directory, 'nbd.sock')}`];
  expect(await inFile(failing, () => false)).toMatch(/^<3>sheepgate: .*none/);
  expect(await inFile(['serve', '--nonsense'], () => false)).toMatch(/^<3>sheepgate: .*--nonsense/);
  expect(await inFile(['vdi', 'show', 'none', '--store', store], () => false)).toMatch(/^<3>sheepgate: no VDI/);
});

test('without systemd, and where stderr was redirected, the log is pure JSON', async () => {
  for (const JOURNAL_STREAM of [undefined, '8:1234567']) {
    const daemon = await startDaemon({ env: { JOURNAL_STREAM } });
    await daemon.stop();
    for (const line of daemon.log().trimEnd().split('\n')) JSON.parse(line);
  }
});

/** Its directories are on a tmpfs of its own; the output of the service goes where systemd leads it. */
const IN_REAL_JOURNAL = `
mount -t tmpfs tmpfs /run && mount -t tmpfs tmpfs /etc/systemd || exit 77
mkdir -p /run/log/journal
[ -s /etc/machine-id ] || exit 77
printf '[Journal]\\nReadKMsg=no\\nStorage=volatile\\n' >/etc/systemd/journald.conf
${JOURNALD} 2>/run/errors & journald=$!
tries=0
until [ -S /run/systemd/journal/stdout ]; do
  tries=$((tries + 1)); [ $tries -lt 100 ] || exit 77
  sleep 0.1
done
systemd-cat -t sheepgate sh -c 'JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2) exec "$0" "$@"' "$@" &
service=$!
read_log() { journalctl --directory=/run/log/journal -t sheepgate -p $1 -o cat --no-pager; }
tries=0
until read_log info | grep -q '"ready"'; do
  tries=$((tries + 1)); [ $tries -lt 200 ] || break
  sleep 0.1
done
kill $service
wait $service
journalctl --sync 2>/dev/null
for priority in warning info; do
  echo "priority $priority"
  read_log $priority
done
kill $journald
wait $journald
`;

test('journalctl -p warning shows warnings and errors of serve, and nothing else', async (context) => {
  for (const command of ['unshare', 'systemd-cat', 'journalctl']) {
    if (!haveCommand(command)) skipBecause(context, `${command} is not installed`);
  }
  if (!fs.existsSync(JOURNALD)) skipBecause(context, 'there is no systemd-journald');
  const store = path.join(temporaryDirectory(), 'store');
  const serving = [BIN, 'serve', '--store', store, '--listen', 'tcp:127.0.0.1:0'];
  const args = ['-m', 'sh', '-c', IN_REAL_JOURNAL, 'sh', process.execPath, ...serving];
  const result = await run('unshare', args, { timeoutMs: 60_000 });
  if (result.code === 77 || /Operation not permitted/.test(result.stderr)) {
    skipBecause(context, `a journal of our own cannot be started here: ${result.stderr}`);
  }
  const [, warnings = '', all = ''] = result.stdout.split(/^priority .*\n/m);
  const said = result.stdout + result.stderr;
  // The warning that every user of the machine can connect. The journal has removed the priorities.
  expect(warnings, said).toMatch(/^\{"level":40,.*"listener":"tcp:127\.0\.0\.1:/);
  expect(warnings).not.toContain('"level":30');
  expect(all).toContain(warnings.trimEnd());
  expect(all).toMatch(/^\{"level":30,.*"ready"\}$/m);
});
