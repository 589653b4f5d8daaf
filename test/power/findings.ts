/**
 * What a store shows, compared with what the model allows: names, contents, snapshots. Owns the messages. Changes nothing in the
 * store.
 */
import type { VdiRecord } from '../../src/store/vdi-record.js';
import type { VdiCatalog } from '../../src/vdi/catalog.js';
import { describeBlock } from './blocks.js';
import type { Loss } from './crash-state.js';
import type { Model, Thing, WrongBlock } from './model.js';

/** The store has broken a promise. */
export class Violation extends Error {
  override name = 'Violation';
}

export interface Found {
  readonly record: VdiRecord;
  /** Undefined if it is unfinished. */
  readonly bytes: Buffer | undefined;
  /** Undefined for the snapshots of backups. */
  readonly thing: Thing | undefined;
}

/** Buffers for contents: to allocate megabytes for each state would cost more than all the rest. */
export interface Buffers {
  next(): Buffer | undefined;
}

/** Snapshots that the backup job makes and removes by itself. */
const OF_BACKUPS = /^backup-/;

/** All VDIs and snapshots, by spec; with `only` those of these specs. Errors: Violation. */
export async function findAll(
  catalog: VdiCatalog,
  model: Model,
  at: number,
  loss: Loss,
  buffers: Buffers = { next: () => undefined },
  only?: ReadonlySet<string>,
): Promise<ReadonlyMap<string, Found>> {
  const found = new Map<string, Found>();
  for (const record of await catalog.list()) {
    const spec = record.isSnapshot ? `${record.name}@${record.tag}` : record.name;
    if (only?.has(spec) === false) continue;
    if (found.has(spec)) throw new Violation(`there are two of ${spec}`);
    const bytes = record.unfinished === undefined ? await contentOf(catalog, spec, buffers.next()) : undefined;
    found.set(spec, { record, bytes, thing: undefined });
  }
  const names = only ?? new Set([...model.names(), ...found.keys()]);
  for (const spec of names) {
    const is = found.get(spec);
    if (OF_BACKUPS.test(is?.record.tag ?? '')) continue;
    const legal = model.legalThings(spec, at);
    const problems: string[] = [];
    let isLegal = false;
    for (const thing of legal) {
      const problem = mismatch(thing, is, at, loss);
      if (problem === undefined) {
        isLegal = true;
        if (is) found.set(spec, { ...is, thing });
        break;
      }
      problems.push(problem);
    }
    if (isLegal || (legal.length === 0 && !is)) continue;
    throw new Violation(`${spec}: ${problems.join('; or ') || 'it should not exist'}`);
  }
  return found;
}

/** `into`: a buffer to use, if it is long enough. */
export async function contentOf(catalog: VdiCatalog, spec: string, into?: Buffer): Promise<Buffer> {
  const vdi = await catalog.openVdi(spec);
  try {
    const bytes = into && into.length >= vdi.size ? into.subarray(0, vdi.size) : Buffer.allocUnsafeSlow(vdi.size);
    await vdi.read(0, bytes);
    return bytes;
  } catch (error) {
    throw new Violation(`${spec} cannot be read: ${(error as Error).message}`, { cause: error });
  } finally {
    await catalog.release(vdi);
  }
}

/** Why it cannot be `thing`; undefined if it can. */
function mismatch(thing: Thing | undefined, found: Found | undefined, at: number, loss: Loss): string | undefined {
  if (thing === undefined) return found === undefined ? undefined : 'it is there, and was deleted, or never made';
  if (found === undefined) return `it is missing (${thing.kind})`;
  const { record, bytes } = found;
  if (thing.kind === 'filling')
    return record.unfinished?.run === thing.run ? undefined : 'it should be marked as unfinished';
  if (bytes === undefined) return 'it is unfinished, and was finished';
  if (thing.kind === 'disk') {
    const sizes = thing.disk.sizesAt(at);
    if (!sizes.includes(bytes.length)) return `it has ${bytes.length} bytes, and can have ${sizes.join(' or ')}`;
    return describeWrong(thing.disk.wrongBlock(bytes, at, loss));
  }
  if (thing.bytes === undefined) return describeWrong(thing.of.wrongInSnapshot(bytes, thing.begun, at));
  if (thing.bytes.equals(bytes)) return undefined;
  if (thing.bytes.length !== bytes.length) return `it has ${bytes.length} bytes, not ${thing.bytes.length}`;
  return describeWrong(firstDifference(bytes, thing.bytes));
}

const BLOCK = 512;

export function firstDifference(found: Buffer, expected: Buffer): WrongBlock | undefined {
  if (found.equals(expected)) return undefined;
  for (let offset = 0; offset < Math.max(found.length, expected.length); offset += BLOCK) {
    const is = found.subarray(offset, offset + BLOCK);
    const shall = expected.subarray(offset, offset + BLOCK);
    if (!is.equals(shall)) return { offset, is, legal: [shall] };
  }
  return undefined;
}

export function describeWrong(wrong: WrongBlock | undefined): string | undefined {
  if (wrong === undefined) return undefined;
  const legal = wrong.legal.map(describeBlock).join(' or ');
  return `the block at ${wrong.offset} is ${describeBlock(wrong.is)}, and may be ${legal}`;
}
