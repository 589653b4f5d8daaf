/**
 * The export of one connection, from the provider's answer to the end. It owns the opened device and closes it exactly once;
 * and it reports errors of the provider and of closing.
 */

import type { Ending, ExportInfo, ExportProvider, Peer } from '../block-device.js';
import type { AnyDevice } from '../device.js';
import { checkedInfo } from './export-info.js';
import type { GuardedObserver } from './guarded-observer.js';
import type { ErrorContext } from './observer.js';
import { awaited, promiseOf } from './promised.js';

export interface OpenExport {
  readonly device: AnyDevice;
  readonly info: ExportInfo;
}

/** Which of the program's methods failed. */
type FailedMethod = Pick<ErrorContext, 'source' | 'method' | 'peer' | 'exportName'>;

export class ClientExport {
  /** The opened export's own name; undefined while none is open. */
  name: string | undefined;
  /** The export that the client was refused last. */
  refused: string | undefined;
  /** See ExportInfo.countedAs; undefined while none is open. */
  countedAs: string | undefined;

  readonly #connectionId: number;
  readonly #provider: ExportProvider<AnyDevice>;
  readonly #observer: GuardedObserver;
  #device: AnyDevice | undefined;
  #peer: Peer | undefined;

  constructor(connectionId: number, provider: ExportProvider<AnyDevice>, observer: GuardedObserver) {
    this.#connectionId = connectionId;
    this.#provider = provider;
    this.#observer = observer;
  }

  /** Why a client leaves that has no export; undefined if it was refused none. */
  get whyLeft(): string | undefined {
    const { refused } = this;
    return refused === undefined ? undefined : `the client left when it was refused ${JSON.stringify(refused)}`;
  }

  /**
   * Open an export; from then on `close` closes it. Errors: what the provider throws; Error if it gave something else than a
   * device and its description.
   */
  async open(name: string, peer: Peer): Promise<OpenExport> {
    this.#peer = peer;
    const opened: unknown = await awaited(this.#provider.open(name, peer));
    if (typeof opened !== 'object' || opened === null) throw new Error('open returned no device and info');
    const { device } = opened as { readonly device?: unknown };
    if (typeof device !== 'object' || device === null) throw new Error('open returned no device');
    // First: whatever is wrong with the rest, the device will be closed.
    this.#device = device as AnyDevice;
    const info = checkedInfo((opened as { readonly info?: unknown }).info);
    this.name = info.name;
    this.countedAs = info.countedAs ?? info.name;
    return { device: this.#device, info };
  }

  /** Close the device, if one is open. Never fails: an error of the device is reported. */
  async close(ending: Ending): Promise<void> {
    const device = this.#device;
    this.#device = undefined;
    try {
      await awaited(device?.close?.(ending));
    } catch (error) {
      this.failed(error, { source: 'device', method: 'close' });
    }
    this.name = undefined;
    this.countedAs = undefined;
  }

  /** The connection of `peer` is over, or continues as another peer under TLS. */
  left(peer: Peer): void {
    this.refused = undefined;
    const failed = (error: unknown): void => this.failed(error, { source: 'provider', method: 'left', peer });
    try {
      promiseOf(this.#provider.left?.(peer))?.then(undefined, failed);
    } catch (error) {
      failed(error);
    }
  }

  /** Report an error of the provider or the device. `isExpected`: the client was told what has happened. */
  failed(error: unknown, { source, method, peer, exportName }: FailedMethod, isExpected = false): void {
    this.#observer.onError(error, {
      ...{ id: this.#connectionId, peer: peer ?? this.#peer, exportName: exportName ?? this.name, source, method },
      expected: isExpected,
    });
  }
}
