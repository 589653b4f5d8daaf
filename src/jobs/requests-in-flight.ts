/** Several requests under way at a time, with a bound, and none left behind when one fails. Knows nothing of what they do. */

/** Enough to hide the latency of either side. */
export const IN_FLIGHT = 8;

/** Runs jobs, at most IN_FLIGHT at a time; the first failure ends it. */
export class Flight {
  readonly #jobs = new Set<Promise<void>>();
  #failure: { readonly error: unknown } | undefined;

  /** Resolves when there is room for the next; throws what an earlier job threw. */
  async add(job: () => Promise<void>): Promise<void> {
    while (this.#jobs.size >= IN_FLIGHT) await Promise.race(this.#jobs);
    this.#throwFailure();
    const running: Promise<void> = job()
      .catch((error: unknown) => {
        this.#failure ??= { error };
      })
      .finally(() => this.#jobs.delete(running));
    this.#jobs.add(running);
  }

  /** All jobs have ended; throws the first failure. */
  async landed(): Promise<void> {
    await Promise.all(this.#jobs);
    this.#throwFailure();
  }

  #throwFailure(): void {
    if (this.#failure) throw this.#failure.error;
  }
}

/** Run `work` with a flight and wait for all of it, also when it fails: nothing may use a buffer or file afterwards. */
export async function inFlight(work: (flight: Flight) => Promise<void>): Promise<void> {
  const flight = new Flight();
  try {
    await work(flight);
  } catch (error) {
    await flight.landed().catch(() => undefined);
    throw error;
  }
  await flight.landed();
}
