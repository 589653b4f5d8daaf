/**
 * The Linux kernel as client: a guest attaches VDIs with nbd-client, puts a filesystem on one and works in it, while a
 * temporary snapshot of it is mounted beside it and copied away with rsync.
 */
import { execFileSync } from 'node:child_process';
import { expect, test } from 'vitest';
import { cliJson, startDaemon, waitUntil } from '../harness/daemon.js';
import { bootGuest, guestProblem } from './guest.js';

const MIB = 2 ** 20;
const problem = guestProblem();
if (problem !== undefined) console.log(`skipped: no Linux guest: ${problem}`);

const attach = (port: number, name: string, device: string, options = ''): string =>
  `nbd-client 10.0.2.2 ${port} ${device} -N ${name} ${options} > /tmp/attach 2>&1 || fail attach ${name}: $(cat /tmp/attach)`;

const job = (port: number): string => `
# block sizes and a read-only snapshot
for size in 512 4096; do
  ${attach(port, 'plain', '/dev/nbd2', '-b $size')}
  [ "$(cat /sys/block/nbd2/queue/logical_block_size)" = $size ] || fail block size $size
  dd if=/dev/urandom of=/tmp/block bs=$size count=64 2>/dev/null
  dd if=/tmp/block of=/dev/nbd2 bs=$size seek=3 conv=fsync 2>/dev/null || fail write with blocks of $size
  echo 3 > /proc/sys/vm/drop_caches
  dd if=/dev/nbd2 bs=$size skip=3 count=64 2>/dev/null | cmp - /tmp/block || fail read with blocks of $size
  nbd-client -d /dev/nbd2 > /dev/null || fail detach
done
${attach(port, 'plain@before', '/dev/nbd2', '-R')}
[ "$(cat /sys/block/nbd2/ro)" = 1 ] || fail the snapshot is not read-only
dd if=/dev/nbd2 bs=4096 count=256 2>/dev/null | tr -d '\\000' | wc -c | grep -qx 0 || fail the snapshot has changed
nbd-client -d /dev/nbd2 > /dev/null
say ATTACHED

# a filesystem over four connections, with files whose hashes are known
${attach(port, 'disk', '/dev/nbd0', '-C 4')}
mkfs.ext4 -q -E lazy_itable_init=1,lazy_journal_init=1,discard /dev/nbd0 2> /tmp/mkfs || fail mkfs: $(cat /tmp/mkfs)
mount -t ext4 -o discard /dev/nbd0 /mnt || fail mount
mkdir /mnt/kept
for n in 1 2 3 4 5 6 7 8; do dd if=/dev/urandom of=/mnt/kept/$n bs=64k count=16 2>/dev/null; done
(cd /mnt/kept && sha256sum *) > /tmp/kept.sums
sync

# a writer for the rest of the test
mkdir /mnt/live
( n=0
  while [ ! -e /tmp/stop ]; do
    n=$((n + 1))
    dd if=/dev/urandom of=/mnt/live/$((n % 24)) bs=32k count=8 conv=fsync 2>/dev/null || { echo "write $n" > /tmp/writer-failed; break; }
    echo $n > /tmp/written
  done
  echo done > /tmp/writer-ended
) &
while [ ! -e /tmp/written ]; do sleep 0.1; done
say WRITING

# the 2010 request: a snapshot from outside, mounted, copied, dropped
${attach(port, 'disk@now', '/dev/nbd1', '-R')}
mount -t ext4 -o ro,noload /dev/nbd1 /snap || fail mounting the snapshot
before=$(cat /tmp/written)
mkdir /tmp/copy
rsync -a /snap/kept/ /tmp/copy/ || fail rsync
(cd /tmp/copy && sha256sum -c /tmp/kept.sums > /dev/null) || fail the copy differs
while [ "$(cat /tmp/written)" = "$before" ]; do sleep 0.1; done
umount /snap
nbd-client -d /dev/nbd1 > /dev/null || fail detaching the snapshot
[ -e /tmp/writer-failed ] && fail the writer: $(cat /tmp/writer-failed)
say COPIED
wait_for go

touch /tmp/stop
while [ ! -e /tmp/writer-ended ]; do sleep 0.1; done
[ -e /tmp/writer-failed ] && fail the writer: $(cat /tmp/writer-failed)
dd if=/dev/zero of=/mnt/large bs=1M count=48 2>/dev/null
tr '\\000' x < /mnt/large > /mnt/filled
rm /mnt/large
sync
say FILLED
wait_for go
rm /mnt/filled
sync
fstrim /mnt || fail fstrim
sync
say TRIMMED
wait_for go
umount /mnt || fail umount
e2fsck -f -n /dev/nbd0 > /tmp/fsck 2>&1 || fail e2fsck: $(cat /tmp/fsck)
dmesg | grep -iE 'i/o error|nbd.*(error|timed out)|EXT4-fs error' > /tmp/errors && fail $(cat /tmp/errors)
nbd-client -d /dev/nbd0 > /dev/null
say CLEAN
`;

(problem === undefined ? test : test.skip)(
  'a guest writes to its disk over the kernel client while a snapshot of it is mounted, copied and dropped',
  async () => {
    const daemon = await startDaemon({
      args: ['--listen', 'tcp:127.0.0.1:0', '--create', 'plain:64M', '--create', 'disk:1G'],
    });
    const { store } = daemon;
    await cliJson(['vdi', 'snapshot', 'plain', 'before'], { store });
    const port = Number(/tcp:127\.0\.0\.1:(\d+)/.exec(daemon.ready.listeners.join(' '))?.[1]);
    const used = (): number => Number(execFileSync('du', ['-s', '-B1', store], { encoding: 'utf8' }).split('\t')[0]);
    const guest = bootGuest(job(port));
    await guest.expect('ATTACHED');
    await guest.expect('WRITING');
    await guest.expect('COPIED');
    const tags = async (): Promise<(string | null)[]> =>
      (await cliJson<{ name: string; tag: string | null }[]>(['vdi', 'list'], { store }))
        .filter(({ name }) => name === 'disk')
        .map(({ tag }) => tag);
    await waitUntil(async () => (await tags()).length === 1, 'the temporary snapshot is gone after the detach');
    guest.send('go');
    await guest.expect('FILLED');
    const filled = used();
    guest.send('go');
    await guest.expect('TRIMMED');
    await waitUntil(() => used() < filled - 40 * MIB, 'fstrim in the guest gives the space back on the host');
    guest.send('go');
    await guest.expect('CLEAN');
    await guest.end();
    expect((await daemon.stop()).code, daemon.log()).toBe(0);
  },
  5 * 60_000,
);
