/**
 * Reads an LMDB file by its pages, without LMDB: LMDB trusts its file, and a damaged page would end the process. Finds damage in
 * meta.mdb before LMDB opens it, and reads it for copies and for `store rescue`. Owns the layout of LMDB's pages: mdb.c of the
 * LMDB that the package `lmdb` carries (MDB_page, MDB_node, MDB_meta, MDB_db; data version 2). Changes nothing.
 */
import type { HostDisk } from '../../system/disk.js';

const PAGE_HEADER = 24;
const FLAGS_AT = 18;
const LOWER_AT = 20;
const UPPER_AT = 22;
const MAGIC = 0xbeefc0de;
const MAGIC_AT = PAGE_HEADER;
const DATABASE_BYTES = 48;
const DEPTH_AT = 6;
const ENTRIES_AT = 32;
const ROOT_AT = 40;
/** The first of the two databases of a meta page is the list of free pages, the second holds all others. */
const FREE_AT = PAGE_HEADER + 24;
const MAIN_AT = FREE_AT + DATABASE_BYTES;
const LAST_PAGE_AT = MAIN_AT + DATABASE_BYTES;
const TRANSACTION_AT = LAST_PAGE_AT + 8;
const META_BYTES = TRANSACTION_AT + 8;
const MIN_PAGE_SIZE = 512;
const MAX_PAGE_SIZE = 65_536;

const P_BRANCH = 0x01;
const P_LEAF = 0x02;
const P_OVERFLOW = 0x04;
const F_BIGDATA = 0x01;
const F_SUBDATA = 0x02;
const NODE_HEADER = 8;
const OVERFLOW_BYTES = 24;
const NO_PAGE = 0xffffffffffffffffn;
/** LMDB's CURSOR_STACK: no tree is deeper. */
const MAX_DEPTH = 32;

/** A B-tree of the file. */
export interface LmdbTree {
  /** Undefined if it is empty. */
  readonly root: number | undefined;
  readonly depth: number;
  readonly entries: number;
}

/** What one meta page says: the state after one transaction. */
export interface LmdbState {
  readonly pageSize: number;
  /** Pages that the state needs; the file may have more. */
  readonly pages: number;
  readonly transaction: number;
  readonly free: LmdbTree;
  readonly main: LmdbTree;
}

export interface LmdbMeta {
  /** Newest first; not more than two. */
  readonly states: readonly LmdbState[];
  /** What is wrong with the meta pages, if anything. */
  readonly problem: string | undefined;
}

/** An entry of a database. `value` is a part of a page: valid until the next entry is asked for. */
export interface LmdbEntry {
  readonly key: Buffer;
  readonly value: Buffer;
  /** Of the main tree: the entry is a database with the name `key`. */
  readonly database: LmdbTree | undefined;
}

/** The pages of a file: `get` returns `count` pages from page `page` on, or fewer bytes at the end of the file. */
export interface LmdbPages {
  readonly pageSize: number;
  get(page: number, count: number): Buffer | Promise<Buffer>;
}

/** The two meta pages of the file open as `fd`. Errors: those of read(2). */
export function readMeta(disk: HostDisk, fd: number): LmdbMeta {
  const first = metaAt(disk, fd, 0);
  // The size of a page is in the first one; without it, that of every file of ours is tried.
  const second = metaAt(disk, fd, first?.pageSize ?? 4096);
  const states = [first, second].filter((state) => state !== undefined);
  if (!first && !second) return { states, problem: 'it is not an LMDB file' };
  if (!first) return { states, problem: 'its first meta page is damaged' };
  if (second?.pageSize !== first.pageSize) return { states: [first], problem: 'its second meta page is damaged' };
  return { states: states.sort((a, b) => b.transaction - a.transaction), problem: undefined };
}

function metaAt(disk: HostDisk, fd: number, offset: number): LmdbState | undefined {
  const page = Buffer.alloc(META_BYTES);
  if (disk.readSync(fd, page, offset) < META_BYTES) return undefined;
  if (page.readUInt32LE(MAGIC_AT) !== MAGIC) return undefined;
  const pageSize = page.readUInt32LE(FREE_AT);
  const isPowerOfTwo = (pageSize & (pageSize - 1)) === 0;
  if (!isPowerOfTwo || pageSize < MIN_PAGE_SIZE || pageSize > MAX_PAGE_SIZE) return undefined;
  return {
    pageSize,
    pages: number64(page, LAST_PAGE_AT) + 1,
    transaction: number64(page, TRANSACTION_AT),
    free: treeAt(page, FREE_AT),
    main: treeAt(page, MAIN_AT),
  };
}

function number64(bytes: Buffer, at: number): number {
  return bytes.readUInt32LE(at) + bytes.readUInt32LE(at + 4) * 2 ** 32;
}

function treeAt(bytes: Buffer, at: number): LmdbTree {
  const isEmpty = bytes.readBigUInt64LE(at + ROOT_AT) === NO_PAGE;
  return {
    root: isEmpty ? undefined : number64(bytes, at + ROOT_AT),
    depth: bytes.readUInt16LE(at + DEPTH_AT),
    entries: number64(bytes, at + ENTRIES_AT),
  };
}

/** Pages of the file open as `fd`, read where the caller waits for them: from the page cache as a rule. */
export function pagesOfFile(disk: HostDisk, fd: number, pageSize: number): LmdbPages {
  let buffer = Buffer.alloc(2 * pageSize);
  return {
    pageSize,
    get: (page, count) => {
      if (buffer.length < count * pageSize) buffer = Buffer.alloc(count * pageSize);
      const into = buffer.subarray(0, count * pageSize);
      let done = 0;
      for (let got = -1; got !== 0 && done < into.length; done += got)
        got = disk.readSync(fd, into.subarray(done), page * pageSize + done);
      return into.subarray(0, done);
    },
  };
}

/**
 * The entries of `tree` in their order. `damaged` is called for each damaged part, which is then left out. Errors: those of
 * `pages`.
 */
export async function* entriesOf(
  pages: LmdbPages,
  state: LmdbState,
  tree: LmdbTree,
  damaged: (problem: string) => void,
): AsyncGenerator<LmdbEntry> {
  if (tree.root === undefined) return;
  if (tree.depth === 0 || tree.depth > MAX_DEPTH) return void damaged(`a tree of depth ${tree.depth}`);
  let entries = 0;
  let left = state.pages;
  const damages: string[] = [];
  const report = (problem: string): void => {
    damages.push(problem);
    damaged(problem);
  };
  /** From the root down: a branch page, and its next child. */
  const stack: { readonly children: readonly number[]; next: number }[] = [{ children: [tree.root], next: 0 }];
  for (let top = stack.at(-1); top; top = stack.at(-1)) {
    const page = top.children[top.next++];
    if (page === undefined) {
      stack.pop();
      continue;
    }
    if (--left < 0) return void report('its pages refer to each other in a circle');
    const isLeaf = stack.length === tree.depth;
    const found = pages.get(page, 1);
    const bytes = found instanceof Promise ? await found : found;
    const problem = pageProblem(bytes, page, state, isLeaf ? P_LEAF : P_BRANCH);
    if (problem !== undefined) {
      report(problem);
      continue;
    }
    if (!isLeaf) {
      stack.push({ children: childrenOf(bytes), next: 0 });
      continue;
    }
    // A copy: the pages of large values are read into the same memory.
    const leaf = Buffer.from(bytes);
    const count = leaf.readUInt16LE(LOWER_AT) >>> 1;
    for (let n = 0; n < count; n++) {
      const entry = entryAt(leaf, leaf.readUInt16LE(PAGE_HEADER + 2 * n) + PAGE_HEADER);
      if (entry === undefined) {
        report(`page ${page} has an entry that is not within it`);
        continue;
      }
      entries++;
      if (entry.overflow === undefined) {
        yield entry;
        continue;
      }
      const { first, length } = entry.overflow;
      const needed = Math.ceil((PAGE_HEADER + length) / state.pageSize);
      if (first + needed > state.pages) {
        report(`page ${page} refers to a page behind the end`);
        continue;
      }
      const large = pages.get(first, needed);
      const value = large instanceof Promise ? await large : large;
      const why = overflowProblem(value, first, needed, state.pageSize);
      if (why === undefined) yield { ...entry, value: value.subarray(PAGE_HEADER, PAGE_HEADER + length) };
      else report(why);
    }
  }
  if (damages.length === 0 && entries !== tree.entries)
    damaged(`a tree has ${entries} entries and should have ${tree.entries}`);
}

function pageProblem(bytes: Buffer, page: number, state: LmdbState, kind: number): string | undefined {
  if (page >= state.pages || bytes.length < state.pageSize) return `page ${page} is behind the end`;
  if (number64(bytes, 0) !== page || (bytes.readUInt16LE(FLAGS_AT) & (P_BRANCH | P_LEAF | P_OVERFLOW)) !== kind)
    return `page ${page} is damaged`;
  const lower = bytes.readUInt16LE(LOWER_AT);
  const upper = bytes.readUInt16LE(UPPER_AT);
  if (lower > upper || upper + PAGE_HEADER > state.pageSize || lower === 0) return `page ${page} is damaged`;
  return undefined;
}

function overflowProblem(bytes: Buffer, page: number, pages: number, pageSize: number): string | undefined {
  const isWhole = bytes.length === pages * pageSize && number64(bytes, 0) === page;
  if (isWhole && bytes.readUInt16LE(FLAGS_AT) === P_OVERFLOW && bytes.readUInt32LE(LOWER_AT) === pages)
    return undefined;
  return `page ${page} is damaged`;
}

/** A page number of a branch that is not a number of a page is found when that page is read. */
function childrenOf(bytes: Buffer): number[] {
  const count = bytes.readUInt16LE(LOWER_AT) >>> 1;
  const children: number[] = [];
  for (let n = 0; n < count; n++) {
    const at = bytes.readUInt16LE(PAGE_HEADER + 2 * n) + PAGE_HEADER;
    if (at + NODE_HEADER > bytes.length) children.push(Number.MAX_SAFE_INTEGER);
    else children.push(bytes.readUInt32LE(at) + bytes.readUInt16LE(at + 4) * 2 ** 32);
  }
  return children;
}

interface FoundEntry extends LmdbEntry {
  /** The value is in pages of its own. */
  readonly overflow: { readonly first: number; readonly length: number } | undefined;
}

function entryAt(leaf: Buffer, at: number): FoundEntry | undefined {
  if (at + NODE_HEADER > leaf.length) return undefined;
  const length = leaf.readUInt32LE(at);
  const flags = leaf.readUInt16LE(at + 4);
  const valueAt = at + NODE_HEADER + leaf.readUInt16LE(at + 6);
  const isLarge = (flags & F_BIGDATA) !== 0;
  const isDatabase = (flags & F_SUBDATA) !== 0;
  const stored = isLarge ? OVERFLOW_BYTES : length;
  if (valueAt + stored > leaf.length || (isDatabase && length !== DATABASE_BYTES)) return undefined;
  return {
    key: leaf.subarray(at + NODE_HEADER, valueAt),
    value: leaf.subarray(valueAt, valueAt + stored),
    database: isDatabase ? treeAt(leaf, valueAt) : undefined,
    overflow: isLarge ? { first: number64(leaf, valueAt), length } : undefined,
  };
}

/** One database of the file; the name '' is the main one, which holds the others' names. */
export interface FoundDatabase {
  readonly name: string;
  readonly entries: () => AsyncGenerator<LmdbEntry>;
}

/**
 * All databases of a state: the main one without the names of the others, then these. The entries of each must be read before
 * the next is asked for. Damaged parts are reported and left out.
 */
export function* databasesOf(
  pages: LmdbPages,
  state: LmdbState,
  damaged: (problem: string) => void,
): Generator<FoundDatabase> {
  const named: { readonly name: string; readonly tree: LmdbTree }[] = [];
  yield {
    name: '',
    entries: async function* () {
      for await (const entry of entriesOf(pages, state, state.main, damaged)) {
        if (entry.database === undefined) yield entry;
        // lmdb-js ends the names of databases with a zero byte in some versions.
        else named.push({ name: entry.key.toString().replace(/\0$/, ''), tree: entry.database });
      }
    },
  };
  for (const { name, tree } of named) yield { name, entries: () => entriesOf(pages, state, tree, damaged) };
}

/** The first damage that reading every page of the state finds, the list of free pages included; undefined if there is none. */
export async function structureProblem(pages: LmdbPages, state: LmdbState): Promise<string | undefined> {
  let problem: string | undefined;
  const damaged = (found: string): void => void (problem ??= found);
  const trees = function* (): Generator<AsyncGenerator<LmdbEntry>> {
    yield entriesOf(pages, state, state.free, damaged);
    for (const { entries } of databasesOf(pages, state, damaged)) yield entries();
  };
  for (const tree of trees()) await readAll(tree, () => problem === undefined);
  return problem;
}

/** Read what is left of `entries`, for the damage that is found on the way; not further if `goesOn` says so. */
export async function readAll(entries: AsyncGenerator, goesOn: () => boolean = () => true): Promise<void> {
  while (goesOn() && !(await entries.next()).done);
}
