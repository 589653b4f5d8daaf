// A disk in memory, served to any NBD client: node ram-disk.mjs /tmp/ram.sock 64
import { ExportError, NbdServer } from 'nbd-server-ts';

const [path = '/tmp/ram.sock', megabytes = '64'] = process.argv.slice(2);
const disk = Buffer.alloc(Number(megabytes) * 1024 * 1024);
const device = {
  geometry: { size: disk.length, canZero: true, multiConn: true },
  read: (offset, into) => void disk.copy(into, 0, offset),
  write: (offset, data) => void data.copy(disk, offset),
  flush: () => undefined,
  close: () => undefined,
  // Optional, and announced by `canZero`.
  zero: (offset, length) => void disk.fill(0, offset, offset + length),
};
const info = { name: 'ram', description: `${megabytes} MiB of memory` };
const find = (name) => {
  if (name !== 'ram' && name !== '') throw new ExportError('UNKNOWN', `no export "${name}"; there is "ram"`);
  return { device, geometry: device.geometry, info };
};
const server = new NbdServer({ provider: { list: () => [info], describe: find, open: find } });
await server.listen({ path, mode: 0o600 });
console.log(`nbd+unix:///ram?socket=${path}`);
for (const signal of ['SIGINT', 'SIGTERM']) process.once(signal, () => server.close({ graceMs: 5000 }));
