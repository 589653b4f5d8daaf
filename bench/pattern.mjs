/** The data that fills the disks of the benchmarks. */
import fs from 'node:fs';

const KIB = 1024;
const MIB = 1024 * KIB;

/** No block is all zeros, so that no server can leave a hole; all 4 KiB blocks differ. */
export function writePattern(file, size) {
  const chunk = new Uint32Array(MIB / 4);
  let state = 2463534242;
  for (let at = 0; at < chunk.length; at++) {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    chunk[at] = state >>> 0;
  }
  const fd = fs.openSync(file, 'w');
  for (let offset = 0; offset < size; offset += MIB) {
    for (let at = 0; at < chunk.length; at += KIB) chunk[at] = offset / MIB + at;
    fs.writeSync(fd, chunk);
  }
  fs.closeSync(fd);
}
