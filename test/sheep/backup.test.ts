/** Backups of a cluster's VDIs: against the stand-in, and against real nodes where they are installed. */
import fs from 'node:fs';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { clusterLocation } from '../../src/store/sheep/cluster-address.js';
import { temporaryDirectory } from '../harness/daemon.js';
import { BackedUpDisk, bases, hashOf } from '../cli/backups.js';
import { MIB, patterned, storeWith } from '../cli/both-ways.js';
import { realNodesMissing, startRealNodes, startStandIn, type TestCluster } from './clusters.js';

const missing = realNodesMissing();
if (missing !== undefined) console.log(`not run against real Sheepdog nodes: ${missing}`);

const clusters = [
  { label: 'stand-in', start: startStandIn, skip: false },
  { label: 'real nodes', start: startRealNodes, skip: missing !== undefined },
];

for (const { label, start, skip } of clusters) {
  describe.skipIf(skip)(`a cluster (${label})`, () => {
    let cluster: TestCluster;
    beforeAll(async () => {
      cluster = await start();
    });
    afterAll(async () => {
      await (cluster as typeof cluster | undefined)?.stop();
    });

    test('a full backup and an incremental one of a trimmed disk are restored into the cluster and into a local store', async () => {
      const local = storeWith(path.join(temporaryDirectory(), 'store'), undefined);
      // Options of every command; no daemon runs.
      const target = storeWith(clusterLocation(cluster.address), undefined, ['--cluster', cluster.address]);
      const disk = new BackedUpDisk(target, 6 * MIB);
      await disk.create();
      await disk.write(0, patterned(3 * MIB, 1));
      const to = path.join(temporaryDirectory(), 'vm');
      const image = path.join(temporaryDirectory(), 'vm.img');
      expect(await disk.backup(to)).toMatchObject({ id: 1, kind: 'full', storedBytes: 3 * MIB });
      await disk.write(MIB + 4096, patterned(4096, 2));
      await disk.trim(2 * MIB, MIB);
      expect(await disk.backup(to)).toMatchObject({ kind: 'incremental', changedBytes: 2 * MIB, storedBytes: 65536 });
      await disk.write(5 * MIB, patterned(512, 3));
      // A snapshot of another client changes nothing.
      await cluster.snapshot('vm', 'by-dog');
      await disk.write(0, patterned(512, 4));
      expect(await disk.backup(to, '--keep', '2')).toMatchObject({ changedBytes: 2 * MIB, kept: [2, 3] });
      expect(await disk.backup(to, '--no-base')).toMatchObject({ changedBytes: 0, base: null });
      expect(await bases(target)).toEqual([]);
      expect(await disk.checkAll(to)).toEqual([2, 3, 4]);
      await disk.checkRestored(to);
      await local.ok('restore', to, 'from-cluster');
      expect(hashOf((await local.run(['export', 'from-cluster', '-'])).stdoutBytes)).toBe(hashOf(disk.content));
      await target.ok('backup', 'vm', '--to', image, '--no-base');
      expect(hashOf(fs.readFileSync(image))).toBe(hashOf(disk.content));
      expect(await target.names()).toEqual(['vm@by-dog', 'vm']);
      await target.ok('vdi', 'delete', 'vm');
      await target.ok('vdi', 'delete', 'vm@by-dog');
      expect(await cluster.objects()).toEqual([]);
      expect(cluster.violations()).toEqual([]);
    }, 240_000);
  });
}
