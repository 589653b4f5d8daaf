/**
 * Gives back the space of overlays that are gone, in the background: their part of a segment file is punched out, or the file is
 * removed if no overlay is left in it. Owns what is waiting for that. The caller guarantees that no map, and no map that a crash
 * could restore, needs the space.
 */
import { asStoreError } from './store-errors.js';
import type { ObjectFiles } from './object-files.js';
import type { KeyTurns } from './key-turns.js';
import { SEGMENT_OBJECTS, type Overlays } from './overlays.js';
import { idxOf, localObjectKey, vidOf } from './reference-counts.js';

/** Objects are given up one after the other: a file whose last overlay goes soon need not be punched before. */
const DELAY_MS = 500;

/** The key of the segment file that has the overlay (localObjectKey of the vid and the number of the segment). */
export function segmentOf(key: number): number {
  return localObjectKey(vidOf(key), Math.floor(idxOf(key) / SEGMENT_OBJECTS));
}

export class SegmentSpace {
  readonly #segments: ObjectFiles;
  readonly #overlays: Overlays;
  readonly #turns: KeyTurns;
  /** By segment: overlays whose space is not needed any more. */
  readonly #waiting = new Map<number, Set<number>>();
  /** The overlay that is being punched out, and its end. */
  #punching: { readonly key: number; readonly done: Promise<void> } | undefined;
  #working: Promise<void> | undefined;
  #timer: NodeJS.Timeout | undefined;
  #onError: (error: unknown) => void = () => undefined;
  /** Segments with holes that are not durable. */
  readonly #punched = new Set<number>();

  constructor(segments: ObjectFiles, overlays: Overlays, turns: KeyTurns) {
    this.#segments = segments;
    this.#overlays = overlays;
    this.#turns = turns;
  }

  /** The overlay's space is not needed any more. `onError` gets what goes wrong from here on. */
  free(key: number, onError = this.#onError): void {
    const segment = segmentOf(key);
    const keys = this.#waiting.get(segment);
    if (keys) keys.add(key);
    else this.#waiting.set(segment, new Set([key]));
    this.#onError = onError;
    this.#later();
  }

  #later(): void {
    if (this.#working === undefined) this.#timer ??= setTimeout(() => this.#begin(), DELAY_MS).unref();
  }

  /** The space is to be used again: resolves when it is not being given back; undefined if it is not now. */
  takeBack(key: number): Promise<void> | undefined {
    this.#waiting.get(segmentOf(key))?.delete(key);
    return this.#punching?.key === key ? this.#punching.done : undefined;
  }

  /** The file is to be made anew: nothing in it is waited for. */
  forget(segment: number): void {
    this.#waiting.delete(segment);
  }

  /** Resolves when all space that was given up is free. */
  async freed(): Promise<void> {
    while (this.#waiting.size > 0 || this.#working !== undefined) {
      if (this.#working === undefined) this.#begin();
      await this.#working;
    }
  }

  /** Make durable what was given back, so that it cannot be there again after a power loss. Errors: IO. */
  async sync(): Promise<void> {
    for (const segment of [...this.#punched]) {
      this.#punched.delete(segment);
      if (this.#overlays.inSegment(vidOf(segment), idxOf(segment)) > 0) await this.#segments.sync(segment, SPACE);
    }
  }

  #begin(): void {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    this.#working = this.#work().finally(() => {
      this.#working = undefined;
      if (this.#waiting.size > 0) this.#later();
    });
  }

  async #work(): Promise<void> {
    for (let next = this.#waiting.entries().next(); !next.done; next = this.#waiting.entries().next()) {
      const [segment, keys] = next.value;
      // Asked again after each wait: meanwhile the last overlay may have gone, or its space may be in use again.
      for (const key of keys) {
        if (this.#overlays.inSegment(vidOf(segment), idxOf(segment)) === 0) {
          this.#segments.remove(segment, this.#onError);
          break;
        }
        keys.delete(key);
        if (this.#overlays.baseOf(vidOf(key), idxOf(key)) === 0) await this.#punch(key);
      }
      if (this.#waiting.get(segment) === keys) this.#waiting.delete(segment);
    }
    await this.#segments.removed();
  }

  async #punch(key: number): Promise<void> {
    // Without holes this would write zeros: the space is given back with the file.
    if (!this.#segments.canZeroFast(false)) return;
    const done = this.#punchWhenIdle(key).catch((error: unknown) =>
      this.#onError(asStoreError(error, 'giving back the space of an overlay')),
    );
    this.#punching = { key, done };
    await done;
    this.#punching = undefined;
  }

  async #punchWhenIdle(key: number): Promise<void> {
    const vid = vidOf(key);
    await this.#turns.idle(key);
    if (this.#overlays.baseOf(vid, idxOf(key)) !== 0) return;
    const segment = segmentOf(key);
    const size = this.#segments.lengthOf(vid) / SEGMENT_OBJECTS;
    await this.#segments.zero(vid, idxOf(segment), (idxOf(key) % SEGMENT_OBJECTS) * size, size, false, SPACE);
    this.#punched.add(segment);
  }
}

/** The owner of this work, for its share of threads. */
const SPACE = Symbol('space of segments');
