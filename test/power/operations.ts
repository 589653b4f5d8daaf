/**
 * The operations of a workload: each is done on the store, and told to the model with the moments at which it began and was
 * answered. Owns what is open. Decides by random numbers only what the operation's parameters are.
 */
import type { VdiCatalog } from '../../src/vdi/catalog.js';
import type { Vdi } from '../../src/vdi/vdi.js';
import { BLOCK, dataOf } from './blocks.js';
import { takeOneBackup, targetOf } from './backups.js';
import { contentOf, describeWrong, firstDifference, Violation } from './findings.js';
import type { MachineDisk } from './machine-disk.js';
import type { Machine } from './machine.js';
import { DiskModel, type Model, type Range, type SnapshotThing } from './model.js';
import type { Random } from './random.js';

export const OBJECT_SHIFT = 20;
const OBJECT = 2 ** OBJECT_SHIFT;
/** Of a new disk: objects, and sectors of one more. */
const MAX_OBJECTS = 2;
const LARGE = 0.2;
const MAX_MORE_SECTORS = 200;
const MAX_DISKS = 3;
const MAX_SNAPSHOTS = 4;
const MAX_BURST = 4;

export interface OperationsParts {
  readonly machine: Machine;
  readonly disk: MachineDisk;
  readonly catalog: VdiCatalog;
  readonly model: Model;
  readonly random: Random;
  readonly counter: { next: number };
  readonly tell: (line: string) => void;
  /** Do all that the store has to merge. */
  readonly merge: () => Promise<void>;
}

/** An overlay with so many bytes of an object, and more, takes the rest from below: the cheaper direction. */
const MOST_OF_OBJECT = 600_000;

/** Operations on data, which several disks can do at once. */
const ON_DATA = { write: 6, fua: 2, burst: 3, zero: 2, trim: 2, flush: 4, snapshot: 2 } as const;
type OnData = keyof typeof ON_DATA;

export type Operation =
  | OnData
  | 'both'
  | 'snapshotUnderWrites'
  | 'merge'
  | 'mergeUnderWrites'
  | 'mergeUp'
  | 'trimObject'
  | 'now'
  | 'deleteSnapshot'
  | 'deleteDisk'
  | 'clone'
  | 'rollback'
  | 'resize'
  | 'fill';

interface OpenDisk {
  readonly name: string;
  readonly model: DiskModel;
  readonly vdi: Vdi;
}

export class Operations {
  readonly catalog: VdiCatalog;
  readonly #parts: OperationsParts;
  readonly #open = new Map<string, OpenDisk>();

  constructor(parts: OperationsParts) {
    this.#parts = parts;
    this.catalog = parts.catalog;
  }

  #now(): number {
    return this.#parts.machine.journal.mark();
  }

  /** The process is killed: what is answered from now on reaches nobody. */
  isDead = false;

  #answered(done: (at: number) => void, at = this.#now()): void {
    if (!this.isDead) done(at);
  }

  #new(): number {
    return this.#parts.counter.next++;
  }

  /** Names of disks that can be used now. */
  #disks(): string[] {
    const { model } = this.#parts;
    return model.present().filter((name) => model.get(name)?.kind === 'disk');
  }

  #snapshots(): string[] {
    const { model } = this.#parts;
    return model.present().filter((name) => model.get(name)?.kind === 'snapshot');
  }

  #diskOf(name: string): DiskModel {
    const thing = this.#parts.model.get(name);
    if (thing?.kind !== 'disk') throw new Error(`invariant: ${name} is no disk`);
    return thing.disk;
  }

  async #opened(name: string): Promise<OpenDisk> {
    let open = this.#open.get(name);
    if (!open) {
      open = { name, model: this.#diskOf(name), vdi: await this.catalog.openVdi(name) };
      this.#open.set(name, open);
    }
    return open;
  }

  async #release(name: string): Promise<void> {
    const open = this.#open.get(name);
    this.#open.delete(name);
    if (open) await this.catalog.release(open.vdi);
  }

  /** The store is being closed: call the result when that is answered. */
  closing(): () => void {
    const now = this.#now();
    const flushed = this.#disks().map((name) => this.#diskOf(name).flush(now));
    return () => {
      const at = this.#now();
      for (const done of flushed) done(at);
    };
  }

  async run(operation: Operation): Promise<void> {
    const { random } = this.#parts;
    const disks = this.#disks();
    if (disks.length === 0) return this.create();
    const name = random.pick(disks);
    switch (operation) {
      case 'both': {
        const [first, second] = [name, disks.find((other) => other !== name)];
        const both = second === undefined ? [first] : [first, second];
        await Promise.all(both.map((each) => this.#onData(random.weighted(ON_DATA), each)));
        return;
      }
      case 'snapshotUnderWrites':
        return this.#snapshotUnderWrites(name);
      case 'merge':
        this.#parts.tell('merge');
        return this.#parts.merge();
      case 'mergeUnderWrites': {
        this.#parts.tell('merge, under writes');
        await this.#opened(name);
        const writes = Array.from({ length: random.between(1, MAX_BURST) }, () => random.weighted(ON_DATA));
        const write = async (): Promise<void> => {
          for (const each of writes) if (each !== 'snapshot') await this.#onData(each, name);
        };
        await Promise.all([this.#parts.merge(), write()]);
        return;
      }
      case 'mergeUp':
        return this.#mergeUp(name);
      case 'trimObject':
        return this.#trimObject(name);
      case 'now':
        return this.#temporary(name);
      case 'deleteSnapshot':
        return this.#delete(this.#snapshots());
      case 'deleteDisk':
        return disks.length > 1 ? this.#delete(this.#present('disk', 'filling')) : this.create();
      case 'clone':
        return this.#clone();
      case 'rollback':
        return this.#rollback();
      case 'resize':
        return this.#resize(name);
      case 'fill':
        return this.#fill();
      default:
        return this.#onData(operation, name);
    }
  }

  /** Some operation on data, of those that a kill may interrupt. */
  async runOne(): Promise<void> {
    const { random } = this.#parts;
    const disks = this.#disks().filter((name) => !this.#isBusy.has(name));
    if (disks.length === 0) return;
    const name = random.pick(disks);
    this.#isBusy.add(name);
    const other = random.chance(0.3) ? random.pick(['clone', 'deleteSnapshot', 'fill'] as const) : undefined;
    if (other !== undefined && this.#isBusy.size === 1) return this.run(other);
    return this.#onData(random.weighted(ON_DATA), name);
  }
  readonly #isBusy = new Set<string>();

  #present(...kinds: readonly string[]): string[] {
    const { model } = this.#parts;
    return model.present().filter((name) => kinds.includes(model.get(name)?.kind ?? ''));
  }

  async #onData(operation: OnData, name: string): Promise<void> {
    const { random } = this.#parts;
    const open = await this.#opened(name);
    switch (operation) {
      case 'write':
        return this.#write(open, this.#range(open), false);
      case 'fua':
        return this.#write(open, this.#range(open), true);
      case 'burst':
        await Promise.all([
          ...this.#apart(open).map((range) => this.#write(open, range, random.chance(0.1))),
          ...(random.chance(0.4) ? [this.#flush(open)] : []),
        ]);
        return;
      case 'zero':
      case 'trim':
        return this.#zero(open, this.#range(open), operation);
      case 'flush':
        return this.#flush(open);
      case 'snapshot':
        await this.#snapshot(open, true);
    }
  }

  #range({ model: { size } }: OpenDisk): Range {
    const { random } = this.#parts;
    const kind = random.weighted({ odd: 3, sectors: 3, pages: 3, large: 2, object: 1, edge: 2 });
    const shapes = {
      odd: [1, 1, 9000],
      sectors: [BLOCK, BLOCK, 16 * BLOCK],
      pages: [4096, 4096, 65_536],
      large: [BLOCK, 100_000, 300_000],
      object: [OBJECT, OBJECT, OBJECT],
      edge: [BLOCK, BLOCK, 40 * BLOCK],
    } as const;
    const [unit, least, most] = shapes[kind];
    const length = Math.min(size, Math.ceil(random.between(least, most) / unit) * unit);
    let offset = Math.floor(random.below(size - length + 1) / unit) * unit;
    // Across the end of an object.
    if (kind === 'edge' && size > OBJECT) offset = OBJECT - Math.floor(length / 2 / BLOCK) * BLOCK;
    return { offset, length: Math.max(1, Math.min(length, size - offset)) };
  }

  /** Ranges that touch no common block. */
  #apart(open: OpenDisk): Range[] {
    const ranges: Range[] = [];
    for (let left = this.#parts.random.between(2, MAX_BURST); left > 0; left--) {
      const range = this.#range(open);
      const touches = (other: Range): boolean =>
        range.offset - BLOCK < other.offset + other.length && other.offset - BLOCK < range.offset + range.length;
      if (!ranges.some(touches)) ranges.push(range);
    }
    return ranges;
  }

  async #write({ name, model, vdi }: OpenDisk, range: Range, fua: boolean): Promise<void> {
    const number = this.#new();
    const data = dataOf(model.name, number, range.offset, range.length);
    this.#parts.tell(`write ${number}: ${name} ${range.offset} +${range.length}${fua ? ' FUA' : ''}`);
    const done = model.write(range, data, this.#now(), fua);
    await vdi.write(range.offset, data, fua);
    this.#answered(done);
  }

  async #zero({ name, model, vdi }: OpenDisk, range: Range, how: 'zero' | 'trim'): Promise<void> {
    const { random } = this.#parts;
    const fua = random.chance(0.2);
    const noHole = random.chance(0.5);
    this.#parts.tell(
      `${how}${how === 'zero' && noHole ? ' noHole' : ''} ${name} ${range.offset} +${range.length} ${fua ? 'FUA' : ''}`,
    );
    const done = model.write(range, undefined, this.#now(), fua);
    if (how === 'zero') await vdi.zero(range.offset, range.length, { noHole, fua });
    else await vdi.trim(range.offset, range.length, fua);
    this.#answered(done);
  }

  async #flush({ name, model, vdi }: OpenDisk): Promise<void> {
    this.#parts.tell(`flush ${name}`);
    const done = model.flush(this.#now());
    await vdi.flush();
    const at = this.#now();
    this.#parts.tell(`flushed ${name}`);
    this.#answered(done, at);
  }

  async create(): Promise<void> {
    const { model } = this.#parts;
    const name = `d${this.#new()}`;
    const size = this.#someSize();
    this.#parts.tell(`create ${name} ${size}`);
    const done = model.put(name, { kind: 'disk', disk: new DiskModel(name, size) }, this.#now());
    await this.catalog.create(name, size, { blockSizeShift: OBJECT_SHIFT });
    this.#answered(done);
  }

  #someSize(): number {
    const { random } = this.#parts;
    const objects = random.chance(LARGE) ? MAX_OBJECTS : 1;
    return objects * OBJECT + random.below(MAX_MORE_SECTORS) * BLOCK;
  }

  /** `isQuiet`: nothing is written to the disk meanwhile. */
  async #snapshot({ name, model }: OpenDisk, isQuiet: boolean): Promise<string | undefined> {
    if (this.#snapshots().length >= MAX_SNAPSHOTS) return undefined;
    const spec = `${name}@s${this.#new()}`;
    this.#parts.tell(`snapshot ${spec}`);
    const begun = this.#now();
    const thing: SnapshotThing = { kind: 'snapshot', of: model, begun, bytes: isQuiet ? model.bytes() : undefined };
    const done = this.#parts.model.put(spec, thing, begun);
    const flushed = model.flush(begun);
    await this.catalog.snapshot(name, spec.slice(name.length + 1));
    const at = this.#now();
    this.#parts.tell(`taken: ${spec}`);
    this.#answered(done, at);
    this.#answered(flushed, at);
    if (isQuiet) return spec;
    const bytes = await contentOf(this.catalog, spec);
    const wrong = model.wrongInSnapshot(bytes, begun, at);
    if (wrong) throw new Violation(`${spec}, just taken: ${describeWrong(wrong) ?? ''}`);
    thing.bytes = bytes;
    return spec;
  }

  async #snapshotUnderWrites(name: string): Promise<void> {
    const open = await this.#opened(name);
    const { random } = this.#parts;
    await Promise.all([
      ...this.#apart(open).map((range) => this.#write(open, range, random.chance(0.2))),
      this.#snapshot(open, false),
      ...(random.chance(0.5) ? [this.#flush(open)] : []),
    ]);
  }

  /** The first object becomes an overlay with most of its blocks, which takes the rest from below. No flush follows. */
  async #mergeUp(name: string): Promise<void> {
    const open = await this.#opened(name);
    const { random, tell } = this.#parts;
    await this.#write(open, { offset: 0, length: OBJECT }, false);
    await this.#flush(open);
    const spec = await this.#snapshot(open, true);
    if (spec === undefined) return;
    await this.#write(open, { offset: 0, length: random.between(MOST_OF_OBJECT, OBJECT - BLOCK) }, random.chance(0.5));
    await this.#delete([spec]);
    tell('merge');
    await this.#parts.merge();
  }

  /** The first object is given up, and a flush begins while it goes. */
  async #trimObject(name: string): Promise<void> {
    const open = await this.#opened(name);
    await this.#write(open, { offset: 0, length: OBJECT }, true);
    await this.#zero(open, { offset: 0, length: OBJECT }, 'trim');
    await this.#flush(open);
  }

  async #temporary(name: string): Promise<void> {
    const open = await this.#opened(name);
    this.#parts.tell(`${name}@now`);
    const expected = open.model.bytes();
    const { vid } = await this.catalog.snapshotTemporary(name, 'now');
    const temporary = await this.catalog.openTemporary(vid);
    for (const range of this.#apart(open)) await this.#write(open, range, false);
    if (this.#parts.random.chance(0.3)) await this.#flush(open);
    const bytes = Buffer.alloc(temporary.size);
    await temporary.read(0, bytes);
    const wrong = firstDifference(bytes, expected);
    if (wrong) throw new Violation(`${name}@now: ${describeWrong(wrong) ?? ''}`);
    await this.catalog.release(temporary);
    await this.catalog.dropTemporary(name, 'now', vid);
  }

  async #delete(specs: readonly string[]): Promise<void> {
    if (specs.length === 0) return;
    const spec = this.#parts.random.pick(specs);
    await this.#release(spec);
    this.#parts.tell(`delete ${spec}`);
    const done = this.#parts.model.put(spec, undefined, this.#now());
    await this.catalog.remove(spec);
    this.#parts.tell(`deleted ${spec}`);
    this.#answered(done);
  }

  #snapshotBytes(spec: string): Buffer {
    const thing = this.#parts.model.get(spec);
    if (thing?.kind !== 'snapshot' || !thing.bytes) throw new Error(`invariant: ${spec} has no known content`);
    return thing.bytes;
  }

  async #clone(): Promise<void> {
    const snapshots = this.#snapshots();
    if (snapshots.length === 0 || this.#present('disk', 'filling').length >= MAX_DISKS) return;
    const spec = this.#parts.random.pick(snapshots);
    const name = `c${this.#new()}`;
    this.#parts.tell(`clone ${spec} ${name}`);
    const bytes = this.#snapshotBytes(spec);
    const disk = new DiskModel(name, bytes.length, bytes);
    const done = this.#parts.model.put(name, { kind: 'disk', disk }, this.#now());
    await this.catalog.clone(spec, name);
    this.#answered(done);
  }

  async #rollback(): Promise<void> {
    const disks = this.#disks();
    const nameOf = (spec: string): string => spec.split('@')[0] ?? '';
    const snapshots = this.#snapshots().filter((spec) => disks.includes(nameOf(spec)));
    if (snapshots.length === 0) return;
    const spec = this.#parts.random.pick(snapshots);
    const name = nameOf(spec);
    await this.#release(name);
    this.#parts.tell(`rollback ${spec}`);
    const bytes = this.#snapshotBytes(spec);
    const disk = new DiskModel(`${name}r${this.#new()}`, bytes.length, bytes);
    const done = this.#parts.model.put(name, { kind: 'disk', disk }, this.#now());
    await this.catalog.rollback(spec);
    this.#answered(done);
  }

  async #resize(name: string): Promise<void> {
    const model = this.#diskOf(name);
    await this.#release(name);
    const size = this.#someSize();
    const before = model.size;
    if (size === before) return;
    this.#parts.tell(`resize ${name} ${before} to ${size}`);
    const now = this.#now();
    const cut =
      size < before ? model.write({ offset: size, length: before - size }, undefined, now, true) : () => undefined;
    const flushed = model.flush(now);
    const resized = model.resize(size, now);
    await this.catalog.resize(name, size, { force: true });
    const at = this.#now();
    for (const done of [cut, flushed, resized]) this.#answered(done, at);
  }

  /** As an import does. */
  async #fill(): Promise<void> {
    const { model, random } = this.#parts;
    if (this.#present('disk', 'filling').length >= MAX_DISKS) return;
    const number = this.#new();
    const name = `i${number}`;
    const run = `run${number}`;
    const size = OBJECT + random.below(MAX_MORE_SECTORS) * BLOCK;
    this.#parts.tell(`fill ${name}`);
    const disk = new DiskModel(name, size);
    const begun = model.put(name, { kind: 'filling', run }, this.#now());
    const filling = { by: 'import', of: 'an image', run, size, blockSizeShift: OBJECT_SHIFT } as const;
    await this.catalog.begin(name, { ...filling, overwrites: false, goesOn: false });
    begun(this.#now());
    const vdi = await this.catalog.openVdi(name, { run });
    const open = { name, model: disk, vdi };
    await Promise.all(this.#apart(open).map((range) => this.#write(open, range, false)));
    await this.catalog.release(vdi);
    const now = this.#now();
    const finished = model.put(name, { kind: 'disk', disk }, now);
    const flushed = disk.flush(now);
    await this.catalog.finish(name, run);
    const at = this.#now();
    finished(at);
    this.#answered(flushed, at);
  }

  async backup(): Promise<void> {
    const { model, machine, disk, random } = this.#parts;
    const disks = this.#disks();
    if (disks.length === 0) return;
    const name = random.chance(0.7) ? (disks[0] as string) : random.pick(disks);
    this.#parts.tell(`backup ${name}`);
    const open = await this.#opened(name);
    const now = this.#now();
    const taken = model.backUp(name, open.model.bytes(), now);
    const id = await takeOneBackup(this.catalog, name, targetOf(machine.root, name), disk, random);
    taken(id, this.#now());
    this.#parts.tell(`backup ${id} taken`);
  }
}
