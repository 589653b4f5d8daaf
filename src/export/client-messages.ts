/**
 * What clients are told when something fails. Messages of the catalog and of the store are for the operator: they name
 * directories, files, nodes, other clients and commands to type. Whoever is at the other end of an NBD connection may be a
 * guest of somebody else, and gets what concerns its disk; the cause stays with the error, for the log. Commands of ours, which
 * come through the control socket, get everything.
 *
 * Owns the words. What is not known to be harmless is not told.
 */
import { ExportError, type Awaitable, type ExportProvider, type Peer } from 'nbd-server-ts/block-device';
import { CatalogError, type CatalogErrorCode } from '../vdi/catalog-error.js';

const SEE_LOG = "the server's log has the cause";

/** These messages speak of the name that the client gave and of what was its own, and of nothing else. */
const OF_THE_NAME: ReadonlySet<CatalogErrorCode> = new Set(['BAD_NAME', 'ENDED', 'LIMIT']);

const OF_CATALOG: Readonly<Partial<Record<CatalogErrorCode, string>>> = {
  NO_VDI: 'there is no such VDI',
  NO_TAG: 'there is no such snapshot',
  UNFINISHED: 'it is unfinished: what is to fill it has not come to its end',
  READ_ONLY: 'the server cannot write to its store',
  BUSY: 'it is in use',
};

/** By the codes of StoreError (src/store/object-store.ts). */
const OF_STORE: Readonly<Record<string, string>> = {
  NO_SPACE: 'no space left on the server',
  BEHIND_END: 'the disk was shrunk while it was in use',
  PERMISSION: 'not permitted on this disk',
  READONLY: 'not permitted on this disk',
  IO: `the server's storage failed; ${SEE_LOG}`,
  DAMAGED: `a part of the disk is damaged or missing on the server; ${SEE_LOG}`,
  GONE: `a part of the disk is damaged or missing on the server; ${SEE_LOG}`,
  LOCKED: 'it is locked by somebody else',
  LIMIT: `the server can have no more of these; ${SEE_LOG}`,
  CLOSED: 'it was closed by the server',
  SLOW: 'this needs data to be copied or written',
  UNSUPPORTED: 'the server cannot do that with this disk',
};

/** For a client, whatever has failed. */
export function clientMessage(error: unknown): string {
  if (error instanceof CatalogError) {
    return wordsOf(error) ?? OF_CATALOG[error.code] ?? `refused; ${SEE_LOG}`;
  }
  const { name, code, forClients } = (error ?? {}) as {
    readonly name?: string;
    readonly code?: string;
    readonly forClients?: string;
  };
  // What Node throws has codes, too.
  const told = name === 'StoreError' ? (forClients ?? OF_STORE[code ?? '']) : undefined;
  return told ?? `the server failed; ${SEE_LOG}`;
}

/** Those that say all, the name as well; if there are any. */
function wordsOf(error: CatalogError): string | undefined {
  return error.forClients ?? (OF_THE_NAME.has(error.code) ? error.message : undefined);
}

/** Exports whose refusals are in words for clients. */
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

  left(peer: Peer): void {
    this.#provider.left?.(peer);
  }
}

async function inWords<T>(exportName: string, peer: Peer, ask: () => Awaitable<T>): Promise<T> {
  try {
    return await ask();
  } catch (error) {
    // Without a cause the words are those of the access rules, or of a server that stops.
    if (peer.transport === 'internal' || !(error instanceof ExportError) || error.cause === undefined) throw error;
    const { cause } = error;
    const isWhole = cause instanceof CatalogError && wordsOf(cause) !== undefined;
    const words = clientMessage(cause);
    throw new ExportError(error.code, isWhole ? words : `${words}: ${JSON.stringify(exportName)}`, { cause: error });
  }
}
