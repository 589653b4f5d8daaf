/** Where the daemon's bound for memory comes from: the machine, its cgroups of either version, or --max-memory. */
import fs from 'node:fs';
import path from 'node:path';
import { expect, test } from 'vitest';
import { machineMemory } from '../../src/daemon/machine-memory.js';
import { defaultMemoryBudget } from '../../src/daemon/memory-budget.js';
import { cli, startDaemon, temporaryDirectory } from '../harness/daemon.js';

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

test('the budget is an eighth of it, not less than the longest requests need, not more than is of use', () => {
  expect(defaultMemoryBudget(4 * GIB)).toBe(512 * MIB);
  expect(defaultMemoryBudget(256 * GIB)).toBe(GIB);
  expect(defaultMemoryBudget(128 * MIB)).toBe(96 * MIB);
});

test('serve says how much it is, and takes it from --max-memory', async () => {
  const daemon = await startDaemon({ args: ['--create', 'disk:1M', '--max-memory', '128M'] });
  expect(daemon.log()).toContain(`"maxMemoryBytes":${128 * MIB}`);
  expect((await daemon.stop()).code).toBe(0);
  const result = await cli(['serve', '--max-memory', '10M'], { store: path.join(temporaryDirectory(), 'store') });
  expect(result.code).toBe(2);
  expect(result.stderr).toContain('96 MiB at least');
});
