/** Every `vdi` command and `check`, on the store itself and through a daemon, for people and for machines. */
import fs from 'node:fs';
import path from 'node:path';
import { afterEach, beforeAll, describe, expect, test } from 'vitest';
import { cliJson, startDaemon, temporaryDirectory } from '../harness/daemon.js';
import {
  attach,
  deleteAll,
  diskUsage,
  expectBytes,
  GIB,
  MIB,
  patterned,
  storeWith,
  testStore,
  WAYS,
  type TestStore,
} from './both-ways.js';

const TIME = /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/;
const LOCAL_TIME = String.raw`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d`;

/** Put `data` at the beginning of a VDI. */
async function fill(target: TestStore, name: string, data: Buffer): Promise<void> {
  const result = await target.run(['import', '-', name, '--overwrite', '--raw'], { input: data });
  expect(result.code, result.stderr).toBe(0);
}

async function content(target: TestStore, name: string): Promise<Buffer> {
  const result = await target.run(['export', name, '-']);
  expect(result.code, result.stderr).toBe(0);
  return result.stdoutBytes;
}

describe.each(WAYS)('%s', (way) => {
  let target: TestStore;
  beforeAll(async () => void (target = await testStore(way)));
  afterEach(() => deleteAll(target));

  test('create makes an empty VDI and reports it; --json has all its fields', async () => {
    expect(await target.ok('vdi', 'create', 'vm1', '10G')).toBe('created vm1, 10 GiB\n');
    const made = await target.json('vdi', 'create', 'größe 2.img', '1.5T', '--block-size-shift', '24');
    expect(made).toEqual({
      name: 'größe 2.img',
      tag: null,
      vid: expect.any(Number) as number,
      isSnapshot: false,
      snapId: 1,
      size: 1.5 * 2 ** 40,
      blockSizeShift: 24,
      redundancy: null,
      parentVid: null,
      createdAt: expect.stringMatching(TIME) as string,
      snapshotAt: null,
      spec: 'größe 2.img',
      unfinished: null,
    });
    expect(await target.names()).toEqual(['größe 2.img', 'vm1']);
  });

  test('list aligns a table with one line per VDI and snapshot, names sorted, snapshots oldest first', async () => {
    expect(await target.json('vdi', 'create', 'b', '10M')).toBeTruthy();
    await target.ok('vdi', 'create', 'a', '4G');
    await fill(target, 'b', patterned(5 * MIB, 1));
    await target.ok('vdi', 'snapshot', 'b', 'z');
    await target.ok('vdi', 'snapshot', 'b', 'c');
    const lines = (await target.ok('vdi', 'list')).split('\n');
    expect(lines[0]).toMatch(/^NAME {2}TAG +ID +SIZE +USED {2}CREATED$/);
    expect(lines.slice(1).map((line) => line.split(/\s{2,}/)[0])).toEqual(['a', 'b', 'b', 'b', '']);
    expect(lines[2]).toMatch(new RegExp(`^b +z +\\d+ +10 MiB +8 MiB +${LOCAL_TIME}$`));
    expect(lines[3]).toMatch(/^b +c /);
    expect(lines[4]).toMatch(/^b +\d+ +10 MiB/);
    const json = await target.json<{ name: string; tag: string; allocatedBytes: number; open: number }[]>(
      'vdi',
      'list',
    );
    expect(json.map(({ name, tag, allocatedBytes, open }) => [name, tag, allocatedBytes, open])).toEqual([
      ['a', null, 0, 0],
      ['b', 'z', 8 * MIB, 0],
      ['b', 'c', 8 * MIB, 0],
      ['b', null, 8 * MIB, 0],
    ]);
  });

  test('a list of nothing is a header, and [] for machines', async () => {
    await target.ok('vdi', 'create', 'x', '1M');
    await target.ok('vdi', 'delete', 'x');
    expect(await target.ok('vdi', 'list')).toBe('NAME  TAG  ID  SIZE  USED  CREATED\n');
    expect(await target.json('vdi', 'list')).toEqual([]);
    expect(await target.ok('vdi', 'tree')).toBe('');
    expect(await target.json('vdi', 'tree')).toEqual([]);
  });

  test('show prints size, used and unshared space, origin and users of a VDI and of a snapshot', async () => {
    await target.ok('vdi', 'create', 'vm', '20M');
    await fill(target, 'vm', patterned(12 * MIB, 2));
    await target.ok('vdi', 'snapshot', 'vm', 'mon');
    await fill(target, 'vm', patterned(12 * MIB, 3));
    const text = await target.ok('vdi', 'show', 'vm');
    expect(text).toMatch(/^name +vm\n/);
    expect(text).toMatch(/\nsize +20 MiB \(20971520 bytes\)\nused +12 MiB\nnot shared +12 MiB\nobject size +4 MiB\n/);
    expect(text).toMatch(new RegExp(`\ncreated +${LOCAL_TIME}\nfrom +vm@mon\nopen +no\n$`));
    expect(text).not.toMatch(/tag/);
    expect(await target.ok('vdi', 'show', 'vm@mon')).toMatch(/^name +vm\ntag +mon\n[\s\S]*\nsnapshot +20/);
    const snapshot = await target.json('vdi', 'show', 'vm@mon');
    const working = await target.json('vdi', 'show', 'vm');
    expect(snapshot).toMatchObject({ name: 'vm', tag: 'mon', isSnapshot: true, snapId: 1, parentVid: null, open: 0 });
    expect(snapshot.snapshotAt).toMatch(TIME);
    expect(working).toMatchObject({
      tag: null,
      isSnapshot: false,
      snapId: 2,
      parentVid: snapshot.vid,
      snapshotAt: null,
    });
    expect(working).toMatchObject({ allocatedBytes: 12 * MIB, exclusiveBytes: 12 * MIB });
  });

  test('tree shows snapshots in a row, and clones below their snapshot', async () => {
    await target.ok('vdi', 'create', 'base', '1G');
    for (const tag of ['one', 'two']) await target.ok('vdi', 'snapshot', 'base', tag);
    await target.ok('vdi', 'clone', 'base@one', 'copy');
    const lines = (await target.ok('vdi', 'tree')).trimEnd().split('\n');
    expect(lines.map((line) => line.replace(new RegExp(` {2}\\[${LOCAL_TIME}\\]`), ''))).toEqual([
      'base@one',
      '│  └─ copy  (you are here)',
      'base@two',
      'base  (you are here)',
    ]);
    const [root] = await target.json<{ tag: string; children: { name: string; tag: string | null }[] }[]>(
      'vdi',
      'tree',
    );
    expect(root).toMatchObject({
      tag: 'one',
      children: [
        { name: 'base', tag: 'two' },
        { name: 'copy', tag: null },
      ],
    });
  });

  test('a rollback that changes the size reports it', async () => {
    await target.ok('vdi', 'create', 'vm', '9M');
    await target.ok('vdi', 'snapshot', 'vm', 's');
    await target.ok('vdi', 'resize', 'vm', '10M');
    await target.ok('vdi', 'snapshot', 'vm', 'grown');
    expect(await target.ok('vdi', 'rollback', 'vm@s')).toBe('vm is vm@s again; its size was 10 MiB and is 9 MiB now\n');
    expect(await target.json('vdi', 'rollback', 'vm@grown')).toMatchObject({ size: 10 * MIB, sizeBefore: 9 * MIB });
    expect(await target.ok('vdi', 'rollback', 'vm@grown')).toBe('vm is vm@grown again\n');
  });

  test('after snapshot, write, rollback and clone, every name has the expected content', async () => {
    const [first, second] = [patterned(9 * MIB, 4), patterned(9 * MIB, 5)];
    await target.ok('vdi', 'create', 'vm', '9M');
    await fill(target, 'vm', first);
    expect(await target.ok('vdi', 'snapshot', 'vm', 'mon day')).toBe('took vm@mon day\n');
    await fill(target, 'vm', second);
    expect(await target.json('vdi', 'snapshot', 'vm', 'tue')).toMatchObject({
      tag: 'tue',
      isSnapshot: true,
      snapId: 2,
    });
    expect(await target.ok('vdi', 'clone', 'vm@mon day', 'cow')).toBe('created cow from vm@mon day\n');
    expect(await target.json('vdi', 'clone', 'vm@tue', 'cow2')).toMatchObject({
      name: 'cow2',
      tag: null,
      size: 9 * MIB,
    });
    expectBytes(await content(target, 'cow'), first);
    await fill(target, 'cow', patterned(9 * MIB, 6));
    expectBytes(await content(target, 'vm@mon day'), first);
    expect(await target.ok('vdi', 'rollback', 'vm@mon day')).toBe('vm is vm@mon day again\n');
    expectBytes(await content(target, 'vm'), first);
    expect(await target.json('vdi', 'rollback', 'vm@tue')).toMatchObject({ name: 'vm', tag: null });
    expectBytes(await content(target, 'vm'), second);
    expectBytes(await content(target, 'cow2'), second);
  });

  test('resize grows; shrinking needs --force, and the cut-off data does not come back', async () => {
    await target.ok('vdi', 'create', 'vm', '8M');
    const data = patterned(8 * MIB, 7);
    await fill(target, 'vm', data);
    expect(await target.ok('vdi', 'resize', 'vm', '12M')).toBe('vm now has 12 MiB\n');
    expectBytes(await content(target, 'vm'), Buffer.concat([data, Buffer.alloc(4 * MIB)]));
    expect(await target.fails('vdi', 'resize', 'vm', '5M')).toMatch(/--force/);
    expect(await target.json('vdi', 'resize', 'vm', '5M', '--force')).toMatchObject({ size: 5 * MIB });
    await target.ok('vdi', 'resize', 'vm', '8M');
    expectBytes(await content(target, 'vm'), Buffer.concat([data.subarray(0, 5 * MIB), Buffer.alloc(3 * MIB)]));
  });

  test('delete removes a snapshot, or a VDI without its snapshots, and frees the space', async () => {
    const usage = (): number =>
      ['objects', 'overlays']
        .map((name) => path.join(target.store, name))
        .filter((folder) => fs.existsSync(folder))
        .reduce((sum, folder) => sum + diskUsage(folder), 0);
    await target.ok('vdi', 'create', 'vm', '16M');
    await fill(target, 'vm', patterned(16 * MIB, 8));
    await target.ok('vdi', 'snapshot', 'vm', 's');
    await fill(target, 'vm', patterned(16 * MIB, 9));
    expect(usage()).toBeGreaterThan(32 * MIB);
    expect(await target.json('vdi', 'delete', 'vm@s')).toEqual({ deleted: 'vm@s' });
    expect(usage()).toBeLessThan(20 * MIB);
    await target.ok('vdi', 'snapshot', 'vm', 't');
    expect(await target.ok('vdi', 'delete', 'vm')).toBe('deleted vm\n');
    expect(await target.names()).toEqual(['vm@t']);
    expect(await target.fails('vdi', 'snapshot', 'vm', 'u')).toMatch(/only snapshots/);
    await target.ok('vdi', 'clone', 'vm@t', 'again');
    await target.ok('vdi', 'delete', 'vm@t');
    expectBytes(await content(target, 'again'), patterned(16 * MIB, 9));
    await target.ok('vdi', 'delete', 'again');
    expect(usage()).toBeLessThan(4 * MIB);
  });

  test('check counts, finds an orphan and a lost object, and --repair removes the orphan only', async () => {
    await target.ok('vdi', 'create', 'vm', '8M');
    await fill(target, 'vm', patterned(8 * MIB, 10));
    expect(await target.ok('check')).toBe('1 VDIs and snapshots, 2 objects, 0 problems\n');
    const objects = path.join(target.store, 'objects');
    const [name = ''] = fs
      .readdirSync(objects, { recursive: true, encoding: 'utf8' })
      .filter((each) => /[0-9a-f]{14}/.test(each));
    const stray = path.join(objects, path.dirname(name), '007fffff00000001'.slice(0, path.basename(name).length));
    fs.writeFileSync(stray, 'stray');
    const found = await target.run(['check']);
    expect(found.code, found.stderr).toBe(1);
    expect(found.stdout).toMatch(
      /orphan.*\n[\s\S]*1 problems\n1 objects \(\d.*\) are not referred to by any VDI; --repair deletes them\n$/,
    );
    const repaired = await target.run(['check', '--repair', '--json']);
    expect(repaired.code, repaired.stderr).toBe(0);
    expect(JSON.parse(repaired.stdout)).toMatchObject({ orphans: 1, repaired: 1, problemsLeft: 0 });
    expect(fs.existsSync(stray)).toBe(false);
    expect(await target.json('check')).toEqual({
      objects: 2,
      vdis: 1,
      problems: [],
      orphans: 0,
      orphanBytes: 0,
      repaired: 0,
      problemsLeft: 0,
    });
  });
});

test('commands print the same through a daemon and on its store after the daemon has stopped, field by field', async () => {
  const daemon = await startDaemon();
  const target = storeWith(daemon.store, daemon);
  await target.ok('vdi', 'create', 'vm', '1G');
  await fill(target, 'vm', patterned(5 * MIB, 11));
  await target.ok('vdi', 'snapshot', 'vm', 's');
  await target.ok('vdi', 'clone', 'vm@s', 'c');
  const asked = [
    ['vdi', 'list'],
    ['vdi', 'list', '--json'],
    ['vdi', 'tree'],
    ['vdi', 'tree', '--json'],
    ['vdi', 'show', 'vm@s'],
    ['vdi', 'show', 'c', '--json'],
    ['check'],
  ];
  const through: string[] = [];
  for (const args of asked) through.push(await target.ok(...args));
  expect((await daemon.stop()).code, daemon.log()).toBe(0);
  const direct: string[] = [];
  for (const args of asked) direct.push(await target.ok(...args));
  expect(direct).toEqual(through);
});

test('a store on the command line has precedence over the environment', async () => {
  const [one, two] = [path.join(temporaryDirectory(), 'one'), path.join(temporaryDirectory(), 'two')];
  await cliJson(['vdi', 'create', 'in-one', '1M'], { store: one });
  await cliJson(['vdi', 'create', 'in-two', '1M', '--store', two], { store: one });
  expect(await cliJson(['vdi', 'list', '--store', two], { store: one })).toMatchObject([{ name: 'in-two' }]);
});

test('without any option the store is in $XDG_DATA_HOME, and empty variables count as unset', async () => {
  const home = temporaryDirectory();
  const env = { XDG_DATA_HOME: home, SHEEPGATE_STORE: '', SHEEPGATE_CONTROL: '' };
  await cliJson(['vdi', 'create', 'x', '1M'], { env });
  expect(fs.existsSync(path.join(home, 'sheepgate', 'lock'))).toBe(true);
  expect(fs.statSync(path.join(home, 'sheepgate')).mode & 0o777).toBe(0o700);
});

test('commands at the same time on a store without a daemon wait for each other', async () => {
  const store = path.join(temporaryDirectory(), 'store');
  const names = ['a', 'b', 'c', 'd', 'e'];
  await Promise.all(names.map((name) => cliJson(['vdi', 'create', name, '1M'], { store })));
  expect(await storeWith(store, undefined).names()).toEqual(names);
});

test('commands that would harm the users of an open VDI are refused, with the number of users', async () => {
  const daemon = await startDaemon();
  const target = storeWith(daemon.store, daemon);
  await target.ok('vdi', 'create', 'vm', '16M');
  await target.ok('vdi', 'snapshot', 'vm', 's');
  const [one, two, reader] = [await attach(daemon, 'vm'), await attach(daemon, 'vm'), await attach(daemon, 'vm@s')];
  expect(await target.ok('vdi', 'show', 'vm')).toMatch(/open +by 2 connections\n/);
  expect(await target.ok('vdi', 'show', 'vm@s')).toMatch(/open +by 1 connection\n/);
  expect(await target.fails('vdi', 'delete', 'vm')).toMatch(/vm is open by 2 connections and cannot be deleted now/);
  expect(await target.fails('vdi', 'delete', 'vm@s')).toMatch(/vm@s is open by 1 connection and cannot be deleted/);
  expect(await target.fails('vdi', 'rollback', 'vm@s')).toMatch(/cannot be rolled back now; disconnect first/);
  expect(await target.fails('vdi', 'resize', 'vm', '8M', '--force')).toMatch(/cannot be shrunk now/);
  expect(await target.fails('check')).toMatch(/is open; a check needs all clients disconnected/);
  // Growing is possible; connected clients keep the old size, new ones see the new size.
  await target.ok('vdi', 'resize', 'vm', String(GIB));
  await one.write(16 * MIB - 512, Buffer.alloc(512, 1));
  await expect(one.write(16 * MIB, Buffer.alloc(512, 1))).rejects.toMatchObject({ code: 'ENOSPC' });
  const three = await attach(daemon, 'vm');
  await three.write(GIB - 512, Buffer.alloc(512, 2));
  for (const client of [one, two, three, reader]) await client.disconnect();
  await target.ok('vdi', 'rollback', 'vm@s');
  await target.ok('vdi', 'delete', 'vm@s');
  await target.ok('vdi', 'delete', 'vm');
  expect(await target.names()).toEqual([]);
});
