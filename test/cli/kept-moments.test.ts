/**
 * NAME@now and NAME@now:LABEL when connections break: a client gets the same point in time again, or an
 * error; never another point in time.
 */
import path from 'node:path';
import { expect, onTestFinished, test } from 'vitest';
import { NbdClient } from 'nbd-server-ts';
import { startDaemon, temporaryDirectory, waitUntil, type Daemon } from '../harness/daemon.js';
import { startStandIn } from '../sheep/clusters.js';
import { expectBytes, MIB, patterned, storeWith, type TestStore } from './both-ways.js';

const SIZE = MIB;

interface Served {
  readonly daemon: Daemon;
  readonly target: TestStore;
  readonly writer: NbdClient;
}

interface Sharing extends Served {
  /** Its name, which no other test uses. */
  readonly disk: string;
  /** The names in the store that belong to the disk. */
  names(): Promise<string[]>;
}

async function connect(daemon: Daemon): Promise<NbdClient> {
  return NbdClient.connect({ path: daemon.socket });
}

async function attach(daemon: Daemon, name: string): Promise<NbdClient> {
  const client = await connect(daemon);
  try {
    await client.go(name);
  } catch (error) {
    client.destroy();
    throw error;
  }
  return client;
}

/** A disk that holds patterned(SIZE, 1), and a client that continues to write it. */
async function served(args: readonly string[] = []): Promise<Served> {
  const daemon = await startDaemon({ args: ['--create', `disk:${SIZE}`, ...args] });
  const writer = await attach(daemon, 'disk');
  await fill(writer, 1);
  return { daemon, target: storeWith(daemon.store, daemon), writer };
}

let shared: Daemon | undefined;
let disks = 0;

/** The same disk in a daemon that serves several tests: only for a test that leaves the daemon running. */
async function sharing(): Promise<Sharing> {
  const daemon = (shared ??= await startDaemon({ args: ['--listen', 'tcp:127.0.0.1:0'] }));
  const target = storeWith(daemon.store, daemon);
  const disk = `disk${++disks}`;
  await target.ok('vdi', 'create', disk, String(SIZE));
  const writer = await attach(daemon, disk);
  onTestFinished(() => writer.destroy());
  await fill(writer, 1);
  const names = async (): Promise<string[]> => (await target.names()).filter((name) => name.split('@')[0] === disk);
  return { daemon, target, writer, disk, names };
}

async function fill(writer: NbdClient, seed: number): Promise<void> {
  await writer.write(0, patterned(SIZE, seed));
  await writer.flush();
}

async function content(client: NbdClient): Promise<Buffer> {
  const data = Buffer.alloc(SIZE);
  await client.readInto(0, data);
  return data;
}

const isMoment = async (client: NbdClient, seed: number): Promise<void> =>
  expectBytes(await content(client), patterned(SIZE, seed));

/** Break the connection, and wait until the daemon has noticed. */
async function lose(target: TestStore, spec: string, client: NbdClient): Promise<void> {
  client.destroy();
  await waitUntil(async () => /kept/.test((await target.run(['vdi', 'show', spec])).stdout), `${spec} is kept`);
}

const isGone = (target: TestStore, spec: string): Promise<unknown> =>
  waitUntil(async () => !(await target.names()).includes(spec), `${spec} is gone`);

async function restarted(daemon: Daemon, args: readonly string[] = []): Promise<Daemon> {
  return startDaemon({ store: daemon.store, args });
}

for (const tag of ['now', 'now:run1']) {
  test(`NAME@${tag}: a client that was cut off and comes back gets the same snapshot again`, async () => {
    const { daemon, target, writer, disk } = await sharing();
    const spec = `${disk}@${tag}`;
    const reader = await attach(daemon, spec);
    await lose(target, spec, reader);
    await fill(writer, 2);
    expect(await target.ok('vdi', 'show', spec)).toMatch(
      new RegExp(`kept +${disk}@now\\S* of \\S+ for process \\d+ \\(.+\\), until \\S+\n`),
    );
    expect(await target.ok('vdi', 'show', disk)).toMatch(new RegExp(`kept +${disk}@now`));
    const again = await attach(daemon, spec);
    await isMoment(again, 1);
    await again.disconnect();
    await isGone(target, spec);
  });

  test(`NAME@${tag}: a client that disconnects in order ends the snapshot at once`, async () => {
    const { daemon, target, disk } = await sharing();
    const spec = `${disk}@${tag}`;
    const reader = await attach(daemon, spec);
    await reader.disconnect();
    await isGone(target, spec);
  });
}

test('NAME@now: after --keep-now the snapshot ends, and the next open takes a new one', async () => {
  const { daemon, target, writer } = await served(['--keep-now', '1']);
  const reader = await attach(daemon, 'disk@now');
  reader.destroy();
  await isGone(target, 'disk@now');
  await fill(writer, 2);
  const again = await attach(daemon, 'disk@now');
  await isMoment(again, 2);
  await again.disconnect();
});

test('a label that has ended never stands for another point in time: after its time limit, a restart, or an orderly end', async () => {
  const { daemon, target, writer } = await served(['--keep-now', '1']);
  const late = await attach(daemon, 'disk@now:late');
  late.destroy();
  await isGone(target, 'disk@now:late');
  await fill(writer, 2);
  await expect(attach(daemon, 'disk@now:late')).rejects.toThrow(
    /disk@now:late was a temporary snapshot of .* that has ended \(its client was cut off and did not come back in time\)/,
  );
  const orderly = await attach(daemon, 'disk@now:orderly');
  await orderly.disconnect();
  await isGone(target, 'disk@now:orderly');
  await expect(attach(daemon, 'disk@now:orderly')).rejects.toThrow(/has ended \(it was read to its end\)/);
  const killed = await attach(daemon, 'disk@now:killed');
  await daemon.kill();
  killed.destroy();
  writer.destroy();
  for (const end of [(d: Daemon) => d.kill(), (d: Daemon) => d.stop()]) {
    const again = await restarted(daemon);
    for (const name of ['late', 'orderly', 'killed']) {
      await expect(attach(again, `disk@now:${name}`), name).rejects.toThrow(
        /has ended .*start again with another label/,
      );
    }
    const fresh = await attach(again, `disk@now:fresh${again.child.pid}`);
    await isMoment(fresh, 2);
    await fresh.disconnect();
    await end(again);
  }
});

for (const how of ['SIGKILL', 'SIGTERM'] as const) {
  test(`NAME@now after ${how} of the daemon: its reader is refused at each attempt, and the reason is logged once`, async () => {
    const { daemon, writer } = await served();
    const reader = await attach(daemon, 'disk@now');
    await (how === 'SIGKILL' ? daemon.kill() : daemon.stop());
    reader.destroy();
    writer.destroy();
    const again = await restarted(daemon);
    for (let attempt = 0; attempt < 3; attempt++) {
      const asking = await connect(again);
      await expect(asking.info('disk@now')).rejects.toThrow(/the daemon ended/);
      asking.destroy();
      await expect(attach(again, 'disk@now')).rejects.toThrow(
        /disk@now of \S+, which process \d+ .* was reading, has ended \(the daemon ended\).*two points in time in one image/,
      );
    }
    expect(again.log().match(/refused: disk@now/g)).toHaveLength(1);
    const labelled = await attach(again, 'disk@now:mine');
    await isMoment(labelled, 1);
    await labelled.disconnect();
    await again.stop();
  });
}

test('NAME@now after a restart: a client that had left in order, or comes from elsewhere, is not refused', async () => {
  const { daemon, writer } = await served(['--listen', 'tcp:127.0.0.1:0']);
  const orderly = await attach(daemon, 'disk@now');
  await orderly.disconnect();
  const port = Number(/:(\d+)$/.exec(daemon.ready.listeners.find((each) => each.startsWith('tcp')) ?? '')?.[1]);
  const elsewhere = await NbdClient.connect({ host: '127.0.0.1', port });
  await elsewhere.go('disk@now');
  // An orderly disconnect is stored soon after, and at a stop: a kill before that refuses once too often, never too seldom.
  await daemon.stop();
  elsewhere.destroy();
  writer.destroy();
  const again = await restarted(daemon, ['--listen', `tcp:127.0.0.1:${port}`]);
  const reader = await attach(again, 'disk@now');
  await reader.disconnect();
  const back = await NbdClient.connect({ host: '127.0.0.1', port });
  await expect(back.go('disk@now')).rejects.toThrow(/which tcp 127\.0\.0\.1 was reading, has ended/);
  back.destroy();
});

test('one of four connections is lost and comes back, although the other three have disconnected in order', async () => {
  const { daemon, target, writer, disk } = await sharing();
  const four = [];
  for (let n = 0; n < 4; n++) four.push(await attach(daemon, `${disk}@now`));
  await fill(writer, 2);
  // They are open at the same time: the daemon must not take one of them for another that comes back.
  for (const each of four) await isMoment(each, 1);
  four[0]?.destroy();
  for (const other of four.slice(1)) await other.disconnect();
  await waitUntil(async () => /kept/.test(await target.ok('vdi', 'show', `${disk}@now`)), 'it is kept');
  await fill(writer, 3);
  const back = await attach(daemon, `${disk}@now`);
  await isMoment(back, 1);
  await back.disconnect();
  await isGone(target, `${disk}@now`);
});

test('several clients of one label: while one of them may come back, no client gets another point in time', async () => {
  const { daemon, target, writer, disk } = await sharing();
  const port = Number(/:(\d+)$/.exec(daemon.ready.listeners.find((each) => each.startsWith('tcp')) ?? '')?.[1]);
  const first = await attach(daemon, `${disk}@now:run`);
  const second = await NbdClient.connect({ host: '127.0.0.1', port });
  await second.go(`${disk}@now:run`);
  await fill(writer, 2);
  second.destroy();
  await isMoment(first, 1);
  await first.disconnect();
  await waitUntil(async () => /kept +.* for tcp 127/.test(await target.ok('vdi', 'show', `${disk}@now:run`)), 'kept');
  const third = await attach(daemon, `${disk}@now:run`);
  await isMoment(third, 1);
  await third.disconnect();
  const back = await NbdClient.connect({ host: '127.0.0.1', port });
  await back.go(`${disk}@now:run`);
  await isMoment(back, 1);
  await back.disconnect();
  await isGone(target, `${disk}@now:run`);
});

test('a snapshot that is kept for one client is not given to another client, which gets its own', async () => {
  const { daemon, target, writer, disk, names } = await sharing();
  const port = Number(/:(\d+)$/.exec(daemon.ready.listeners.find((each) => each.startsWith('tcp')) ?? '')?.[1]);
  const mine = await attach(daemon, `${disk}@now`);
  await lose(target, `${disk}@now`, mine);
  await fill(writer, 2);
  const other = await NbdClient.connect({ host: '127.0.0.1', port });
  await other.go(`${disk}@now`);
  await isMoment(other, 2);
  expect((await names()).filter((name) => name === `${disk}@now`)).toHaveLength(2);
  const back = await attach(daemon, `${disk}@now`);
  await isMoment(back, 1);
  await isMoment(other, 2);
  await back.disconnect();
  await other.disconnect();
  await isGone(target, `${disk}@now`);
});

test('NBD_OPT_INFO reports the size and time of the snapshot that GO then opens, also after a resize in between', async () => {
  const { daemon, target, writer, disk } = await sharing();
  const asking = await connect(daemon);
  const told = await asking.info(`${disk}@now`);
  await target.ok('vdi', 'resize', disk, '16M');
  await fill(writer, 2);
  const given = await asking.go(`${disk}@now`);
  expect(given).toMatchObject({ size: told.size, description: told.description });
  await isMoment(asking, 1);
  // A snapshot that is kept for its client has its own size and time.
  await lose(target, `${disk}@now`, asking);
  const back = await connect(daemon);
  expect(await back.info(`${disk}@now`)).toMatchObject({ size: told.size, description: told.description });
  await back.go(`${disk}@now`);
  await isMoment(back, 1);
  await back.disconnect();
  // A client that only asks leaves no snapshot, and does not use up a label.
  const curious = await connect(daemon);
  expect(await curious.info(`${disk}@now:later`)).toMatchObject({ size: 16 * MIB });
  curious.destroy();
  await isGone(target, `${disk}@now:later`);
  const user = await attach(daemon, `${disk}@now:later`);
  await user.disconnect();
});

test('vdi delete, rollback and check end kept snapshots and report it; a client that comes back gets an error', async () => {
  const { daemon, target, writer } = await served();
  await target.ok('vdi', 'snapshot', 'disk', 'before');
  await writer.disconnect();
  const ended = (spec: string): RegExp => new RegExp(`^ended ${spec} of \\S+, kept for process \\d+ .* until \\S+\\n`);
  const keep = async (spec: string): Promise<void> => lose(target, spec, await attach(daemon, spec));

  await keep('disk@now');
  expect(await target.ok('vdi', 'delete', 'disk@now')).toMatch(ended('disk@now'));
  await expect(attach(daemon, 'disk@now')).rejects.toThrow(/has ended \(disk@now was deleted\)/);
  await keep('disk@now:two');
  expect(await target.ok('vdi', 'rollback', 'disk@before')).toMatch(ended('disk@now:two'));
  await expect(attach(daemon, 'disk@now:two')).rejects.toThrow(/has ended \(disk was rolled back\)/);
  await keep('disk@now:three');
  expect(await target.ok('check')).toMatch(ended('disk@now:three'));
  await expect(attach(daemon, 'disk@now:three')).rejects.toThrow(/has ended \(the store was checked\)/);
  await keep('disk@now:four');
  const deleted = await target.json<{ ended: object[] }>('vdi', 'delete', 'disk');
  expect(deleted.ended).toMatchObject([{ snapshot: 'disk@now:four' }]);
  expect(await target.names()).toEqual(['disk@before']);
});

test('at most four snapshots of a disk are kept; a client of one that had to end gets an error', async () => {
  const { daemon, target, disk, names } = await sharing();
  for (let n = 0; n < 6; n++) await lose(target, `${disk}@now:${n}`, await attach(daemon, `${disk}@now:${n}`));
  await waitUntil(async () => (await names()).length === 5, 'four are kept');
  await expect(attach(daemon, `${disk}@now:0`)).rejects.toThrow(/too many of its disk were kept/);
  const last = await attach(daemon, `${disk}@now:5`);
  await last.disconnect();
});

test('with --keep-now 0 no snapshot is kept, and a client that comes back gets an error instead of another point in time', async () => {
  const { daemon, target } = await served(['--keep-now', '0']);
  for (const spec of ['disk@now', 'disk@now:run']) {
    const reader = await attach(daemon, spec);
    reader.destroy();
    await isGone(target, spec);
    await expect(attach(daemon, spec)).rejects.toThrow(/its client was cut off/);
  }
});

test('time in which the daemon is stopped (SIGSTOP) does not count against its clients', async () => {
  const { daemon, target, writer } = await served(['--keep-now', '3']);
  const reader = await attach(daemon, 'disk@now:run');
  await lose(target, 'disk@now:run', reader);
  daemon.child.kill('SIGSTOP');
  const begin = Date.now();
  await waitUntil(() => Date.now() - begin > 3_500, 'it was stopped for longer than that');
  daemon.child.kill('SIGCONT');
  const back = await attach(daemon, 'disk@now:run');
  await fill(writer, 2);
  await isMoment(back, 1);
  await back.disconnect();
});

test('commands of sheepgate leave no snapshot behind, and a label in a command stands for one point in time', async () => {
  const { target, disk, names } = await sharing();
  const image = path.join(temporaryDirectory(), 'image');
  for (const spec of [`${disk}@now`, `${disk}@now`, `${disk}@now:mine`]) {
    expect((await target.run(['export', spec, image, '--force'])).code).toBe(0);
    expect(await names()).toEqual([disk]);
  }
  expect(await target.fails('export', `${disk}@now:mine`, image, '--force')).toMatch(
    new RegExp(`${disk}@now:mine was a temporary snapshot of .* has ended`),
  );
});

test('on a cluster: the snapshot of a client that was cut off is kept, found again, and ended by a command that needs it', async () => {
  const cluster = await startStandIn();
  onTestFinished(() => cluster.stop());
  const daemon = await startDaemon({ cluster: cluster.address, args: ['--create', `disk:${SIZE}`] });
  const target = storeWith(daemon.store, daemon, ['--cluster', cluster.address, '--control', daemon.control]);
  const writer = await attach(daemon, 'disk');
  await fill(writer, 1);
  await lose(target, 'disk@now', await attach(daemon, 'disk@now'));
  await fill(writer, 2);
  const other = await attach(daemon, 'disk@now:run');
  const back = await attach(daemon, 'disk@now');
  await isMoment(back, 1);
  await isMoment(other, 2);
  await lose(target, 'disk@now', back);
  await other.disconnect();
  await writer.disconnect();
  await isGone(target, 'disk@now:run');
  expect(await target.ok('check')).toMatch(/^ended disk@now of /);
  await expect(attach(daemon, 'disk@now')).rejects.toThrow(/the store was checked/);
  expect((await daemon.stop()).code, daemon.log()).toBe(0);
  expect(cluster.violations()).toEqual([]);
});
