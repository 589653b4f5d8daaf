/**
 * What a store remembers beyond the process that serves it: who has what open, which labels have ended. Owns when that is
 * made durable: what must be before a client is answered is awaited, many at a time in one commit; the rest follows
 * soon after. Knows no meaning of it.
 */
import { createHash } from 'node:crypto';
import { uriComponent } from '../text/name-bytes.js';
import type { StoreState } from '../store/object-store.js';
import type { Log } from './log.js';

/** What may come late is collected for so long. */
const SOON_MS = 500;

/** LMDB takes 1978 bytes: names, tags and what certificates say are longer with percent signs. */
const MAX_KEY_LENGTH = 512;
/** After so many that fail one by one the store is taken for what is wrong. */
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

  /** `state`: undefined if nothing can be stored; then all is forgotten with the process. */
  constructor(state: StoreState | undefined, log: Log) {
    this.#state = state;
    this.#log = log;
    for (const [key, value] of state?.entries() ?? []) this.#known.set(key, value);
  }

  /** Whether anything outlives this process. */
  get isDurable(): boolean {
    return this.#state !== undefined;
  }

  /** Other processes may serve the same at the same time. */
  get isShared(): boolean {
    return this.#state?.isShared === true;
  }

  get(key: string): unknown {
    return this.#known.get(key);
  }

  /** Those whose keys begin with `prefix`. */
  *entries(prefix: string): Generator<[string, unknown]> {
    for (const entry of this.#known) if (entry[0].startsWith(prefix)) yield entry;
  }

  /** Take in what other processes have stored; for stores that may have several. */
  refresh(): void {
    if (this.#state?.isShared !== true) return;
    const stored = this.#state.entries();
    for (const key of this.#known.keys()) if (!stored.has(key) && !this.#dirty.has(key)) this.#known.delete(key);
    for (const [key, value] of stored) if (!this.#dirty.has(key)) this.#known.set(key, value);
  }

  /** Durable when it resolves. Errors: those of the store; then it is not remembered. */
  async put(key: string, value: object): Promise<void> {
    this.#set(key, value);
    const failed = await this.#flush();
    if (!failed.has(key)) return;
    if (this.#known.get(key) === value) this.#set(key, undefined);
    throw failed.get(key);
  }

  /** Durable soon; undefined forgets it. */
  putSoon(key: string, value: object | undefined): void {
    if (value === undefined && !this.#known.has(key)) return;
    this.#set(key, value);
    if (this.#state === undefined || this.#isClosed) return;
    this.#timer ??= setTimeout(() => {
      this.#timer = undefined;
      this.flush().catch((error: unknown) => this.#log('cannot store who has what open', { err: error }));
    }, SOON_MS).unref();
  }

  /** All of it is durable when it resolves, and nothing is stored later. Errors: those of the store. */
  async close(): Promise<void> {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    this.#isClosed = true;
    await this.flush();
  }

  /** All of it is durable when it resolves. Errors: those of the store, if any of it is not. */
  async flush(): Promise<void> {
    for (const error of (await this.#flush()).values()) throw error;
  }

  /** Returns what could not be stored, and why. */
  #flush(): Promise<Failures> {
    // One commit runs, one waits: whoever comes while one runs is served by the next.
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
      // What fails while others go well cannot be stored, and would be tried for ever. On a full disk it is only a matter of room.
      const isAlone = failed.size < keys.size;
      const again: string[] = [];
      for (const [key, why] of failed) {
        if (!isAlone || (why as { code?: string }).code === 'NO_SPACE') again.push(key);
        else this.#log('one fact is not remembered', { err: why, key });
      }
      for (const key of again) this.#dirty.add(key);
    }
    return failed;
  }

  /** Those that can be stored leave `failed`. If the first ones all cannot, the store is to blame, and the rest is not tried. */
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

/** A key of parts that may hold anything. What it stands for is in its value: a long one is its own hash. */
export function factKey(...parts: readonly string[]): string {
  const key = parts.map(uriComponent).join('/');
  return key.length <= MAX_KEY_LENGTH ? key : createHash('sha256').update(key).digest('hex');
}
