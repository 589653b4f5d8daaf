/**
 * Tells the operator that an export cannot be opened because its store fails: for the client it looks like one that is
 * missing. Once per export and cause in a while, since clients come back again and again.
 */
const REPEAT_MS = 10 * 60_000;
/** Exports and causes that are remembered. */
const MAX_KNOWN = 256;

export class RefusalLog {
  readonly #log: (line: string, details?: object) => void;
  readonly #toldAt = new Map<string, number>();

  constructor(log: (line: string, details?: object) => void) {
    this.#log = log;
  }

  tell(exportName: string, error: Error): void {
    const line = `export ${JSON.stringify(exportName)} cannot be opened: ${error.message}`;
    this.once(`${exportName}\n${error.message}`, line, { err: error });
  }

  /** `line`, unless one under the same `key` was told of lately. */
  once(key: string, line: string, details: object): void {
    const now = performance.now();
    const toldAt = this.#toldAt.get(key);
    if (toldAt !== undefined && now - toldAt < REPEAT_MS) return;
    if (this.#toldAt.size >= MAX_KNOWN) this.#toldAt.clear();
    this.#toldAt.set(key, now);
    this.#log(line, details);
  }
}
