/**
 * The export of one connection, from the provider's answer to the end. It owns the opened device and closes it exactly once;
 * and it reports errors of the provider and the device that are bugs.
 */

import type { BlockDevice, Ending, ExportInfo, ExportProvider, Peer } from '../block-device.js';
import type { ServerObserver } from './observer.js';

export interface OpenExport {
  readonly device: BlockDevice;
  readonly info: ExportInfo;
}

export class ClientExport {
  /** The opened export's own name; undefined while none is open. */
  name: string | undefined;
  /** The export that the client was refused last. */
  refused: string | undefined;
  /** See ExportInfo.countedAs; undefined while none is open. */
  countedAs: string | undefined;

  readonly #connectionId: number;
  readonly #provider: ExportProvider;
  readonly #observer: ServerObserver;
  #device: BlockDevice | undefined;

  constructor(connectionId: number, provider: ExportProvider, observer: ServerObserver) {
    this.#connectionId = connectionId;
    this.#provider = provider;
    this.#observer = observer;
  }

  /** Why a client leaves that has no export; undefined if it was refused none. */
  get whyLeft(): string | undefined {
    const { refused } = this;
    return refused === undefined ? undefined : `the client left when it was refused ${JSON.stringify(refused)}`;
  }

  /** Open an export; from then on `close` closes it. Errors: what the provider throws. */
  async open(name: string, peer: Peer): Promise<OpenExport> {
    const { device, info } = await this.#provider.open(name, peer);
    this.#device = device;
    this.name = info.name;
    this.countedAs = info.countedAs ?? info.name;
    return { device, info };
  }

  /** Close the device, if one is open. Never fails: an error of the device is reported. */
  async close(ending: Ending): Promise<void> {
    const device = this.#device;
    this.#device = undefined;
    try {
      await device?.close(ending);
    } catch (error) {
      this.unexpected(error);
    }
    this.name = undefined;
    this.countedAs = undefined;
  }

  /** The connection of `peer` is over, or continues as another peer under TLS. Never fails: an error is reported. */
  async left(peer: Peer): Promise<void> {
    this.refused = undefined;
    try {
      await this.#provider.left?.(peer);
    } catch (error) {
      this.unexpected(error);
    }
  }

  /** Report an error that is a bug of the provider or the device. */
  unexpected(error: unknown): void {
    this.#observer.onDeviceError?.(error, { id: this.#connectionId, exportName: this.name });
  }
}
