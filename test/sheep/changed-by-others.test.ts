/**
 * Other clients change a cluster's VDIs while they are open here, with `dog` or through another store: they resize them,
 * give them more copies, take snapshots, delete them. New VDIs take the settings that the cluster was formatted with. The
 * cluster enforces locks. Against the stand-in, and against real nodes where they are installed.
 */
import fs from 'node:fs';
import path from 'node:path';
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import { SheepStore } from '../../src/store/sheep/sheep-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import type { Vdi } from '../../src/vdi/vdi.js';
import { cli, cliJson, startDaemon, temporaryDirectory, waitUntil } from '../harness/daemon.js';
import { realNodesMissing, startRealNodes } from './clusters.js';
import { Op, StandIn, type StandInOptions } from './stand-in.js';

const SHIFT = 21;
const OBJECT = 2 ** SHIFT;
const SIZE = 4 * OBJECT;
const BLOCK = 4096;
const missing = realNodesMissing();
if (missing !== undefined) console.log(`not run against real Sheepdog nodes: ${missing}`);

/** Another client. */
interface Others {
  readonly address: string;
  resize(name: string, size: number): Promise<void>;
  alterCopies(name: string, copies: number): Promise<void>;
  snapshot(name: string, tag: string): Promise<void>;
  remove(name: string): Promise<void>;
  copiesOf(name: string): Promise<number>;
  objects(): Promise<string[]>;
  stop(): Promise<void>;
}

async function standIn(options: StandInOptions = {}): Promise<Others & { readonly nodes: StandIn }> {
  const nodes = await new StandIn({ nodes: 3, useLock: true, blockSizeShift: SHIFT, ...options }).start();
  return {
    nodes,
    address: nodes.address,
    resize: (name, size) => {
      nodes.externalResize(name, size);
      return Promise.resolve();
    },
    alterCopies: (name, copies) => {
      nodes.externalCopies(name, copies);
      return Promise.resolve();
    },
    snapshot: async (name, tag) => {
      nodes.externalSnapshot(name, tag);
      await Promise.resolve();
    },
    remove: async (name) => nodes.externalDelete(name),
    copiesOf: async (name) => Promise.resolve(nodes.header(name).copies),
    objects: async () => {
      await nodes.settled();
      return nodes.dataObjects();
    },
    stop: () => nodes.stop(),
  };
}

async function realNodes(): Promise<Others> {
  const nodes = await startRealNodes({ format: ['-c', '2', '-l', '-z', String(SHIFT)] });
  return {
    address: nodes.address,
    resize: async (name, size) => void (await nodes.dog('vdi', 'resize', name, String(size))),
    alterCopies: async (name, copies) => void (await nodes.dog('vdi', 'alter-copy', '-f', '-c', String(copies), name)),
    snapshot: (name, tag) => nodes.snapshot(name, tag),
    remove: async (name) => void (await nodes.dog('vdi', 'delete', name)),
    copiesOf: async (name) => {
      // = NAME ID SIZE USED SHARED TIME VID COPIES TAG
      const line = (await nodes.dog('vdi', 'list', '-r', name)).split('\n').find((each) => each.startsWith('= '));
      return Number(line?.split(' ')[8]);
    },
    objects: () => nodes.objects(),
    stop: () => nodes.stop(),
  };
}

/** All stores that a test has opened. */
const opened: VdiCatalog[] = [];

async function openBeside(others: Others): Promise<{ store: SheepStore; catalog: VdiCatalog }> {
  const store = await SheepStore.open(others.address, { retryMs: 10_000 });
  const catalog = new VdiCatalog(store);
  opened.push(catalog);
  return { store, catalog };
}

afterEach(async () => {
  for (const catalog of opened.splice(0)) await catalog.close();
});

async function bytesAt(vdi: Vdi, offset: number): Promise<Buffer> {
  const data = Buffer.alloc(BLOCK, 0xaa);
  await vdi.read(offset, data);
  return data;
}

async function writeTo(vdi: Vdi, offset: number): Promise<void> {
  await vdi.write(offset, filled(2), false);
}

const filled = (value: number): Buffer => Buffer.alloc(BLOCK, value);

for (const { label, start, skip } of [
  { label: 'stand-in', start: standIn as () => Promise<Others>, skip: false },
  { label: 'real nodes', start: realNodes, skip: missing !== undefined },
]) {
  describe.skipIf(skip)(`changes of other clients to an open disk (${label})`, () => {
    let others: Others;
    let disks = 0;
    const newDisk = async (catalog: VdiCatalog): Promise<{ name: string; vdi: Vdi }> => {
      const name = `disk${disks++}`;
      await catalog.create(name, SIZE);
      return { name, vdi: await catalog.openVdi(name) };
    };
    beforeAll(async () => {
      others = await start();
    }, 120_000);
    afterAll(async () => {
      await (others as typeof others | undefined)?.stop();
    });

    test('clients that connect after a resize see the new size; later snapshots keep it, and the number of copies', async () => {
      const { catalog } = await openBeside(others);
      const { name, vdi } = await newDisk(catalog);
      await vdi.write(0, filled(1), false);
      await others.resize(name, 2 * SIZE);
      const later = await catalog.openVdi(name);
      expect(later.size).toBe(2 * SIZE);
      await later.write(2 * SIZE - BLOCK, filled(2), false);
      expect((await bytesAt(later, 2 * SIZE - BLOCK)).equals(filled(2))).toBe(true);
      await others.alterCopies(name, 3);
      await others.resize(name, 3 * SIZE);
      await catalog.snapshotTemporary(name, 'now');
      const now = await catalog.openVdi(`${name}@now`);
      expect(now.size).toBe(3 * SIZE);
      await catalog.release(now);
      await catalog.dropTemporary(name, 'now');
      await others.resize(name, 4 * SIZE);
      await catalog.snapshot(name, 'a');
      expect((await catalog.named(name)).map(({ size }) => size)).toEqual([4 * SIZE, 4 * SIZE]);
      expect(vdi.size).toBe(4 * SIZE);
      expect(await others.copiesOf(name)).toBe(3);
      // After another client's snapshot the working VDI has the size of that moment.
      await others.resize(name, 5 * SIZE);
      await others.snapshot(name, 'b');
      await vdi.write(BLOCK, filled(3), false);
      expect(vdi.size).toBe(5 * SIZE);
      await catalog.snapshot(name, 'c');
      expect((await catalog.find(name)).size).toBe(5 * SIZE);
      await catalog.release(vdi);
      await catalog.release(later);
    }, 60_000);

    test('a second store refuses to change a disk that the first has locked', async () => {
      const ours = await openBeside(others);
      const theirs = await openBeside(others);
      const { name, vdi } = await newDisk(ours.catalog);
      await vdi.write(0, filled(1), false);
      await ours.catalog.snapshot(name, 'a');
      await vdi.write(0, filled(2), false);
      const refused = { code: 'LOCKED' };
      await expect(theirs.catalog.remove(name)).rejects.toMatchObject(refused);
      await expect(theirs.catalog.rollback(`${name}@a`)).rejects.toMatchObject(refused);
      await expect(theirs.catalog.resize(name, OBJECT, { force: true })).rejects.toMatchObject(refused);
      await expect(theirs.catalog.snapshot(name, 'b')).rejects.toMatchObject(refused);
      expect((await bytesAt(vdi, 0)).equals(filled(2))).toBe(true);
      await ours.catalog.release(vdi);
      await theirs.catalog.rollback(`${name}@a`);
      await theirs.catalog.remove(name);
      await theirs.catalog.remove(`${name}@a`);
      expect(await theirs.store.cluster.lockedVids()).toEqual([]);
    }, 60_000);

    test("after another client's snapshot an idle disk stays locked, and the lock moves to its new vid", async () => {
      const ours = await openBeside(others);
      const theirs = await openBeside(others);
      const { name, vdi } = await newDisk(ours.catalog);
      await vdi.write(0, filled(1), false);
      const before = vdi.record.vid;
      await others.snapshot(name, 'a');
      await expect(theirs.catalog.openVdi(name)).rejects.toMatchObject({ code: 'LOCKED' });
      await expect(theirs.catalog.remove(name)).rejects.toMatchObject({ code: 'LOCKED' });
      const locked = (): Promise<number[]> => theirs.store.cluster.lockedVids();
      await waitUntil(async () => !(await locked()).includes(before), 'the lock has moved on');
      expect(await locked()).toEqual([(await theirs.catalog.find(name)).vid]);
      await vdi.write(0, filled(2), false);
      await others.snapshot(name, 'b');
      await vdi.write(0, filled(3), false);
      expect((await bytesAt(vdi, 0)).equals(filled(3))).toBe(true);
      await ours.catalog.release(vdi);
      expect(await locked()).toEqual([]);
      const opened = await theirs.catalog.openVdi(name);
      expect((await bytesAt(opened, 0)).equals(filled(3))).toBe(true);
      await theirs.catalog.release(opened);
    }, 60_000);

    test('a disk whose lock another client has taken can be neither written nor read', async () => {
      const ours = await openBeside(others);
      const theirs = await openBeside(others);
      const { name, vdi } = await newDisk(ours.catalog);
      await vdi.write(0, filled(1), false);
      await others.snapshot(name, 'a');
      // A client whose program does not know the old lock.
      const taken = await theirs.store.cluster.lock(name);
      await expect(writeTo(vdi, 0)).rejects.toMatchObject({ code: 'LOCKED' });
      await theirs.store.cluster.release(taken);
      await expect(writeTo(vdi, 0)).rejects.toMatchObject({ code: 'LOCKED' });
      expect(() => vdi.read(0, filled(0))).toThrow(/taken over|nothing more is written/);
      const again = await ours.catalog.openVdi(name).catch(() => undefined);
      expect(again).toBeUndefined(); // our store still has its old lock
      await ours.catalog.release(vdi);
      const after = await ours.catalog.openVdi(name);
      expect((await bytesAt(after, 0)).equals(filled(1))).toBe(true);
      await ours.catalog.release(after);
    }, 60_000);

    test('writes that fail because another client deletes the disk leave no objects behind', async () => {
      for (const { name, tag } of await (await openBeside(others)).catalog.list()) {
        const { catalog } = await openBeside(others);
        await catalog.remove(tag === '' ? name : `${name}@${tag}`);
      }
      expect(await others.objects()).toEqual([]);
      const { catalog } = await openBeside(others);
      const { name, vdi } = await newDisk(catalog);
      await vdi.write(0, filled(1), false);
      await others.remove(name);
      for (const at of [OBJECT, 2 * OBJECT, 0]) {
        await expect(writeTo(vdi, at)).rejects.toThrow(/deleted/);
      }
      expect(() => vdi.read(3 * OBJECT, filled(0))).toThrow(/deleted/);
      // The name is free, and the old VDI fails for those who have it open.
      await catalog.create(name, SIZE);
      const fresh = await catalog.openVdi(name);
      await fresh.write(0, filled(3), false);
      expect((await bytesAt(fresh, 0)).equals(filled(3))).toBe(true);
      await expect(writeTo(vdi, 0)).rejects.toThrow(/deleted/);
      await catalog.release(fresh);
      await catalog.release(vdi);
      await catalog.remove(name);
      expect(await others.objects()).toEqual([]);
    }, 60_000);

    test('every command creates VDIs with the object size and the copies that the cluster was formatted with', async () => {
      const directory = temporaryDirectory();
      const image = path.join(directory, 'image');
      fs.writeFileSync(image, Buffer.alloc(OBJECT, 5));
      const at = ['--cluster', others.address];
      const ok = async (...args: string[]): Promise<void> => {
        const result = await cli([...args]);
        expect(result, result.stderr).toMatchObject({ code: 0 });
      };
      const local = path.join(directory, 'local');
      const daemon = await startDaemon({ cluster: others.address, args: ['--create', 'served:8M'] });
      await daemon.stop();
      await ok('vdi', 'create', 'created', '8M', ...at);
      await ok('vdi', 'create', 'chosen', '8M', '--block-size-shift', '20', ...at);
      await ok('import', image, 'imported', ...at);
      await ok('import', image, 'here', '--store', local);
      await ok('migrate', 'here', '--from', local, '--to', `cluster:${others.address}`, '--as', 'migrated');
      await ok('backup', 'here', '--to', path.join(directory, 'backup'), '--store', local);
      await ok('restore', path.join(directory, 'backup'), 'restored', ...at);
      const list = await cliJson<{ name: string; blockSizeShift: number }[]>(['vdi', 'list', ...at]);
      const shifts = list.map(({ name, blockSizeShift }) => [name, blockSizeShift]);
      const names = ['created', 'imported', 'migrated', 'restored', 'served'];
      expect(shifts).toEqual([['chosen', 20], ...names.map((name) => [name, SHIFT])]);
      for (const name of names) expect(await others.copiesOf(name)).toBe(2);
    }, 120_000);
  });
}

describe('changes of other clients to an open disk, in a cluster without locks', () => {
  let others: Others & { readonly nodes: StandIn };
  beforeAll(async () => {
    others = await standIn({ useLock: false });
  });
  afterEach(() => expect(others.nodes.violations.splice(0)).toEqual([]));
  afterAll(async () => {
    await others.stop();
  });

  async function twoGateways(name: string): Promise<{ ours: VdiCatalog; theirs: VdiCatalog; vdi: Vdi }> {
    const { catalog: ours } = await openBeside(others);
    const { catalog: theirs } = await openBeside(others);
    await ours.create(name, SIZE);
    return { ours, theirs, vdi: await ours.openVdi(name) };
  }

  test('a shrunk disk is neither read nor written behind its new end, and has no object there', async () => {
    const { ours, theirs, vdi } = await twoGateways('shrunk');
    await vdi.write(0, filled(1), false);
    await vdi.write(2 * OBJECT, filled(2), false);
    await theirs.resize('shrunk', OBJECT + BLOCK, { force: true });
    // Our store has not looked since: one object behind the end existed, and one is about to be created.
    await expect(writeTo(vdi, 2 * OBJECT)).rejects.toMatchObject({
      code: expect.stringMatching(/NO_SPACE|GONE/) as string,
    });
    await expect(writeTo(vdi, 3 * OBJECT)).rejects.toMatchObject({ code: 'NO_SPACE', message: /shrunk/ });
    expect(vdi.size).toBe(OBJECT + BLOCK);
    expect(() => vdi.read(2 * OBJECT, filled(0))).toThrow(/shrunk/);
    expect(() => vdi.read(OBJECT + 1, filled(0))).toThrow(/shrunk/);
    await expect(Promise.resolve().then(() => vdi.trim(2 * OBJECT, OBJECT, false))).rejects.toThrow(/shrunk/);
    expect(() => vdi.extents(0, SIZE, () => true)).toThrow(/shrunk/);
    // The rest of the disk can be used; space that is added again reads as zeros.
    await vdi.write(OBJECT, filled(3), false);
    expect((await bytesAt(vdi, 0)).equals(filled(1))).toBe(true);
    await theirs.resize('shrunk', SIZE);
    await ours.release(await ours.openVdi('shrunk'));
    expect((await bytesAt(vdi, 2 * OBJECT)).equals(filled(0))).toBe(true);
    await writeTo(vdi, 2 * OBJECT);
    await ours.release(vdi);
    // Objects that an earlier gateway left behind the end are deleted with the VDI as well.
    others.nodes.externalResize('shrunk', OBJECT);
    await ours.remove('shrunk');
    expect(await others.objects()).toEqual([]);
  });

  test('an object that is created while another client deletes the disk is removed on close, and the name is free', async () => {
    const { ours, vdi } = await twoGateways('deleted');
    await vdi.write(0, filled(1), false);
    await others.nodes.externalDelete('deleted', () => writeTo(vdi, OBJECT));
    await writeTo(vdi, 2 * OBJECT);
    await ours.release(vdi);
    expect(await others.objects()).toEqual([]);
    await ours.create('deleted', SIZE);
    await ours.remove('deleted');
  });

  test('closing a disk loses no objects if a node has just started and does not know the vids yet', async () => {
    const { ours, vdi } = await twoGateways('there');
    await vdi.write(0, filled(1), false);
    for (const n of others.nodes.ports.keys()) others.nodes.starting.add(n);
    await ours.release(vdi);
    others.nodes.starting.clear();
    const again = await ours.openVdi('there');
    expect((await bytesAt(again, 0)).equals(filled(1))).toBe(true);
    await ours.release(again);
    await ours.remove('there');
  });

  test('a disk that is deleted while another store writes to it leaves no objects', async () => {
    const { ours, theirs, vdi } = await twoGateways('written');
    await vdi.write(0, filled(1), false);
    let isFirst = true;
    let written: Promise<void> | undefined;
    others.nodes.fault = ({ opcode }) => {
      if (opcode !== Op.DEL_VDI || !isFirst) return undefined;
      isFirst = false;
      written = writeTo(vdi, OBJECT);
      return { until: written };
    };
    await theirs.remove('written');
    others.nodes.fault = () => undefined;
    await written;
    expect(others.nodes.violations.splice(0)).toEqual(['"written" is deleted with objects in its table']);
    await expect(writeTo(vdi, 2 * OBJECT)).rejects.toThrow(/deleted/);
    await ours.release(vdi);
    expect(await others.objects()).toEqual([]);
  });

  test('a trim and a deletion also remove objects that nodes forgot to remove while members changed', async () => {
    const { ours, vdi } = await twoGateways('grown');
    await vdi.write(0, Buffer.alloc(2 * OBJECT, 1), false);
    others.nodes.forgetsReferences = true;
    await vdi.trim(0, OBJECT, false);
    others.nodes.epoch++;
    await ours.release(vdi);
    expect(await others.objects()).toHaveLength(1);
    let changes = 1;
    others.nodes.fault = ({ opcode }) => {
      if (opcode === Op.DEL_VDI) others.nodes.epoch += changes--;
      return undefined;
    };
    await ours.remove('grown');
    others.nodes.fault = () => undefined;
    others.nodes.forgetsReferences = false;
    expect(await others.objects()).toEqual([]);
  });

  test('a disk that reuses the vid of a deleted disk is another disk for its clients', async () => {
    const { ours, vdi } = await twoGateways('reused');
    await vdi.write(0, filled(1), false);
    await others.remove('reused');
    others.nodes.reuse(vdi.record.vid);
    const { catalog: theirs } = await openBeside(others);
    await theirs.create('reused', 2 * SIZE);
    const fresh = await ours.openVdi('reused');
    expect(fresh.size).toBe(2 * SIZE);
    await fresh.write(0, filled(2), false);
    await expect(writeTo(vdi, 0)).rejects.toThrow(/deleted/);
    expect((await bytesAt(fresh, 0)).equals(filled(2))).toBe(true);
    await ours.release(vdi);
    await ours.release(fresh);
    await ours.remove('reused');
    expect(await others.objects()).toEqual([]);
  });
});
