// A disk in memory, for any NBD client: node ram-disk.mjs 'nbd+unix:///ram?socket=ram.sock' 64
import { serve } from 'nbd-server-ts';

const [uri = 'nbd+unix:///ram?socket=ram.sock', megabytes = '64'] = process.argv.slice(2);
const disk = Buffer.alloc(Number(megabytes) * 1024 * 1024);
const server = await serve(uri, {
  size: disk.length,
  read: (offset, into) => disk.copy(into, 0, offset),
  write: (offset, data) => disk.set(data, offset),
});
for (const signal of ['SIGINT', 'SIGTERM']) process.once(signal, () => server.close());
console.log(server.uri);
