/**
 * NBD connections that came through the control socket (`Upgrade: nbd`). Owns their names, and knows when each one is over and its
 * export closed: only then may a command delete or roll back the VDI. Serves no requests.
 */
import type net from 'node:net';
import type { NbdServer } from 'nbd-server-ts';

export class NbdSessions {
  readonly #ends = new Map<string, () => void>();
  readonly #over = new Map<string, Promise<void>>();
  #last = 0;

  /** The name of the next session. */
  next(): string {
    return String(++this.#last);
  }

  /** Hand an upgraded socket to `server`; `head` is what the client has sent already. Resolves when the session is over. */
  async serve(server: NbdServer, socket: net.Socket, head: Buffer, session: string): Promise<void> {
    const over = new Promise<void>((resolve) => this.#ends.set(session, resolve));
    this.#over.set(session, over);
    try {
      const peer = { transport: 'internal', address: session } as const;
      if (server.serveConnection(socket, { peer, head }) === undefined) this.ended(session);
      await over;
    } finally {
      this.ended(session);
    }
  }

  /** The NBD server has closed the connection of `session`. */
  ended(session: string): void {
    this.#ends.get(session)?.();
    this.#ends.delete(session);
    this.#over.delete(session);
  }

  /** Resolves when `session` is over; at once if it is not known, or not any more. */
  over(session: string): Promise<void> {
    return this.#over.get(session) ?? Promise.resolve();
  }
}
