/**
 * `sheepgate migrate` between a store and a cluster, both ways: every snapshot arrives with its content, tag and time; a
 * run that is killed goes on; nothing that is not its own is touched; and nothing is left behind. Against the stand-in
 * and, where there are any, real nodes.
 */
import { spawn } from 'node:child_process';
import path from 'node:path';
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import { LocalStore } from '../../src/store/local/local-store.js';
import type { ObjectStore, VdiRecord } from '../../src/store/object-store.js';
import { SheepStore } from '../../src/store/sheep/sheep-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { expectBytes, MIB, oneLineOf, patterned } from '../cli/both-ways.js';
import { BIN, cli, ended, startDaemon, temporaryDirectory, waitUntil } from '../harness/daemon.js';
import { realNodesMissing, startRealNodes, startStandIn, type TestCluster } from './clusters.js';

const SHIFT = 20;
const missing = realNodesMissing();
if (missing !== undefined) console.log(`not run against real Sheepdog nodes: ${missing}`);

const clusters = [
  { label: 'stand-in', start: startStandIn, skip: false },
  { label: 'real nodes', start: startRealNodes, skip: missing !== undefined },
];

interface Step {
  readonly tag: string | null;
  readonly size: number;
  readonly copiedBytes: number;
  readonly comparedBytes: number;
  readonly sha256: string | null;
}

interface Result {
  readonly snapshots: readonly Step[];
  readonly working: Step | null;
  readonly isFinished: boolean;
}

/** What a place must hold: tag, or '' for the working VDI, and content. */
type Contents = Map<string, Buffer>;

interface Place {
  /** For --from and --to. */
  readonly argument: string;
  open(): Promise<ObjectStore>;
}

function localPlace(): Place {
  const directory = path.join(temporaryDirectory(), 'store');
  return { argument: directory, open: () => LocalStore.open(directory) };
}

async function withCatalog<T>(place: Place, work: (catalog: VdiCatalog) => Promise<T>): Promise<T> {
  const catalog = new VdiCatalog(await place.open());
  try {
    return await work(catalog);
  } finally {
    await catalog.close();
  }
}

async function write(catalog: VdiCatalog, name: string, content: Buffer, at: number, data: Buffer): Promise<void> {
  data.copy(content, at);
  const vdi = await catalog.openVdi(name);
  await vdi.write(at, data, false);
  await catalog.release(vdi);
}

async function trim(catalog: VdiCatalog, name: string, content: Buffer, at: number, length: number): Promise<void> {
  content.fill(0, at, at + length);
  const vdi = await catalog.openVdi(name);
  await vdi.trim(at, length, false);
  await catalog.release(vdi);
}

/** A disk that has seen everything a history can hold: changes, trims, growing, a rollback, shrinking. */
async function makeHistory(place: Place, name: string): Promise<Contents> {
  return withCatalog(place, async (catalog) => {
    const contents: Contents = new Map();
    await catalog.create(name, 9 * MIB + 512, { blockSizeShift: SHIFT });
    let content = Buffer.alloc(9 * MIB + 512);
    await write(catalog, name, content, 0, patterned(5 * MIB, 1));
    await write(catalog, name, content, 9 * MIB, patterned(512, 2));
    const take = async (tag: string): Promise<void> => {
      await catalog.snapshot(name, tag);
      contents.set(tag, Buffer.from(content));
    };
    await take('first');
    await write(catalog, name, content, 2 * MIB + 4096, patterned(8192, 3));
    await trim(catalog, name, content, 3 * MIB, MIB);
    await take('second, with trims');
    await catalog.resize(name, 14 * MIB);
    content = Buffer.concat([content, Buffer.alloc(14 * MIB - content.length)]);
    await write(catalog, name, content, 12 * MIB + 100, patterned(MIB, 4));
    await take('grown');
    await catalog.rollback(`${name}@first`);
    content = Buffer.from(contents.get('first') as Buffer);
    await write(catalog, name, content, MIB, patterned(512, 5));
    await take('another way');
    await catalog.resize(name, 4 * MIB + 512, { force: true });
    content = content.subarray(0, 4 * MIB + 512);
    await take('cut');
    await write(catalog, name, content, 4 * MIB, patterned(512, 6));
    contents.set('', content);
    return contents;
  });
}

async function recordsOf(catalog: VdiCatalog, name: string): Promise<VdiRecord[]> {
  return (await catalog.list()).filter((record) => record.name === name);
}

async function checkContents(place: Place, name: string, contents: Contents): Promise<VdiRecord[]> {
  return withCatalog(place, async (catalog) => {
    const records = await recordsOf(catalog, name);
    expect(records.map(({ tag }) => tag)).toEqual([...contents.keys()]);
    for (const [tag, content] of contents) {
      const vdi = await catalog.openVdi(tag === '' ? name : `${name}@${tag}`);
      const found = Buffer.alloc(vdi.size);
      await vdi.read(0, found);
      await catalog.release(vdi);
      expectBytes(found, content);
    }
    return records;
  });
}

/** Blocks from the first to the last, each stamped with the number of the round it was written in. */
async function writeRounds(
  catalog: VdiCatalog,
  name: string,
  size: number,
  state: { round: number; stop: boolean },
): Promise<void> {
  const vdi = await catalog.openVdi(name);
  while (!state.stop) {
    state.round++;
    for (let at = 0; at < size; at += MIB) {
      const stamp = Buffer.alloc(512);
      stamp.writeUInt32LE(state.round);
      await vdi.write(at, stamp, false);
    }
  }
  await catalog.release(vdi);
}

/** As of one moment: stamps fall at one place at most, and by one. */
function expectPointInTime(content: Buffer): void {
  const stamps: number[] = [];
  for (let at = 0; at < content.length; at += MIB) stamps.push(content.readUInt32LE(at));
  const falls = stamps.slice(1).map((stamp, n) => (stamps[n] as number) - stamp);
  expect(
    falls.every((fall) => fall === 0 || fall === 1),
    stamps.join(),
  ).toBe(true);
  expect((stamps[0] as number) - (stamps.at(-1) as number)).toBeLessThanOrEqual(1);
}

for (const { label, start, skip } of clusters) {
  describe.skipIf(skip)(`migrating (${label})`, () => {
    let cluster: TestCluster;
    let remote: Place;
    let leftBefore: string[] = [];

    beforeAll(async () => {
      cluster = await start();
      remote = {
        argument: `cluster:${cluster.address}`,
        open: () => SheepStore.open(cluster.address, { retryMs: 30_000 }),
      };
    });
    afterEach(async () => {
      await withCatalog(remote, async (catalog) => {
        for (const { name, tag } of await catalog.list()) await catalog.remove(tag === '' ? name : `${name}@${tag}`);
      });
      const left = await cluster.objects();
      expect(
        left.filter((object) => !leftBefore.includes(object)),
        'objects and ledgers left',
      ).toEqual([]);
      leftBefore = left;
      expect(cluster.violations()).toEqual([]);
    });
    afterAll(() => cluster?.stop());

    const migrate = async (from: Place, to: Place, ...args: string[]): Promise<Result> => {
      const result = await cli(['migrate', 'vm', '--from', from.argument, '--to', to.argument, '--json', ...args]);
      expect(result.code, result.stderr).toBe(0);
      return JSON.parse(result.stdout) as Result;
    };
    const refused = async (from: Place, to: Place, ...args: string[]): Promise<string> => {
      const all = ['migrate', 'vm', '--from', from.argument, '--to', to.argument, ...args];
      return oneLineOf(await cli(all), 1, all.join(' '));
    };

    test('a history arrives whole in the cluster, and whole again in another store', async () => {
      const local = localPlace();
      const back = localPlace();
      const contents = await makeHistory(local, 'vm');
      const before = await checkContents(local, 'vm', contents);
      const there = await migrate(local, remote);
      expect(there.isFinished).toBe(true);
      expect(there.snapshots.map(({ tag }) => tag)).toEqual([...contents.keys()].filter(Boolean));
      const arrived = await checkContents(remote, 'vm', contents);
      const seen = await cluster.tagsSeen('vm');
      if (seen) expect(seen).toEqual([...contents.keys()].filter(Boolean));
      const again = await migrate(remote, back, '--as', 'other');
      const returned = await checkContents(back, 'other', contents);
      const times = (records: VdiRecord[]): number[] => records.map(({ snapshotAt }) => snapshotAt);
      expect(times(arrived)).toEqual(times(before));
      expect(times(returned)).toEqual(times(before));
      const hashes = ({ snapshots, working }: Result): unknown => [...snapshots, working].map((step) => step?.sha256);
      expect(hashes(again)).toEqual(hashes(there));
      expect(there.working?.sha256).toMatch(/^[0-9a-f]{64}$/);
      // "another way" goes on from "first", there as here, and shares with it all but one object.
      expect(there.snapshots[3]?.copiedBytes).toBeLessThan(MIB);
      const parentTag = (records: VdiRecord[]): unknown =>
        records.find(({ vid }) => vid === records.find(({ tag }) => tag === 'another way')?.parentVid)?.tag;
      expect(parentTag(arrived)).toBe('first');
      expect(parentTag(returned)).toBe('first');
      const records = await withCatalog(remote, (catalog) => recordsOf(catalog, 'vm'));
      expect(hashes(await migrate(remote, back, '--as', 'other', '--verify', 'only'))).toEqual(hashes(there));
      expect(await withCatalog(remote, (catalog) => recordsOf(catalog, 'vm'))).toEqual(records);
    });

    test('holes stay holes, and what did not change is neither copied nor compared again', async () => {
      const local = localPlace();
      await withCatalog(local, async (catalog) => {
        await catalog.create('vm', 2 ** 40);
        const vdi = await catalog.openVdi('vm');
        await vdi.write(2 ** 39, patterned(MIB, 1), false);
        await vdi.write(2 ** 40 - MIB, Buffer.alloc(MIB), false);
        await vdi.flush();
        await catalog.snapshot('vm', 'a');
        await vdi.write(0, patterned(4096, 2), false);
        await catalog.release(vdi);
      });
      const result = await migrate(local, remote);
      expect(result.snapshots[0]).toMatchObject({ copiedBytes: MIB, comparedBytes: 8 * MIB });
      expect(result.working).toMatchObject({ copiedBytes: 4096, comparedBytes: 4 * MIB });
      await withCatalog(remote, async (catalog) => {
        expect(await catalog.show('vm')).toMatchObject({ allocatedBytes: 8 * MIB, size: 2 ** 40 });
      });
    });

    for (const way of ['into the cluster', 'out of the cluster']) {
      test(`killed at every stage ${way}, the same command goes on and repeats nothing that was done`, async () => {
        const local = localPlace();
        const [from, to] = way === 'into the cluster' ? [local, remote] : [remote, local];
        const contents: Contents = new Map();
        await withCatalog(from, async (catalog) => {
          await catalog.create('vm', 24 * MIB, { blockSizeShift: SHIFT });
          const content = Buffer.alloc(24 * MIB);
          for (let n = 0; n < 4; n++) {
            await write(catalog, 'vm', content, n * MIB, patterned(12 * MIB, n + 1));
            await catalog.snapshot('vm', `s${n}`);
            contents.set(`s${n}`, Buffer.from(content));
          }
          await write(catalog, 'vm', content, 100, patterned(12 * MIB, 9));
          contents.set('', content);
        });
        const args = ['migrate', 'vm', '--from', from.argument, '--to', to.argument, '--json'];
        const sizes = [300, 500, 700, 900, 1100, 1300];
        let isKilled = 0;
        for (const afterMs of sizes) {
          const child = spawn(process.execPath, [BIN, ...args], { stdio: 'ignore' });
          const over = ended(child);
          // The moment does not matter: every one of them must do.
          const timer = setTimeout(() => child.kill('SIGKILL'), afterMs);
          const { signal } = await over;
          clearTimeout(timer);
          if (signal === null) break;
          isKilled++;
        }
        expect(isKilled).toBeGreaterThan(0);
        const records = await withCatalog(to, (catalog) => recordsOf(catalog, 'vm'));
        const mark = records.find(({ tag }) => tag.startsWith('migrating-'));
        if (records.length > 1) {
          const tags = records.map(({ tag }) => tag).filter((tag) => tag.startsWith('s'));
          if (mark) {
            const result = await migrate(from, to);
            for (const [n, step] of result.snapshots.entries()) {
              if (n < tags.length) expect(step.copiedBytes, `${step.tag}`).toBe(0);
              expect(step.comparedBytes).toBeGreaterThan(0);
            }
          }
        } else await migrate(from, to);
        await checkContents(to, 'vm', contents);
        await checkContents(from, 'vm', contents);
      });
    }

    test('interrupted by Ctrl-C it says so, leaves its mark only in the target, and goes on', async () => {
      const local = localPlace();
      const content = Buffer.alloc(64 * MIB);
      await withCatalog(remote, async (catalog) => {
        await catalog.create('vm', content.length, { blockSizeShift: SHIFT });
        await write(catalog, 'vm', content, 0, patterned(64 * MIB, 1));
      });
      const args = ['migrate', 'vm', '--from', remote.argument, '--to', local.argument];
      const child = spawn(process.execPath, [BIN, ...args], { stdio: ['ignore', 'ignore', 'pipe'] });
      let said = '';
      child.stderr.setEncoding('utf8').on('data', (text: string) => (said += text));
      const over = ended(child);
      // It reads: the source has its snapshot.
      const isReading = async (): Promise<boolean> =>
        child.exitCode !== null ||
        (await withCatalog(remote, (catalog) => recordsOf(catalog, 'vm'))).some(({ tag }) =>
          tag.startsWith('migrate-'),
        );
      await waitUntil(isReading, 'the present content is read');
      child.kill('SIGINT');
      const { code } = await over;
      if (code !== 0) {
        expect(code).toBe(130);
        expect(said).toMatch(/vm in .* is not complete; the same command goes on from there\n.*interrupted by SIGINT/);
        expect((await withCatalog(local, (c) => recordsOf(c, 'vm'))).map(({ tag }) => tag)).toEqual([
          expect.stringMatching(/^migrating-/),
          '',
        ]);
        await migrate(remote, local);
      }
      await checkContents(remote, 'vm', new Map([['', content]]));
      await checkContents(local, 'vm', new Map([['', content]]));
    });

    test('while somebody else writes the cluster, the copy is of one moment, and the next run brings the rest', async () => {
      const local = localPlace();
      await withCatalog(remote, async (catalog) => {
        await catalog.create('vm', 8 * MIB, { blockSizeShift: SHIFT });
        const state = { round: 0, stop: false };
        const writing = writeRounds(catalog, 'vm', 8 * MIB, state);
        await waitUntil(() => state.round > 3, 'the writer writes');
        const first = await migrate(remote, local, '--sync');
        expect(first.isFinished).toBe(false);
        await withCatalog(local, async (copy) => {
          const vdi = await copy.openVdi('vm');
          const content = Buffer.alloc(vdi.size);
          await vdi.read(0, content);
          await copy.release(vdi);
          expectPointInTime(content);
          expect((await recordsOf(copy, 'vm')).map(({ tag }) => tag)).toEqual([
            expect.stringMatching(/^migrated-/),
            '',
          ]);
        });
        const seen = state.round;
        await waitUntil(() => state.round > seen + 1, 'the writer still writes');
        await migrate(remote, local, '--sync', '--verify', 'changed');
        state.stop = true;
        await writing;
        expect((await migrate(remote, local, '--verify', 'changed')).isFinished).toBe(true);
        const content = Buffer.alloc(8 * MIB);
        const vdi = await catalog.openVdi('vm');
        await vdi.read(0, content);
        await catalog.release(vdi);
        expect(content.readUInt32LE(7 * MIB)).toBe(state.round);
        await checkContents(local, 'vm', new Map([['', content]]));
        expect((await recordsOf(catalog, 'vm')).map(({ tag }) => tag)).toEqual(['']);
      });
    });

    test('with a daemon on either side it is the same, the source being written, its vid staying', async () => {
      const daemon = await startDaemon({ args: ['--create', 'vm:8M'] });
      const served = { argument: daemon.store, open: () => LocalStore.open(daemon.store) };
      const { attach } = await import('../cli/both-ways.js');
      const client = await attach(daemon, 'vm');
      await client.write(0, patterned(8 * MIB, 1));
      const state = { round: 0, stop: false };
      const writing = (async () => {
        while (!state.stop) {
          state.round++;
          for (let at = 0; at < 8 * MIB; at += MIB) {
            const stamp = Buffer.alloc(512);
            stamp.writeUInt32LE(state.round);
            await client.write(at, stamp);
          }
        }
      })();
      await waitUntil(() => state.round > 3, 'the writer writes');
      await migrate(served, remote, '--sync');
      state.stop = true;
      await writing;
      await client.flush();
      await withCatalog(remote, async (catalog) => {
        const vdi = await catalog.openVdi('vm');
        const content = Buffer.alloc(8 * MIB);
        await vdi.read(0, content);
        await catalog.release(vdi);
        expectPointInTime(content);
      });
      await migrate(served, remote, '--verify', 'changed');
      const content = Buffer.alloc(8 * MIB);
      await client.readInto(0, content);
      await client.disconnect();
      await checkContents(remote, 'vm', new Map([['', content]]));
      // And back through it, into the same store under another name.
      await migrate(remote, served, '--as', 'copy');
      expect((await daemon.stop()).code).toBe(0);
      await checkContents(served, 'copy', new Map([['', content]]));
      await checkContents(served, 'vm', new Map([['', content]]));
    });

    test('a VDI of that name that it did not make is left alone', async () => {
      const local = localPlace();
      const contents = await makeHistory(local, 'vm');
      const own = Buffer.alloc(2 * MIB);
      await withCatalog(remote, async (catalog) => {
        await catalog.create('vm', 2 * MIB, { blockSizeShift: SHIFT });
        await write(catalog, 'vm', own, 0, patterned(MIB, 7));
      });
      expect(await refused(local, remote)).toMatch(/vm in sheepdog:.* exists, .*nothing was touched; .*--as/);
      await checkContents(remote, 'vm', new Map([['', own]]));
      // Nor what another migration has begun.
      const other = localPlace();
      await withCatalog(other, async (catalog) => {
        await catalog.create('vm', MIB);
        await catalog.snapshot('vm', 'mine');
      });
      await migrate(other, remote, '--as', 'half', '--sync');
      expect(await refused(local, remote, '--as', 'half')).toMatch(/unfinished target of another migration/);
      // Nor what it has finished.
      await migrate(local, remote, '--as', 'done');
      expect(await refused(local, remote, '--as', 'done')).toMatch(/exists/);
      await checkContents(remote, 'done', contents);
    });

    test('what somebody wrote to the target between two runs is not undone', async () => {
      const local = localPlace();
      const content = Buffer.alloc(2 * MIB);
      await withCatalog(local, async (catalog) => {
        await catalog.create('vm', 2 * MIB);
        await write(catalog, 'vm', content, 0, patterned(MIB, 1));
      });
      await migrate(local, remote, '--sync');
      await withCatalog(remote, (catalog) => write(catalog, 'vm', content, MIB, patterned(512, 2)));
      expect(await refused(local, remote)).toMatch(
        /was written by somebody else since the last run.*delete vm@migrated-/,
      );
      await withCatalog(remote, async (catalog) => {
        const vdi = await catalog.openVdi('vm');
        const found = Buffer.alloc(vdi.size);
        await vdi.read(0, found);
        await catalog.release(vdi);
        expectBytes(found, content);
      });
    });

    test('a disk that was deleted arrives as its snapshots', async () => {
      const local = localPlace();
      const contents = await makeHistory(local, 'vm');
      await withCatalog(local, (catalog) => catalog.remove('vm'));
      contents.delete('');
      const result = await migrate(local, remote);
      expect(result).toMatchObject({ working: null, isFinished: true });
      await checkContents(remote, 'vm', contents);
    });
  });
}
