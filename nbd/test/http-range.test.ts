/** Disks on HTTP servers: what is believed, what is refused, what is asked again. Each test has a server that lies in its own way. */

import { createServer, type IncomingMessage, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import { expect, onTestFinished, test, vi } from 'vitest';
import type { CompleteDevice } from '../src/index.js';
import { httpRangeDevice, type HttpRangeOptions } from '../src/devices/http-range.js';
import { deviceSuite, testContent } from './device-suite.js';
import { Gate } from './test-device.js';
import { until } from './test-server.js';

type Answer = (request: IncomingMessage, response: ServerResponse, range: readonly [number, number]) => unknown;

const content = testContent(100_001);
const QUICK = { retryDelayMs: 1 };

interface Site {
  readonly url: string;
  readonly requests: IncomingMessage[];
  answer: Answer;
}

/** A server that answers ranges of `content`, until `answer` is replaced. */
async function site(answer: Answer = good): Promise<Site> {
  const requests: IncomingMessage[] = [];
  const made: Site = { url: '', requests, answer };
  const server = createServer((request, response) => {
    requests.push(request);
    const [, first, last] = /^bytes=(\d+)-(\d+)$/.exec(request.headers.range ?? '') ?? [];
    made.answer(request, response, [Number(first), Number(last) + 1]);
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  onTestFinished(() => {
    server.closeAllConnections();
    server.close();
  });
  return Object.assign(made, {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}/disk.img?token=secret`,
  });
}

/** An answer of the range with other headers or bytes. */
function partial(
  response: ServerResponse,
  [start, end]: readonly [number, number],
  { headers = {}, bytes = content.subarray(start, end), size = content.length } = {},
): void {
  response.writeHead(206, { 'content-range': `bytes ${start}-${end - 1}/${size}`, ...headers });
  response.end(bytes);
}

const good: Answer = (_, response, range) => partial(response, range);

async function opened(url: string, options: HttpRangeOptions = {}): Promise<CompleteDevice> {
  return httpRangeDevice(url, { ...QUICK, ...options });
}

async function bytesAt(device: CompleteDevice, offset: number, length: number, signal?: AbortSignal): Promise<Buffer> {
  const into = Buffer.alloc(length, 0xaa);
  await device.read(offset, into, signal);
  return into;
}

deviceSuite('an HTTP resource', async () => ({ device: await opened((await site()).url), content }), { runs: 4 });

test('it is read-only, and asks with the given headers for one byte first', async () => {
  const server = await site();
  const device = await opened(server.url, { headers: { authorization: 'Bearer me' } });
  expect(device.geometry).toMatchObject({ size: content.length, readOnly: true, multiConn: true, canFlush: false });
  expect(await bytesAt(device, 1000, 5000)).toEqual(content.subarray(1000, 6000));
  const asked = server.requests.map(({ method, headers }) => [method, headers.range, headers.authorization]);
  expect(asked).toEqual([
    ['GET', 'bytes=0-0', 'Bearer me'],
    ['GET', 'bytes=1000-5999', 'Bearer me'],
  ]);
  // Node's fetch adds it once more by itself.
  for (const { headers } of server.requests) expect(headers['accept-encoding']).toMatch(/^identity(?:, identity)?$/);
});

test('a user and a password in the URL are sent as authorization, and never told', async () => {
  const server = await site();
  const url = server.url.replace('//', '//me:p%C3%A4ss%25@');
  await opened(url);
  await opened(url, { headers: { authorization: 'Bearer me' } });
  const expected = [`Basic ${Buffer.from('me:päss%').toString('base64')}`, 'Bearer me'];
  expect(server.requests.map(({ headers }) => headers.authorization)).toEqual(expected);
  server.answer = (_, response) => response.writeHead(403).end();
  await expect(opened(url)).rejects.toMatchObject({ message: expect.not.stringMatching(/me:|p.*ss%/) as unknown });
});

test('an empty resource is an empty disk', async () => {
  const server = await site((_, response) => response.writeHead(416, { 'content-range': 'bytes */0' }).end());
  expect((await opened(server.url)).geometry.size).toBe(0);
});

const REFUSALS: [string, Answer, RegExp][] = [
  [
    'all of it instead of a range',
    (_, response) => response.end(content),
    /does not answer ranges, but with all of it/,
  ],
  ['another status', (_, response) => response.writeHead(404).end(), /disk\.img: status 404$/],
  ['a status that is no success', (_, response) => response.writeHead(204).end(), /status 204/],
  ['416', (_, response) => response.writeHead(416).end(), /status 416/],
  ['no Content-Range', (_, response) => response.writeHead(206).end('x'), /Content-Range is ""/],
  [
    'no size',
    (_, response) => response.writeHead(206, { 'content-range': 'bytes 0-0/*' }).end('x'),
    /must have range and size/,
  ],
  [
    'a size that is none',
    (_, response) => response.writeHead(206, { 'content-range': `bytes 0-0/${'9'.repeat(20)}` }).end('x'),
    /must have range and size/,
  ],
  [
    'several ranges',
    (_, response) => response.writeHead(206, { 'content-type': 'multipart/byteranges; boundary=x' }).end('--x--'),
    /Content-Range/,
  ],
  [
    'another range',
    (_, response, [start, end]) => partial(response, [start + 1, end + 1]),
    /asked for 1 bytes at 0, the server sends bytes 1-1/,
  ],
  [
    'a range behind the end',
    (_, response, range) => partial(response, range, { size: range[1] - 1 }),
    /asked for 1 bytes at 0, the server sends bytes 0-0\/0/,
  ],
  [
    'compressed bytes',
    (_, response, range) => partial(response, range, { headers: { 'content-encoding': 'x' } }),
    /sends x/,
  ],
];

test.each(REFUSALS)('a server that answers with %s is refused, and not asked again', async (_, answer, message) => {
  const server = await site(answer);
  await expect(opened(server.url)).rejects.toMatchObject({ code: 'EIO', message });
  expect(server.requests.length).toBe(1);
  // The same once it is open.
  server.answer = good;
  const device = await opened(server.url);
  server.answer = answer;
  await expect(bytesAt(device, 0, 1)).rejects.toMatchObject({ code: 'EIO' });
  expect(server.requests.length).toBe(3);
});

test.each([
  ['fewer', 99],
  ['more', 101],
  ['no', 0],
])('%s bytes than announced are refused', async (_, length) => {
  const server = await site();
  const device = await opened(server.url);
  server.answer = (request, response, range) => partial(response, range, { bytes: Buffer.alloc(length) });
  await expect(bytesAt(device, 500, 100)).rejects.toMatchObject({
    code: 'EIO',
    message: /100 bytes that it has announced/,
  });
  expect(server.requests.length).toBe(2);
});

test('messages, which clients see, do not have the query of the URL', async () => {
  const { url } = await site((_, response) => response.writeHead(403).end());
  const { message } = await opened(url).then(
    () => new Error('opened'),
    (error: unknown) => error as Error,
  );
  expect(message).toContain('/disk.img');
  expect(message).not.toContain('secret');
});

test.each([
  ['ETag', { etag: '"1"' }, { etag: '"2"' }],
  ['weak ETag', { etag: 'W/"1"' }, { etag: 'W/"2"' }],
  [
    'Last-Modified',
    { 'last-modified': 'Mon, 01 Jan 2024 00:00:00 GMT' },
    { 'last-modified': 'Tue, 02 Jan 2024 00:00:00 GMT' },
  ],
])('a resource with another %s than when it was opened is not mixed in', async (_, before, after) => {
  const server = await site((__, response, range) => partial(response, range, { headers: before }));
  const device = await opened(server.url);
  await bytesAt(device, 0, 100);
  server.answer = (__, response, range) => partial(response, range, { headers: after });
  const changed = { code: 'EIO', message: /disk\.img has changed since it was opened/ };
  await expect(bytesAt(device, 0, 100)).rejects.toMatchObject(changed);
  // As a server that obeys If-Range answers.
  server.answer = (__, response) => response.writeHead(200, after).end(content);
  await expect(bytesAt(device, 0, 100)).rejects.toMatchObject(changed);
  server.answer = (__, response) => response.writeHead(416, { 'content-range': 'bytes */5' }).end();
  await expect(bytesAt(device, 0, 100)).rejects.toMatchObject(changed);
});

test('If-Range has a strong ETag, or else the date', async () => {
  const date = 'Mon, 01 Jan 2024 00:00:00 GMT';
  for (const [headers, expected] of [
    [{ etag: '"strong"', 'last-modified': date }, '"strong"'],
    [{ etag: 'W/"weak"', 'last-modified': date }, date],
    [{ etag: 'W/"weak"' }, undefined],
  ] as const) {
    const server = await site((_, response, range) => partial(response, range, { headers }));
    await bytesAt(await opened(server.url), 0, 10);
    expect(server.requests.map((request) => request.headers['if-range'])).toEqual([undefined, expected]);
  }
});

test('another size is another resource', async () => {
  const server = await site();
  const device = await opened(server.url);
  server.answer = (_, response, range) => partial(response, range, { size: content.length + 1 });
  await expect(bytesAt(device, 0, 10)).rejects.toMatchObject({ message: /has changed/ });
});

test('redirections are followed', async () => {
  const server = await site();
  const target = server.url;
  const other = await site((_, response) => response.writeHead(302, { location: target }).end());
  const device = await opened(other.url);
  expect(await bytesAt(device, 7, 300)).toEqual(content.subarray(7, 307));
  other.answer = (_, response) => response.writeHead(302, { location: other.url }).end();
  await expect(bytesAt(device, 0, 1)).rejects.toMatchObject({ code: 'EIO' });
});

test.each([503, 500, 429, 408, 'a broken connection', 'half of the bytes'] as const)(
  'after %s it asks again, and in the end gives up',
  async (trouble) => {
    const server = await site();
    const device = await opened(server.url, { retries: 2 });
    const bad: Answer = (_, response, [start, end]) => {
      if (typeof trouble === 'number') return response.writeHead(trouble).end();
      if (trouble === 'a broken connection') return response.socket?.destroy();
      const headers = { 'content-range': `bytes ${start}-${end - 1}/${content.length}`, 'content-length': end - start };
      response.writeHead(206, headers);
      return response.write(content.subarray(start, (start + end) / 2), () => response.socket?.destroy());
    };
    let failures = 2;
    server.answer = (...args) => (failures-- > 0 ? bad : good)(...args);
    expect(await bytesAt(device, 100, 5000)).toEqual(content.subarray(100, 5100));
    expect(server.requests.length).toBe(4);
    server.answer = bad;
    await expect(bytesAt(device, 100, 5000)).rejects.toMatchObject({ code: 'EIO' });
    expect(server.requests.length).toBe(7);
  },
);

test('a server that asks for time gets it, if that is not too long', async () => {
  const server = await site();
  const device = await opened(server.url, { timeoutMs: 5000, retries: 1 });
  let asked = 0;
  const busy = (after: string): Answer => {
    asked = performance.now();
    server.requests.length = 0;
    return (...args) => {
      if (server.requests.length > 1) return good(...args);
      return args[1].writeHead(429, { 'retry-after': after }).end();
    };
  };
  server.answer = busy('1');
  expect(await bytesAt(device, 100, 50)).toEqual(content.subarray(100, 150));
  // A timer may be a little early.
  expect(performance.now() - asked).toBeGreaterThan(990);
  for (const after of ['Mon, 01 Jan 2024 00:00:00 GMT', 'soon', '-1', '0']) {
    server.answer = busy(after);
    expect(await bytesAt(device, 100, 50)).toEqual(content.subarray(100, 150));
  }
  for (const after of ['6', new Date(Date.now() + 3_600_000).toUTCString(), '9'.repeat(400)]) {
    server.answer = busy(after);
    await expect(bytesAt(device, 100, 50)).rejects.toMatchObject({
      code: 'EIO',
      message: /429, to be asked again after/,
    });
    expect(server.requests.length).toBe(1);
  }
});

test.each(['identity', 'Identity', ''])('the content encoding %j is none', async (encoding) => {
  const server = await site((_, response, range) =>
    partial(response, range, { headers: { 'content-encoding': encoding } }),
  );
  expect(await bytesAt(await opened(server.url), 7, 50)).toEqual(content.subarray(7, 57));
});

test.each([
  ['says nothing', (): undefined => undefined],
  [
    'stops in the middle',
    (_: unknown, response: ServerResponse, [start, end]: readonly [number, number]) => {
      response.writeHead(206, { 'content-range': `bytes ${start}-${end - 1}/${content.length}` });
      response.write(content.subarray(start, start + 10));
    },
  ],
])('a server that %s is given up after the time-out', async (_, silent) => {
  const server = await site();
  const device = await opened(server.url, { timeoutMs: 50, retries: 1 });
  server.answer = silent;
  await expect(bytesAt(device, 0, 100)).rejects.toMatchObject({ code: 'EIO', message: /no answer within 50 ms/ });
  expect(server.requests.length).toBe(3);
});

test('a server that sends slowly but steadily is not given up', async () => {
  const server = await site();
  const device = await opened(server.url, { timeoutMs: 400, retries: 0 });
  server.answer = (_, response, [start, end]) => {
    response.writeHead(206, { 'content-range': `bytes ${start}-${end - 1}/${content.length}` });
    let at = start;
    const timer = setInterval(() => {
      response.write(content.subarray(at, ++at));
      if (at === end) response.end();
      if (at === end) clearInterval(timer);
    }, 50);
  };
  expect(await bytesAt(device, 0, 12)).toEqual(content.subarray(0, 12));
});

test('requests whose client has gone are cancelled, also those that wait', async () => {
  const server = await site();
  const device = await opened(server.url, { maxParallel: 2 });
  let closed = 0;
  server.answer = (_, response) => response.on('close', () => closed++);
  const gone = new AbortController();
  const reads = [1, 2, 3, 4].map((at) => bytesAt(device, at, 10, gone.signal));
  await until(() => server.requests.length === 3, 'two requests have come');
  gone.abort();
  for (const read of await Promise.allSettled(reads)) {
    expect(read).toMatchObject({ status: 'rejected', reason: { code: 'ESHUTDOWN' } });
  }
  await until(() => closed === 2, 'both are closed');
  expect(server.requests.length).toBe(3);
  // The next client is served.
  server.answer = good;
  expect(await bytesAt(device, 0, 10)).toEqual(content.subarray(0, 10));
});

test('no more requests run at once than are allowed', async () => {
  const server = await site();
  const device = await opened(server.url, { maxParallel: 3 });
  const waiting: (() => void)[] = [];
  let most = 0;
  server.answer = (_, response, range) => {
    most = Math.max(
      most,
      waiting.push(() => partial(response, range)),
    );
    // One more would come before these are answered.
    if (waiting.length === 3) setImmediate(() => waiting.splice(0).forEach((each) => each()));
  };
  const reads = Array.from({ length: 12 }, (_, at) => bytesAt(device, at * 100, 100));
  expect(Buffer.concat(await Promise.all(reads)).equals(content.subarray(0, 1200))).toBe(true);
  expect(most).toBe(3);
});

test('a fetch that does not obey its signal cannot touch the buffer later', async () => {
  const gate = new Gate();
  const server = await site();
  let isSlow = false;
  const device = await opened(server.url, {
    timeoutMs: 50,
    retries: 0,
    fetch: async (url, init) => {
      const response = await fetch(url, { ...init, signal: null });
      if (isSlow) await gate.opened;
      return response;
    },
  });
  isSlow = true;
  const into = Buffer.alloc(10, 0xaa);
  await expect(device.read(0, into)).rejects.toMatchObject({ code: 'EIO' });
  gate.open();
  await new Promise((resolve) => setImmediate(resolve));
  expect(into).toEqual(Buffer.alloc(10, 0xaa));
});

test('options and URLs are checked, and the opening can be given up', async () => {
  await expect(httpRangeDevice('file:///etc/passwd')).rejects.toThrow(RangeError);
  await expect(httpRangeDevice('http://127.0.0.1', { timeoutMs: 0 })).rejects.toThrow(/timeoutMs 0/);
  await expect(httpRangeDevice('http://127.0.0.1', { maxParallel: NaN })).rejects.toThrow(/maxParallel/);
  const server = await site(() => undefined);
  const gone = new AbortController();
  const opening = opened(server.url, { signal: gone.signal });
  await until(() => server.requests.length === 1, 'it has asked');
  gone.abort();
  await expect(opening).rejects.toMatchObject({ code: 'ESHUTDOWN' });
});

test('many requests of one client add no listeners that stay', async () => {
  const server = await site();
  const device = await opened(server.url, { maxParallel: 50 });
  const warnings = vi.spyOn(process, 'emitWarning');
  const { signal } = new AbortController();
  await Promise.all(Array.from({ length: 50 }, (_, at) => bytesAt(device, at, 100, signal)));
  expect(warnings).not.toHaveBeenCalled();
  vi.restoreAllMocks();
});
