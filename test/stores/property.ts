/**
 * Random operations on a store and on the model (model.ts), then every byte of every VDI and snapshot compared, what counts as
 * changed, and that nothing is left when all is deleted. fast-check narrows a failure down to few operations.
 */
import fc from 'fast-check';
import { expect, test } from 'vitest';
import type { Vdi } from '../../src/vdi/vdi.js';
import { byLength } from '../harness/length.js';
import { Model, nameOf, tagOf } from './model.js';
import { changesOf, checkContent, type Session } from './session.js';
import type { Abilities, StoreKind } from './store-under-test.js';

const UNIT = 512;
const OBJECTS = 3;
/** Beside the first. */
const MAX_WORKING = 3;
const MAX_TEMPORARY = 3;
const TIMEOUT_MS = 60 * 60_000;

type Change = 'write' | 'zero' | 'zero-allocated' | 'trim';

type Op = { readonly on: number } & (
  | { kind: Change; at: number; length: number; fill: number; fua: boolean }
  | { kind: 'flush' | 'reopen' | 'crash' | 'detach' | 'settle' }
  | {
      kind: 'snapshot' | 'outside' | 'temporary' | 'clone' | 'rollback' | 'delete' | 'read';
      pick: number;
    }
  | { kind: 'resize'; units: number }
);

/** Operations that a store can do, by how often they come. */
function operations(abilities: Abilities, hasOutside: boolean, settles: boolean): fc.Arbitrary<Op> {
  const { objectSize } = abilities;
  const on = fc.nat(MAX_WORKING - 1);
  const range = fc.record({
    on,
    at: fc.double({ min: 0, max: 1, noNaN: true, maxExcluded: true }),
    length: fc.oneof(
      { weight: 4, arbitrary: fc.integer({ min: 1, max: 9000 }) },
      { weight: 2, arbitrary: fc.constantFrom(512, 4096, 65536, 131072) },
      { weight: 2, arbitrary: fc.integer({ min: 100_000, max: 2 * objectSize }) },
      { weight: 1, arbitrary: fc.constant(WHOLE_OBJECT) },
    ),
    fill: fc.integer({ min: 1, max: 255 }),
    fua: fc.boolean(),
  });
  const change = (kind: Change): fc.Arbitrary<Op> => range.map((values) => ({ kind, ...values }));
  const { canSnapshot, canSnapshotTemporarily, canClone, canResize, keepsState } = abilities;
  const picked = [
    'read',
    'delete',
    ...(canSnapshot ? ['snapshot', 'snapshot'] : []),
    ...(hasOutside ? ['outside'] : []),
    ...(canSnapshotTemporarily ? ['temporary'] : []),
    ...(canClone ? ['clone', 'rollback'] : []),
  ] as ('read' | 'delete' | 'snapshot' | 'outside' | 'temporary' | 'clone' | 'rollback')[];
  const endings = [
    ...['flush', 'detach'],
    ...(keepsState ? ['reopen', 'crash'] : []),
    ...(settles ? ['settle', 'settle'] : []),
  ] as ('flush' | 'detach' | 'reopen' | 'crash' | 'settle')[];
  return fc.oneof(
    { weight: 12, arbitrary: change('write') },
    { weight: 3, arbitrary: change('zero') },
    { weight: 2, arbitrary: change('zero-allocated') },
    { weight: 3, arbitrary: change('trim') },
    { weight: 2, arbitrary: fc.record({ on, kind: fc.constantFrom(...endings) }) },
    { weight: 8, arbitrary: fc.record({ on, kind: fc.constantFrom(...picked), pick: fc.nat(1000) }) },
    {
      weight: canResize ? 1 : 0,
      arbitrary: fc.integer({ min: 1, max: (OBJECTS * objectSize) / UNIT }).map((units): Op => ({
        on: 0,
        kind: 'resize',
        units,
      })),
    },
  );
}

const WHOLE_OBJECT = -1;

export function property(session: Session, sequences: StoreKind['sequences']): void {
  const runs = byLength(sequences);
  const { abilities } = session;

  test(
    `${runs} random sequences leave every VDI and snapshot equal to the model`,
    async () => {
      const hasOutside = abilities.canSnapshot && session.store.snapshotFromOutside !== undefined;
      const op = operations(abilities, hasOutside, session.store.settle !== undefined);
      await fc.assert(
        fc.asyncProperty(fc.array(op, { minLength: 5, maxLength: 40 }), async (ops) => {
          await session.removeAll(); // so that a failure can be narrowed down
          const run = new Run(session);
          await run.start();
          for (const step of ops) await run.apply(step);
          await run.finish();
        }),
        { numRuns: runs },
      );
    },
    TIMEOUT_MS,
  );
}

class Run {
  readonly #session: Session;
  readonly #model: Model;
  readonly #open = new Map<string, Vdi>();
  /** Names are new in every sequence: a cluster does not give the place of a name to another VDI again at once. */
  readonly #first: string;
  #counter = 0;

  constructor(session: Session) {
    this.#session = session;
    this.#model = new Model(session.objectSize);
    this.#first = session.newName();
  }

  async start(): Promise<void> {
    const size = (OBJECTS - 1) * this.#session.objectSize + 3 * UNIT;
    await this.#session.create(this.#first, size);
    this.#model.add(this.#first, Buffer.alloc(size));
    this.#model.working.push(this.#first);
  }

  async apply(step: Op): Promise<void> {
    const model = this.#model;
    const { catalog } = this.#session;
    const current = pickOf(model.working, step.on) ?? this.#first;
    switch (step.kind) {
      case 'write':
      case 'zero':
      case 'zero-allocated':
      case 'trim':
        await this.#change(current, step);
        break;
      case 'flush':
        await (await this.#device(current)).flush();
        break;
      case 'detach':
        await this.#detach();
        break;
      case 'settle':
        await this.#session.store.settle?.();
        break;
      case 'reopen':
        this.#forgetOpen();
        await this.#session.reopen();
        break;
      case 'crash':
        // What was not flushed may be there or not: the model knows only what must be.
        for (const name of model.working) await (await this.#device(name)).flush();
        this.#forgetOpen();
        await this.#session.crash();
        break;
      case 'snapshot':
      case 'outside': {
        const tag = `t${this.#counter++}`;
        if (step.kind === 'snapshot') await catalog.snapshot(current, tag);
        else await this.#session.store.snapshotFromOutside?.(current, tag);
        model.copy(`${current}@${tag}`, current);
        break;
      }
      case 'temporary': {
        if (model.temporary.length >= MAX_TEMPORARY) break;
        const tag = `now:${this.#counter++}`;
        await catalog.snapshotTemporary(current, tag);
        model.copy(`${current}@${tag}`, current);
        break;
      }
      case 'clone': {
        const from = pickOf(model.snapshots, step.pick);
        if (from === undefined || model.working.length >= MAX_WORKING) break;
        const name = `${this.#first}-c${this.#counter++}`;
        await catalog.clone(from, name);
        model.copy(name, from);
        model.working.push(name);
        break;
      }
      case 'rollback': {
        const from = pickOf(
          model.snapshots.filter((spec) => model.working.includes(nameOf(spec))),
          step.pick,
        );
        if (from === undefined) break;
        await this.#detach(nameOf(from));
        await catalog.rollback(from);
        model.copy(nameOf(from), from);
        break;
      }
      case 'delete': {
        const spec = pickOf(
          model.names.filter((other) => other !== this.#first),
          step.pick,
        );
        if (spec !== undefined) await this.#remove(spec);
        break;
      }
      case 'read': {
        const spec = pickOf(model.names, step.pick) ?? this.#first;
        await this.#compare(spec);
        break;
      }
      case 'resize': {
        const size = step.units * UNIT;
        if (size < model.contentOf(current).length) await this.#detach(current);
        await catalog.resize(current, size, { force: true });
        model.resize(current, size);
        break;
      }
    }
  }

  async #change(name: string, step: Extract<Op, { kind: Change }>): Promise<void> {
    const { objectSize } = this.#session;
    const { length: size } = this.#model.contentOf(name);
    const isWhole = step.length === WHOLE_OBJECT;
    const somewhere = Math.floor(step.at * size);
    const at = isWhole ? somewhere - (somewhere % objectSize) : somewhere;
    const length = Math.min(isWhole ? objectSize : step.length, size - at);
    const vdi = await this.#device(name);
    const { fua } = step;
    if (step.kind === 'write') {
      const data = Buffer.alloc(length, step.fill);
      data.writeUInt8(step.fill ^ 0x55, length - 1);
      this.#model.write(name, at, data);
      await vdi.write(at, data, fua);
      return;
    }
    const { copies } = vdi;
    const isChange = this.#model.zero(name, at, length);
    const noHole = step.kind === 'zero-allocated';
    if (noHole) this.#model.touch(name, at, length);
    if (step.kind === 'trim') await vdi.trim(at, length, fua);
    else await vdi.zero(at, length, { noHole, fua });
    if (!isChange && !noHole) expect(vdi.copies, 'copies for zeros').toBe(copies);
  }

  async #device(spec: string): Promise<Vdi> {
    const open = this.#open.get(spec);
    if (open) return open;
    const vdi = await this.#session.openVdi(spec);
    this.#open.set(spec, vdi);
    return vdi;
  }

  async #detach(only?: string): Promise<void> {
    for (const [spec, vdi] of this.#open) {
      if (only !== undefined && spec !== only) continue;
      this.#open.delete(spec);
      await this.#session.release(vdi);
    }
  }

  /** The store is closed with all that is open; temporary snapshots do not outlive that. */
  #forgetOpen(): void {
    this.#open.clear();
    for (const spec of this.#model.temporary) this.#model.delete(spec);
  }

  async #remove(spec: string): Promise<void> {
    await this.#detach(spec);
    const { catalog } = this.#session;
    if (this.#model.temporary.includes(spec)) await catalog.dropTemporary(nameOf(spec), tagOf(spec));
    else await catalog.remove(spec);
    this.#model.delete(spec);
  }

  async #compare(spec: string): Promise<void> {
    await checkContent(await this.#device(spec), this.#model.contentOf(spec), spec);
    if (spec.includes('@') && this.#session.abilities.tellsChanges) await this.#compareChanges(spec);
  }

  /** What counts as changed between a snapshot and its working VDI: all that differs, and nothing but what was touched. */
  async #compareChanges(base: string): Promise<void> {
    const name = nameOf(base);
    const model = this.#model;
    const { objectSize } = this.#session;
    if (!model.working.includes(name)) return;
    const [now, before] = [await this.#device(name), await this.#device(base)];
    const content = model.contentOf(name);
    const old = Buffer.alloc(content.length);
    model.contentOf(base).copy(old);
    const [versions, oldVersions] = [model.versions.get(name) ?? [], model.versions.get(base) ?? []];
    for (const { at, length, flag: isChanged } of await changesOf(now, before, 0, content.length)) {
      if (!isChanged && !content.subarray(at, at + length).equals(old.subarray(at, at + length))) {
        throw new Error(`${name} differs from ${base} in ${length} bytes at ${at}, which count as unchanged`);
      }
      for (let idx = Math.floor(at / objectSize); isChanged && idx * objectSize < at + length; idx++) {
        if (versions[idx] === oldVersions[idx])
          throw new Error(`object ${idx} of ${name} counts as changed since ${base}`);
      }
    }
  }

  /** All is compared, then all is deleted, and nothing may be left. */
  async finish(): Promise<void> {
    const { catalog } = this.#session;
    for (const spec of this.#model.names) await this.#compare(spec);
    expect((await this.#session.names()).sort()).toEqual(this.#model.names.sort());
    for (const spec of this.#model.temporary) await this.#remove(spec);
    await this.#detach();
    expect((await catalog.check({ repair: false })).problems).toEqual([]);
    for (const spec of this.#model.names) await this.#session.checkSpec(spec, this.#model.contentOf(spec));
    await this.#session.removeAll();
    await this.#session.checkNothingLeft();
  }
}

function pickOf<T>(from: readonly T[], pick: number): T | undefined {
  return from[pick % from.length];
}
