/**
 * Receiving into memory of our own. Node allocates a new buffer for every 64 KiB that arrive: under large writes the garbage
 * collector then takes as much time as the writes. It owns the socket that replaces an accepted one, and asks where its next
 * bytes go; it never looks at them.
 *
 * It takes the accepted socket's handle, as Node's cluster module does. If the handle is not of the expected kind, the accepted
 * socket is used as it is.
 */

import net from 'node:net';

/** Chooses where received bytes go. Both methods are called for every piece, one after the other (see also `askAgain`). */
export interface Receiver {
  /** Not empty. It must stay untouched until `received`, the next call, or the end of the socket. */
  nextBuffer(): Buffer;
  /** `length` bytes have arrived, at the start of the buffer returned last. */
  received(length: number): void;
}

/** Bytes received at once in a handshake: enough for most options; longer ones need several receives. */
const HANDSHAKE_BYTES = 8 * 1024;

/** Shared by all handshakes: its bytes are copied before anything else is received. */
const scratch = Buffer.allocUnsafeSlow(HANDSHAKE_BYTES);

/** After `receive` the bytes go to `receiver`; before, they are emitted as 'data', each piece a copy for the listener. */
export interface InPlaceSocket {
  readonly socket: net.Socket;
  receive(receiver: Receiver): void;
  /** Ask the receiver for another buffer, in the place of the one that it has returned and that nothing has arrived in. */
  askAgain(): void;
}

interface Handle {
  useUserBuffer?(buffer: Buffer): void;
  reading?: boolean;
  readStop?(): number;
}

/** Undefined, and nothing done, if bytes were read from `accepted` already, or if this Node's sockets are built differently. */
export function receiveInPlace(accepted: net.Socket): InPlaceSocket | undefined {
  const inside = accepted as unknown as { _handle: Handle | null };
  const handle = inside._handle;
  if (!handle || typeof handle.useUserBuffer !== 'function' || accepted.readableLength > 0) return undefined;
  let receiver: Receiver | undefined;
  /** The receiver whose buffer the socket has; undefined while it has the scratch. */
  let filling: Receiver | undefined;
  let rest: Buffer = scratch;
  // Options of Node that its types lack in part.
  const options: net.SocketConstructorOpts & { readonly handle: Handle; readonly onread: net.OnReadOpts } = {
    handle,
    allowHalfOpen: accepted.allowHalfOpen,
    onread: {
      buffer: () => {
        filling = receiver;
        return (rest = filling ? filling.nextBuffer() : scratch);
      },
      callback: (length) => {
        if (filling && filling === receiver) filling.received(length);
        else socket.emit('data', Buffer.from(rest.subarray(0, length)));
        return true;
      },
    },
  };
  // The accepted socket has begun to read.
  handle.readStop?.();
  handle.reading = false;
  inside._handle = null;
  const socket = new net.Socket(options);
  return {
    socket,
    receive: (next) => {
      receiver = next;
    },
    askAgain: () => {
      const hasHandle = (socket as unknown as { _handle: Handle | null })._handle === handle;
      if (filling === undefined || filling !== receiver || !hasHandle || socket.destroyed) return;
      handle.useUserBuffer?.((rest = filling.nextBuffer()));
    },
  };
}

/**
 * Stop `socket`, which is paused and has no listener for 'data', from receiving: bytes that it has buffered go to `take`,
 * and the rest stays with the system.
 */
export function takeBuffered(socket: net.Socket, take: (chunk: Buffer) => void): void {
  while (socket.readableLength > 0) {
    const chunk: unknown = socket.read();
    if (!Buffer.isBuffer(chunk)) break;
    take(chunk);
  }
  const { _handle: handle } = socket as unknown as { _handle: Handle | null };
  if (!handle) return;
  // read() has started receiving again.
  handle.readStop?.();
  handle.reading = false;
}
