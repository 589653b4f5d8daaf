/**
 * What this machine remembers of the clients of a cluster, in a directory of this host: a cluster has no room for it. One small
 * file per fact, replaced by rename, so that several processes may write at a time and a crash leaves the old fact or the new
 * one. Damaged files are skipped. While this process runs as a user who may not use the directory, it answers from memory, and
 * commits wait.
 */
import { createHash } from 'node:crypto';
import fs from 'node:fs';
import path from 'node:path';
import { nodeFiles } from '../../system/node-files.js';
import { syncDirectory } from '../../system/durable-names.js';
import { makeDirectory } from '../../system/make-directory.js';
import type { StoreState } from '../object-store.js';
import { StoreError } from '../store-error.js';
import { reasonBeside } from '../../system/system-error.js';

const SUFFIX = '.json';
/** Larger than any fact; larger files are not read. */
const MAX_FACT_BYTES = 64 * 1024;

export class HostState implements StoreState {
  readonly isShared = true;
  readonly #directory: string;
  readonly #isOutOfReach: () => boolean;
  /** Facts as of the last read, and commits that wait; undefined deletes. */
  #known = new Map<string, unknown>();
  #waiting = new Map<string, unknown>();

  private constructor(directory: string, isOutOfReach: () => boolean) {
    this.#directory = directory;
    this.#isOutOfReach = isOutOfReach;
    this.entries();
  }

  /** Below `root`, for the cluster of this identity. Errors: StoreError, PERMISSION and NO_SPACE among them. */
  static open(root: string, identity: string, isOutOfReach: () => boolean = () => false): HostState {
    const id = createHash('sha256').update(identity).digest('hex').slice(0, 16);
    const directory = path.join(root, `cluster-${id}`);
    try {
      makeDirectory(nodeFiles, directory, 0o700);
      fs.accessSync(directory, fs.constants.R_OK | fs.constants.W_OK | fs.constants.X_OK);
      for (const name of fs.readdirSync(directory)) {
        // Left by a process that was killed before the rename.
        const writer = /\.new-(\d+)$/.exec(name)?.[1];
        if (writer !== undefined && !fs.existsSync(`/proc/${writer}`))
          fs.rmSync(path.join(directory, name), { force: true });
      }
      for (const made of [directory, root, path.dirname(root)]) syncDirectory(nodeFiles, made);
    } catch (error) {
      throw asStoreError(error, `the directory ${directory}`);
    }
    return new HostState(directory, isOutOfReach);
  }

  entries(): Map<string, unknown> {
    if (this.#isOutOfReach()) return new Map(this.#known);
    const found = new Map<string, unknown>();
    for (const name of fs.readdirSync(this.#directory)) {
      if (!name.endsWith(SUFFIX)) continue;
      const fact = readFact(path.join(this.#directory, name));
      if (fact && fileOf(fact.key) === name) found.set(fact.key, fact.value);
    }
    change(found, this.#waiting);
    this.#known = new Map(found);
    return found;
  }

  /** Stores the commits that wait, if possible now. Errors: those of commit. */
  async close(): Promise<void> {
    if (this.#waiting.size > 0) await this.commit(new Map());
  }

  async commit(changes: ReadonlyMap<string, unknown>): Promise<void> {
    for (const [key, value] of changes) this.#waiting.set(key, value);
    change(this.#known, changes);
    if (this.#isOutOfReach()) return;
    const all = this.#waiting;
    this.#waiting = new Map();
    try {
      for (const [key, value] of all) {
        const file = path.join(this.#directory, fileOf(key));
        if (value === undefined) await fs.promises.rm(file, { force: true });
        else await replaceFile(file, JSON.stringify({ key, value }));
      }
      syncDirectory(nodeFiles, this.#directory);
    } catch (error) {
      // The caller retries its own changes; earlier ones keep waiting.
      for (const [key, value] of all) if (!changes.has(key) && !this.#waiting.has(key)) this.#waiting.set(key, value);
      throw asStoreError(error, `storing in ${this.#directory}`);
    }
  }
}

/** undefined deletes a key. */
function change(facts: Map<string, unknown>, changes: ReadonlyMap<string, unknown>): void {
  for (const [key, value] of changes) {
    if (value === undefined) facts.delete(key);
    else facts.set(key, value);
  }
}

async function replaceFile(file: string, text: string): Promise<void> {
  const fresh = `${file}.new-${process.pid}`;
  const handle = await fs.promises.open(fresh, 'w', 0o600);
  try {
    await handle.writeFile(text);
    await handle.sync();
  } finally {
    await handle.close();
  }
  await fs.promises.rename(fresh, file);
}

function readFact(file: string): { readonly key: string; readonly value: unknown } | undefined {
  try {
    const fd = fs.openSync(file, fs.constants.O_RDONLY | fs.constants.O_NOFOLLOW | fs.constants.O_NONBLOCK);
    try {
      const status = fs.fstatSync(fd);
      if (!status.isFile() || status.size > MAX_FACT_BYTES) return undefined;
      const fact: unknown = JSON.parse(fs.readFileSync(fd, 'utf8'));
      const { key, value } = (fact ?? {}) as { key?: unknown; value?: unknown };
      return typeof key === 'string' && value !== undefined ? { key, value } : undefined;
    } finally {
      fs.closeSync(fd);
    }
  } catch {
    return undefined; // gone since it was listed, or damaged
  }
}

function fileOf(key: string): string {
  return createHash('sha256').update(key).digest('hex').slice(0, 32) + SUFFIX;
}

function asStoreError(error: unknown, what: string): StoreError {
  const { code } = error as NodeJS.ErrnoException;
  const kind =
    code === 'ENOSPC' || code === 'EDQUOT'
      ? 'NO_SPACE'
      : code === 'EACCES' || code === 'EPERM' || code === 'EROFS'
        ? 'PERMISSION'
        : 'IO';
  return new StoreError(kind, `${what}: ${reasonBeside(what, error as Error)}`, { cause: error });
}
