/**
 * When a file is synced, and what follows from a failure. It owns two rules: whoever asks gets a sync that began after the request,
 * and after a failed sync none succeeds any more.
 */

import { DeviceError } from '../block-device.js';

export class Syncs {
  readonly #sync: () => Promise<void>;
  #running: Promise<void> | undefined;
  /** Begins when #running has ended; for all who have asked since that one began. */
  #next: Promise<void> | undefined;
  #failure: { readonly error: unknown } | undefined;

  /** `sync`: fdatasync of the file. */
  constructor(sync: () => Promise<void>) {
    this.#sync = sync;
  }

  /**
   * Make everything durable that was written before. Errors: those of the sync; DeviceError EIO after a failed one.
   * Syncs run one after the other: the kernel reports a failure to one of several, and the others would succeed.
   */
  request(): Promise<void> {
    // First, because #running may have ended without #next having begun.
    if (this.#next !== undefined) return this.#next;
    if (this.#running === undefined) return this.#start();
    const startNext = (): Promise<void> => this.#startNext();
    this.#next = this.#running.then(startNext, startNext);
    return this.#next;
  }

  /**
   * Errors: DeviceError EIO if a sync has failed. The kernel may have dropped the data that it could not write, and marked it as
   * written: the next sync would succeed without it.
   */
  check(): void {
    if (this.#failure === undefined) return;
    const message = 'an earlier sync of the file has failed: what was written before may be lost';
    throw new DeviceError('EIO', message, { cause: this.#failure.error });
  }

  #startNext(): Promise<void> {
    this.#next = undefined;
    return this.#start();
  }

  #start(): Promise<void> {
    this.#running = this.#run().finally(() => {
      this.#running = undefined;
    });
    return this.#running;
  }

  async #run(): Promise<void> {
    this.check();
    try {
      await this.#sync();
    } catch (error) {
      this.#failure = { error };
      throw error;
    }
  }
}
