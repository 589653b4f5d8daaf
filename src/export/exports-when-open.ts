/**
 * The exports of a store that is about to be opened: requests wait until it is open, or fail when it cannot be opened. So a server
 * can listen on its addresses before it creates anything. Owns only the waiting.
 */
import { type Awaitable, ExportError, type ExportProvider, type Peer } from 'nbd-server-ts/block-device';

export class ExportsWhenOpen implements ExportProvider {
  readonly #opened: Promise<ExportProvider>;
  #provider: ExportProvider | undefined;
  #resolve: (provider: ExportProvider) => void = () => undefined;
  #reject: (error: Error) => void = () => undefined;

  constructor() {
    this.#opened = new Promise((resolve, reject) => {
      this.#resolve = resolve;
      this.#reject = reject;
    });
    this.#opened.catch(() => undefined); // clients that ask get the error
  }

  open: ExportProvider['open'] = async (...of) => (await this.#opened).open(...of);
  describe: ExportProvider['describe'] = async (...of) => (await this.#opened).describe(...of);
  list: ExportProvider['list'] = async (...of) => (await this.#opened).list(...of);

  left(peer: Peer): Awaitable<void> {
    return this.#provider?.left?.(peer);
  }

  opened(provider: ExportProvider): void {
    this.#provider = provider;
    this.#resolve(provider);
  }

  /** The store will not be opened. */
  failed(): void {
    this.#reject(new ExportError('SHUTDOWN', 'the server could not be started'));
  }
}
