/**
 * The exports of a store that is about to be opened: whoever asks waits until it is, or is told that it will not be. So a
 * server can take its addresses before anything is made. Owns the waiting; decides nothing.
 */
import { ExportError, type ExportProvider, type Peer } from 'nbd-server-ts/block-device';

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
    this.#opened.catch(() => undefined); // told to those who ask
  }

  open: ExportProvider['open'] = async (...of) => (await this.#opened).open(...of);
  describe: ExportProvider['describe'] = async (...of) => (await this.#opened).describe(...of);
  list: ExportProvider['list'] = async (...of) => (await this.#opened).list(...of);

  left(peer: Peer): void {
    this.#provider?.left?.(peer);
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
