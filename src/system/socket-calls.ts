/**
 * System calls on sockets that Node lacks: the process at the other end of a unix socket, the state of a TCP connection,
 * datagrams to a unix socket, and writes to any descriptor without waiting. Decides nothing: an answer that the kernel does not
 * give is undefined.
 */
import type net from 'node:net';
import koffi from 'koffi';
import { lookAtProcess, type RunningProcess } from './process-identity.js';

const SOL_SOCKET = 1; // asm-generic/socket.h
const SO_PEERCRED = 17;
const SO_PEERGROUPS = 59;
const IPPROTO_TCP = 6; // netinet/in.h
const TCP_KEEPIDLE = 4; // linux/tcp.h
const TCP_KEEPINTVL = 5;
const TCP_INFO = 11;
const TCP_USER_TIMEOUT = 18;
/** struct tcp_info of linux/tcp.h: its first bytes, in Linux since 4.6, and the offsets of the fields that are read. */
const TCP_INFO_BYTES = 148;
const TCPI_STATE = 0;
const TCPI_PROBES = 3;
const TCPI_UNACKED = 24;
const TCPI_LAST_DATA_RECV = 52;
const TCPI_LAST_ACK_RECV = 56;
const TCPI_NOTSENT_BYTES = 144;
/** net/tcp_states.h */
const TCP_ESTABLISHED = 1;
const POLLHUP = 0x10; // asm-generic/poll.h
const POLLRDHUP = 0x2000;
const AF_UNIX = 1;
const AF_INET = 2;
const AF_INET6 = 10;
const SOCK_DGRAM = 2;
const SOCK_CLOEXEC = 0o2000000;
const MSG_DONTWAIT = 0x40;
const MSG_NOSIGNAL = 0x4000;
const SUN_PATH_BYTES = 108;
const POLLOUT = 4; // asm-generic/poll.h
/** NGROUPS_MAX is 65536; the groups of a process with more than this are unknown. */
const MAX_GROUPS = 1024;

const libc = koffi.load('libc.so.6');
const getsockopt = libc.func('int getsockopt(int fd, int level, int name, void *value, void *length)');
const setsockopt = libc.func('int setsockopt(int fd, int level, int name, void *value, uint length)');
const getsockname = libc.func('int getsockname(int fd, void *address, void *length)');
const socket = libc.func('int socket(int domain, int type, int protocol)');
const sendto = libc.func('long sendto(int fd, void *data, size_t length, int flags, void *address, uint size)');
const send = libc.func('long send(int fd, void *data, size_t length, int flags)');
const poll = libc.func('int poll(void *descriptors, ulong count, int timeout)');
const close = libc.func('int close(int fd)');

/** The process that connected `connection`, a unix socket; undefined if the kernel does not say. unix(7), SO_PEERCRED. */
export function peerCredentials(connection: net.Socket): SocketCredentials | undefined {
  const fd = descriptorOf(connection);
  if (fd === undefined) return undefined;
  const identity = option(fd, SO_PEERCRED, 12);
  if (identity?.length !== 12) return undefined;
  const groups = option(fd, SO_PEERGROUPS, 4 * MAX_GROUPS);
  return new SocketCredentials(
    identity.readInt32LE(0),
    identity.readUInt32LE(4),
    identity.readUInt32LE(8),
    groups && Array.from({ length: groups.length / 4 }, (_, i) => groups.readUInt32LE(4 * i)),
  );
}

/**
 * Credentials of a process. Its files in /proc are read at the first use of `startTime` or `command`: a client that opens no
 * export costs no file reads.
 */
class SocketCredentials {
  #process: RunningProcess | undefined;
  #isLookedAt = false;

  constructor(
    readonly pid: number,
    readonly uid: number,
    readonly gid: number,
    readonly groups: readonly number[] | undefined,
  ) {}

  get startTime(): number | undefined {
    return this.#look()?.startTime;
  }

  get command(): string | undefined {
    return this.#look()?.command;
  }

  #look(): RunningProcess | undefined {
    if (!this.#isLookedAt) this.#process = lookAtProcess(this.pid);
    this.#isLookedAt = true;
    return this.#process;
  }
}

/** The uid at the other end; for the connecting side's socket it is that of the process that called listen(2). */
export function peerUid(connection: net.Socket): number | undefined {
  const fd = descriptorOf(connection);
  const identity = fd === undefined ? undefined : option(fd, SO_PEERCRED, 12);
  return identity?.length === 12 ? identity.readUInt32LE(4) : undefined;
}

/**
 * End `connection` when, for `timeoutMs`, the peer has not acknowledged sent data or has had no room for more. Without this
 * option the kernel sends again for a quarter of an hour, and sends no keepalive probes meanwhile. 0 removes the option.
 * Returns whether it could be set: not on unix sockets. tcp(7), TCP_USER_TIMEOUT.
 */
export function setUserTimeout(connection: net.Socket, timeoutMs: number): boolean {
  const fd = descriptorOf(connection);
  if (fd === undefined) return false;
  const value = Buffer.alloc(4);
  value.writeUInt32LE(timeoutMs);
  return setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, value, value.length) === 0;
}

/** The state of the sending half of a TCP connection. */
export interface SendState {
  /** There is more to send and the peer has no room for it: the peer does not read. */
  readonly isWindowClosed: boolean;
  /** Window probes in a row that the peer has not answered. */
  readonly unansweredProbes: number;
  /** Milliseconds since the peer's last acknowledgement. */
  readonly lastAckMs: number;
}

/** Undefined if the kernel does not say, as for unix sockets. */
export function sendState(connection: net.Socket): SendState | undefined {
  const info = tcpInfo(connection);
  return (
    info && {
      // Nothing is in flight, and yet there is something to send.
      isWindowClosed: info.readUInt32LE(TCPI_NOTSENT_BYTES) > 0 && info.readUInt32LE(TCPI_UNACKED) === 0,
      unansweredProbes: info.readUInt8(TCPI_PROBES),
      lastAckMs: info.readUInt32LE(TCPI_LAST_ACK_RECV),
    }
  );
}

function tcpInfo(connection: net.Socket): Buffer | undefined {
  const fd = descriptorOf(connection);
  const info = fd === undefined ? undefined : option(fd, TCP_INFO, TCP_INFO_BYTES, IPPROTO_TCP);
  return info?.length === TCP_INFO_BYTES ? info : undefined;
}

/**
 * Whether the other end has closed `connection` or shut down its sending half, even if data is left to read. False also
 * where the kernel cannot say.
 */
export function hasPeerEnded(connection: net.Socket): boolean {
  const fd = descriptorOf(connection);
  if (fd === undefined) return connection.destroyed;
  const { found, events } = pollNow(fd, POLLRDHUP);
  return found && (events & (POLLHUP | POLLRDHUP)) !== 0;
}

/** Milliseconds since the other end sent data or an acknowledgement; undefined if this is not an open TCP connection. */
export function msSinceHeard(connection: net.Socket): number | undefined {
  const info = tcpInfo(connection);
  if (info?.[TCPI_STATE] !== TCP_ESTABLISHED) return undefined;
  return Math.min(info.readUInt32LE(TCPI_LAST_DATA_RECV), info.readUInt32LE(TCPI_LAST_ACK_RECV));
}

/**
 * Send a keepalive probe every `seconds` on a TCP connection; the kernels send and answer them. Returns a function that
 * restores the former times; undefined if they could not be set.
 */
export function askOften(connection: net.Socket, seconds: number): (() => void) | undefined {
  const fd = descriptorOf(connection);
  if (fd === undefined) return undefined;
  const names = [TCP_KEEPINTVL, TCP_KEEPIDLE];
  const before = names.map((name) => option(fd, name, 4, IPPROTO_TCP));
  const set = (target: number, name: number, value: Buffer): boolean =>
    setsockopt(target, IPPROTO_TCP, name, value, value.length) === 0;
  const often = Buffer.alloc(4);
  often.writeUInt32LE(seconds);
  if (!names.every((name) => set(fd, name, often))) return undefined;
  return () => {
    // The descriptor may have been closed meanwhile, and reused by another connection.
    const still = descriptorOf(connection);
    if (still === undefined) return;
    names.forEach((name, i) => {
      const value = before[i];
      if (value) set(still, name, value);
    });
  };
}

/** The address that a socket is bound to: a path or "@NAME", or an IP address; undefined if neither, or not a socket. */
export function boundAddress(
  fd: number,
): { readonly path: string } | { readonly host: string; readonly port: number } | undefined {
  const address = Buffer.alloc(128);
  const length = Buffer.alloc(4);
  length.writeUInt32LE(address.length, 0);
  if (getsockname(fd, address, length) !== 0) return undefined;
  const used = length.readUInt32LE(0);
  switch (address.readUInt16LE(0)) {
    case AF_UNIX: {
      const name = address.subarray(2, used);
      if (name[0] === 0) return { path: `@${name.toString('utf8', 1)}` };
      const end = name.indexOf(0);
      return { path: name.toString('utf8', 0, end < 0 ? name.length : end) };
    }
    case AF_INET:
      return { host: address.subarray(4, 8).join('.'), port: address.readUInt16BE(2) };
    case AF_INET6: {
      const groups = Array.from({ length: 8 }, (_, i) => address.readUInt16BE(8 + 2 * i).toString(16));
      // In the usual, shortest form.
      const host = new URL(`http://[${groups.join(':')}]`).hostname.slice(1, -1);
      return { host, port: address.readUInt16BE(2) };
    }
    default:
      return undefined;
  }
}

/** Send one datagram to a unix socket: a path, or "@NAME" in the abstract namespace. Returns whether the socket took it. */
export function sendDatagram(address: string, text: string): boolean {
  const name = Buffer.from(address);
  if (name.length === 0 || name.length >= SUN_PATH_BYTES) return false;
  const isAbstract = name[0] === 0x40;
  if (isAbstract) name[0] = 0;
  // An abstract name is exactly as long as the address says; a path ends with a NUL.
  const target = Buffer.alloc(2 + name.length + (isAbstract ? 0 : 1));
  target.writeUInt16LE(AF_UNIX, 0);
  name.copy(target, 2);
  const fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0) as number;
  if (fd < 0) return false;
  const data = Buffer.from(text);
  const sent = sendto(fd, data, data.length, MSG_DONTWAIT | MSG_NOSIGNAL, target, target.length) as number | bigint;
  close(fd);
  return Number(sent) === data.length;
}

/**
 * Send on a stream socket without waiting, even if the socket is in blocking mode. Returns how many bytes the socket took; 0 if
 * it has no room now. Errors: those of send(2), with their code.
 */
export function sendNow(fd: number, bytes: Buffer): number {
  const sent = Number(send(fd, bytes, bytes.length, MSG_DONTWAIT | MSG_NOSIGNAL) as number | bigint);
  if (sent >= 0) return sent;
  const errno = koffi.errno();
  const names = koffi.os.errno as Readonly<Record<string, number>>;
  if (errno === names.EAGAIN || errno === names.EINTR) return 0;
  const code = Object.keys(names).find((name) => names[name] === errno) ?? `errno ${errno}`;
  throw Object.assign(new Error(`${code}: send`), { code, errno: -errno, syscall: 'send' });
}

/** Whether a write would at once take bytes or fail. */
export function isWritable(fd: number): boolean {
  return pollNow(fd, POLLOUT).found;
}

/** poll(2) without waiting: whether there are events or errors, and which. */
function pollNow(fd: number, wanted: number): { readonly found: boolean; readonly events: number } {
  const descriptor = Buffer.alloc(8); // struct pollfd: fd, events, revents
  descriptor.writeInt32LE(fd, 0);
  descriptor.writeInt16LE(wanted, 4);
  const found = (poll(descriptor, 1, 0) as number) !== 0;
  return { found, events: descriptor.readInt16LE(6) };
}

function option(fd: number, name: number, maxBytes: number, level = SOL_SOCKET): Buffer | undefined {
  const value = Buffer.alloc(maxBytes);
  const length = Buffer.alloc(4);
  length.writeUInt32LE(maxBytes, 0);
  if (getsockopt(fd, level, name, value, length) !== 0) return undefined;
  return value.subarray(0, length.readUInt32LE(0));
}

/** Undefined if the socket has none. Node has no public way to it. */
function descriptorOf(connection: net.Socket): number | undefined {
  const { _handle: handle } = connection as unknown as { readonly _handle?: { readonly fd?: unknown } };
  return typeof handle?.fd === 'number' && handle.fd >= 0 ? handle.fd : undefined;
}
