/**
 * A local store with random disks, snapshots, clones, trims and temporary snapshots, and the bytes that each of them must have.
 * Owns its directories. `crash` leaves the files as a power loss or a kill does; the caller then damages and rescues them.
 */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterEach, expect } from 'vitest';
import { logHeader, mapLogDirectory } from '../../src/store/local/map-log-format.js';
import { LocalStore, type LocalStoreOptions } from '../../src/store/local/local-store.js';
import { labelOfVdi } from '../../src/store/vdi-record.js';
import { hostDisk } from '../../src/system/real-disk.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import type { Vdi } from '../../src/vdi/vdi.js';

export const OBJECT = 2 ** 20;
const BLOCK = 4096;
const MAX_WORKING = 4;
const MAX_OBJECTS = 5;
/** Never: a test says when a copy is made. */
const NO_COPIES = { delayMs: 2 ** 30, everyMs: 2 ** 30 };

const scratch: string[] = [];

/** A directory of the running test, in memory where that can be: what is tested here is not the disk. */
export function scratchDirectory(): string {
  const made = fs.mkdtempSync(path.join(fs.existsSync('/dev/shm') ? '/dev/shm' : os.tmpdir(), 'sheepgate-rescue-'));
  scratch.push(made);
  return made;
}

afterEach(() => {
  for (const directory of scratch.splice(0)) fs.rmSync(directory, { recursive: true, force: true });
});

export class Workload {
  readonly directory = path.join(scratchDirectory(), 'store');
  /** By NAME or NAME@TAG. */
  readonly contents = new Map<string, Buffer>();
  store!: LocalStore;
  catalog!: VdiCatalog;
  readonly #open = new Map<string, Vdi>();
  #seed: number;
  #names = 0;
  #merges = false;

  constructor(seed: number) {
    this.#seed = seed;
  }

  async start(options: LocalStoreOptions = {}): Promise<void> {
    this.#merges = options.mergeDelayMs !== undefined;
    this.store = await LocalStore.open(this.directory, { copies: NO_COPIES, ...options });
    this.catalog = new VdiCatalog(this.store);
  }

  /** A whole number below `limit`. */
  below(limit: number): number {
    this.#seed = (Math.imul(this.#seed ^ (this.#seed >>> 15), 0x2c1b3c6d) + 0x6d2b79f5) | 0;
    const mixed = Math.imul(this.#seed ^ (this.#seed >>> 13), 0x297a2d39);
    return ((mixed ^ (mixed >>> 16)) >>> 0) % limit;
  }

  #working(): string[] {
    return [...this.contents.keys()].filter((name) => !name.includes('@'));
  }

  #pick<T>(from: readonly T[]): T | undefined {
    return from[this.below(Math.max(1, from.length))];
  }

  content(label: string): Buffer {
    const content = this.contents.get(label);
    if (content === undefined) throw new Error(`no ${label}`);
    return content;
  }

  async vdi(name: string): Promise<Vdi> {
    let vdi = this.#open.get(name);
    if (!vdi) this.#open.set(name, (vdi = await this.catalog.openVdi(name)));
    return vdi;
  }

  async #detach(name: string): Promise<void> {
    const vdi = this.#open.get(name);
    this.#open.delete(name);
    if (vdi) await this.catalog.release(vdi);
  }

  async create(): Promise<string> {
    const name = `disk${++this.#names}`;
    const size = (1 + this.below(MAX_OBJECTS)) * OBJECT - 512 * this.below(3);
    await this.catalog.create(name, size, { blockSizeShift: 20 });
    this.contents.set(name, Buffer.alloc(size));
    return name;
  }

  async write(name: string): Promise<void> {
    const content = this.content(name);
    const at = this.below(content.length - 1);
    const length = Math.min(1 + this.below(this.below(3) === 0 ? 2 * OBJECT : 9000), content.length - at);
    const data = Buffer.alloc(length, 1 + this.below(255));
    data.copy(content, at);
    await (await this.vdi(name)).write(at, data, false);
  }

  async trim(name: string): Promise<void> {
    const content = this.content(name);
    const at = this.below(2) * this.below(content.length - 1);
    const length = Math.min(1 + this.below(3 * OBJECT), content.length - at);
    content.fill(0, at, at + length);
    await (await this.vdi(name)).trim(at, length, false);
  }

  async flushAll(): Promise<void> {
    for (const name of this.#working()) await (await this.vdi(name)).flush();
    await this.store.reclaimed();
  }

  /** One random operation. */
  async step(): Promise<void> {
    const name = this.#pick(this.#working());
    if (name === undefined) return void (await this.create());
    const kind = this.below(24);
    const spec = this.#pick([...this.contents.keys()].filter((label) => label.includes('@')));
    if (kind < 9) return this.write(name);
    // Some way, not always to the end: a copy and a loss may come in between.
    if (this.#merges && this.below(4) === 0) {
      this.store.merger.look();
      for (let turns = this.below(20); turns > 0; turns--) await new Promise(setImmediate);
      if (this.below(3) === 0) await this.store.merger.settled();
    }
    if (kind < 12) return this.trim(name);
    if (kind < 13) return (await this.vdi(name)).flush();
    if (kind < 14 && this.#working().length < MAX_WORKING) return void (await this.create());
    if (kind < 17) {
      const tag = `s${++this.#names}`;
      await this.catalog.snapshot(name, tag);
      this.contents.set(`${name}@${tag}`, Buffer.from(this.content(name)));
      return;
    }
    if (kind < 19) {
      const tag = `now:${++this.#names}`;
      const { vid } = await this.catalog.snapshotTemporary(name, tag);
      for (let writes = 0; writes < 3; writes++) await this.write(name);
      await this.catalog.dropTemporary(name, tag, vid);
      return;
    }
    if (kind < 20) {
      await this.#detach(name);
      const content = this.content(name);
      const size = Math.max(512, 512 * this.below((MAX_OBJECTS * OBJECT) / 512));
      await this.catalog.resize(name, size, { force: true });
      const resized = Buffer.alloc(size);
      content.copy(resized);
      this.contents.set(name, resized);
      return;
    }
    if (spec === undefined) return;
    if (kind < 21 && this.#working().length < MAX_WORKING) {
      const clone = `disk${++this.#names}`;
      await this.catalog.clone(spec, clone);
      this.contents.set(clone, Buffer.from(this.content(spec)));
    } else if (kind < 22) {
      const [of = ''] = spec.split('@');
      if (!this.contents.has(of)) return;
      await this.#detach(of);
      await this.catalog.rollback(spec);
      this.contents.set(of, Buffer.from(this.content(spec)));
    } else {
      await this.catalog.remove(spec);
      this.contents.delete(spec);
    }
  }

  /**
   * The files as they are now, in another directory. `isSameBoot`: as after a kill, so that logs count; else as after a power loss.
   */
  crash({ isSameBoot }: { readonly isSameBoot: boolean }): string {
    const copy = path.join(scratchDirectory(), 'crashed');
    fs.cpSync(this.directory, copy, { recursive: true });
    for (const name of fs.readdirSync(path.join(copy, 'recent'))) {
      const fd = fs.openSync(path.join(copy, 'recent', name), 'r+');
      const header = logHeader(hostDisk, mapLogDirectory(hostDisk, copy), this.store.logs.session, fd);
      if (!isSameBoot) header.write('another', header.indexOf('boot ') + 5);
      fs.writeSync(fd, header, 0, header.length, 0);
      fs.closeSync(fd);
    }
    return copy;
  }

  async stop(): Promise<void> {
    this.#open.clear();
    await this.catalog.close();
    await this.store.close();
  }
}

/** All bytes of each VDI and snapshot of a store, by NAME or NAME@TAG; undefined for one that cannot be read. */
export async function contentsOf(directory: string): Promise<Map<string, Buffer | undefined>> {
  const store = await LocalStore.open(directory, { copies: NO_COPIES, mayCreate: false });
  const catalog = new VdiCatalog(store);
  try {
    const found = new Map<string, Buffer | undefined>();
    for (const record of await catalog.list()) {
      const vdi = await catalog.openVdi(`@${record.vid.toString(16)}`);
      const all = Buffer.alloc(vdi.size, 0xaa);
      const isRead = await (async () => vdi.read(0, all))().then(
        () => true,
        () => false,
      );
      found.set(labelOfVdi(record), isRead ? all : undefined);
      await catalog.release(vdi);
    }
    return found;
  } finally {
    await catalog.close();
    await store.close();
  }
}

/**
 * Fails unless both have the same bytes; with `mayBeStale` where `expected` is zeros, and in the ranges `uncertain`, `found` may have
 * anything.
 */
export function expectBytes(
  found: Buffer | undefined,
  expected: Buffer,
  what: string,
  mayBeStale = false,
  uncertain: readonly { readonly from: number; readonly to: number }[] = [],
): void {
  if (found === undefined) expect.fail(`${what} cannot be read`);
  expect(found.length, `size of ${what}`).toBe(expected.length);
  if (found.equals(expected)) return;
  for (let at = 0; at < expected.length; at += BLOCK) {
    const part: Buffer = found.subarray(at, at + BLOCK);
    const right: Buffer = expected.subarray(at, at + BLOCK);
    if (part.equals(right)) continue;
    const isUncertain = uncertain.some(({ from, to }) => from <= at && Math.min(at + BLOCK, expected.length) <= to);
    if (isUncertain) continue;
    const differs = part.findIndex((byte, n) => byte !== right[n] && !(mayBeStale && right[n] === 0));
    if (differs >= 0) expect.fail(`${what} differs at ${at + differs}: ${part[differs]}, should be ${right[differs]}`);
  }
}
