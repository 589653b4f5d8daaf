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

const isBelow = (file) => String(file).startsWith(KILL_BELOW);
const { open, rename, unlink } = fs.promises;
fs.promises.open = async (file, flags, mode) => {
  if (isBelow(file) && flags !== 'r') count();
  const handle = await open(file, flags, mode);
  if (!isBelow(file)) return handle;
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
