/**
 * One input against the client: a server that mostly follows the protocol, and sometimes violates it. Every call of the client
 * must end with its result or with an NbdClientError, without any other effect.
 */

import { NbdClient, NbdClientError, type ReplyLevel } from '../../src/index.js';
import { CMD, CMD_FLAG, MAX_PAYLOAD, OPT, REP, REPLY_TYPE } from '../../src/protocol/wire.js';
import { connectedEnds, type PairEnd } from '../pair-end.js';
import { Random } from './random.js';

const SIZE = 1024 * 1024;

function bytesOf(width: 2 | 4 | 8, value: number | bigint): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64BE(BigInt.asUintN(64, BigInt(value)));
  return bytes.subarray(8 - width);
}

const u16 = (value: number): Buffer => bytesOf(2, value);
const u32 = (value: number): Buffer => bytesOf(4, value);
const u64 = (value: number | bigint): Buffer => bytesOf(8, value);

/** The bytes of all writes, and what a caller puts into its memory once its call was aborted. */
const WRITTEN = 0;
const REUSED = 0x66;

/** After this many turns of the event loop without input the server closes the connection: each side waits for the other. */
const IDLE_TURNS = 30;

/** The server's side of a connection, with random answers. */
class LyingServer {
  private heard: Buffer = Buffer.alloc(0);
  private phase: 'flags' | 'options' | 'requests' = 'flags';
  private level: ReplyLevel = 'simple';
  private readonly contexts: number[] = [];
  /** Replies before the server closes the connection; no answer is endless. */
  private patience: number;
  private idleTurns = 0;
  /** A write whose data are not those that the client was given. */
  hasForeignData = false;

  constructor(
    private readonly end: PairEnd,
    private readonly random: Random,
    /** One in this many messages is mutated. */
    private readonly honesty: number,
  ) {
    this.patience = 5 + random.below(60);
    end.on('data', (chunk: Buffer) => this.hear(chunk));
    end.on('error', () => undefined);
    this.watch();
    this.say(Buffer.concat([Buffer.from('NBDMAGICIHAVEOPT'), u16(random.oneIn(30) ? random.below(4) : 3)]));
  }

  private readonly watch = (): void => {
    if (this.end.destroyed || !this.end.writable) return;
    if (++this.idleTurns > IDLE_TURNS) this.end.end();
    else setImmediate(this.watch);
  };

  private hear(chunk: Buffer): void {
    this.idleTurns = 0;
    this.heard = Buffer.concat([this.heard, chunk]);
    while (!this.end.destroyed && this.step());
  }

  private take(length: number): Buffer | undefined {
    if (this.heard.length < length) return undefined;
    const taken = this.heard.subarray(0, length);
    this.heard = this.heard.subarray(length);
    return taken;
  }

  /** False if it needs more input. */
  private step(): boolean {
    if (this.phase === 'flags') {
      if (this.take(4) === undefined) return false;
      this.phase = 'options';
      return true;
    }
    if (this.phase === 'options') {
      const length = this.heard.length >= 16 ? this.heard.readUInt32BE(12) : Infinity;
      const option = this.take(16 + length);
      if (option === undefined) return false;
      this.answerOption(option.readUInt32BE(8));
      return true;
    }
    const isExtended = this.level === 'extended';
    const size = isExtended ? 32 : 28;
    if (this.heard.length < size) return false;
    const flags = this.heard.readUInt16BE(4);
    const type = this.heard.readUInt16BE(6);
    const length = isExtended ? Number(this.heard.readBigUInt64BE(24)) : this.heard.readUInt32BE(24);
    const hasPayload = type === CMD.WRITE || (isExtended && (flags & CMD_FLAG.PAYLOAD_LEN) !== 0);
    const request = this.take(size + (hasPayload ? length : 0));
    if (request === undefined) return false;
    if (type === CMD.WRITE && request.subarray(size).some((byte) => byte !== WRITTEN)) this.hasForeignData = true;
    if (type === CMD.DISC) {
      this.end.end();
      return false;
    }
    this.answer(
      request,
      type,
      flags,
      type === CMD.BLOCK_STATUS && hasPayload ? Number(request.readBigUInt64BE(32)) : length,
    );
    return true;
  }

  private say(message: Buffer): void {
    const { random } = this;
    if (this.patience-- <= 0 || random.oneIn(200)) {
      this.end.end();
      return;
    }
    const bytes = random.oneIn(this.honesty) ? random.mutate(message) : message;
    for (const piece of random.oneIn(3) ? random.split(bytes) : [bytes]) {
      if (this.end.writable && piece.length > 0) this.end.write(piece);
    }
  }

  private answerOption(option: number): void {
    const { random } = this;
    const reply = (type: number, data: Buffer = Buffer.alloc(0)): void =>
      this.say(Buffer.concat([Buffer.from('0003e889045565a9', 'hex'), u32(option), u32(type), u32(data.length), data]));
    if (option === OPT.EXPORT_NAME) {
      this.phase = 'requests';
      return this.say(Buffer.concat([u64(SIZE), u16(random.next()), Buffer.alloc(random.oneIn(20) ? 124 : 0)]));
    }
    if (random.oneIn(option === OPT.EXTENDED_HEADERS ? 3 : 10)) {
      return reply(
        REP.ERR_UNSUP + random.below(12),
        random.oneIn(3) ? random.bytes(random.below(5000)) : Buffer.from('no'),
      );
    }
    switch (option) {
      case OPT.LIST:
        for (let count = random.below(5); count > 0; count--) {
          const name = random.oneIn(9) ? random.bytes(random.below(9)) : Buffer.from('disk');
          reply(REP.SERVER, Buffer.concat([u32(name.length), name, Buffer.from(random.oneIn(2) ? 'a disk' : '')]));
        }
        break;
      case OPT.STRUCTURED_REPLY:
        this.level = 'structured';
        break;
      case OPT.EXTENDED_HEADERS:
        this.level = 'extended';
        break;
      case OPT.LIST_META_CONTEXT:
      case OPT.SET_META_CONTEXT: {
        this.contexts.length = 0;
        const names = ['base:allocation', 'x-test:a', 'x-test:b'].slice(0, random.below(4));
        for (const name of names) {
          const id = random.oneIn(20) ? 1 : random.next();
          this.contexts.push(id);
          reply(random.oneIn(40) ? REP.INFO : REP.META_CONTEXT, Buffer.concat([u32(id), Buffer.from(name)]));
        }
        break;
      }
      case OPT.INFO:
      case OPT.GO:
        if (!random.oneIn(30)) {
          const size = random.oneIn(20) ? random.next() * 2 ** 32 : SIZE;
          reply(REP.INFO, Buffer.concat([u16(0), u64(size), u16(random.oneIn(4) ? random.next() : 0x1fff)]));
        }
        if (random.oneIn(3))
          reply(
            REP.INFO,
            Buffer.concat([u16(3), u32(1), u32(4096), u32(random.pick([MAX_PAYLOAD, MAX_PAYLOAD, 4096]))]),
          );
        if (random.oneIn(6)) reply(REP.INFO, Buffer.concat([u16(random.below(9)), random.bytes(random.below(30))]));
        if (option === OPT.GO) this.phase = 'requests';
        break;
      default:
        // An option that our client does not send: acknowledged all the same.
        break;
    }
    reply(REP.ACK, random.oneIn(40) ? random.bytes(3) : Buffer.alloc(0));
  }

  private answer(request: Buffer, type: number, flags: number, length: number): void {
    const { random, level } = this;
    const cookie = random.oneIn(100) ? random.bytes(8) : request.subarray(8, 16);
    const offset = Number(request.readBigUInt64BE(16));
    const chunk = (isDone: boolean, kind: number, payload: Buffer = Buffer.alloc(0)): void => {
      const head = [u32(level === 'extended' ? 0x6e8a278c : 0x668e33ef), u16(isDone ? 1 : 0), u16(kind), cookie];
      const size = random.oneIn(200) ? random.next() : payload.length;
      if (level === 'extended') head.push(request.subarray(16, 24), u64(size));
      else head.push(u32(size));
      this.say(Buffer.concat([...head, payload]));
    };
    if (
      level === 'simple' ||
      (level === 'structured' && type !== CMD.READ && type !== CMD.BLOCK_STATUS && random.oneIn(2))
    ) {
      const errno = random.oneIn(6) ? random.pick([1, 5, 22, 28, 108, 4711]) : 0;
      const data = errno === 0 && type === CMD.READ ? Buffer.alloc(Math.min(length, 2 * SIZE), 0xda) : Buffer.alloc(0);
      return this.say(Buffer.concat([u32(0x67446698), u32(errno), cookie, data]));
    }
    if (random.oneIn(6)) {
      const words = random.oneIn(8) ? random.bytes(random.below(100)) : Buffer.from('because');
      const hasOffset = random.oneIn(2);
      const where = hasOffset ? u64(random.oneIn(10) ? random.next() : offset) : Buffer.alloc(0);
      const kind = hasOffset ? REPLY_TYPE.ERROR_OFFSET : random.oneIn(8) ? 0x8000 | random.below(99) : REPLY_TYPE.ERROR;
      const errno = random.oneIn(20) ? 0 : 5;
      chunk(!random.oneIn(5), kind, Buffer.concat([u32(errno), u16(words.length), words, where]));
      if (random.oneIn(5)) chunk(true, REPLY_TYPE.NONE);
      return;
    }
    if (type === CMD.READ) return this.answerRead(chunk, offset, length, (flags & CMD_FLAG.DF) !== 0);
    if (type === CMD.BLOCK_STATUS) return this.answerStatus(chunk, request, length, (flags & CMD_FLAG.REQ_ONE) !== 0);
    chunk(true, REPLY_TYPE.NONE);
  }

  private answerRead(
    chunk: (isDone: boolean, kind: number, payload?: Buffer) => void,
    offset: number,
    length: number,
    df: boolean,
  ): void {
    const { random } = this;
    const parts: [number, number][] = [];
    for (let at = 0; at < length;) {
      const size = df && !random.oneIn(30) ? length : Math.min(length - at, 1 + random.below(length));
      parts.push([offset + at, size]);
      at += size;
    }
    if (random.oneIn(3)) parts.reverse();
    if (random.oneIn(20))
      parts.push(
        random.pick([
          [offset, 1],
          [offset + length, 1],
          [0, 0xffffffff],
        ]),
      );
    if (random.oneIn(20)) parts.pop();
    parts.forEach(([at, size], index) => {
      const isDone = index === parts.length - 1 && random.oneIn(2);
      if (random.oneIn(2)) chunk(isDone, REPLY_TYPE.OFFSET_HOLE, Buffer.concat([u64(at), u32(size)]));
      else chunk(isDone, REPLY_TYPE.OFFSET_DATA, Buffer.concat([u64(at), Buffer.alloc(Math.min(size, 70_000), 0xda)]));
      if (index === parts.length - 1 && !isDone) chunk(true, REPLY_TYPE.NONE);
    });
  }

  private answerStatus(
    chunk: (isDone: boolean, kind: number, payload?: Buffer) => void,
    request: Buffer,
    length: number,
    one: boolean,
  ): void {
    const { random } = this;
    const isWide = this.level === 'extended';
    const wanted: number[] = [];
    for (let at = 40; at < request.length; at += 4) wanted.push(request.readUInt32BE(at));
    const ids = wanted.length > 0 ? wanted : [...this.contexts];
    if (random.oneIn(20)) ids.push(random.next());
    if (random.oneIn(20)) ids.pop();
    ids.forEach((id, index) => {
      const extents: Buffer[] = [];
      for (let at = 0; at < length && (!one || at === 0 || random.oneIn(30)) && extents.length < 50;) {
        const size = random.oneIn(40) ? random.below(2) * 2 ** 31 : Math.min(length - at, 1 + random.below(length));
        const flags = random.oneIn(40) ? random.next() : random.below(4);
        extents.push(isWide ? Buffer.concat([u64(size), u64(flags)]) : Buffer.concat([u32(size), u32(flags)]));
        at += Math.max(size, 1);
      }
      const count = isWide ? u32(random.oneIn(50) ? random.next() : extents.length) : Buffer.alloc(0);
      const payload = Buffer.concat([u32(id), count, ...extents]);
      chunk(index === ids.length - 1, isWide ? REPLY_TYPE.BLOCK_STATUS_EXT : REPLY_TYPE.BLOCK_STATUS, payload);
    });
  }
}

/** Throws if the client misbehaves. */
export async function runClientInput(seed: number): Promise<void> {
  const random = new Random(seed);
  const ends = connectedEnds();
  ends.client.on('error', () => undefined);
  const server = new LyingServer(ends.server, random, random.pick([3, 20, 200, 1_000_000]));
  const reused: Buffer[] = [];
  let client: NbdClient;
  try {
    const replies = random.oneIn(3) ? random.pick(['simple', 'structured', 'extended'] as const) : undefined;
    const timeoutMs = random.oneIn(8) ? 1 + random.below(20) : undefined;
    const signal = random.oneIn(20) ? abortedSoon(random) : undefined;
    client = await NbdClient.connect({ socket: ends.client, replies, timeoutMs, signal });
  } catch (error) {
    if (!(error instanceof NbdClientError)) throw error;
    ends.server.destroy();
    return;
  }
  try {
    if (random.oneIn(3)) await client.list();
    if (random.oneIn(3)) await client.info('disk');
    if (random.oneIn(6)) await askTogether(client, random);
    if (random.oneIn(3)) await client.listContexts('disk');
    if (random.oneIn(3)) await client.selectContexts('disk', ['base:allocation', 'x-test:a']);
    await client.go('disk');
    for (let round = random.below(4); round >= 0; round--) {
      const asked = Array.from({ length: 1 + random.below(6) }, () => ask(client, random, reused));
      for (const outcome of await Promise.allSettled(asked)) {
        if (outcome.status === 'rejected' && !(outcome.reason instanceof NbdClientError)) throw outcome.reason;
      }
    }
  } catch (error) {
    if (!(error instanceof NbdClientError)) throw error;
  }
  // A server may also stay silent.
  if (random.oneIn(3)) ends.server.end();
  if (random.oneIn(2)) client.destroy();
  else if (random.oneIn(2) && !ends.server.writable) await client.disconnect();
  client.destroy();
  ends.server.destroy();
  await client.closed;
  if (server.hasForeignData) throw new Error('a write whose data were used by its caller');
  if (reused.some((memory) => memory.some((byte) => byte !== REUSED))) {
    throw new Error('memory of an aborted call was written to');
  }
}

/** A signal that is aborted at once or within a few turns of the event loop. */
function abortedSoon(random: Random): AbortSignal {
  const controller = new AbortController();
  let turns = random.below(8);
  const turn = (): void => {
    if (turns-- <= 0) controller.abort();
    else setImmediate(turn);
  };
  turn();
  return controller.signal;
}

/** Several options at once, some of them given up. */
async function askTogether(client: NbdClient, random: Random): Promise<void> {
  const options = (): { signal?: AbortSignal } => (random.oneIn(3) ? { signal: abortedSoon(random) } : {});
  const asked = [
    client.list(options()),
    client.info('disk', options()),
    client.selectContexts('disk', ['base:allocation'], options()),
    client.listContexts('disk', [], options()),
  ];
  for (const outcome of await Promise.allSettled(asked)) {
    if (outcome.status === 'rejected' && !(outcome.reason instanceof NbdClientError)) throw outcome.reason;
  }
}

/** One request, and a check of its result. Memory of a call that was aborted is used again at once. */
async function ask(client: NbdClient, random: Random, reused: Buffer[]): Promise<void> {
  const signal = random.oneIn(5) ? abortedSoon(random) : undefined;
  const memory: Buffer[] = [];
  try {
    await askOne(client, random, memory, signal);
  } catch (error) {
    if (error instanceof NbdClientError && error.code === 'ABORTED') {
      reused.push(...memory.map((bytes) => bytes.fill(REUSED)));
    }
    throw error;
  }
}

async function askOne(
  client: NbdClient,
  random: Random,
  memory: Buffer[],
  signal: AbortSignal | undefined,
): Promise<void> {
  const offset = random.oneIn(20) ? random.interesting(SIZE) : random.below(SIZE / 512) * 512;
  const length = random.oneIn(20) ? Math.min(random.interesting(SIZE), SIZE) : 1 + random.below(20_000);
  switch (random.below(9)) {
    case 0: {
      const data = Buffer.alloc(Math.min(length, 20_000), WRITTEN);
      memory.push(data);
      return client.write(offset, data, { fua: random.oneIn(2), signal });
    }
    case 1:
      return client.trim(offset, length, { signal });
    case 2:
      return client.zero(offset, random.oneIn(10) ? 2 ** 33 : length, { signal });
    case 3:
      return client.flush({ signal });
    case 8: {
      let end = 0;
      let steps = 0;
      for await (const extent of client.extents('base:allocation', { chunkBytes: 100_000, signal })) {
        if (extent.offset !== end || !(extent.length > 0)) throw new Error('an extent of extents()');
        end += extent.length;
        if (++steps > 20) break;
      }
      return;
    }
    case 4:
    case 5: {
      const context = random.pick(['base:allocation', 'x-test:a']);
      const extents = await client.blockStatus(context, offset, length, { one: random.oneIn(3), signal });
      let at = offset;
      for (const extent of extents) {
        if (extent.offset !== at || !(extent.length > 0) || !Number.isSafeInteger(extent.flags))
          throw new Error('an extent');
        at += extent.length;
      }
      if (extents.length === 0 || at > offset + length) throw new Error('extents that are not of the range');
      return;
    }
    default: {
      const into = Buffer.alloc(length, 0x55);
      memory.push(into);
      await client.readInto(offset, into, { df: random.oneIn(4), signal });
      // The server sends this byte only in a few mutations: more of them were not filled in.
      if (into.filter((byte) => byte === 0x55).length > 64) throw new Error('a read that did not bring everything');
    }
  }
}
