/**
 * Disks in memory behind the library's interfaces, for tests: every call is recorded, and a hook may delay it or make it fail.
 * The provider counts opened and closed devices, and detects devices that are used after their close, or closed twice.
 */

import {
  ALLOCATION_CONTEXT,
  ExportError,
  STATE_HOLE,
  STATE_ZERO,
  type Awaitable,
  type CompleteDevice,
  type Ending,
  type ExportInfo,
  type ExportProvider,
  type ExtentSink,
  type Geometry,
  type Peer,
  type ZeroMode,
} from '../src/index.js';

/** One call of a device, as received. */
export interface DeviceCall {
  readonly method: 'read' | 'write' | 'zero' | 'trim' | 'flush' | 'cache' | 'extents';
  readonly offset: number;
  readonly length: number;
  readonly fua?: boolean;
  readonly mode?: ZeroMode;
  readonly context?: string;
}

/** Called before a call is carried out: may throw, or return a promise to delay it. Synchronous by default. */
export type Hook = (call: DeviceCall) => Awaitable<void>;

/** A promise that the test resolves. */
export class Gate {
  readonly opened: Promise<void>;
  private resolve: () => void = () => undefined;
  private reject: (error: unknown) => void = () => undefined;

  constructor() {
    this.opened = new Promise((resolve, reject) => {
      this.resolve = resolve;
      this.reject = reject;
    });
  }

  open(): void {
    this.resolve();
  }

  fail(error: unknown): void {
    this.reject(error);
  }
}

export const DISK_SIZE = 1024 * 1024;

const EVERYTHING: Geometry = {
  size: DISK_SIZE,
  minimumBlockSize: 1,
  preferredBlockSize: 4096,
  readOnly: false,
  canFlush: true,
  canFua: true,
  canTrim: true,
  canZero: true,
  canFastZero: true,
  canCache: true,
  multiConn: true,
  rotational: false,
  contexts: [ALLOCATION_CONTEXT],
};

export class TestExport {
  readonly geometry: Geometry;
  readonly disk: Buffer;
  readonly info: ExportInfo;

  constructor(name: string, geometry: Partial<Geometry> = {}, description = `about ${name}`) {
    this.geometry = { ...EVERYTHING, ...geometry };
    this.info = { name, description };
    // All aligned 4-byte words differ, so that data from the wrong offset is detected. Impossible sizes are for refusal tests.
    const { size } = this.geometry;
    this.disk = Buffer.alloc(Number.isSafeInteger(size) && size > 0 ? size : 0);
    for (let at = 0; at + 4 <= this.disk.length; at += 4) this.disk.writeUInt32BE(at + 1, at);
  }

  /** The extents: each block of 4 KiB is one, a hole if it is all zeros. */
  extents(context: string, offset: number, length: number, sink: ExtentSink): void {
    const end = offset + length;
    for (let at = offset; at < end;) {
      const next = Math.min(end, (Math.floor(at / 4096) + 1) * 4096);
      const isZero = context === ALLOCATION_CONTEXT && this.disk.subarray(at, next).every((byte) => byte === 0);
      if (!sink(at, next - at, isZero ? STATE_HOLE | STATE_ZERO : 0)) return;
      at = next;
    }
  }

  /** The answer of isHole(), the synchronous check for holes. */
  isHole(_offset: number, _length: number): boolean {
    return false;
  }
}

export class TestProvider implements ExportProvider<CompleteDevice> {
  readonly exports = new Map<string, TestExport>();
  readonly calls: DeviceCall[] = [];
  hook: Hook = () => undefined;
  /** Called before a device is opened. */
  openHook: (name: string) => Awaitable<void> = () => undefined;
  /** Called while a device is being closed. */
  closeHook: () => Awaitable<void> = () => undefined;
  opened = 0;
  closed = 0;
  /** The ending that each device was closed with. */
  readonly endings: Ending[] = [];
  /** Peers of ended connections, and all peers passed to describe and open. */
  readonly gone: Peer[] = [];
  readonly askers = new Set<Peer>();
  /** Unfinished calls of devices. */
  unfinished = 0;
  /** Violations of the contract of BlockDevice. */
  readonly breaches: string[] = [];

  constructor(exports: readonly TestExport[]) {
    for (const one of exports) this.exports.set(one.info.name, one);
  }

  get openNow(): number {
    return this.opened - this.closed;
  }

  list(): ExportInfo[] {
    return Array.from(this.exports.values(), ({ info }) => info);
  }

  describe(name: string, peer?: Peer): { geometry: Geometry; info: ExportInfo } {
    if (peer !== undefined) this.askers.add(peer);
    const { geometry, info } = this.find(name);
    return { geometry, info };
  }

  async open(name: string, peer?: Peer): Promise<{ device: CompleteDevice; info: ExportInfo }> {
    if (peer !== undefined) this.askers.add(peer);
    await this.openHook(name);
    const found = this.find(name);
    this.opened++;
    return { device: new TestDevice(this, found), info: found.info };
  }

  left(peer: Peer): void {
    this.gone.push(peer);
  }

  private find(name: string): TestExport {
    const found = this.exports.get(name);
    if (found === undefined) throw new ExportError('UNKNOWN', `no export "${name}"`);
    return found;
  }
}

class TestDevice implements CompleteDevice {
  readonly geometry: Geometry;
  private readonly disk: Buffer;
  private readonly exported: TestExport;
  private isClosed = false;
  private running = 0;

  constructor(
    private readonly provider: TestProvider,
    exported: TestExport,
  ) {
    this.geometry = exported.geometry;
    this.disk = exported.disk;
    this.exported = exported;
  }

  read(offset: number, into: Buffer): Awaitable<void> {
    return this.run({ method: 'read', offset, length: into.length }, () => {
      this.disk.copy(into, 0, offset, offset + into.length);
    });
  }

  write(offset: number, data: Buffer, fua: boolean): Awaitable<void> {
    return this.run({ method: 'write', offset, length: data.length, fua }, () => void data.copy(this.disk, offset));
  }

  zero(offset: number, length: number, mode: ZeroMode): Awaitable<void> {
    return this.run({ method: 'zero', offset, length, mode }, () => this.clear(offset, length));
  }

  trim(offset: number, length: number, fua: boolean): Awaitable<void> {
    return this.run({ method: 'trim', offset, length, fua }, () => this.clear(offset, length));
  }

  flush(): Awaitable<void> {
    return this.run({ method: 'flush', offset: 0, length: 0 }, () => undefined);
  }

  cache(offset: number, length: number): Awaitable<void> {
    return this.run({ method: 'cache', offset, length }, () => undefined);
  }

  extents(context: string, offset: number, length: number, sink: ExtentSink): Awaitable<void> {
    return this.run({ method: 'extents', offset, length, context }, () => {
      this.exported.extents(context, offset, length, sink);
    });
  }

  isHole(offset: number, length: number): boolean {
    return this.exported.isHole(offset, length);
  }

  async close(ending: Ending): Promise<void> {
    this.provider.endings.push(ending);
    if (this.isClosed) this.provider.breaches.push('closed twice');
    if (this.running > 0) this.provider.breaches.push(`closed with ${this.running} calls unfinished`);
    this.isClosed = true;
    this.provider.closed++;
    await this.provider.closeHook();
  }

  /** A disk may be announced larger than it is by a test that only zeroes it. */
  private clear(offset: number, length: number): void {
    if (offset < this.disk.length) this.disk.fill(0, offset, Math.min(offset + length, this.disk.length));
  }

  private run(call: DeviceCall, act: () => void): Awaitable<void> {
    if (this.isClosed) this.provider.breaches.push(`${call.method} after close`);
    this.provider.calls.push(call);
    const delay = this.provider.hook(call);
    if (delay === undefined) return act();
    this.running++;
    this.provider.unfinished++;
    return delay.then(act).finally(() => {
      this.running--;
      this.provider.unfinished--;
    });
  }
}
