/** The time limits of a request: silent nodes use them up; setting the clock does not change them. */
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import { SheepStore } from '../../src/store/sheep/sheep-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import type { Vdi } from '../../src/vdi/vdi.js';
import { Op, StandIn } from './stand-in.js';

const SHIFT = 20;
const OBJECT = 2 ** SHIFT;
const BLOCK = 4096;
const RETRY_MS = 1_000;
/** On a busy machine. */
const MARGIN_MS = 1_500;
const HOUR_MS = 3600_000;

let cluster: StandIn;
let catalog: VdiCatalog;
let vdi: Vdi;
let resume: () => void;

async function connect(nodes: number): Promise<void> {
  cluster = await new StandIn({ nodes }).start();
  catalog = new VdiCatalog(await SheepStore.open(cluster.address, { retryMs: RETRY_MS }));
  await catalog.create('disk', 8 * OBJECT, { blockSizeShift: SHIFT });
  vdi = await catalog.openVdi('disk');
  await vdi.write(0, Buffer.alloc(BLOCK, 1), false);
  await cluster.settled();
}

/** These nodes accept requests and answer none. */
function silence(...nodes: number[]): void {
  const resumed = new Promise<void>((resolve) => (resume = resolve));
  cluster.fault = ({ node }) => (nodes.includes(node) ? { until: resumed } : undefined);
}

beforeEach(() => {
  resume = () => undefined;
});

afterEach(async () => {
  vi.restoreAllMocks();
  cluster.fault = () => undefined;
  resume();
  await catalog.close().catch(() => undefined);
  await cluster.stop();
});

/** Time until `work` fails. */
async function failing(work: () => unknown): Promise<number> {
  const before = performance.now();
  await expect(Promise.resolve().then(work)).rejects.toMatchObject({ code: expect.any(String) as string });
  return performance.now() - before;
}

describe('the only node is silent', () => {
  const read = (): unknown => vdi.read(0, Buffer.alloc(BLOCK));
  test.each<readonly [string, () => unknown]>([
    ['a read', read],
    ['a write in place', () => vdi.write(0, Buffer.alloc(BLOCK, 2), false)],
    ['the first write to an object', () => vdi.write(OBJECT, Buffer.alloc(BLOCK, 2), false)],
    ['zeros', () => vdi.zero(0, BLOCK, { noHole: true, fua: false, fastZero: false })],
    ['a list', () => catalog.list()],
    ['an open', () => catalog.openVdi('other')],
    ['a new VDI', () => catalog.create('new', OBJECT, { blockSizeShift: SHIFT })],
    ['a snapshot', () => catalog.snapshot('disk', 'tag')],
  ])('%s fails within the time limit for repeating requests', async (_, work) => {
    await connect(1);
    silence(0);
    const took = await failing(work);
    expect(took).toBeLessThan(RETRY_MS + MARGIN_MS);
    expect(took).toBeGreaterThan(RETRY_MS / 4);
  });

  test('opening fails soon, not only after the time limit of one attempt', async () => {
    await connect(1);
    silence(0);
    expect(await failing(() => SheepStore.open(cluster.address))).toBeLessThan(3_000 + MARGIN_MS);
  });
});

test('a silent node is given up early enough for another node to answer', async () => {
  await connect(3);
  silence(0);
  const before = performance.now();
  await vdi.read(0, Buffer.alloc(BLOCK));
  expect(performance.now() - before).toBeLessThan(RETRY_MS + MARGIN_MS);
});

test('a slow operation is awaited as long as its node answers other requests', async () => {
  await connect(1);
  cluster.fault = ({ opcode }) => (opcode === Op.NEW_VDI ? { delayMs: 3 * RETRY_MS } : undefined);
  await catalog.create('new', OBJECT, { blockSizeShift: SHIFT });
});

test.each(['back', 'forward'] as const)(
  'setting the clock %s an hour does not change how long a silent node is awaited',
  async (way) => {
    await connect(1);
    silence(0);
    const reading = failing(() => vdi.read(0, Buffer.alloc(BLOCK)));
    const now = Date.now.bind(Date);
    vi.spyOn(Date, 'now').mockImplementation(() => now() + (way === 'back' ? -HOUR_MS : HOUR_MS));
    const took = await reading;
    expect(took).toBeLessThan(RETRY_MS + MARGIN_MS);
    expect(took).toBeGreaterThan(RETRY_MS * 0.9);
  },
);
