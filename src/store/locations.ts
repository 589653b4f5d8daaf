/**
 * The registry of the kinds of stores: how a location is written, what is known of a store before it is open, and how it is
 * opened. Other code asks a kind for its properties (`kindOf`, `directoryOf`); only an option that belongs to one kind
 * (--cluster, check --deep) names that kind. The code of a store is loaded when one is opened, never before: a daemon does the
 * work of most commands, which then need none of it.
 */
import path from 'node:path';
import type { HolderRole } from './local/store-lock.js';
import type { ObjectStore } from './object-store.js';
import { clusterLocation, isClusterLocation } from './sheep/cluster-address.js';

/** Options of some kinds of stores. A command with one of them opens the store itself: a daemon may serve it without. */
export interface StoreOptions {
  /** Read zeros in place of objects that the store has lost, and write nothing. */
  readonly missing?: 'zero';
}

export interface OpenOptions {
  /** For the operator: events that no caller waits for. */
  readonly log?: (line: string, details?: object) => void;
  /** The same, where nothing is wrong. */
  readonly note?: (line: string, details?: object) => void;
  /** What this process is: shown to other processes that find the store locked. */
  readonly role: HolderRole;
  /** Whether a store is created where there is none. */
  readonly mayCreate: boolean;
  /** At most this many files are kept open; undefined: as many as the process's limit allows. */
  readonly maxDescriptors?: number;
  /** How long, in milliseconds, requests are repeated while the store cannot be reached. */
  readonly retryMs?: number;
  /** Aborted when no caller waits for a remote store any more: all requests fail from then on. */
  readonly signal?: AbortSignal;
  /** Where this machine remembers the clients of stores that have no directory of their own here. */
  readonly stateDirectory: string;
  /** Whether that directory is out of reach at the moment. */
  readonly isStateOutOfReach: () => boolean;
  readonly store?: StoreOptions;
}

export interface StoreKind {
  /** Also the prefix of a PLACE on the command line, before a colon. */
  readonly name: string;
  /** For help: what a location is. */
  readonly syntax: string;
  isLocation(location: string): boolean;
  /** The location that `text`, as typed, stands for. Errors: StoreError ADDRESS. */
  parse(text: string): string;
  /**
   * The directory on this machine that holds all of the store, locked by one process at a time. Undefined: the store is
   * elsewhere, other clients use it at the same time, and it may not answer.
   */
  directoryOf(location: string): string | undefined;
  /** The store has an object size for new VDIs of its own, which is not known before it is open. */
  readonly hasOwnObjectSize: boolean;
  /** Other tools of the store take a tag that is a number for a snapshot's id. */
  readonly takesNumbersForIds: boolean;
  /** The StoreOptions that this kind has. */
  readonly options: readonly (keyof StoreOptions)[];
  /** Errors: StoreError. */
  open(location: string, options: OpenOptions): Promise<ObjectStore>;
  /** Loads the code that `open` needs. */
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
  async open(location, { log, note, role, mayCreate, maxDescriptors }) {
    const { LocalStore } = await import('./local/local-store.js');
    return LocalStore.open(location, { log, note, role, mayCreate, maxDescriptors });
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

/** LOCAL takes every text that no other kind takes, so it is the last one. */
const KINDS: readonly StoreKind[] = [CLUSTER, LOCAL];

/** For help: what `parseLocation` takes. */
export const LOCATION_SYNTAX = `store directory, or ${CLUSTER.name}:${CLUSTER.syntax}`;

/** The kind of a location. A location of no other kind is a directory. */
export function kindOf(location: string): StoreKind {
  return KINDS.find((kind) => kind.isLocation(location)) ?? LOCAL;
}

export function directoryOf(location: string): string | undefined {
  return kindOf(location).directoryOf(location);
}

/** The location of a PLACE: KIND:TEXT, a location, or a directory. "./cluster:x" is a directory. Errors: StoreError ADDRESS. */
export function parseLocation(text: string): string {
  for (const kind of KINDS) {
    if (text.startsWith(`${kind.name}:`)) return kind.parse(text.slice(kind.name.length + 1));
  }
  return kindOf(text).parse(text);
}
