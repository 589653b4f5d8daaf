/**
 * VDIs of a cluster through the VDI layer, against the stand-in and, where there are any, real nodes: what a client reads
 * is what was written, snapshots do not change, nothing leaks.
 */
import fc from 'fast-check';
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import { SheepStore } from '../../src/store/sheep/sheep-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import type { Vdi } from '../../src/vdi/vdi.js';
import { realNodesMissing, startRealNodes, startStandIn, type TestCluster } from './clusters.js';

/**
 * The real nodes are formatted with this (for `dog cluster format`) in place of the two formats below, and VDIs have
 * objects of this shift: SHEEPGATE_TEST_FORMAT="-c 3 -l" SHEEPGATE_TEST_SHIFT=24.
 */
const { SHEEPGATE_TEST_FORMAT: onlyFormat, SHEEPGATE_TEST_NODES: onlyNodes = '4' } = process.env;
const SHIFT = Number(process.env['SHEEPGATE_TEST_SHIFT'] ?? 20);
const OBJECT = 2 ** SHIFT;
/** copy_policy of two data strips and one of parity. */
const ERASURE_2_1 = 0x11;
const missing = realNodesMissing();
if (missing !== undefined) console.log(`not run against real Sheepdog nodes: ${missing}`);

interface Kind {
  readonly label: string;
  readonly start: () => Promise<TestCluster>;
  readonly sequences: number;
  readonly isReal: boolean;
}

function realNodes(nodes: number, format: string): Kind {
  const start = (): Promise<TestCluster> => startRealNodes({ nodes, format: format.split(' ') });
  return { label: `${nodes} real nodes, ${format}`, start, sequences: 12, isReal: true };
}

const clusters: Kind[] = [
  { label: 'stand-in', start: () => startStandIn(), sequences: 40, isReal: false },
  {
    label: 'stand-in, erasure-coded',
    start: () => startStandIn({ copyPolicy: ERASURE_2_1 }),
    sequences: 20,
    isReal: false,
  },
  ...(onlyFormat !== undefined
    ? [realNodes(Number(onlyNodes), onlyFormat)]
    : [realNodes(3, '-c 2'), realNodes(4, '-c 2:1')]),
];

/** What ends a node of an erasure-coded cluster when members change, whoever the client is (docs/cluster.md). */
const KNOWN_CRASH = /PANIC: invalid ec_index/;

/** A VDI and what it must read as. */
class Disk {
  readonly content: Buffer;

  constructor(
    readonly vdi: Vdi,
    content?: Buffer,
  ) {
    this.content = content ?? Buffer.alloc(vdi.size);
  }

  async write(at: number, length: number, fill: number): Promise<void> {
    const data = Buffer.alloc(length, fill);
    data.copy(this.content, at);
    await this.vdi.write(at, data, false);
  }

  async trim(at: number, length: number): Promise<void> {
    this.content.fill(0, at, at + length);
    await this.vdi.trim(at, length, false);
  }

  async check(expected = this.content, vdi = this.vdi): Promise<void> {
    const actual = Buffer.alloc(expected.length, 0xaa);
    await vdi.read(0, actual);
    if (actual.equals(expected)) return;
    const at = actual.findIndex((byte, n) => byte !== expected[n]);
    throw new Error(`differs at ${at} (object ${Math.floor(at / OBJECT)}): ${actual[at]}, should be ${expected[at]}`);
  }
}

for (const { label, start, sequences, isReal } of clusters) {
  describe.skipIf(isReal && missing !== undefined)(`a cluster (${label})`, () => {
    let cluster: TestCluster;
    let store: SheepStore;
    let catalog: VdiCatalog;
    let names = 0;
    const disks: Disk[] = [];
    let leftBefore: string[] = [];
    /** Set where the nodes themselves leave something behind. */
    let mayLeak = false;

    const open = async (): Promise<void> => {
      store = await SheepStore.open(cluster.address, { retryMs: 30_000 });
      catalog = new VdiCatalog(store);
    };
    const newDisk = async (objects: number): Promise<{ name: string; disk: Disk }> => {
      const name = `disk${names++}`;
      await catalog.create(name, objects * OBJECT, { blockSizeShift: SHIFT });
      const disk = new Disk(await catalog.openVdi(name));
      disks.push(disk);
      return { name, disk };
    };
    const checkSpec = async (spec: string, expected: Buffer): Promise<void> => {
      const vdi = await catalog.openVdi(spec);
      await new Disk(vdi, expected).check();
      await catalog.release(vdi);
    };
    /** Also what a test that failed has left open. */
    const removeAll = async (): Promise<void> => {
      for (const { vdi } of disks.splice(0)) await catalog.release(vdi).catch(() => undefined);
      for (const { name, tag } of await catalog.list()) {
        await catalog.remove(tag === '' ? name : `${name}@${tag}`);
      }
    };

    beforeAll(async () => {
      cluster = await start();
      await open();
    });
    afterEach(async () => {
      await removeAll();
      const left = await cluster.objects();
      const leaked = left.filter((object) => !leftBefore.includes(object));
      leftBefore = left;
      if (!mayLeak) expect(leaked, 'objects and ledgers left').toEqual([]);
      else if (leaked.length > 0) console.log(`${label}: left behind: ${leaked.join(' ')}`);
      mayLeak = false;
      expect(cluster.violations()).toEqual([]);
    });
    afterAll(async () => {
      await (catalog as typeof catalog | undefined)?.close();
      await (cluster as typeof cluster | undefined)?.stop();
    });

    test('what was written is read, and unwritten space is zeros', async () => {
      const { disk } = await newDisk(9);
      await disk.write(1000, 5000, 1);
      await disk.write(3 * OBJECT - 700, 5 * OBJECT, 2);
      await disk.check();
      await catalog.release(disk.vdi);
    });

    test('snapshot, clone, rollback and delete keep every byte of everybody else', async () => {
      const { name, disk } = await newDisk(6);
      await disk.write(0, 3 * OBJECT, 1);
      await catalog.snapshot(name, 'first');
      const first = Buffer.from(disk.content);
      await disk.write(OBJECT + 5, 100, 2);
      await catalog.snapshot(name, 'second');
      const second = Buffer.from(disk.content);
      await disk.write(0, 6 * OBJECT, 3);
      await catalog.clone(`${name}@first`, `${name}-clone`);
      const clone = new Disk(await catalog.openVdi(`${name}-clone`), Buffer.from(first));
      await clone.write(2 * OBJECT, 10, 9);
      await clone.check();
      await catalog.release(clone.vdi);
      await checkSpec(`${name}@first`, first);
      await checkSpec(`${name}@second`, second);
      await disk.check();
      await catalog.release(disk.vdi);
      await catalog.remove(`${name}@second`);
      await checkSpec(name, disk.content);
      await catalog.rollback(`${name}@first`);
      await checkSpec(name, first);
      expect((await catalog.list()).map(({ tag }) => tag).filter(Boolean)).toEqual(['first']);
      await catalog.remove(`${name}@first`);
      await checkSpec(name, first);
      await checkSpec(`${name}-clone`, clone.content);
    });

    test('a trimmed object that is written again at once keeps what was written', async () => {
      const { disk } = await newDisk(3);
      for (let round = 1; round <= 25; round++) {
        await disk.write(0, 2 * OBJECT, round);
        await disk.trim(0, 2 * OBJECT);
        await disk.write(OBJECT + 100, 50, round);
      }
      await disk.check();
      await catalog.release(disk.vdi);
    });

    test('snapshots that somebody else takes while we write are points in time, and no write is lost', async () => {
      const { name, disk } = await newDisk(8);
      const BLOCK = 4096;
      // Every block holds the number of its write; writes go round in order, each answered before the next.
      let written = 0;
      let stop = false as boolean;
      const writer = (async () => {
        while (!stop) {
          written++;
          const at = ((written * 37) % (8 * (OBJECT / BLOCK))) * BLOCK;
          const data = Buffer.alloc(BLOCK);
          data.writeUInt32LE(written);
          data.copy(disk.content, at);
          await disk.vdi.write(at, data, false);
          if (written % 50 === 0) await disk.trim((written % 8) * OBJECT, OBJECT);
        }
      })();
      const bounds: { tag: string; before: number; after: number }[] = [];
      for (let n = 0; n < 5; n++) {
        const target = written + 30;
        while (written < target) await new Promise((resolve) => setImmediate(resolve));
        const before = written - 1;
        await cluster.snapshot(name, `ext${n}`);
        bounds.push({ tag: `ext${n}`, before, after: written });
      }
      const target = written + 100;
      while (written < target) await new Promise((resolve) => setImmediate(resolve));
      stop = true;
      await writer;
      await disk.check();
      for (const { tag, before, after } of bounds) {
        const vdi = await catalog.openVdi(`${name}@${tag}`);
        const data = Buffer.alloc(vdi.size);
        await vdi.read(0, data);
        let newest = 0;
        for (let at = 0; at < data.length; at += BLOCK) newest = Math.max(newest, data.readUInt32LE(at));
        expect(newest).toBeGreaterThanOrEqual(before - 1);
        expect(newest).toBeLessThanOrEqual(after + 1);
        await catalog.release(vdi);
      }
      await catalog.release(disk.vdi);
    });

    test('a temporary snapshot leaves the vid alone and nothing to be copied', async () => {
      const { name, disk } = await newDisk(8);
      await disk.write(0, 8 * OBJECT, 1);
      const { vid } = disk.vdi.record;
      for (let round = 2; round < 6; round++) {
        const content = Buffer.from(disk.content);
        await catalog.snapshotTemporary(name, 'now');
        const now = await catalog.openVdi(`${name}@now`);
        await disk.write(OBJECT / 2, 3 * OBJECT, round);
        await disk.trim(5 * OBJECT, OBJECT);
        await disk.write(5 * OBJECT + 9, 9, round);
        await disk.check(content, now);
        await disk.check();
        await catalog.release(now);
        await catalog.dropTemporary(name, 'now');
      }
      expect(disk.vdi.record.vid).toBe(vid);
      const { copies } = disk.vdi;
      for (let idx = 0; idx < 8; idx++) await disk.write(idx * OBJECT + 7, 512, 99);
      expect(disk.vdi.copies).toBe(copies);
      await disk.check();
      expect((await catalog.list()).map((record) => record.name)).toEqual([name]);
      await catalog.release(disk.vdi);
    });

    test('two temporary snapshots with labels of their own do not disturb each other', async () => {
      const { name, disk } = await newDisk(4);
      await disk.write(0, 4 * OBJECT, 1);
      const a = Buffer.from(disk.content);
      await catalog.snapshotTemporary(name, 'now:a');
      await disk.write(100, OBJECT, 2);
      const b = Buffer.from(disk.content);
      await catalog.snapshotTemporary(name, 'now:b');
      await disk.write(200, 2 * OBJECT, 3);
      await checkSpec(`${name}@now:a`, a);
      await checkSpec(`${name}@now:b`, b);
      await catalog.dropTemporary(name, 'now:a');
      await disk.write(0, 4 * OBJECT, 4);
      await checkSpec(`${name}@now:b`, b);
      await catalog.dropTemporary(name, 'now:b');
      await disk.check();
      await catalog.release(disk.vdi);
    });

    test('what a killed gateway left of a temporary snapshot is gone before the disk is written', async () => {
      const { name, disk } = await newDisk(4);
      await disk.write(0, 3 * OBJECT, 1);
      await catalog.snapshotTemporary(name, 'now');
      await disk.write(100, OBJECT, 2);
      store.cluster.pool.close(); // as if it had been killed: nothing is cleaned up
      await cluster.unlock(name);
      await open();
      const again = new Disk(await catalog.openVdi(name), disk.content);
      await again.write(2 * OBJECT, 10, 3);
      await again.check();
      expect((await catalog.list()).map(({ tag }) => tag)).toEqual(['']);
      await catalog.snapshotTemporary(name, 'now');
      const content = Buffer.from(again.content);
      await again.write(0, 3 * OBJECT, 4);
      await checkSpec(`${name}@now`, content);
      await catalog.dropTemporary(name, 'now');
      await catalog.release(again.vdi);
    });

    test('a node that is killed and comes back is no error to anybody', async (context) => {
      // Nodes keep copies that are no longer theirs when the members change.
      mayLeak = isReal;
      const { disk } = await newDisk(6);
      let stop = false as boolean;
      const failures: unknown[] = [];
      const writer = async (lane: number): Promise<void> => {
        for (let n = 0; !stop; n++) {
          const at = lane * 2 * OBJECT + ((n * 7919) % 500) * 4096;
          await disk.write(at, 4096, (n % 255) + 1).catch((error: unknown) => failures.push(error));
        }
      };
      const lanes = [0, 1, 2].map(writer);
      await new Promise((resolve) => setTimeout(resolve, 300));
      await cluster.killNode(0);
      await new Promise((resolve) => setTimeout(resolve, 1500));
      await cluster.restartNode(0);
      await new Promise((resolve) => setTimeout(resolve, 1500));
      stop = true;
      await Promise.all(lanes);
      const crashes = cluster.crashes();
      if (crashes.some((words) => KNOWN_CRASH.test(words))) {
        // One more than the copies allow for. The tests that follow get a cluster of their own.
        disks.length = 0;
        leftBefore = [];
        await catalog.close().catch(() => undefined);
        await cluster.stop();
        cluster = await start();
        await open();
        console.log(
          `${label}: not known whether a node's end is an error to anybody, another ended itself: ${crashes.join('; ')}`,
        );
        context.skip();
      }
      expect(crashes).toEqual([]);
      expect(failures).toEqual([]);
      await disk.check();
      await catalog.release(disk.vdi);
      await cluster.recovered(); // the next test is not about that
    }, 240_000);

    test('a disk that grows keeps its content and has zeros behind it', async () => {
      const { name, disk } = await newDisk(2);
      await disk.write(0, 2 * OBJECT, 1);
      await catalog.resize(name, 5 * OBJECT);
      const grown = new Disk(disk.vdi, Buffer.concat([disk.content, Buffer.alloc(3 * OBJECT)]));
      await grown.check();
      await grown.write(4 * OBJECT, 100, 2);
      await catalog.release(disk.vdi);
      await checkSpec(name, grown.content);
    });

    test(`${sequences} random sequences leave every VDI and snapshot equal to a plain copy`, async () => {
      const step = fc.record({
        kind: fc.constantFrom('write', 'write', 'write', 'trim', 'zero', 'snapshot', 'external', 'temporary', 'delete'),
        at: fc.nat(3 * OBJECT - 1),
        length: fc.oneof(
          fc.integer({ min: 1, max: 9000 }),
          fc.integer({ min: 1, max: 2 * OBJECT }),
          fc.constant(OBJECT),
        ),
        fill: fc.integer({ min: 1, max: 255 }),
      });
      await fc.assert(
        fc.asyncProperty(fc.array(step, { minLength: 5, maxLength: 25 }), async (steps) => {
          await removeAll(); // so that a failure can be narrowed down
          const { name, disk } = await newDisk(3);
          const snapshots = new Map<string, Buffer>();
          let temporary: { vdi: Vdi; content: Buffer } | undefined;
          for (const [n, { kind, at, length: wanted, fill }] of steps.entries()) {
            const length = Math.min(wanted, 3 * OBJECT - at);
            if (kind === 'write') await disk.write(at, length, fill);
            else if (kind === 'trim') await disk.trim(at - (at % OBJECT), OBJECT);
            else if (kind === 'zero') {
              disk.content.fill(0, at, at + length);
              await disk.vdi.zero(at, length, { noHole: fill % 2 === 0, fua: false });
            } else if (kind === 'snapshot' || kind === 'external') {
              if (kind === 'snapshot') await catalog.snapshot(name, `t${n}`);
              else await cluster.snapshot(name, `t${n}`);
              snapshots.set(`${name}@t${n}`, Buffer.from(disk.content));
            } else if (kind === 'temporary') {
              if (temporary) {
                await disk.check(temporary.content, temporary.vdi);
                await catalog.release(temporary.vdi);
                await catalog.dropTemporary(name, 'now');
                temporary = undefined;
              } else {
                await catalog.snapshotTemporary(name, 'now');
                temporary = { vdi: await catalog.openVdi(`${name}@now`), content: Buffer.from(disk.content) };
                disks.push(new Disk(temporary.vdi));
              }
            } else {
              const [spec] = [...snapshots.keys()];
              if (spec === undefined) continue;
              await catalog.remove(spec);
              snapshots.delete(spec);
            }
          }
          await disk.check();
          if (temporary) {
            await disk.check(temporary.content, temporary.vdi);
            await catalog.release(temporary.vdi);
            await catalog.dropTemporary(name, 'now');
          }
          for (const [spec, content] of snapshots) await checkSpec(spec, content);
          await catalog.release(disk.vdi);
          await checkSpec(name, disk.content);
          await removeAll();
          expect((await cluster.objects()).filter((object) => !leftBefore.includes(object))).toEqual([]);
          expect(cluster.violations()).toEqual([]);
        }),
        { numRuns: sequences },
      );
    }, 400_000);
  });
}
