/**
 * A disk in a plain buffer, as the device below filters in tests: synchronous or not, with holes, obeying FUA, or careless. It
 * records what reaches it, and may fail. It shares no code with the devices under test.
 */

import {
  ALLOCATION_CONTEXT,
  STATE_HOLE,
  STATE_ZERO,
  type Awaitable,
  type BlockDevice,
  type DeviceGeometry,
  type Ending,
  type ExtentSink,
  type Transferred,
  type ZeroMode,
} from '../src/index.js';

/** What a careless device does with a read. */
export type Carelessness = 'short' | 'nothing' | 'another buffer';

export interface ModelOptions {
  /** Answers come later, in no order. */
  readonly isAsync?: boolean;
  readonly geometry?: Partial<DeviceGeometry>;
}

/** Zeros of this length are a hole, bytes, if they are aligned to it. */
const HOLE_BYTES = 512;

export class ModelDevice implements BlockDevice {
  readonly geometry: DeviceGeometry;
  readonly disk: Buffer;
  fillsBuffer = true;
  /** Requests as they came: "write 0 512 fua". */
  readonly calls: string[] = [];
  readonly signals = new Set<AbortSignal | undefined>();
  readonly endings: Ending[] = [];
  /** Throws, to make a request fail. */
  before: (method: string, offset: number, length: number) => void = () => undefined;
  /** What reads and writes do instead of their work. */
  carelessness: Carelessness | undefined;
  readonly #isAsync: boolean;
  readonly #zeros: Buffer;

  constructor(content: Buffer, { isAsync = false, geometry = {} }: ModelOptions = {}) {
    this.disk = Buffer.from(content);
    this.#isAsync = isAsync;
    this.#zeros = Buffer.alloc(content.length);
    const can = { canFua: true, canTrim: true, canZero: true, canFastZero: true, canCache: true, multiConn: true };
    this.geometry = { size: content.length, ...can, contexts: [ALLOCATION_CONTEXT], ...geometry };
  }

  read(offset: number, into: Buffer, signal?: AbortSignal): Awaitable<Transferred> {
    return this.#run('read', offset, into.length, '', signal, (): Transferred => {
      if (this.carelessness === 'nothing') return undefined;
      // What plain JavaScript may return.
      if (this.carelessness === 'another buffer') return Buffer.alloc(into.length) as unknown as Transferred;
      const length = this.carelessness === 'short' ? into.length - 1 : into.length;
      this.disk.copy(into, 0, offset, offset + length);
      return length;
    });
  }

  write(offset: number, data: Buffer, fua: boolean, signal?: AbortSignal): Awaitable<Transferred> {
    return this.#run('write', offset, data.length, fua ? ' fua' : '', signal, (): Transferred => {
      const length = this.carelessness === 'short' ? data.length - 1 : data.length;
      data.copy(this.disk, offset, 0, length);
      return length;
    });
  }

  flush(signal?: AbortSignal): Awaitable<void> {
    return this.#run('flush', 0, 0, '', signal, () => undefined);
  }

  zero(offset: number, length: number, { fua, noHole, fastZero }: ZeroMode, signal?: AbortSignal): Awaitable<void> {
    const flags = `${noHole ? ' noHole' : ''}${fua ? ' fua' : ''}${fastZero ? ' fastZero' : ''}`;
    return this.#run('zero', offset, length, flags, signal, () => void this.disk.fill(0, offset, offset + length));
  }

  trim(offset: number, length: number, fua: boolean, signal?: AbortSignal): Awaitable<void> {
    const trimmed = (): void => void this.disk.fill(0, offset, offset + length);
    return this.#run('trim', offset, length, fua ? ' fua' : '', signal, trimmed);
  }

  cache(offset: number, length: number, signal?: AbortSignal): Awaitable<void> {
    return this.#run('cache', offset, length, '', signal, () => undefined);
  }

  /** Extents are whole blocks, so the last one may reach beyond the range. */
  extents(_: string, offset: number, length: number, sink: ExtentSink, signal?: AbortSignal): Awaitable<void> {
    return this.#run('extents', offset, length, '', signal, () => {
      for (let at = offset; at < offset + length;) {
        const next = Math.min(this.disk.length, (Math.floor(at / HOLE_BYTES) + 1) * HOLE_BYTES);
        if (!sink(at, next - at, this.isHole(at, next - at) ? STATE_HOLE | STATE_ZERO : 0)) return;
        at = next;
      }
    });
  }

  isHole(offset: number, length: number): boolean {
    const bytes = this.disk.subarray(offset, offset + length);
    return bytes.equals(this.#zeros.subarray(0, bytes.length));
  }

  close(ending: Ending): Awaitable<void> {
    this.endings.push(ending);
    return this.#isAsync ? Promise.resolve() : undefined;
  }

  #run<T>(
    method: string,
    offset: number,
    length: number,
    flags: string,
    signal: AbortSignal | undefined,
    act: () => T,
  ): Awaitable<T> {
    this.calls.push(method === 'flush' ? method : `${method} ${offset} ${length}${flags}`);
    this.signals.add(signal);
    const failing = (): T => {
      this.before(method, offset, length);
      return act();
    };
    if (!this.#isAsync) return failing();
    const turns = this.calls.length % 3;
    return turns === 0 ? Promise.resolve().then(failing) : later(turns).then(failing);
  }
}

async function later(turns: number): Promise<void> {
  for (let turn = 0; turn < turns; turn++) await new Promise((resolve) => setImmediate(resolve));
}
