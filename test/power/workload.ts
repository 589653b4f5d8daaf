/**
 * A workload: random operations on a store, decided by a seed alone, recorded on a machine (machine.ts), with the model of what
 * they mean (model.ts). Owns the choice of operations and how long they go on; operations.ts carries each of them out.
 */
import fs from 'node:fs';
import path from 'node:path';
import { LocalStore } from '../../src/store/local/local-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { crashFiles, type Files, type Recording } from './crash-state.js';
import { findAll } from './findings.js';
import { MachineDisk } from './machine-disk.js';
import { Machine, type MachineOptions } from './machine.js';
import { Model } from './model.js';
import { Operations } from './operations.js';
import { Random } from './random.js';
import { withStillClock, type StillClock } from './still-clock.js';

/** Operations of one workload. */
const MIN_STEPS = 12;
const MAX_STEPS = 30;
/** Beside a workload with backups, which are slow. */
const BACKUPS = 0.15;
/** So often the workload goes on after a power loss, and only what happens then is in the recording. */
const POWER_LOST = 0.4;
/** Turns of other calls that a kill lets pass after the operations in flight have begun. */
const MAX_TURNS_BEFORE_KILL = 12;
const MAX_TURNS_OF_BACKUP = 150;
/** Merges happen when the workload says so. */
const NEVER_MS = 2 ** 30;

const STEPS = {
  ...{ write: 14, fua: 3, burst: 5, zero: 3, trim: 4, flush: 6, both: 6 },
  ...{ snapshot: 6, snapshotUnderWrites: 3, now: 2, deleteSnapshot: 5, deleteDisk: 1, clone: 3, rollback: 2 },
  ...{ resize: 2, fill: 1, reopen: 3, kill: 3, pass: 2, merge: 4, mergeUnderWrites: 3, mergeUp: 4, trimObject: 3 },
} as const;

export interface Workload extends Recording {
  readonly label: string;
  readonly model: Model;
  readonly machine: Machine;
  /** The recording begins after this moment. */
  readonly start: number;
  /** After its last operation the store was closed. */
  readonly end: number;
  /** One line for each operation. */
  readonly story: readonly string[];
}

export interface WorkloadOptions {
  readonly seed: string;
  readonly number: number;
  /** A directory in memory; each workload makes and removes one in it. */
  readonly place: string;
  readonly liesAbout?: MachineOptions['liesAbout'];
  /** Operations before a backup of the disk is taken; undefined to let the seed decide. */
  readonly takesBackups?: boolean;
}

export async function record({ seed, number, place, liesAbout, takesBackups }: WorkloadOptions): Promise<Workload> {
  const label = `${seed}/${number}`;
  const random = new Random(label);
  const root = path.join(place, 'run');
  fs.mkdirSync(root);
  const machine = new Machine({
    root,
    ...{ bootId: 'boot-1', mounting: 'mounted once' },
    random: new Random(`${label}/turns`),
    canPunchHole: random.chance(0.85),
    canZeroRange: random.chance(0.7),
    canClone: random.chance(0.2),
    ...(liesAbout ? { liesAbout } : {}),
  });
  const run = new Run(machine, random, takesBackups ?? random.chance(BACKUPS));
  try {
    await withStillClock((clock) => run.all(clock));
  } catch (error) {
    (error as Error).message = `workload ${label}: ${(error as Error).message}\n  ${run.story.join('\n  ')}`;
    throw error;
  } finally {
    fs.rmSync(root, { recursive: true, force: true });
  }
  const { model, story } = run;
  return {
    label,
    machine: run.machine,
    model,
    ...run.recording,
    start: run.start,
    end: run.machine.journal.now,
    story,
  };
}

class Run {
  readonly model = new Model();
  readonly story: string[] = [];
  /** The files when the recording began. */
  #before: Files;
  #machine: Machine;
  readonly #random: Random;
  readonly #takesBackups: boolean;
  #disk: MachineDisk;
  #store!: LocalStore;
  #operations!: Operations;
  /** Numbers in names and data, so that each is new. */
  readonly #counter = { next: 1 };

  constructor(machine: Machine, random: Random, takesBackups: boolean) {
    this.#machine = machine;
    this.#before = machine.snapshot();
    this.#random = random;
    this.#takesBackups = takesBackups;
    this.#disk = new MachineDisk(machine);
  }

  async all(clock: StillClock): Promise<void> {
    await this.#open();
    await this.#operations.create();
    if (this.#random.chance(0.6)) await this.#operations.create();
    await this.#steps(clock);
    if (!this.#random.chance(POWER_LOST)) return;
    await this.#losePower();
    await this.#steps(clock);
  }

  get machine(): Machine {
    return this.#machine;
  }

  /** Since the last power loss, if there was one. */
  get recording(): Recording {
    return { before: this.#before, inodes: this.#machine.inodes, journal: this.#machine.journal };
  }

  async #steps(clock: StillClock): Promise<void> {
    for (let left = this.#random.between(MIN_STEPS, MAX_STEPS); left > 0; left--) await this.#step(clock);
    await this.#close();
  }

  /** At some moment of what was recorded; the workload goes on with what is left, on a machine of its own. */
  async #losePower(): Promise<void> {
    const random = this.#random;
    const { journal, options } = this.#machine;
    const at = random.between(1, journal.now);
    const loss = random.pick(['strict', 'ext4'] as const);
    const files = crashFiles(this.recording, at, loss, random);
    fs.rmSync(options.root, { recursive: true });
    fs.mkdirSync(options.root);
    this.start = journal.mark();
    this.#machine = new Machine({ ...options, bootId: 'boot-2' }, files, this.start);
    this.#before = this.#machine.snapshot();
    this.#disk = new MachineDisk(this.#machine);
    this.#tell(`power was lost at ${at} (${loss})`);
    this.model.forgetBackupsAfter(at);
    await this.#open();
    this.#settle(await findAll(this.#operations.catalog, this.model, at, loss), this.start, true);
  }

  start = 0;

  async #open(): Promise<void> {
    const location = path.join(this.#machine.root, 'store');
    this.#store = await LocalStore.open(location, {
      disk: this.#disk,
      log: (line) => this.#log(line),
      mergeDelayMs: NEVER_MS,
    });
    const catalog = new VdiCatalog(this.#store);
    const { model } = this;
    this.#operations = new Operations({
      ...{ machine: this.#machine, disk: this.#disk, catalog, model, random: this.#random, counter: this.#counter },
      merge: async () => this.#store.merger.settled(),
      tell: (line) => this.#tell(line),
    });
  }

  async #close(): Promise<void> {
    this.#tell('close');
    const closed = this.#operations.closing();
    await this.#operations.catalog.close();
    closed();
  }

  #log(line: string): void {
    this.#tell(`(log) ${line}`);
  }

  #tell(line: string): void {
    this.story.push(`${this.#machine.journal.now}: ${line}`);
  }

  async #step(clock: StillClock): Promise<void> {
    if (this.#takesBackups && this.#random.chance(0.1)) return this.#operations.backup();
    const step = this.#random.weighted(STEPS);
    switch (step) {
      case 'reopen':
        await this.#close();
        return this.#open();
      case 'kill':
        return this.#kill();
      case 'pass':
        this.#tell('time passes');
        clock.pass();
        return;
      default:
        return this.#operations.run(step);
    }
  }

  async #kill(): Promise<void> {
    const begun: Promise<void>[] = [];
    const backsUp = this.#takesBackups && this.#random.chance(0.6);
    if (backsUp) begun.push(this.#operations.backup());
    for (let left = backsUp ? 0 : this.#random.below(3); left > 0; left--) begun.push(this.#operations.runOne());
    for (const operation of begun) operation.catch(() => undefined);
    for (let left = this.#random.below(backsUp ? MAX_TURNS_OF_BACKUP : MAX_TURNS_BEFORE_KILL); left > 0; left--)
      await this.#machine.turns.later(this, () => undefined);
    const has = new Random(`kill ${this.#machine.journal.now} ${this.#random.below(2 ** 31)}`);
    this.#disk.kill(() => has.chance(0.5));
    this.#operations.isDead = true;
    this.#tell('killed');
    const old = this.#store;
    await Promise.allSettled(begun);
    await old.metadata.close({ clean: false }).catch(() => undefined);
    const at = this.#machine.journal.mark();
    this.#machine.replaceReal();
    this.#disk = new MachineDisk(this.#machine);
    await this.#open();
    const found = await findAll(this.#operations.catalog, this.model, at, 'death');
    this.#settle(found, at, false);
  }

  #settle(found: Awaited<ReturnType<typeof findAll>>, at: number, isDurable: boolean): void {
    for (const name of this.model.names()) {
      const is = found.get(name);
      this.model.settle(name, is?.thing, at);
      if (is?.bytes === undefined) continue;
      if (is.thing?.kind === 'disk') is.thing.disk.settle(is.bytes, at, isDurable);
      if (is.thing?.kind === 'snapshot') is.thing.bytes ??= is.bytes;
    }
  }
}
