/**
 * The VDI layer and the local store against a plain in-memory disk: random operations, then every byte of every VDI and
 * snapshot compared.
 */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { LocalStore } from '../../src/store/local/local-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import type { Vdi } from '../../src/vdi/vdi.js';

const SEQUENCES = Number(process.env.SHEEPGATE_MODEL_SEQUENCES ?? 500);
const SHIFT = 20;
const OBJECT = 2 ** SHIFT;
const UNIT = 512;
const MAX_SIZE = 3 * OBJECT;
const ZEROS = Buffer.alloc(MAX_SIZE);

type Op =
  | { kind: 'write' | 'zero' | 'zero-allocated' | 'trim'; at: number; length: number; fill: number; fua: boolean }
  | { kind: 'flush' | 'reopen' | 'detach' }
  | { kind: 'snapshot' | 'temporary' | 'clone' | 'rollback' | 'delete' | 'read'; pick: number }
  | { kind: 'resize'; units: number };

const range = fc.record({
  at: fc.double({ min: 0, max: 1, noNaN: true, maxExcluded: true }),
  length: fc.oneof(
    { weight: 4, arbitrary: fc.integer({ min: 1, max: 9000 }) },
    { weight: 2, arbitrary: fc.constantFrom(512, 4096, 65536, 131072) },
    { weight: 2, arbitrary: fc.integer({ min: 100_000, max: 2 * OBJECT }) },
    { weight: 1, arbitrary: fc.constant(-1) }, // one whole object
  ),
  fill: fc.integer({ min: 1, max: 255 }),
  fua: fc.boolean(),
});

const op: fc.Arbitrary<Op> = fc.oneof(
  { weight: 12, arbitrary: range.map((r) => ({ kind: 'write' as const, ...r })) },
  { weight: 3, arbitrary: range.map((r) => ({ kind: 'zero' as const, ...r })) },
  { weight: 2, arbitrary: range.map((r) => ({ kind: 'zero-allocated' as const, ...r })) },
  { weight: 3, arbitrary: range.map((r) => ({ kind: 'trim' as const, ...r })) },
  { weight: 2, arbitrary: fc.constantFrom<Op>({ kind: 'flush' }, { kind: 'reopen' }, { kind: 'detach' }) },
  {
    weight: 8,
    arbitrary: fc.record({
      kind: fc.constantFrom(
        'snapshot' as const,
        'temporary' as const,
        'clone' as const,
        'rollback' as const,
        'delete' as const,
        'read' as const,
      ),
      pick: fc.nat(1000),
    }),
  },
  {
    weight: 1,
    arbitrary: fc.integer({ min: 1, max: MAX_SIZE / UNIT }).map((units) => ({ kind: 'resize' as const, units })),
  },
);

/**
 * The model: for each VDI and snapshot all its bytes, and for each object a number that changes whenever the object is written,
 * or zeroed where it was not zeros. Two disks of one ancestry may differ in the objects whose numbers differ, and in no other.
 */
class Model {
  readonly disks = new Map<string, Buffer>();
  readonly versions = new Map<string, number[]>();
  working: string[] = [];
  #version = 0;

  add(name: string, content: Buffer, versions: readonly number[] = []): void {
    this.disks.set(name, content);
    this.versions.set(name, [...versions]);
  }

  /** `name` becomes a copy of `from`. */
  copy(name: string, from: string): void {
    this.add(name, Buffer.from(this.disks.get(from) as Buffer), this.versions.get(from));
  }

  delete(name: string): void {
    this.disks.delete(name);
    this.versions.delete(name);
  }

  /** The objects of the range were written, or may have been. */
  touch(name: string, at: number, length: number): void {
    const versions = this.versions.get(name) as number[];
    for (let idx = Math.floor(at / OBJECT); idx * OBJECT < at + length; idx++) versions[idx] = ++this.#version;
  }

  /** The range becomes zeros. Returns whether it was not zeros before. */
  zero(name: string, at: number, length: number): boolean {
    const disk = this.disks.get(name) as Buffer;
    let isChange = false;
    for (let done = 0; done < length;) {
      const from = at + done;
      const part = Math.min(OBJECT - (from % OBJECT), length - done);
      if (!isZeros(disk.subarray(from, from + part))) {
        isChange = true;
        this.touch(name, from, part);
      }
      done += part;
    }
    disk.fill(0, at, at + length);
    return isChange;
  }

  get snapshots(): string[] {
    return [...this.disks.keys()].filter((name) => name.includes('@') && !name.includes('@now:'));
  }

  get temporary(): string[] {
    return [...this.disks.keys()].filter((name) => name.includes('@now:'));
  }
}

class Run {
  readonly model = new Model();
  store!: LocalStore;
  catalog!: VdiCatalog;
  readonly #open = new Map<string, Vdi>();
  #counter = 0;

  constructor(readonly directory: string) {}

  async start(): Promise<void> {
    this.store = await LocalStore.open(this.directory, { maxDescriptors: 4 });
    this.catalog = new VdiCatalog(this.store);
  }

  async device(name: string): Promise<Vdi> {
    let vdi = this.#open.get(name);
    if (!vdi) this.#open.set(name, (vdi = await this.catalog.openVdi(name)));
    return vdi;
  }

  async detach(name?: string): Promise<void> {
    for (const [key, vdi] of this.#open) {
      if (name !== undefined && key !== name) continue;
      this.#open.delete(key);
      await this.catalog.release(vdi);
    }
  }

  async create(name: string, size: number): Promise<void> {
    await this.catalog.create(name, size, { blockSizeShift: SHIFT });
    this.model.add(name, Buffer.alloc(size));
    this.model.working.push(name);
  }

  async apply(step: Op, current: string): Promise<void> {
    const disk = this.model.disks.get(current) as Buffer;
    switch (step.kind) {
      case 'write':
      case 'zero':
      case 'zero-allocated':
      case 'trim': {
        let at = Math.floor(step.at * disk.length);
        let length = step.length;
        if (length < 0) {
          at -= at % OBJECT;
          length = OBJECT;
        }
        length = Math.min(length, disk.length - at);
        const vdi = await this.device(current);
        if (step.kind === 'write') {
          const data = Buffer.alloc(length, step.fill);
          data.writeUInt8(step.fill ^ 0x55, length - 1);
          data.copy(disk, at);
          this.model.touch(current, at, length);
          await vdi.write(at, data, step.fua);
        } else {
          const { copies } = vdi;
          const isChange = this.model.zero(current, at, length);
          if (step.kind === 'zero-allocated') this.model.touch(current, at, length);
          if (step.kind === 'trim') await vdi.trim(at, length, step.fua);
          else await vdi.zero(at, length, { noHole: step.kind === 'zero-allocated', fua: step.fua });
          if (!isChange && step.kind !== 'zero-allocated') expect(vdi.copies, 'copies for zeros').toBe(copies);
        }
        break;
      }
      case 'flush':
        await (await this.device(current)).flush();
        break;
      case 'detach':
        await this.detach();
        break;
      case 'reopen':
        await this.detach();
        await this.catalog.close();
        await this.start();
        for (const name of this.model.temporary) this.model.delete(name);
        break;
      case 'snapshot': {
        const tag = `t${this.#counter++}`;
        await this.catalog.snapshot(current, tag);
        this.model.copy(`${current}@${tag}`, current);
        break;
      }
      case 'temporary': {
        if (this.model.temporary.length >= 3) break;
        const tag = `now:${this.#counter++}`;
        await this.catalog.snapshotTemporary(current, tag);
        this.model.copy(`${current}@${tag}`, current);
        break;
      }
      case 'clone': {
        const from = pickOf(this.model.snapshots, step.pick);
        if (!from || this.model.working.length >= 3) break;
        const name = `c${this.#counter++}`;
        await this.catalog.clone(from, name);
        this.model.copy(name, from);
        this.model.working.push(name);
        break;
      }
      case 'rollback': {
        const from = pickOf(
          this.model.snapshots.filter((name) => this.model.working.includes(name.split('@')[0] as string)),
          step.pick,
        );
        if (!from) break;
        const name = from.split('@')[0] as string;
        await this.detach(name);
        await this.catalog.rollback(from);
        this.model.copy(name, from);
        break;
      }
      case 'delete': {
        const all = [...this.model.disks.keys()].filter((name) => name !== this.model.working[0]);
        const name = pickOf(all, step.pick);
        if (!name) break;
        await this.remove(name);
        this.model.working = this.model.working.filter((other) => other !== name);
        break;
      }
      case 'read': {
        const name = pickOf([...this.model.disks.keys()], step.pick) as string;
        await this.compare(name);
        if (name.includes('@')) await this.compareChanges(name);
        break;
      }
      case 'resize': {
        const size = step.units * UNIT;
        if (size < disk.length) await this.detach(current);
        await this.catalog.resize(current, size, { force: true });
        if (size < disk.length) {
          this.model.zero(current, size, disk.length - size);
          // Objects behind the new end are gone, whatever they held.
          const cut = Math.ceil(size / OBJECT) * OBJECT;
          if (cut < disk.length) this.model.touch(current, cut, disk.length - cut);
        }
        const resized = Buffer.alloc(size);
        disk.copy(resized);
        this.model.add(current, resized, this.model.versions.get(current));
        break;
      }
    }
  }

  async remove(name: string): Promise<void> {
    await this.detach(name);
    if (this.model.temporary.includes(name)) {
      const [vdi, tag] = name.split('@') as [string, string];
      await this.catalog.dropTemporary(vdi, tag);
    } else await this.catalog.remove(name);
    this.model.delete(name);
  }

  /** The changes since a snapshot must have every object that differs, and no object that was not touched. */
  async compareChanges(base: string): Promise<void> {
    const name = base.split('@')[0] as string;
    if (!this.model.working.includes(name)) return;
    const [now, before] = [await this.device(name), await this.device(base)];
    const content = this.model.disks.get(name) as Buffer;
    const old = Buffer.alloc(content.length);
    (this.model.disks.get(base) as Buffer).copy(old);
    const [versions, oldVersions] = [this.model.versions.get(name) ?? [], this.model.versions.get(base) ?? []];
    await now.changedSince(before, 0, content.length, (at, length, isChanged) => {
      if (!isChanged && !content.subarray(at, at + length).equals(old.subarray(at, at + length))) {
        throw new Error(`${name} differs from ${base} in ${length} bytes at ${at}, which count as unchanged`);
      }
      for (let idx = at / OBJECT; isChanged && idx * OBJECT < at + length; idx++) {
        if (versions[idx] === oldVersions[idx])
          throw new Error(`object ${idx} of ${name} counts as changed since ${base}`);
      }
      return true;
    });
  }

  async compare(name: string): Promise<void> {
    const expected = this.model.disks.get(name) as Buffer;
    const vdi = await this.device(name);
    expect(vdi.size).toBe(expected.length);
    const actual = Buffer.alloc(expected.length, 0xaa);
    await vdi.read(0, actual);
    if (!actual.equals(expected)) {
      const at = actual.findIndex((byte, index) => byte !== expected[index]);
      throw new Error(`${name} differs at ${at}: ${actual[at]}, should be ${expected[at]}`);
    }
    // A hole must read as zeros.
    await vdi.extents(0, expected.length, (at, length, hole) => {
      if (hole && !expected.subarray(at, at + length).equals(Buffer.alloc(length))) {
        throw new Error(`${name} reports a hole over data at ${at}`);
      }
      return true;
    });
  }

  async finish(): Promise<void> {
    for (const name of this.model.disks.keys()) await this.compare(name);
    for (const name of this.model.disks.keys()) if (name.includes('@')) await this.compareChanges(name);
    for (const name of this.model.temporary) await this.remove(name);
    await this.detach();
    const report = await this.catalog.check({ repair: false });
    expect(report.problems).toEqual([]);
    await this.catalog.close();
  }
}

function isZeros(data: Buffer): boolean {
  return data.equals(ZEROS.subarray(0, data.length));
}

function pickOf<T>(from: readonly T[], pick: number): T | undefined {
  return from[pick % from.length];
}

export function scratchDirectory(): string {
  const base = fs.existsSync('/dev/shm') ? '/dev/shm' : os.tmpdir();
  return fs.mkdtempSync(path.join(base, 'sheepgate-model-'));
}

async function run(ops: readonly Op[], currents: readonly number[], directory: string): Promise<void> {
  const session = new Run(directory);
  await session.start();
  await session.create('disk', 2 * OBJECT + 3 * UNIT);
  for (const [n, step] of ops.entries()) {
    const current = pickOf(session.model.working, currents[n] ?? 0) as string;
    await session.apply(step, current);
  }
  await session.finish();
}

describe('VDI layer', () => {
  test(
    `${SEQUENCES} random sequences leave every VDI and snapshot equal to the model`,
    async () => {
      await fc.assert(
        fc.asyncProperty(
          fc.array(op, { minLength: 5, maxLength: 40 }),
          fc.array(fc.nat(2), { minLength: 40, maxLength: 40 }),
          async (ops, currents) => {
            const directory = scratchDirectory();
            try {
              await run(ops, currents, directory);
            } finally {
              fs.rmSync(directory, { recursive: true, force: true });
            }
          },
        ),
        { numRuns: SEQUENCES },
      );
    },
    15 * 60_000,
  );
});
