/** A server in its own process that tells its parent how much memory it uses; see idle-memory.test.ts. Run with --expose-gc. */

import { NbdServer } from 'nbd-server-ts';

const [path, tlsPath, key] = process.argv.slice(2);
const disk = Buffer.alloc(32 * 1024 * 1024);
const info = { name: 'disk', description: '' };
const geometry = { size: disk.length, multiConn: true };
/** Half of the writes are answered later, so that their data outlive the turn in which they came. */
let writes = 0;
const device = {
  geometry,
  fillsBuffer: true,
  read: (offset, into) => void disk.copy(into, 0, offset),
  write: (offset, data) => {
    if (writes++ % 2 === 0) return void data.copy(disk, offset);
    return new Promise((resolve) => setImmediate(resolve)).then(() => void data.copy(disk, offset));
  },
  flush: () => undefined,
  close: () => undefined,
};
const provider = { list: () => [info], describe: () => ({ geometry, info }), open: () => ({ device, info }) };
const material = () => ({ verifyPeer: false, pskKey: () => Buffer.from(key, 'hex') });
const server = new NbdServer({ provider });
const secure = new NbdServer({ provider, tls: { mode: 'require', material } });
await server.listen({ path });
await secure.listen({ path: tlsPath });
const { port } = await server.listen({ host: '127.0.0.1', port: 0 });

process.on('message', () => {
  globalThis.gc();
  const { heapUsed, external, rss } = process.memoryUsage();
  const connections = server.connections.size + secure.connections.size;
  process.send({ bytes: heapUsed + external - server.memory.keptBytes, rss, connections });
});
process.on('disconnect', () => process.exit());
process.send({ port });
