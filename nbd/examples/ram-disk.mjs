// A disk in memory, served to any NBD client: node ram-disk.mjs /tmp/ram.sock 64
import { ExportError, NbdServer } from 'nbd-server-ts';

const [path = '/tmp/ram.sock', megabytes = '64'] = process.argv.slice(2);
const disk = Buffer.alloc(Number(megabytes) * 1024 * 1024);
const device = {
  geometry: {
    ...{ size: disk.length, minimumBlockSize: 1, preferredBlockSize: 4096, readOnly: false, multiConn: true },
    ...{ canFlush: true, canFua: true, canTrim: true, canZero: true, canFastZero: true, canCache: true },
    ...{ rotational: false, contexts: [] },
  },
  read: (offset, into) => void disk.copy(into, 0, offset, offset + into.length),
  write: (offset, data) => void data.copy(disk, offset),
  zero: (offset, length) => void disk.fill(0, offset, offset + length),
  trim: (offset, length) => void disk.fill(0, offset, offset + length),
  flush: () => {},
  cache: () => {},
  extents: () => {},
  close: () => {},
};
const info = { name: 'ram', description: `${megabytes} MiB of memory` };
const only = (name, answer) => {
  if (name !== 'ram' && name !== '') throw new ExportError('UNKNOWN', `no export "${name}"; there is "ram"`);
  return answer;
};
const provider = {
  list: () => [info],
  describe: (name) => only(name, { geometry: device.geometry, info }),
  open: (name) => only(name, { device, info }),
};

const server = new NbdServer({ provider, observer: { onConnectionClose: (event) => console.error(event) } });
await server.listen({ path, mode: 0o600 });
console.log(`nbd+unix:///ram?socket=${path}`);
for (const signal of ['SIGINT', 'SIGTERM']) process.once(signal, () => server.close({ graceMs: 5000 }));
