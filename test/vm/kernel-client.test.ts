/**
 * The Linux kernel as client. One guest attaches VDIs with nbd-client, makes a filesystem on one and writes files, while it
 * mounts a temporary snapshot of the VDI and copies it with rsync. Another guest trims and zeroes ranges, on a bare device
 * and under xfs, and detaches and attaches in between.
 */
import { execFileSync } from 'node:child_process';
import { expect, test } from 'vitest';
import { ControlClient } from '../../src/operations/control-client.js';
import { cliJson, startDaemon, waitUntil, type Daemon } from '../harness/daemon.js';
import { bootGuest, guestProblem, triesKernel } from './guest.js';

const MIB = 2 ** 20;
/** The first Linux whose nbd driver sends WRITE_ZEROES to an export that offers it. */
const ZEROES_SINCE = [6, 12] as const;
const problem = guestProblem();
if (problem !== undefined) console.log(`skipped: no Linux guest: ${problem}`);

// Several connections: "-connections 4", as "-C 4" crashes nbd-client 3.27 (SIGSEGV).
const attach = (port: number, name: string, device: string, options = ''): string =>
  `nbd-client 10.0.2.2 ${port} ${device} -N ${name} ${options} > /tmp/attach 2>&1 || fail attach ${name}: $(cat /tmp/attach)`;

function portOf(daemon: Daemon): number {
  return Number(/tcp:127\.0\.0\.1:(\d+)/.exec(daemon.ready.listeners.join(' '))?.[1]);
}

/** Bytes that a store occupies on the host. */
function spaceOf(store: string): number {
  return Number(execFileSync('du', ['-s', '-B1', store], { encoding: 'utf8' }).split('\t')[0]);
}

function sendsZeroes(kernel: string): boolean {
  const [major = 0, minor = 0] = kernel.split('.').map(Number);
  return major > ZEROES_SINCE[0] || (major === ZEROES_SINCE[0] && minor >= ZEROES_SINCE[1]);
}

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
${attach(port, 'disk', '/dev/nbd0', '-connections 4')}
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
    dd if=/dev/urandom of=/mnt/live/$((n % 24)) bs=32k count=4 conv=fsync 2>/dev/null || { echo "write $n" > /tmp/writer-failed; break; }
    echo $n > /tmp/written
    sleep 0.05
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
dd if=/dev/zero of=/mnt/large bs=1M count=24 2>/dev/null
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
  async (context) => {
    const daemon = await startDaemon({
      args: ['--listen', 'tcp:127.0.0.1:0', '--create', 'plain:64M', '--create', 'disk:1G'],
    });
    const { store } = daemon;
    await cliJson(['vdi', 'snapshot', 'plain', 'before'], { store });
    const port = portOf(daemon);
    const used = (): number => spaceOf(store);
    const guest = await bootGuest(job(port));
    triesKernel(context, guest);
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
    await waitUntil(() => used() < filled - 20 * MIB, 'fstrim in the guest gives the space back on the host');
    guest.send('go');
    await guest.expect('CLEAN');
    await guest.end();
    expect((await daemon.stop()).code, daemon.log()).toBe(0);
  },
  5 * 60_000,
);

/** Each range that the guest trims or zeroes: one object of the disk. */
const STEP_MIB = 4;

/** Writes four steps on `zeros` and zeroes one after another; then uses a disk of 8 GiB, with xfs. */
const zeroingJob = (port: number): string => `
detach() {
  nbd-client -d $1 > /dev/null || fail detach $1
  while [ -e /sys/block/$(basename $1)/pid ]; do sleep 0.1; done
  echo 3 > /proc/sys/vm/drop_caches
}
zeros_in() { dd if=$1 bs=1M skip=$2 count=$3 2>/dev/null | cmp -s -n $(($3 * 1048576)) - /dev/zero || fail no zeros in $1 at $2 MiB; }
${attach(port, 'zeros', '/dev/nbd0')}
[ "$(cat /sys/block/nbd0/queue/write_cache)" = "write back" ] || fail the kernel sends no flushes
[ "$(cat /sys/block/nbd0/queue/fua)" = 1 ] || fail the kernel sends no FUA
[ "$(cat /sys/block/nbd0/queue/discard_max_bytes)" -gt 0 ] || fail the kernel does not trim
say OFFERED $(cat /sys/block/nbd0/queue/write_zeroes_max_bytes)
dd if=/dev/urandom of=/tmp/data bs=1M count=${4 * STEP_MIB} 2>/dev/null
dd if=/tmp/data of=/dev/nbd0 bs=1M conv=fsync 2>/dev/null || fail write
[ "$(awk '{ print $16 }' /sys/block/nbd0/stat)" -gt 0 ] || fail fsync has sent no flush
say WRITTEN
wait_for go
blkdiscard -o 0 -l ${STEP_MIB}M /dev/nbd0 || fail blkdiscard
say DONE
wait_for go
blkdiscard -z -o ${STEP_MIB}M -l ${STEP_MIB}M /dev/nbd0 || fail blkdiscard -z
say DONE
wait_for go
fallocate -p -o ${2 * STEP_MIB}M -l ${STEP_MIB}M /dev/nbd0 2> /tmp/punch && say DONE || say REFUSED $(cat /tmp/punch)
wait_for go
detach /dev/nbd0
${attach(port, 'zeros', '/dev/nbd0')}
zeros_in /dev/nbd0 0 ${2 * STEP_MIB}
[ -s /tmp/punch ] || zeros_in /dev/nbd0 ${2 * STEP_MIB} ${STEP_MIB}
for source in /tmp/data /dev/nbd0; do dd if=$source bs=1M skip=${3 * STEP_MIB} count=${STEP_MIB} 2>/dev/null | sha256sum; done | uniq | wc -l | grep -qx 1 ||
  fail what was not zeroed has changed
[ -s /tmp/punch ] && for source in /tmp/data /dev/nbd0; do dd if=$source bs=1M skip=${2 * STEP_MIB} count=${STEP_MIB} 2>/dev/null | sha256sum; done | uniq | wc -l | grep -qx 2 &&
  fail what was refused was done all the same
detach /dev/nbd0
rm /tmp/data
say REATTACHED
wait_for go

# the largest requests there are: the kernel cuts at 4 GiB less a sector
${attach(port, 'large', '/dev/nbd1')}
for place in 0 4095 4096 8191; do
  dd if=/dev/urandom of=/dev/nbd1 bs=1M seek=$place count=1 conv=fsync 2>/dev/null || fail write at $place MiB
done
if [ ! -s /tmp/punch ]; then
  fallocate -p -o 0 -l 8G /dev/nbd1 || fail punching 8 GiB
else
  blkdiscard /dev/nbd1 || fail trimming 8 GiB
fi
for place in 0 4095 4096 8191; do zeros_in /dev/nbd1 $place 1; done
detach /dev/nbd1
say LARGE

load_module xfs
${attach(port, 'files', '/dev/nbd2')}
mkfs.xfs -q /dev/nbd2 > /tmp/mkfs 2>&1 || fail mkfs.xfs: $(cat /tmp/mkfs)
say FORMATTED
wait_for go
mount -t xfs /dev/nbd2 /mnt || fail mount
for n in 1 2 3 4 5 6 7 8; do dd if=/dev/urandom of=/mnt/$n bs=1M count=2 conv=fsync 2>/dev/null || fail write; done
(cd /mnt && sha256sum *) > /tmp/sums
umount /mnt || fail umount
detach /dev/nbd2
${attach(port, 'files', '/dev/nbd2', '-connections 2')}
mount -t xfs /dev/nbd2 /mnt || fail mounting it again
(cd /mnt && sha256sum -c /tmp/sums > /dev/null) || fail the files differ
say FILLED
wait_for go
rm /mnt/*
# xfs frees the blocks of removed files later; unmounting waits for that.
umount /mnt && mount -t xfs /dev/nbd2 /mnt || fail mounting it a third time
fstrim /mnt || fail fstrim
say DONE
wait_for go
umount /mnt || fail umount
xfs_repair -n /dev/nbd2 > /tmp/repair 2>&1 || fail xfs_repair: $(cat /tmp/repair)
detach /dev/nbd2
dmesg | grep -iE 'i/o error|nbd.*(error|timed out)|XFS.*(error|corrupt)' > /tmp/errors && fail $(cat /tmp/errors)
say CLEAN
`;

(problem === undefined ? test : test.skip)(
  'trimmed and punched ranges free their space, zeroed ranges keep it, and a kernel with WRITE_ZEROES sends no zeros',
  async (context) => {
    const disks = ['zeros:64M', 'large:8G', 'files:1G'].flatMap((disk) => ['--create', disk]);
    const daemon = await startDaemon({ args: ['--listen', 'tcp:127.0.0.1:0', ...disks] });
    const used = (): number => spaceOf(daemon.store);
    const control = new ControlClient(daemon.control);
    const written = async (name: string): Promise<number> =>
      (await control.status()).connections
        .filter((connection) => connection.export === name)
        .reduce((sum, { bytesWritten }) => sum + bytesWritten, 0);
    const guest = await bootGuest(zeroingJob(portOf(daemon)));
    triesKernel(context, guest);
    const sends = sendsZeroes(guest.kernel);

    const maxBytes = Number(await guest.expect('OFFERED'));
    if (sends) expect(maxBytes).toBeGreaterThan(0);
    else {
      expect(maxBytes).toBe(0);
      console.log(
        `Linux ${guest.kernel} knows no WRITE_ZEROES (it came with ${ZEROES_SINCE.join('.')}): its fallback is tried`,
      );
    }
    await guest.expect('WRITTEN');
    expect(await written('zeros')).toBe(4 * STEP_MIB * MIB);

    // Space is freed in the background.
    const full = used();
    const lessByMib = (mib: number): Promise<boolean> =>
      waitUntil(() => full - used() > (mib - 1) * MIB, `the store is ${mib} MiB smaller`);
    guest.send('go');
    await guest.expect('DONE');
    await lessByMib(STEP_MIB);
    expect(await written('zeros')).toBe(4 * STEP_MIB * MIB);

    // The kernel asks for zeros that stay allocated (NO_HOLE), or writes them itself.
    guest.send('go');
    await guest.expect('DONE');
    expect(await written('zeros')).toBe((sends ? 4 : 5) * STEP_MIB * MIB);

    guest.send('go');
    if (sends) {
      await guest.expect('DONE');
      await lessByMib(2 * STEP_MIB);
      expect(await written('zeros')).toBe(4 * STEP_MIB * MIB);
    } else {
      expect(await guest.expect('REFUSED')).toMatch(/unsupported|not supported/);
    }
    guest.send('go');
    await guest.expect('REATTACHED');
    expect(full - used(), 'what was zeroed keeps its space').toBeLessThan(((sends ? 2 : 1) * STEP_MIB + 1) * MIB);
    guest.send('go');
    await guest.expect('LARGE');

    await guest.expect('FORMATTED');
    // mkfs.xfs zeroes its log of 64 MiB.
    if (sends) expect(await written('files')).toBeLessThan(8 * MIB);
    guest.send('go');
    await guest.expect('FILLED');
    const filled = used();
    guest.send('go');
    await guest.expect('DONE');
    await waitUntil(() => used() < filled - 14 * MIB, 'fstrim of xfs gives the space back');
    guest.send('go');
    await guest.expect('CLEAN');
    await guest.end();
    expect((await daemon.stop()).code, daemon.log()).toBe(0);
  },
  5 * 60_000,
);
