/**
 * Clusters that enforce locks and use vids again (`dog cluster format -l -R`): nodes do not find a VDI by name if its id is
 * lower than those of its snapshots, not even to lock it. Against the stand-in, and against real nodes where installed.
 */
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import { SheepStore } from '../../src/store/sheep/sheep-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { specOf } from '../../src/vdi/names.js';
import type { Vdi } from '../../src/vdi/vdi.js';
import { realNodesMissing, startRealNodes } from './clusters.js';
import { StandIn } from './stand-in.js';

const SHIFT = 20;
const SIZE = 4 * 2 ** SHIFT;
const BLOCK = 4096;
const missing = realNodesMissing();
if (missing !== undefined) console.log(`not run against real Sheepdog nodes: ${missing}`);

interface Cluster {
  readonly address: string;
  snapshot(name: string, tag: string): Promise<void>;
  complaints(): readonly string[];
  stop(): Promise<void>;
}

async function standIn(): Promise<Cluster> {
  const nodes = await new StandIn({ nodes: 2, jitterMs: 0, recyclesVids: true, useLock: true }).start();
  return {
    address: nodes.address,
    snapshot: (name, tag) => {
      nodes.externalSnapshot(name, tag);
      return Promise.resolve();
    },
    complaints: () => nodes.violations,
    stop: () => nodes.stop(),
  };
}

async function realNodes(): Promise<Cluster> {
  const nodes = await startRealNodes({ nodes: 2, format: ['-c', '2', '-z', String(SHIFT), '-l', '-R'] });
  return {
    address: nodes.address,
    snapshot: (name, tag) => nodes.snapshot(name, tag),
    complaints: () => nodes.crashes(),
    stop: () => nodes.stop(),
  };
}

for (const isReal of [false, true]) {
  describe.skipIf(isReal && missing !== undefined)(isReal ? 'real nodes' : 'stand-in', () => {
    let cluster: Cluster;
    const opened: VdiCatalog[] = [];
    beforeAll(async () => {
      cluster = await (isReal ? realNodes() : standIn());
    }, 120_000);
    afterEach(async () => {
      for (const catalog of opened.splice(0)) await catalog.close();
      // No VDI is left for the next test.
      const { catalog } = await openHere();
      for (const record of await catalog.list()) await catalog.remove(specOf(record));
      await catalog.close();
      opened.splice(0);
      expect(cluster.complaints()).toEqual([]);
    }, 60_000);
    afterAll(async () => {
      await (cluster as typeof cluster | undefined)?.stop();
    });

    async function openHere(): Promise<{ store: SheepStore; catalog: VdiCatalog }> {
      const store = await SheepStore.open(cluster.address, { retryMs: 5_000 });
      const catalog = new VdiCatalog(store);
      opened.push(catalog);
      return { store, catalog };
    }

    /** The next snapshot of "b" makes a working VDI with a lower id. */
    async function diskWithLowerIdsFree(catalog: VdiCatalog): Promise<void> {
      const names = ['old-1', 'old-2', 'old-3', 'old-4'];
      for (const name of [...names, 'b']) await catalog.create(name, SIZE);
      for (const name of names) await catalog.remove(name);
    }

    const filled = (value: number): Buffer => Buffer.alloc(BLOCK, value);
    async function byteOf(vdi: Vdi): Promise<number | undefined> {
      const into = Buffer.alloc(BLOCK);
      await vdi.read(0, into);
      return into[0];
    }

    async function contents(catalog: VdiCatalog): Promise<[string, number | undefined][]> {
      const all: [string, number | undefined][] = [];
      for (const record of await catalog.list()) {
        const vdi = await catalog.openVdi(specOf(record));
        all.push([record.tag, await byteOf(vdi)]);
        await catalog.release(vdi);
      }
      return all;
    }

    test('an open disk continues to write after our snapshots, with a lock on its current vid only', async () => {
      const { catalog, store } = await openHere();
      await diskWithLowerIdsFree(catalog);
      const vdi = await catalog.openVdi('b');
      for (const [n, tag] of ['s', 't', 'u'].entries()) {
        await vdi.write(0, filled(n + 1), false);
        await catalog.snapshot('b', tag);
      }
      await vdi.write(0, filled(4), false);
      expect(await store.cluster.lockedVids()).toEqual([vdi.record.vid]);
      const theirs = await openHere();
      await expect(theirs.catalog.openVdi('b')).rejects.toMatchObject({ code: 'LOCKED', message: /^"b" is locked/ });
      await catalog.release(vdi);
      expect(await store.cluster.lockedVids()).toEqual([]);
      expect(await contents(theirs.catalog)).toEqual([
        ['s', 1],
        ['t', 2],
        ['u', 3],
        ['', 4],
      ]);
      await theirs.catalog.rollback('b@s');
      await theirs.catalog.remove('b@t');
      expect(await contents(catalog)).toEqual([
        ['s', 1],
        ['u', 3],
        ['', 1],
      ]);
      expect(await store.cluster.lockedVids().then((vids) => vids.length)).toBeLessThanOrEqual(1);
    }, 60_000);

    test('an open disk and its lock follow a snapshot of another client', async () => {
      const { catalog, store } = await openHere();
      await diskWithLowerIdsFree(catalog);
      const vdi = await catalog.openVdi('b');
      await vdi.write(0, filled(1), false);
      const before = vdi.record.vid;
      const { catalog: other } = await openHere();
      expect((await other.named('b')).map(({ tag }) => tag)).toEqual(['']);
      await cluster.snapshot('b', 's');
      // Also for the store that has just looked.
      expect((await other.named('b')).map(({ tag }) => tag)).toEqual(['s', '']);
      await vdi.write(0, filled(2), false);
      expect(vdi.record.vid).toBeLessThan(before);
      expect(await store.cluster.lockedVids()).toEqual([vdi.record.vid]);
      await catalog.release(vdi);
      expect(await contents(catalog)).toEqual([
        ['s', 1],
        ['', 2],
      ]);
    }, 60_000);
  });
}
