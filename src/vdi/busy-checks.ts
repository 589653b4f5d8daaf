/**
 * Whether a disk is in use, for operations that replace its content or take it away: open by a connection, by another daemon
 * of this machine, or expected back by a client that was cut off. Owns these checks and their messages (BUSY); the counts
 * are those of open-vdis.ts and in-use.ts.
 */
import type { VdiRecord } from '../store/vdi-record.js';
import { CatalogError } from './catalog-error.js';
import type { ClientUse, InUse } from './in-use.js';
import { specOf } from './names.js';
import type { OpenVdis } from './open-vdis.js';

/** Clients that a message names. */
const MAX_NAMED = 4;

/** Overrules the check that a disk is not in use. */
export interface ForceOption {
  /** Clients that were cut off will not come back. Connected clients are not overruled. */
  readonly force?: boolean | undefined;
}

export class BusyChecks {
  readonly #open: OpenVdis;
  readonly #inUse: InUse;

  constructor(open: OpenVdis, inUse: InUse) {
    this.#open = open;
    this.#inUse = inUse;
  }

  /** Errors: BUSY (a connection has it open, or a client that was cut off may come back). */
  mustBeFree(record: VdiRecord, what: string, { force }: ForceOption, forceOption?: string): void {
    this.mustBeClosed(record, what);
    this.mustBeUnused(record, what, { force }, forceOption);
  }

  /** Errors: BUSY (a connection has it open). */
  mustBeClosed(record: VdiRecord, what: string): void {
    const users = this.#open.usersOf(record.vid);
    if (users === 0) return;
    throw new CatalogError(
      'BUSY',
      `${specOf(record)} is open by ${users} connection${users === 1 ? '' : 's'} and cannot be ${what} now; ` +
        `disconnect first${this.#whoHas(record)}`,
    );
  }

  /** The name need not exist. Errors: BUSY (a client that was cut off may come back and expect the old disk). */
  mustBeUnused(
    record: Pick<VdiRecord, 'name' | 'tag'>,
    what: string,
    { force }: ForceOption,
    forceOption = '--force',
  ): void {
    const { name, tag } = record;
    const spec = tag === '' ? name : `${name}@${tag}`;
    const uses = this.#inUse.of(name, tag);
    const elsewhere = uses.find(({ isElsewhere }) => isElsewhere);
    if (elsewhere) throw openElsewhere(spec, elsewhere, what);
    if (force) {
      this.#inUse.forgetLost(name, tag);
      return;
    }
    const [first, ...others] = uses.filter(({ lostAt }) => lostAt !== null);
    if (!first) return;
    const more = others.length === 0 ? '' : `, and by ${others.length} more`;
    throw new CatalogError(
      'BUSY',
      `${spec} is in use by ${first.client}${more}, which was cut off at ${timeOf(first.lostAt ?? 0)} and may come back until ` +
        `${timeOf(first.until ?? 0)}: it cannot be ${what}, unless ${forceOption} says that no client will come back`,
    );
  }

  /** Errors: BUSY (another daemon of this machine serves it to a client). */
  mustNotBeElsewhere(spec: string, { name }: VdiRecord, what: string): void {
    const elsewhere = this.#inUse.of(name, '').find(({ isElsewhere }) => isElsewhere);
    if (elsewhere) throw openElsewhere(spec, elsewhere, what);
  }

  /** Errors: BUSY (any VDI of the store is open). */
  mustAllBeClosed(): void {
    for (const { record } of this.#open.used()) {
      const who = this.#whoHas(record);
      throw new CatalogError('BUSY', `${specOf(record)} is open; a check needs all clients disconnected${who}`);
    }
  }

  /** The clients that have the VDI of this name open through daemons of this machine, as far as that is known. */
  usersHere({ vid, name }: VdiRecord): readonly string[] {
    const uses = this.#inUse.of(name, '').filter(({ lostAt }) => lostAt === null);
    if (uses.length === 0 && this.#open.isUsed(vid)) return ['a command through this daemon'];
    return uses.map(({ client }) => client);
  }

  /** The connected clients, after a colon. Our own commands are not named. */
  #whoHas({ name, tag }: VdiRecord): string {
    const uses = this.#inUse.of(name, tag).filter(({ lostAt }) => lostAt === null);
    if (uses.length === 0) return '';
    const named = uses.slice(0, MAX_NAMED).map(({ client, since }) => `${client}, since ${timeOf(since)}`);
    if (uses.length > MAX_NAMED) named.push(`and ${uses.length - MAX_NAMED} more`);
    return `: ${named.join('; ')}`;
  }
}

function openElsewhere(spec: string, { client }: ClientUse, what: string): CatalogError {
  return new CatalogError(
    'BUSY',
    `${spec} is open by ${client} through another daemon of this machine and cannot be ${what} now; disconnect first`,
  );
}

function timeOf(ms: number): string {
  return new Date(ms).toISOString().replace(/\.\d+/, '');
}
