/**
 * Two ends of a connection inside the process. Unlike a socket it keeps the borders of writes, so that a test decides where
 * chunks end, and it counts the writes of each end; a gathered write counts as one.
 */

import { Duplex } from 'node:stream';

export class PairEnd extends Duplex {
  /** Writes that would each have been one system call. */
  writes = 0;
  private other: PairEnd | undefined;
  private taken: ((error?: Error) => void) | undefined;

  connectTo(other: PairEnd): void {
    this.other = other;
  }

  override _read(): void {
    const taken = this.other?.taken;
    if (this.other !== undefined) this.other.taken = undefined;
    taken?.();
  }

  override _write(chunk: Buffer, _encoding: BufferEncoding, callback: (error?: Error) => void): void {
    this.deliver([chunk], callback);
  }

  override _writev(chunks: readonly { readonly chunk: Buffer }[], callback: (error?: Error) => void): void {
    this.deliver(
      chunks.map(({ chunk }) => chunk),
      callback,
    );
  }

  override _final(callback: () => void): void {
    this.other?.push(null);
    callback();
  }

  override _destroy(error: Error | null, callback: (error: Error | null) => void): void {
    this.other?.push(null);
    // Like a socket whose other end is closed: written bytes are lost.
    const taken = this.other?.taken;
    if (this.other !== undefined) this.other.taken = undefined;
    taken?.(new Error('the other end is gone'));
    callback(error);
  }

  private deliver(chunks: readonly Buffer[], callback: (error?: Error) => void): void {
    this.writes++;
    if (this.other?.destroyed) {
      callback(new Error('the other end is gone'));
      return;
    }
    // Called back once the other end wants more: its reader has all bytes, and the memory may be reused.
    this.taken = callback;
    for (const chunk of chunks) this.other?.push(Buffer.from(chunk));
  }
}

export function connectedEnds(): { readonly client: PairEnd; readonly server: PairEnd } {
  const client = new PairEnd();
  const server = new PairEnd();
  client.connectTo(server);
  server.connectTo(client);
  return { client, server };
}
