/**
 * Checks one crash state with the real code: the store is opened as after the crash, everything in it is compared with the
 * model, and then it is used, closed, and opened again. Owns what is checked, and the machine that the state runs on.
 */
import fs from 'node:fs';
import path from 'node:path';
import { LocalStore } from '../../src/store/local/local-store.js';
import { rescueStore, type Rescued } from '../../src/store/local/rescue.js';
import { StoreError } from '../../src/store/store-error.js';
import { labelOfVdi } from '../../src/store/vdi-record.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { checkBackups, goOnWithBackups } from './backups.js';
import { dataOf } from './blocks.js';
import type { Files, Loss } from './crash-state.js';
import { contentOf, describeWrong, findAll, firstDifference, Violation, type Buffers } from './findings.js';
import { MachineDisk } from './machine-disk.js';
import { isDatabase, Machine, ROOT_INO, type MachineOptions } from './machine.js';
import type { Model } from './model.js';
import type { Random } from './random.js';

/** So often everything is deleted at the end, and must leave no space in use. */
const DELETES_ALL = 0.15;
/** The first write number of a check: higher than any of a workload. */
const FIRST_WRITE = 1_000_000;
/** What stays when a store is empty, beside LMDB's files: the copies of the metadata say that it is. */
const STAYS = new Set(['lock', 'copies']);
/** So often the store is rescued as well, without its meta.mdb. */
const RESCUES = 0.15;

/** Larger than a disk of a workload. */
const BUFFER_BYTES = 3 * 2 ** 20;
const BUFFERS: Buffer[] = [];
const COMPARED = Buffer.alloc(BUFFER_BYTES);

/** The same buffers for each state: one is checked at a time. */
function reused(): Buffers {
  let next = 0;
  return { next: () => (BUFFERS[next++] ??= Buffer.allocUnsafeSlow(BUFFER_BYTES)) };
}

export interface State {
  readonly files: Files;
  readonly model: Model;
  /** When the crash was, and what kind: this decides what is legal. */
  readonly at: number;
  readonly loss: Loss;
  /** What the machine is after the crash. */
  readonly machine: Omit<MachineOptions, 'root'>;
  /** A directory in memory, for LMDB. */
  readonly place: string;
  readonly random: Random;
}

/** Errors: Violation; whatever else the code throws is a mistake too. */
export async function checkState(state: State): Promise<void> {
  const { model, at, loss, random } = state;
  await onMachine(state, async (machine) => {
    const disk = new MachineDisk(machine);
    await checkBackups(model, machine.root, disk, at);
    const first = await Opened.open(machine, disk);
    await first.using(async ({ catalog }) => {
      const found = await findAll(catalog, model, at, loss, reused());
      for (const [spec, { bytes }] of found) if (bytes) first.expected.set(spec, bytes);
      if (loss === 'away') await giveUpKept(catalog);
      await mustBeClean(catalog);
      await first.goOn(random);
      await goOnWithBackups(catalog, model, machine.root, disk, random);
      // The next backup has replaced its snapshot.
      for (const spec of [...first.expected.keys()]) if (spec.includes('@backup-')) first.expected.delete(spec);
    });
    mustHaveNoLeftovers(machine);
    const second = await Opened.open(machine, disk, first.expected);
    await second.using(async ({ catalog }) => {
      await second.compare();
      await mustBeClean(catalog);
      if (random.chance(DELETES_ALL)) await second.deleteAll();
    });
    if (second.hasDeletedAll) mustBeEmpty(machine);
  });
  if (random.chance(RESCUES)) await checkRescue(state);
}

/** What a rescue without meta.mdb calls certain is as legal as what the store itself shows. */
async function checkRescue(state: State): Promise<void> {
  const { model, at, loss } = state;
  await onMachine(state, async (machine) => {
    const disk = new MachineDisk(machine);
    const damaged = path.join(machine.root, 'store');
    const to = path.join(machine.root, 'rescued');
    if (disk.existsSync(path.join(damaged, 'meta.mdb'))) disk.unlinkSync(path.join(damaged, 'meta.mdb'));
    let plan: Rescued['plan'];
    try {
      ({ plan } = await rescueStore(damaged, to, { isDry: false, force: true, disk }));
    } catch (error) {
      // Before its first VDI a store has nothing that could be rescued.
      if (error instanceof StoreError && error.code === 'NO_STORE') return;
      throw new Violation(`the store cannot be rescued: ${(error as Error).message}`, { cause: error });
    }
    const opened = await Opened.open(machine, disk, new Map(), 'rescued');
    await opened.using(async ({ catalog }) => {
      const certain = plan.vdis.filter(({ isCertain }) => isCertain).map(({ record }) => labelOfVdi(record));
      await findAll(catalog, model, at, loss, reused(), plan.isCertain ? undefined : new Set(certain));
      if (plan.vdis.every(({ lost }) => lost.length === 0)) await mustBeClean(catalog);
    });
  });
}

/** Opens the store once, and closes it: a recovery, which can be interrupted by a second crash. */
export async function recover(state: State): Promise<Machine> {
  return onMachine(state, async (machine) => {
    const opened = await Opened.open(machine, new MachineDisk(machine));
    await opened.using(() => Promise.resolve());
    return machine;
  });
}

async function onMachine<T>(state: State, work: (machine: Machine) => Promise<T>): Promise<T> {
  // The same for all: names are then resolved once.
  const root = path.join(state.place, 'state');
  fs.mkdirSync(root);
  try {
    return await work(new Machine({ ...state.machine, root }, state.files));
  } finally {
    fs.rmSync(root, { recursive: true, force: true });
  }
}

class Opened {
  readonly store: LocalStore;
  readonly catalog: VdiCatalog;
  /** What was found and written, by spec. */
  readonly expected: Map<string, Buffer>;
  hasDeletedAll = false;
  readonly #logged: string[];

  private constructor(store: LocalStore, expected: Map<string, Buffer>, logged: string[]) {
    this.store = store;
    this.catalog = new VdiCatalog(store);
    this.expected = expected;
    this.#logged = logged;
  }

  static async open(
    machine: Machine,
    disk: MachineDisk,
    expected = new Map<string, Buffer>(),
    name = 'store',
  ): Promise<Opened> {
    const logged: string[] = [];
    try {
      const store = await LocalStore.open(path.join(machine.root, name), { disk, log: (line) => logged.push(line) });
      return new Opened(store, expected, logged);
    } catch (error) {
      throw new Violation(`the store cannot be opened: ${(error as Error).message}`, { cause: error });
    }
  }

  async using(work: (opened: Opened) => Promise<void>): Promise<void> {
    try {
      await work(this);
      await this.catalog.close();
    } catch (error) {
      await this.catalog.close().catch(() => this.store.metadata.close({ clean: false }).catch(() => undefined));
      if (this.#logged.length > 0) (error as Error).message += `\n  log: ${this.#logged.join('\n       ')}`;
      throw error;
    }
  }

  /** Write, flush, snapshot. */
  async goOn(random: Random): Promise<void> {
    let number = FIRST_WRITE;
    for (const [name, bytes] of [...this.expected]) {
      if (name.includes('@')) continue;
      const vdi = await this.catalog.openVdi(name);
      for (let left = 2; left > 0; left--) {
        const length = Math.min(bytes.length, random.between(1, 20_000));
        const offset = random.below(bytes.length - length + 1);
        const data = dataOf(`${name} after`, number++, offset, length);
        await vdi.write(offset, data, random.chance(0.2));
        data.copy(bytes, offset);
      }
      await vdi.flush();
      if (random.chance(0.5)) {
        await this.catalog.snapshot(name, 'after');
        this.expected.set(`${name}@after`, Buffer.from(bytes));
        const data = dataOf(`${name} after`, number++, 0, 512);
        await vdi.write(0, data, false);
        data.copy(bytes);
      }
      await this.catalog.release(vdi);
    }
    if (this.expected.size > 0) return;
    const made = Buffer.alloc(2 ** 20);
    await this.catalog.create('new', made.length, { blockSizeShift: 20 });
    this.expected.set('new', made);
  }

  async compare(): Promise<void> {
    for (const [spec, bytes] of this.expected) {
      const wrong = firstDifference(await contentOf(this.catalog, spec, COMPARED), bytes);
      if (wrong) throw new Violation(`${spec}, opened again: ${describeWrong(wrong) ?? ''}`);
    }
  }

  async deleteAll(): Promise<void> {
    const all = await this.catalog.list();
    for (const { name, tag, isSnapshot } of all) await this.catalog.remove(isSnapshot ? `${name}@${tag}` : name);
    this.hasDeletedAll = true;
  }
}

async function mustBeClean(catalog: VdiCatalog): Promise<void> {
  const { problems } = await catalog.check({ repair: false });
  if (problems.length > 0) throw new Violation(`check finds: ${problems.join('; ')}`);
}

/**
 * The disk was away on the same boot: logs of answered writes are there, and cannot be trusted (FORMAT.md, recent/). They are set
 * aside, and unreferenced objects are kept, until an operator gives them up after a first report.
 */
async function giveUpKept(catalog: VdiCatalog): Promise<void> {
  const { problems } = await catalog.check({ repair: false });
  const other = problems.filter((line) => !/^(kept since|set aside: |orphan: )/.test(line));
  const isKept = problems.some((line) => line.startsWith('kept since'));
  if (other.length > 0 || (problems.length > 0 && !isKept)) throw new Violation(`check finds: ${problems.join('; ')}`);
  if (isKept) await catalog.check({ repair: true });
}

/** Nothing that exists only for a while has stayed. */
function mustHaveNoLeftovers(machine: Machine): void {
  const names = [...(machine.find(['store'])?.entries.keys() ?? [])];
  const recent = [...(machine.find(['store', 'recent'])?.entries.keys() ?? [])];
  const left = [...names.filter((name) => /^(scratch|opening|new)/.test(name)), ...recent];
  if (left.length > 0) throw new Violation(`after an orderly close there are still ${left.join(', ')}`);
}

/** No file of the store but LMDB's has any space. */
function mustBeEmpty(machine: Machine): void {
  const full: string[] = [];
  const look = (ino: number, at: string): void => {
    const inode = machine.inodes.get(ino);
    for (const [name, child] of inode?.entries ?? []) {
      const file = machine.inodes.get(child);
      if (STAYS.has(name)) continue;
      if (file?.kind === 'directory') look(child, `${at}/${name}`);
      else if (!isDatabase(name)) full.push(`${at}/${name}`);
    }
  };
  look(machine.find(['store'])?.ino ?? ROOT_INO, 'store');
  if (full.length > 0) throw new Violation(`everything was deleted, and there are still ${full.join(', ')}`);
}
