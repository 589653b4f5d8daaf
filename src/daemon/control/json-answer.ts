/**
 * Sends the answers of the control socket: a JSON value in one piece, or a list of any length that is streamed as it is made, no
 * faster than the client reads, with other clients served in between. Decides nothing about what is in an answer.
 */
import type http from 'node:http';
import type { ErrorAnswer } from '../../operations/control-protocol.js';

/** Time spent on a list in one turn of the event loop; the clock is read once per ITEMS_PER_LOOK items. */
const SLICE_MS = 1;
const ITEMS_PER_LOOK = 16;
/** Characters per write. */
const CHUNK = 64 * 1024;

/** HTTP's status for an error code, for people with curl; our client goes by the code. */
const STATUS_OF: Readonly<Record<string, number>> = {
  BAD_REQUEST: 400,
  BAD_NAME: 400,
  BAD_SIZE: 400,
  BAD_TIME: 400,
  READ_ONLY: 403,
  IS_SNAPSHOT: 400,
  NO_VDI: 404,
  NO_TAG: 404,
  UNKNOWN: 404,
  NO_ROUTE: 404,
  NO_CLIENT: 404,
  UNSUPPORTED: 400,
  NOT_LOCKED: 409,
  EXISTS: 409,
  UNFINISHED: 409,
  BUSY: 409,
  NEEDS_FORCE: 409,
  AMBIGUOUS: 409,
  ENDED: 410,
  NO_SPACE: 507,
};

export function answerValue(response: http.ServerResponse, value: unknown): void {
  send(response, 200, value);
}

export function answerError(response: http.ServerResponse, { code, message }: ErrorAnswer['error']): void {
  send(response, STATUS_OF[code] ?? 500, { error: { code, message } } satisfies ErrorAnswer);
}

function send(response: http.ServerResponse, status: number, value: unknown): void {
  const body = Buffer.from(`${JSON.stringify(value)}\n`);
  // One request per connection: a stop finds no idle connections to wait for.
  response.writeHead(status, {
    'content-type': 'application/json',
    'content-length': body.length,
    connection: 'close',
  });
  response.end(body);
}

/** Resolves when the whole list is handed over, or the client is gone. */
export async function answerList(response: http.ServerResponse, items: readonly unknown[]): Promise<void> {
  // No content-length: it is not known yet. One request per connection, as above.
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
