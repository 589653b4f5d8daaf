/**
 * A cluster that has lost objects: check reports the lost bytes, and --missing=zero exports the rest read-only, to real
 * clients. Against the stand-in, and against real nodes where they are installed.
 */
import fs from 'node:fs';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { NbdClient } from 'nbd-server-ts';
import { SheepStore } from '../../src/store/sheep/sheep-store.js';
import { VdiCatalog } from '../../src/vdi/catalog.js';
import { expectBytes, MIB, oneLineOf, patterned } from '../cli/both-ways.js';
import { checkContents, localPlace, migrate, withCatalog, type Place } from '../cli/migration-stores.js';
import { cli, haveCommand, run, skipBecause, startDaemon, temporaryDirectory, type Daemon } from '../harness/daemon.js';
import { realNodesMissing, startRealNodes, startStandIn, type TestCluster } from './clusters.js';

const missing = realNodesMissing();
if (missing !== undefined) console.log(`not run against real Sheepdog nodes: ${missing}`);

const clusters = [
  { label: 'stand-in', start: startStandIn, skip: false },
  { label: 'real nodes', start: startRealNodes, skip: missing !== undefined },
];
const SIZE = 6 * MIB;

for (const { label, start, skip } of clusters) {
  describe.skipIf(skip)(`a cluster that has lost objects (${label})`, () => {
    let cluster: TestCluster;
    let remote: Place;
    let daemon: Daemon;
    /** The remaining content of the snapshot and of the disk. */
    const snapshot = patterned(SIZE, 1);
    const disk = Buffer.from(snapshot);

    beforeAll(async () => {
      cluster = await start();
      remote = { argument: `cluster:${cluster.address}`, open: () => SheepStore.open(cluster.address) };
      const catalog = new VdiCatalog(await remote.open());
      await catalog.create('vm', SIZE, { blockSizeShift: 20 });
      const vdi = await catalog.openVdi('vm');
      await vdi.write(0, snapshot, false);
      const before = vdi.record.vid;
      await catalog.snapshot('vm', 'a');
      patterned(512, 2).copy(disk, 3 * MIB + 512);
      await vdi.write(3 * MIB + 512, patterned(512, 2), false);
      const after = vdi.record.vid;
      await catalog.release(vdi);
      await catalog.close();
      // An object that both share, one of the snapshot, one of the disk.
      cluster.loseObject(before, 1);
      cluster.loseObject(before, 3);
      cluster.loseObject(after, 3);
      for (const content of [snapshot, disk]) for (const idx of [1, 3]) content.fill(0, idx * MIB, (idx + 1) * MIB);
      daemon = await startDaemon({ args: ['--missing=zero'], cluster: cluster.address });
    });
    afterAll(async () => {
      await (daemon as typeof daemon | undefined)?.stop();
      expect((cluster as typeof cluster | undefined)?.violations()).toEqual([]);
      await (cluster as typeof cluster | undefined)?.stop();
    });

    test('check lists the lost objects, and reading them is an error without --missing=zero', async () => {
      const result = await cli(['check', '--cluster', `${cluster.address},127.0.0.1:1`]);
      expect(result.code, result.stderr).toBe(1);
      expect(result.stdout).toMatch(`lost: vm@a bytes ${MIB} to ${2 * MIB - 1}\n`);
      expect(result.stdout).toMatch(`lost: vm@a bytes ${3 * MIB} to ${4 * MIB - 1}\n`);
      expect(result.stdout).toMatch(`lost: vm bytes ${MIB} to ${2 * MIB - 1}\n`);
      expect(result.stdout).toMatch(`lost: vm bytes ${3 * MIB} to ${4 * MIB - 1}\n`);
      expect(result.stdout).toMatch(/4 problems/);
      const out = path.join(temporaryDirectory(), 'out.img');
      const args = ['export', 'vm@a', out, '--cluster', `${cluster.address},127.0.0.1:1`];
      expect(oneLineOf(await cli(args), 1, args.join(' '))).toMatch(/the object is missing/);
      expect(fs.existsSync(out)).toBe(false);
    });

    test('serve --missing=zero gives clients the remaining data, zeros for lost objects, and read-only exports', async (context) => {
      for (const tool of ['nbdinfo', 'nbdcopy']) {
        if (!haveCommand(tool))
          return skipBecause(context, `${tool} is not installed (sh test/install.sh installs it)`);
      }
      for (const [name, content] of [
        ['vm', disk],
        ['vm@a', snapshot],
        ['vm', disk],
      ] as const) {
        const info = JSON.parse((await run('nbdinfo', ['--json', daemon.uri(name)])).stdout) as {
          exports: [{ is_read_only: boolean }];
        };
        expect(info.exports[0].is_read_only).toBe(true);
        const copied = await run('nbdcopy', [daemon.uri(name), '-']);
        expect(copied.code, copied.stderr).toBe(0);
        expectBytes(copied.stdoutBytes, content);
      }
      const lines = daemon.log().match(/lost: [^"]+/g) ?? [];
      // Each lost object is logged once, however often it is read.
      expect(lines.sort()).toEqual([
        expect.stringMatching(
          new RegExp(`^lost: vm bytes ${MIB} to ${2 * MIB - 1} \\(object 1 of vid .*read as zeros`),
        ),
        expect.stringMatching(new RegExp(`^lost: vm bytes ${3 * MIB} to ${4 * MIB - 1} \\(object 3 of vid`)),
        expect.stringMatching(new RegExp(`^lost: vm@a bytes ${3 * MIB} to ${4 * MIB - 1} \\(object 3 of vid`)),
      ]);
    });

    test('with --missing=zero every kind of change is refused', async () => {
      const client = await NbdClient.connect({ path: daemon.socket });
      expect((await client.go('vm')).readOnly).toBe(true);
      await expect(client.write(0, Buffer.alloc(512))).rejects.toThrow(/EPERM|read-only/i);
      await client.disconnect();
      const why = /with zeros in place of lost objects, and therefore read-only/;
      for (const args of [
        ['vdi', 'snapshot', 'vm', 'b'],
        ['vdi', 'create', 'new', '1M'],
        ['vdi', 'delete', 'vm@a'],
        ['vdi', 'rollback', 'vm@a'],
        ['vdi', 'clone', 'vm@a', 'new'],
        ['vdi', 'resize', 'vm', '1G'],
        ['export', 'vm@now', path.join(temporaryDirectory(), 'out')],
      ]) {
        const all = [...args, '--cluster', cluster.address, '--control', daemon.control];
        expect(oneLineOf(await cli(all), 1, all.join(' '))).toMatch(why);
      }
    });

    test('export and migrate --missing=zero copy the remaining data to a file and to a store', async () => {
      const out = path.join(temporaryDirectory(), 'out.img');
      const result = await cli(['export', 'vm', out, '--missing=zero', '--cluster', cluster.address]);
      expect(result.code, result.stderr).toBe(0);
      expect(result.stderr).toMatch(new RegExp(`note: lost: vm bytes ${MIB} to ${2 * MIB - 1} `));
      expectBytes(fs.readFileSync(out), disk);
      const local = localPlace();
      const { isFinished } = await migrate(remote, local, '--missing=zero');
      expect(isFinished).toBe(true);
      await checkContents(
        local,
        'vm',
        new Map([
          ['a', snapshot],
          ['', disk],
        ]),
      );
      // The damaged disk stays as it is.
      await withCatalog(remote, async (catalog) => {
        expect((await catalog.list()).map(({ tag }) => tag)).toEqual(['a', '']);
      });
    });
  });
}

test('a local store refuses --missing=zero', async () => {
  const store = localPlace().argument;
  expect((await cli(['vdi', 'create', 'vm', '1M', '--store', store])).code).toBe(0);
  for (const args of [
    ['serve', '--missing=zero', '--store', store],
    ['export', 'vm', path.join(temporaryDirectory(), 'out'), '--missing=zero', '--store', store],
  ]) {
    expect(oneLineOf(await cli(args), 2, args.join(' '))).toMatch(/--missing=zero is for clusters.* is a local store/);
  }
});
