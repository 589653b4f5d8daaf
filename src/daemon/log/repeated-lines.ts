/**
 * Counts lines of the log that could come once per request or connection. For each cause of each subject (a disk, a peer) the first
 * line is written at once; later ones are summarised at growing intervals, with their number. Owns when a line is written, and that
 * each one is written or counted in the end; callers own the text. Memory and output are bounded whatever clients do.
 */

/** Between two lines about one cause; doubled each time while the cause lasts. */
export const FIRST_INTERVAL_MS = 10_000;
export const LONGEST_INTERVAL_MS = 10 * 60_000;
/** Per subject; further causes are counted together. */
export const MAX_CAUSES = 8;
/** Further subjects are counted together. */
export const MAX_SUBJECTS = 256;
/** By how much a line may be late. */
const CHECK_MS = 1_000;
/** In a chain of causes. */
const MAX_DEPTH = 6;
/** The key for causes and subjects beyond the bounds; no real one has this name. */
const OTHERS = '';

/** How many events a line stands for, and within how many milliseconds they came: 1 in 0 ms for the first. */
export interface Repetition {
  readonly count: number;
  readonly ms: number;
}

type Writer = (repetition: Repetition) => void;

interface Cause {
  toldAt: number;
  intervalMs: number;
  untold: number;
  /** Writes the line for the latest event. */
  write: Writer;
}

export class RepeatedLines {
  readonly #subjects = new Map<string, Map<string, Cause>>();
  #timer: NodeJS.Timeout | undefined;

  /** `write` is called now, or later, or not at all if a newer event of the same cause comes before its turn. */
  tell(subject: string, cause: string, write: Writer): void {
    const causes = this.#causesOf(subject);
    const key = causes.has(cause) || causes.size < MAX_CAUSES ? cause : OTHERS;
    const known = causes.get(key);
    if (known !== undefined) {
      known.untold++;
      known.write = write;
      return;
    }
    causes.set(key, { toldAt: performance.now(), intervalMs: FIRST_INTERVAL_MS, untold: 0, write });
    this.#timer ??= setInterval(() => this.#check(), CHECK_MS).unref();
    write({ count: 1, ms: 0 });
  }

  /** Write the lines that are held back; nothing is written later. */
  close(): void {
    clearInterval(this.#timer);
    this.#timer = undefined;
    const now = performance.now();
    for (const causes of this.#subjects.values()) {
      for (const { untold, toldAt, write } of causes.values())
        if (untold > 0) write({ count: untold, ms: now - toldAt });
    }
    this.#subjects.clear();
  }

  #causesOf(subject: string): Map<string, Cause> {
    const key = this.#subjects.has(subject) || this.#subjects.size < MAX_SUBJECTS ? subject : OTHERS;
    let causes = this.#subjects.get(key);
    if (causes === undefined) this.#subjects.set(key, (causes = new Map<string, Cause>()));
    return causes;
  }

  #check(): void {
    const now = performance.now();
    for (const [subject, causes] of this.#subjects) {
      for (const [key, cause] of causes) {
        const ms = now - cause.toldAt;
        if (ms < cause.intervalMs) continue;
        if (cause.untold === 0) {
          causes.delete(key);
          continue;
        }
        cause.write({ count: cause.untold, ms });
        cause.untold = 0;
        cause.toldAt = now;
        cause.intervalMs = Math.min(2 * cause.intervalMs, LONGEST_INTERVAL_MS);
      }
      if (causes.size === 0) this.#subjects.delete(subject);
    }
    if (this.#subjects.size > 0) return;
    clearInterval(this.#timer);
    this.#timer = undefined;
  }
}

/** Two sets with bounds of their own: however many peers are refused, the failure of a disk is still logged. */
export interface StoreAndPeerLines {
  readonly ofStore: RepeatedLines;
  readonly ofPeers: RepeatedLines;
}

/** For the end of a message. */
export function times({ count, ms }: Repetition): string {
  return count === 1 ? '' : ` (the last of ${count} in ${Math.round(ms / 1000)} s)`;
}

/** For the fields of a line. */
export function counted({ count }: Repetition): { readonly count?: number } {
  return count === 1 ? {} : { count };
}

/** Identifies a cause, whatever objects and nodes its message names: the names and codes of an error and of its causes. */
export function causeOf(error: unknown): string {
  const parts: string[] = [];
  for (let each = error; each instanceof Error && parts.length < MAX_DEPTH; each = each.cause) {
    parts.push(`${each.constructor.name} ${(each as { code?: unknown }).code as string}`);
  }
  return parts.join(' < ') || typeof error;
}
