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
  /** The object belongs to a snapshot now. */
  | 'READONLY'
  /** The disk has become smaller, and the requested range is no longer within it. A write gets NO_SPACE. */
  | 'BEHIND_END'
  /** This store, or this version, cannot do it. */
  | 'UNSUPPORTED'
  /** The location of a store is not valid. */
  | 'ADDRESS';

/** `message` is for the operator: it names files and nodes. */
export class StoreError extends Error {
  /** A message for the client that uses the disk, where it can act on more than the code. */
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

/** Another client has shrunk the disk while it was in use. */
export function behindEndError({ name, size }: VdiRecord, code: 'BEHIND_END' | 'NO_SPACE'): StoreError {
  return new StoreError(code, `${name} was shrunk to ${size} bytes while it was in use, and this is behind its end`, {
    forClients: `the disk was shrunk to ${size} bytes while it was in use`,
  });
}
