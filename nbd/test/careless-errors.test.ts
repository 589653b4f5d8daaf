/** Errors of devices and providers that have an unknown code, or fields of the wrong type: what the client is told. */

import { inspect } from 'node:util';
import { describe, expect, test, vi } from 'vitest';
import {
  DeviceError,
  ExportError,
  HandOverError,
  ListenError,
  NbdClientError,
  type Device,
  type DeviceErrorCode,
} from '../src/index.js';
import { failureOf } from '../src/server/failure.js';
import { CMD, CMD_FLAG, NBD_ERRNO, OPT, REP } from '../src/protocol/wire.js';
import { careless, INFO, only, strays, turns } from './careless.js';
import { errorOf, infoQuery } from './raw-client.js';

const ASKED = { type: CMD.WRITE, flags: 0, offset: 4096, length: 4096 };
const ODD_CODES = ['EROFS', '', 'constructor', 'toString', '__proto__', 'hasOwnProperty', 5, null, undefined, {}];

/** A DeviceError whose fields were changed once it was made. */
function changed(fields: object): DeviceError {
  return Object.defineProperties(new DeviceError('EIO', 'as told'), Object.getOwnPropertyDescriptors(fields));
}

describe('when it is made', () => {
  for (const code of ODD_CODES) {
    test(`an error with the code ${inspect(code)} is refused, and the message has the codes that there are`, () => {
      expect(() => new DeviceError(code as DeviceErrorCode, 'odd')).toThrow(/^DeviceError: .*not a code; .*ENOSPC/);
      expect(() => new DeviceError(code as DeviceErrorCode, 'odd')).toThrow(TypeError);
      expect(() => new ExportError(code as 'FAILED', 'odd')).toThrow(/^ExportError: .*not a code; .*TLS_REQUIRED/);
      expect(() => new ExportError(code as 'FAILED', 'odd')).toThrow(TypeError);
    });
  }
});

describe('on the wire', () => {
  for (const code of ODD_CODES) {
    test(`the code ${inspect(code)} is EIO, and reported as a bug`, () => {
      expect(failureOf(changed({ code }), ASKED)).toMatchObject({ errno: NBD_ERRNO.EIO, isExpected: false });
    });
  }

  test('a message, offset or code that is not of its type, or a getter that throws, breaks nothing', () => {
    const failing = (name: string): object => Object.defineProperty({}, name, { get: () => expect.fail('read') });
    for (const message of [5, null, undefined, {}, Symbol('text')]) {
      const failure = failureOf(changed({ message }), ASKED);
      expect(failure).toMatchObject({ errno: NBD_ERRNO.EIO, message: 'internal error of the export' });
    }
    for (const offset of [NaN, -1, 4096.5, 4096n, '4096', {}, Infinity, 8192]) {
      expect(failureOf(changed({ offset }), ASKED).offset).toBeUndefined();
    }
    expect(failureOf(changed({ offset: 5000 }), ASKED).offset).toBe(5000);
    for (const name of ['code', 'message', 'offset']) {
      expect(failureOf(changed(failing(name)), ASKED)).toMatchObject({ errno: NBD_ERRNO.EIO, isExpected: false });
    }
    const traps = {
      get: () => expect.fail('get'),
      has: () => expect.fail('has'),
      getPrototypeOf: () => expect.fail('p'),
    };
    expect(failureOf(new Proxy({}, traps), ASKED).errno).toBe(NBD_ERRNO.EIO);
    expect(failureOf(new Proxy(new Error('x'), traps), ASKED).errno).toBe(NBD_ERRNO.EIO);
  });

  for (const replies of ['simple', 'structured', 'extended'] as const) {
    test(`with ${replies} replies every command with such an error fails, and the client goes on`, async () => {
      const uncaught = strays();
      const fail = (): never => {
        throw changed({ code: 'EROFS' });
      };
      const device = { size: 2 ** 20, read: fail, write: fail, flush: fail, trim: fail, zero: fail, cache: fail };
      for (const kind of [device, inPromises(device)]) {
        const { client, errors } = await careless(only(kind));
        const one = await client({ replies });
        const requests = [
          () => one.read(0, 512),
          () => one.write(0, Buffer.alloc(512)),
          () => one.flush(),
          () => one.trim(0, 512),
          () => one.zero(0, 512),
          () => one.cache(0, 512),
        ];
        for (const request of requests) await expect(request()).rejects.toMatchObject({ code: 'EIO' });
        expect(errors.map(({ context }) => context.expected)).toEqual(requests.map(() => false));
        await one.disconnect();
      }
      await turns();
      expect(uncaught).toEqual([]);
    });
  }

  test('a provider with such an error is answered UNKNOWN, whatever the code', async () => {
    const failures = [
      ...ODD_CODES.map((code) => Object.assign(new ExportError('POLICY', 'as told'), { code })),
      Object.assign(new ExportError('POLICY', 'as told'), { message: 5 }),
      Object.defineProperty(new ExportError('POLICY', 'as told'), 'code', { get: () => expect.fail('read') }),
    ];
    for (const failure of failures) {
      const fail = (): never => {
        throw failure;
      };
      const { raw, errors } = await careless({ list: fail, describe: fail, open: fail });
      const client = await raw();
      await client.greet();
      for (const option of [OPT.INFO, OPT.GO]) {
        expect((await client.option(option, infoQuery('disk'))).at(-1)?.type).toBe(REP.ERR_UNKNOWN);
      }
      expect((await client.option(OPT.LIST)).at(-1)?.type).toBe(REP.ERR_UNKNOWN);
      expect(errors.map(({ context }) => context.method)).toEqual(['describe', 'open', 'list']);
      client.vanish();
    }
  });

  test('UNKNOWN, POLICY, TLS_REQUIRED and SHUTDOWN are answers; only FAILED is reported', async () => {
    const types = {
      ...{ UNKNOWN: REP.ERR_UNKNOWN, POLICY: REP.ERR_POLICY, TLS_REQUIRED: REP.ERR_TLS_REQD },
      ...{ SHUTDOWN: REP.ERR_SHUTDOWN, FAILED: REP.ERR_UNKNOWN },
    };
    const describeIt = (name: string): never => {
      throw new ExportError(name as 'FAILED', `because of ${name}`);
    };
    const { raw, errors } = await careless({ list: () => [], describe: describeIt, open: describeIt });
    const client = await raw();
    await client.greet();
    for (const [code, type] of Object.entries(types)) {
      const reply = (await client.option(OPT.INFO, infoQuery(code))).at(-1);
      expect(reply).toMatchObject({ type, data: Buffer.from(`because of ${code}`) });
    }
    expect(errors).toMatchObject([
      {
        error: { code: 'FAILED' },
        context: { source: 'provider', method: 'describe', exportName: 'FAILED', expected: true },
      },
    ]);
  });
});

describe('errors of the system', () => {
  const system = (code: string, errno?: number): Error =>
    Object.assign(new Error(`${code}: something about '/etc/secret/path', write`), { code, ...(errno && { errno }) });

  test.each([
    ['ENOSPC', 'ENOSPC'],
    ['EDQUOT', 'ENOSPC'],
    ['EFBIG', 'ENOSPC'],
    ['EACCES', 'EPERM'],
    ['EPERM', 'EPERM'],
    ['EROFS', 'EPERM'],
    ['ENOMEM', 'ENOMEM'],
    ['EINVAL', 'EINVAL'],
    ['EOVERFLOW', 'EOVERFLOW'],
    ['ESHUTDOWN', 'ESHUTDOWN'],
    ['ENOTSUP', 'EINVAL'],
    ['EIO', 'EIO'],
  ] as const)('%s is answered %s, with a text without paths', (code, told) => {
    const failure = failureOf(system(code), ASKED);
    expect(failure).toMatchObject({ errno: NBD_ERRNO[told], isExpected: true });
    expect(failure.message).not.toContain('/');
  });

  test('ENOTSUP and EOPNOTSUPP are answered ENOTSUP to a request with FAST_ZERO, which is not reported', async () => {
    for (const code of ['ENOTSUP', 'EOPNOTSUPP']) {
      const fast = { ...ASKED, type: CMD.WRITE_ZEROES, flags: CMD_FLAG.FAST_ZERO };
      expect(failureOf(system(code), fast).errno).toBe(NBD_ERRNO.ENOTSUP);
    }
    const fail = (): never => {
      throw new DeviceError('ENOTSUP', 'not fast');
    };
    const device: Device = {
      size: 2 ** 20,
      read: () => undefined,
      write: () => undefined,
      zero: fail,
      canFastZero: true,
    };
    const { client, errors } = await careless(only(device));
    const one = await client();
    await expect(one.zero(0, 512, { fastZero: true })).rejects.toMatchObject({ code: 'ENOTSUP' });
    expect(errors).toEqual([]);
  });

  test('the quota of a user, for which Node has no name, is ENOSPC', () => {
    expect(failureOf(system('Unknown system error -122', -122), ASKED).errno).toBe(NBD_ERRNO.ENOSPC);
  });

  test('all others, and what only looks like one, are EIO and bugs', () => {
    for (const code of ['ENOENT', 'EBADF', 'ECONNRESET', 'ERR_INVALID_ARG_TYPE', 'constructor']) {
      expect(failureOf(system(code), ASKED)).toMatchObject({ errno: NBD_ERRNO.EIO, isExpected: false });
    }
    for (const other of [{ code: 'ENOSPC' }, 'ENOSPC', undefined, null, 28, Symbol('x')]) {
      expect(failureOf(other, ASKED)).toMatchObject({ errno: NBD_ERRNO.EIO, isExpected: false });
    }
  });
});

describe('with two copies of the package', () => {
  async function otherCopy(): Promise<typeof import('../src/index.js')> {
    vi.resetModules();
    return import('../src/index.js');
  }

  test('instanceof holds for the errors of the other copy, and a subclass is only itself', async () => {
    const other = await otherCopy();
    expect(other.DeviceError).not.toBe(DeviceError);
    const pairs: [unknown, abstract new (...given: never[]) => unknown][] = [
      [new other.DeviceError('EIO', 'x'), DeviceError],
      [new other.ExportError('FAILED', 'x'), ExportError],
      [new other.NbdClientError('EIO', 'x'), NbdClientError],
      [new other.ListenError('FAILED', 'x'), ListenError],
      [new other.HandOverError('ENDING', 'x'), HandOverError],
    ];
    const classes = pairs.map(([, ours]) => ours);
    for (const [error, ours] of pairs) {
      expect(classes.filter((each) => error instanceof each)).toEqual([ours]);
      expect(error).toBeInstanceOf(Error);
    }
    class Mine extends DeviceError {}
    class Deeper extends Mine {}
    expect(new Mine('EIO', 'x')).toBeInstanceOf(other.DeviceError);
    expect(new Deeper('EIO', 'x')).toBeInstanceOf(Mine);
    expect(new DeviceError('EIO', 'x')).not.toBeInstanceOf(Mine);
    expect(new other.DeviceError('EIO', 'x')).not.toBeInstanceOf(Mine);
    expect(Object.create(Mine.prototype)).toBeInstanceOf(Mine);
    for (const nothing of [undefined, null, 5, 'EIO', {}, () => undefined, new Error('x')]) {
      expect(nothing instanceof DeviceError).toBe(false);
    }
  });

  test('errors of the other copy are answered as ours', async () => {
    const other = await otherCopy();
    const read = (): never => {
      throw new other.DeviceError('ENOSPC', 'as told', { offset: 600 });
    };
    const open = (name: string): unknown => {
      if (name === 'disk') return { device: { size: 4096, read }, info: INFO };
      throw new other.ExportError('POLICY', 'not you');
    };
    const { raw } = await careless({ list: () => [], describe: open, open });
    const client = await raw();
    await client.greet();
    expect((await client.option(OPT.GO, infoQuery('other'))).at(-1)).toMatchObject({ type: REP.ERR_POLICY });
    await client.option(OPT.STRUCTURED_REPLY);
    await client.option(OPT.GO, infoQuery('disk'));
    client.request({ type: CMD.READ, offset: 512, length: 512 });
    const told = errorOf(await client.readChunk());
    expect(told).toMatchObject({ errno: NBD_ERRNO.ENOSPC, message: 'as told' });
    expect(told.rest.readBigUInt64BE()).toBe(600n);
  });
});

/** The same device, whose methods fail with a rejected promise. */
function inPromises(device: Record<string, unknown>): Record<string, unknown> {
  return Object.fromEntries(
    Object.entries(device).map(([name, value]) => [
      name,
      // eslint-disable-next-line @typescript-eslint/require-await
      typeof value === 'function' ? async (): Promise<unknown> => (value as () => unknown)() : value,
    ]),
  );
}
