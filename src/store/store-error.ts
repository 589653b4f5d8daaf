/** The error of every store, and its codes. Each code means the same in all of them. */
import type { VdiRecord } from './vdi-record.js';

export type StoreErrorCode =
  | 'NO_STORE'
  | 'NO_SPACE'
  | 'IO'
  | 'LOCKED'
  | 'FORMAT'
  | 'DAMAGED'
  | 'PERMISSION'
  | 'LIMIT'
  | 'CLOSED'
  | 'SLOW'
  /** The object is not there. */
  | 'GONE'
  /** The VDI has a new vid and a new map: decide again. */
  | 'MOVED'
  /** The object belongs to a snapshot by now. */
  | 'READONLY'
  /** The disk has become smaller, and what is asked for is not within it any more. A write gets NO_SPACE. */
  | 'BEHIND_END'
  /** Not what this store, or this version, can do. */
  | 'UNSUPPORTED'
  /** Where a store is was not said clearly. */
  | 'ADDRESS';

/** `message` is for the operator: it names files and nodes. */
export class StoreError extends Error {
  /** The message for clients of the disk, if they need more than the code to do something about the error. */
  readonly forClients: string | undefined;

  constructor(
    readonly code: StoreErrorCode,
    message: string,
    options?: ErrorOptions & { readonly forClients?: string },
  ) {
    super(message, options);
    this.name = 'StoreError';
    this.forClients = options?.forClients;
  }
}

/** Somebody else has shrunk the disk while it was in use. */
export function behindEndError({ name, size }: VdiRecord, code: 'BEHIND_END' | 'NO_SPACE'): StoreError {
  return new StoreError(code, `${name} was shrunk to ${size} bytes while it was in use, and this is behind its end`, {
    forClients: `the disk was shrunk to ${size} bytes while it was in use`,
  });
}
