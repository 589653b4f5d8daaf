/**
 * `shared`: one device behind many connections, opened with the first and closed with the last. It owns the order of opening
 * and closing: never two at once, however connections come and go.
 */

import type { Awaitable, CompleteDevice, Ending } from './block-device.js';
import { checkedOpened } from './checked-device.js';
import type { AnyDevice } from './device.js';
import { DeviceHandle, sharedGeometry } from './device-handle.js';
import { warnOf } from './server/error-warnings.js';

/**
 * Opens the device called `name`: gives it, null or undefined if there is none, or an Error. `signal` is aborted when all
 * connections that waited for it have left.
 */
export type OpenShared = (
  name: string,
  about: { readonly signal: AbortSignal },
) => Awaitable<AnyDevice | Error | null | undefined>;

/**
 * What `shared` returns: a function that gives a connection its part of the device called `name`, or null if there is none.
 * The part is a whole device; its `close` must be called when the connection is over, which a server does. `signal`: the
 * connection's; when it is aborted the connection stops waiting. Errors: what opening fails with; the signal's reason.
 */
export type SharedDevices = (
  name?: string,
  about?: { readonly signal?: AbortSignal | undefined },
) => Promise<CompleteDevice | null>;

/**
 * Share devices: each name is opened with its first connection, and closed when the last one has left. Connections that come
 * while it is being opened wait for it; if it fails, it fails for all of them, and the next one tries again. A connection that
 * comes while it is being closed waits for that, and has it opened anew. `multiConn` is announced, unless the device says
 * otherwise. The device's `close` gets 'disconnect' if every connection since it was opened has ended so, else 'lost'.
 *
 * The result is an `exports` of createServer, can be called inside one, and in ExportProvider.open:
 *
 *     createServer({ exports: shared((name) => openImage(name)) })
 *
 * `shared(name, open)` is for one name only: all others give null. Who may open a device is not asked again for later
 * connections: check that before the call.
 */
export function shared(open: OpenShared): SharedDevices;
export function shared(name: string, open: OpenShared): SharedDevices;
export function shared(...given: [OpenShared] | [string, OpenShared]): SharedDevices {
  const [only, open] = given.length === 1 ? [undefined, given[0]] : given;
  if (typeof open !== 'function') throw new TypeError('shared takes a function that opens a device');
  if (only !== undefined && typeof only !== 'string') throw new TypeError('the name of a shared device is a string');
  const devices = new Map<string, SharedDevice>();
  return async (name = only ?? '', about = {}) => {
    if (only !== undefined && name !== only) return null;
    let device = devices.get(name);
    if (device === undefined) {
      device = new SharedDevice(name, open, () => devices.delete(name));
      devices.set(name, device);
    }
    return device.join(about.signal);
  };
}

/** A connection that waits for the device. */
interface Waiting {
  give(device: CompleteDevice | null): void;
  fail(error: Error): void;
}

/** The device of one name, from its first connection to its last. */
class SharedDevice {
  readonly #name: string;
  readonly #open: OpenShared;
  readonly #onUnused: () => void;
  readonly #waiting = new Set<Waiting>();
  /** Gives a connection its part; undefined while the device is not open. */
  #part: (() => CompleteDevice) | undefined;
  #parts = 0;
  /** The worst ending of the connections since the device was opened. */
  #ending: Ending = 'disconnect';
  /** It is being opened or closed: what comes now waits for the end of that. */
  #isBusy = false;
  /** Of the opening. */
  #controller: AbortController | undefined;

  /** `onUnused` is called when it is closed and nobody waits: it can be forgotten. */
  constructor(name: string, open: OpenShared, onUnused: () => void) {
    this.#name = name;
    this.#open = open;
    this.#onUnused = onUnused;
  }

  join(signal: AbortSignal | undefined): Promise<CompleteDevice | null> {
    return new Promise((resolve, reject) => {
      const stopWaiting = (): void => {
        this.#waiting.delete(waiting);
        reject(signal?.reason as Error);
        if (this.#waiting.size === 0) this.#controller?.abort(signal?.reason);
      };
      const waiting: Waiting = {
        give: (device) => {
          signal?.removeEventListener('abort', stopWaiting);
          resolve(device);
        },
        fail: (error) => {
          signal?.removeEventListener('abort', stopWaiting);
          reject(error);
        },
      };
      if (signal?.aborted === true) reject(signal.reason as Error);
      else this.#waiting.add(waiting);
      signal?.addEventListener('abort', stopWaiting, { once: true });
      this.#next();
    });
  }

  /** What follows when neither opening nor closing is under way. */
  #next(): void {
    if (this.#isBusy) return;
    if (this.#part !== undefined) this.#giveToAll(this.#part);
    else if (this.#waiting.size > 0) void this.#openIt();
    else this.#onUnused();
  }

  /** Never fails: those who wait get the error. */
  async #openIt(): Promise<void> {
    this.#isBusy = true;
    const controller = new AbortController();
    this.#controller = controller;
    let opened: CompleteDevice | undefined;
    try {
      const given = await this.#open(this.#name, { signal: controller.signal });
      if (given instanceof Error) throw given;
      if (given === null || given === undefined) this.#giveToAll(() => null);
      else {
        const complete = await checkedOpened(given, `the shared device ${JSON.stringify(this.#name)}`);
        const geometry = sharedGeometry(given, complete);
        this.#part = () => new DeviceHandle(complete, geometry, (ending) => this.#left(complete, ending));
        opened = complete;
      }
    } catch (error) {
      // Those who came after all others had left did not want it aborted: for them it is tried again.
      if (!controller.signal.aborted) for (const waiting of this.#take()) waiting.fail(error as Error);
    }
    this.#controller = undefined;
    if (opened !== undefined && this.#waiting.size === 0) {
      // Opened for nobody: all have left.
      await this.#close(opened).catch((error: unknown) => {
        warnOf(error, { source: 'device', method: 'close', exportName: this.#name, expected: false });
      });
      return;
    }
    this.#isBusy = false;
    this.#next();
  }

  #giveToAll(part: () => CompleteDevice | null): void {
    for (const waiting of this.#take()) {
      const given = part();
      if (given !== null) this.#parts++;
      waiting.give(given);
    }
  }

  #take(): Waiting[] {
    const all = [...this.#waiting];
    this.#waiting.clear();
    return all;
  }

  /** A connection has closed its part. Errors: those of the device's `close`. */
  async #left(device: CompleteDevice, ending: Ending): Promise<void> {
    if (ending === 'lost') this.#ending = 'lost';
    this.#parts--;
    if (this.#parts === 0) await this.#close(device);
  }

  async #close(device: CompleteDevice): Promise<void> {
    const ending = this.#ending;
    this.#isBusy = true;
    this.#part = undefined;
    this.#ending = 'disconnect';
    try {
      await device.close(ending);
    } finally {
      this.#isBusy = false;
      this.#next();
    }
  }
}
