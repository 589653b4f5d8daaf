/**
 * One opening after the other of the store under test, and disks whose content is known. Owns what a test has open, and
 * removes all VDIs after it: a test finds an empty store.
 */
import { expect } from 'vitest';
import type { VdiRecord } from '../../src/store/vdi-record.js';
import type { VdiCatalog } from '../../src/vdi/catalog.js';
import type { Vdi } from '../../src/vdi/vdi.js';
import { isZeros } from './model.js';
import type { Abilities, StoreUnderTest } from './store-under-test.js';

export interface Extent {
  readonly at: number;
  readonly length: number;
  /** A hole, or a changed range. */
  readonly flag: boolean;
}

/** An open VDI and the bytes that it must have. */
export class Disk {
  readonly content: Buffer;

  constructor(
    readonly vdi: Vdi,
    content?: Buffer,
  ) {
    this.content = content ?? Buffer.alloc(vdi.size);
  }

  async write(at: number, length: number, fill: number, fua = false): Promise<void> {
    this.content.fill(fill, at, at + length);
    await this.vdi.write(at, Buffer.alloc(length, fill), fua);
  }

  async trim(at: number, length: number): Promise<void> {
    this.content.fill(0, at, at + length);
    await this.vdi.trim(at, length, false);
  }

  async zero(at: number, length: number, noHole = false): Promise<void> {
    this.content.fill(0, at, at + length);
    await this.vdi.zero(at, length, { noHole, fua: false });
  }

  /** A copy of what it must have now. */
  now(): Buffer {
    return Buffer.from(this.content);
  }

  async check(): Promise<void> {
    await checkContent(this.vdi, this.content);
  }
}

export async function bytesOf(vdi: Vdi): Promise<Buffer> {
  const all = Buffer.alloc(vdi.size, 0xaa);
  await vdi.read(0, all);
  return all;
}

/** For disks of the usual sizes: fresh memory for each comparison keeps the garbage collector busy. */
const SPARE_BYTES = 9 * 2 ** 20;
const spare: Buffer[] = [];

/** Size, bytes, and no hole over anything but zeros. */
export async function checkContent(vdi: Vdi, expected: Buffer, what = 'the VDI'): Promise<void> {
  expect(vdi.size, `size of ${what}`).toBe(expected.length);
  const memory = spare.pop() ?? Buffer.alloc(SPARE_BYTES);
  const found = vdi.size <= SPARE_BYTES ? memory.subarray(0, vdi.size) : Buffer.alloc(vdi.size);
  await vdi.read(0, found.fill(0xaa));
  expectSame(found, expected, what);
  spare.push(memory);
  for (const { at, length, flag: isHole } of await extentsOf(vdi)) {
    if (!isHole) continue;
    expect(isZeros(expected.subarray(at, at + length)), `${what} has a hole at ${at} with only zeros in it`).toBe(true);
  }
}

/** `toEqual` takes minutes for megabytes. */
export function expectSame(found: Buffer, expected: Buffer, what: string): void {
  if (found.equals(expected)) return;
  const at = found.findIndex((byte, n) => byte !== expected[n]);
  expect.fail(`${what} differs at ${at}: ${found[at]}, should be ${expected[at]}`);
}

/** Extents of the range; fails unless they are in order, without gaps, none empty. */
export async function extentsOf(vdi: Vdi, offset = 0, length = vdi.size): Promise<Extent[]> {
  return collect(offset, length, (sink) => vdi.extents(offset, length, sink));
}

/** What counts as changed since `base`; fails like `extentsOf`. */
export async function changesOf(vdi: Vdi, base: Vdi, offset = 0, length = vdi.size): Promise<Extent[]> {
  return collect(offset, length, (sink) => vdi.changedSince(base, offset, length, sink));
}

type Sink = (at: number, length: number, flag: boolean) => boolean;

async function collect(offset: number, length: number, ask: (sink: Sink) => void | Promise<void>): Promise<Extent[]> {
  const found: Extent[] = [];
  let reached = offset;
  await ask((at, size, flag) => {
    expect(at).toBe(reached);
    expect(size).toBeGreaterThan(0);
    reached = at + size;
    found.push({ at, length: size, flag });
    return true;
  });
  expect(reached).toBe(offset + length);
  return found;
}

/** What is wrong with a request: also if it throws instead of rejecting, as requests that are answered at once do. */
export async function codeOf(request: () => unknown): Promise<string> {
  try {
    await request();
  } catch (error) {
    const { code, message } = error as { code?: string; message: string };
    return code ?? message;
  }
  return 'no error';
}

let lastName = 0;

export class Session {
  /** The present opening. */
  catalog!: VdiCatalog;
  readonly objectSize: number;
  readonly #store: () => StoreUnderTest;
  readonly #effort: number;
  readonly #open = new Set<Vdi>();
  #before: readonly string[] = [];

  /** `store` is asked for when it is needed: tests are defined before it has started. */
  constructor(
    readonly abilities: Abilities,
    store: () => StoreUnderTest,
    effort = 1,
  ) {
    this.objectSize = abilities.objectSize;
    this.#store = store;
    this.#effort = effort;
  }

  /** How often something is repeated here that is repeated `count` times on a store whose operations cost little. */
  repeats(count: number): number {
    return Math.max(1, Math.round(count * this.#effort));
  }

  get store(): StoreUnderTest {
    return this.#store();
  }

  async start(): Promise<void> {
    this.catalog = await this.store.open();
  }

  /** A name that no VDI of this process had before. */
  newName(): string {
    return `disk${++lastName}`;
  }

  create(name: string, size: number): Promise<VdiRecord> {
    return this.catalog.create(name, size, { blockSizeShift: Math.log2(this.objectSize) });
  }

  /** A new, empty VDI, open. */
  async newDisk(objects: number, name = this.newName()): Promise<{ readonly name: string; readonly disk: Disk }> {
    await this.create(name, objects * this.objectSize);
    return { name, disk: new Disk(await this.openVdi(name)) };
  }

  async openVdi(spec: string): Promise<Vdi> {
    const vdi = await this.catalog.openVdi(spec);
    this.#open.add(vdi);
    return vdi;
  }

  async release(...vdis: readonly Vdi[]): Promise<void> {
    for (const vdi of vdis) {
      this.#open.delete(vdi);
      await this.catalog.release(vdi);
    }
  }

  /** Open, compare, release. */
  async checkSpec(spec: string, expected: Buffer): Promise<void> {
    const vdi = await this.openVdi(spec);
    await checkContent(vdi, expected, spec);
    await this.release(vdi);
  }

  async names(): Promise<string[]> {
    return (await this.catalog.list()).map(({ name, tag }) => (tag === '' ? name : `${name}@${tag}`));
  }

  async reopen(): Promise<void> {
    this.#open.clear();
    await this.catalog.close();
    await this.#openAgain();
  }

  async crash(): Promise<void> {
    this.#open.clear();
    await this.store.crash();
    await this.#openAgain();
  }

  async #openAgain(): Promise<void> {
    await this.start();
    // As a daemon does when it starts.
    await this.catalog.dropLeftovers();
  }

  /** Also what a test that failed has left. */
  async removeAll(): Promise<void> {
    for (const vdi of this.#open) await this.catalog.release(vdi).catch(() => undefined);
    this.#open.clear();
    for (const { name, tag, isTemporary, vid } of await this.catalog.list()) {
      if (isTemporary) await this.catalog.dropTemporary(name, tag, vid);
      else await this.catalog.remove(tag === '' ? name : `${name}@${tag}`);
    }
  }

  /** Errors: space that nobody uses, as far as it was not there before; whatever the other side has to complain about. */
  async checkNothingLeft(): Promise<void> {
    const left = await this.store.objects();
    const leaked = left.filter((object) => !this.#before.includes(object));
    this.#before = left;
    expect(leaked, 'objects of no VDI').toEqual([]);
    expect(this.store.violations?.() ?? []).toEqual([]);
  }
}
