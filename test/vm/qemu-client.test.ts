/**
 * qemu as client: the disk of a running guest is an export. The tests run in sequence on one guest, which writes all the time:
 * trims free space, the daemon restarts, the disk is backed up and moved away and back, and at the end every synced file is
 * there.
 */
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { afterAll, beforeAll, beforeEach, describe, expect, onTestFailed, test } from 'vitest';
import { cli, needs, run, startDaemon, temporaryDirectory, waitUntil, type Daemon } from '../harness/daemon.js';
import { bootGuest, guestProblem, type Guest } from './guest.js';
import { Qmp } from './qmp.js';

const MIB = 2 ** 20;
const SIZE = 192 * MIB;
const BOOT_TIMEOUT_MS = 2 * 60_000;
const problem = guestProblem();
if (problem !== undefined) console.log(`skipped: no Linux guest: ${problem}`);

const job = `
mkfs.ext4 -q -E lazy_itable_init=1,lazy_journal_init=1 /dev/vda 2> /tmp/mkfs || fail mkfs: $(cat /tmp/mkfs)
mount -t ext4 /dev/vda /mnt || fail mount
dd if=/dev/zero bs=1M count=24 2>/dev/null | tr '\\000' x > /mnt/filled
sync
say FILLED
wait_for go
rm /mnt/filled
sync
fstrim /mnt || fail fstrim
say TRIMMED
wait_for go
dd if=/dev/zero of=/mnt/zeros bs=1M count=32 conv=fsync 2>/dev/null || fail writing zeros
say ZEROS
wait_for go
rm /mnt/zeros

mkdir /mnt/kept /tmp/sums
dd if=/dev/urandom of=/mnt/kept/data bs=64k count=16 2>/dev/null
sync
say KEPT $(sha256sum /mnt/kept/data | cut -d ' ' -f 1)
( count=0
  while [ ! -e /tmp/stop ]; do
    count=$((count + 1))
    dd if=/dev/urandom of=/tmp/data bs=64k count=1 2>/dev/null
    dd if=/tmp/data of=/mnt/$((count % 60)) bs=16k conv=fsync 2>/tmp/dd || { cat /tmp/dd > /tmp/failed; break; }
    sum=$(sha256sum < /tmp/data)
    echo "\${sum%% *}  $((count % 60))" > /tmp/sums/$((count % 60))
    echo $count > /tmp/written
    sleep 0.05
  done
  touch /tmp/ended
) &
# Whenever it is asked: some more files, begun after that.
while read -r word < /dev/ttyS0; do
  case $word in
    progress)
      target=$(($(cat /tmp/written 2>/dev/null || echo 0) + 5))
      until [ "$(cat /tmp/written 2>/dev/null || echo 0)" -ge $target ] || [ -e /tmp/failed ]; do sleep 0.1; done
      [ -e /tmp/failed ] && fail the writer: $(cat /tmp/failed) $(dmesg | tail -n 5)
      say PROGRESS ;;
    end) break ;;
  esac
done

touch /tmp/stop
while [ ! -e /tmp/ended ]; do sleep 0.1; done
[ -e /tmp/failed ] && fail the writer: $(cat /tmp/failed)
grep -q '^/dev/vda /mnt ext4 rw' /proc/mounts || fail $(cat /proc/mounts)
umount /mnt || fail umount
echo 3 > /proc/sys/vm/drop_caches
e2fsck -f -n /dev/vda > /tmp/fsck 2>&1 || fail e2fsck: $(cat /tmp/fsck)
mount -t ext4 -o ro /dev/vda /mnt || fail mounting it again
cat /tmp/sums/* > /tmp/all-sums
(cd /mnt && sha256sum -c /tmp/all-sums > /tmp/checked 2>&1) || fail files are not what was synced: $(grep -v OK /tmp/checked)
umount /mnt
dmesg | grep -iE 'i/o error|EXT4-fs (error|warning)|remounting|critical' > /tmp/errors && fail $(cat /tmp/errors)
say CLEAN
`;

/** The guest's disk is an export; qemu's tools read other exports at the same time. */
const tries = problem === undefined ? needs('qemu-system-x86_64', 'qemu-img') : test.skip;

(problem === undefined ? describe : describe.skip)('a guest of qemu with an export as its disk', () => {
  const directory = temporaryDirectory();
  let daemon: Daemon;
  let port: number;
  let guest: Guest;
  let qmp: Qmp;
  let keptHash: string;

  const diskNode = (): object => ({
    driver: 'nbd',
    'node-name': 'disk0',
    server: { type: 'inet', host: '127.0.0.1', port: String(port) },
    export: 'disk',
    discard: 'unmap',
    'detect-zeroes': 'unmap',
    'reconnect-delay': 60,
  });
  const uri = (name: string): string => `nbd://127.0.0.1:${port}/${name}`;
  const used = (): number =>
    Number(execFileSync('du', ['-s', '-B1', daemon.store], { encoding: 'utf8' }).split('\t')[0]);
  const progress = async (): Promise<void> => {
    guest.send('progress');
    await guest.expect('PROGRESS');
  };
  const qemuImg = async (...args: string[]): Promise<string> => {
    const result = await run('qemu-img', args);
    expect(result.code, result.stdout + result.stderr).toBe(0);
    return result.stdout;
  };
  /** A copy made during writes is like a disk after a power failure: after a replay of the journal it has no errors. */
  const expectFilesystem = async (image: string): Promise<void> => {
    const replay = await run('e2fsck', ['-p', image]);
    expect(replay.code, replay.stdout + replay.stderr).toBeLessThanOrEqual(1);
    const check = await run('e2fsck', ['-f', '-n', image]);
    expect(check.code, check.stdout + check.stderr).toBe(0);
    const kept = path.join(directory, 'kept');
    await run('debugfs', ['-R', `dump /kept/data ${kept}`, image]);
    expect(execFileSync('sha256sum', [kept], { encoding: 'utf8' }).split(' ')[0]).toBe(keptHash);
  };

  beforeAll(async () => {
    const disks = ['disk', 'backup', 'home'].flatMap((name) => ['--create', `${name}:${SIZE}`]);
    daemon = await startDaemon({ args: ['--listen', 'tcp:127.0.0.1:0', ...disks] });
    port = Number(/tcp:127\.0\.0\.1:(\d+)/.exec(daemon.ready.listeners.join(' '))?.[1]);
    const socket = path.join(directory, 'qmp');
    guest = await bootGuest(job, [
      ...['-blockdev', JSON.stringify(diskNode()), '-device', 'virtio-blk-pci,id=vda,drive=disk0'],
      ...['-qmp', `unix:${socket},server=on,wait=off`],
    ]);
    qmp = await Qmp.connect(socket);
  }, BOOT_TIMEOUT_MS);
  afterAll(() => qmp.close());
  // The tests share the guest: after a failure the others could only time out.
  let failed: string | undefined;
  beforeEach((context) => {
    if (failed !== undefined) context.skip(`needs: ${failed}`);
    onTestFailed(() => {
      failed = context.task.name;
    });
  });

  tries('discard=unmap: fstrim in the guest gives the space back on the host', async () => {
    await guest.expect('FILLED');
    const filled = used();
    guest.send('go');
    await guest.expect('TRIMMED');
    await waitUntil(() => used() < filled - 20 * MIB, 'the space is back');
  });

  tries('detect-zeroes=unmap: zeros that the guest writes take up no space', async () => {
    const before = used();
    guest.send('go');
    await guest.expect('ZEROS');
    expect(used() - before).toBeLessThan(16 * MIB);
    guest.send('go');
    keptHash = await guest.expect('KEPT');
    await progress();
  });

  tries('reconnect-delay: the daemon is stopped and killed and comes back, and the guest notices nothing', async () => {
    for (const end of [() => daemon.stop(), () => guest.whileStopped(() => daemon.kill())]) {
      await end();
      daemon = await startDaemon({ store: daemon.store, args: ['--listen', `tcp:127.0.0.1:${port}`] });
      await progress();
    }
  });

  tries('qemu-img convert from NAME@now: the image is of one moment, while the guest writes', async () => {
    const image = path.join(directory, 'now.img');
    await qemuImg('convert', '-f', 'raw', '-O', 'raw', uri('disk@now'), image);
    await expectFilesystem(image);
    await progress();
  });

  tries('blockdev-backup from one export to another is what the disk was when it began', async () => {
    await qmp.execute('blockdev-add', {
      driver: 'nbd',
      'node-name': 'target',
      server: { type: 'inet', host: '127.0.0.1', port: String(port) },
      export: 'backup',
      discard: 'unmap',
    });
    // The guest is paused while the backup begins and a snapshot of the same moment is taken.
    await qmp.execute('stop');
    const taken = await cli(['vdi', 'snapshot', 'disk', 'then'], { store: daemon.store });
    expect(taken.stderr).toBe('');
    await qmp.execute('blockdev-backup', { 'job-id': 'b', device: 'disk0', target: 'target', sync: 'full' });
    await qmp.execute('cont');
    await progress();
    expect(await qmp.event('BLOCK_JOB_COMPLETED', 'b')).not.toHaveProperty('error');
    await qmp.execute('blockdev-del', { 'node-name': 'target' });
    await qemuImg('compare', '-f', 'raw', '-F', 'raw', uri('disk@then'), uri('backup'));
  });

  tries('drive-mirror moves the disk of the running guest away to a file, and from there onto an export', async () => {
    const file = path.join(directory, 'away.qcow2');
    const move = async (from: string, to: string, options: object): Promise<void> => {
      await qmp.execute('drive-mirror', {
        'job-id': to,
        device: from,
        'node-name': to,
        sync: 'full',
        ...options,
      });
      await qmp.event('BLOCK_JOB_READY', to);
      await progress();
      await qmp.execute('block-job-complete', { device: to });
      expect(await qmp.event('BLOCK_JOB_COMPLETED', to)).not.toHaveProperty('error');
      await progress();
    };
    await move('disk0', 'away', { target: file, format: 'qcow2' });
    const clients = await run('qemu-img', ['info', '--output=json', file, '-U']);
    expect(JSON.parse(clients.stdout)).toMatchObject({ 'virtual-size': SIZE, format: 'qcow2' });
    // An export opened by -blockdev stays open until it is closed; a rollback needs the disk to be closed.
    await qmp.execute('blockdev-del', { 'node-name': 'disk0' });
    expect((await cli(['vdi', 'rollback', 'disk@then'], { store: daemon.store })).stderr).toBe('');
    await move('away', 'home', { target: uri('home'), format: 'raw', mode: 'existing' });
    fs.rmSync(file);
  });

  tries(
    'blockdev-mirror moves it onto an export that is opened with options of its own: the daemon may restart',
    async () => {
      await qmp.execute('blockdev-add', { ...diskNode(), 'node-name': 'back' });
      await qmp.execute('blockdev-mirror', { 'job-id': 'm', device: 'home', target: 'back', sync: 'full' });
      await qmp.event('BLOCK_JOB_READY', 'm');
      await qmp.execute('block-job-complete', { device: 'm' });
      expect(await qmp.event('BLOCK_JOB_COMPLETED', 'm')).not.toHaveProperty('error');
      await progress();
      await guest.whileStopped(() => daemon.kill());
      daemon = await startDaemon({ store: daemon.store, args: ['--listen', `tcp:127.0.0.1:${port}`] });
      await progress();
    },
  );

  tries('after all that the filesystem is clean, and every file that was synced is there', async () => {
    guest.send('end');
    await guest.expect('CLEAN');
    await guest.end();
    const image = path.join(directory, 'end.img');
    await qemuImg('convert', '-f', 'raw', '-O', 'raw', uri('disk'), image);
    await expectFilesystem(image);
    expect((await daemon.stop()).code, daemon.log()).toBe(0);
  });
});
