/**
 * Removes the records of overlays that are gone, in the background: no map needs them, and the next start would remove them, too.
 * Owns which are waiting. Many go together, in one transaction.
 */
import { OVERLAYS_PER_TRANSACTION, type Metadata } from './metadata.js';
import type { Overlays } from './overlays.js';
import { idxOf, vidOf } from './reference-counts.js';

const DELAY_MS = 1000;

export class OverlayRemoval {
  readonly #metadata: Metadata;
  readonly #overlays: Overlays;
  readonly #onError: (error: unknown) => void;
  #gone = new Set<number>();
  /** Their records are being removed, or could not be removed. */
  readonly #left = new Set<number>();
  #storing: Promise<void> | undefined;
  #timer: NodeJS.Timeout | undefined;

  constructor(metadata: Metadata, overlays: Overlays, onError: (error: unknown) => void) {
    this.#metadata = metadata;
    this.#overlays = overlays;
    this.#onError = onError;
  }

  add(key: number): void {
    this.#gone.add(key);
    if (this.#gone.size >= OVERLAYS_PER_TRANSACTION) this.#begin();
    else this.#timer ??= setTimeout(() => this.#begin(), DELAY_MS).unref();
  }

  /** Whether the record of an overlay that is gone may still be stored. */
  isStored(key: number): boolean {
    return this.#gone.has(key) || (this.#left.size > 0 && this.#left.has(key));
  }

  /** Resolves when the records of all that is gone are removed. After a failure they are left to the next start. */
  async stored(): Promise<void> {
    while (this.#gone.size > 0 || this.#storing !== undefined) {
      this.#begin();
      await this.#storing;
    }
  }

  #begin(): void {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    this.#storing ??= this.#store().finally(() => {
      this.#storing = undefined;
      if (this.#gone.size >= OVERLAYS_PER_TRANSACTION) this.#begin();
    });
  }

  async #store(): Promise<void> {
    for (const key of this.#gone) this.#left.add(key);
    this.#gone = new Set();
    const keys = [...this.#left];
    try {
      for (let from = 0; from < keys.length; from += OVERLAYS_PER_TRANSACTION) {
        // An object of the same name may have been made meanwhile: its VDI stores what it is.
        const part = keys.slice(from, from + OVERLAYS_PER_TRANSACTION);
        const gone = part.filter((key) => this.#overlays.baseOf(vidOf(key), idxOf(key)) === 0);
        if (gone.length > 0) await this.#metadata.commit({ overlays: new Map(gone.map((key) => [key, undefined])) });
        for (const key of part) this.#left.delete(key);
      }
    } catch (error) {
      this.#onError(error);
    }
  }
}
