/**
 * Suspects: objects in which a look has found a difference, until it is known whether it lasts: a client may have been writing.
 * They are looked at several times over the time that a difference must last. Owns the timetable and its bounds.
 *
 * A unit whose copies are equal in any look is right. A unit whose copies differ in all looks, with the same content each time,
 * is wrong: no write was in flight. A unit whose content changes is being written: it is looked at many times in quick
 * succession, because its copies are equal between two writes.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import type { Difference, Look, Looker } from './look.js';
import type { Target } from './objects-in-use.js';

/** Times of the looks, as fractions of the time that a difference must last. */
const LOOKS_AT = [0.02, 0.1, 0.3, 0.6, 1];
const QUICK_LOOKS = 50;
/** Pauses between quick looks have random lengths, so that they are not in step with a client. */
const LONGEST_QUICK_PAUSE_MS = 25;
/** Most suspects, and most differing units in them, at a time; one object may have more units. Callers wait for room. */
const MAX_SUSPECTS = 1024;
const MAX_UNITS = 2 ** 16;

interface Suspect {
  readonly target: Target;
  foundAt: number;
  /** How many of LOOKS_AT are done. */
  looks: number;
  look: Look;
  /** Units of `look` whose content has changed since it was found. */
  readonly changing: Set<number>;
}

export interface SuspectsOptions {
  readonly looker: Looker;
  readonly settleMs: number;
  readonly signal: AbortSignal;
  /** Called with the differences that have lasted. */
  readonly confirmed: (target: Target, look: Look) => void;
}

export class Suspects {
  readonly #options: SuspectsOptions;
  /** By the time of the next look, the next one first. */
  readonly #waiting: Suspect[] = [];
  #units = 0;
  #wake: (() => void) | undefined;
  #isLast = false;

  constructor(options: SuspectsOptions) {
    this.#options = options;
  }

  /** Resolves when there is room for one more. */
  async room(): Promise<void> {
    while (this.#waiting.length >= MAX_SUSPECTS || this.#units >= MAX_UNITS) {
      await sleep(LONGEST_QUICK_PAUSE_MS, undefined, { signal: this.#options.signal });
    }
  }

  add(target: Target, look: Look): void {
    this.#insert({ target, foundAt: performance.now(), looks: 0, look, changing: new Set() });
    this.#wake?.();
  }

  /** Looks at suspects until they are decided; ends when none is left after `last`. Errors: as Looker.look. */
  async run(): Promise<void> {
    const { signal } = this.#options;
    for (;;) {
      const next = this.#waiting[0];
      if (!next && this.#isLast) return;
      const waitMs = next ? this.#dueAt(next) - performance.now() : Infinity;
      if (waitMs > 0) await this.#pause(Math.min(waitMs, 1000), signal);
      else await this.#lookAgain(next as Suspect);
    }
  }

  /** No more are added. */
  last(): void {
    this.#isLast = true;
    this.#wake?.();
  }

  async #lookAgain(suspect: Suspect): Promise<void> {
    const { looker, confirmed } = this.#options;
    const { target, look: before } = suspect;
    const units = before.differences.map(({ unit }) => unit);
    // Where nothing differs and a copy is missing, whether it still is can be seen anywhere.
    const asked = units.length > 0 ? units : [target.spans[0]?.[0] ?? 0];
    const look = await looker.look(target, asked, { fresh: true });
    this.#remove(suspect);
    if (look.view.epoch !== before.view.epoch || !isSame(before.absent, look.absent)) {
      // Members or missing copies have changed: start again with a look at the whole object, because a copy may be new.
      const whole = await looker.look(target);
      if (isWrong(whole))
        this.#insert({ target, foundAt: performance.now(), looks: 0, look: whole, changing: new Set() });
      return;
    }
    const prints = new Map(before.differences.map(({ unit, prints }) => [unit, prints]));
    for (const { unit, prints: now } of look.differences)
      if (!prints.get(unit)?.equals(now)) suspect.changing.add(unit);
    suspect.look = look;
    suspect.looks++;
    if (!isWrong(look)) return;
    if (suspect.looks < LOOKS_AT.length) return void this.#insert(suspect);
    const stayed = await this.#withoutWritten(suspect);
    if (isWrong(stayed)) confirmed(target, stayed);
  }

  /** The look without the units that are only being written. */
  async #withoutWritten({ target, look, changing }: Suspect): Promise<Look> {
    let written = look.differences.filter(({ unit }) => changing.has(unit));
    for (let n = 0; n < QUICK_LOOKS && written.length > 0; n++) {
      await sleep(1 + Math.random() * LONGEST_QUICK_PAUSE_MS, undefined, { signal: this.#options.signal });
      const again = await this.#options.looker.look(
        target,
        written.map(({ unit }) => unit),
      );
      written = [...again.differences];
    }
    const differences = look.differences.filter(({ unit }) => !changing.has(unit));
    return { ...look, differences: [...differences, ...written].sort(byUnit) };
  }

  #dueAt({ foundAt, looks }: Suspect): number {
    return foundAt + (LOOKS_AT[looks] ?? 1) * this.#options.settleMs;
  }

  #insert(suspect: Suspect): void {
    const due = this.#dueAt(suspect);
    let at = this.#waiting.length;
    while (at > 0 && this.#dueAt(this.#waiting[at - 1] as Suspect) > due) at--;
    this.#waiting.splice(at, 0, suspect);
    this.#units += suspect.look.differences.length;
  }

  #remove(suspect: Suspect): void {
    this.#waiting.splice(this.#waiting.indexOf(suspect), 1);
    this.#units -= suspect.look.differences.length;
  }

  async #pause(ms: number, signal: AbortSignal): Promise<void> {
    const woken = new Promise<void>((resolve) => (this.#wake = resolve));
    const ended = new AbortController();
    try {
      await Promise.race([woken, sleep(ms, undefined, { signal: AbortSignal.any([signal, ended.signal]) })]);
    } finally {
      this.#wake = undefined;
      ended.abort();
    }
  }
}

export function isWrong({ absent, differences }: Look): boolean {
  return absent.length > 0 || differences.length > 0;
}

function isSame(before: Look['absent'], now: Look['absent']): boolean {
  return (
    before.length === now.length &&
    before.every(({ node, trouble }, n) => {
      const other = now[n];
      return other?.node.host === node.host && other.node.port === node.port && other.trouble === trouble;
    })
  );
}

function byUnit(a: Difference, b: Difference): number {
  return a.unit - b.unit;
}
