/** `serve`: one device at one address, with the clients that people use, and every mistake refused before anybody is served. */

import { execFile, spawn, type ChildProcessByStdio } from 'node:child_process';
import { existsSync } from 'node:fs';
import { readFile, stat, writeFile } from 'node:fs/promises';
import { join, relative } from 'node:path';
import type { Readable, Writable } from 'node:stream';
import { promisify } from 'node:util';
import { describe, expect, onTestFinished, test } from 'vitest';
import {
  createServer,
  ListenError,
  NbdClient,
  NbdServer,
  parseNbdUri,
  serve,
  type AnyDevice,
  type Device,
  type DeviceServer,
  type Ending,
  type ListenTarget,
  type ServeOptions,
  type ServerObserver,
  type ServerOptions,
} from '../src/index.js';
import { strays, turns } from './careless.js';
import { temporaryDirectory, until } from './test-server.js';

const run = promisify(execFile);
/** Programs use the build. */
const LIBRARY = new URL('../dist/index.js', import.meta.url).href;
const MIB = 1024 * 1024;
const KEY = Buffer.from('00112233445566778899aabbccddeeff', 'hex');
const PSK = { material: () => ({ verifyPeer: false, pskKey: (user: string) => (user === 'alice' ? KEY : undefined) }) };

interface Ram extends Device {
  readonly disk: Buffer;
  readonly endings: Ending[];
}

function ram(size = MIB): Ram {
  const disk = Buffer.alloc(size);
  const endings: Ending[] = [];
  return {
    disk,
    endings,
    size,
    read: (offset, into) => disk.copy(into, 0, offset),
    write: (offset, data) => disk.set(data, offset),
    close: (ending) => void endings.push(ending),
  };
}

async function started(where: ListenTarget, device: AnyDevice = ram(), options?: ServeOptions): Promise<DeviceServer> {
  const server = await serve(where, device, options);
  onTestFinished(() => server.destroy());
  return server;
}

async function socketUri(name = 'ram'): Promise<string> {
  return `nbd+unix:///${name}?socket=${join(await temporaryDirectory(), 'ram.sock')}`;
}

test('the device in three lines', async () => {
  const path = join(await temporaryDirectory(), 'ram.sock');
  const disk = Buffer.alloc(MIB);
  const server = await serve(`nbd+unix:///ram?socket=${relative('.', path)}`, {
    size: disk.length,
    read: (offset, into) => disk.copy(into, 0, offset),
    write: (offset, data) => disk.set(data, offset),
  });
  onTestFinished(() => server.destroy());
  expect(server.address).toEqual({ transport: 'unix', path });
  expect(server.uri).toBe(`nbd+unix:///ram?socket=${path}`);
  const client = await NbdClient.connect({ path });
  expect(await client.go('ram')).toMatchObject({ size: MIB, readOnly: false, multiConn: true });
  await client.write(5, Buffer.from('kept'));
  expect(disk.toString('latin1', 5, 9)).toBe('kept');
  expect((await client.read(4, 6)).toString('latin1')).toBe('\0kept\0');
  await client.zero(6, 1);
  expect(disk.toString('latin1', 5, 9)).toBe('k\0pt');
  await client.disconnect();
  await server.close();
  expect(existsSync(path)).toBe(false);
});

describe('with clients of others', () => {
  test('nbdinfo shows it, by its name, by the empty name and in the list', async () => {
    const { uri } = await started(await socketUri(), ram(), { description: 'a disk' });
    const json = async (...args: string[]): Promise<unknown> =>
      JSON.parse((await run('nbdinfo', ['--json', ...args])).stdout) as unknown;
    const shown = { 'export-name': 'ram', description: 'a disk', 'export-size': MIB, is_read_only: false };
    const abilities = { can_multi_conn: true, can_zero: true, can_flush: false, can_trim: false };
    expect(await json(uri)).toMatchObject({ exports: [{ ...shown, ...abilities }] });
    expect(await json(uri.replace('/ram?', '/?'))).toMatchObject({ exports: [{ 'export-size': MIB }] });
    expect(await json('--list', uri)).toMatchObject({ exports: [shown] });
    await expect(run('qemu-img', ['info', uri.replace('/ram?', '/rom?')])).rejects.toMatchObject({
      stderr: expect.stringContaining('there is no export "rom"; there is "ram"') as unknown,
    });
  });

  test('nbdcopy copies to it and from it, over several connections', async () => {
    const directory = await temporaryDirectory();
    const [source, copy] = [join(directory, 'source'), join(directory, 'copy')];
    await writeFile(source, Buffer.alloc(4 * MIB, 'every byte of it '));
    const device = ram(4 * MIB);
    const { uri } = await started(await socketUri(), { ...device, flush: () => undefined });
    await run('nbdcopy', ['--flush', source, uri]);
    expect(device.disk.equals(await readFile(source))).toBe(true);
    await run('nbdcopy', [uri, copy]);
    expect((await readFile(copy)).equals(await readFile(source))).toBe(true);
  });

  test('qemu-io writes, with FUA too, zeroes, discards and reads', async () => {
    let flushes = 0;
    const { disk, ...device } = ram();
    const { uri } = await started(await socketUri(), { ...device, flush: () => void flushes++ });
    const commands = ['write -P 7 4096 8192', 'write -f -P 8 0 512', 'write -z 8192 4096', 'read -P 0 8192 4096'];
    const { stdout } = await run('qemu-io', ['-f', 'raw', ...commands.flatMap((each) => ['-c', each]), uri]);
    expect(stdout).not.toContain('failed');
    expect([disk[0], disk[511], disk[4096], disk[8191], disk[8192]]).toEqual([8, 8, 7, 7, 0]);
    expect(flushes).toBeGreaterThan(0);
  });

  test('fio writes and verifies', async () => {
    const { uri } = await started(await socketUri());
    const args = ['--name=x', '--ioengine=nbd', `--uri=${uri}`, '--rw=randwrite', '--bs=4k', '--size=1M'];
    const { stdout } = await run('fio', [
      ...args,
      '--iodepth=8',
      '--verify=crc32c',
      '--do_verify=1',
      '--verify_state_save=0',
    ]);
    expect(stdout).toContain('err= 0');
  });

  test('without write it is read-only', async () => {
    const { uri } = await started(await socketUri(), { size: MIB, read: (_, into) => void into.fill(1) });
    await expect(run('qemu-io', ['-f', 'raw', '-c', 'write 0 512', uri])).rejects.toThrow();
    const { stdout } = await run('qemu-io', ['-r', '-f', 'raw', '-c', 'read -P 1 0 4096', uri]);
    expect(stdout).not.toContain('failed');
  });
});

describe('where it listens', () => {
  test('a port without a host is one of this machine only', async () => {
    const server = await started({ port: 0 });
    expect(server.address).toMatchObject({ transport: 'tcp', host: '127.0.0.1' });
    expect(server.uri).toMatch(/^nbd:\/\/127\.0\.0\.1:\d+\/$/);
    expect(parseNbdUri(server.uri)).toMatchObject(server.address);
    const client = await NbdClient.connect({ host: '127.0.0.1', port: parsedPort(server) });
    expect(await client.go('')).toMatchObject({ size: MIB });
    await client.disconnect();
  });

  test.each(['nbd://localhost:0/a%20b', 'nbd://:0/a%20b', 'nbd://127.0.0.1:0/a%20b'])('%s', async (given) => {
    const server = await started(given);
    expect(parseNbdUri(server.uri)).toMatchObject({ ...server.address, host: '127.0.0.1', exportName: 'a b' });
    const { stdout } = await run('nbdinfo', ['--size', server.uri]);
    expect(stdout.trim()).toBe(String(MIB));
  });

  test('a server at all addresses is localhost for clients', async () => {
    const server = await started({ port: 0, host: '0.0.0.0' }, ram(), { name: 'x' });
    expect(server.uri).toBe(`nbd://localhost:${parsedPort(server)}/x`);
    const { stdout } = await run('nbdinfo', ['--size', server.uri]);
    expect(stdout.trim()).toBe(String(MIB));
  });

  test('a path, with the permissions of its file', async () => {
    const path = join(await temporaryDirectory(), 'a b.sock');
    const server = await started({ path, mode: 0o600 }, ram(), { name: 'é' });
    expect(server.uri).toBe(`nbd+unix:///%C3%A9?socket=${path.replace(' ', '%20')}`);
    expect((await stat(path)).mode & 0o777).toBe(0o600);
    await server.close();
    await started(server.uri, ram(), { mode: 0o660 });
    expect((await stat(path)).mode & 0o777).toBe(0o660);
  });

  test('the parts of a URI, and further addresses', async () => {
    const server = await started(parseNbdUri(await socketUri('a/b')));
    const uri = server.uri;
    const more = await server.listen({ port: 0 });
    expect(server.uri).toBe(uri);
    if (more.transport !== 'tcp') throw new Error('no port');
    const client = await NbdClient.connect({ host: '127.0.0.1', port: more.port });
    expect(await client.go('a/b')).toMatchObject({ size: MIB });
    await client.disconnect();
  });

  test('a descriptor that listens already', async () => {
    // A child listens, and its child is the program that was given the descriptor.
    const program = `
      const { spawn } = require('node:child_process');
      const listener = require('node:net').createServer().listen(0, '127.0.0.1', () => {
        const stdio = ['inherit', 'inherit', 'inherit', listener._handle.fd];
        const args = ['--input-type=module', '-e', process.argv[1]];
        spawn(process.execPath, args, { stdio }).once('exit', (code) => process.exit(code));
        listener.close();
      });`;
    const served = `
      const { serve } = await import(${JSON.stringify(LIBRARY)});
      const device = { size: 512, read: (offset, into) => into.fill(1) };
      const server = await serve({ fd: 3 }, device, { name: 'x' });
      console.log(server.uri);
      process.stdin.once('end', () => server.close()).resume();`;
    const child = spawn(process.execPath, ['-e', program, served], { stdio: ['pipe', 'pipe', 'inherit'] });
    onTestFinished(() => void child.stdin.end());
    const ended = new Promise((resolve) => child.once('exit', resolve));
    const uri = await firstOutput(child);
    expect(uri).toMatch(/^nbd:\/\/127\.0\.0\.1:\d+\/x$/);
    expect((await run('nbdinfo', ['--size', uri])).stdout.trim()).toBe('512');
    child.stdin.end();
    expect(await ended).toBe(0);
  });

  test('NbdServer listens at URIs and ports too', async () => {
    const find = (): never => {
      throw new Error('not called');
    };
    const server = new NbdServer({ provider: { list: () => [], describe: find, open: find } });
    onTestFinished(() => server.destroy());
    expect(await server.listen({ port: 0 })).toMatchObject({ host: '127.0.0.1' });
    expect(await server.listen('nbd://localhost:0')).toMatchObject({ host: '127.0.0.1' });
    const uri = parseNbdUri(await socketUri());
    expect(await server.listen(uri)).toMatchObject({ transport: 'unix' });
    await expect(server.listen('nbds://localhost:0')).rejects.toThrow(/requires TLS, and it has no option tls/);
  });
});

describe('TLS', () => {
  test('an nbds URI requires it, and clients are told so', async () => {
    const server = await started('nbds://localhost:0/ram', ram(), { tls: { ...PSK, mode: 'on' } });
    const port = parsedPort(server);
    expect(server.uri).toBe(`nbds://localhost:${port}/ram`);
    const inTheClear = await NbdClient.connect({ host: '127.0.0.1', port });
    await expect(inTheClear.go('ram')).rejects.toThrow(/TLS/);
    inTheClear.destroy();
    const client = await NbdClient.connect({ host: '127.0.0.1', port, tls: { psk: { user: 'alice', key: KEY } } });
    expect(await client.go('ram')).toMatchObject({ size: MIB });
    await client.disconnect();
  });

  test('the option tls without a mode requires it', async () => {
    const server = await started({ port: 0 }, ram(), { tls: PSK });
    expect(server.uri).toMatch(/^nbds:/);
    expect((await started({ port: 0 }, ram(), { tls: { ...PSK, mode: 'on' } })).uri).toMatch(/^nbd:/);
  });

  // A misspelt mode must not mean that clients are served in the clear.
  const noTls: [string, unknown, RegExp][] = [
    ['a misspelt mode', { ...PSK, mode: 'required' }, /tls.mode is "required", and must be 'off', 'on' or 'require'/],
    ['a mode that is true', { ...PSK, mode: true }, /tls.mode is a boolean/],
    ['no keys', {}, /tls.material is undefined, not a function/],
    ['keys that are no function', { material: PSK.material() }, /tls.material is an object, not a function/],
    ['null', null, /tls is null, not an object/],
  ];
  for (const [what, given, message] of noTls) {
    test(`${what} is refused at once`, async () => {
      const tls = given as NonNullable<ServeOptions['tls']>;
      await expect(serve(await socketUri(), ram(), { tls })).rejects.toThrow(message);
      const mode = 'require' as const;
      const whole = { tls: given === null ? null : { mode, ...tls } } as { readonly tls: ServerOptions['tls'] };
      expect(() => createServer({ ...whole, exports: () => ram() })).toThrow(message);
    });
  }

  test('nbdinfo reads the URI', async () => {
    const keys = join(await temporaryDirectory(), 'keys');
    await writeFile(keys, `alice:${KEY.toString('hex')}\n`);
    const server = await started(`nbds://alice@localhost:0/ram?tls-psk-file=${keys}`, ram(), { tls: PSK });
    const { stdout } = await run('nbdinfo', ['--size', server.uri]);
    expect(stdout.trim()).toBe(String(MIB));
  });
});

describe('the end', () => {
  test('the device is closed once, after all connections, and the socket is gone', async () => {
    const device = ram();
    const server = await started(await socketUri(), device);
    if (server.address.transport !== 'unix') throw new Error('no path');
    const { path } = server.address;
    const clients = await Promise.all([0, 1, 2].map(() => NbdClient.connect({ path })));
    await Promise.all(clients.map((client) => client.go('ram')));
    await Promise.all(clients.map((client) => client.disconnect()));
    await until(() => server.connections.size === 0, 'all clients have left');
    expect(device.endings).toEqual([]);
    await Promise.all([server.close(), server.close()]);
    expect(device.endings).toEqual(['disconnect']);
    expect(existsSync(path)).toBe(false);
    server.destroy();
    expect(device.endings).toEqual(['disconnect']);
  });

  test('the ending is lost if a client did not say goodbye', async () => {
    const device = ram();
    const server = await started(await socketUri(), device);
    const client = await NbdClient.connect({ path: (server.address as { path: string }).path });
    await client.go('ram');
    client.destroy();
    await server.close();
    expect(device.endings).toEqual(['lost']);
  });

  test('await using closes it', async () => {
    const device = ram();
    const server = await started(await socketUri(), device);
    await server[Symbol.asyncDispose]();
    expect(device.endings).toEqual(['disconnect']);
  });

  test('a device that cannot be closed makes close fail', async () => {
    const server = await started(await socketUri(), {
      ...ram(),
      close: () => Promise.reject(new Error('still dirty')),
    });
    await expect(server.close()).rejects.toThrow('still dirty');
    server.destroy();
  });

  test('a grace time that is none closes nothing', async () => {
    const device = ram();
    const server = await started(await socketUri(), device);
    for (const graceMs of [-1, NaN, '5' as unknown as number]) {
      await expect(server.close({ graceMs })).rejects.toThrow(RangeError);
    }
    const client = await NbdClient.connect({ uri: server.uri });
    await client.go('ram');
    expect((await client.read(0, 512)).length).toBe(512);
    await client.disconnect();
    expect(device.endings).toEqual([]);
    expect(await server.close()).toEqual({ unfinished: [] });
    await expect(server.close({ graceMs: -1 })).rejects.toThrow(RangeError);
    expect(device.endings).toEqual(['disconnect']);
  });

  test('whatever the close of a device throws, destroy reports it', async () => {
    const uncaught = strays();
    const reported: unknown[] = [];
    const observer: ServerObserver = {
      onError: (error, { source, method, exportName }) => reported.push([error, source, method, exportName]),
    };
    for (const thrown of [undefined, null, 7, 'text', {}]) {
      const close = (): Promise<void> =>
        new Promise((_, reject) => {
          // eslint-disable-next-line @typescript-eslint/prefer-promise-reject-errors -- as plain JavaScript may
          reject(thrown);
        });
      const server = await started(await socketUri(), { ...ram(), close }, { observer });
      server.destroy();
      await turns();
      expect(reported.splice(0)).toEqual([[thrown, 'device', 'close', 'ram']]);
    }
    expect(uncaught).toEqual([]);
  });

  test('destroy closes the device when its last request has finished', async () => {
    const device = ram();
    let finish = (): void => undefined;
    let isReading = false;
    const read = (): Promise<void> => {
      isReading = true;
      return new Promise((resolve) => (finish = resolve));
    };
    const server = await started(await socketUri(), { ...device, read });
    const client = await NbdClient.connect({ path: (server.address as { path: string }).path });
    await client.go('ram');
    const reading = client.read(0, 512).catch(() => undefined);
    await until(() => isReading, 'the device reads');
    server.destroy();
    await reading;
    expect(device.endings).toEqual([]);
    finish();
    await until(() => device.endings.length > 0, 'the device is closed');
    expect(device.endings).toEqual(['lost']);
  });

  test('a program lives while it serves, and ends after close', async () => {
    const path = join(await temporaryDirectory(), 'ram.sock');
    const program = `
      const { serve } = await import(${JSON.stringify(LIBRARY)});
      const disk = new Uint8Array(1024);
      const server = await serve('nbd+unix:///ram?socket=${path}', {
        size: disk.length,
        read: (offset, into) => into.set(disk.subarray(offset, offset + into.length)),
        write: (offset, data) => disk.set(data, offset),
      });
      console.log(server.uri);
      process.once('SIGTERM', () => server.close());`;
    const child = spawn(process.execPath, ['--input-type=module', '-e', program], {
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    onTestFinished(() => void child.kill('SIGKILL'));
    const ended = new Promise((resolve) => child.once('exit', resolve));
    const uri = await firstOutput(child);
    await run('qemu-io', ['-f', 'raw', '-c', 'write -P 3 0 512', '-c', 'read -P 3 0 512', uri]);
    child.kill('SIGTERM');
    expect(await ended).toBe(0);
  });
});

describe('refused at once, in one line', () => {
  const good = { size: 512, read: () => undefined };
  const full = { ...good, write: () => undefined, flush: () => undefined, close: () => undefined };
  const devices: readonly (readonly [unknown, RegExp])[] = [
    [undefined, /the device cannot be served: it is undefined, and a device is an object/],
    [null, /it is null/],
    ['disk.img', /it is a string/],
    [Promise.resolve(good), /it is a promise; await it/],
    [() => good, /it is a function; createServer takes/],
    [[good], /it is an array without a method read/],
    [{ size: 512 }, /it is an object without a method read/],
    [Buffer.alloc(512), /it is a Buffer without a method read/],
    [{ size: 512, read: 'x' }, /read is a string, not a function/],
    [{ read: good.read }, /it has no size, in bytes/],
    [{ ...good, size: NaN }, /size NaN is not an integer from 0 to 2\^53-1/],
    [{ ...good, size: -1 }, /size -1 is not/],
    [{ ...good, size: 1.5 }, /size 1.5 is not/],
    [{ ...good, size: Infinity }, /size Infinity is not/],
    [{ ...good, size: 2 ** 53 }, /size 9007199254740992 is not/],
    [{ ...good, size: '512' }, /size is a string, not a number/],
    [{ ...good, size: 512n }, /size is a bigint, not a number; give Number\(size\)/],
    [{ ...good, write: true }, /write is a boolean, not a function; leave out/],
    [{ ...good, flush: null }, /flush is null, not a function/],
    [{ ...good, close: {} }, /close is an object, not a function/],
    [{ ...good, readOnly: false }, /it is not readOnly, and has no method write/],
    [{ ...good, readOnly: 'no' }, /readOnly is a string, not true or false/],
    [{ ...good, canTrim: true }, /canTrim without a method trim/],
    [{ ...good, canFlush: true }, /canFlush without a method flush/],
    [{ ...good, contexts: ['base:allocation'] }, /contexts without a method extents/],
    [{ ...good, contexts: 'base:allocation', extents: () => undefined }, /contexts is a string, not an array of names/],
    [{ ...good, contexts: ['allocation'], extents: () => undefined }, /context "allocation" is not NAMESPACE:LEAF/],
    [{ ...good, minimumBlockSize: 1000 }, /minimumBlockSize 1000 is not a power of two/],
    [{ ...good, preferredBlockSize: 100 }, /preferredBlockSize 100 is not a power of two/],
    [{ ...good, geometry: 5 }, /geometry is a number, not an object/],
    [{ ...full, geometry: {} }, /it has no size/],
    [{ ...good, geometry: { size: 512 } }, /it is not readOnly, and has no method write/],
  ];
  test.each(devices)('the device %#', async (device, message) => {
    const error = await serve({ port: 0 }, device as Device).catch((thrown: unknown) => thrown);
    expect(error).toBeInstanceOf(TypeError);
    expect((error as Error).message).toMatch(message);
    expect((error as Error).message).not.toContain('\n');
  });

  const places: readonly (readonly [unknown, RegExp])[] = [
    [undefined, /cannot listen on undefined: give an NBD URI, \{ path \}/],
    [10809, /cannot listen on a number/],
    [null, /cannot listen on null/],
    [{}, /an object without any of path, port, fd/],
    [{ path: '/tmp/x', port: 1 }, /path and port/],
    [{ path: '' }, /an empty path/],
    [{ path: '/tmp/x', mode: '600' }, /mode "600" is not a number/],
    [{ path: '\0abstract', mode: 0o600 }, /an abstract one has none/],
    [{ port: '80' }, /port "80": it is not a number from 0 to 65535/],
    [{ port: 70000 }, /port 70000/],
    [{ port: 0, host: '' }, /an empty host/],
    [{ fd: -1 }, /descriptor -1/],
    ['/tmp/ram.sock', /"\/tmp\/ram.sock" is not an NBD URI/],
    ['http://localhost/', /is not an NBD URI/],
    ['nbd+unix:///ram', /the path of the unix socket is missing/],
    ['nbds://localhost:0/', /an nbds URI needs the option tls/],
    [`nbd+unix:///?socket=/tmp/${'x'.repeat(120)}`, /the path has 125 bytes/],
    [
      'nbd+unix:///?socket=/nowhere/at/all.sock',
      /cannot listen on \/nowhere\/at\/all.sock: there is no directory \/nowhere\/at/,
    ],
  ];
  test.each(places)('the place %j', async (where, message) => {
    await expect(serve(where as string, good)).rejects.toThrow(message);
  });

  test('the options', async () => {
    await expect(serve('nbd://:0/a', good, { name: 'b' })).rejects.toThrow(/two names: "a" in the URI, and "b"/);
    await expect(serve({ port: 0 }, good, { name: 'a\0b' })).rejects.toThrow(/no NUL/);
    await expect(serve({ port: 0 }, good, { name: 5 as unknown as string })).rejects.toThrow(/name is a number/);
    await expect(serve({ port: 0 }, good, { mode: 0o600 })).rejects.toThrow(/mode is for the file of a unix socket/);
    const tls = { ...PSK, mode: 'off' as const };
    await expect(serve('nbds://:0/', good, { tls })).rejects.toThrow(/tls.mode is 'off'/);
  });

  test('an address in use; the device is still the caller’s', async () => {
    const uri = await socketUri();
    await started(uri);
    const device = ram();
    await expect(serve(uri, device)).rejects.toThrow(ListenError);
    expect(device.endings).toEqual([]);
  });
});

function parsedPort(server: DeviceServer): number {
  if (server.address.transport !== 'tcp') throw new Error('no port');
  return server.address.port;
}

/** The first line that a program prints. */
function firstOutput(child: ChildProcessByStdio<Writable | null, Readable, null>): Promise<string> {
  return new Promise((resolve, reject) => {
    child.stdout.once('data', (text: Buffer) => resolve(text.toString().trim()));
    child.once('exit', () => reject(new Error('the program ended')));
  });
}
