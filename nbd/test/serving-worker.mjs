/** A worker thread with a ConnectionLoop: it serves the sockets whose descriptors it is given; see worker-loop.test.ts. */

import net from 'node:net';
import { parentPort, threadId, workerData } from 'node:worker_threads';
import { ConnectionLoop } from 'nbd-server-ts';

const disk = Buffer.alloc(1024 * 1024);
const info = { name: 'disk', description: `thread ${threadId}` };
const geometry = { size: disk.length, multiConn: true };
/** Shared with the test: the number of flushes begun, and the signal that ends them. */
let finishFlush = () => undefined;
const device = {
  geometry,
  read: (offset, into) => void disk.copy(into, 0, offset),
  write: (offset, data) => void data.copy(disk, offset),
  flush: () => {
    parentPort.postMessage({ flushing: true });
    return new Promise((resolve) => (finishFlush = resolve));
  },
  close: () => undefined,
};
const loop = new ConnectionLoop({
  limits: workerData ?? {},
  provider: { list: () => [info], describe: () => ({ geometry, info }), open: () => ({ device, info }) },
});
const connections = new Map();
const tell = (id, what) => parentPort.postMessage({ id, what });

parentPort.on('message', (message) => {
  const connection = connections.get(message.id);
  if (message.serve) {
    const { id, fd, peer, offender, state } = message.serve;
    const socket = new net.Socket({ fd, allowHalfOpen: true, readable: true, writable: true });
    const progress = {
      advanced: () => tell(id, 'advanced'),
      settled: () => {
        tell(id, 'settled');
        parentPort.postMessage({ id, exportName: connections.get(id)?.exportName ?? 'disk' });
      },
      leaving: () => tell(id, 'leaving'),
      left: () => tell(id, 'left'),
    };
    const served = loop.serve({ id, socket, peer, progress, offender, state });
    connections.set(id, served);
    void served.over.then(() => {
      connections.delete(id);
      tell(id, 'over');
    });
  }
  if (message.memory) {
    loop.shareMemory(message.memory);
    parentPort.postMessage({ memory: loop.memory });
  }
  if (message.abort) connection?.abort(message.abort);
  if (message.disconnect) connection?.disconnect(message.disconnect);
  if (message.shutdown) connection?.shutdown(message.shutdown);
  if (message.stop) loop.stop();
  if (message.finishFlush) finishFlush();
});
