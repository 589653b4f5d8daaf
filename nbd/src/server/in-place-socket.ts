/**
 * Receiving into memory of our own. A socket of Node's has a fresh buffer for every 64 KiB that arrive, which are so many
 * under large writes that the garbage collector takes as much time as the writes. Owns the socket that is put in the place
 * of an accepted one and the question where its next bytes go; it never looks at them.
 *
 * It takes the accepted socket's handle, as Node's cluster module does; where that is not what it is expected to be, the
 * socket stays as it is.
 */

import net from 'node:net';

/** Who says where received bytes go. Both are called for every piece, one after the other. */
export interface Receiver {
  /** Not empty. It must stay untouched until `received`, or until the socket is closed. */
  nextBuffer(): Buffer;
  /** So many bytes have come, at the beginning of the buffer handed out last. */
  received(length: number): void;
}

/** Enough for any option; a handshake that has more to say needs another turn. */
const HANDSHAKE_BYTES = 8 * 1024;

/** Of all handshakes: what is read into it is copied out before anything else is read. */
const scratch = Buffer.allocUnsafeSlow(HANDSHAKE_BYTES);

/** `receive` sends what comes from now on to `receiver`; until then it comes as 'data', each piece the listener's own. */
export interface InPlaceSocket {
  readonly socket: net.Socket;
  receive(receiver: Receiver): void;
}

interface Handle {
  readonly useUserBuffer?: unknown;
  reading?: boolean;
  readStop?(): number;
}

/** Undefined, and nothing done, if something has been read from it, or if this Node's sockets are made otherwise. */
export function receiveInPlace(accepted: net.Socket): InPlaceSocket | undefined {
  const inside = accepted as unknown as { _handle: Handle | null };
  const handle = inside._handle;
  if (!handle || typeof handle.useUserBuffer !== 'function' || accepted.readableLength > 0) return undefined;
  let receiver: Receiver | undefined;
  /** Whose buffer the socket has: not the receiver's yet when that has just come. */
  let filling: Receiver | undefined;
  let rest: Buffer = scratch;
  // What Node takes, and its types do not all know.
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
  // It has begun to read for its old owner.
  handle.readStop?.();
  handle.reading = false;
  inside._handle = null;
  const socket = new net.Socket(options);
  return {
    socket,
    receive: (next) => {
      receiver = next;
    },
  };
}

/**
 * Stop `socket`, which is paused and has no listener for 'data', from receiving: what it has received, and nobody has got,
 * goes to `take`, and the rest stays with the system.
 */
export function takeBuffered(socket: net.Socket, take: (chunk: Buffer) => void): void {
  while (socket.readableLength > 0) {
    const chunk: unknown = socket.read();
    if (!Buffer.isBuffer(chunk)) break;
    take(chunk);
  }
  const { _handle: handle } = socket as unknown as { _handle: Handle | null };
  if (!handle) return;
  // Reading has made it receive again.
  handle.readStop?.();
  handle.reading = false;
}
