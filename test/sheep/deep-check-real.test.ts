/**
 * check --deep on real nodes: tests change, swap and remove files on the nodes' disks, with copies and with erasure codes.
 * Clients write all the time, and their writes must not be reported as differences.
 */
import fs from 'node:fs';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { deepCheck, type DeepReport } from '../../src/store/sheep/deep/deep-check.js';
import { SheepStore } from '../../src/store/sheep/sheep-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { MIB, patterned } from '../cli/both-ways.js';
import { cli, haveCommand, run, skipBecause, startDaemon, temporaryDirectory, waitUntil } from '../harness/daemon.js';
import { realNodesMissing, startRealNodes, type RealNodes } from './clusters.js';

const missing = realNodesMissing();
if (missing !== undefined) console.log(`check --deep is not tried on real Sheepdog nodes: ${missing}`);
const OBJECTS = 3;
const LOAD_SECONDS = Number(process.env.SHEEPGATE_SOAK_SECONDS ?? 15);

interface Layout {
  readonly format: string;
  readonly nodes: number;
  readonly shift: number;
  readonly copies: number;
  /** Number of data strips; 0: copies. */
  readonly data: number;
}

const LAYOUTS: readonly Layout[] = [
  { format: '2', nodes: 3, shift: 22, copies: 2, data: 0 },
  { format: '3', nodes: 4, shift: 24, copies: 3, data: 0 },
  { format: '2:1', nodes: 4, shift: 22, copies: 3, data: 2 },
  { format: '2:2', nodes: 5, shift: 24, copies: 4, data: 2 },
  { format: '4:2', nodes: 6, shift: 22, copies: 6, data: 4 },
];

function hex(vid: number, idx: number): string {
  return vid.toString(16).padStart(8, '0') + idx.toString(16).padStart(8, '0');
}

/** The files of an object: by node, or in the order of its strips. */
function filesOf(directory: string, vid: number, idx: number): { readonly node: number; readonly file: string }[] {
  const name = hex(vid, idx);
  const found: { node: number; file: string; strip: number }[] = [];
  for (const entry of fs.readdirSync(directory)) {
    const objects = path.join(directory, entry, 'obj');
    if (!fs.existsSync(objects)) continue;
    for (const each of fs.readdirSync(objects)) {
      if (!each.startsWith(name)) continue;
      const strip = Number(each.slice(name.length + 1) || 0);
      found.push({ node: Number(entry.slice('node'.length)), file: path.join(objects, each), strip });
    }
  }
  return found.sort((a, b) => a.strip - b.strip || a.node - b.node);
}

function flip(file: string, offset: number): void {
  const handle = fs.openSync(file, 'r+');
  const byte = Buffer.alloc(1);
  fs.readSync(handle, byte, 0, 1, offset);
  fs.writeSync(handle, Buffer.from([(byte[0] as number) ^ 0x55]), 0, 1, offset);
  fs.closeSync(handle);
}

describe.skipIf(missing !== undefined).each(LAYOUTS)('check --deep, -c $format, objects of 2^$shift', (layout) => {
  const { format, nodes: count, shift, copies, data } = layout;
  const objectBytes = 2 ** shift;
  let cluster: RealNodes;
  let store: SheepStore;
  let vid: number;

  beforeAll(async () => {
    cluster = await startRealNodes({ nodes: count, format: ['-c', format] });
    store = await SheepStore.open(cluster.address);
    const catalog = new VdiCatalog(store);
    await catalog.create('vm', OBJECTS * objectBytes, { blockSizeShift: shift });
    const vdi = await catalog.openVdi('vm');
    for (let n = 0; n < OBJECTS; n++) await vdi.write(n * objectBytes, patterned(4 * MIB, n + 1), false);
    vid = vdi.record.vid;
    await catalog.release(vdi);
  }, 120_000);
  afterAll(async () => {
    await (store as typeof store | undefined)?.close();
    await (cluster as typeof cluster | undefined)?.stop();
  });

  const check = (): Promise<DeepReport> => deepCheck(store.cluster, { settleMs: 500, rate: 2 ** 40 });
  const addressOf = (node: number): string => cluster.address.split(',')[node] as string;
  const files = (idx: number): ReturnType<typeof filesOf> => {
    const found = filesOf(cluster.directory, vid, idx);
    expect(found).toHaveLength(copies);
    return found;
  };

  test('objects as the nodes have written them give no finding', async () => {
    expect(await check()).toMatchObject({ vdis: 1, objects: 1 + OBJECTS, problems: [] });
  }, 60_000);

  test('a byte changed on a disk is found, and its node named where that can be determined', async () => {
    const [, second] = files(1) as { node: number; file: string }[] as [unknown, { node: number; file: string }];
    const offset = 70_001;
    flip(second.file, offset);
    const { findings, problems } = await check();
    expect(problems).toHaveLength(1);
    const sector = data === 0 ? Math.floor(offset / 512) : Math.floor(offset / (512 / data));
    expect(findings[0]).toMatchObject({
      ...{ kind: 'different', part: 'data', oid: hex(vid, 1), rangeCount: 1 },
      users: [{ label: 'vm', from: objectBytes, to: 2 * objectBytes - 1 }],
      ranges: [{ from: sector * 512, to: (sector + 1) * 512 }],
    });
    const [range] = findings[0]?.ranges ?? [];
    if (data === 0) {
      const alone = range?.contents.find(({ nodes }) => nodes.includes(addressOf(second.node)));
      expect(alone?.nodes).toEqual([addressOf(second.node)]);
    } else if (copies - data > 1) expect(range?.wrongStripOn).toBe(addressOf(second.node));
    flip(second.file, offset);
    expect((await check()).problems).toEqual([]);
  }, 60_000);

  test('a removed copy is reported as missing; when all copies are removed, the bytes are lost', async () => {
    const all = files(2).map(({ node, file }) => ({ node, file, content: fs.readFileSync(file) }));
    const [first] = all as [(typeof all)[number]];
    fs.unlinkSync(first.file);
    const one = await check();
    expect(one.problems).toHaveLength(1);
    expect(one.findings).toMatchObject([{ kind: 'missing', missingOn: [addressOf(first.node)] }]);
    for (const { file } of all.slice(1)) fs.unlinkSync(file);
    const none = await check();
    expect(none.problems).toEqual([
      expect.stringMatching(`^lost: vm bytes ${2 * objectBytes} to ${3 * objectBytes - 1}: no node has it`),
    ]);
    for (const { file, content } of all) fs.writeFileSync(file, content);
    expect((await check()).problems).toEqual([]);
  }, 60_000);

  test('swapped strips are found', async (context) => {
    if (data === 0) return skipBecause(context, 'copies of the whole are all the same');
    const [a, b] = files(0) as { file: string }[] as [{ file: string }, { file: string }];
    const swap = (): void => {
      const content = fs.readFileSync(a.file);
      fs.writeFileSync(a.file, fs.readFileSync(b.file));
      fs.writeFileSync(b.file, content);
    };
    swap();
    const { findings, problems } = await check();
    expect(problems).toHaveLength(1);
    // 4 MiB of each object are written.
    expect(findings[0]?.ranges.at(-1)?.to).toBe(4 * MIB);
    swap();
    expect((await check()).problems).toEqual([]);
  }, 60_000);

  test('the check waits while a node leaves and comes back with a changed disk, then reports what the disks have', async () => {
    const [, second] = files(1) as { node: number; file: string }[] as [unknown, { node: number; file: string }];
    await cluster.killNode(second.node);
    flip(second.file, 4096);
    const members = async (): Promise<boolean> =>
      (await cluster.dog('node', 'list', '-r')).split('\n').length === count;
    await waitUntil(members, 'the others have noticed');
    const [, returned] = await Promise.all([check(), cluster.restartNode(second.node).then(check)]);
    // When a node comes back, nodes compare hashes and copy objects that differ from another node.
    const contents = new Set(files(1).map(({ file }) => fs.readFileSync(file, 'latin1')));
    if (data === 0) expect(returned.problems).toHaveLength(contents.size - 1);
    else expect(returned.problems).toEqual([]);
  }, 120_000);
});

describe.skipIf(missing !== undefined).each(['2', '2:1'])('check --deep under load, -c %s', (format) => {
  test(
    'blocks that fio writes all the time are never reported as different, and fio gets no error',
    async (context) => {
      if (!haveCommand('fio')) return skipBecause(context, 'fio is not installed (sh test/install.sh installs it)');
      const cluster = await startRealNodes({ nodes: 4, format: ['-c', format] });
      const daemon = await startDaemon({ cluster: cluster.address, args: ['--create', 'vm:24M'] });
      try {
        const fio = (name: string, ...more: string[]): ReturnType<typeof run> =>
          run(
            'fio',
            [
              ...[`--name=${name}`, '--ioengine=nbd', `--uri=${daemon.uri('vm')}`, '--rw=randwrite', '--iodepth=8'],
              ...['--time_based', `--runtime=${LOAD_SECONDS}`, ...more],
            ],
            { timeoutMs: (LOAD_SECONDS + 120) * 1000, cwd: temporaryDirectory() },
          );
        // Everywhere in the first half, and again and again in one place behind it.
        const wide = fio(
          'wide',
          '--bsrange=512-65536',
          '--blockalign=512',
          '--size=12M',
          '--verify=crc32c',
          '--verify_backlog=64',
        );
        const narrow = fio('narrow', '--bs=4096', '--offset=16M', '--size=16K');
        let isRunning = true as boolean;
        void Promise.all([wide, narrow]).then(() => (isRunning = false));
        const listed = async (): Promise<boolean> =>
          (await cli(['check', '--deep', '--cluster', cluster.address, '--settle', '0.1'])).stdout.includes(
            ' 5 objects',
          );
        await waitUntil(listed, 'all objects are there');
        let checks = 0;
        do {
          const result = await cli(['check', '--deep', '--cluster', cluster.address, '--settle', '2']);
          expect({ code: result.code, stderr: result.stderr }, result.stdout).toEqual({ code: 0, stderr: '' });
          checks++;
        } while (isRunning);
        console.log(`-c ${format}: ${checks} checks under load, nothing reported`);
        for (const each of [await wide, await narrow]) expect(each.code, each.stdout + each.stderr).toBe(0);
      } finally {
        await daemon.stop();
        await cluster.stop();
      }
    },
    (LOAD_SECONDS + 150) * 1000,
  );
});
