// A disk in a file or on a block device: node file.mjs disk.img 64 'nbd+unix:///disk?socket=file.sock'
import { serve } from 'nbd-server-ts';
import { fileDevice } from 'nbd-server-ts/file';

const [path = 'disk.img', megabytes = '64', uri = 'nbd+unix:///disk?socket=file.sock'] = process.argv.slice(2);
const size = Number(megabytes) * 1024 * 1024;

// A sparse file if there is none yet; one that is there must have this size.
const server = await serve(uri, await fileDevice(path, { create: true, size }), {
  // Of the socket's file.
  mode: 0o660,
  observer: {
    onConnectionClose: ({ id, reason }) => console.error(`connection ${id} is over: ${reason}`),
    onError: (error, { command, offset }) => console.error(`${command} at ${offset}: ${error}`),
  },
});

// The first signal lets the present clients finish and accepts no others. The second one answers what is in flight, for at most
// five seconds, and says which requests the disk has not finished until then.
async function close() {
  const { unfinished } = await server.close({ graceMs: 5000 });
  for (const { id, inFlight } of unfinished) console.error(`connection ${id}: ${inFlight} requests are unfinished`);
}
function drain() {
  for (const signal of ['SIGINT', 'SIGTERM']) process.removeListener(signal, drain).once(signal, close);
  return server.drain();
}
for (const signal of ['SIGINT', 'SIGTERM']) process.on(signal, drain);
console.log(server.uri);
