/**
 * Clients that an operator has disconnected and that must not write the same disk again for a time, by whatever connection.
 * Owns that list, in this process only.
 */
import type { Client } from '../vdi/client-use.js';
import { busy } from './writer-claim.js';

/** Entries, of all disks and clients; the oldest are forgotten. */
const MAX_KEPT_OUT = 1024;

interface KeptOut {
  readonly label: string;
  /** Date.now() */
  readonly since: number;
  readonly forMs: number;
  /** By performance.now(). */
  readonly until: number;
}

export class KeptOutClients {
  readonly #entries = new Map<string, KeptOut>();

  add(disk: string, client: Client, forMs: number): void {
    const now = performance.now();
    if (this.#entries.size >= MAX_KEPT_OUT) {
      for (const [key, { until }] of [...this.#entries]) if (until <= now) this.#entries.delete(key);
    }
    const [oldest] = this.#entries.keys();
    if (this.#entries.size >= MAX_KEPT_OUT && oldest !== undefined) this.#entries.delete(oldest);
    this.#entries.set(keyOf(disk, client), { label: client.label, since: Date.now(), forMs, until: now + forMs });
  }

  has(disk: string, client: Client | undefined): boolean {
    return this.#find(disk, client) !== undefined;
  }

  /** Errors: CatalogError BUSY (the client is kept out of the disk). */
  mustNotHave(disk: string, client: Client | undefined): void {
    const found = this.#find(disk, client);
    if (found === undefined) return;
    // The words do not change while it lasts: the log has one line for each message.
    throw busy(
      `${found.label} was disconnected from ${disk} at ${timeOf(found.since)} by the operator and is kept out for ` +
        `${Math.ceil(found.forMs / 1000)} s`,
    );
  }

  #find(disk: string, client: Client | undefined): KeptOut | undefined {
    if (client === undefined) return undefined;
    const key = keyOf(disk, client);
    const found = this.#entries.get(key);
    if (found === undefined || found.until > performance.now()) return found;
    this.#entries.delete(key);
    return undefined;
  }
}

function keyOf(disk: string, { id }: Client): string {
  return `${disk}\n${id}`;
}

function timeOf(ms: number): string {
  return new Date(ms).toISOString().replace(/\.\d+/, '');
}
