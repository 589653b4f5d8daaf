/**
 * Two ends of a connection inside the process. Unlike a socket it keeps what was written apart as it was written, so a
 * test decides where chunks end; and it counts the writes of each end, a gathered write as one.
 */

import { Duplex } from 'node:stream';
import { onTestFinished } from 'vitest';

export class PairEnd extends Duplex {
  /** Calls that would each have been one system call. */
  writes = 0;
  private other: PairEnd | undefined;
  private taken: (() => void) | undefined;

  connectTo(other: PairEnd): void {
    this.other = other;
  }

  override _read(): void {
    const taken = this.other?.taken;
    if (this.other !== undefined) this.other.taken = undefined;
    taken?.();
  }

  override _write(chunk: Buffer, _encoding: BufferEncoding, callback: () => void): void {
    this.deliver([chunk], callback);
  }

  override _writev(chunks: readonly { readonly chunk: Buffer }[], callback: () => void): void {
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
    callback(error);
  }

  private deliver(chunks: readonly Buffer[], callback: () => void): void {
    this.writes++;
    // Called back once the other end wants more: its reader has all of this, and the memory may be used again.
    this.taken = callback;
    for (const chunk of chunks) this.other?.push(Buffer.from(chunk));
  }
}

export function duplexPair(): { readonly client: PairEnd; readonly server: PairEnd } {
  const client = new PairEnd();
  const server = new PairEnd();
  client.connectTo(server);
  server.connectTo(client);
  onTestFinished(() => {
    client.destroy();
    server.destroy();
  });
  return { client, server };
}
