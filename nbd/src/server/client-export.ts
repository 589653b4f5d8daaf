/**
 * The export of one connection, from the provider's answer to the end. It owns the opened device and closes it exactly once;
 * it owns the provider's calls that took too long, and closes a device that arrives too late; and it reports errors of the
 * provider and the device that are bugs.
 */

import {
  ExportError,
  type Awaitable,
  type BlockDevice,
  type Ending,
  type ExportInfo,
  type ExportProvider,
  type OpenContext,
  type Peer,
} from '../block-device.js';
import type { ClientSignal } from './client-signal.js';
import type { Leftovers } from './leftovers.js';
import type { Limits } from './limits.js';
import type { ServerObserver } from './observer.js';
import { isPromise } from './requests-in-flight.js';
import { LONGEST_TIMER_MS } from './timers.js';

export interface OpenExport {
  readonly device: BlockDevice;
  readonly info: ExportInfo;
}

/** What the exports of all connections of a loop share. */
export interface ExportResources {
  readonly provider: ExportProvider;
  readonly observer: ServerObserver;
  readonly limits: Limits;
  readonly leftovers: Leftovers;
}

/** A call of the provider that is waited for; `release`: it is not any more, and is one of the leftovers. */
interface ProviderCall {
  readonly name: string;
  release: (() => void) | undefined;
  /** Resolves when it has settled, and what it has opened is closed. */
  readonly over: Promise<unknown>;
}

export class ClientExport {
  /** The opened export's own name; undefined while none is open. */
  name: string | undefined;
  /** The export that the client was refused last. */
  refused: string | undefined;
  /** See ExportInfo.countedAs; undefined while none is open. */
  countedAs: string | undefined;
  /** Called if the device takes so long to close that the connection should not count any more. */
  onStuckClose: () => void = () => undefined;

  readonly #connectionId: number;
  readonly #clientSignal: ClientSignal;
  readonly #resources: ExportResources;
  #device: BlockDevice | undefined;
  #call: ProviderCall | undefined;

  constructor(connectionId: number, clientSignal: ClientSignal, resources: ExportResources) {
    this.#connectionId = connectionId;
    this.#clientSignal = clientSignal;
    this.#resources = resources;
  }

  /** Why a client leaves that has no export; undefined if it was refused none. */
  get whyLeft(): string | undefined {
    const { refused } = this;
    return refused === undefined ? undefined : `the client left when it was refused ${JSON.stringify(refused)}`;
  }

  /** Errors: what the provider throws; ExportError FAILED: too many clients wait for it already. */
  describe(name: string, peer: Peer, contexts?: readonly string[]): ReturnType<ExportProvider['describe']> {
    this.#refuseIfStuck(name);
    return this.#waitFor(name, this.#resources.provider.describe(name, peer, contexts, this.#context));
  }

  /** Open an export; from then on `close` closes it. Errors: as for `describe`. */
  async open(name: string, peer: Peer): Promise<OpenExport> {
    this.#refuseIfStuck(name);
    const opening = this.#resources.provider.open(name, peer, this.#context);
    const { device, info } = await this.#waitFor(name, opening, (late) => this.#closeDevice(late.device, 'lost', name));
    this.#device = device;
    this.name = info.name;
    this.countedAs = info.countedAs ?? info.name;
    try {
      this.#refuseIfStuck(this.countedAs);
    } catch (error) {
      await this.close('lost');
      throw error;
    }
    return { device, info };
  }

  /** The call of the provider takes too long: nobody waits for it any more, and a device that it opens is closed at once. */
  giveUp(): void {
    const call = this.#call;
    if (call !== undefined && call.release === undefined) call.release = this.#resources.leftovers.add(call.name);
  }

  /** Close the device, if one is open. Never fails: an error of the device is reported. */
  async close(ending: Ending): Promise<void> {
    const device = this.#device;
    this.#device = undefined;
    if (device !== undefined) await this.#closeDevice(device, ending, this.countedAs ?? '');
    this.name = undefined;
    this.countedAs = undefined;
  }

  /** The connection of `peer` is over, or continues as another peer under TLS. Never fails: an error is reported. */
  async left(peer: Peer): Promise<void> {
    this.refused = undefined;
    // A device that arrives late is closed first.
    if (this.#call?.release !== undefined) void this.#call.over.then(() => this.#tellLeft(peer));
    else await this.#tellLeft(peer);
  }

  /** Report an error that is a bug of the provider or the device, and not work given up for a client that is gone. */
  unexpected(error: unknown): void {
    if (this.#clientSignal.isCauseOf(error)) return;
    this.#resources.observer.onDeviceError?.(error, { id: this.#connectionId, exportName: this.name });
  }

  get #context(): OpenContext {
    return { id: this.#connectionId, signal: this.#clientSignal.signal };
  }

  #refuseIfStuck(key: string): void {
    const refusal = this.#resources.leftovers.refusal(key);
    if (refusal !== undefined) throw new ExportError('FAILED', refusal);
  }

  /** `answer`, to which `undo` is done if it comes when nobody waits any more. */
  #waitFor<T>(name: string, answer: Awaitable<T>, undo?: (late: T) => Promise<void>): Awaitable<T> {
    if (!isPromise(answer)) return answer;
    const answered = Promise.resolve(answer);
    const over = answered.then(
      async (late) => {
        if (call.release !== undefined) await undo?.(late);
      },
      (error: unknown) => {
        if (call.release !== undefined) this.unexpected(error);
      },
    );
    const call: ProviderCall = { name, release: undefined, over };
    void over.then(() => call.release?.());
    this.#call = call;
    return answered.then((value) => {
      if (call.release !== undefined) throw new ExportError('FAILED', `${JSON.stringify(name)} was opened too late`);
      return value;
    });
  }

  #closeDevice(device: BlockDevice, ending: Ending, key: string): Promise<void> {
    return this.#finish(key, `the device of the export ${JSON.stringify(key)} has not closed`, () =>
      device.close(ending),
    );
  }

  #tellLeft(peer: Peer): Promise<void> {
    return this.#finish('', 'the exports have not answered left()', () => this.#resources.provider.left?.(peer));
  }

  /** Wait for `work`; if that takes too long, as `problem` says, the connection does not count any more. Never fails. */
  async #finish(key: string, problem: string, work: () => Awaitable<void>): Promise<void> {
    const { limits, leftovers } = this.#resources;
    const { openTimeoutMs } = limits;
    let release: (() => void) | undefined;
    let timer: NodeJS.Timeout | undefined;
    try {
      const answer = work();
      if (!isPromise(answer)) return;
      timer = setTimeout(
        () => {
          release = leftovers.add(key);
          this.unexpected(new Error(`${problem} within ${openTimeoutMs} ms`));
          this.onStuckClose();
        },
        Math.min(openTimeoutMs, LONGEST_TIMER_MS),
      ).unref();
      await answer;
    } catch (error) {
      this.unexpected(error);
    }
    clearTimeout(timer);
    release?.();
  }
}
