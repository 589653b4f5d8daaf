/** A full disk, as Node reports it: real clients see ENOSPC, which qemu needs to stop a guest (`werror=enospc`). */

import { execFile } from 'node:child_process';
import { promisify } from 'node:util';
import { expect, test } from 'vitest';
import type { Device } from '../src/index.js';
import { careless, only } from './careless.js';

const run = promisify(execFile);
const SIZE = 2 ** 20;

/** What Node's fs throws on a full disk. */
function full(): Error {
  const error = new Error("ENOSPC: no space left on device, write '/var/lib/disks/secret.img'");
  return Object.assign(error, { code: 'ENOSPC', errno: -28, syscall: 'write' });
}

for (const isLate of [false, true]) {
  test(`qemu-io sees ENOSPC if a device ${isLate ? 'rejects with' : 'throws'} Node's error`, async () => {
    const device: Device = {
      size: SIZE,
      read: () => undefined,
      write: () => {
        if (isLate) return Promise.reject(full());
        throw full();
      },
      flush: () => undefined,
    };
    const { path, errors } = await careless(only(device));
    const uri = `nbd+unix:///disk?socket=${path}`;
    // Its exit code says that a command failed.
    const { stdout } = await run('qemu-io', ['-f', 'raw', '-c', 'write 0 4096', uri]).catch(
      (error: unknown) => error as { stdout: string },
    );
    expect(stdout).toContain('write failed: No space left on device');
    expect(errors[0]?.context).toMatchObject({ command: 'WRITE', expected: true });
  });
}
