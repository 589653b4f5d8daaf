/**
 * What an open VDI has to remember of changes of its overlays: for the next flush, and in the map log for the case that the
 * process is killed before. Owns the order of the log's entries. Changes nothing itself.
 */
import type { Awaitable } from '../vdi-record.js';
import type { OverlayChanges } from './data-objects.js';
import type { MapLog } from './map-log.js';
import type { Overlays } from './overlays.js';
import { isPlanted } from './planted-faults.js';
import { idxOf, localObjectKey, vidOf } from './reference-counts.js';
import type { UnflushedChanges } from './unflushed-changes.js';

export class OverlayNotes implements OverlayChanges {
  readonly #changes: UnflushedChanges;
  readonly #log: MapLog;
  readonly #overlays: Overlays;
  readonly #ownerOf: (idx: number) => number;
  readonly #giveUp: (key: number) => void;

  /**
   * `ownerOf`: the present map entry. `giveUp` is called with an object that a stored overlay may refer to until the next flush
   * is durable, and not after that.
   */
  constructor(
    changes: UnflushedChanges,
    log: MapLog,
    overlays: Overlays,
    ownerOf: (idx: number) => number,
    giveUp: (key: number) => void,
  ) {
    this.#changes = changes;
    this.#log = log;
    this.#overlays = overlays;
    this.#ownerOf = ownerOf;
    this.#giveUp = giveUp;
  }

  willChange(key: number): void {
    const { inFlight } = this.#changes;
    if (inFlight === undefined || !inFlight.overlays.has(key) || inFlight.before.has(key)) return;
    inFlight.before.set(key, this.#overlays.stored(key));
  }

  changed(key: number, first: number, end: number, has: boolean): Awaitable<void> {
    this.#changes.overlays.add(key);
    this.#logBelow(key);
    return this.#log.blocks(idxOf(key), first, end, has);
  }

  rebased(key: number, before: number): Awaitable<void> {
    const idx = idxOf(key);
    this.#changes.overlays.add(key);
    this.#giveUp(localObjectKey(before, idx));
    this.#logBelow(key);
    return this.#log.based(idx, this.#overlays.baseOf(vidOf(key), idx));
  }

  wrote(file: number): void {
    if (isPlanted('flush skips new objects') && this.#changes.inFlight !== undefined) return;
    this.#changes.objects.add(file);
  }

  making(file: number): void {
    this.#changes.creating.add(file);
  }

  made(file: number): void {
    this.#changes.creating.delete(file);
    this.#changes.created.add(file);
  }

  /** The map has a new overlay at idx, where it had `before`. All of it is logged here. */
  entered(idx: number, owner: number, before: number): Awaitable<void> {
    const overlays = this.#overlays;
    this.#changes.overlays.add(localObjectKey(owner, idx));
    let logged = this.#log.overlaid(idx, owner);
    const base = overlays.baseOf(owner, idx);
    const blocks = overlays.blocks(owner);
    for (let from = overlays.next(owner, idx, 0, blocks, true); from < blocks;) {
      const end = overlays.next(owner, idx, from, blocks, false);
      logged = this.#log.blocks(idx, from, end, true);
      from = overlays.next(owner, idx, end, blocks, true);
    }
    if (base !== before) logged = this.#log.based(idx, base);
    return logged;
  }

  /** The overlay is about to go, because an object of its name is made as a whole file. */
  forgets(key: number): void {
    this.willChange(key);
    this.#changes.overlays.add(key);
  }

  /** An entry is about the object that the map has at idx, unless this one comes before it. */
  #logBelow(key: number): void {
    if (this.#ownerOf(idxOf(key)) !== vidOf(key)) void this.#log.below(idxOf(key), vidOf(key));
  }
}
