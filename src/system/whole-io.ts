/**
 * Reads and writes of whole buffers, whatever the kernel does at a time. What a read does at the end of the file is in its
 * name: `readToEnd` says how much there was, `readPadded` fills the rest with zeros. Owns no descriptors.
 */
import type { HostDisk } from './disk.js';

/** Read until `into` is full or the file ends. Resolves to how much of it is filled, with the `done` bytes that were. */
export async function readToEnd(disk: HostDisk, fd: number, into: Buffer, offset: number, done = 0): Promise<number> {
  while (done < into.length) {
    const count = await disk.read(fd, into, done, offset + done);
    if (count === 0) break;
    done += count;
  }
  return done;
}

/** Fill `into` from `offset`; what lies behind the end of the file is zeros. `done` bytes are filled already. */
export async function readPadded(disk: HostDisk, fd: number, into: Buffer, offset: number, done = 0): Promise<void> {
  into.fill(0, await readToEnd(disk, fd, into, offset, done));
}

/** Write all of `data`. */
export async function writeFully(disk: HostDisk, fd: number, data: Buffer, offset: number): Promise<void> {
  for (let done = 0; done < data.length;) done += await disk.write(fd, data, done, offset + done);
}
