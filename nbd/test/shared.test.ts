/** `shared`: one device behind many connections, opened with the first and closed with the last, in whatever order they come. */

import { join } from 'node:path';
import { expect, onTestFinished, test, vi } from 'vitest';
import {
  createServer,
  ExportError,
  NbdClient,
  NbdServer,
  shared,
  type CompleteDevice,
  type Device,
  type Ending,
  type OpenShared,
} from '../src/index.js';
import { Gate } from './test-device.js';
import { temporaryDirectory, until } from './test-server.js';

const SIZE = 4096;

/** Opens devices in memory, notes what happens, and waits where the test says so. */
class Opener {
  readonly events: string[] = [];
  readonly signals: AbortSignal[] = [];
  opening: Gate | undefined;
  closing: Gate | undefined;
  extra: Partial<Device> = {};
  #count = 0;

  readonly open: OpenShared = async (name, { signal }) => {
    const id = `${name}${++this.#count}`;
    this.events.push(`opening ${id}`);
    this.signals.push(signal);
    await this.opening?.opened;
    this.events.push(`open ${id}`);
    const disk = Buffer.alloc(SIZE);
    return {
      size: SIZE,
      read: (offset, into) => disk.copy(into, 0, offset),
      write: (offset, data) => disk.set(data, offset),
      close: async (ending) => {
        this.events.push(`closing ${id} ${ending}`);
        await this.closing?.opened;
        this.events.push(`closed ${id}`);
      },
      ...this.extra,
    };
  };
}

async function part(opened: Promise<CompleteDevice | null>): Promise<CompleteDevice> {
  const device = await opened;
  if (device === null) throw new Error('there is no device');
  return device;
}

test('it is opened with the first connection and closed once, with the last', async () => {
  const opener = new Opener();
  const disk = shared('a', opener.open);
  expect(opener.events).toEqual([]);
  const [first, second] = await Promise.all([part(disk()), part(disk('a'))]);
  const third = await part(disk('a'));
  expect(opener.events).toEqual(['opening a1', 'open a1']);
  await first.write(8, Buffer.from('both'), false);
  const into = Buffer.alloc(4);
  await third.read(8, into);
  expect(into.toString()).toBe('both');
  await first.close('disconnect');
  // Twice is once.
  await first.close('disconnect');
  await second.close('disconnect');
  expect(opener.events).toHaveLength(2);
  await third.close('disconnect');
  expect(opener.events.slice(2)).toEqual(['closing a1 disconnect', 'closed a1']);
  await part(disk());
  expect(opener.events.slice(4)).toEqual(['opening a2', 'open a2']);
});

test('each name has a device of its own; other names than the given one have none', async () => {
  const opener = new Opener();
  const disks = shared(opener.open);
  await Promise.all([disks('a'), disks('b'), disks('a')]);
  expect(opener.events.filter((event) => event.startsWith('opening'))).toEqual(['opening a1', 'opening b2']);
  expect(await shared('a', opener.open)('b')).toBeNull();
});

test.each<readonly [Ending[], Ending]>([
  [['disconnect', 'disconnect'], 'disconnect'],
  [['lost', 'disconnect'], 'lost'],
  [['disconnect', 'lost'], 'lost'],
])('connections that ended with %j close it with %j', async (endings, expected) => {
  const opener = new Opener();
  const disk = shared('a', opener.open);
  const parts = await Promise.all(endings.map(() => part(disk())));
  for (const [index, ending] of endings.entries()) await parts[index]?.close(ending);
  expect(opener.events).toContain(`closing a1 ${expected}`);
  // The next time is not concerned.
  await (await part(disk())).close('disconnect');
  expect(opener.events).toContain('closing a2 disconnect');
});

test('an open that fails fails for all that wait, and the next one tries again', async () => {
  let attempts = 0;
  const open = new Gate();
  const disk = shared('a', async () => {
    if (++attempts > 1) return { size: SIZE, read: () => undefined };
    await open.opened;
    throw new ExportError('POLICY', 'not on Mondays');
  });
  const waiting = [disk(), disk()];
  const failures = Promise.all(waiting.map((each) => expect(each).rejects.toThrow('not on Mondays')));
  open.open();
  await failures;
  expect(await disk()).toMatchObject({ geometry: { size: SIZE } });
  expect(attempts).toBe(2);
});

test('there may be none, or an error instead', async () => {
  const answers = [null, undefined, new ExportError('POLICY', 'no'), 5, { size: -1, read: () => 0 }];
  let closed = 0;
  const disk = shared((name) => {
    const answer: unknown = answers[Number(name)];
    return (Number(name) < 4 ? answer : { ...(answer as object), close: () => void closed++ }) as Device;
  });
  expect(await disk('0')).toBeNull();
  expect(await disk('1')).toBeNull();
  await expect(disk('2')).rejects.toThrow(ExportError);
  await expect(disk('3')).rejects.toThrow('the shared device "3" cannot be served: it is a number');
  await expect(disk('4')).rejects.toThrow('the shared device "4" cannot be served: size -1');
  expect(closed).toBe(1);
  expect(() => shared('a' as unknown as OpenShared)).toThrow(TypeError);
  expect(() => shared(5 as unknown as string, () => null)).toThrow(TypeError);
});

test('a connection that comes during the closing waits for it, then the device is opened anew', async () => {
  const opener = new Opener();
  opener.closing = new Gate();
  const disk = shared('a', opener.open);
  const first = await part(disk());
  const closed = first.close('disconnect');
  const second = disk();
  await until(() => opener.events.includes('closing a1 disconnect'), 'it is being closed');
  expect(opener.events).not.toContain('opening a2');
  opener.closing.open();
  await closed;
  await part(second);
  expect(opener.events.slice(2)).toEqual(['closing a1 disconnect', 'closed a1', 'opening a2', 'open a2']);
});

test('an error of close goes to the last connection, and the device can be opened again', async () => {
  const opener = new Opener();
  opener.extra = { close: () => Promise.reject(new Error('still dirty')) };
  const disk = shared('a', opener.open);
  const [first, second] = await Promise.all([part(disk()), part(disk())]);
  await first.close('lost');
  await expect(second.close('lost')).rejects.toThrow('still dirty');
  await part(disk());
  expect(opener.events).toContain('open a2');
});

test('a connection that leaves while it waits does not disturb the others', async () => {
  const opener = new Opener();
  opener.opening = new Gate();
  const disk = shared('a', opener.open);
  const leaving = new AbortController();
  const left = disk('a', { signal: leaving.signal });
  const stays = disk('a', { signal: new AbortController().signal });
  leaving.abort(new Error('gone'));
  await expect(left).rejects.toThrow('gone');
  expect(opener.signals[0]?.aborted).toBe(false);
  opener.opening.open();
  await (await part(stays)).close('disconnect');
  expect(opener.events.slice(1)).toEqual(['open a1', 'closing a1 disconnect', 'closed a1']);
  await expect(disk('a', { signal: leaving.signal })).rejects.toThrow('gone');
  expect(opener.events).toHaveLength(4);
});

test('when nobody waits any more the opening is aborted, and what it opens is closed', async () => {
  const opener = new Opener();
  opener.opening = new Gate();
  const disk = shared('a', opener.open);
  const leaving = new AbortController();
  const left = [disk('a', { signal: leaving.signal }), disk('a', { signal: leaving.signal })];
  const failures = Promise.all(left.map((each) => expect(each).rejects.toThrow('gone')));
  leaving.abort(new Error('gone'));
  await failures;
  expect(opener.signals[0]?.aborted).toBe(true);
  opener.opening.open();
  await until(() => opener.events.includes('closed a1'), 'it is closed');
  expect(opener.events).toEqual(['opening a1', 'open a1', 'closing a1 disconnect', 'closed a1']);
});

test('one that comes after all others have left has it tried again', async () => {
  let attempts = 0;
  const disk = shared('a', async (_, { signal }) => {
    if (++attempts > 1) return { size: SIZE, read: () => undefined };
    await new Promise((resolve) => signal.addEventListener('abort', resolve));
    throw signal.reason;
  });
  const leaving = new AbortController();
  const left = disk('a', { signal: leaving.signal });
  leaving.abort(new Error('gone'));
  const later = disk('a');
  await expect(left).rejects.toThrow('gone');
  await part(later);
  expect(attempts).toBe(2);
});

test('an error of close that nobody waits for is a warning', async () => {
  const warned = vi.spyOn(process, 'emitWarning').mockImplementation(() => undefined);
  onTestFinished(() => warned.mockRestore());
  const opener = new Opener();
  opener.opening = new Gate();
  opener.extra = { close: () => Promise.reject(new Error('still dirty')) };
  const leaving = new AbortController();
  const left = expect(shared('a', opener.open)('a', { signal: leaving.signal })).rejects.toThrow();
  leaving.abort();
  opener.opening.open();
  await left;
  await until(() => warned.mock.calls.length > 0, 'it warns');
  expect(warned.mock.calls[0]?.[0]).toContain('close of the device of export "a" failed: Error: still dirty');
});

test('multiConn is announced, unless the device says otherwise', async () => {
  const device = { size: SIZE, read: () => undefined };
  const of = async (given: Device): Promise<boolean> => (await part(shared(() => given)())).geometry.multiConn;
  expect(await of(device)).toBe(true);
  expect(await of({ ...device, multiConn: false })).toBe(false);
  const full = { ...device, write: () => undefined, flush: () => undefined, close: () => undefined };
  expect(await of({ ...full, geometry: { size: SIZE } } as Device)).toBe(true);
  expect(await of({ ...full, geometry: { size: SIZE, multiConn: false } } as Device)).toBe(false);
});

test('connections that come and go at random never see two devices at once', async () => {
  let open = 0;
  let most = 0;
  const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve));
  const disk = shared('a', async () => {
    await turn();
    most = Math.max(most, ++open);
    const close = async (): Promise<void> => {
      await turn();
      open--;
    };
    return { size: SIZE, read: () => undefined, close };
  });
  let seed = 7;
  const random = (below: number): number => (seed = (seed * 16807) % 2147483647) % below;
  const connection = async (): Promise<void> => {
    for (let round = 0; round < 50; round++) {
      const leaving = new AbortController();
      const joined = disk('a', { signal: leaving.signal });
      if (random(4) === 0) leaving.abort(new Error('gone'));
      const device = await joined.catch(() => null);
      for (let turns = random(4); turns > 0; turns--) await turn();
      await device?.close('disconnect');
    }
  };
  await Promise.all([connection(), connection(), connection(), connection()]);
  await until(() => open === 0, 'the last one is closed');
  expect(most).toBe(1);
});

test('as the exports of a server, with several connections', async () => {
  const path = join(await temporaryDirectory(), 'nbd.sock');
  const opener = new Opener();
  const server = createServer({ exports: shared('a', opener.open) });
  onTestFinished(() => server.destroy());
  await server.listen({ path });
  const clients = await Promise.all([0, 1, 2].map(() => NbdClient.connect({ path })));
  for (const client of clients) expect(await client.go('a')).toMatchObject({ multiConn: true });
  await clients[0]?.write(0, Buffer.from('seen'));
  expect((await clients[2]?.read(0, 4))?.toString()).toBe('seen');
  const other = await NbdClient.connect({ path });
  await expect(other.go('b')).rejects.toThrow('there is no export "b"');
  await other.disconnect();
  await Promise.all(clients.map((client) => client.disconnect()));
  await server.close();
  expect(opener.events).toEqual(['opening a1', 'open a1', 'closing a1 disconnect', 'closed a1']);
});

test('in an ExportProvider', async () => {
  const path = join(await temporaryDirectory(), 'nbd.sock');
  const opener = new Opener();
  const disk = shared('a', opener.open);
  const info = { name: 'a', description: '' };
  const server = new NbdServer({
    provider: {
      list: () => [info],
      describe: () => ({ geometry: { size: SIZE }, info }),
      open: async (name, _peer, context) => ({ device: await part(disk(name, context)), info }),
    },
  });
  onTestFinished(() => server.destroy());
  await server.listen({ path });
  const [first, second] = await Promise.all([NbdClient.connect({ path }), NbdClient.connect({ path })]);
  await Promise.all([first.go('a'), second.go('a')]);
  await first.disconnect();
  second.destroy();
  await server.close();
  expect(opener.events).toEqual(['opening a1', 'open a1', 'closing a1 lost', 'closed a1']);
});
