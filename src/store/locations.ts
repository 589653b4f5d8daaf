/**
 * The kinds of stores there are: how the location of one is written, what is known of it before it is open, and how it is
 * opened. No other file outside a store's own folder tells kinds apart. A store's code is loaded when one is opened, and not
 * before: most commands are done by a daemon and need none of it.
 */
import path from 'node:path';
import type { LocalStore } from './local/local-store.js';
import type { HolderRole } from './local/store-lock.js';
import type { SheepStore } from './sheep/sheep-store.js';
import { clusterLocation, isClusterLocation } from './sheep/cluster-address.js';

/** Options that only some kinds of stores have. Whoever gives one opens the store itself: a daemon may serve it without. */
export interface StoreOptions {
  /** Read zeros in place of objects that the store has lost, and write nothing. */
  readonly missing?: 'zero';
}

export interface OpenOptions {
  /** Told what an operator should know and no caller waits for. */
  readonly log?: (line: string, details?: object) => void;
  /** What this process is, for others who find the store taken. */
  readonly role: HolderRole;
  /** Whether a store may be made where there is none. */
  readonly mayCreate: boolean;
  /** Files to keep open at most; undefined: what the limit of the process allows. */
  readonly maxDescriptors?: number;
  /** How long, in milliseconds, requests are repeated while the store cannot be reached. */
  readonly retryMs?: number;
  /** Aborted when nobody waits for a remote store any more: all that is asked of it fails then. */
  readonly signal?: AbortSignal;
  /** Where this machine remembers the clients of stores that have no directory of their own here. */
  readonly stateDirectory: string;
  /** Whether that directory is out of reach at the moment. */
  readonly isStateOutOfReach: () => boolean;
  readonly store?: StoreOptions;
}

export type AnyStore = LocalStore | SheepStore;

export interface StoreKind {
  /** Also the prefix of a PLACE on the command line, before a colon. */
  readonly name: string;
  /** For help: what a location is. */
  readonly syntax: string;
  isLocation(location: string): boolean;
  /** The location that somebody means by `text`. Errors: StoreError ADDRESS. */
  parse(text: string): string;
  /**
   * The directory on this machine in which all of the store is, and which one process at a time has. Undefined: the store is
   * elsewhere, others use it at the same time, and it may not answer.
   */
  directoryOf(location: string): string | undefined;
  /** The object size of new VDIs is the store's own affair, and not known before it is open. */
  readonly hasOwnObjectSize: boolean;
  /** A tag that is a number would be taken for something else by other tools of the store. */
  readonly takesNumbersForIds: boolean;
  /** Which of StoreOptions it has. */
  readonly options: readonly (keyof StoreOptions)[];
  /** Errors: StoreError. */
  open(location: string, options: OpenOptions): Promise<AnyStore>;
  /** Load what `open` needs. */
  load(): Promise<unknown>;
}

export const LOCAL: StoreKind = {
  name: 'local',
  syntax: 'DIR',
  isLocation: (location) => !isClusterLocation(location),
  parse: (text) => path.resolve(text),
  directoryOf: (location) => location,
  hasOwnObjectSize: false,
  takesNumbersForIds: false,
  options: [],
  load: () => import('./local/local-store.js'),
  async open(location, { log, role, mayCreate, maxDescriptors }) {
    const { LocalStore } = await import('./local/local-store.js');
    return LocalStore.open(location, { log, role, mayCreate, maxDescriptors });
  },
};

export const CLUSTER: StoreKind = {
  name: 'cluster',
  syntax: 'HOST[:PORT][,HOST[:PORT]...]',
  isLocation: isClusterLocation,
  parse: clusterLocation,
  directoryOf: () => undefined,
  hasOwnObjectSize: true,
  takesNumbersForIds: true,
  options: ['missing'],
  load: () => import('./sheep/sheep-store.js'),
  async open(location, { log, retryMs, signal, stateDirectory, isStateOutOfReach, store }) {
    const { SheepStore } = await import('./sheep/sheep-store.js');
    const { zerosForMissing } = await import('./sheep/zeros-for-missing.js');
    const options = { log, retryMs, signal, stateDirectory, isStateOutOfReach };
    return SheepStore.open(location, { ...options, ...(store?.missing === 'zero' && zerosForMissing(location)) });
  },
};

const KINDS: readonly StoreKind[] = [CLUSTER, LOCAL];

/** For help: what `parseLocation` takes. */
export const LOCATION_SYNTAX = `store directory, or ${CLUSTER.name}:${CLUSTER.syntax}`;

/** Of a location; anything that is no other kind's is a directory. */
export function kindOf(location: string): StoreKind {
  return KINDS.find((kind) => kind.isLocation(location)) ?? LOCAL;
}

export function directoryOf(location: string): string | undefined {
  return kindOf(location).directoryOf(location);
}

/** The location of a PLACE: KIND:TEXT, a location, or a directory. "./cluster:x" is a directory. Errors: StoreError ADDRESS. */
export function parseLocation(text: string): string {
  for (const { name, parse } of KINDS) if (text.startsWith(`${name}:`)) return parse(text.slice(name.length + 1));
  return kindOf(text).parse(text);
}
