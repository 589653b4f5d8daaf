/** Durability of the local store: names, lengths and syncs. Data that is not durable is never reported as durable. */
import fs from 'node:fs';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import { LocalStore } from '../../src/store/local/local-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import type { Vdi } from '../../src/vdi/vdi.js';
import { FailingDisk } from '../harness/failing-disk.js';
import { BIN, cli, needs, nbdsh, ok, startDaemon, temporaryDirectory } from '../harness/daemon.js';

// As bin/start.cjs sets it: with Node's default of few threads, one held write would hold all others.
vi.hoisted(() => void (process.env.UV_THREADPOOL_SIZE = '24'));

const OBJECT = 2 ** 20;

let directory: string;
let failing: FailingDisk;
let store: LocalStore;
let catalog: VdiCatalog;

async function start(): Promise<void> {
  failing = new FailingDisk();
  store = await LocalStore.open(directory, { disk: failing.disk });
  catalog = new VdiCatalog(store);
}

beforeEach(async () => {
  directory = path.join(temporaryDirectory(), 'store');
  await start();
});

afterEach(() => catalog.close().catch(() => undefined));

function objectFiles(): string[] {
  return fs
    .readdirSync(path.join(directory, 'objects'), { recursive: true, encoding: 'utf8' })
    .filter((name) => name.length > 2)
    .map((name) => path.join(directory, 'objects', name));
}

const allOf = async (vdi: Vdi): Promise<void> => vdi.read(0, Buffer.alloc(vdi.size));
const extentsOf = async (vdi: Vdi): Promise<void> => vdi.extents(0, vdi.size, () => true);

needs('strace')('a new store is in its directory, and that in the one above, on stable storage', async () => {
  const deep = path.join(temporaryDirectory(), 'a', 'b', 'store');
  const trace = path.join(temporaryDirectory(), 'trace');
  const args = ['-f', '-y', '-qq', '-e', 'trace=fsync', '-o', trace];
  const command = [process.execPath, BIN, 'vdi', 'create', 'disk', '64M', '--store', deep];
  await ok('strace', [...args, ...command]);
  const synced = new Set(
    Array.from(fs.readFileSync(trace, 'utf8').matchAll(/fsync\(\d+<([^>]*)>\) += 0/g), ([, name]) => name),
  );
  for (const name of ['../../..', '../..', '..', '.', 'objects']) expect(synced).toContain(path.join(deep, name));
  // Once.
  await ok('strace', [...args, ...command.slice(0, 3), 'list', '--store', deep]);
  expect(fs.readFileSync(trace, 'utf8')).not.toContain(`${path.join(deep, '..')}>`);
});

describe('a sync of a folder that failed', () => {
  test('is not repaired by a later sync, for all VDIs with new objects in it', async () => {
    const size = 1024 * OBJECT;
    const names = ['first', 'second', 'third'];
    for (const name of names) await catalog.create(name, size, { blockSizeShift: 20 });
    const [first, second, third] = (await Promise.all(names.map((name) => catalog.openVdi(name)))) as [Vdi, Vdi, Vdi];
    // Objects of vid 1 at idx 0 and of vid 2 at idx 768 are in one folder.
    await first.write(0, Buffer.from('new'), false);
    await second.write(768 * OBJECT, Buffer.from('new'), false);
    await third.write(0, Buffer.from('new'), false);
    const folders = objectFiles().map((name) => path.dirname(name));
    expect(new Set(folders).size).toBe(2);
    const failed = failing.fail({ calls: ['fsync'], file: /objects/ }, 'EIO');
    await expect(first.flush()).rejects.toMatchObject({ code: 'IO' });
    failed.off();
    await expect(first.flush()).rejects.toMatchObject({ code: 'IO' });
    await expect(first.write(0, Buffer.from('fua'), true)).rejects.toMatchObject({ code: 'IO' });
    await expect(second.flush()).rejects.toMatchObject({ code: 'IO' });
    await third.flush();
  });

  test('is final for an object that is being created in it at that moment, too', async () => {
    for (const name of ['first', 'second']) await catalog.create(name, 1024 * OBJECT, { blockSizeShift: 20 });
    const [first, second] = [await catalog.openVdi('first'), await catalog.openVdi('second')];
    let goOn!: () => void;
    const isHeld = new Promise<void>((resolve) => (goOn = resolve));
    let made!: () => void;
    const isMade = new Promise<void>((resolve) => (made = resolve));
    // Objects of vid 1 at idx 0 and of vid 2 at idx 768 are in one folder.
    failing.instead({ calls: ['write'], file: /objects/, times: 1 }, async (_, proceed) => {
      const count = await proceed();
      made();
      await isHeld;
      return count;
    });
    const writing = second.write(768 * OBJECT, Buffer.from('new'), false);
    await isMade;
    await first.write(0, Buffer.from('new'), false);
    const failed = failing.fail({ calls: ['fsync'], file: /objects/ }, 'EIO');
    await expect(first.flush()).rejects.toMatchObject({ code: 'IO' });
    failed.off();
    goOn();
    await writing;
    await expect(second.flush()).rejects.toMatchObject({ code: 'IO' });
  });
});

describe('an object file without the length of its object', () => {
  let vdi: Vdi;

  async function damage(length: number): Promise<void> {
    await catalog.create('disk', 4 * OBJECT, { blockSizeShift: 20 });
    vdi = await catalog.openVdi('disk');
    for (const idx of [0, 1, 2]) await vdi.write(idx * OBJECT, Buffer.alloc(OBJECT, 7), false);
    await catalog.release(vdi);
    await catalog.snapshot('disk', 'kept');
    await catalog.close();
    const [file = ''] = objectFiles().filter((name) => name.endsWith('00000001'));
    fs.truncateSync(file, length);
    await start();
    vdi = await catalog.openVdi('disk');
  }

  for (const [what, length] of [
    ['too short', OBJECT / 2],
    ['empty', 0],
    ['too long', OBJECT + 4096],
  ] as const) {
    test(`because it is ${what} is damage: it is not read, not copied and not reported as a hole, and check lists it`, async () => {
      await damage(length);
      await vdi.read(0, Buffer.alloc(OBJECT));
      for (const use of [
        () => allOf(vdi),
        () => extentsOf(vdi),
        async () => vdi.write(OBJECT + 4096, Buffer.from('part'), false),
      ]) {
        await expect(use()).rejects.toMatchObject({ code: 'DAMAGED', message: new RegExp(`is ${length} bytes long`) });
      }
      await catalog.release(vdi);
      const { problems } = await catalog.check({ repair: false });
      const range = `bytes ${OBJECT} to ${2 * OBJECT - 1} (object file is ${length} bytes long)`;
      expect(problems).toEqual([`lost: disk@kept ${range}`, `lost: disk ${range}`]);
      // After a write of the whole object, or a trim, the disk is whole again.
      vdi = await catalog.openVdi('disk');
      await vdi.write(OBJECT, Buffer.alloc(OBJECT, 8), false);
      await allOf(vdi);
    });
  }

  test('because it was truncated while it is open is damage too', async () => {
    await catalog.create('disk', 4 * OBJECT, { blockSizeShift: 20 });
    vdi = await catalog.openVdi('disk');
    await vdi.write(0, Buffer.alloc(OBJECT, 7), true);
    await allOf(vdi);
    fs.truncateSync(objectFiles()[0] ?? '', OBJECT / 2);
    await expect(allOf(vdi)).rejects.toMatchObject({ code: 'DAMAGED' });
    await expect(extentsOf(vdi)).rejects.toMatchObject({ code: 'DAMAGED' });
  });

  needs('nbdsh', 'qemu-img')('is EIO for clients, and no export comes of it', async () => {
    await damage(OBJECT / 2);
    await catalog.close();
    const daemon = await startDaemon({ store: directory });
    const { code, stderr } = await nbdsh([
      '--base-allocation',
      '-u',
      daemon.uri('disk'),
      '-c',
      `
import errno
def eio(call):
    try:
        call()
    except nbd.Error as e:
        assert e.errnum == errno.EIO, e
    else:
        raise AssertionError('no error')
eio(lambda: h.pread(4096, 2**20 + 2**19))
eio(lambda: h.block_status(2**20, 2**20, lambda *args: 0))
h.pread(2**20, 0)
`,
    ]);
    expect(code, stderr).toBe(0);
    const out = path.join(temporaryDirectory(), 'out.raw');
    const exported = await cli(['export', 'disk', out], { store: directory });
    expect(exported.code, exported.stderr).not.toBe(0);
    expect((await daemon.stop()).code).toBe(0);
    const checked = await cli(['check'], { store: directory });
    expect(checked.code).not.toBe(0);
    expect(checked.stdout + checked.stderr).toContain('object file is 524288 bytes long');
  });
});

test('an object that is trimmed and created again always has its length: the stored map still refers to it', async () => {
  await catalog.create('disk', 4 * OBJECT, { blockSizeShift: 20 });
  const vdi = await catalog.openVdi('disk');
  await vdi.write(0, Buffer.alloc(OBJECT, 7), true);
  const [file = ''] = objectFiles();
  const { ino } = fs.statSync(file);
  await vdi.trim(0, OBJECT, false);
  /** The length of the file each time that it was emptied. */
  const emptied: number[] = [];
  failing.instead({ calls: ['punchHole'] }, ({ args }, proceed) => {
    emptied.push(fs.fstatSync(args[0] as number).size);
    return proceed();
  });
  await vdi.write(4096, Buffer.from('new'), false);
  expect(emptied).toEqual([OBJECT]);
  expect(fs.statSync(file).ino).toBe(ino);
  const all = Buffer.alloc(OBJECT);
  await vdi.read(0, all);
  expect(all.indexOf('new')).toBe(4096);
  expect(all.filter((byte) => byte !== 0)).toHaveLength(3);
});
