/**
 * Servers that do what a test says, for tests of the client: the handshake of a small server, then whatever the test sends.
 */

import net from 'node:net';
import { join } from 'node:path';
import { expect, onTestFinished } from 'vitest';
import { NbdClientError } from '../src/index.js';
import {
  CMD,
  OPT,
  OPTION_HEADER_SIZE,
  REP,
  REQUEST_HEADER_SIZE,
  REQUEST_MAGIC,
  SIMPLE_REPLY_MAGIC,
} from '../src/protocol/wire.js';
import { RawClient, uint16, uint32, uint64 } from './raw-client.js';
import { DISK_SIZE } from './test-device.js';
import { temporaryDirectory } from './test-server.js';

export async function failureOf(work: Promise<unknown>): Promise<NbdClientError> {
  const error: unknown = await work.then(
    () => undefined,
    (reason: unknown) => reason,
  );
  if (!(error instanceof NbdClientError)) throw new Error(`was to fail with an NbdClientError, not ${String(error)}`);
  return error;
}

/** Of a fixed newstyle server with NO_ZEROES. */
export const GREETING = Buffer.concat([Buffer.from('NBDMAGICIHAVEOPT'), uint16(3)]);

export function optionReply(option: number, type: number, data: Buffer = Buffer.alloc(0)): Buffer {
  return Buffer.concat([
    Buffer.from('0003e889045565a9', 'hex'),
    uint32(option),
    uint32(type),
    uint32(data.length),
    data,
  ]);
}

/** A server on a unix socket that does what `behave` says; connections count from 0. */
export async function fakeServer(
  behave: (peer: RawClient, connection: number, socket: net.Socket) => Promise<void>,
): Promise<string> {
  const path = join(await temporaryDirectory(), 'fake.sock');
  const failures: unknown[] = [];
  const sockets = new Set<net.Socket>();
  const listener = net.createServer((socket) => {
    socket.on('error', () => undefined);
    behave(new RawClient(socket), sockets.size, socket).catch((error: unknown) => failures.push(error));
    sockets.add(socket);
  });
  onTestFinished(() => {
    for (const socket of sockets) socket.destroy();
    listener.close();
    expect(failures).toEqual([]);
  });
  await new Promise<void>((resolve) => listener.listen(path, resolve));
  return path;
}

/** Answers UNSUP to every option until `wanted`. */
export async function refuseUpTo(peer: RawClient, wanted: number): Promise<void> {
  for (;;) {
    const header = await peer.read(OPTION_HEADER_SIZE);
    await peer.read(header.readUInt32BE(12));
    const option = header.readUInt32BE(8);
    if (option === wanted) return;
    peer.send(optionReply(option, REP.ERR_UNSUP));
  }
}

/** All that a client may use: without READ_ONLY, ROTATIONAL and CAN_MULTI_CONN. */
const ALL_FLAGS = 1 | 4 | 8 | 32 | 64 | 128 | 1024 | 2048;

/** What the server announces; by default an export of DISK_SIZE that can everything. */
export interface Announced {
  readonly size?: number;
  readonly flags?: number;
  /** Minimum and preferred block size, maximum payload. */
  readonly blockSizes?: readonly [number, number, number];
}

/** The server's side of the handshake, with simple replies. */
export async function letIn(peer: RawClient, announced: Announced = {}): Promise<void> {
  peer.send(GREETING);
  await peer.read(4);
  await refuseUpTo(peer, OPT.GO);
  const { size = DISK_SIZE, flags = ALL_FLAGS, blockSizes } = announced;
  const infos = [Buffer.concat([uint16(0), uint64(size), uint16(flags)])];
  if (blockSizes !== undefined) infos.push(Buffer.concat([uint16(3), ...blockSizes.map(uint32)]));
  peer.send(...infos.map((info) => optionReply(OPT.GO, REP.INFO, info)), optionReply(OPT.GO, REP.ACK));
}

/** A request's header, as the fake server reads it. */
export interface Heard {
  readonly flags: number;
  readonly type: number;
  readonly cookie: Buffer;
  readonly offset: number;
  readonly length: number;
  /** Of a write. */
  readonly data: Buffer;
}

/** The next request of a client with simple replies. */
export async function hear(peer: RawClient): Promise<Heard> {
  const header = await peer.read(REQUEST_HEADER_SIZE);
  expect(header.readUInt32BE(0)).toBe(REQUEST_MAGIC);
  const type = header.readUInt16BE(6);
  const length = header.readUInt32BE(24);
  const data = await peer.read(type === CMD.WRITE ? length : 0);
  const offset = Number(header.readBigUInt64BE(16));
  return { flags: header.readUInt16BE(4), type, cookie: header.subarray(8, 16), offset, length, data };
}

/** Answer it with a simple reply. */
export function reply(
  peer: RawClient,
  { cookie }: Pick<Heard, 'cookie'>,
  data: Buffer = Buffer.alloc(0),
  errno = 0,
): void {
  peer.send(uint32(SIMPLE_REPLY_MAGIC), uint32(errno), cookie, data);
}
