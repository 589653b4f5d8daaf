/** What the program learns of errors and of requests: onError with its context, the warnings without it, and onRequestDone. */

import { describe, expect, onTestFinished, test, vi, type MockInstance } from 'vitest';
import { COMMAND_NAMES, commandName, DeviceError, type Device, type RequestDoneEvent } from '../src/index.js';
import { CMD, CMD_FLAG } from '../src/protocol/wire.js';
import { ErrorWarnings } from '../src/server/error-warnings.js';
import { careless, only, turns } from './careless.js';
import { Gate } from './test-device.js';
import { until } from './test-server.js';

const SIZE = 2 ** 20;
const boom = (): never => {
  throw new TypeError('x is not a function');
};

test('commands have their names of the protocol', () => {
  expect(COMMAND_NAMES).toEqual(['READ', 'WRITE', 'DISC', 'FLUSH', 'TRIM', 'CACHE', 'WRITE_ZEROES', 'BLOCK_STATUS']);
  for (const [name, type] of Object.entries(CMD)) expect(commandName(type)).toBe(name);
  expect(commandName(9)).toBe('command 9');
});

describe('onError', () => {
  test('tells connection, client, export, command and range, also of a DeviceError', async () => {
    const failure = new DeviceError('ENOSPC', 'full');
    const device: Device = {
      size: SIZE,
      read: boom,
      write: () => Promise.reject(failure),
      flush: boom,
    };
    const { client, errors, path } = await careless(only(device));
    const one = await client();
    await expect(one.read(4096, 512)).rejects.toMatchObject({ code: 'EIO' });
    await expect(one.write(8192, Buffer.alloc(1024))).rejects.toMatchObject({ code: 'ENOSPC' });
    await expect(one.flush()).rejects.toMatchObject({ code: 'EIO' });
    const where = { id: 1, peer: { transport: 'unix', address: path }, exportName: 'disk', source: 'device' };
    expect(errors).toEqual([
      {
        error: expect.any(TypeError) as unknown,
        context: { ...where, command: 'READ', offset: 4096, length: 512, expected: false },
      },
      { error: failure, context: { ...where, command: 'WRITE', offset: 8192, length: 1024, expected: true } },
      { error: expect.any(TypeError) as unknown, context: { ...where, command: 'FLUSH', expected: false } },
    ]);
  });

  test('an observer that throws in onError is not called for that', async () => {
    let calls = 0;
    const onError = (): never => {
      calls++;
      throw new Error('in onError');
    };
    const warn = warnings();
    const { client } = await careless(only({ size: SIZE, read: boom }), {}, { onError });
    await expect((await client()).read(0, 512)).rejects.toMatchObject({ code: 'EIO' });
    await turns();
    expect(calls).toBe(1);
    expect(warn.mock.calls[0]?.[0]).toContain('onError of the observer failed: Error: in onError');
  });
});

/** Calls of process.emitWarning, which print nothing. */
function warnings(): MockInstance<typeof process.emitWarning> {
  const warn = vi.spyOn(process, 'emitWarning').mockImplementation(() => undefined);
  onTestFinished(() => warn.mockRestore());
  return warn;
}

describe('without onError', () => {
  test('an error is one readable line', async () => {
    const warn = warnings();
    const { client, path } = await careless(only({ size: SIZE, read: boom }), {}, null);
    await expect((await client()).read(4096, 512)).rejects.toMatchObject({ code: 'EIO' });
    expect(warn).toHaveBeenCalledTimes(1);
    const [text, type] = warn.mock.calls[0] ?? [];
    expect(type).toBe('NbdServerWarning');
    expect(text).toContain(
      `nbd-server-ts: READ of 512 bytes at 4096 of export "disk" (connection 1, client ${path}) failed: ` +
        'TypeError: x is not a function (at ',
    );
    expect(text).not.toContain('\n');
  });

  test('errors of the provider are warned of, too', async () => {
    const warn = warnings();
    const { client } = await careless({ list: boom, describe: boom, open: boom }, {}, null);
    await expect(client()).rejects.toMatchObject({ code: 'UNKNOWN_EXPORT' });
    expect(warn.mock.calls[0]?.[0]).toContain('describe of the provider of export "disk" (connection 1, client /');
  });

  test('a burst is two warnings, with the number of errors', () => {
    vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout', 'performance'] });
    onTestFinished(() => void vi.useRealTimers());
    const warn = warnings();
    const reports = new ErrorWarnings();
    const told = (): unknown[] => warn.mock.calls.map(([text]) => text);
    for (let n = 0; n < 100_000; n++) reports.report(new Error(`error ${n}`), { source: 'device', expected: true });
    expect(told()).toEqual(['nbd-server-ts: a method of the device failed: Error: error 0']);
    vi.advanceTimersByTime(1000);
    expect(told()).toHaveLength(2);
    expect(told()[1]).toMatch(/^99999 errors within a second; the first: .*error 1$/);
    // It does not repeat itself, and the next error is told at once.
    vi.advanceTimersByTime(5000);
    expect(told()).toHaveLength(2);
    reports.report(new Error('later'), { source: 'device', expected: true });
    expect(told()).toHaveLength(3);
  });

  test('nothing that is thrown breaks the warning', () => {
    const warn = warnings();
    const odd: unknown[] = [undefined, null, 5, Symbol('x'), {}, Object.create(null), 'text\nof\0lines\u001b[31m', 10n];
    odd.push(Object.defineProperty(new Error('x'), 'message', { get: boom }));
    odd.push(Object.assign(new Error('x'), { stack: 5, name: {} }));
    odd.push(new Proxy({}, { get: boom, getPrototypeOf: boom }));
    for (const error of odd) new ErrorWarnings().report(error, { source: 'device', expected: false });
    expect(warn).toHaveBeenCalledTimes(odd.length);
    for (const [text] of warn.mock.calls) expect(text).not.toMatch(/\p{Cc}/u);
    warn.mockImplementation(boom);
    new ErrorWarnings().report(new Error('x'), { source: 'device', expected: false });
  });
});

describe('onRequestDone', () => {
  test('tells each answered request, with its error, and its time', async () => {
    const done: RequestDoneEvent[] = [];
    const gate = new Gate();
    const device: Device = {
      size: SIZE,
      read: (offset) => (offset === 4096 ? gate.opened : undefined),
      write: () => {
        throw new DeviceError('ENOSPC', 'full');
      },
      flush: () => Promise.reject(new Error('a bug')),
      extents: (_context, offset, length, sink) => void sink(offset, length, 0),
    };
    const { raw } = await careless(only(device), {}, { onRequestDone: (event: RequestDoneEvent) => done.push(event) });
    const client = await raw();
    await client.openWith('structured', 'disk', ['base:allocation']);
    const ask = async (fields: Parameters<typeof client.request>[0], payload?: Buffer): Promise<void> => {
      client.request(fields, payload);
      await client.readChunks();
    };
    await ask({ type: CMD.READ, length: 512 });
    await ask({ type: CMD.READ, offset: 0, length: 0 });
    await ask({ type: CMD.WRITE, offset: 512, length: 512, flags: CMD_FLAG.FUA }, Buffer.alloc(512));
    await ask({ type: CMD.FLUSH });
    await ask({ type: CMD.BLOCK_STATUS, length: 4096 });
    await ask({ type: CMD.READ, offset: SIZE, length: 1 });
    await ask({ type: 77 });
    await ask({ type: CMD.READ, offset: 0, length: 256 * 1024 });
    client.request({ type: CMD.READ, offset: 4096, length: 512 });
    const began = performance.now();
    await until(() => performance.now() - began > 30, 'some time has passed');
    gate.open();
    await client.readChunks();
    const fine = { id: 1, flags: 0, offset: 0, error: undefined, isRefused: false };
    const refused = { error: 'EINVAL', isRefused: true, durationMs: 0 };
    expect(done).toMatchObject([
      { ...fine, command: 'READ', length: 512 },
      { ...fine, command: 'READ', length: 0, durationMs: 0 },
      { ...fine, command: 'WRITE', flags: 1, offset: 512, length: 512, error: 'ENOSPC' },
      { ...fine, command: 'FLUSH', length: 0, error: 'EIO' },
      { ...fine, command: 'BLOCK_STATUS', length: 4096 },
      { ...fine, ...refused, command: 'READ', offset: SIZE, length: 1 },
      { ...fine, ...refused, command: 'command 77', length: 0 },
      { ...fine, command: 'READ', length: 256 * 1024 },
      { ...fine, command: 'READ', offset: 4096, length: 512 },
    ]);
    expect(done.at(-1)?.durationMs).toBeGreaterThan(20);
    expect(done[0]?.durationMs).toBeLessThan(done.at(-1)?.durationMs ?? 0);
  });

  test('no time is taken if nobody listens', async () => {
    const { client } = await careless(only({ size: SIZE, read: () => undefined }));
    const one = await client({ replies: 'simple' });
    await one.read(0, 512);
    const now = vi.spyOn(performance, 'now');
    onTestFinished(() => now.mockRestore());
    const { RequestsInFlight } = await import('../src/server/requests-in-flight.js');
    const { GuardedObserver } = await import('../src/server/guarded-observer.js');
    const inFlight = new RequestsInFlight({ observer: GuardedObserver.of() } as never, () => undefined);
    expect(inFlight.now).toBe(0);
    inFlight.answered({ type: 0, flags: 0, offset: 0, length: 0 }, 0);
    expect(now).not.toHaveBeenCalled();
  });
});
