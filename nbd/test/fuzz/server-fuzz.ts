/**
 * One input against the server: a valid handshake and valid requests, partly mutated, cut into chunks, and ended in one of
 * the ways in which connections end. By the seed the device answers late or wrongly, or fails; and it,
 * the provider and the observer are careless in what they give (careless-provider.ts).
 */

import { DeviceError, NbdServer, type DeviceErrorCode, type ExtentSink } from '../../src/index.js';
import {
  CMD,
  CMD_FLAG,
  EXTENDED_REQUEST_MAGIC,
  NBD_ERRNO,
  OPT,
  REQUEST_MAGIC,
  type INFO,
} from '../../src/protocol/wire.js';
import { connectedEnds } from '../pair-end.js';
import { TestExport, TestProvider } from '../test-device.js';
import { Careless } from './careless-provider.js';
import { checkServerOutput } from './checker.js';
import { Random } from './random.js';

const DISK_BYTES = 256 * 1024;
/** The shortest that it can be, milliseconds: what hangs for longer is answered without the device. */
const REQUEST_TIMEOUT_MS = 5;
const NAMES = ['disk', 'fixed', 'blocks', 'rich', 'nothing', ''];
const CONTEXTS = ['base:allocation', 'base:', 'base:x', 'x-test:a', 'x-test:', 'x-wide:b', 'y:', 'nocolon'];
const CODES = Object.keys(NBD_ERRNO) as DeviceErrorCode[];

const u16 = (value: number): Buffer => Buffer.of((value >>> 8) & 0xff, value & 0xff);
const u32 = (value: number): Buffer => Buffer.concat([u16(value >>> 16), u16(value)]);
const u64 = (value: number): Buffer => {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64BE(BigInt(Math.max(0, value)));
  return bytes;
};
const text = (value: string): Buffer => Buffer.concat([u32(Buffer.byteLength(value)), Buffer.from(value)]);

export class ServerFuzzer {
  private readonly provider: TestProvider;
  private readonly server: NbdServer;
  private random = new Random(0);
  /** Makes answers, and the observer, careless for two thirds of the seeds. */
  private readonly careless = new Careless();
  /** By performance.now(): what hangs does not settle before. For a few seeds so late that its time is up. */
  private heldUntil = 0;

  constructor() {
    const small = { size: DISK_BYTES };
    this.provider = new TestProvider([
      new TestExport('disk', small),
      new TestExport('fixed', { ...small, readOnly: true }),
      new TestExport('blocks', {
        ...small,
        minimumBlockSize: 4096,
        canFua: false,
        canFastZero: false,
        canCache: false,
      }),
      new TestExport('rich', {
        ...small,
        contexts: ['base:allocation', 'x-test:a', 'x-wide:b'],
        wideContexts: ['x-wide:b'],
      }),
    ]);
    for (const exported of this.provider.exports.values()) {
      exported.extents = (_context, offset, length, sink) => this.extents(offset, length, sink);
      exported.isHole = () => this.random.oneIn(8);
    }
    this.server = new NbdServer({
      provider: this.careless.provider(this.provider) as TestProvider,
      observer: this.careless.observer(),
      limits: { lingerMs: 1000, maxUnsentBytes: 64 * 1024, requestTimeoutMs: REQUEST_TIMEOUT_MS },
    });
  }

  /** Throws if the server misbehaves. */
  async run(seed: number): Promise<void> {
    const random = new Random(seed);
    this.random = random;
    const { provider } = this;
    provider.calls.length = 0;
    provider.hook = random.oneIn(3) ? () => undefined : () => this.behave();
    const { input, handshakeBytes } = this.input(random);
    this.careless.random = random.oneIn(3) ? undefined : random;
    this.heldUntil = random.oneIn(40) ? performance.now() + 4 * REQUEST_TIMEOUT_MS : 0;
    const ends = connectedEnds();
    const output: Buffer[] = [];
    const ended = { isOver: false };
    ends.client.on('data', (chunk: Buffer) => output.push(chunk));
    const over = (): void => void (ended.isOver = true);
    ends.client
      .on('end', over)
      .on('close', over)
      .on('error', () => undefined);
    const id = this.server.serveConnection(ends.server);
    if (id === undefined) throw new Error('the connection was not served');

    const end = random.pick(['half-close', 'half-close', 'half-close', 'destroy', 'destroy late'] as const);
    // Often all at once, like a client that pipelines; otherwise the handshake first, like most clients.
    const pieces = random.oneIn(2)
      ? random.split(input)
      : [...random.split(input.subarray(0, handshakeBytes)), ...random.split(input.subarray(handshakeBytes))];
    for (const piece of pieces) {
      if (ended.isOver) break;
      ends.client.write(piece);
      if (random.oneIn(4)) await new Promise(setImmediate);
    }
    if (end === 'destroy late') await new Promise(setImmediate);
    if (end === 'half-close') {
      ends.client.end();
      await this.releasedUntil(() => ended.isOver);
    }
    ends.client.destroy();
    await this.releasedUntil(() => this.server.connections.size === 0);
    if (provider.openNow !== 0) throw new Error(`${provider.openNow} devices were left open`);
    if (provider.breaches.length > 0) throw new Error(`a device was ${provider.breaches.join(', ')}`);
    checkServerOutput(input, Buffer.concat(output), end === 'half-close');
  }

  close(): void {
    this.server.destroy();
  }

  /** Wait for `isDone`, and let what hangs settle: it may hang again. */
  private async releasedUntil(isDone: () => boolean): Promise<void> {
    while (!isDone()) {
      await new Promise(setImmediate);
      if (performance.now() >= this.heldUntil) this.careless.release();
    }
  }

  /** How a device answers a call. */
  private behave(): void | Promise<void> {
    const { random } = this;
    const fail = (): void => {
      if (random.oneIn(20)) throw new Error('a bug in the device');
      if (random.oneIn(4)) {
        const options = random.oneIn(2) ? { offset: random.interesting(DISK_BYTES) } : undefined;
        throw new DeviceError(random.pick(CODES), 'ß'.repeat(random.below(200)) + '\0', options);
      }
    };
    switch (random.below(4)) {
      case 0:
        return new Promise<void>((resolve) => setImmediate(resolve)).then(fail);
      case 1:
        return Promise.resolve().then(fail);
      default:
        return fail();
    }
  }

  /** Extents, mostly valid. */
  private extents(offset: number, length: number, sink: ExtentSink): void {
    const { random } = this;
    for (let at = offset; at < offset + length;) {
      const size = random.oneIn(50) ? 0 : random.pick([512, 4096, 5000, 65536, 2 ** 40]);
      const flags = random.oneIn(50) ? random.pick([-1, 0.5, 2 ** 32, 2 ** 53, NaN]) : random.below(4);
      if (random.oneIn(50)) at += random.below(3) - 1;
      if (!sink(at, size, flags) || random.oneIn(20) || size === 0) return;
      at += size;
    }
  }

  private input(random: Random): { input: Buffer; handshakeBytes: number } {
    const flags = random.oneIn(10) ? random.pick([0, 1, 2, 4, 0xffffffff]) : 3;
    const parts: Buffer[] = [u32(flags)];
    const name = random.oneIn(12) ? random.pick(NAMES) : random.pick([...NAMES.slice(0, 4), 'rich']);
    const level = random.pick([undefined, OPT.STRUCTURED_REPLY, OPT.EXTENDED_HEADERS]);
    const options: Buffer[] = [];
    if (level !== undefined) options.push(this.option(level, Buffer.alloc(0)));
    if (level !== undefined && random.below(4) > 0) {
      options.push(this.option(OPT.SET_META_CONTEXT, this.metaQuery(name)));
    }
    for (let count = random.oneIn(3) ? random.below(5) : 0; count > 0; count--) {
      options.splice(random.below(options.length + 1), 0, this.anyOption(name));
    }
    parts.push(...options.map((option) => (random.oneIn(40) ? random.mutate(option) : option)));
    if (!random.oneIn(20)) {
      parts.push(
        random.oneIn(8) ? this.option(OPT.EXPORT_NAME, Buffer.from(name)) : this.option(OPT.GO, this.infoQuery(name)),
      );
    }
    const handshakeBytes = parts.reduce((sum, { length }) => sum + length, 0);
    const requests = random.below(14);
    for (let index = 0; index < requests; index++) {
      const request = this.request(index, level === OPT.EXTENDED_HEADERS);
      parts.push(random.oneIn(60) ? random.mutate(request) : request);
    }
    const input = Buffer.concat(parts);
    return { input: random.oneIn(12) ? random.mutate(input) : input, handshakeBytes };
  }

  private option(option: number, data: Buffer, claimed = data.length): Buffer {
    return Buffer.concat([Buffer.from('IHAVEOPT'), u32(option), u32(claimed), data]);
  }

  private anyOption(name: string): Buffer {
    const { random } = this;
    const other = random.oneIn(4) ? random.pick(NAMES) : name;
    switch (random.below(9)) {
      case 0:
        return this.option(OPT.LIST, random.oneIn(5) ? random.bytes(3) : Buffer.alloc(0));
      case 1:
        return this.option(OPT.INFO, this.infoQuery(other));
      case 2:
        return this.option(OPT.LIST_META_CONTEXT, this.metaQuery(other));
      case 3:
        return this.option(OPT.SET_META_CONTEXT, this.metaQuery(other));
      case 4:
        return this.option(
          random.pick([OPT.STRUCTURED_REPLY, OPT.EXTENDED_HEADERS]),
          random.bytes(random.oneIn(5) ? 2 : 0),
        );
      case 5:
        return this.option(
          random.pick([OPT.STARTTLS, OPT.PEEK_EXPORT, 0x4e, 0xffffffff]),
          random.bytes(random.below(40)),
        );
      case 6:
        return this.option(OPT.ABORT, Buffer.alloc(0));
      case 7:
        return this.option(random.below(12), random.bytes(random.below(60)));
      default:
        // More than the server accepts, and sometimes more than it drains.
        return this.option(random.below(12), Buffer.alloc(70_000), random.oneIn(2) ? 70_000 : random.next());
    }
  }

  private infoQuery(name: string): Buffer {
    const { random } = this;
    const infos: (typeof INFO)[keyof typeof INFO][] = [];
    for (let info: 0 | 1 | 2 | 3 = 0; info < 4; info++) if (random.oneIn(2)) infos.push(info as 0);
    return Buffer.concat([text(name), u16(infos.length), ...infos.map(u16)]);
  }

  private metaQuery(name: string): Buffer {
    const { random } = this;
    const queries = Array.from({ length: random.below(4) }, () =>
      random.oneIn(30) ? random.bytes(random.below(20)).toString('latin1') : random.pick(CONTEXTS),
    );
    if (random.below(3) > 0) queries.push('base:allocation');
    // Only one export has several contexts: choose it often.
    if (random.oneIn(2)) queries.push('x-test:a');
    return Buffer.concat([text(name), u32(queries.length), ...queries.map(text)]);
  }

  private request(index: number, isExtended: boolean): Buffer {
    const { random } = this;
    const type = random.oneIn(12)
      ? random.pick([CMD.DISC, 8, 9, 0xffff])
      : random.pick([0, 0, 0, 1, 1, 3, 4, 5, 6, 7, 7]);
    const own = { [CMD.READ]: CMD_FLAG.DF, [CMD.WRITE_ZEROES]: 18, [CMD.BLOCK_STATUS]: CMD_FLAG.REQ_ONE }[type] ?? 0;
    let flags = (random.oneIn(3) ? own : 0) | (random.oneIn(6) ? CMD_FLAG.FUA : 0);
    if (random.oneIn(25)) flags ^= 1 << random.below(16);
    // Most flushes have no range, as the protocol demands.
    const isFlush = type === CMD.FLUSH && !random.oneIn(4);
    let offset = isFlush ? 0 : random.interesting(DISK_BYTES);
    let length = isFlush ? 0 : random.interesting(DISK_BYTES);
    if (type === CMD.READ && random.oneIn(3)) length = 128 * 1024 + random.below(DISK_BYTES / 2);
    if (random.below(3) > 0 && !isFlush) {
      // Inside the export, and aligned for devices that need it.
      offset = Math.floor((offset % DISK_BYTES) / 4096) * 4096;
      length = Math.min(Math.floor(length / 4096) * 4096 + 4096, DISK_BYTES - offset);
    }
    // Above 2^53.
    if (random.oneIn(40)) offset = 2 ** 64 - 2 ** (11 + random.below(50));
    let payload: Buffer = Buffer.alloc(0);
    if (type === CMD.WRITE) {
      length = random.oneIn(40) ? length : Math.min(length, random.pick([1, 512, 5000, 150_000]));
      payload = Buffer.alloc(Math.min(length, 160_000), random.next());
      if (isExtended && !random.oneIn(10)) flags |= CMD_FLAG.PAYLOAD_LEN;
    } else if (isExtended && random.oneIn(type === CMD.BLOCK_STATUS ? 2 : 20)) {
      const ids = Array.from({ length: random.below(4) }, () =>
        u32(random.oneIn(8) ? random.next() : 1 + random.below(3)),
      );
      payload = random.oneIn(10) ? random.bytes(random.below(90)) : Buffer.concat([u64(length), ...ids]);
      flags |= CMD_FLAG.PAYLOAD_LEN;
      length = payload.length;
    }
    const head = [u32(isExtended ? EXTENDED_REQUEST_MAGIC : REQUEST_MAGIC), u16(flags), u16(type)];
    const cookie = Buffer.concat([u32(random.next()), u32(index)]);
    const size = isExtended ? u64(length) : u32(Math.min(length, 0xffffffff));
    return Buffer.concat([...head, cookie, u64(offset), size, payload]);
  }
}
