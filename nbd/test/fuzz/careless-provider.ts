/**
 * A provider around the tests' one that is as careless as programs are: by the seed its answers are thenables that settle
 * twice, promises that settle only when the client has gone, counts that are too small, nonsense, or exceptions; and so are
 * those of its devices and of the observer. It owns no data: what a device has done it has done.
 */

import { DeviceError, type BlockDevice, type ServerObserver } from '../../src/index.js';
import type { TestProvider } from '../test-device.js';
import type { Random } from './random.js';

const METHODS = ['read', 'write', 'flush', 'trim', 'zero', 'cache', 'extents'] as const;
const CALLBACKS = [
  ...(['onConnectionOpen', 'onConnectionClose', 'onConnectionRefused', 'onRequest', 'onRequestDone'] as const),
  'onError' as const,
];

/** Forms of #mangled that keep the answer. */
const LATER_FORMS = 4;

export class Careless {
  random: Random | undefined;
  /** Promises that settle only when they are released. */
  readonly #stuck: (() => void)[] = [];

  /** Settle what does not settle by itself. */
  release(): void {
    for (const settle of this.#stuck.splice(0)) settle();
  }

  /** `provider`, whose answers are mangled. */
  provider(provider: TestProvider): unknown {
    const nonsense = [undefined, null, 5, 'disk', {}, { device: {}, info: {} }, { then: () => this.#boom() }];
    const sometimes = (answer: () => unknown): unknown => {
      if (this.#oneIn(40)) return this.random?.pick(nonsense);
      if (this.#oneIn(40)) return this.#boom();
      const given = answer();
      return this.#oneIn(10) ? this.#mangled(given, LATER_FORMS) : given;
    };
    return {
      list: () => sometimes(() => (this.#oneIn(10) ? [undefined, ...provider.list(), { name: 5 }] : provider.list())),
      describe: (...given: Parameters<TestProvider['describe']>) => sometimes(() => provider.describe(...given)),
      open: (...given: Parameters<TestProvider['open']>) =>
        sometimes(async () => {
          const { device, info } = await provider.open(...given);
          return { device: this.#device(device), info };
        }),
      left: (...given: Parameters<TestProvider['left']>) => {
        provider.left(...given);
        if (this.#oneIn(20)) this.#boom();
        return this.#oneIn(20) ? Promise.reject(new Error('careless')) : undefined;
      },
    };
  }

  /** An observer whose callbacks fail in every way. */
  observer(): ServerObserver {
    const fail = (): unknown => {
      if (this.#oneIn(4)) return this.#boom();
      return this.#oneIn(2) ? this.#mangled(Promise.reject(new Error('careless'))) : undefined;
    };
    return Object.fromEntries(CALLBACKS.map((name) => [name, fail]));
  }

  /** The device; its methods answer carelessly. */
  #device(device: BlockDevice): unknown {
    const careless: Record<string, unknown> = {
      geometry: device.geometry,
      isHole: (offset: number, length: number) => {
        if (this.#oneIn(20)) return this.#boom();
        if (this.#oneIn(20)) return Promise.reject(new Error('careless'));
        return device.isHole?.(offset, length);
      },
      close: (ending: 'lost' | 'disconnect') => this.#mangled(device.close(ending)),
    };
    for (const name of METHODS) {
      const method = (device[name] as ((...given: unknown[]) => unknown) | undefined)?.bind(device);
      careless[name] = (...given: unknown[]) => {
        const answer = method?.(...given);
        return this.#oneIn(3) ? this.#mangled(answer) : answer;
      };
    }
    return careless;
  }

  /** `answer` in another form. It does not come before the device has done its work. */
  #mangled(answer: unknown, most = answer instanceof Promise ? LATER_FORMS + 1 : 10): unknown {
    const { random } = this;
    if (random === undefined) return answer;
    const done = Promise.resolve(answer);
    done.catch(() => undefined);
    const twice = {
      then: (resolve: (value: unknown) => void, reject: (error: unknown) => void) => {
        done.then(
          (value) => {
            resolve(value);
            resolve(value);
            reject(new Error('careless'));
          },
          (error: unknown) => {
            reject(error);
            reject(error);
            resolve(undefined);
          },
        );
        if (random.oneIn(3)) setImmediate(() => void this.random);
      },
    };
    switch (random.below(most)) {
      case 0:
        return twice;
      case 1:
        return Object.assign(() => undefined, twice);
      case 2:
        // A promise with a then of its own; its own state is of no importance.
        return Object.assign(Promise.resolve(), twice);
      case 3:
        return new Promise((resolve, reject) => {
          this.#stuck.push(() => void done.then(resolve, reject));
        });
      case 4:
        return done.then(() => random.pick([0, 1, 4096, NaN, {}, { bytesRead: 1 }, Buffer.alloc(4), undefined]));
      case 5:
        return this.#boom();
      case 6:
        return { then: () => this.#boom() };
      case 7:
        return Object.defineProperty({}, 'then', { get: () => this.#boom() });
      case 8:
        return new Proxy({}, { get: () => this.#boom(), has: () => this.#boom(), getPrototypeOf: () => this.#boom() });
      default:
        return random.pick([0, 1, 512, 4096, NaN, true, '5', {}, { bytesWritten: 1 }, [], Buffer.alloc(512)]);
    }
  }

  #boom(): never {
    const { random } = this;
    const error = new DeviceError('EIO', 'careless');
    const odd = [undefined, null, 'text', 5, new TypeError('careless'), Object.assign(error, { code: 'constructor' })];
    odd.push(
      new Proxy(new Error('careless'), { get: () => undefined }),
      Object.assign(new Error('x'), { code: 'ENOSPC' }),
    );
    // eslint-disable-next-line @typescript-eslint/only-throw-error -- as programs do
    throw random === undefined ? error : random.pick(odd);
  }

  #oneIn(n: number): boolean {
    return this.random?.oneIn(n) ?? false;
  }
}
