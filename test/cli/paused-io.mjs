// Loaded before sheepgate (node --import): after $PAUSED_AFTER blocks (2), $PAUSED_CALL ("read" or "write") waits until the file
// $PAUSED_UNTIL exists. A signal can so be sent in the middle of the work, on fast and slow machines alike.
import fs from 'node:fs';
import { setTimeout as delay } from 'node:timers/promises';

const { PAUSED_AFTER = '2', PAUSED_CALL, PAUSED_UNTIL } = process.env;
const BLOCK_BYTES = 65_536;
const POLL_MS = 20;

let calls = 0;

globalThis[Symbol.for('sheepgate.hostDisk')] = (disk) =>
  new Proxy(disk, {
    get: (target, name) => {
      if (name !== PAUSED_CALL) return (...args) => target[name](...args);
      return async (fd, bytes, at, ...rest) => {
        if (bytes.length - at >= BLOCK_BYTES && ++calls > Number(PAUSED_AFTER))
          while (!fs.existsSync(PAUSED_UNTIL)) await delay(POLL_MS);
        return target[name](fd, bytes, at, ...rest);
      };
    },
  });
