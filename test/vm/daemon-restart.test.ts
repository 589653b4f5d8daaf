/**
 * The daemon is restarted while a Linux guest writes to mounted filesystems: once after SIGTERM, once after SIGKILL, when the
 * disks have grown as well. The guest attaches with examples/nbd-attach.c, over several connections and over one.
 */
import net from 'node:net';
import { expect, onTestFinished, test } from 'vitest';
import { cliJson, startDaemon, type Daemon } from '../harness/daemon.js';
import { bootGuest, guestProblem, triesKernel } from './guest.js';

const MIB = 2 ** 20;
const SIZE = 128 * MIB;
const GROWN = 192 * MIB;
/** Of the disk without a filesystem, which the guest reads as a whole. */
const SMALL_SIZE = 16 * MIB;
const SMALL_GROWN = 24 * MIB;
const problem = guestProblem();
if (problem !== undefined) console.log(`skipped: no Linux guest: ${problem}`);

/** Two disks, each with a filesystem, a writer, and the hashes of the files that the writer has synced. */
const job = (port: number, relay: number): string => `
attach() { nbd-attach -t 3 -d 120 "$@" 2>> /tmp/attach || fail attach: $(cat /tmp/attach); }
attach -c 4 10.0.2.2:${port} four /dev/nbd0
attach 10.0.2.2:${port} one /dev/nbd1
grep -q "4 connections" /tmp/attach || fail $(cat /tmp/attach)
nbd-attach 10.0.2.2:${port} nosuch /dev/nbd2 2> /tmp/refused && fail attached what is not there
grep -q "the server refuses 'nosuch'" /tmp/refused || fail $(cat /tmp/refused)
for n in 0 1; do
  mkfs.ext4 -q -E lazy_itable_init=1,lazy_journal_init=1 /dev/nbd$n 2> /tmp/mkfs || fail mkfs: $(cat /tmp/mkfs)
  mkdir -p /mnt/$n
  mount -t ext4 /dev/nbd$n /mnt/$n || fail mount
done

writer() {
  count=0
  while [ ! -e /tmp/stop ]; do
    count=$((count + 1))
    file=/mnt/$1/$((count % 40))
    dd if=/dev/urandom of=/tmp/data.$1 bs=64k count=1 2>/dev/null
    dd if=/tmp/data.$1 of=$file bs=16k conv=fsync 2>/tmp/dd.$1 || { cat /tmp/dd.$1 > /tmp/failed; break; }
    sum=$(sha256sum < /tmp/data.$1)
    echo "\${sum%% *}  $((count % 40))" > /tmp/sums.$1/$((count % 40))
    echo $count > /tmp/written.$1
    sleep 0.05
  done
  touch /tmp/ended.$1
}
# Wait until each writer has made some more files, all of them begun after this was asked.
progress() {
  for n in 0 1; do
    target=$(($(cat /tmp/written.$n 2>/dev/null || echo 0) + $1))
    until [ "$(cat /tmp/written.$n 2>/dev/null || echo 0)" -ge $target ] || [ -e /tmp/failed ]; do sleep 0.1; done
  done
  [ -e /tmp/failed ] && fail the writer: $(cat /tmp/failed) $(dmesg | tail -n 5)
}
mkdir /tmp/sums.0 /tmp/sums.1
writer 0 &
writer 1 &
progress 5
say WRITING
for death in SIGTERM SIGKILL; do
  wait_for back
  progress 5
  say AGAIN
done

# The disks have grown while the daemon was away: the devices do so, too, under their filesystems.
said() { tries=0; until grep -q "$1" /tmp/attach; do sleep 0.1; tries=$((tries + 1)); [ $tries = 200 ] && fail it does not say "$1": $(cat /tmp/attach); done; }
for n in 0 1; do
  said "nbd$n: has grown to ${GROWN} bytes"
  [ "$(blockdev --getsize64 /dev/nbd$n)" = ${GROWN} ] || fail the device has $(blockdev --getsize64 /dev/nbd$n) bytes
  resize2fs /dev/nbd$n > /tmp/resize 2>&1 || fail resize2fs: $(cat /tmp/resize)
  blocks=$(stat -f -c %b /mnt/$n)
  [ $((blocks * $(stat -f -c %S /mnt/$n))) -gt ${SIZE} ] || fail the filesystem has $blocks blocks
  dd if=/dev/nbd$n of=/dev/null bs=1M skip=${SIZE / MIB} count=8 iflag=direct 2>/tmp/dd.$n.behind || fail reading behind the old end: $(cat /tmp/dd.$n.behind)
done
progress 5
say GROWN

touch /tmp/stop
for n in 0 1; do while [ ! -e /tmp/ended.$n ]; do sleep 0.1; done; done
[ -e /tmp/failed ] && fail the writer: $(cat /tmp/failed)
[ "$(grep -c 'connected again' /tmp/attach)" -ge 4 ] || fail $(cat /tmp/attach)
for n in 0 1; do
  grep -q "^/dev/nbd$n /mnt/$n ext4 rw" /proc/mounts || fail $(cat /proc/mounts)
  touch /mnt/$n/writable || fail the filesystem is not writable
  sync
  umount /mnt/$n || fail umount
  echo 3 > /proc/sys/vm/drop_caches
  e2fsck -f -n /dev/nbd$n > /tmp/fsck 2>&1 || fail e2fsck: $(cat /tmp/fsck)
  mount -t ext4 -o ro /dev/nbd$n /mnt/$n || fail mounting it again
  cat /tmp/sums.$n/* > /tmp/all-sums
  (cd /mnt/$n && sha256sum -c /tmp/all-sums > /tmp/checked 2>&1) || fail files of disk $n are not what was synced: $(grep -v OK /tmp/checked)
  umount /mnt/$n
done
dmesg | grep -iE 'i/o error|EXT4-fs (error|warning)|remounting' > /tmp/errors && fail $(cat /tmp/errors)

# how it ends: asked to, asked to while in use, and because another program has detached the device
kill $(cat /run/nbd-attach.nbd0.pid)
said 'nbd0: detached'
[ -e /sys/block/nbd0/pid ] && fail nbd0 is still attached
mount -t ext4 -o ro /dev/nbd1 /mnt/1
kill $(cat /run/nbd-attach.nbd1.pid)
said 'nbd1: is in use and stays attached'
ls /mnt/1 > /tmp/list && grep -q writable /tmp/list || fail the mounted device is gone
umount /mnt/1
nbd-client -d /dev/nbd1 > /dev/null
# One that has become smaller is not taken, and is again once it has its size back.
attach 10.0.2.2:${port} small /dev/nbd1
say SMALL
said "nbd1: 'small' has become smaller, ${SMALL_SIZE / 2} bytes instead of ${SMALL_SIZE}, and is not used"
say SMALLER
wait_for whole
said 'nbd1: connected again'
[ "$(blockdev --getsize64 /dev/nbd1)" = ${SMALL_SIZE} ] || fail the device has $(blockdev --getsize64 /dev/nbd1) bytes
dd if=/dev/nbd1 of=/dev/null bs=1M 2>/tmp/dd.small || fail reading it: $(cat /tmp/dd.small)
nbd-client -d /dev/nbd1 > /dev/null
# With several connections the device grows once all of them know of it, and not before: the others refuse what is behind.
# Who had attached it before may not have noticed yet that it is another's now, and keeps its hands off it.
: > /tmp/attach
attach -c 2 10.0.2.2:${relay} small /dev/nbd1
say CONNECTED
said 'nbd1: connected again'
say AGAIN
said "nbd1: has grown to ${SMALL_GROWN} bytes"
[ "$(grep -c 'connected again' /tmp/attach)" = 2 ] || fail it has grown too early: $(cat /tmp/attach)
dd if=/dev/urandom of=/dev/nbd1 bs=1M seek=${SMALL_SIZE / MIB} count=8 oflag=direct 2>/tmp/dd.small || fail writing behind the old end: $(cat /tmp/dd.small)
[ "$(cat /run/nbd-attach.nbd1.pid)" -gt 0 ] || fail the file with the number of the process is gone
nbd-client -d /dev/nbd1 > /dev/null
said 'nbd1: was detached by another program'
: > /tmp/attach
attach -r 10.0.2.2:${port} one /dev/nbd1
[ "$(cat /sys/block/nbd1/ro)" = 1 ] || fail the device is not read-only
nbd-client -d /dev/nbd1 > /dev/null
said 'nbd1: was detached by another program'
say CLEAN $(cat /tmp/written.0) and $(cat /tmp/written.1) files
`;

/** A proxy that forwards connections to `port`. */
async function startRelay(port: number): Promise<{ port: number; cutOldest: () => void }> {
  const sockets: net.Socket[] = [];
  const server = net.createServer((client) => {
    const upstream = net.connect(port, '127.0.0.1');
    sockets.push(client);
    for (const [from, to] of [
      [client, upstream],
      [upstream, client],
    ] as const) {
      from.pipe(to).on('error', () => undefined);
      from.on('close', () => to.destroy());
    }
  });
  onTestFinished(() => {
    server.close();
    for (const socket of sockets) socket.destroy();
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  return { port: (server.address() as net.AddressInfo).port, cutOldest: () => sockets.shift()?.destroy() };
}

(problem === undefined ? test : test.skip)(
  'the daemon is stopped and killed under mounted filesystems and comes back, with larger disks, too: no error, nothing lost',
  async (context) => {
    let daemon: Daemon = await startDaemon({
      args: [
        '--listen',
        'tcp:127.0.0.1:0',
        ...[`four:${SIZE}`, `one:${SIZE}`, `small:${SMALL_SIZE}`].flatMap((disk) => ['--create', disk]),
      ],
    });
    const { store } = daemon;
    const port = Number(/tcp:127\.0\.0\.1:(\d+)/.exec(daemon.ready.listeners.join(' '))?.[1]);
    const relay = await startRelay(port);
    const guest = await bootGuest(job(port, relay.port));
    triesKernel(context, guest);
    await guest.expect('WRITING');
    const resize = (name: string, size: number, ...options: string[]): Promise<unknown> =>
      cliJson(['vdi', 'resize', name, String(size), ...options], { store });
    const comeBack = async (): Promise<void> => {
      daemon = await startDaemon({ store, args: ['--listen', `tcp:127.0.0.1:${port}`] });
    };
    for (const end of [() => daemon.stop(), () => daemon.kill()]) {
      await end();
      await comeBack();
      guest.send('back');
      await guest.expect('AGAIN');
    }
    await daemon.stop();
    for (const name of ['four', 'one']) await resize(name, GROWN);
    await comeBack();
    await guest.expect('GROWN');
    await guest.expect('SMALL');
    await daemon.stop();
    await resize('small', SMALL_SIZE / 2, '--force', '--force-in-use');
    await comeBack();
    await guest.expect('SMALLER');
    await daemon.stop();
    await resize('small', SMALL_SIZE);
    await comeBack();
    guest.send('whole');
    await guest.expect('CONNECTED');
    await resize('small', SMALL_GROWN);
    relay.cutOldest();
    await guest.expect('AGAIN');
    relay.cutOldest();
    await guest.expect('CLEAN');
    await guest.end();
    expect((await daemon.stop()).code, daemon.log()).toBe(0);
  },
  5 * 60_000,
);
