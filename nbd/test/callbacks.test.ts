/** Code of the program that throws, rejects, settles twice, or returns anything: it harms neither the server nor another connection. */

import net from 'node:net';
import { inspect } from 'node:util';
import { describe, expect, test, vi } from 'vitest';
import { ALLOCATION_CONTEXT, NbdServer, STATE_ZERO, type Device, type ServingLoop } from '../src/index.js';
import { OPT, REP } from '../src/protocol/wire.js';
import { careless, INFO, only, strays, turns } from './careless.js';
import { infoQuery } from './raw-client.js';
import { temporaryDirectory, until } from './test-server.js';

const SIZE = 2 ** 20;
const boom = (): never => {
  throw new Error('boom');
};

/** A device that answers every request by `answer()`. */
const answering = (answer: () => unknown): Record<string, unknown> => ({
  size: SIZE,
  ...Object.fromEntries(['read', 'write', 'flush', 'trim', 'zero', 'cache'].map((method) => [method, answer])),
});

/** Requests of all kinds, and which of them succeed. */
async function allRequests(device: unknown): Promise<{ readonly done: boolean[]; readonly messages: string[] }> {
  const uncaught = strays();
  const { client, messages } = await careless(only(device));
  const done: boolean[] = [];
  for (const replies of ['simple', 'structured'] as const) {
    const one = await client({ replies });
    const asked = [
      one.read(0, 512),
      one.write(0, Buffer.alloc(512)),
      one.flush(),
      one.trim(0, 512),
      one.zero(0, 512),
      one.cache(0, 512),
    ];
    for (const { status } of await Promise.allSettled(asked)) done.push(status === 'fulfilled');
  }
  await turns();
  expect(uncaught).toEqual([]);
  return { done, messages: messages() };
}

describe('answers that come later', () => {
  const twice = {
    then: (resolve: () => void, reject: (error: Error) => void) => {
      resolve();
      resolve();
      reject(new Error('after all'));
      throw new Error('and again');
    },
  };
  const late = {
    then: (resolve: () => void) => {
      setImmediate(() => {
        resolve();
        resolve();
      });
    },
  };
  const promise = Object.assign(Promise.resolve(), { then: twice.then });
  class Lazy extends Promise<void> {
    override then<A = void, B = never>(
      // eslint-disable-next-line @typescript-eslint/no-invalid-void-type
      fulfilled?: ((value: void) => A | PromiseLike<A>) | null,
      rejected?: ((error: unknown) => B | PromiseLike<B>) | null,
    ): Promise<A | B> {
      return Promise.resolve().then(fulfilled, rejected);
    }
  }
  const good: Record<string, () => unknown> = {
    'a thenable that settles twice, and throws': () => twice,
    'a thenable that settles twice, later': () => late,
    'a function with a method then': () => Object.assign(() => undefined, twice),
    'a promise with a then of its own': () => promise,
    'a promise of a subclass that begins in then': () => new Lazy(() => undefined),
    'an object whose then is no function': () => ({ then: 5, bytesRead: 512, bytesWritten: 512 }),
  };
  for (const [what, answer] of Object.entries(good)) {
    test(`${what} is an answer`, async () => {
      const { done, messages } = await allRequests(answering(answer));
      expect(messages).toEqual([]);
      expect(done).toEqual(done.map(() => true));
    });
  }

  const rejected = Promise.reject(new Error('boom'));
  rejected.catch(() => undefined);
  const bad: Record<string, () => unknown> = {
    'a thenable that throws in then': () => ({ then: boom }),
    'a getter then that throws': () => Object.defineProperty({}, 'then', { get: boom }),
    'a proxy that throws': () => new Proxy({}, { get: boom, has: boom, getPrototypeOf: boom }),
    'a promise whose constructor throws': () => Object.defineProperty(Promise.resolve(), 'constructor', { get: boom }),
    'a thenable that rejects twice': () => ({
      then: (_: unknown, reject: (error: Error) => void) => {
        reject(new Error('boom'));
        reject(new Error('boom again'));
      },
    }),
    'a promise that is rejected already': () => rejected,
  };
  for (const [what, answer] of Object.entries(bad)) {
    test(`${what} is a failure`, async () => {
      const { done, messages } = await allRequests(answering(answer));
      expect(done).toEqual(done.map(() => false));
      expect(messages).toEqual(done.map(() => 'boom'));
    });
  }
});

test('an isHole that throws, or answers later, is reported, and the data are read', async () => {
  const uncaught = strays();
  const answers = [
    boom,
    () => Promise.resolve(false),
    () => Promise.reject(new Error('boom')),
    () => 1,
    () => 'yes',
    () => ({}),
  ];
  for (const isHole of answers as (() => boolean)[]) {
    const device: Device = { size: SIZE, read: (_, into) => void into.fill(7), isHole };
    const { client, errors } = await careless(only(device));
    const one = await client({ replies: 'structured' });
    for (let n = 0; n < 2; n++) expect((await one.read(0, 512)).equals(Buffer.alloc(512, 7))).toBe(true);
    expect(errors.length).toBeGreaterThan(0);
    expect(errors[0]?.context).toMatchObject({ source: 'device', command: 'READ', expected: false });
  }
  await turns();
  expect(uncaught).toEqual([]);
});

test('extents of nonsense, too late or of another request change no answer', async () => {
  const uncaught = strays();
  const sinks: ((...given: unknown[]) => unknown)[] = [];
  const odd = [NaN, -1, 0.5, 10n, '512', undefined, null, {}, Symbol('x'), Infinity, 2 ** 60];
  let given: unknown[] = [];
  const device: Device = {
    size: SIZE,
    read: (_, into) => void into.fill(7),
    contexts: [ALLOCATION_CONTEXT],
    extents: (_context, offset, length, sink) => {
      sinks.push(sink as never);
      for (const earlier of sinks.slice(0, -1)) expect(earlier(offset, length, STATE_ZERO)).toBe(false);
      sinks.at(-1)?.(...given.map((value) => (value === 'offset' ? offset : value)));
      sink(offset, length, 0);
    },
  };
  const { client, errors } = await careless(only(device));
  const one = await client({ replies: 'structured' });
  const withContext = await careless(only(device)).then(async ({ path }) => {
    const { NbdClient } = await import('../src/index.js');
    const other = await NbdClient.connect({ path });
    await other.selectContexts('disk', [ALLOCATION_CONTEXT]);
    await other.go('disk');
    return other;
  });
  const cases = odd.flatMap((value) => [
    [value, 4096, STATE_ZERO],
    ['offset', value, STATE_ZERO],
    ['offset', 4096, value],
  ]);
  for (given of cases) {
    const isGood = given[0] === 'offset' && (given[1] === Infinity || given[1] === 2 ** 60);
    const data = await one.read(0, 256 * 1024);
    expect(
      data.every((byte) => byte === (isGood ? 0 : 7)),
      inspect(given),
    ).toBe(true);
    const status = await withContext.blockStatus(ALLOCATION_CONTEXT, 0, 256 * 1024).catch((error: unknown) => error);
    expect(status, inspect(given)).toBeDefined();
  }
  withContext.destroy();
  await turns();
  expect(errors.length).toBeLessThanOrEqual(cases.length);
  expect(uncaught).toEqual([]);
});

describe('observers', () => {
  const NAMES = [
    'onConnectionOpen',
    'onConnectionClose',
    'onConnectionRefused',
    'onRequest',
    'onRequestDone',
    'onError',
  ];
  const failing: Record<string, () => unknown> = {
    throw: boom,
    // eslint-disable-next-line @typescript-eslint/require-await
    reject: async () => boom(),
    'return a thenable that throws': () => ({ then: boom }),
    'return a proxy that throws': () => new Proxy({}, { get: boom, has: boom }),
  };
  for (const [how, callback] of Object.entries(failing)) {
    test(`all of which ${how} disturb nobody; it becomes a warning`, async () => {
      const uncaught = strays();
      const warn = vi.spyOn(process, 'emitWarning').mockImplementation(() => undefined);
      const device: Device = { size: SIZE, read: (offset) => (offset > 0 ? boom() : undefined) };
      const observer = Object.fromEntries(NAMES.map((name) => [name, callback]));
      const { client, server, path } = await careless(only(device), { limits: { maxConnections: 1 } }, observer);
      const one = await client();
      expect((await one.read(0, 512)).length).toBe(512);
      await expect(one.read(512, 512)).rejects.toMatchObject({ code: 'EIO' });
      await new Promise((resolve) =>
        net
          .connect({ path })
          .on('close', resolve)
          .on('error', () => undefined)
          .resume(),
      );
      await one.disconnect();
      await until(() => server.connections.size === 0, 'the connection is over');
      await turns();
      expect(uncaught).toEqual([]);
      expect(warn.mock.calls[0]?.[0]).toMatch(/onConnectionOpen of the observer failed: Error: boom/);
      warn.mockRestore();
    });
  }
});

describe('callbacks of accepted sockets', () => {
  const nonsense: Record<string, () => unknown> = {
    throws: boom,
    'returns a promise': () => Promise.resolve({ uid: 0, gid: 0, pid: 1 }),
    'returns a text': () => 'root',
    'returns an object without a user': () => ({ pid: 1 }),
    'returns a user that is no number': () => ({ pid: 1, uid: '0', gid: 0 }),
    'returns an object that throws': () => Object.defineProperty({}, 'uid', { get: boom, enumerable: true }),
  };
  for (const [how, peerCredentials] of Object.entries(nonsense)) {
    test(`a connection is refused if peerCredentials ${how}`, async () => {
      const refused: string[] = [];
      const { raw, errors } = await careless(
        only({ size: SIZE, read: () => undefined }),
        { peerCredentials: peerCredentials as never },
        { onConnectionRefused: ({ reason }: { reason: string }) => refused.push(reason) },
      );
      for (let n = 1; n <= 2; n++) {
        expect(await (await raw()).readToEnd()).toHaveLength(0);
        expect(refused).toHaveLength(n);
      }
      expect(refused[0]).toBe('peerCredentials failed');
      expect(errors[0]?.context).toMatchObject({ source: 'callback', method: 'peerCredentials', expected: false });
    });
  }

  test('a connection is refused if prepareSocket throws, and served if it rejects later', async () => {
    const uncaught = strays();
    let isLate = false;
    const refused: string[] = [];
    const { raw, errors, server } = await careless(
      only({ size: SIZE, read: () => undefined }),
      { prepareSocket: (): void => (isLate ? (Promise.reject(new Error('late')) as never) : boom()) },
      { onConnectionRefused: ({ reason }: { reason: string }) => refused.push(reason) },
    );
    expect(await (await raw()).readToEnd()).toHaveLength(0);
    expect(refused).toEqual(['prepareSocket failed']);
    isLate = true;
    await (await raw()).open('disk');
    expect(errors.map(({ context }) => context.method)).toEqual(['prepareSocket', 'prepareSocket']);
    expect(server.connections.size).toBe(1);
    expect(uncaught).toEqual([]);
  });
});

describe('a serving loop of the program', () => {
  const memory = { usedBytes: 0, maxBytes: 0, keptBytes: 0, waiting: 0 };
  const rejecting = { over: Promise.reject(new Error('boom')), shutdown: boom, abort: boom };
  rejecting.over.catch(() => undefined);
  test.each([
    ['throws', boom],
    ['returns nothing', () => undefined],
    ['returns a connection whose end fails', () => rejecting],
  ])('that %s gives its place back, and the server still closes', async (_, serve) => {
    const uncaught = strays();
    const loop = { memory, shareMemory: () => undefined, stop: boom, serve } as unknown as ServingLoop;
    const device = { size: SIZE, read: () => undefined };
    const { raw, errors, server } = await careless(only(device), { loops: [loop], limits: { maxConnections: 1 } });
    for (let n = 1; n <= 3; n++) {
      const client = await raw();
      await until(() => errors.length >= n, 'the error is reported');
      client.vanish();
      expect(server.connections.size).toBe(0);
    }
    await server.close({ graceMs: 0 });
    expect(errors.at(-1)?.context).toMatchObject({ source: 'callback', method: 'stop' });
    await turns();
    expect(uncaught).toEqual([]);
  });
});

describe('providers', () => {
  const long = 'n'.repeat(5000);
  const device: Device = { size: SIZE, read: () => undefined };
  const answers: Record<string, unknown> = {
    undefined: undefined,
    'a text': 'disk',
    'no device': { info: INFO },
    'no info': { device, geometry: device },
    'a name that is a number': { device, geometry: device, info: { name: 5, description: '' } },
    'a name that is too long': { device, geometry: device, info: { name: long, description: '' } },
    'a name with NUL': { device, geometry: device, info: { name: 'a\0b', description: '' } },
    'an info that throws': {
      device,
      geometry: device,
      get info() {
        return boom();
      },
    },
    'a geometry that throws': {
      device: {
        get geometry() {
          return boom();
        },
      },
      get geometry() {
        return boom();
      },
      info: INFO,
    },
    'a size that is a BigInt': { device: { size: 5n, read: boom }, geometry: { size: 5n }, info: INFO },
    'contexts that are a text': {
      device: { ...device, contexts: 'x:y' },
      geometry: { size: 5, contexts: 'x:y' },
      info: INFO,
    },
    'a device without read': { device: { size: SIZE }, info: INFO },
    'a proxy that throws': new Proxy({}, { get: (_, name) => (name === 'then' ? undefined : boom()) }),
    'a thenable that throws': { then: boom },
  };
  for (const [what, answer] of Object.entries(answers)) {
    test(`that answer with ${what} are reported, the export is refused, and the next one can be opened`, async () => {
      const uncaught = strays();
      let closed = 0;
      const close = (): void => void closed++;
      const opened = answer !== null && typeof answer === 'object' && 'device' in answer ? answer.device : undefined;
      if (opened !== undefined) Object.defineProperty(opened, 'close', { value: close, configurable: true });
      const find = (name: string): unknown => (name === 'good' ? { device, geometry: device, info: INFO } : answer);
      const { raw, errors } = await careless({ list: () => [], describe: find, open: find, left: boom });
      const client = await raw();
      await client.greet();
      expect((await client.option(OPT.GO, infoQuery('odd'))).at(-1)?.type).toBe(REP.ERR_UNKNOWN);
      expect(errors[0]?.context).toMatchObject({
        source: 'provider',
        method: 'open',
        exportName: 'odd',
        expected: false,
      });
      expect(closed).toBe(opened === undefined ? 0 : 1);
      if (what !== 'a device without read' && what !== 'no device') {
        expect((await client.option(OPT.INFO, infoQuery('odd'))).at(-1)?.type).toBe(REP.ERR_UNKNOWN);
      }
      expect((await client.option(OPT.GO, infoQuery('good'))).at(-1)?.type).toBe(REP.ACK);
      client.vanish();
      await until(() => errors.some(({ context }) => context.method === 'left'), 'left was called');
      expect(uncaught).toEqual([]);
    });
  }

  test('entries of a list that cannot be sent are left out, and the first is reported', async () => {
    const entries = [
      INFO,
      undefined,
      { name: 5 },
      { name: long },
      'text',
      { name: 'b' },
      { name: 'c', description: 5 },
    ];
    const { raw, errors } = await careless({ list: () => entries });
    const client = await raw();
    await client.greet();
    const replies = await client.option(OPT.LIST);
    const names = replies.slice(0, -1).map(({ data }) => data.subarray(4).toString());
    expect(names).toEqual(['disk', 'b', 'c']);
    expect(errors).toHaveLength(1);
  });

  test('a list that fails in the middle, or has no end, ends with an error', async () => {
    const failing = function* () {
      yield INFO;
      boom();
    };
    const endless = function* () {
      for (;;) yield undefined;
    };
    for (const list of [failing, endless, () => 5, boom, () => Promise.reject(new Error('boom'))]) {
      const { raw, errors } = await careless({ list });
      const client = await raw();
      await client.greet();
      expect((await client.option(OPT.LIST)).at(-1)?.type).toBe(REP.ERR_UNKNOWN);
      expect(errors.at(-1)?.context).toMatchObject({ method: 'list', expected: false });
    }
  });

  test('a list that fails when much of it was sent closes the connection', async () => {
    const { raw, errors, server } = await careless({
      list: function* () {
        for (let n = 0; n < 10_000; n++) yield { name: `disk-${n}`, description: 'x'.repeat(50) };
        boom();
      },
    });
    const client = await raw();
    await client.greet();
    await expect(client.option(OPT.LIST)).rejects.toThrow(/closed/);
    await until(() => server.connections.size === 0, 'the connection is over');
    expect(errors.map(({ context }) => context.method)).toEqual(['list']);
  });
});

test('an error in close is reported, and the connection is over', async () => {
  for (const close of [boom, () => ({ then: boom }), () => Promise.reject(new Error('boom'))]) {
    const { client, errors, server } = await careless(only({ size: SIZE, read: () => undefined, close }));
    const one = await client();
    await one.disconnect();
    await until(() => server.connections.size === 0, 'the connection is over');
    expect(errors.map(({ context }) => context)).toMatchObject([
      { source: 'device', method: 'close', exportName: 'disk' },
    ]);
  }
});

test('a take that throws leaves the connection where it is', async () => {
  const directory = await temporaryDirectory();
  const { client, server } = await careless(only({ size: SIZE, read: (_: number, into: Buffer) => void into.fill(7) }));
  expect(directory).toBeDefined();
  const one = await client();
  const [id] = [...server.connections.keys()];
  await expect(server.handOver(id ?? 0, boom)).rejects.toThrow('boom');
  await expect(server.handOver(id ?? 0, 5 as never)).rejects.toThrow(TypeError);
  await expect(server.handOver(id ?? 0, boom, { signal: {} as AbortSignal })).rejects.toThrow();
  expect((await one.read(0, 4)).equals(Buffer.alloc(4, 7))).toBe(true);
  expect(server).toBeInstanceOf(NbdServer);
});
