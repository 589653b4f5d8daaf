/**
 * `sheepgate migrate` between a store and a cluster, both ways: every snapshot arrives with its content, tag and time; the
 * next run continues a killed one; VDIs of others stay as they are; and nothing is left behind. Against the stand-in, and
 * against real nodes where they are installed.
 */
import fs from 'node:fs';
import path from 'node:path';
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import { LocalStore } from '../../src/store/local/local-store.js';
import type { VdiRecord } from '../../src/store/vdi-record.js';
import { SheepStore } from '../../src/store/sheep/sheep-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { attach, MIB, patterned } from '../cli/both-ways.js';
import {
  checkContents,
  localPlace,
  makeHistory,
  migrate,
  recordsOf,
  refused,
  withCatalog,
  write,
  type Contents,
  type Place,
  type Result,
} from '../cli/migration-stores.js';
import { BIN, cli, ended, startDaemon, waitUntil, spawn } from '../harness/daemon.js';
import { testLength } from '../harness/length.js';
import { realNodesMissing, startRealNodes, startStandIn, type TestCluster } from './clusters.js';
import { Op, Res, StandIn } from './stand-in.js';

const SHIFT = 20;
const missing = realNodesMissing();
if (missing !== undefined) console.log(`not run against real Sheepdog nodes: ${missing}`);

/** With real nodes only the first and the last stage are interrupted, except in long runs; with the stand-in all stages. */
const someStages = (stages: readonly number[]): readonly number[] =>
  testLength === 'long' ? stages : stages.filter((_, n) => n === 0 || n === stages.length - 1);

const clusters = [
  { label: 'stand-in', start: startStandIn, tried: (stages: readonly number[]) => stages, skip: false },
  { label: 'real nodes', start: startRealNodes, tried: someStages, skip: missing !== undefined },
];

/** Writes blocks from the first to the last, each with the number of its round. */
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

/** True for the content of one moment: the number of the round falls at most once, by one. */
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

/** For a test that waits for what appears there: opening the cluster for each look would cost more than the look. */
async function watched(place: Place): Promise<VdiCatalog> {
  return new VdiCatalog(await place.open());
}

/** Number of objects of a local store, which another process may have open. */
function objectFiles(place: Place): number {
  const objects = path.join(place.argument, 'objects');
  if (!fs.existsSync(objects)) return 0;
  return fs.readdirSync(objects, { recursive: true, withFileTypes: true }).filter((entry) => entry.isFile()).length;
}

for (const { label, start, tried, skip } of clusters) {
  describe.skipIf(skip)(`sheepgate migrate (${label})`, () => {
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
    afterAll(() => (cluster as typeof cluster | undefined)?.stop());

    test('a disk with all its snapshots arrives whole in the cluster, and from there in another store', async () => {
      const local = localPlace();
      const back = localPlace();
      const contents = await makeHistory(local, 'vm');
      const before = await checkContents(local, 'vm', contents);
      // Hashes are equal for equal object sizes only.
      const there = await migrate(local, remote, '--block-size-shift', String(SHIFT));
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
      const hashes = ({ snapshots, working }: Result): unknown => [...snapshots, working].map((step) => step?.treeHash);
      expect(hashes(again)).toEqual(hashes(there));
      expect(there.working?.treeHash).toMatch(/^[0-9a-f]{64}$/);
      // "another way" continues from "first" in both stores, and shares all but one object with it.
      expect(there.snapshots[3]?.copiedBytes).toBeLessThan(MIB);
      const parentTag = (records: VdiRecord[]): unknown =>
        records.find(({ vid }) => vid === records.find(({ tag }) => tag === 'another way')?.parentVid)?.tag;
      expect(parentTag(arrived)).toBe('first');
      expect(parentTag(returned)).toBe('first');
      const records = await withCatalog(remote, (catalog) => recordsOf(catalog, 'vm'));
      expect(hashes(await migrate(remote, back, '--as', 'other', '--verify', 'only'))).toEqual(hashes(there));
      expect(await withCatalog(remote, (catalog) => recordsOf(catalog, 'vm'))).toEqual(records);
    });

    for (const way of ['into the cluster', 'out of the cluster']) {
      test(`a migration ${way} that is killed at any stage is continued by the same command, which repeats no finished step`, async () => {
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
        // Its progress: VDI and tags in a cluster, objects in a store, which is locked while it runs.
        const watch = to === remote ? await watched(remote) : undefined;
        const reached = watch
          ? async () => (await recordsOf(watch, 'vm')).length
          : () => Promise.resolve(objectFiles(to));
        const stages = watch ? [1, 2, 3, 4] : [3, 15, 27, 40];
        let kills = 0;
        for (const stage of tried(stages)) {
          const child = spawn(process.execPath, [BIN, ...args], { stdio: 'ignore' });
          const over = ended(child);
          await waitUntil(async () => child.exitCode !== null || (await reached()) >= stage, `stage ${stage}`, 60_000);
          child.kill('SIGKILL');
          if ((await over).signal !== null) kills++;
        }
        await watch?.close();
        expect(kills).toBeGreaterThan(0);
        const records = await withCatalog(to, (catalog) => recordsOf(catalog, 'vm'));
        const done = records.map(({ tag }) => tag).filter((tag) => tag.startsWith('s'));
        // It may have finished before the kill.
        if (records.some(({ unfinished }) => unfinished)) {
          const { snapshots } = await migrate(from, to);
          for (const [n, { tag, copiedBytes, comparedBytes }] of snapshots.entries()) {
            if (n < done.length) expect(copiedBytes, `${tag}`).toBe(0);
            expect(comparedBytes, `${tag}`).toBeGreaterThan(0);
          }
        }
        await checkContents(to, 'vm', contents);
        await checkContents(from, 'vm', contents);
      });
    }

    test('a migration interrupted by Ctrl-C says so, leaves its mark in the target only, and can be continued', async () => {
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
      // It reads now: the source has the snapshot of the migration.
      const watch = await watched(remote);
      const isReading = async (): Promise<boolean> =>
        child.exitCode !== null || (await recordsOf(watch, 'vm')).some(({ tag }) => tag.startsWith('migrate-'));
      await waitUntil(isReading, 'the present content is read');
      child.kill('SIGINT');
      await watch.close();
      const { code } = await over;
      if (code !== 0) {
        expect(code).toBe(130);
        expect(said).toMatch(/vm in .* is not complete; the same command continues it\n.*interrupted by SIGINT/);
        expect(await withCatalog(local, (catalog) => recordsOf(catalog, 'vm'))).toMatchObject([
          { tag: '', unfinished: { by: 'migrate', isNew: true } },
        ]);
        await migrate(remote, local);
      }
      await checkContents(remote, 'vm', new Map([['', content]]));
      await checkContents(local, 'vm', new Map([['', content]]));
    });

    test('while another client writes to the cluster, the copy is of one moment, and the next run copies the rest', async () => {
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

    test('with a daemon on either side migration works alike while the source is written, and the source keeps its vid', async () => {
      const daemon = await startDaemon({ args: ['--create', 'vm:8M'] });
      const served = { argument: daemon.store, open: () => LocalStore.open(daemon.store) };
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
      // And back through the daemon, into the same store under another name.
      await migrate(remote, served, '--as', 'copy');
      expect((await daemon.stop()).code).toBe(0);
      await checkContents(served, 'copy', new Map([['', content]]));
      await checkContents(served, 'vm', new Map([['', content]]));
    });
  });
}

test('data damaged on the way are detected before the snapshot gets its tag, and the next run repairs them', async () => {
  const cluster = await new StandIn().start();
  const local = localPlace();
  const remote: Place = { argument: `cluster:${cluster.address}`, open: () => SheepStore.open(cluster.address) };
  const content = Buffer.alloc(8 * MIB);
  await withCatalog(local, async (catalog) => {
    await catalog.create('vm', content.length);
    await write(catalog, 'vm', content, 0, patterned(8 * MIB, 1));
    await catalog.snapshot('vm', 'a');
  });
  let isDamaged = false;
  cluster.fault = ({ opcode, oid }) => {
    // The first object that is read back: it was written before.
    const object = cluster.objects.get(oid);
    if (isDamaged || opcode !== Op.READ || oid >> 63n !== 0n || (oid & 0xffffffffn) !== 1n || !object) return undefined;
    object[12_345] = (object[12_345] as number) ^ 1;
    isDamaged = true;
    return undefined;
  };
  const from = 4 * MIB + 12_288;
  expect(await refused(local, remote)).toMatch(
    new RegExp(`: bytes ${from} to ${from + 4095}; start again to copy it again`),
  );
  expect(await withCatalog(remote, (catalog) => recordsOf(catalog, 'vm'))).toMatchObject([
    { tag: '', unfinished: { by: 'migrate', isNew: true } },
  ]);
  expect((await migrate(local, remote)).snapshots[0]?.copiedBytes).toBe(4096);
  await checkContents(
    remote,
    'vm',
    new Map([
      ['a', content],
      ['', content],
    ]),
  );
  expect(cluster.violations).toEqual([]);
  await cluster.stop();
});

test('if the cluster fails, the error says that nothing is lost, and the next run continues', async () => {
  const cluster = await new StandIn().start();
  const local = localPlace();
  const remote: Place = { argument: `cluster:${cluster.address}`, open: () => SheepStore.open(cluster.address) };
  const content = Buffer.alloc(12 * MIB);
  await withCatalog(local, async (catalog) => {
    await catalog.create('vm', content.length);
    await write(catalog, 'vm', content, 0, patterned(12 * MIB, 1));
  });
  // After the first object every request fails, however often it is repeated.
  let objects = 0;
  cluster.fault = ({ opcode }) => (opcode === Op.CREATE && objects++ > 0 ? { result: Res.EIO } : undefined);
  const failed = await cli(['migrate', 'vm', '--from', local.argument, '--to', remote.argument]);
  expect(failed.code).toBe(1);
  // The notes before it say which nodes it tried.
  const last = /\nsheepgate: .*EIO.*; vm in \S* is not complete; the same command continues it\n$/;
  expect(failed.stderr).toMatch(last);
  cluster.fault = () => undefined;
  expect((await migrate(local, remote)).working).toMatchObject({ copiedBytes: 8 * MIB, comparedBytes: 12 * MIB });
  await checkContents(remote, 'vm', new Map([['', content]]));
  await cluster.stop();
});
