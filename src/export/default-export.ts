/**
 * The export that a client gets who names none: the empty name, which "specifies the default export (if any)" (proto.md,
 * NBD_OPT_EXPORT_NAME, NBD_OPT_GO). There is one only if the operator has said which: one that followed from what there is
 * would change with it, and a client that connects again would write one disk's pages into another. It is another name for
 * that export, so access rules see the export's own name, and lists do not have it twice. Owns that name, and the words for
 * clients that may not have it: they do not learn what it stands for.
 */
import { ExportError, type ExportProvider, type Peer } from 'nbd-server-ts/block-device';

const UNNAMED = '';
/** The same for everybody: what there is, is told to those who may list it. */
const NO_DEFAULT =
  'no export was named, and this server has no default export: name one (nbd-client -N NAME, nbd://HOST/NAME, qemu: ' +
  'export=NAME), or have the server started with one (its option "default")';

export class ExportsWithDefault implements ExportProvider {
  readonly #provider: ExportProvider;
  readonly #name: string | undefined;

  /** `name`: of the default export; without one whoever names none is told the way. */
  constructor(provider: ExportProvider, name: string | undefined) {
    this.#provider = provider;
    this.#name = name;
  }

  list: ExportProvider['list'] = (peer) => this.#provider.list(peer);

  describe: ExportProvider['describe'] = (name, peer, contexts) =>
    this.#isUnnamed(name, peer)
      ? this.#default((real) => this.#provider.describe(real, peer, contexts))
      : this.#provider.describe(name, peer, contexts);

  open: ExportProvider['open'] = (name, peer) =>
    this.#isUnnamed(name, peer)
      ? this.#default((real) => this.#provider.open(real, peer))
      : this.#provider.open(name, peer);

  left(peer: Peer): void {
    this.#provider.left?.(peer);
  }

  /** Commands of ours say what they mean. */
  #isUnnamed(name: string, peer: Peer): boolean {
    return name === UNNAMED && peer.transport !== 'internal';
  }

  async #default<T>(ask: (name: string) => T): Promise<Awaited<T>> {
    if (this.#name === undefined) throw new ExportError('UNKNOWN', NO_DEFAULT);
    try {
      return await ask(this.#name);
    } catch (error) {
      // The words of the access rules have the name.
      if (!(error instanceof ExportError) || (error.code !== 'POLICY' && error.code !== 'TLS_REQUIRED')) throw error;
      const words =
        error.code === 'POLICY'
          ? 'you are not allowed to open the default export'
          : 'TLS is needed for the default export';
      throw new ExportError(error.code, words, { cause: error.cause });
    }
  }
}

/** Why nobody could open this export now, for the operator; undefined if it can be opened. Of NAME@now nothing is taken. */
export async function whyNotOpen(provider: ExportProvider, name: string): Promise<string | undefined> {
  try {
    await provider.describe(name, { transport: 'internal', address: 'start' });
    return undefined;
  } catch (error) {
    if (!(error instanceof ExportError)) throw error;
    return error.message;
  }
}
