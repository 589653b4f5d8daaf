/**
 * How much a TLS socket encrypts at once. Node encrypts all of a write before it sends any of it, into memory that stays with the
 * socket: a client that has read 32 MiB once would cost 32 MiB until it leaves. It owns the size of a part; it never changes the
 * bytes or their order.
 */

import type tls from 'node:tls';

/**
 * Bytes encrypted at once. Smaller parts cost time: each needs a turn of the event loop. With 64 KiB, 1 MiB takes some percent
 * more CPU time than at once, with 16 KiB more than twice as much.
 */
const PART_BYTES = 64 * 1024;

type Done = (error?: Error | null) => void;

/** What Node's streams call to write: documented for those who implement a stream. */
interface StreamMethods {
  _write(chunk: unknown, encoding: string, done: Done): void;
  _writev?(chunks: { readonly chunk: unknown; readonly encoding: string }[], done: Done): void;
}

/** From now on `socket` encrypts what is written to it in parts. */
export function encryptInParts(socket: tls.TLSSocket): void {
  const stream = socket as unknown as StreamMethods;
  const write = stream._write.bind(socket);
  const writev = stream._writev?.bind(socket);
  stream._write = (chunk, encoding, done) => {
    if (!Buffer.isBuffer(chunk) || chunk.length <= PART_BYTES) write(chunk, encoding, done);
    else writeParts([chunk], write, done);
  };
  if (writev === undefined) return;
  stream._writev = (given, done) => {
    const chunks = given.map(({ chunk }) => chunk).filter((chunk) => Buffer.isBuffer(chunk));
    if (chunks.length < given.length) writev(given, done);
    else writeParts(chunks, write, done);
  };
}

/** Write `chunks`, a part after the other. Short chunks are sent together: Node copies what it is given at once, too. */
function writeParts(chunks: readonly Buffer[], write: StreamMethods['_write'], done: Done): void {
  let index = 0;
  let at = 0;
  const next: Done = (error) => {
    if (error || index === chunks.length) {
      done(error);
      return;
    }
    const pieces: Buffer[] = [];
    let size = 0;
    for (let chunk = chunks[index]; chunk !== undefined && size < PART_BYTES; chunk = chunks[index]) {
      const end = Math.min(chunk.length, at + PART_BYTES - size);
      pieces.push(chunk.subarray(at, end));
      size += end - at;
      at = end;
      if (end < chunk.length) break;
      at = 0;
      index++;
    }
    const [first] = pieces;
    write(pieces.length === 1 && first !== undefined ? first : Buffer.concat(pieces, size), 'buffer', next);
  };
  next();
}
