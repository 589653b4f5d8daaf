/** Creating a store: in which directories, by which commands, and the state after an interrupted creation. */
import fs from 'node:fs';
import path from 'node:path';
import { pathToFileURL } from 'node:url';
import { describe, expect, test } from 'vitest';
import { directoryState } from '../../src/store/local/store-directory.js';
import { LocalStore } from '../../src/store/local/local-store.js';
import { hostDisk } from '../../src/system/real-disk.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { cli, memoryDirectory, run, startDaemon, temporaryDirectory, waitUntil } from '../harness/daemon.js';
import { interpose } from '../harness/interposed-disk.js';

const BUILT = pathToFileURL(path.resolve('dist/store/local/local-store.js')).href;

/** Creates a store, and is killed before the argv[2]-th call that changes a file; prints the calls. */
const MAKE = `
import fs from 'node:fs';
const [, directory, at] = process.argv;
const calls = [];
const names = ['mkdirSync', 'openSync', 'symlinkSync', 'renameSync', 'rmSync', 'writeSync', 'ftruncateSync', 'fsyncSync'];
for (const name of names) {
  const real = fs[name];
  fs[name] = (...args) => {
    if (calls.length === Number(at)) process.kill(process.pid, 'SIGKILL');
    calls.push(name + ' ' + args[0]);
    return real(...args);
  };
}
const { LocalStore } = await import(${JSON.stringify(BUILT)});
const store = await LocalStore.open(directory);
console.log(JSON.stringify(calls));
await store.close();
`;

function make(directory: string, killedAt: number) {
  return run(process.execPath, ['--input-type=module', '-e', MAKE, directory, String(killedAt)]);
}

test('a creation that is killed at any point leaves no store or a whole one, and the next creation finishes it', async () => {
  const calls = JSON.parse((await make(path.join(memoryDirectory(), 'store'), -1)).stdout) as string[];
  // All folders of objects are created in the same way.
  const points = calls.flatMap((call, at) => (/mkdirSync .*objects\/(?!00|80|ff)..$/.test(call) ? [] : [at]));
  expect(points.length).toBeGreaterThan(15);
  for (const point of points) {
    const directory = path.join(memoryDirectory(), 'store');
    expect((await make(directory, point)).signal, calls[point]).toBe('SIGKILL');
    const isMade = fs.existsSync(path.join(directory, 'meta.mdb'));
    const before = isMade || !fs.existsSync(directory) ? [] : fs.readdirSync(directory).sort();
    const looking = LocalStore.open(directory, { mayCreate: false });
    if (isMade) await (await looking).close();
    else await expect(looking, calls[point]).rejects.toMatchObject({ code: 'NO_STORE' });
    if (!isMade && before.length > 0) expect(fs.readdirSync(directory).sort()).toEqual(before);
    const catalog = new VdiCatalog(await LocalStore.open(directory));
    await catalog.create('disk', 2 ** 20);
    expect((await catalog.check({ repair: false })).problems).toEqual([]);
    await catalog.close();
    expect(fs.readdirSync(directory).sort()).toEqual(['copies', 'lock', 'meta.mdb', 'objects', 'recent']);
  }
});

test('parts of a creation that vanish while they are looked at are nothing foreign', async () => {
  const made = path.join(temporaryDirectory(), 'store');
  expect((await make(made, -1)).code).toBe(0);
  fs.rmSync(path.join(made, 'meta.mdb'));
  fs.writeFileSync(path.join(made, 'objects', 'scratch'), '');
  for (const part of ['objects/09', 'objects/scratch', 'objects', 'recent', 'lock']) {
    const vanishing = interpose(hostDisk, ({ name, file }, proceed) => {
      if (name === 'lstatSync' && file === path.join(made, part)) return undefined;
      return proceed();
    });
    expect(directoryState(vanishing, made), part).toBe('unfinished');
  }
});

describe('a command that fails after it has created a store removes the store again', () => {
  const failures: Record<string, (directory: string) => string[]> = {
    // access(2) says that root may write to /proc, but nothing can be created there.
    'a start whose control socket cannot be bound': (directory) => [
      ...[
        'serve',
        '--create',
        'disk:1M',
        '--listen',
        `unix:${directory}/nbd.sock`,
        '--control',
        '/proc/sheepgate.sock',
      ],
    ],
    'a VDI that cannot be made': () => ['vdi', 'create', 'a@b', '1M'],
    'an import of what is no raw image': (directory) => {
      const image = path.join(directory, 'image');
      fs.writeFileSync(image, Buffer.concat([Buffer.from('QFI\xfb\0\0\0\x03', 'latin1'), Buffer.alloc(2 ** 16)]));
      return ['import', image, 'disk'];
    },
    'a restore of what is no backup': (directory) => ['restore', path.join(directory, 'nothing'), 'disk'],
  };
  for (const [name, of] of Object.entries(failures)) {
    test(name, async () => {
      const directory = temporaryDirectory();
      const args = of(directory);
      const missing = path.join(directory, 'missing');
      const empty = path.join(directory, 'empty');
      fs.mkdirSync(empty);
      for (const store of [missing, empty]) {
        expect(await cli([...args, '--store', store])).toMatchObject({ code: 1, signal: null });
      }
      expect(fs.existsSync(missing)).toBe(false);
      expect(fs.readdirSync(empty)).toEqual([]);
      // It does not remove a directory that was there before.
      await (await LocalStore.open(empty)).close();
      expect((await cli([...args, '--store', empty])).code).toBe(1);
      expect(fs.existsSync(path.join(empty, 'meta.mdb'))).toBe(true);
    });
  }

  test('but not if another process has put something into it meanwhile', async () => {
    const directory = path.join(temporaryDirectory(), 'store');
    const store = await LocalStore.open(directory);
    const catalog = new VdiCatalog(store);
    await catalog.create('disk', 2 ** 20);
    store.takeBackCreation();
    await catalog.close();
    expect(await cli(['vdi', 'show', 'disk', '--store', directory])).toMatchObject({ code: 0, stderr: '' });
  });
});

describe('a store is created', () => {
  test('in a directory that is missing, empty, or has nothing but lost+found', async () => {
    for (const names of [undefined, [], ['lost+found']]) {
      const directory = path.join(temporaryDirectory(), 'store');
      for (const name of names ?? []) fs.mkdirSync(path.join(directory, name), { recursive: true });
      if (names?.length === 0) fs.mkdirSync(directory);
      await (await LocalStore.open(directory)).close();
      expect(fs.existsSync(path.join(directory, 'meta.mdb'))).toBe(true);
    }
  });

  test('in no directory with other content, by any command', async () => {
    const directory = temporaryDirectory();
    fs.writeFileSync(path.join(directory, 'hosts'), 'precious');
    const image = path.join(temporaryDirectory(), 'image');
    fs.writeFileSync(image, Buffer.alloc(512));
    for (const args of [
      ['vdi', 'create', 'disk', '1M'],
      ['import', image, 'disk'],
      ['serve', '--listen', `unix:${path.join(directory, 'nbd.sock')}`],
    ]) {
      const refused = await cli([...args, '--store', directory]);
      expect(refused).toMatchObject({
        code: 1,
        stderr: expect.stringMatching(/no store in .*not empty.*hosts/) as string,
      });
      expect(fs.readdirSync(directory)).toEqual(['hosts']);
    }
  });

  test('not in a directory with foreign files and folders that have the names of its parts, and those stay unchanged', async () => {
    const theirs: Record<string, (directory: string) => void> = {
      'scratch/thesis': (directory) => fs.mkdirSync(path.join(directory, 'scratch')),
      scratch: () => undefined,
      'objects/aa': (directory) => fs.mkdirSync(path.join(directory, 'objects')),
      'objects/notes': (directory) => fs.mkdirSync(path.join(directory, 'objects')),
      'recent/photo': (directory) => fs.mkdirSync(path.join(directory, 'recent')),
      'new.mdb/x': (directory) => fs.mkdirSync(path.join(directory, 'new.mdb')),
      'lock/x': (directory) => fs.mkdirSync(path.join(directory, 'lock')),
      lock: () => undefined,
      'control.sock': () => undefined,
      'meta.mdb/x': (directory) => fs.mkdirSync(path.join(directory, 'meta.mdb')),
    };
    const text = 'precious'.repeat(20);
    for (const [name, make] of Object.entries(theirs)) {
      const directory = temporaryDirectory();
      make(directory);
      fs.writeFileSync(path.join(directory, name), text);
      await expect(LocalStore.open(directory), name).rejects.toMatchObject({ name: 'StoreError' });
      expect(fs.readFileSync(path.join(directory, name), 'utf8'), name).toBe(text);
      expect(fs.readdirSync(directory), name).toHaveLength(1);
    }
  });

  test('not where a store has lost its metadata: that is damage, not an empty store', async () => {
    const directory = path.join(temporaryDirectory(), 'store');
    const store = await LocalStore.open(directory);
    const catalog = new VdiCatalog(store);
    await catalog.create('disk', 2 ** 20, { blockSizeShift: 20 });
    const vdi = await catalog.openVdi('disk');
    await vdi.write(0, Buffer.alloc(4096, 1), true);
    await catalog.release(vdi);
    await catalog.close();
    for (const lose of [
      () => fs.truncateSync(path.join(directory, 'meta.mdb')),
      () => fs.rmSync(path.join(directory, 'meta.mdb')),
    ]) {
      lose();
      await expect(LocalStore.open(directory)).rejects.toMatchObject({ code: 'DAMAGED', message: /meta\.mdb is/ });
    }
  });

  test('by no command that only reads, or changes existing VDIs; and those leave nothing behind', async () => {
    const directory = temporaryDirectory();
    const empty = path.join(directory, 'empty');
    fs.mkdirSync(empty);
    for (const store of [empty, path.join(directory, 'missing')]) {
      const commands = [
        'vdi list',
        'vdi show disk',
        'vdi tree',
        'vdi snapshot disk s',
        'vdi clone disk@s copy',
        'vdi rollback disk@s',
        'vdi resize disk 2G',
        'vdi delete disk',
        `export disk ${directory}/image`,
        `backup disk --to ${directory}/backup`,
        'check',
        'check --repair',
      ];
      await Promise.all(
        commands.map(async (command) => {
          const refused = await cli([...command.split(' '), '--store', store]);
          const stderr = expect.stringMatching(/^sheepgate: no store in [^\n]*\n$/) as string;
          expect(refused, command).toMatchObject({ code: 1, stderr });
        }),
      );
    }
    const migrate = await cli(['migrate', 'disk', '--from', empty, '--to', path.join(directory, 'target')]);
    expect(migrate).toMatchObject({ code: 1, stderr: expect.stringContaining(`no store in ${empty}`) as string });
    expect(fs.readdirSync(directory)).toEqual(['empty']);
    expect(fs.readdirSync(empty)).toEqual([]);
  }, 240_000);

  test('not by serve --create-store=no, which detects an unmounted mount point', async () => {
    const directory = temporaryDirectory();
    const refused = await cli(['serve', '--create-store=no', '--store', directory]);
    expect(refused).toMatchObject({ code: 1, stderr: expect.stringContaining(`no store in ${directory}`) as string });
    expect(fs.readdirSync(directory)).toEqual([]);
    expect((await cli(['vdi', 'create', 'disk', '1M', '--store', directory])).code).toBe(0);
    const daemon = await startDaemon({ store: directory, args: ['--create-store=no'] });
    expect((await daemon.stop()).code).toBe(0);
  });

  test('a command that starts while the store is being created waits for it', async () => {
    const directory = path.join(temporaryDirectory(), 'store');
    const serving = startDaemon({ store: directory });
    // Made by the holder of the lock.
    await waitUntil(() => fs.existsSync(path.join(directory, 'objects')), 'the creation has begun');
    expect(await cli(['vdi', 'list', '--store', directory])).toMatchObject({ code: 0, stderr: '' });
    await (await serving).stop();
  });
});
