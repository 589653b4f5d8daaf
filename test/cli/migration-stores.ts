/**
 * Shared by the tests of `migrate`: stores and clusters to migrate between, disks with a history, and the comparison of the
 * result. Owns nothing beyond what the harness cleans up.
 */
import path from 'node:path';
import { expect } from 'vitest';
import { LocalStore } from '../../src/store/local/local-store.js';
import type { ObjectStore } from '../../src/store/object-store.js';
import type { VdiRecord } from '../../src/store/vdi-record.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { cli, memoryDirectory } from '../harness/daemon.js';
import { expectBytes, MIB, oneLineOf, patterned } from './both-ways.js';

const SHIFT = 20;

export interface Step {
  readonly tag: string | null;
  readonly size: number;
  readonly copiedBytes: number;
  readonly zeroedBytes: number;
  readonly comparedBytes: number;
  readonly treeHash: string | null;
  readonly treeBlockBytes: number;
  readonly sha256: string | null;
}

export interface Result {
  readonly snapshots: readonly Step[];
  readonly working: Step | null;
  readonly isFinished: boolean;
}

/** The expected content of a place, by tag, or '' for the working VDI. */
export type Contents = Map<string, Buffer>;

export interface Place {
  /** For --from and --to. */
  readonly argument: string;
  open(): Promise<ObjectStore>;
}

export function localPlace(): Place {
  const directory = path.join(memoryDirectory(), 'store');
  return { argument: directory, open: () => LocalStore.open(directory) };
}

export async function withCatalog<T>(place: Place, work: (catalog: VdiCatalog) => Promise<T>): Promise<T> {
  const catalog = new VdiCatalog(await place.open());
  try {
    return await work(catalog);
  } finally {
    await catalog.close();
  }
}

export async function write(
  catalog: VdiCatalog,
  name: string,
  content: Buffer,
  at: number,
  data: Buffer,
): Promise<void> {
  data.copy(content, at);
  const vdi = await catalog.openVdi(name);
  await vdi.write(at, data, false);
  await catalog.release(vdi);
}

export async function trim(
  catalog: VdiCatalog,
  name: string,
  content: Buffer,
  at: number,
  length: number,
): Promise<void> {
  content.fill(0, at, at + length);
  const vdi = await catalog.openVdi(name);
  await vdi.trim(at, length, false);
  await catalog.release(vdi);
}

/** A disk with everything that a history can contain: changes, trims, growing, a rollback, shrinking. */
export async function makeHistory(place: Place, name: string): Promise<Contents> {
  return withCatalog(place, async (catalog) => {
    const contents: Contents = new Map();
    await catalog.create(name, 9 * MIB + 512, { blockSizeShift: SHIFT });
    let content = Buffer.alloc(9 * MIB + 512);
    await write(catalog, name, content, 0, patterned(5 * MIB, 1));
    await write(catalog, name, content, 9 * MIB, patterned(512, 2));
    const take = async (tag: string): Promise<void> => {
      await catalog.snapshot(name, tag);
      contents.set(tag, Buffer.from(content));
    };
    await take('first');
    await write(catalog, name, content, 2 * MIB + 4096, patterned(8192, 3));
    await trim(catalog, name, content, 3 * MIB, MIB);
    await take('second, with trims');
    await catalog.resize(name, 14 * MIB);
    content = Buffer.concat([content, Buffer.alloc(14 * MIB - content.length)]);
    await write(catalog, name, content, 12 * MIB + 100, patterned(MIB, 4));
    await take('grown');
    await catalog.rollback(`${name}@first`);
    content = Buffer.from(contents.get('first') as Buffer);
    await write(catalog, name, content, MIB, patterned(512, 5));
    await take('another way');
    await catalog.resize(name, 4 * MIB + 512, { force: true });
    content = content.subarray(0, 4 * MIB + 512);
    await take('cut');
    await write(catalog, name, content, 4 * MIB, patterned(512, 6));
    contents.set('', content);
    return contents;
  });
}

export async function recordsOf(catalog: VdiCatalog, name: string): Promise<VdiRecord[]> {
  return (await catalog.list()).filter((record) => record.name === name);
}

export async function checkContents(place: Place, name: string, contents: Contents): Promise<VdiRecord[]> {
  return withCatalog(place, async (catalog) => {
    const records = await recordsOf(catalog, name);
    expect(records.map(({ tag }) => tag)).toEqual([...contents.keys()]);
    for (const [tag, content] of contents) {
      const vdi = await catalog.openVdi(tag === '' ? name : `${name}@${tag}`);
      const found = Buffer.alloc(vdi.size);
      await vdi.read(0, found);
      await catalog.release(vdi);
      expectBytes(found, content);
    }
    return records;
  });
}

/** Migrate the VDI `vm`. */
export async function migrate(from: Place, to: Place, ...args: string[]): Promise<Result> {
  const result = await cli(['migrate', 'vm', '--from', from.argument, '--to', to.argument, '--json', ...args]);
  expect(result.code, result.stderr).toBe(0);
  return JSON.parse(result.stdout) as Result;
}

/** ... expecting a refusal, which is returned. */
export async function refused(from: Place, to: Place, ...args: string[]): Promise<string> {
  const all = ['migrate', 'vm', '--from', from.argument, '--to', to.argument, ...args];
  return oneLineOf(await cli(all), 1, all.join(' '));
}
