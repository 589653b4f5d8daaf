// Loaded before sheepgate (node --import): counts the calls that change files below $KILL_BELOW and ends the process with
// SIGKILL just before number $KILL_AT. Without $KILL_AT it writes the number of calls to $KILL_COUNT at the end.
import fs from 'node:fs';

const { KILL_AT, KILL_BELOW, KILL_COUNT } = process.env;
const { O_WRONLY, O_RDWR } = fs.constants;
const watched = new Set();
let calls = 0;

function count() {
  calls++;
  if (calls === Number(KILL_AT)) process.kill(process.pid, 'SIGKILL');
}

// Files are opened by way of the directory that holds them: /proc/self/fd/7/name.
const realPath = (file) => String(file).replace(/^\/proc\/self\/fd\/\d+/, (directory) => fs.readlinkSync(directory));
const isBelow = (file) => realPath(file).startsWith(KILL_BELOW);

const BY_NAME = new Set(['rename', 'unlink', 'mkdirSync']);
const BY_DESCRIPTOR = new Set(['write', 'truncate', 'punchHole', 'fsync']);

globalThis[Symbol.for('sheepgate.hostDisk')] = (disk) =>
  new Proxy(disk, {
    get: (target, name) => {
      const call = target[name];
      return (...args) => {
        if (BY_NAME.has(name) && isBelow(args[0])) count();
        if (BY_DESCRIPTOR.has(name) && watched.has(args[0])) count();
        if (name === 'close') watched.delete(args[0]);
        if (name !== 'open' || !isBelow(args[0])) return call.apply(target, args);
        if ((args[1] & (O_WRONLY | O_RDWR)) !== 0) count();
        return call.apply(target, args).then((fd) => {
          watched.add(fd);
          return fd;
        });
      };
    },
  });
if (KILL_COUNT) process.on('exit', () => fs.writeFileSync(KILL_COUNT, String(calls)));
