/**
 * Small facts that are kept in the store and outlive the process: which clients have which disks open, which labels have ended.
 * Owns when they become durable: a fact that must be durable before a client gets its answer is awaited, with many others in one
 * commit; the rest follows soon after. The meaning of the facts is the caller's.
 */
import { createHash } from 'node:crypto';
import { uriComponent } from '../text/name-bytes.js';
import type { StoreState } from '../store/object-store.js';
import type { Log } from './log.js';

/** How long facts that need not be durable at once are collected. */
const SOON_MS = 500;

/** LMDB's limit is 1978 bytes. Names, tags and names from certificates get longer with percent signs. */
const MAX_KEY_LENGTH = 512;
/** After so many facts have failed one by one, the store is taken to be at fault, and not the facts. */
const MAX_TRIED = 8;

/** By key. */
type Failures = ReadonlyMap<string, unknown>;

export class StoredFacts {
  readonly #state: StoreState | undefined;
  readonly #log: Log;
  readonly #known = new Map<string, unknown>();
  /** Keys whose value is not stored yet. */
  #dirty = new Set<string>();
  #last: Promise<void> = Promise.resolve();
  #next: Promise<Failures> | undefined;
  #timer: NodeJS.Timeout | undefined;
  #isClosed = false;

  /** `state`: undefined if nothing can be stored; then all facts end with the process. */
  constructor(state: StoreState | undefined, log: Log) {
    this.#state = state;
    this.#log = log;
    for (const [key, value] of state?.entries() ?? []) this.#known.set(key, value);
  }

  /** Whether the facts outlive this process. */
  get isDurable(): boolean {
    return this.#state !== undefined;
  }

  /** Other processes may serve the same store at the same time. */
  get isShared(): boolean {
    return this.#state?.isShared === true;
  }

  get(key: string): unknown {
    return this.#known.get(key);
  }

  /** Facts whose keys begin with `prefix`. */
  *entries(prefix: string): Generator<[string, unknown]> {
    for (const entry of this.#known) if (entry[0].startsWith(prefix)) yield entry;
  }

  /** Take over what other processes have stored, if the store is shared. */
  refresh(): void {
    if (this.#state?.isShared !== true) return;
    const stored = this.#state.entries();
    for (const key of this.#known.keys()) if (!stored.has(key) && !this.#dirty.has(key)) this.#known.delete(key);
    for (const [key, value] of stored) if (!this.#dirty.has(key)) this.#known.set(key, value);
  }

  /** Durable when it resolves. Errors: those of the store; then the fact is forgotten. */
  async put(key: string, value: object): Promise<void> {
    this.#set(key, value);
    const failed = await this.#flush();
    if (!failed.has(key)) return;
    if (this.#known.get(key) === value) this.#set(key, undefined);
    throw failed.get(key);
  }

  /** Durable soon; undefined forgets the fact. */
  putSoon(key: string, value: object | undefined): void {
    if (value === undefined && !this.#known.has(key)) return;
    this.#set(key, value);
    if (this.#state === undefined || this.#isClosed) return;
    this.#timer ??= setTimeout(() => {
      this.#timer = undefined;
      this.flush().catch((error: unknown) =>
        this.#log('cannot store which clients have which disks open', { err: error }),
      );
    }, SOON_MS).unref();
  }

  /** All facts are durable when it resolves, and nothing is stored later. Errors: those of the store. */
  async close(): Promise<void> {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    this.#isClosed = true;
    await this.flush();
  }

  /** All facts are durable when it resolves. Errors: those of the store, if any fact is not durable. */
  async flush(): Promise<void> {
    for (const error of (await this.#flush()).values()) throw error;
  }

  /** Returns the keys that could not be stored, and why. */
  #flush(): Promise<Failures> {
    // One commit runs, one waits: facts that come while one runs are in the next.
    if (this.#next === undefined) {
      const next = this.#last.then(() => {
        this.#next = undefined;
        return this.#commit();
      });
      this.#next = next;
      this.#last = next.then(() => undefined);
    }
    return this.#next;
  }

  #set(key: string, value: object | undefined): void {
    if (value === undefined) this.#known.delete(key);
    else this.#known.set(key, value);
    if (this.#state !== undefined) this.#dirty.add(key);
  }

  async #commit(): Promise<Failures> {
    const keys = this.#dirty;
    const failed = new Map<string, unknown>();
    if (keys.size === 0 || this.#state === undefined) return failed;
    this.#dirty = new Set();
    try {
      await this.#state.commit(new Map(Array.from(keys, (key) => [key, this.#known.get(key)])));
    } catch (error) {
      for (const key of keys) failed.set(key, error);
      if (keys.size > 1) await this.#commitOneByOne(failed);
      // A fact that fails while others succeed cannot be stored, and would be retried for ever. On a full disk it may still fit.
      const isAlone = failed.size < keys.size;
      const again: string[] = [];
      for (const [key, why] of failed) {
        if (!isAlone || (why as { code?: string }).code === 'NO_SPACE') again.push(key);
        else this.#log('one fact could not be stored and is forgotten', { err: why, key });
      }
      for (const key of again) this.#dirty.add(key);
    }
    return failed;
  }

  /** Facts that can be stored leave `failed`. If the first MAX_TRIED all fail, the store is at fault, and the rest is not tried. */
  async #commitOneByOne(failed: Map<string, unknown>): Promise<void> {
    let tried = 0;
    const { size } = failed;
    for (const key of [...failed.keys()]) {
      if (tried++ === MAX_TRIED && failed.size === size) return;
      try {
        await this.#state?.commit(new Map([[key, this.#known.get(key)]]));
        failed.delete(key);
      } catch (error) {
        failed.set(key, error);
      }
    }
  }
}

/** A key made of parts of any content. A long key is replaced by its hash: the value must say what it stands for. */
export function factKey(...parts: readonly string[]): string {
  const key = parts.map(uriComponent).join('/');
  return key.length <= MAX_KEY_LENGTH ? key : createHash('sha256').update(key).digest('hex');
}
