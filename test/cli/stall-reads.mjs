// Loaded before sheepgate (node --import): the third read of a block of data never ends. Whoever is to be killed in the
// middle of its work waits there, however fast or slow the machine is.
import fs from 'node:fs';

const STALLED_READ = 3;
const BLOCK_BYTES = 65_536;

let reads = 0;
const { read } = fs;
function stalling(fd, buffer, offset, length, position, callback) {
  if (length >= BLOCK_BYTES && ++reads >= STALLED_READ) {
    setInterval(() => undefined, 1000); // as long as somebody waits
    return;
  }
  read(fd, buffer, offset, length, position, callback);
}
// What promisify() answers with hangs on the function.
fs.read = Object.defineProperties(stalling, Object.getOwnPropertyDescriptors(read));
