// Loaded before sheepgate (node --import): files whose path has $EIO_ON in it cannot be read, as on a disk with bad sectors.
import fs from 'node:fs';
import os from 'node:os';

function failure(fd) {
  const name = process.env.EIO_ON;
  if (!name || !fs.readlinkSync(`/proc/self/fd/${fd}`).includes(name)) return undefined;
  const { EIO } = os.constants.errno;
  return Object.assign(new Error('EIO: i/o error, read'), { code: 'EIO', errno: -EIO, syscall: 'read' });
}

const { read } = fs;
function failing(fd, ...rest) {
  const error = failure(fd);
  if (error) process.nextTick(rest.at(-1), error);
  else read(fd, ...rest);
}
// What promisify() answers with hangs on the function.
fs.read = Object.defineProperties(failing, Object.getOwnPropertyDescriptors(read));

const handle = await fs.promises.open('/dev/null');
const prototype = Object.getPrototypeOf(handle);
await handle.close();
const { read: readHandle } = prototype;
prototype.read = async function (...args) {
  const error = failure(this.fd);
  if (error) throw error;
  return readHandle.apply(this, args);
};
