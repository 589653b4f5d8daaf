// Loaded before sheepgate (node --import): the third read of a block of data never ends. A process that is to be
// killed in the middle of its work waits there, on fast and slow machines alike.

const STALLED_READ = 3;
const BLOCK_BYTES = 65_536;

let reads = 0;

globalThis[Symbol.for('sheepgate.hostDisk')] = (disk) =>
  new Proxy(disk, {
    get: (target, name) => {
      if (name !== 'read') return (...args) => target[name](...args);
      return (fd, into, at, offset) => {
        if (into.length - at < BLOCK_BYTES || ++reads < STALLED_READ) return target.read(fd, into, at, offset);
        setInterval(() => undefined, 1000); // as long as somebody waits
        return new Promise(() => undefined);
      };
    },
  });
