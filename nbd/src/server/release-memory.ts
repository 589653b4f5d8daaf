/**
 * Gives the memory of a buffer back to the system at once. Left to the garbage collector it stays until a collection comes
 * by, which in a quiet process may be never. Owns nothing but the way it is done.
 */

import { MessageChannel, type MessagePort } from 'node:worker_threads';

let nowhere: MessagePort | undefined;

/**
 * Nobody may use `buffer` any more, nor another view of its ArrayBuffer: it is empty afterwards. Memory that is transferred
 * to somebody who is not there is freed; Node 20 knows no other way (ArrayBuffer.transfer came with 22).
 */
export function releaseMemory(buffer: Buffer): void {
  if (nowhere === undefined) {
    const { port1, port2 } = new MessageChannel();
    port2.close();
    nowhere = port1;
  }
  nowhere.postMessage(undefined, [buffer.buffer as ArrayBuffer]);
}
