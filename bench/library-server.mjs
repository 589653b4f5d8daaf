/**
 * A RAM disk that library.mjs measures: node library-server.mjs DIST SOCKET BYTES KIND. DIST is a build of nbd-server-ts. KIND:
 * `fills` (the device says that it fills its buffers), `zeroed` (it does not, so the library zeroes them), or `late` (as `fills`,
 * and writes are answered with a promise).
 */
import path from 'node:path';
import { pathToFileURL } from 'node:url';

const [dist, socket, bytes, kind] = process.argv.slice(2);
const { NbdServer } = await import(pathToFileURL(path.resolve(dist, 'index.js')).href);
const disk = Buffer.alloc(Number(bytes), 1);
const write = (offset, data) => void data.copy(disk, offset);
const device = {
  geometry: { size: disk.length, multiConn: true },
  fillsBuffer: kind !== 'zeroed',
  read: (offset, into) => void disk.copy(into, 0, offset),
  write: kind === 'late' ? async (offset, data) => write(offset, data) : write,
  flush: () => undefined,
  close: () => undefined,
};
const info = { name: '', description: '' };
const provider = { list: () => [info], describe: () => ({ ...device, info }), open: () => ({ device, info }) };
const server = new NbdServer({ provider });
await server.listen({ path: socket });
process.stdout.write('ready\n');
process.once('SIGTERM', () => void server.close({ graceMs: 1000 }));
