/**
 * The default export, for clients that name none: the empty name "specifies the default export (if any)" (proto.md,
 * NBD_OPT_EXPORT_NAME, NBD_OPT_GO). There is one only if the operator has chosen it. A default derived from the disks that exist
 * would change with them, and a client that reconnects would write one disk's pages into another. The empty name is an alias:
 * access rules see the export's own name, and lists have it once. Owns the alias, and the messages for clients that may not
 * open it: they do not learn what it stands for.
 */
import { type Awaitable, ExportError, type ExportProvider, type Peer } from 'nbd-server-ts/block-device';

const UNNAMED = '';
/** The same for every client. The names of exports are only for clients that may list them. */
const NO_DEFAULT =
  'no export was named, and this server has no default export: name one (nbd-client -N NAME, nbd://HOST/NAME, qemu: ' +
  'export=NAME), or have the server started with one (its option "default")';

export class ExportsWithDefault implements ExportProvider {
  readonly #provider: ExportProvider;
  readonly #name: string | undefined;

  /** `name`: of the default export. Without it, a client that names no export gets an error that says how to. */
  constructor(provider: ExportProvider, name: string | undefined) {
    this.#provider = provider;
    this.#name = name;
  }

  list: ExportProvider['list'] = (peer) => this.#provider.list(peer);

  describe: ExportProvider['describe'] = (name, peer, contexts, context) =>
    this.#isUnnamed(name, peer)
      ? this.#default((real) => this.#provider.describe(real, peer, contexts, context))
      : this.#provider.describe(name, peer, contexts, context);

  open: ExportProvider['open'] = (name, peer, context) =>
    this.#isUnnamed(name, peer)
      ? this.#default((real) => this.#provider.open(real, peer, context))
      : this.#provider.open(name, peer, context);

  left(peer: Peer): Awaitable<void> {
    return this.#provider.left?.(peer);
  }

  /** Our own commands always name an export. */
  #isUnnamed(name: string, peer: Peer): boolean {
    return name === UNNAMED && peer.transport !== 'internal';
  }

  async #default<T>(ask: (name: string) => T): Promise<Awaited<T>> {
    if (this.#name === undefined) throw new ExportError('UNKNOWN', NO_DEFAULT);
    try {
      return await ask(this.#name);
    } catch (error) {
      // The messages of the access rules have the export's name, which this client must not learn.
      if (!(error instanceof ExportError) || (error.code !== 'POLICY' && error.code !== 'TLS_REQUIRED')) throw error;
      const words =
        error.code === 'POLICY'
          ? 'you are not allowed to open the default export'
          : 'TLS is needed for the default export';
      throw new ExportError(error.code, words, { cause: error.cause });
    }
  }
}

/** Why this export cannot be opened now, for the operator; undefined if it can be. Takes no snapshot for NAME@now. */
export async function whyNotOpen(provider: ExportProvider, name: string): Promise<string | undefined> {
  try {
    await provider.describe(name, { transport: 'internal', address: 'start' });
    return undefined;
  } catch (error) {
    if (!(error instanceof ExportError)) throw error;
    return error.message;
  }
}
