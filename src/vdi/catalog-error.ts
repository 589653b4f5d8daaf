/** What can be wrong with a catalog request: one class, a stable code for machines, a message for people. */
export type CatalogErrorCode =
  | 'BAD_NAME'
  | 'BAD_SIZE'
  | 'BAD_TIME'
  | 'NO_VDI'
  | 'NO_TAG'
  /** A tag may say several snapshots. */
  | 'AMBIGUOUS'
  | 'EXISTS'
  | 'BUSY'
  | 'NEEDS_FORCE'
  | 'IS_SNAPSHOT'
  /** A command has begun to fill the VDI and not come to its end; or it is not this command's any more. */
  | 'UNFINISHED'
  | 'READ_ONLY'
  /** What was asked for was a moment that is gone. */
  | 'ENDED'
  /** Nobody has locked it; or somebody else than was said. */
  | 'NOT_LOCKED'
  /** Not of this kind of store. */
  | 'UNSUPPORTED'
  | 'LIMIT';

export class CatalogError extends Error {
  /** What NBD clients may be told of it, who may be strangers; undefined: by the code alone. */
  readonly forClients: string | undefined;

  constructor(
    readonly code: CatalogErrorCode,
    message: string,
    options?: { readonly forClients?: string },
  ) {
    super(message);
    this.name = 'CatalogError';
    this.forClients = options?.forClients;
  }
}
