// A disk in memory, served to any NBD client: node ram-disk.mjs /tmp/ram.sock 64
import { ExportError, NbdServer } from 'nbd-server-ts';

const [path = '/tmp/ram.sock', megabytes = '64'] = process.argv.slice(2);
const disk = Buffer.alloc(Number(megabytes) * 1024 * 1024);
const sizes = { size: disk.length, minimumBlockSize: 1, preferredBlockSize: 4096 };
const can = { canFlush: true, canFua: true, canTrim: true, canZero: true, canFastZero: true, canCache: false };
const device = {
  geometry: { ...sizes, ...can, readOnly: false, multiConn: true, rotational: false, contexts: [] },
  read: (offset, into) => void disk.copy(into, 0, offset),
  write: (offset, data) => void data.copy(disk, offset),
  zero: (offset, length) => void disk.fill(0, offset, offset + length),
  trim: (offset, length) => void disk.fill(0, offset, offset + length),
  ...{ flush() {}, cache() {}, extents() {}, close(_ending) {} },
};
const info = { name: 'ram', description: `${megabytes} MiB of memory` };
const only = (name, answer) => {
  if (name === 'ram' || name === '') return answer;
  throw new ExportError('UNKNOWN', `no export "${name}"; there is "ram"`);
};
const describe = (name) => only(name, { geometry: device.geometry, info });
const server = new NbdServer({
  provider: { list: () => [info], describe, open: (name) => only(name, { device, info }) },
});
await server.listen({ path, mode: 0o600 });
console.log(`nbd+unix:///ram?socket=${path}`);
for (const signal of ['SIGINT', 'SIGTERM']) process.once(signal, () => server.close({ graceMs: 5000 }));
