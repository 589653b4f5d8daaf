/**
 * Answers of the control socket that may be very long: a JSON array, sent as it is made, no faster than it is read, with
 * others served in between. Decides nothing about what is in it.
 */
import type http from 'node:http';

/** Made in one turn of the loop, milliseconds; looked at once in so many items. */
const SLICE_MS = 1;
const ITEMS_PER_LOOK = 16;
/** Characters that are sent at once. */
const CHUNK = 64 * 1024;

/** Resolves when all of it is handed over, or the client is gone. */
export async function answerList(response: http.ServerResponse, items: readonly unknown[]): Promise<void> {
  // Without a length: how long it is nobody knows before. One request a connection, as for every other answer.
  response.writeHead(200, { 'content-type': 'application/json', connection: 'close' });
  let end = performance.now() + SLICE_MS;
  let text = '[';
  for (const [n, item] of items.entries()) {
    if (n > 0) text += ',';
    text += JSON.stringify(item);
    if (text.length >= CHUNK) {
      if (!response.write(text)) await drained(response);
      text = '';
    }
    if (n % ITEMS_PER_LOOK === 0 && performance.now() >= end) {
      await new Promise((resolve) => setImmediate(resolve));
      end = performance.now() + SLICE_MS;
    }
    if (response.destroyed) return;
  }
  response.end(`${text}]\n`);
}

function drained(response: http.ServerResponse): Promise<void> {
  if (response.destroyed) return Promise.resolve();
  return new Promise((resolve) => {
    const done = (): void => {
      response.off('drain', done).off('close', done);
      resolve();
    };
    response.on('drain', done).on('close', done);
  });
}
