/** A full filesystem under the store: the client gets ENOSPC, the daemon continues, and flushed data is kept. */
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { expect } from 'vitest';
import { cli, nbdsh, needs, skipBecause, startDaemon, temporaryDirectory } from '../harness/daemon.js';

function mountSmallTmpfs(directory: string): boolean {
  try {
    execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=48m', 'sheepgate-test', directory], { stdio: 'ignore' });
    return true;
  } catch {
    return false;
  }
}

const FILL = `
import errno
h.set_strict_mode(0)
block = 1024 * 1024
written = 0
stamp = lambda n: bytes([n % 251 + 1]) * block
try:
    for n in range(256):
        h.pwrite(stamp(n), n * block); h.flush(); written = n + 1
    raise AssertionError('the disk never got full')
except nbd.Error as e:
    assert e.errnum == errno.ENOSPC, e
print(written)
for n in range(written):
    assert h.pread(block, n * block) == stamp(n), n
`;

const VERIFY = (count: number): string => `
block = 1024 * 1024
for n in range(${count}):
    assert h.pread(block, n * block) == bytes([n % 251 + 1]) * block, n
`;

const GO_ON = `
block = 1024 * 1024
h.trim(8 * block, 0); h.flush()
h.pwrite(b'x' * (2 * block), 0); h.flush()
assert h.pread(2 * block, 0) == b'x' * (2 * block)
assert h.pread(block, 4 * block) == bytes(block)
`;

needs('nbdsh')(
  'ENOSPC reaches the client, flushed data is kept, and trimmed space can be used again',
  async (context) => {
    const mount = path.join(temporaryDirectory(), 'small');
    fs.mkdirSync(mount);
    if (!mountSmallTmpfs(mount)) return skipBecause(context, 'mounting a tmpfs needs root');
    try {
      const store = path.join(mount, 'store');
      let daemon = await startDaemon({ store, args: ['--create', 'disk:256M'] });
      const filled = await nbdsh(['-u', daemon.uri('disk'), '-c', FILL]);
      expect(filled.code, filled.stderr + daemon.log()).toBe(0);
      const count = Number(filled.stdout);
      expect(count).toBeGreaterThan(20);
      // the same data after a crash on the full disk
      await daemon.kill();
      daemon = await startDaemon({ store });
      expect((await nbdsh(['-u', daemon.uri('disk'), '-c', VERIFY(count)])).stderr).toBe('');
      // a snapshot needs little space, a copy of an object needs much: only the copy must fail
      expect((await cli(['vdi', 'snapshot', 'disk', 's'], { store })).stderr).toBe('');
      const copy = await nbdsh(['-u', daemon.uri('disk'), '-c', "[h.pwrite(b'y', o << 22) for o in range(10)]"]);
      expect(copy.stderr).toMatch(/No space left/);
      expect((await nbdsh(['-u', daemon.uri('disk@s'), '-c', VERIFY(count)])).stderr).toBe('');
      expect((await cli(['vdi', 'delete', 'disk@s'], { store })).stderr).toBe('');
      const goneOn = await nbdsh(['-u', daemon.uri('disk'), '-c', GO_ON]);
      expect(goneOn.stderr, daemon.log()).toBe('');
      expect((await daemon.stop()).code).toBe(0);
    } finally {
      execFileSync('umount', ['-l', mount]);
    }
  },
);
