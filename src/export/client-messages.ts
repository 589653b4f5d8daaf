/**
 * The error messages that NBD clients get. Messages of the catalog and of the store are for the operator: they name directories,
 * files, nodes, other clients and commands to type. An NBD client may be a stranger's guest, so it gets only what concerns its
 * disk; the cause stays with the error, for the log. Our own commands, which come through the control socket, get everything.
 *
 * Owns these messages. An error that is not known to be harmless becomes "the server failed".
 */
import { ExportError, type Awaitable, type ExportProvider, type Peer } from 'nbd-server-ts/block-device';
import { CatalogError, type CatalogErrorCode } from '../vdi/catalog-error.js';

const SEE_LOG = "the server's log has the cause";

/** Errors whose messages speak only of the name that the client gave, and of its own temporary snapshot. */
const OF_THE_NAME: ReadonlySet<CatalogErrorCode> = new Set(['BAD_NAME', 'ENDED', 'LIMIT']);

const OF_CATALOG: Readonly<Partial<Record<CatalogErrorCode, string>>> = {
  NO_VDI: 'there is no such VDI',
  NO_TAG: 'there is no such snapshot',
  UNFINISHED: 'it is unfinished: the command that fills it has not finished',
  READ_ONLY: 'the server cannot write to its store',
  BUSY: 'it is in use',
};

/** By the codes of StoreError (src/store/store-error.ts). */
const OF_STORE: Readonly<Record<string, string>> = {
  NO_SPACE: 'no space left on the server',
  BEHIND_END: 'the disk was shrunk while it was in use',
  PERMISSION: 'not permitted on this disk',
  READONLY: 'not permitted on this disk',
  IO: `the server's storage failed; ${SEE_LOG}`,
  DAMAGED: `a part of the disk is damaged or missing on the server; ${SEE_LOG}`,
  GONE: `a part of the disk is damaged or missing on the server; ${SEE_LOG}`,
  LOCKED: 'it is locked by another client',
  LIMIT: `a limit of the server is reached; ${SEE_LOG}`,
  CLOSED: 'it was closed by the server',
  SLOW: 'this needs data to be copied or written',
  UNSUPPORTED: 'the server cannot do that with this disk',
};

/** The message for a client, for any error. */
export function clientMessage(error: unknown): string {
  if (error instanceof CatalogError) {
    return wordsOf(error) ?? OF_CATALOG[error.code] ?? `refused; ${SEE_LOG}`;
  }
  const { name, code, forClients } = (error ?? {}) as {
    readonly name?: string;
    readonly code?: string;
    readonly forClients?: string;
  };
  // Node's own errors have codes too.
  const told = name === 'StoreError' ? (forClients ?? OF_STORE[code ?? '']) : undefined;
  return told ?? `the server failed; ${SEE_LOG}`;
}

/** The complete message for clients, which includes the name, if there is one. */
function wordsOf(error: CatalogError): string | undefined {
  return error.forClients ?? (OF_THE_NAME.has(error.code) ? error.message : undefined);
}

/** Exports whose errors have messages for clients. */
export class ExportsWithClientMessages implements ExportProvider {
  readonly #provider: ExportProvider;

  constructor(provider: ExportProvider) {
    this.#provider = provider;
  }

  list: ExportProvider['list'] = async (...of) => {
    try {
      return await this.#provider.list(...of);
    } catch (error) {
      if (error instanceof ExportError) throw error;
      throw new ExportError('FAILED', `the exports cannot be listed: ${clientMessage(error)}`, { cause: error });
    }
  };

  describe: ExportProvider['describe'] = (...of) => inWords(of[0], of[1], () => this.#provider.describe(...of));

  open: ExportProvider['open'] = (...of) => inWords(of[0], of[1], () => this.#provider.open(...of));

  left(peer: Peer): Awaitable<void> {
    return this.#provider.left?.(peer);
  }
}

async function inWords<T>(exportName: string, peer: Peer, ask: () => Awaitable<T>): Promise<T> {
  try {
    return await ask();
  } catch (error) {
    // An error without a cause comes from the access rules, or from a server that stops: its message is for clients.
    if (peer.transport === 'internal' || !(error instanceof ExportError) || error.cause === undefined) throw error;
    const { cause } = error;
    const isWhole = cause instanceof CatalogError && wordsOf(cause) !== undefined;
    const words = clientMessage(cause);
    throw new ExportError(error.code, isWhole ? words : `${words}: ${JSON.stringify(exportName)}`, { cause: error });
  }
}
