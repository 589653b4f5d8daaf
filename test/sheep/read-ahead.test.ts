/** Read-ahead, against the stand-in: which requests it makes, and that a read never returns stale data. */
import { afterEach, beforeEach, expect, test } from 'vitest';
import { SheepStore } from '../../src/store/sheep/sheep-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import type { Vdi } from '../../src/vdi/vdi.js';
import { Op, Res, StandIn, type Seen } from './stand-in.js';

const SHIFT = 22;
const OBJECT = 2 ** SHIFT;
const OBJECTS = 3;
const STEP = 128 * 1024;

let cluster: StandIn;
let catalog: VdiCatalog;
let vdi: Vdi;
const written = Buffer.alloc(OBJECTS * OBJECT);
for (let at = 0; at < written.length; at += 4) written.writeUInt32LE((at * 2654435761) >>> 0, at);

beforeEach(async () => {
  cluster = await new StandIn().start();
  catalog = new VdiCatalog(await SheepStore.open(cluster.address, { retryMs: 10_000 }));
  await catalog.create('disk', OBJECTS * OBJECT, { blockSizeShift: SHIFT });
  vdi = await catalog.openVdi('disk');
  await vdi.write(0, written, false);
  cluster.seen.length = 0;
});

afterEach(async () => {
  cluster.fault = () => undefined;
  await catalog.close();
  await cluster.stop();
});

const isDataRead = ({ opcode, oid }: Seen): boolean => opcode === Op.READ && oid < 1n << 56n;
const askedFor = (): number => cluster.seen.filter(isDataRead).reduce((sum, { length }) => sum + length, 0);

async function read(offset: number, length = STEP, from: Vdi = vdi): Promise<Buffer> {
  const data = Buffer.alloc(length, 0xee);
  await from.read(offset, data);
  return data;
}

test('a sequential read of a disk reads every byte once, in fewer and larger requests', async () => {
  for (let at = 0; at < written.length; at += STEP) {
    expect((await read(at)).equals(written.subarray(at, at + STEP)), `at ${at}`).toBe(true);
  }
  const requests = cluster.seen.filter(isDataRead).length;
  expect(requests).toBeLessThan(written.length / STEP / 3);
  expect(askedFor()).toBeLessThan(written.length * 1.05);
});

test('reads across pieces and objects are assembled', async () => {
  const length = 3 * STEP + 4096;
  for (let at = 0; at + length <= written.length; at += length) {
    expect((await read(at, length)).equals(written.subarray(at, at + length)), `at ${at}`).toBe(true);
  }
  expect(askedFor()).toBeLessThan(written.length * 1.1);
});

test('random reads request only their own bytes', async () => {
  for (let n = 0; n < 40; n++) await read(((n * 37) % 90) * STEP);
  expect(askedFor()).toBe(40 * STEP);
});

test('a write invalidates data that was read ahead', async () => {
  for (let at = 0; at < 4 * STEP; at += STEP) await read(at);
  expect(askedFor()).toBeGreaterThan(5 * STEP);
  const data = Buffer.alloc(STEP, 0x11);
  await vdi.write(4 * STEP, data, false);
  expect((await read(4 * STEP)).equals(data)).toBe(true);
});

test('a write invalidates data that are being read ahead', async () => {
  await read(0);
  // From here on the node reads at once and answers late.
  cluster.fault = (request) => (isDataRead(request) && request.offset > 2 * STEP ? { answerDelayMs: 150 } : undefined);
  await read(STEP);
  const data = Buffer.alloc(STEP, 0x22);
  await vdi.write(4 * STEP, data, false);
  expect((await read(4 * STEP)).equals(data)).toBe(true);
  await vdi.zero(5 * STEP, STEP, { noHole: true, fua: false });
  expect((await read(5 * STEP)).every((byte) => byte === 0)).toBe(true);
});

test('a piece whose read-ahead failed is read when a client reads it', async () => {
  await read(0);
  let left = 6;
  cluster.fault = (request) =>
    isDataRead(request) && request.length > STEP && left-- > 0 ? { result: Res.NO_OBJ } : undefined;
  for (let at = STEP; at < OBJECT; at += STEP) {
    expect((await read(at)).equals(written.subarray(at, at + STEP)), `at ${at}`).toBe(true);
  }
  expect(left).toBeLessThan(6);
});

test('a sequential read of a temporary snapshot shows the moment it was taken, whatever is written meanwhile', async () => {
  const { tag } = await catalog.snapshotTemporary('disk', 'now');
  const snapshot = await catalog.openVdi(`disk@${tag}`);
  let isReading = true;
  const writer = async (seed: number): Promise<void> => {
    const data = Buffer.alloc(STEP, 0x30 + seed);
    for (let n = seed; isReading; n += 7) await vdi.write(((n * 5) % (written.length / STEP)) * STEP, data, false);
  };
  const writers = [writer(1), writer(2), writer(3)];
  for (let at = 0; at < written.length; at += STEP) {
    expect((await read(at, STEP, snapshot)).equals(written.subarray(at, at + STEP)), `at ${at}`).toBe(true);
  }
  isReading = false;
  await Promise.all(writers);
  await catalog.release(snapshot);
  await catalog.dropTemporary('disk', tag);
});
