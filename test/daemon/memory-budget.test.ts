/** The daemon's memory bound: from the machine, its cgroups (version 1 or 2), or --max-memory. */
import fs from 'node:fs';
import path from 'node:path';
import { expect, onTestFinished, test } from 'vitest';
import { NbdClient } from 'nbd-server-ts';
import { machineMemory } from '../../src/system/machine-memory.js';
import { defaultMemoryBudget } from '../../src/daemon/memory-budget.js';
import { cli, ended, haveCommand, skipBecause, startDaemon, temporaryDirectory, spawn } from '../harness/daemon.js';

const MIB = 2 ** 20;
const GIB = 2 ** 30;

/** A /proc and a /sys with these files. */
function machine(files: Readonly<Record<string, string>>): string {
  const root = temporaryDirectory();
  for (const [name, text] of Object.entries(files)) {
    fs.mkdirSync(path.dirname(path.join(root, name)), { recursive: true });
    fs.writeFileSync(path.join(root, name), text);
  }
  return root;
}

test.each([
  ['no cgroups', {}, 64 * GIB],
  ['version 2 without a limit', { 'proc/self/cgroup': '0::/a\n', 'sys/fs/cgroup/a/memory.max': 'max\n' }, 64 * GIB],
  ['version 2', { 'proc/self/cgroup': '0::/a/b\n', 'sys/fs/cgroup/a/b/memory.max': `${GIB}\n` }, GIB],
  [
    'version 2, memory.high',
    {
      'proc/self/cgroup': '0::/a\n',
      'sys/fs/cgroup/a/memory.max': `${2 * GIB}\n`,
      'sys/fs/cgroup/a/memory.high': `${GIB}\n`,
    },
    GIB,
  ],
  [
    'version 2, a slice above',
    {
      'proc/self/cgroup': '0::/a.slice/b\n',
      'sys/fs/cgroup/a.slice/memory.max': `${GIB}\n`,
      'sys/fs/cgroup/a.slice/b/memory.max': 'max\n',
    },
    GIB,
  ],
  [
    'version 2, a container that sees the path of its host',
    { 'proc/self/cgroup': '0::/docker/x\n', 'sys/fs/cgroup/memory.max': `${GIB}\n` },
    GIB,
  ],
  [
    'version 1',
    {
      'proc/self/cgroup': '5:cpu,cpuacct:/x\n4:memory:/a\n0::/\n',
      'sys/fs/cgroup/memory/a/memory.limit_in_bytes': `${GIB}\n`,
    },
    GIB,
  ],
  [
    'version 1 without a limit',
    { 'proc/self/cgroup': '4:memory:/\n', 'sys/fs/cgroup/memory/memory.limit_in_bytes': '9223372036854771712\n' },
    64 * GIB,
  ],
])('what a process may use: %s', (_, files, expected) => {
  expect(machineMemory(machine(files), 64 * GIB)).toBe(expected);
});

test('the budget is an eighth of the memory, at least what the longest requests need, at most what is useful', () => {
  expect(defaultMemoryBudget(4 * GIB)).toBe(512 * MIB);
  expect(defaultMemoryBudget(256 * GIB)).toBe(GIB);
  expect(defaultMemoryBudget(128 * MIB)).toBe(96 * MIB);
});

test('nbdcopy from one export of a daemon to another completes with the smallest memory bound', async (context) => {
  if (!haveCommand('nbdcopy')) return skipBecause(context, 'nbdcopy is not installed');
  const daemon = await startDaemon({
    args: ['--create', 'from:256M', '--create', 'to:256M', '--max-memory', '96M'],
  });
  const uri = (name: string): string => `nbd+unix:///${name}?socket=${daemon.socket}`;
  const client = await NbdClient.connect({ path: daemon.socket });
  await client.go('from');
  const data = Buffer.alloc(16 * MIB, 'sheepgate');
  for (let at = 0; at < 256 * MIB; at += data.length) await client.write(at, data);
  await client.disconnect();
  const sizes = ['--connections=4', '--requests=64', '--request-size=33554432', '--queue-size=1073741824'];
  const copy = spawn('nbdcopy', [...sizes, uri('from'), uri('to')], { stdio: 'ignore' });
  onTestFinished(() => void copy.kill('SIGKILL'));
  expect((await ended(copy)).code).toBe(0);
  const check = await NbdClient.connect({ path: daemon.socket });
  await check.go('to');
  for (let at = 0; at < 256 * MIB; at += data.length)
    expect((await check.read(at, data.length)).equals(data)).toBe(true);
  await check.disconnect();
  expect((await daemon.stop()).code).toBe(0);
});

test('serve logs the budget, and takes it from --max-memory', async () => {
  const daemon = await startDaemon({ args: ['--create', 'disk:1M', '--max-memory', '128M'] });
  await daemon.logged(`"maxMemoryBytes":${128 * MIB}`);
  expect((await daemon.stop()).code).toBe(0);
  const result = await cli(['serve', '--max-memory', '10M'], { store: path.join(temporaryDirectory(), 'store') });
  expect(result.code).toBe(2);
  expect(result.stderr).toContain('96 MiB at least');
});
