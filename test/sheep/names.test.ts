/**
 * Names and tags of other tools in a cluster, of any bytes, and vids that are used again: each command acts on the VDI that
 * was meant and on no other. Against the stand-in, and against real nodes where they are installed.
 */
import { execFile } from 'node:child_process';
import { promisify } from 'node:util';
import type { Peer } from 'nbd-server-ts';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { Migration } from '../../src/jobs/migration/migration.js';
import { DirectOperations } from '../../src/operations/direct-operations.js';
import { VdiExports } from '../../src/export/vdi-exports.js';
import { LocalStore } from '../../src/store/local/local-store.js';
import { bytesOfText, textOfBytes } from '../../src/text/name-bytes.js';
import { SheepStore } from '../../src/store/sheep/sheep-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { specOf } from '../../src/vdi/names.js';
import { cli, cliJson, needs, ok, startDaemon, temporaryDirectory } from '../harness/daemon.js';
import { realNodesMissing, startRealNodes, type RealNodes } from './clusters.js';
import { Op, Res, StandIn } from './stand-in.js';

const PEER: Peer = { transport: 'unix', address: '/run/nbd.sock' };
const SHIFT = 20;
const SIZE = 4 * 2 ** SHIFT;
const missing = realNodesMissing();
if (missing !== undefined) console.log(`not run against real Sheepdog nodes: ${missing}`);

/** A cluster, and the actions of its own tool. */
interface Cluster {
  readonly address: string;
  create(name: Buffer): Promise<void>;
  snapshot(name: Buffer, tag: Buffer): Promise<void>;
  /** Violations of the protocol that the stand-in saw. */
  complaints(): readonly string[];
  stop(): Promise<void>;
}

async function standIn(recyclesVids: boolean): Promise<Cluster & { readonly nodes: StandIn }> {
  const nodes = await new StandIn({ nodes: 1, jitterMs: 0, recyclesVids }).start();
  return {
    nodes,
    address: nodes.address,
    create: (name) => {
      nodes.externalCreate(name, SIZE, SHIFT);
      return Promise.resolve();
    },
    snapshot: (name, tag) => {
      nodes.externalSnapshot(name, tag);
      return Promise.resolve();
    },
    complaints: () => nodes.violations,
    stop: () => nodes.stop(),
  };
}

async function realNodes(recyclesVids: boolean): Promise<Cluster> {
  const nodes: RealNodes = await startRealNodes({
    nodes: 2,
    format: ['-c', '2', '-z', String(SHIFT), ...(recyclesVids ? ['-R'] : [])],
  });
  const dog = async (command: string, ...words: readonly Buffer[]): Promise<void> => {
    // Node passes only text as arguments of a process; these are bytes.
    const quoted = words.map(
      (word) => `$'${Array.from(word, (byte) => `\\x${byte.toString(16).padStart(2, '0')}`).join('')}'`,
    );
    const line = `dog vdi ${command} -a 127.0.0.1 -p ${nodes.port} ${quoted.join(' ')}`;
    await promisify(execFile)('bash', ['-c', line]);
  };
  return {
    address: nodes.address,
    create: (name) => dog('create', name, Buffer.from(String(SIZE))),
    snapshot: (name, tag) => dog('snapshot', Buffer.from('-s'), tag, name),
    complaints: () => nodes.crashes(),
    stop: () => nodes.stop(),
  };
}

class Opened {
  readonly catalog: VdiCatalog;
  readonly exports: VdiExports;
  readonly operations: DirectOperations;

  private constructor(store: SheepStore) {
    this.catalog = new VdiCatalog(store);
    this.exports = new VdiExports(this.catalog);
    this.operations = new DirectOperations(this.catalog, this.exports);
  }

  static async open(address: string): Promise<Opened> {
    return new Opened(await SheepStore.open(address, { stateDirectory: temporaryDirectory() }));
  }

  async fill(spec: string, byte: number): Promise<void> {
    const { device } = await this.exports.open(spec, PEER);
    await device.write(0, Buffer.alloc(4096, byte), false);
    await device.close('disconnect');
  }

  async look(spec: string): Promise<number | undefined> {
    const described = await this.exports.describe(spec, PEER);
    const { device, info } = await this.exports.open(spec, PEER);
    expect(described.info.name).toBe(info.name);
    const into = Buffer.alloc(1);
    await device.read(0, into);
    await device.close('disconnect');
    return into[0];
  }

  async listed(): Promise<string[]> {
    return Array.from(await this.exports.list(PEER), ({ name }) => name);
  }

  close(): Promise<void> {
    return this.catalog.close();
  }
}

const bytes = (text: string): Buffer => Buffer.from(text, 'latin1');
const NAMES = ['x/y', 'a@b', ' lead', 'trail ', '.', '..', 'ta\tb', 'bad\xff\xfe', 'bad\xff\xfd', '%41', '7'].map(
  bytes,
);
const TAGS = ['t\xff', 't\xfe', 'x/y', 'p@q', ' ', '.', 'now', 'now:x'].map(bytes);

test('text stands for any bytes and gives the same bytes back, and UTF-8 stands for itself', () => {
  for (const sample of ['', 'plain', 'ü€😀\ufffd', '\xff', 'a\xc3', '\xed\xa0\x80', '\xf0\x9f\x98', '\xc3\xa4\xc3'].map(
    (text) => bytes(text),
  )) {
    expect(bytesOfText(textOfBytes(sample))).toEqual(sample);
    expect(JSON.parse(JSON.stringify(textOfBytes(sample)))).toBe(textOfBytes(sample));
  }
  expect(textOfBytes(Buffer.from('ü€😀'))).toBe('ü€😀');
  expect(textOfBytes(bytes('\xff'))).not.toBe(textOfBytes(bytes('\xfe')));
});

for (const isReal of [false, true]) {
  describe.skipIf(isReal && missing !== undefined)(isReal ? 'real nodes' : 'stand-in', () => {
    let cluster: Cluster;
    let opened: Opened;
    beforeAll(async () => {
      cluster = await (isReal ? realNodes(false) : standIn(false));
      opened = await Opened.open(cluster.address);
    });
    afterAll(async () => {
      await (opened as typeof opened | undefined)?.close();
      await (cluster as typeof cluster | undefined)?.stop();
    });

    test('a VDI of any name is listed, written, snapshotted, cloned, rolled back and deleted, and no other VDI is changed', async () => {
      for (const name of NAMES) await cluster.create(name);
      const said = await opened.listed();
      expect(new Set(said).size).toBe(NAMES.length);
      expect((await opened.catalog.list()).map(({ name }) => bytesOfText(name).toString('latin1')).sort()).toEqual(
        NAMES.map((name) => name.toString('latin1')).sort(),
      );
      for (const [n, name] of said.entries()) {
        await opened.fill(name, n + 1);
        expect(await opened.look(`${name}@now`)).toBe(n + 1);
        await opened.catalog.snapshot(name, 'ours');
        await opened.fill(name, 99);
      }
      // A few names stand for all: each takes long.
      for (const [n, name] of said.entries()) {
        expect(await opened.look(name)).toBe(99);
        if (!/bad|x%2F/.test(name)) continue;
        await opened.catalog.clone(`${name}@ours`, `clone-${n}`);
        await opened.catalog.rollback(`${name}@ours`);
        expect(await opened.look(name)).toBe(n + 1);
        expect(await opened.look(`clone-${n}`)).toBe(n + 1);
      }
      expect((await opened.catalog.check({ repair: false })).problems).toEqual([]);
      for (let left = (await opened.listed()).length; left > 0; left--) {
        await opened.catalog.remove((await opened.listed())[0] as string);
        expect((await opened.listed()).length).toBe(left - 1);
      }
      expect(cluster.complaints()).toEqual([]);
    }, 120_000);

    test('a snapshot of any tag is listed, opened, cloned and deleted, and a start of the daemon removes none', async () => {
      const name = bytes('tags');
      await cluster.create(name);
      for (const [n, tag] of TAGS.entries()) {
        await opened.fill('tags', n + 1);
        await cluster.snapshot(name, tag);
      }
      // As a daemon does at its start, and when a temporary snapshot ends.
      expect(await opened.catalog.dropLeftovers()).toBe(0);
      expect(await opened.look('tags@now')).toBe(TAGS.length);
      const restarted = await Opened.open(cluster.address);
      expect(await restarted.catalog.dropLeftovers()).toBe(0);
      await restarted.close();
      const snapshots = (await opened.catalog.list()).filter(({ isSnapshot }) => isSnapshot);
      expect(snapshots.map(({ tag }) => bytesOfText(tag))).toEqual(TAGS);
      expect(await opened.listed()).toEqual([...snapshots.map(specOf), 'tags']);
      for (const [n, snapshot] of snapshots.entries()) {
        expect(await opened.look(specOf(snapshot))).toBe(n + 1);
        if (n < 2 || n === TAGS.length - 1) {
          await opened.catalog.clone(specOf(snapshot), 'copy');
          expect(await opened.look('copy')).toBe(n + 1);
          await opened.catalog.remove('copy');
        }
        await opened.catalog.remove(specOf(snapshot));
      }
      expect((await opened.catalog.list()).map(({ tag }) => tag)).toEqual(['']);
      await opened.catalog.remove('tags');
    }, 120_000);
  });

  describe.skipIf(isReal && missing !== undefined)(
    `vids that are used again (${isReal ? 'real nodes' : 'stand-in'})`,
    () => {
      let cluster: Cluster;
      let opened: Opened;
      beforeAll(async () => {
        cluster = await (isReal ? realNodes(true) : standIn(true));
        opened = await Opened.open(cluster.address);
      });
      afterAll(async () => {
        await (opened as typeof opened | undefined)?.close();
        await (cluster as typeof cluster | undefined)?.stop();
      });

      test('a VDI with a lower id than its snapshots is snapshotted, rolled back and deleted, and no other VDI is changed', async () => {
        const { catalog } = opened;
        for (const name of ['old-1', 'old-2', 'b']) await catalog.create(name, SIZE, { blockSizeShift: SHIFT });
        await opened.fill('b', 1);
        for (const name of ['old-1', 'old-2']) await catalog.remove(name);
        await cluster.snapshot(bytes('b'), bytes('t'));
        const [snapshot, working] = await catalog.list();
        expect(working?.vid).toBeLessThan(snapshot?.vid ?? 0);
        await opened.fill('b', 2);
        await catalog.snapshot('b', 'u');
        await opened.fill('b', 3);
        expect(await opened.look('b@now')).toBe(3);
        const contents = async (): Promise<unknown> =>
          Promise.all((await catalog.list()).map(async (each) => [each.tag, await opened.look(specOf(each))]));
        expect(await contents()).toEqual([
          ['t', 1],
          ['u', 2],
          ['', 3],
        ]);
        await catalog.rollback('b@t');
        expect(await contents()).toEqual([
          ['t', 1],
          ['u', 2],
          ['', 1],
        ]);
        await catalog.rollback('b@u');
        await opened.fill('b', 4);
        await catalog.remove('b@t');
        expect(await contents()).toEqual([
          ['u', 2],
          ['', 4],
        ]);
        await catalog.remove('b');
        expect(await contents()).toEqual([['u', 2]]);
        await catalog.clone('b@u', 'c');
        await catalog.remove('b@u');
        expect(await opened.look('c')).toBe(2);
        await catalog.remove('c');
        expect(await catalog.list()).toEqual([]);
        expect(cluster.complaints()).toEqual([]);
      }, 120_000);
    },
  );
}

describe('names and tags on the stand-in', () => {
  let cluster: Awaited<ReturnType<typeof standIn>>;
  let opened: Opened;
  beforeEach(async () => {
    cluster = await standIn(false);
    opened = await Opened.open(cluster.address);
  });
  afterEach(async () => {
    await opened.close();
    await cluster.stop();
  });

  test('a new tag that is a number is refused, and an ambiguous snapshot is shown by its id', async () => {
    const { catalog } = opened;
    await catalog.create('v', SIZE, { blockSizeShift: SHIFT });
    for (const [n, tag] of ['a', 'b', 'c', 'd'].entries()) {
      await opened.fill('v', n + 1);
      await catalog.snapshot('v', tag);
    }
    await expect(catalog.snapshot('v', '7')).rejects.toThrow(
      /tag "7" is a number, which other tools of a cluster take/,
    );
    const vids = (await catalog.list()).map(({ vid }) => vid);
    // Snapshots of other tools: tagged with the number of another snapshot, with an unused number, and two with one tag.
    cluster.nodes.retag(vids[1] as number, '1');
    expect(await opened.listed()).toEqual(['v@a', `@${vids[1]?.toString(16)}`, 'v@c', 'v@d', 'v']);
    cluster.nodes.retag(vids[2] as number, '20');
    expect(await opened.look('v@20')).toBe(3);
    cluster.nodes.retag(vids[3] as number, '20');
    const ids = vids.map((vid) => `@${vid.toString(16)}`);
    expect(await opened.listed()).toEqual(['v@a', ids[1], ids[2], ids[3], 'v']);
    for (const tag of ['1', '20']) {
      for (const spec of [`v@${tag}`]) {
        for (const act of [() => catalog.remove(spec), () => catalog.rollback(spec), () => opened.look(spec)])
          await expect(act()).rejects.toThrow(
            /is ambiguous, because several snapshots have this tag or number; give the ID/,
          );
      }
    }
    await expect(catalog.find('v@20')).rejects.toThrow(
      new RegExp(`${ids[2]} \\(tag "20", number 3\\), ${ids[3]} \\(tag "20", number 4\\)$`),
    );
    for (const [n, id] of ids.slice(0, 4).entries()) expect(await opened.look(id)).toBe(n + 1);
    const { catalog: other } = opened;
    await other.remove(ids[3] as string);
    expect(await opened.look('v@20')).toBe(3);
  });

  test('migrate keeps numbers as tags in a store; into a cluster it refuses tags that are impossible there, or replaces them', async () => {
    const { catalog, operations } = opened;
    await catalog.create('v', SIZE, { blockSizeShift: SHIFT });
    for (const [n, tag] of ['a', 'b', 'c', 'd', 'e'].entries()) {
      await opened.fill('v', n + 1);
      await catalog.snapshot('v', tag);
    }
    await opened.fill('v', 6);
    const vids = (await catalog.list()).map(({ vid }) => vid);
    cluster.nodes.retag(vids[1] as number, '1');
    const local = new VdiCatalog(await LocalStore.open(temporaryDirectory()));
    const localExports = new VdiExports(local);
    const signal = new AbortController().signal;
    const migrate = (
      from: DirectOperations,
      to: DirectOperations,
      name: string,
      renamesTags = false,
    ): Promise<unknown> =>
      new Migration(from, to, {
        ...{
          name,
          newName: 'arrived',
          renamesTags,
          sync: false,
          verify: 'all',
          sha256: false,
          isReadOnly: false,
          progress: () => ({ advance: () => undefined, end: () => undefined }),
          log: () => undefined,
          signal,
        },
      }).run();
    const into = new DirectOperations(local, localExports);
    await migrate(operations, into, 'v');
    expect((await local.list()).map(({ tag }) => tag)).toEqual(['a', '1', 'c', 'd', 'e', '']);
    // And back: a cluster refuses it.
    await expect(migrate(into, operations, 'arrived')).rejects.toThrow(
      /^nothing was begun: .* does not allow the tags of these snapshots: arrived@1 \(tag "1": in a cluster a number is an id\)/,
    );
    expect((await catalog.list()).some(({ name }) => name === 'arrived')).toBe(false);
    await migrate(into, operations, 'arrived', true);
    const arrived = (await catalog.list()).filter(({ name }) => name === 'arrived');
    expect(arrived.map(({ tag }) => tag)).toEqual(['a', expect.stringMatching(/^1\.id-[0-9a-f]+$/), 'c', 'd', 'e', '']);
    for (const [n, each] of arrived.entries()) expect(await opened.look(specOf(each))).toBe(n + 1);
    // Tags that our stores refuse: all are reported, and all arrive under other tags.
    for (const record of await local.list()) await local.remove(specOf(record));
    for (const [n, tag] of ['x/y', '1', bytes('t\xff'), '1', ' '].entries())
      cluster.nodes.retag(vids[n] as number, tag);
    await expect(migrate(operations, into, 'v')).rejects.toThrow(
      /v@x%2Fy \(tag "x\/y": not allowed here\).*\(tag "1": more than one has this tag\).*%FF.*\(tag "1": more than one.*with --rename-tags/,
    );
    await migrate(operations, into, 'v', true);
    const tags = (await local.list()).map(({ tag }) => tag);
    expect(tags).toEqual([...['x_y', '1', 't_', '1', '_'].map((stem, n) => `${stem}.id-${vids[n]?.toString(16)}`), '']);
    await local.close();
  });

  test('a VDI that another client writes while it is deleted is not reported as deleted', async () => {
    await opened.catalog.create('v', SIZE, { blockSizeShift: SHIFT });
    await opened.fill('v', 1);
    const { vid } = await opened.catalog.find('v');
    const inode = cluster.nodes.objects.get((1n << 63n) | (BigInt(vid) << 32n)) as Buffer;
    cluster.nodes.fault = ({ opcode }) => {
      if (opcode === Op.DEL_VDI) inode.writeUInt32LE(vid, 4664);
      return undefined;
    };
    await expect(opened.catalog.remove('v')).rejects.toThrow(
      /v is only half deleted, because another client writes to it/,
    );
  });

  needs('nbdinfo')(
    'names that are no text are listed and opened by clients and commands, with and without a daemon',
    async () => {
      await cluster.create(bytes('bad\xff'));
      await cluster.snapshot(bytes('bad\xff'), bytes('t/\xfe'));
      const daemon = await startDaemon({ cluster: cluster.address });
      for (const place of [
        ['--cluster', cluster.address, '--control', daemon.control],
        ['--cluster', cluster.address],
      ]) {
        const list = await cli(['vdi', 'list', ...place]);
        expect(list.stdout).toMatch(/^bad\\xff {2}t\/\\xfe .* @=bad%FF@t%2F%FE$/m);
        expect((await cli(['vdi', 'tree', ...place])).stdout).toContain('bad\\xff  @=bad%FF  (you are here)');
        const json = await cliJson<{ spec: string; name: string }[]>(['vdi', 'list', '--json', ...place]);
        expect(json.map(({ spec }) => spec)).toEqual(['@=bad%FF@t%2F%FE', '@=bad%FF']);
        const shown = await cliJson<{ spec: string }>(['vdi', 'show', '@=bad%FF', '--json', ...place]);
        expect(shown.spec).toBe('@=bad%FF');
      }

      expect(await ok('nbdinfo', ['--list', daemon.uri('')])).toMatch(
        /export="@=bad%FF@t%2F%FE":[^]*export="@=bad%FF":/,
      );
      expect(await ok('nbdinfo', ['--size', daemon.uri('@=bad%FF')])).toBe(`${SIZE}\n`);
      const place = ['--cluster', cluster.address, '--control', daemon.control];
      expect((await cli(['vdi', 'snapshot', '@=bad%FF', 's', ...place])).stdout).toBe('took @=bad%FF@s\n');
      expect((await cli(['vdi', 'rollback', '@=bad%FF@s', ...place])).stdout).toContain('@=bad%FF is @=bad%FF@s again');
      for (const spec of ['@=bad%FF', '@=bad%FF@s', '@=bad%FF@t%2F%FE']) {
        expect((await cli(['vdi', 'delete', spec, ...place])).code).toBe(0);
      }
      expect(await cliJson(['vdi', 'list', '--json', ...place])).toEqual([]);
      await daemon.stop();
    },
  );
});

test('if a snapshot under another name is cut off at any step, the VDI has its name and content and can be snapshotted', async () => {
  const MOST_WRITES = 16;
  for (let after = 0; ; after++) {
    const cluster = await standIn(true);
    const before = await Opened.open(cluster.address);
    for (const name of ['old', 'b']) await before.catalog.create(name, SIZE, { blockSizeShift: SHIFT });
    await before.fill('b', 1);
    await before.catalog.remove('old');
    await cluster.snapshot(bytes('b'), bytes('t'));
    await before.fill('b', 2);
    await before.close();
    const first = await Opened.open(cluster.address);
    let writes = 0;
    cluster.nodes.fault = ({ opcode }) => {
      if (opcode !== Op.WRITE && opcode !== Op.NEW_VDI) return undefined;
      writes++;
      return writes > after ? { result: Res.INVALID_PARMS } : undefined;
    };
    const isDone = await first.catalog.snapshot('b', 'u').then(
      () => true,
      () => false,
    );
    cluster.nodes.fault = () => undefined;
    const second = await Opened.open(cluster.address);
    const records = await second.catalog.list();
    expect(records.map(({ name }) => name)).toEqual(records.map(() => 'b'));
    expect(await second.look('b')).toBe(2);
    expect(await second.look('b@t')).toBe(1);
    await second.fill('b', 3);
    await second.catalog.snapshot('b', 'v');
    expect(await second.look('b@v')).toBe(3);
    for (const { vid } of await second.catalog.list()) await second.catalog.remove(`@${vid.toString(16)}`);
    expect(await second.catalog.list()).toEqual([]);
    await second.close();
    await first.close().catch(() => undefined);
    await cluster.stop();
    if (isDone) break;
    expect(after).toBeLessThan(MOST_WRITES);
  }
}, 180_000);
