/**
 * Gives the memory of a buffer back to the system at once. The garbage collector frees it only at the next collection,
 * which in a quiet process may never happen. It owns the method of doing so.
 */

import { MessageChannel, type MessagePort } from 'node:worker_threads';

let nowhere: MessagePort | undefined;

/**
 * `buffer` and all other views of its ArrayBuffer are empty afterwards. Memory that is transferred to a closed message port is
 * freed; Node 20 has no other way (ArrayBuffer.transfer came with 22).
 */
export function releaseMemory(buffer: Buffer): void {
  if (nowhere === undefined) {
    const { port1, port2 } = new MessageChannel();
    port2.close();
    nowhere = port1;
  }
  nowhere.postMessage(undefined, [buffer.buffer as ArrayBuffer]);
}
