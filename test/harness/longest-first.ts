/**
 * The order in which vitest starts test files: long ones first, so that no worker is left alone with one at the end. Owns the
 * list of long files; all others count as short.
 */
import { BaseSequencer, type TestSpecification } from 'vitest/node';

/** By the seconds they take, roughly. */
const LONG = [
  'test/stores/real-nodes.test.ts',
  'test/stores/stand-in.test.ts',
  'test/power/states.test.ts',
  'test/crash/block-devices.test.ts',
  'test/power/faults.test.ts',
  'test/rescue/rescue.test.ts',
  'test/crash/stress.test.ts',
  'test/sheep/recovery.test.ts',
  'nbd/test/package/packed.test.ts',
  'test/sheep/rules.test.ts',
  'test/vm/kernel-client.test.ts',
  'test/sheep/migrate.test.ts',
  'test/cli/backup.test.ts',
  'test/daemon/ending.test.ts',
  'test/vm/daemon-restart.test.ts',
  'test/cli/unfinished-steps.test.ts',
  'test/cli/bad-input.test.ts',
  'test/sheep/deadlines.test.ts',
  'test/daemon/serve-peers.test.ts',
  'test/crash/kill.test.ts',
  'test/sheep/dropped.test.ts',
  'test/cli/freeze.test.ts',
  'nbd/test/shares.test.ts',
  'test/vm/qemu-client.test.ts',
  'test/daemon/told-in-log.test.ts',
  'test/sheep/races.test.ts',
  'test/daemon/in-use.test.ts',
  'test/e2e/backup-tools.test.ts',
  'test/cli/import-export.test.ts',
  'test/cli/unfinished.test.ts',
  'test/e2e/client-sets.test.ts',
  'test/cli/backup-interrupted.test.ts',
  'test/e2e/network-drop.test.ts',
  'test/cli/backup-target.test.ts',
  'test/export/exclusive.test.ts',
  'test/sheep/bad-nodes.test.ts',
  'test/stores/local.test.ts',
  'test/store/metadata-failures.test.ts',
  'test/cli/kept-moments.test.ts',
  'test/system/disk-seam.test.ts',
  'test/e2e/reconnecting.test.ts',
  'test/cli/serve.test.ts',
];

const rankOf = ({ moduleId }: TestSpecification): number => {
  const rank = LONG.findIndex((file) => moduleId.endsWith(`/${file}`));
  return rank < 0 ? LONG.length : rank;
};

export class LongestFirst extends BaseSequencer {
  override async sort(files: TestSpecification[]): Promise<TestSpecification[]> {
    const others = await super.sort(files);
    return others.sort((a, b) => rankOf(a) - rankOf(b));
  }
}
