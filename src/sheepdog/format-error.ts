/**
 * Bytes that are not what Sheepdog writes. The message says which, and what was found. Readers of this folder throw it; a store
 * says in its own errors what that means to its users.
 */
export class FormatError extends Error {
  constructor(message: string) {
    super(message);
    this.name = 'FormatError';
  }
}
