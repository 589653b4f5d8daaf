/** Several requests in flight, bounded, of which none is left behind when one fails. */

/** Enough to hide the latency of either side. */
export const MAX_IN_FLIGHT = 8;

/** Runs requests, at most MAX_IN_FLIGHT at a time; the first failure ends it. */
export class RequestsInFlight {
  readonly #requests = new Set<Promise<void>>();
  #failure: { readonly error: unknown } | undefined;

  /** Start a request when there is room for it; resolves when it has started. Throws what an earlier request threw. */
  async add(request: () => Promise<void>): Promise<void> {
    while (this.#requests.size >= MAX_IN_FLIGHT) await Promise.race(this.#requests);
    this.#throwFailure();
    const running: Promise<void> = request()
      .catch((error: unknown) => {
        this.#failure ??= { error };
      })
      .finally(() => this.#requests.delete(running));
    this.#requests.add(running);
  }

  /** Resolves when all requests have ended; throws the first failure. */
  async settled(): Promise<void> {
    await Promise.all(this.#requests);
    this.#throwFailure();
  }

  #throwFailure(): void {
    if (this.#failure) throw this.#failure.error;
  }
}

/** Run `work` and wait for all its requests, also when it fails: nothing may use a buffer or file afterwards. */
export async function withRequestsInFlight(work: (requests: RequestsInFlight) => Promise<void>): Promise<void> {
  const requests = new RequestsInFlight();
  try {
    await work(requests);
  } catch (error) {
    await requests.settled().catch(() => undefined);
    throw error;
  }
  await requests.settled();
}
