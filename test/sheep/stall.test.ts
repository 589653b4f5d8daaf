/** A real node is stopped with unfinished writes and resumed later: later acknowledged writes must survive. */
import { describe, expect, test } from 'vitest';
import { SheepStore } from '../../src/store/sheep/sheep-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { realNodesMissing, startRealNodes } from './clusters.js';

const SHIFT = 20;
const OBJECT = 2 ** SHIFT;
const BLOCK = 4096;
/** A few blocks, so that the same bytes are written again and again. */
const BLOCKS = 64;
const LANES = 8;
const ATTEMPT_MS = 1_000;
const STOPPED_MS = 4_000;
const ROUNDS = 3;

const missing = realNodesMissing();
if (missing !== undefined) console.log(`no real Sheepdog node was stopped: ${missing}`);

describe.skipIf(missing !== undefined)('a real node that is stopped and resumed', () => {
  test('undoes no write that was acknowledged meanwhile', async () => {
    const cluster = await startRealNodes();
    const store = await SheepStore.open(cluster.address, { retryMs: 60_000, attemptMs: ATTEMPT_MS });
    const catalog = new VdiCatalog(store);
    await catalog.create('disk', 4 * OBJECT, { blockSizeShift: SHIFT });
    const vdi = await catalog.openVdi('disk');
    const expected = Buffer.alloc(vdi.size);
    let isEnding = false;
    let written = 0;
    const lane = async (n: number): Promise<void> => {
      for (let round = 1; !isEnding; round++) {
        const at = (n * BLOCKS + (round % BLOCKS)) * BLOCK;
        const data = Buffer.alloc(BLOCK);
        data.writeUInt32LE(round);
        data.copy(expected, at);
        await vdi.write(at, data, false);
        written++;
      }
    };
    const lanes = Array.from({ length: LANES }, (_, n) => lane(n));
    const pause = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));
    const moreWrites = async (count: number): Promise<void> => {
      const target = written + count;
      while (written < target) await pause(5);
    };
    for (let round = 0; round < ROUNDS; round++) {
      await moreWrites(200);
      cluster.pauseNode(round);
      await pause(STOPPED_MS);
      cluster.resumeNode(round);
      await moreWrites(2000);
    }
    isEnding = true;
    await Promise.all(lanes);
    // Writes that were held back have had time to arrive.
    await pause(1000);
    const actual = Buffer.alloc(expected.length);
    await vdi.read(0, actual);
    for (let at = 0; at < actual.length; at += BLOCK) {
      expect(actual.readUInt32LE(at), `block ${at / BLOCK}`).toBe(expected.readUInt32LE(at));
    }
    await catalog.close();
    await cluster.stop();
  }, 240_000);
});
