/**
 * Overlapping operations of the local store: each test is an interleaving that once lost data, or would if the order of steps
 * were wrong. They run the real store without hooks, often enough to hit the window.
 */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { afterEach, expect, test } from 'vitest';
import { DescriptorCache } from '../../src/store/local/descriptor-cache.js';
import { LocalStore, type LocalStoreOptions } from '../../src/store/local/local-store.js';
import { hostDisk } from '../../src/system/real-disk.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { objectsOf, type Vdi } from '../../src/vdi/vdi.js';
import { FailingDisk } from '../harness/failing-disk.js';

const OBJECT = 2 ** 20;
const PAGE_OBJECTS = 1024;

let directory = '';
let failing: FailingDisk;
let store: LocalStore;
let catalog: VdiCatalog;

async function start(options: LocalStoreOptions = {}): Promise<void> {
  if (directory === '') directory = fs.mkdtempSync(path.join(os.tmpdir(), 'sheepgate-races-'));
  failing = new FailingDisk();
  store = await LocalStore.open(directory, { ...options, disk: failing.disk });
  catalog = new VdiCatalog(store);
}

async function reopen(options: LocalStoreOptions = {}): Promise<void> {
  await catalog.close();
  await start(options);
}

afterEach(async () => {
  await catalog.close().catch(() => undefined);
  fs.rmSync(directory, { recursive: true, force: true });
  directory = '';
});

function objectFile(vid: number, idx: number): string {
  const name = [vid, idx].map((part) => part.toString(16).padStart(8, '0')).join('');
  const objects = path.join(directory, 'objects');
  const found = fs.readdirSync(objects, { recursive: true, encoding: 'utf8' }).find((file) => file.endsWith(name));
  return path.join(objects, found ?? '');
}

async function turns(count: number): Promise<void> {
  for (let n = 0; n < count; n++) await new Promise((resolve) => setImmediate(resolve));
}

test('an object that is written again during the flush that removes its old file is not removed with it', async () => {
  const objects = 64;
  await start();
  await catalog.create('disk', objects * OBJECT, { blockSizeShift: 20 });
  const vdi = await catalog.openVdi('disk');
  for (let idx = 0; idx < objects; idx++) await vdi.write(idx * OBJECT, Buffer.alloc(4096, 1), false);
  await vdi.flush();
  for (let idx = 0; idx < objects; idx++) {
    await vdi.trim(idx * OBJECT, OBJECT, false);
    const flushed = vdi.flush();
    await turns(idx % 8);
    await vdi.write(idx * OBJECT, Buffer.alloc(OBJECT, 2), true);
    await flushed;
  }
  await catalog.release(vdi);
  await reopen();
  const again = await catalog.openVdi('disk');
  const data = Buffer.alloc(OBJECT);
  for (let idx = 0; idx < objects; idx++) {
    await again.read(idx * OBJECT, data);
    expect(data.equals(Buffer.alloc(OBJECT, 2)), `object ${idx}`).toBe(true);
  }
  await catalog.release(again);
});

test('map entries of writes that a waiting flush covers survive a snapshot taken meanwhile', async () => {
  const pages = 64;
  const writers = 8;
  await start();
  await catalog.create('disk', pages * PAGE_OBJECTS * OBJECT, { blockSizeShift: 20 });
  const vdi = await catalog.openVdi('disk');
  const at = (page: number): number => page * PAGE_OBJECTS * OBJECT;
  for (let page = 0; page < pages; page++) await vdi.write(at(page), Buffer.alloc(4096, 1), false);
  await vdi.flush();
  for (let round = 0; round < 12; round++) {
    let stop = false;
    let writes = 0;
    const running = Array.from({ length: writers }, async (_, n) => {
      for (let k = 0; !stop; k++) {
        const page = ((k * 7) % (pages / writers)) * writers + n;
        await vdi.write(at(page), Buffer.alloc(4096, round + 2), k % 2 === 0);
        writes++;
        if (k % 3 === 0) await turns(1);
      }
    });
    const target = 20 + 3 * round;
    while (writes < target) await turns(1);
    await catalog.snapshot('disk', `s${round}`);
    stop = true;
    await Promise.all(running);
    await vdi.flush();
    const stored = store.metadata.map(vdi.record);
    for (let page = 0; page < pages; page++) {
      expect(stored[page * PAGE_OBJECTS], `round ${round}, page ${page}`).toBe(objectsOf(vdi).map[page * PAGE_OBJECTS]);
    }
  }
  await catalog.release(vdi);
});

test('with fewer descriptors than busy objects no request uses another object’s descriptor', async () => {
  const objects = 48;
  await start();
  await catalog.create('disk', objects * OBJECT, { blockSizeShift: 20 });
  let vdi: Vdi = await catalog.openVdi('disk');
  for (let idx = 0; idx < objects; idx++) await vdi.write(idx * OBJECT, Buffer.alloc(OBJECT, 2 + idx), false);
  await catalog.release(vdi);
  await reopen({ maxDescriptors: 4 });
  vdi = await catalog.openVdi('disk');
  await Promise.all(
    Array.from({ length: 12 }, async (_, n) => {
      for (let k = 0; k < 60; k++) {
        const idx = (k * 13 + n * 7) % objects;
        if ((k + n) % 2 === 0) await vdi.write(idx * OBJECT, Buffer.alloc(160 * 1024, 2 + idx), false);
        else {
          const data = Buffer.alloc(OBJECT);
          await vdi.read(idx * OBJECT, data);
          expect(data.equals(Buffer.alloc(OBJECT, 2 + idx)), `read of object ${idx}`).toBe(true);
        }
      }
    }),
  );
  for (let idx = 0; idx < objects; idx++) {
    const file = fs.readFileSync(objectFile(vdi.record.vid, idx));
    expect(file.equals(Buffer.alloc(OBJECT, 2 + idx)), `file of object ${idx}`).toBe(true);
  }
  await catalog.release(vdi);
});

test('objects that are read and copied at the same time never exceed the limit of descriptors, and none waits for ever', async () => {
  const limit = 6;
  const objects = 160;
  await start();
  await catalog.create('disk', objects * OBJECT, { blockSizeShift: 20 });
  let vdi: Vdi = await catalog.openVdi('disk');
  for (let idx = 0; idx < objects; idx++) await vdi.write(idx * OBJECT, Buffer.alloc(4096, 2 + idx), false);
  await catalog.release(vdi);
  await catalog.snapshot('disk', 's');
  await reopen({ maxDescriptors: limit });
  const source = await catalog.openVdi('disk@s');
  vdi = await catalog.openVdi('disk');
  const descriptors = (): number => fs.readdirSync('/proc/self/fd').length;
  const before = descriptors();
  let most = before;
  const isOver = { done: false };
  const watched = (async () => {
    while (!isOver.done) {
      most = Math.max(most, descriptors());
      await turns(1);
    }
  })();
  await Promise.all(
    Array.from({ length: objects }, async (_, idx) => {
      const data = Buffer.alloc(4096);
      // The first write copies the object that is read at the same time.
      await Promise.all([source.read(idx * OBJECT, data), vdi.write(idx * OBJECT + 8192, Buffer.alloc(512, 1), false)]);
      expect(data.equals(Buffer.alloc(4096, 2 + idx)), `object ${idx}`).toBe(true);
      await vdi.read(idx * OBJECT, data);
      expect(data.equals(Buffer.alloc(4096, 2 + idx)), `copy of object ${idx}`).toBe(true);
    }),
  );
  isOver.done = true;
  await watched;
  // In addition: the log of the map, and the folder of the /proc listing.
  expect(most - before).toBeLessThanOrEqual(limit + 2);
  await catalog.release(vdi);
  await catalog.release(source);
});

test('the number of open descriptors stays within its limit however objects come and go', async () => {
  const limit = 32;
  const objects = 200;
  await start({ maxDescriptors: limit });
  await catalog.create('disk', objects * OBJECT, { blockSizeShift: 20 });
  const vdi = await catalog.openVdi('disk');
  const descriptors = (): number => fs.readdirSync('/proc/self/fd').length;
  const before = descriptors();
  for (let idx = 0; idx < objects; idx++) await vdi.write(idx * OBJECT, Buffer.alloc(512, 1), false);
  await vdi.flush();
  for (let round = 0; round < 60; round++) {
    const idx = round % 8;
    await vdi.write(idx * OBJECT, Buffer.alloc(512, 1), false);
    await vdi.trim(idx * OBJECT, OBJECT, false);
    await Promise.all([vdi.write(idx * OBJECT, Buffer.alloc(OBJECT, 2), false), vdi.flush()]);
  }
  for (let idx = 0; idx < objects; idx++) await vdi.read(idx * OBJECT, Buffer.alloc(512));
  await expect.poll(() => descriptors() - before).toBeLessThanOrEqual(limit + 4);
  await catalog.release(vdi);
});

test('a waiter for a descriptor of one disk does not wait behind all waiters of another disk', async () => {
  await start();
  const cache = new DescriptorCache(hostDisk, 2);
  const order: string[] = [];
  expect(cache.take(2, 1)).toBeUndefined();
  for (let n = 0; n < 4; n++) void cache.take(1, 1)?.then(() => order.push('one'));
  void cache.take(2, 2)?.then(() => order.push('copy of another'));
  void cache.take(1, 3)?.then(() => order.push('third'));
  for (let n = 0; n < 7; n++) {
    cache.giveBack(1);
    await turns(1);
  }
  expect(order).toEqual(['one', 'copy of another', 'third', 'one', 'one', 'one']);
  expect(cache.held).toBe(2);
});

test('pages that a failed clone left behind belong to no VDI: a new VDI with the same vid is empty', async () => {
  await start();
  await catalog.create('secret', 4 * OBJECT, { blockSizeShift: 20 });
  const secret = await catalog.openVdi('secret');
  await secret.write(0, Buffer.alloc(OBJECT, 0x53), true);
  await catalog.release(secret);
  await catalog.snapshot('secret', 's');
  const full = failing.fail({ calls: ['commit'] }, 'ENOSPC');
  await expect(catalog.clone('secret@s', 'copy')).rejects.toMatchObject({ code: 'NO_SPACE' });
  full.off();
  await reopen();
  await catalog.create('fresh', 4 * OBJECT, { blockSizeShift: 20 });
  const fresh = await catalog.openVdi('fresh');
  const data = Buffer.alloc(OBJECT, 1);
  await fresh.read(0, data);
  expect(data.equals(Buffer.alloc(OBJECT))).toBe(true);
  await catalog.release(fresh);
});

test('a second client that opens a VDI while its failed snapshot is being undone shares it with the first', async () => {
  await start();
  await catalog.create('disk', 4 * OBJECT, { blockSizeShift: 20 });
  const vdi = await catalog.openVdi('disk');
  await vdi.write(0, Buffer.alloc(OBJECT, 1), true);
  const full = failing.fail({ calls: ['commit'] }, 'ENOSPC');
  await expect(catalog.snapshot('disk', 's')).rejects.toMatchObject({ code: 'NO_SPACE' });
  full.off();
  await vdi.write(OBJECT, Buffer.alloc(4096, 2), false);
  const flushed = vdi.flush();
  await turns(1);
  const second = await catalog.openVdi('disk');
  expect(second).toBe(vdi);
  await second.write(3 * OBJECT, Buffer.alloc(4096, 7), true);
  await flushed;
  await catalog.release(second);
  await catalog.release(vdi);
  await reopen();
  const again = await catalog.openVdi('disk');
  const data = Buffer.alloc(4096);
  await again.read(3 * OBJECT, data);
  expect(data.equals(Buffer.alloc(4096, 7))).toBe(true);
  await catalog.release(again);
});

test('a fast zero of a shared object copies nothing, and leaves the snapshot as it is', async () => {
  await start();
  await catalog.create('disk', 4 * OBJECT, { blockSizeShift: 20 });
  const vdi = await catalog.openVdi('disk');
  await vdi.write(0, Buffer.alloc(2 * OBJECT, 1), true);
  await catalog.snapshot('disk', 's');
  const reads = failing.instead({ calls: ['copyRange', 'clone'] }, () => expect.fail('it copies'));
  await vdi.zero(0, OBJECT + 4096, { noHole: false, fua: false, fastZero: true });
  reads.off();
  const data = Buffer.alloc(2 * OBJECT);
  await vdi.read(0, data);
  expect(data.subarray(0, OBJECT + 4096).equals(Buffer.alloc(OBJECT + 4096))).toBe(true);
  expect(data.subarray(OBJECT + 4096).equals(Buffer.alloc(OBJECT - 4096, 1))).toBe(true);
  const snapshot = await catalog.openVdi('disk@s');
  await snapshot.read(0, data);
  expect(data.equals(Buffer.alloc(2 * OBJECT, 1))).toBe(true);
  await catalog.release(snapshot);
  await catalog.release(vdi);
});

test('a VDI whose sync failed starts from its durable state when it is opened the next time', async () => {
  await start();
  await catalog.create('disk', 4 * OBJECT, { blockSizeShift: 20 });
  const vdi = await catalog.openVdi('disk');
  await vdi.write(0, Buffer.alloc(4096, 1), true);
  await vdi.write(OBJECT, Buffer.alloc(4096, 2), false);
  const failed = failing.fail({ calls: ['fdatasync'] }, 'EIO');
  await expect(catalog.release(vdi)).rejects.toMatchObject({ code: 'IO' });
  failed.off();
  const again = await catalog.openVdi('disk');
  expect(again).not.toBe(vdi);
  await again.write(2 * OBJECT, Buffer.alloc(4096, 3), true);
  const data = Buffer.alloc(4096);
  await again.read(0, data);
  expect(data[0]).toBe(1);
  await catalog.release(again);
  expect((await catalog.check({ repair: false })).problems).toEqual([]);
  await catalog.remove('disk');
  expect((await catalog.list()).length).toBe(0);
});
