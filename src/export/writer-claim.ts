/**
 * One connection's claim to write a disk. Owns its state: whether it may write, has written, is fenced, has ended. Which claims
 * exclude each other: writers.ts.
 */
import type { Peer } from 'nbd-server-ts/block-device';
import { CatalogError } from '../vdi/catalog-error.js';
import type { Client } from '../vdi/client-use.js';
import type { Otherwise } from './exclusive.js';

/** Asks to write. */
export interface Claimant {
  readonly peer: Peer;
  /** Undefined for our own commands, which write only VDIs that nobody else can open. */
  readonly client: Client | undefined;
}

/** What a claim asks of the claims on all disks. */
interface Claims {
  /** Errors: CatalogError BUSY (it must not write). */
  beginWriting(claim: Claim): void;
  end(claim: Claim): void;
}

export class Claim {
  readonly disk: string;
  readonly peer: Peer;
  readonly client: Client | undefined;
  readonly mayWrite: boolean;
  /** It asked for exclusive access, or met an exclusive writer: no further connection writes beside this one. */
  readonly isExclusive: boolean;
  /** For clients that come while this one writes and do not say themselves what happens to them. */
  readonly otherwise: Otherwise | undefined;
  firstWriteAt: number | null = null;
  isFenced = false;
  /** Set by the device: after a call it asks `beginWriting` again. */
  onFenced: (() => void) | undefined;
  readonly ended: Promise<void>;
  #end: () => void = () => undefined;
  readonly #claims: Claims;

  constructor(
    claims: Claims,
    disk: string,
    { peer, client }: Claimant,
    may: { readonly mayWrite: boolean; readonly isExclusive: boolean; readonly otherwise: Otherwise | undefined },
  ) {
    this.#claims = claims;
    this.disk = disk;
    this.peer = peer;
    this.client = client;
    this.mayWrite = may.mayWrite;
    this.isExclusive = may.isExclusive;
    this.otherwise = may.otherwise;
    this.ended = new Promise((resolve) => (this.#end = resolve));
  }

  get label(): string {
    return labelOfClaimant(this);
  }

  /** Called before the first write, and again after a fence. Errors: CatalogError BUSY (it must not write). */
  beginWriting(): void {
    this.#claims.beginWriting(this);
  }

  /** No request of the connection is in flight, and none will come. */
  end(): void {
    this.#claims.end(this);
    this.#end();
  }

  /** No request that reaches the device from now on is written. */
  fence(): void {
    this.isFenced = true;
    this.onFenced?.();
  }
}

/** For people. */
export function labelOfClaimant({ client }: Pick<Claimant, 'client'>): string {
  return client?.label ?? 'a command';
}

/** Whether all of the claims end before `deadline` (performance.now()). */
export async function endWithin(claims: readonly Claim[], deadline: number): Promise<boolean> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<boolean>((resolve) => {
    timer = setTimeout(() => resolve(false), Math.max(0, deadline - performance.now()));
  });
  const isOver = await Promise.race([Promise.all(claims.map(({ ended }) => ended)).then(() => true), late]);
  clearTimeout(timer);
  return isOver;
}

/** `words` are for the client too, and name the other client; `more`, what the operator can do about it, is for the log. */
export function busy(words: string, more = ''): CatalogError {
  return new CatalogError('BUSY', words + more, { forClients: words });
}
