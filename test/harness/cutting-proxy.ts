/**
 * A proxy in front of a daemon's unix socket that cuts connections on demand, as a network does: neither side has ended the
 * session. Owns its socket and the connections through it.
 */
import net from 'node:net';
import path from 'node:path';
import { afterAll } from 'vitest';
import { temporaryDirectory } from './daemon.js';

/** Of this test file. Its tests may run side by side: which test starts a proxy is not known here. */
const proxies = new Set<CuttingProxy>();
afterAll(() => {
  for (const proxy of proxies) proxy.close();
});

export class CuttingProxy {
  readonly socket: string;
  /** Connections through it so far. */
  count = 0;
  /** Bytes that the daemon has sent so far. */
  bytes = 0;
  readonly #target: string;
  readonly #server: net.Server;
  readonly #open: [client: net.Socket, daemon: net.Socket][] = [];
  #cutAfter: number | undefined;
  #holdAfter = Infinity;

  private constructor(target: string) {
    this.#target = target;
    this.socket = path.join(temporaryDirectory(), 'proxy.sock');
    this.#server = net.createServer({ pauseOnConnect: true }, (client) => this.#connect(client));
    proxies.add(this);
  }

  /** In front of the socket `target`. */
  static async start(target: string): Promise<CuttingProxy> {
    const proxy = new CuttingProxy(target);
    await new Promise<void>((resolve) => proxy.#server.listen({ path: proxy.socket }, resolve));
    return proxy;
  }

  uri(name: string): string {
    return `nbd+unix:///${encodeURIComponent(name)}?socket=${this.socket}`;
  }

  /** Cut all present connections, or the nth. */
  cut(nth?: number): void {
    const cut = nth === undefined ? this.#open.splice(0) : this.#open.splice(nth, 1);
    for (const pair of cut) for (const end of pair) end.destroy();
  }

  /** Cut all connections once, after this many more bytes from the daemon. */
  cutAfter(bytes: number): void {
    this.#cutAfter = this.bytes + bytes;
  }

  /** Discard what the daemon sends after this many more bytes, until the client connects again: its copy cannot end. */
  holdAfter(bytes: number): void {
    this.#holdAfter = this.bytes + bytes;
  }

  close(): void {
    this.#server.close();
    this.cut();
  }

  #connect(client: net.Socket): void {
    this.count++;
    if (this.bytes >= this.#holdAfter) this.#holdAfter = Infinity;
    const daemon = net.connect({ path: this.#target });
    const pair: [net.Socket, net.Socket] = [client, daemon];
    this.#open.push(pair);
    const end = (): void => {
      for (const each of pair) each.destroy();
      const at = this.#open.indexOf(pair);
      if (at >= 0) this.#open.splice(at, 1);
    };
    for (const each of pair) each.on('error', end).on('close', end);
    client.pipe(daemon);
    daemon.on('data', (chunk: Buffer) => {
      this.bytes += chunk.length;
      if (this.#cutAfter !== undefined && this.bytes >= this.#cutAfter) {
        this.#cutAfter = undefined;
        this.cut();
        return;
      }
      if (this.bytes >= this.#holdAfter) return;
      if (!client.write(chunk)) daemon.pause();
    });
    client.on('drain', () => daemon.resume());
    client.on('end', () => daemon.end());
  }
}
