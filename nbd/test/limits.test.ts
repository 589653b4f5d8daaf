/** Limits, and the options of listen and close: what makes no sense is refused where it is given. */

import { inspect } from 'node:util';
import { describe, expect, onTestFinished, test } from 'vitest';
import {
  createServer,
  DEFAULT_LIMITS,
  MIN_MEMORY_BYTES,
  NbdServer,
  serve,
  type CreateServerOptions,
  type Limits,
  type ListenOptions,
  type ServerOptions,
} from '../src/index.js';
import { limitsFrom, MAX_TIMER_MS, orNever } from '../src/server/limits.js';
import { Gate, TestExport, TestProvider } from './test-device.js';
import { startServer, until } from './test-server.js';

const NAMES = Object.keys(DEFAULT_LIMITS) as (keyof Limits)[];
const CAN_BE_OFF = [
  'idleTimeoutMs',
  'keepAliveMs',
  'handshakeTimeoutMs',
  'openTimeoutMs',
  'requestTimeoutMs',
  'memoryStallMs',
  'stallTimeoutMs',
];

describe('a limit', () => {
  for (const name of NAMES) {
    test(`${name} is a whole number in its range`, () => {
      for (const odd of [NaN, -1, -Infinity, 0.5, '5', '', null, true, {}, 10n, 2 ** 60]) {
        const given = { [name]: odd } as Partial<Limits>;
        expect(() => limitsFrom(given), inspect(odd)).toThrow(RangeError);
        expect(() => limitsFrom(given), inspect(odd)).toThrow(new RegExp(`^${name} is .*must be a whole number from`));
      }
      const isTime = name.endsWith('Ms') || name.startsWith('handshakeMs');
      const canBeZero = isTime || name.startsWith('maxDrained');
      if (canBeZero) expect(limitsFrom({ [name]: 0 })[name]).toBe(0);
      else expect(() => limitsFrom({ [name]: 0 })).toThrow(/from (1|100663296) to/);
      if (isTime) {
        expect(limitsFrom({ [name]: MAX_TIMER_MS })[name]).toBe(MAX_TIMER_MS);
        expect(() => limitsFrom({ [name]: MAX_TIMER_MS + 1 })).toThrow(RangeError);
      }
      if (CAN_BE_OFF.includes(name)) expect(limitsFrom({ [name]: Infinity })[name]).toBe(0);
      else expect(() => limitsFrom({ [name]: Infinity })).toThrow(RangeError);
      expect(limitsFrom({ [name]: undefined })[name]).toBe(DEFAULT_LIMITS[name]);
    });
  }

  test('that does not exist is refused, with the one that was probably meant', () => {
    const message = (name: string): string => {
      try {
        limitsFrom({ [name]: 5 });
      } catch (error) {
        return (error as Error).message;
      }
      return 'accepted';
    };
    expect(message('maxConections')).toBe('there is no limit "maxConections"; is maxConnections meant?');
    expect(message('idleTimeout')).toBe('there is no limit "idleTimeout"; is idleTimeoutMs meant?');
    expect(message('MAXMEMORYBYTES')).toBe('there is no limit "MAXMEMORYBYTES"; is maxMemoryBytes meant?');
    expect(message('colour')).toBe('there is no limit "colour"');
    expect(message('toString')).toBe('there is no limit "toString"');
    expect(message('__proto__x')).toMatch(/^there is no limit/);
  });

  test('is checked when a server is made', () => {
    const provider = new TestProvider([]);
    expect(() => new NbdServer({ provider, limits: { maxInFlightRequests: 0 } })).toThrow(RangeError);
    expect(() => new NbdServer({ provider, limits: { maxMemoryBytes: MIN_MEMORY_BYTES - 1 } })).toThrow(RangeError);
  });
});

test('time limits that are off end no handshake, no open and no idle connection', async () => {
  const off = Object.fromEntries(CAN_BE_OFF.map((name) => [name, 0]));
  const forever = Object.fromEntries(CAN_BE_OFF.map((name) => [name, name === 'keepAliveMs' ? 1 : MAX_TIMER_MS]));
  for (const limits of [off, forever, Object.fromEntries(CAN_BE_OFF.map((name) => [name, Infinity]))]) {
    const { raw, provider, closes, requests } = await startServer({ limits: { ...limits } });
    const gate = new Gate();
    provider.openHook = () => gate.opened;
    const client = await raw();
    const opening = client.open('disk');
    // A timer of 1 ms, which Node makes of a time that is too long, would have fired.
    const began = performance.now();
    await until(() => performance.now() - began > 100, 'some time has passed');
    gate.open();
    await opening;
    client.request({ type: 0, length: 4 });
    await client.readReply(4);
    expect(requests).toHaveLength(1);
    expect(closes).toEqual([]);
  }
  expect(orNever(0)).toBe(Infinity);
  expect(orNever(5)).toBe(5);
});

describe('close', () => {
  test('refuses a grace that is no time, and closes nothing', async () => {
    const { server, client } = await startServer();
    const one = await client();
    for (const graceMs of [NaN, -1, '5', null, {}]) {
      await expect(server.close({ graceMs: graceMs as number })).rejects.toThrow(RangeError);
    }
    expect(await one.read(0, 4)).toHaveLength(4);
  });

  for (const graceMs of [Infinity, 2 ** 40, 2 ** 31]) {
    test(`waits for a device as long as it takes with graceMs: ${graceMs}`, async () => {
      const { server, opened, provider } = await startServer();
      const gate = new Gate();
      provider.hook = () => gate.opened;
      const client = await opened();
      client.request({ type: 0, length: 4 });
      await until(() => provider.unfinished === 1, 'the device is at work');
      let isClosed = false;
      const closing = server.close({ graceMs }).then(() => void (isClosed = true));
      const began = performance.now();
      await until(() => performance.now() - began > 60, 'some time has passed');
      expect(isClosed).toBe(false);
      gate.open();
      expect((await client.readReply(4)).errno).toBe(0);
      client.vanish();
      await closing;
    });
  }
});

test.each<unknown>([
  undefined,
  5,
  {},
  { host: '127.0.0.1' },
  { host: '127.0.0.1', port: -1 },
  { host: '127.0.0.1', port: 65536 },
  { host: '127.0.0.1', port: '10809' },
  { host: '127.0.0.1', port: 0.5 },
  { host: 5, port: 0 },
  { host: '', port: 0 },
  { path: '' },
  { path: 5 },
  { path: '/tmp/careless-never.sock', mode: '660' },
  { path: '/tmp/careless-never.sock', mode: 0o1777 },
  { path: '/tmp/careless-never.sock', mode: -1 },
  { fd: '3' },
  { fd: -1 },
])('listen refuses %o', async (options) => {
  const server = new NbdServer({ provider: new TestProvider([new TestExport('disk')]) });
  onTestFinished(() => server.destroy());
  const listening = server.listen(options as ListenOptions);
  await expect(listening).rejects.toThrow(/^cannot listen on /);
  await expect(listening).rejects.toMatchObject({ name: expect.stringMatching(/^(Type|Range)Error$/) as string });
});

describe('options of the wrong kind are refused in one line', () => {
  const provider = new TestProvider([]);
  test.each([
    [null, /^the options of a server must be an object, not null$/],
    [{}, /^provider must be an object, not undefined$/],
    [{ provider, observer: null }, /^observer must be an object, not null$/],
    [{ provider, limits: null }, /^limits must be an object, not null$/],
    [{ provider, limits: 5 }, /^limits must be an object, not a number$/],
    [{ provider, prepareSocket: 5 }, /^prepareSocket must be a function, not a number$/],
    [{ provider, peerCredentials: {} }, /^peerCredentials must be a function, not an object$/],
  ])('%j', (options, says) => {
    const make = (): NbdServer => new NbdServer(options as unknown as ServerOptions);
    expect(make).toThrow(TypeError);
    expect(make).toThrow(says);
  });

  test('of serve and createServer', async () => {
    const device = { size: 512, read: () => undefined };
    await expect(serve({ port: 0 }, device, null as unknown as object)).rejects.toThrow(
      /^the options of serve must be an object, not null$/,
    );
    expect(() => createServer(null as unknown as CreateServerOptions)).toThrow(
      /^the options of createServer must be an object, not null$/,
    );
  });
});
