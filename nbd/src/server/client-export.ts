/**
 * The export of one connection, from the provider's answer to the end. It owns the opened device and closes it exactly once;
 * it owns the provider's calls that took too long, and closes a device that arrives too late; and it reports errors of the
 * provider and of closing.
 */

import {
  ExportError,
  type Awaitable,
  type Ending,
  type ExportInfo,
  type ExportProvider,
  type OpenContext,
  type Peer,
} from '../block-device.js';
import type { AnyDevice } from '../device.js';
import type { ClientSignal } from './client-signal.js';
import { checkedInfo } from './export-info.js';
import type { GuardedObserver } from './guarded-observer.js';
import { LISTS, type Leftovers } from './leftovers.js';
import { MAX_TIMER_MS, orNever, type Limits } from './limits.js';
import type { ErrorContext } from './observer.js';
import { promiseOf } from '../promised.js';

export interface OpenExport {
  readonly device: AnyDevice;
  readonly info: ExportInfo;
}

/** What the exports of all connections of a loop share. */
export interface ExportResources {
  readonly provider: ExportProvider<AnyDevice>;
  readonly observer: GuardedObserver;
  readonly limits: Limits;
  readonly leftovers: Leftovers;
}

/** A call of the provider. */
interface ProviderCall {
  readonly name: string;
  /** Nobody waits for it any more: it is one of the leftovers until this is called. */
  release: (() => void) | undefined;
  /** Resolves when it has settled, and what it has opened too late is closed. */
  readonly over: Promise<unknown>;
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
  /** Called if the device takes so long to close that the connection should not count any more. */
  onStuckClose: () => void = () => undefined;

  readonly #connectionId: number;
  readonly #clientSignal: ClientSignal;
  readonly #resources: ExportResources;
  #device: AnyDevice | undefined;
  #peer: Peer | undefined;
  /** The one that has not settled. */
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

  /** What the provider's `list` answers. Errors: as for `describe`. */
  list(peer: Peer): unknown {
    this.#peer = peer;
    this.#refuseIfStuck(LISTS, 'list');
    return this.#waitFor(LISTS, 'list', this.#resources.provider.list(peer));
  }

  /** What the provider's `describe` answers. Errors: what it throws; ExportError POLICY: too many calls wait for it already. */
  describe(name: string, peer: Peer, contexts?: readonly string[]): unknown {
    this.#peer = peer;
    this.#refuseIfStuck(name, 'describe');
    const asked = this.#resources.provider.describe(name, peer, contexts, this.#context);
    return this.#waitFor(name, 'describe', asked);
  }

  /**
   * Open an export; from then on `close` closes it. Errors: what the provider throws; Error if it gave something else than a
   * device and its description; ExportError POLICY: too many calls wait for the export already.
   */
  async open(name: string, peer: Peer): Promise<OpenExport> {
    this.#peer = peer;
    this.#refuseIfStuck(name, 'open');
    const opening: unknown = this.#resources.provider.open(name, peer, this.#context);
    const closeLate = async (late: unknown): Promise<void> => {
      const device = deviceOf(late);
      if (device !== undefined) await this.#closeDevice(device, 'lost', name);
    };
    const opened: unknown = await this.#waitFor(name, 'open', opening, closeLate);
    if (typeof opened !== 'object' || opened === null) throw new Error('open returned no device and info');
    const device = deviceOf(opened);
    if (device === undefined) throw new Error('open returned no device');
    // First: whatever is wrong with the rest, the device will be closed.
    this.#device = device;
    const info = checkedInfo((opened as { readonly info?: unknown }).info);
    this.name = info.name;
    this.countedAs = info.countedAs ?? info.name;
    // Known by this key only now.
    this.#refuseIfStuck(this.countedAs, 'open');
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

  /**
   * Report an error of the provider or the device, unless it is work given up for a client that is gone. `isExpected`: the
   * client was told what has happened.
   */
  failed(error: unknown, { source, method, peer, exportName }: FailedMethod, isExpected = false): void {
    if (this.#clientSignal.isCauseOf(error)) return;
    this.#resources.observer.onError(error, {
      ...{ id: this.#connectionId, peer: peer ?? this.#peer, exportName: exportName ?? this.name, source, method },
      expected: isExpected,
    });
  }

  get #context(): OpenContext {
    return { id: this.#connectionId, signal: this.#clientSignal.signal };
  }

  #refuseIfStuck(key: string, method: 'list' | 'describe' | 'open'): void {
    const refusal = this.#resources.leftovers.refusal(key);
    if (refusal === undefined) return;
    const error = new ExportError('POLICY', refusal);
    // A refusal is no error to be reported, but this is one of the program.
    this.failed(error, { source: 'server', method, ...(key !== LISTS && { exportName: key }) }, true);
    throw error;
  }

  /** `answer` of the provider; `undo` is done to one that comes when nobody waits any more. */
  #waitFor(name: string, method: string, answer: unknown, undo?: (late: unknown) => Promise<void>): unknown {
    const answered = promiseOf(answer);
    if (answered === undefined) return answer;
    const over = answered.then(
      async (late) => {
        if (call.release !== undefined) await undo?.(late);
      },
      (error: unknown) => {
        if (call.release === undefined) return;
        this.failed(error, { source: 'provider', method, ...(name !== LISTS && { exportName: name }) });
      },
    );
    const call: ProviderCall = { name, release: undefined, over };
    void over.then(() => {
      call.release?.();
      if (this.#call === call) this.#call = undefined;
    });
    this.#call = call;
    return answered.then((value) => {
      if (call.release !== undefined) throw new Error(`${method} has answered too late`);
      return value;
    });
  }

  #closeDevice(device: AnyDevice, ending: Ending, key: string): Promise<void> {
    const method = { source: 'device', method: 'close', exportName: key } as const;
    return this.#finish(key, method, 'it has not closed', () => device.close?.(ending));
  }

  #tellLeft(peer: Peer): Promise<void> {
    const method = { source: 'provider', method: 'left' } as const;
    return this.#finish('', method, 'left() has not answered', () => this.#resources.provider.left?.(peer));
  }

  /** Wait for `work`; if that takes too long, as `problem` says, the connection does not count any more. Never fails. */
  async #finish(key: string, method: FailedMethod, problem: string, work: () => Awaitable<void>): Promise<void> {
    const { limits, leftovers } = this.#resources;
    const { openTimeoutMs } = limits;
    let release: (() => void) | undefined;
    let timer: NodeJS.Timeout | undefined;
    try {
      const answer = promiseOf(work());
      if (answer === undefined) return;
      timer = setTimeout(
        () => {
          release = leftovers.add(key);
          this.failed(new Error(`${problem} within ${openTimeoutMs} ms`), method);
          this.onStuckClose();
        },
        Math.min(orNever(openTimeoutMs), MAX_TIMER_MS),
      ).unref();
      await answer;
    } catch (error) {
      this.failed(error, method);
    }
    clearTimeout(timer);
    release?.();
  }
}

/** The device in what the provider's `open` gave, if it is one. */
function deviceOf(opened: unknown): AnyDevice | undefined {
  if (typeof opened !== 'object' || opened === null) return undefined;
  const { device } = opened as { readonly device?: unknown };
  return typeof device === 'object' && device !== null ? (device as AnyDevice) : undefined;
}
