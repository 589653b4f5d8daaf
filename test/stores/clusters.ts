/**
 * Sheepdog clusters for the store suite: the stand-in always, real nodes where `sheep` and `dog` are on the PATH. Owns how each
 * is started; the clusters themselves are in test/sheep/clusters.ts.
 */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { SheepStore } from '../../src/store/sheep/sheep-store.js';
import { zerosForMissing } from '../../src/store/sheep/zeros-for-missing.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { realNodesMissing, startRealNodes, startStandIn, type TestCluster } from '../sheep/clusters.js';
import { fillForReading } from './local.js';
import { Session } from './session.js';
import type { Abilities, StoreKind, StoreUnderTest } from './store-under-test.js';

/**
 * The real nodes are formatted with this (for `dog cluster format`) in place of the two formats below, and VDIs have
 * objects of this shift: SHEEPGATE_TEST_FORMAT="-c 3 -l" SHEEPGATE_TEST_SHIFT=24.
 */
const { SHEEPGATE_TEST_FORMAT: onlyFormat, SHEEPGATE_TEST_NODES: onlyNodes = '4' } = process.env;
const SHIFT = Number(process.env['SHEEPGATE_TEST_SHIFT'] ?? 20);
/** copy_policy of two data strips and one of parity. */
const ERASURE_2_1 = 0x11;
/** Each VDI and each snapshot has an inode of 12 MiB, which is read and written whole. */
const EFFORT = 0.3;
/** Nodes of a loaded machine may take this long. */
const RETRY_MS = 30_000;

const ABILITIES: Abilities = {
  objectSize: 2 ** SHIFT,
  canWrite: true,
  canSnapshot: true,
  canSnapshotTemporarily: true,
  canClone: true,
  canResize: true,
  keepsState: true,
  knowsHolesAtOnce: true,
  tellsChanges: true,
  countsCopies: true,
  copiesBlocks: false,
  copiesEndWithSnapshots: false,
};

export const standIns: readonly StoreKind[] = [
  {
    label: 'cluster stand-in',
    abilities: ABILITIES,
    effort: EFFORT,
    sequences: { quick: 4, full: 12, long: 1000 },
    start: () => onCluster(() => startStandIn()),
  },
  {
    label: 'cluster stand-in, erasure-coded',
    abilities: ABILITIES,
    effort: EFFORT,
    sequences: { quick: 2, full: 5, long: 500 },
    start: () => onCluster(() => startStandIn({ copyPolicy: ERASURE_2_1 })),
  },
];

/** What nothing may be written to, because what is lost reads as zeros. */
export const readOnlyStandIn: StoreKind = {
  label: 'cluster stand-in, opened with --missing=zero',
  abilities: { ...ABILITIES, canWrite: false },
  effort: EFFORT,
  sequences: { quick: 0, full: 0, long: 0 },
  start: startReadOnly,
};

export const realNodes: readonly StoreKind[] =
  onlyFormat === undefined
    ? [realNodesOf(3, '-c 2'), realNodesOf(4, '-c 2:1')]
    : [realNodesOf(Number(onlyNodes), onlyFormat)];

function realNodesOf(nodes: number, format: string): StoreKind {
  return {
    label: `${nodes} real nodes, ${format}`,
    missing: realNodesMissing(),
    abilities: ABILITIES,
    effort: EFFORT,
    sequences: { quick: 1, full: 4, long: 200 },
    start: () => onCluster(() => startRealNodes({ nodes, format: format.split(' ') })),
  };
}

async function onCluster(start: () => Promise<TestCluster>): Promise<StoreUnderTest> {
  const cluster = await start();
  const stateDirectory = fs.mkdtempSync(path.join(os.tmpdir(), 'sheepgate-suite-'));
  let store: SheepStore | undefined;
  return {
    open: async () => {
      store = await SheepStore.open(cluster.address, { retryMs: RETRY_MS, stateDirectory });
      return new VdiCatalog(store);
    },
    crash: async () => {
      const names = new Set([...(store?.open.values() ?? [])].map(({ record }) => record.name));
      store?.cluster.pool.close(); // as if it had been killed: nothing is cleaned up
      for (const name of names) await cluster.unlock(name);
    },
    objects: () => cluster.objects(),
    snapshotFromOutside: (name, tag) => cluster.snapshot(name, tag),
    violations: () => cluster.violations(),
    stop: async () => {
      await store?.close().catch(() => undefined);
      await cluster.stop();
      fs.rmSync(stateDirectory, { recursive: true, force: true });
    },
  };
}

async function startReadOnly(): Promise<StoreUnderTest> {
  const cluster = await startStandIn();
  const writable = { ...NOTHING, open: async () => new VdiCatalog(await SheepStore.open(cluster.address)) };
  const session = new Session(ABILITIES, () => writable);
  await session.start();
  const content = await fillForReading(session);
  await session.catalog.close();
  return {
    ...NOTHING,
    content,
    open: async () => new VdiCatalog(await SheepStore.open(cluster.address, zerosForMissing(cluster.address))),
    stop: () => cluster.stop(),
  };
}

/** What a store needs to be filled once, or to be read only. */
const NOTHING = {
  crash: () => Promise.resolve(),
  objects: () => Promise.resolve([]),
  stop: () => Promise.resolve(),
} as const;
