/** Ports that accept connections but are no Sheepdog node, or no longer one: a proxy without its backend, another service. */
import net from 'node:net';

export type Badness = 'closes' | 'closes when asked' | 'garbage' | 'banner' | 'echo' | 'silent';

export const BADNESSES: readonly Badness[] = ['closes', 'closes when asked', 'garbage', 'banner', 'echo', 'silent'];

/** A proxy, with or without a node behind it. */
export class BadPort {
  readonly #server: net.Server;
  readonly #sockets = new Set<net.Socket>();
  /** How new connections are treated; undefined: they are forwarded to the node. */
  badness: Badness | undefined;
  connections = 0;
  port = 0;

  constructor(badness: Badness | undefined, node?: number) {
    this.badness = badness;
    this.#server = net.createServer((socket) => {
      this.connections++;
      this.#keep(socket);
      if (this.badness === undefined && node !== undefined) this.#forward(socket, node);
      else this.#treatBadly(socket);
    });
  }

  get address(): string {
    return `127.0.0.1:${this.port}`;
  }

  async start(): Promise<this> {
    await new Promise<void>((resolve) => this.#server.listen(0, '127.0.0.1', resolve));
    this.port = (this.#server.address() as net.AddressInfo).port;
    return this;
  }

  /** Ends open connections, and treats new ones like this. */
  turn(badness: Badness): void {
    this.badness = badness;
    for (const socket of this.#sockets) socket.destroy();
  }

  async stop(): Promise<void> {
    const closed = new Promise((resolve) => this.#server.close(resolve));
    for (const socket of this.#sockets) socket.destroy();
    await closed;
  }

  #keep(socket: net.Socket): void {
    this.#sockets.add(socket);
    socket.on('error', () => socket.destroy());
    socket.on('close', () => this.#sockets.delete(socket));
  }

  #forward(socket: net.Socket, node: number): void {
    const onwards = net.connect(node, '127.0.0.1');
    this.#keep(onwards);
    socket.pipe(onwards).pipe(socket);
    socket.on('close', () => onwards.destroy());
    onwards.on('close', () => socket.destroy());
  }

  #treatBadly(socket: net.Socket): void {
    switch (this.badness) {
      case 'closes':
        return void socket.end();
      case 'closes when asked':
        return void socket.once('data', () => socket.end());
      case 'garbage':
        return void socket.once('data', () => socket.write(Buffer.alloc(4096, 0xa5)));
      case 'banner':
        return void socket.write('SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n');
      case 'echo':
        return void socket.pipe(socket);
      default:
        return void socket.resume();
    }
  }
}
