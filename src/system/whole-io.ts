/**
 * Reads and writes of whole buffers, though the kernel may do a part of them per call. The names say what a read does at the
 * end of the file: `readToEnd` returns how much there was, `readPadded` fills the rest with zeros. Owns no descriptors.
 */
import type { HostDisk } from './disk.js';

/** Read until `into` is full or the file ends. `done` bytes are filled already. Resolves to how many are filled at the end. */
export async function readToEnd(disk: HostDisk, fd: number, into: Buffer, offset: number, done = 0): Promise<number> {
  while (done < into.length) {
    const count = await disk.read(fd, into, done, offset + done);
    if (count === 0) break;
    done += count;
  }
  return done;
}

/** Read into all of `into`; bytes behind the end of the file are zeros. `done` bytes are filled already. */
export async function readPadded(disk: HostDisk, fd: number, into: Buffer, offset: number, done = 0): Promise<void> {
  into.fill(0, await readToEnd(disk, fd, into, offset, done));
}

/** Write all of `data`. */
export async function writeFully(disk: HostDisk, fd: number, data: Buffer, offset: number): Promise<void> {
  for (let done = 0; done < data.length;) done += await disk.write(fd, data, done, offset + done);
}
