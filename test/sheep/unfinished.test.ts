/**
 * The mark of an unfinished VDI in a cluster. Setting it together with a VDI, a snapshot or a rollback takes several
 * requests: a process that ends between any two of them must not leave an unfinished VDI that looks complete.
 */
import { expect, test } from 'vitest';
import type { VdiRecord } from '../../src/store/vdi-record.js';
import { SheepStore } from '../../src/store/sheep/sheep-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import type { Beginning } from '../../src/vdi/unfinished.js';
import { MIB, patterned } from '../cli/both-ways.js';
import { Op, Res, StandIn } from './stand-in.js';
import { parseUnfinishedTag, unfinishedTag } from '../../src/store/sheep/unfinished-tag.js';

const BEGINNING: Beginning = {
  by: 'migrate',
  of: '0123456789ab',
  run: 'abcdef',
  size: 4 * MIB,
  blockSizeShift: 20,
  overwrites: true,
  goesOn: true,
};
const RUN = { run: BEGINNING.run };
/** The cluster refuses every repetition of a request. */
const RETRY_MS = 100;
const WRITING = new Set<number>([Op.CREATE, Op.WRITE, Op.REMOVE, Op.NEW_VDI, Op.DEL_VDI]);

async function withCatalog<T>(cluster: StandIn, work: (catalog: VdiCatalog) => Promise<T>): Promise<T> {
  const catalog = new VdiCatalog(await SheepStore.open(cluster.address, { retryMs: RETRY_MS, attemptMs: 30_000 }));
  try {
    return await work(catalog);
  } finally {
    await catalog.close();
  }
}

/** A VDI with snapshots, and other content since. */
async function disk(catalog: VdiCatalog): Promise<void> {
  await catalog.create('vm', 4 * MIB, { blockSizeShift: 20 });
  const vdi = await catalog.openVdi('vm');
  await vdi.write(0, patterned(MIB, 1), false);
  await catalog.snapshot('vm', 'a');
  await vdi.write(MIB, patterned(MIB, 2), false);
  await catalog.release(vdi);
}

async function begunDisk(catalog: VdiCatalog): Promise<void> {
  await disk(catalog);
  await catalog.begin('vm', BEGINNING);
}

interface Operation {
  readonly label: string;
  readonly before: (catalog: VdiCatalog) => Promise<unknown>;
  readonly run: (catalog: VdiCatalog) => Promise<unknown>;
  /** Whether a part of the operation may leave this working VDI. */
  readonly mayBe: (working: VdiRecord | undefined) => boolean;
}

const isMarked = (working: VdiRecord | undefined): boolean => working?.unfinished?.run === BEGINNING.run;

const OPERATIONS: readonly Operation[] = [
  {
    label: 'begin, of a new VDI',
    before: () => Promise.resolve(),
    run: (catalog) => catalog.begin('vm', { ...BEGINNING, overwrites: false }),
    mayBe: (working) => working === undefined || working.size === 509 || isMarked(working),
  },
  {
    label: 'begin, of a VDI that is there',
    before: disk,
    run: (catalog) => catalog.begin('vm', BEGINNING),
    mayBe: (working) => working !== undefined,
  },
  {
    label: 'snapshot',
    before: begunDisk,
    run: (catalog) => catalog.snapshot('vm', 'b', RUN),
    mayBe: isMarked,
  },
  {
    label: 'rollback',
    before: begunDisk,
    run: (catalog) => catalog.rollback('vm@a', RUN),
    mayBe: isMarked,
  },
];

/** Does `work` while the cluster refuses changing requests from the nth on. Returns the number of changing requests. */
async function cutOff(cluster: StandIn, nth: number, work: Operation['run']): Promise<number> {
  return withCatalog(cluster, async (catalog) => {
    let requests = 0;
    cluster.fault = ({ opcode, length }) => {
      // An empty write changes nothing: it asks for the object.
      if (!WRITING.has(opcode) || (opcode === Op.WRITE && length === 0) || ++requests < nth) return undefined;
      return { result: Res.EIO };
    };
    await work(catalog).catch(() => undefined);
    cluster.fault = () => undefined;
    return requests;
  });
}

test.each(OPERATIONS)(
  '$label that is cut off at any request leaves no VDI that looks complete, and can be begun again',
  async ({ before, run, mayBe }) => {
    const whole = await new StandIn({ jitterMs: 0 }).start();
    await withCatalog(whole, before);
    const requests = await cutOff(whole, Number.MAX_SAFE_INTEGER, run);
    await whole.stop();
    expect(requests).toBeGreaterThan(0);
    for (let nth = 1; nth <= requests; nth++) {
      const cluster = await new StandIn({ jitterMs: 0 }).start();
      await withCatalog(cluster, before);
      await cutOff(cluster, nth, run);
      await withCatalog(cluster, async (catalog) => {
        const working = (await catalog.list()).find(({ isSnapshot }) => !isSnapshot);
        expect(mayBe(working), `before request ${nth} of ${requests}: ${JSON.stringify(working)}`).toBe(true);
        const goesOn = isMarked(working) || working?.size !== BEGINNING.size;
        const again = catalog.begin('vm', { ...BEGINNING, overwrites: false, run: 'beef' });
        if (!goesOn) return expect(again).rejects.toMatchObject({ code: 'EXISTS' });
        expect((await again).unfinished?.run).toBe('beef');
        await catalog.finish('vm', 'beef');
        const records = await catalog.list();
        expect(records.every(({ tag, unfinished }) => !unfinished && !parseUnfinishedTag(tag))).toBe(true);
      });
      await cluster.settled();
      expect(cluster.violations).toEqual([]);
      await cluster.stop();
    }
  },
);

test('a rollback or a deletion gives up an unfinished VDI, and dog shows its mark in the column of tags', async () => {
  const cluster = await new StandIn().start();
  await withCatalog(cluster, async (catalog) => {
    await begunDisk(catalog);
    await expect(catalog.openVdi('vm')).rejects.toMatchObject({ code: 'UNFINISHED' });
    expect((await catalog.rollback('vm@a')).unfinished).toBe(undefined);
    await catalog.release(await catalog.openVdi('vm'));
    await catalog.begin('vm', BEGINNING);
    await catalog.remove('vm');
    expect((await catalog.list()).map(({ tag }) => tag)).toEqual(['a']);
  });
  await cluster.settled();
  expect(cluster.violations).toEqual([]);
  await cluster.stop();
});

test('a VDI of one sector that a user created is not taken for a creation that was cut off', async () => {
  const cluster = await new StandIn({ jitterMs: 0 }).start();
  await withCatalog(cluster, async (catalog) => {
    const { vid } = await catalog.create('vm', 512, { blockSizeShift: 20 });
    const begun = catalog.begin('vm', { ...BEGINNING, by: 'import', overwrites: false, goesOn: false });
    await expect(begun).rejects.toMatchObject({ code: 'EXISTS' });
    expect(await catalog.show('vm')).toMatchObject({ vid, size: 512, tag: '' });
  });
  await cluster.stop();
});

test('the mark is a tag that describes itself, and no other tag is taken for a mark', () => {
  const unfinished = { by: 'import', of: '', run: 'a1', since: 1_764_297_600_000, isNew: true } as const;
  expect(unfinishedTag(unfinished)).toBe('sheepgate-unfinished:import::a1:1764297600000:new');
  expect(parseUnfinishedTag(unfinishedTag(unfinished))).toEqual(unfinished);
  for (const tag of ['', 'monday', 'sheepgate-unfinished', 'sheepgate-unfinished:import::a1:1:newer']) {
    expect(parseUnfinishedTag(tag)).toBe(undefined);
  }
});
