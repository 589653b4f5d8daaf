/** A server in its own process that continues connections which its parent hands over; see hand-over.test.ts. */

import { ALLOCATION_CONTEXT, NbdServer, STATE_HOLE } from 'nbd-server-ts';

const disk = Buffer.alloc(1024 * 1024);
const info = { name: 'disk', description: '' };
const geometry = {
  ...{ size: disk.length, canFua: true, canTrim: true, canZero: true, canFastZero: true, canCache: true },
  ...{ multiConn: true, contexts: [ALLOCATION_CONTEXT] },
};
const device = {
  geometry,
  read: (offset, into) => void disk.copy(into, 0, offset),
  write: (offset, data) => void data.copy(disk, offset),
  flush: () => undefined,
  close: () => undefined,
  zero: (offset, length) => void disk.fill(0, offset, offset + length),
  trim: () => undefined,
  cache: () => undefined,
  extents: (_context, offset, length, sink) => void sink(offset, length, STATE_HOLE),
};
const server = new NbdServer({
  provider: {
    list: () => [info],
    describe: () => ({ geometry, info }),
    open: () => ({ device, info }),
  },
  observer: { onConnectionClose: ({ reason }) => process.send({ closed: reason }, () => process.disconnect()) },
});
process.on('message', ({ state }, socket) => {
  server.continueConnection(socket, state);
});
