// Loaded before sheepgate (node --import): files whose path contains $EIO_ON cannot be read, as on a disk with bad sectors.
import fs from 'node:fs';
import os from 'node:os';

function fails(fd) {
  const name = process.env.EIO_ON;
  return name && fs.readlinkSync(`/proc/self/fd/${fd}`).includes(name);
}

globalThis[Symbol.for('sheepgate.hostDisk')] = (disk) =>
  new Proxy(disk, {
    get: (target, name) => {
      if (name !== 'read') return (...args) => target[name](...args);
      return async (fd, ...rest) => {
        const { EIO } = os.constants.errno;
        if (fails(fd))
          throw Object.assign(new Error('EIO: i/o error, read'), { code: 'EIO', errno: -EIO, syscall: 'read' });
        return target.read(fd, ...rest);
      };
    },
  });
