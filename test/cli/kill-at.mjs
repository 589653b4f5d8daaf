// Loaded before sheepgate (node --import): counts the calls that change files below $KILL_BELOW and ends the process with
// SIGKILL just before number $KILL_AT. Without $KILL_AT it writes the number of calls to $KILL_COUNT at the end.
import fs from 'node:fs';

const { KILL_AT, KILL_BELOW, KILL_COUNT } = process.env;
const watched = new Set();
let calls = 0;

function count() {
  calls++;
  if (calls === Number(KILL_AT)) process.kill(process.pid, 'SIGKILL');
}

// Files are opened by way of the directory that holds them: /proc/self/fd/7/name.
const realPath = (file) => String(file).replace(/^\/proc\/self\/fd\/\d+/, (directory) => fs.readlinkSync(directory));
const isBelow = (file) => realPath(file).startsWith(KILL_BELOW);
const { O_WRONLY, O_RDWR } = fs.constants;
const isWritten = (flags) => (typeof flags === 'number' ? (flags & (O_WRONLY | O_RDWR)) !== 0 : flags !== 'r');
const { open, rename, unlink } = fs.promises;
fs.promises.open = async (file, flags, mode) => {
  const isOurs = isBelow(file);
  if (isOurs && isWritten(flags)) count();
  const handle = await open(file, flags, mode);
  if (!isOurs) return handle;
  watched.add(handle.fd);
  for (const name of ['truncate', 'sync', 'writeFile']) {
    const real = handle[name].bind(handle);
    handle[name] = (...args) => {
      count();
      return real(...args);
    };
  }
  return handle;
};
fs.promises.rename = (from, to) => {
  if (isBelow(from)) count();
  return rename(from, to);
};
fs.promises.unlink = (file) => {
  if (isBelow(file)) count();
  return unlink(file);
};
const { write } = fs;
fs.write = (fd, ...args) => {
  if (watched.has(fd)) count();
  return write(fd, ...args);
};
if (KILL_COUNT) process.on('exit', () => fs.writeFileSync(KILL_COUNT, String(calls)));
