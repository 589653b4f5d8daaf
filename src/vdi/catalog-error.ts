/** Why a catalog operation was refused: one class, with a stable code for programs and a message for people. */
export type CatalogErrorCode =
  | 'BAD_NAME'
  | 'BAD_SIZE'
  | 'BAD_TIME'
  | 'NO_VDI'
  | 'NO_TAG'
  /** The tag may mean several snapshots. */
  | 'AMBIGUOUS'
  | 'EXISTS'
  | 'BUSY'
  | 'NEEDS_FORCE'
  | 'IS_SNAPSHOT'
  /** A command has begun to fill the VDI and not finished, or the VDI is not this command's any more. */
  | 'UNFINISHED'
  | 'READ_ONLY'
  /** The temporary snapshot, or the base that it was compared with, is gone. */
  | 'ENDED'
  /** The VDI is not locked, or not by the given holder. */
  | 'NOT_LOCKED'
  /** Not in this kind of store. */
  | 'UNSUPPORTED'
  | 'LIMIT';

export class CatalogError extends Error {
  /** The message for NBD clients, who may be strangers; undefined: chosen by the code alone. */
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
