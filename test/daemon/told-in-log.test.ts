/**
 * Log lines about errors that clients get: they have the disk, the cause with its file or node, the export and the peer.
 * Requests without a line of their own are counted.
 */
import fs from 'node:fs';
import path from 'node:path';
import { describe, expect } from 'vitest';
import { NbdClient } from 'nbd-server-ts';
import { fill, mountImage, mountTmpfs, shutDown } from '../harness/filesystems.js';
import {
  needs,
  ok,
  run,
  skipBecause,
  startDaemon,
  temporaryDirectory,
  waitUntil,
  type Daemon,
} from '../harness/daemon.js';
import { Op, Res, StandIn, type Seen } from '../sheep/stand-in.js';

const MIB = 2 ** 20;
const UID = process.getuid?.();
const WARNING = 40;
const ERROR = 50;

interface Line {
  readonly level: number;
  readonly msg: string;
  readonly [field: string]: unknown;
}

function linesOf(daemon: Daemon): Line[] {
  const texts = daemon.log().split('\n');
  return texts.filter((text) => text.startsWith('{') && text.endsWith('}')).map((text) => JSON.parse(text) as Line);
}

function failuresOf(daemon: Daemon): Line[] {
  return linesOf(daemon).filter(({ msg }) => msg.includes('a request failed'));
}

/** Wait for a line; it may come after the client has its answer. */
async function toldOf(daemon: Daemon, what: string): Promise<Line> {
  const find = (): Line | undefined => linesOf(daemon).find(({ msg }) => msg.includes(what));
  return waitUntil(find, `the log has "${what}"`).catch((error: unknown) => {
    throw new Error(`${(error as Error).message}; it has ${daemon.log()}`);
  });
}

/** SIGTERM, and the whole log: some of it arrives after the end of the process. */
async function stopped(daemon: Daemon): Promise<void> {
  await daemon.stop();
  await toldOf(daemon, 'stopped');
}

async function opened(daemon: Daemon, name: string): Promise<NbdClient> {
  const client = await NbdClient.connect({ path: daemon.socket });
  await client.go(name);
  return client;
}

/** The files of the objects of a store. */
function objectsOf(store: string): string[] {
  const all = fs.readdirSync(path.join(store, 'objects'), { recursive: true, encoding: 'utf8' });
  return all.map((name) => path.join(store, 'objects', name)).filter((name) => fs.statSync(name).isFile());
}

describe('a local store', () => {
  needs('qemu-io')(
    'that is full: one line with the disk, the export, the peer and the file, not one per write',
    async (context) => {
      const mount = mountTmpfs('48m');
      if (mount === undefined) return skipBecause(context, 'mounting a tmpfs needs root');
      const daemon = await startDaemon({ store: path.join(mount, 'store'), args: ['--create', 'vm1:64M'] });
      const fillIt = fill(mount);
      const writes = Array.from({ length: 20 }, (_, n) => ['-c', `write -P 1 ${n * 3}M 1M`]).flat();
      const written = await run('qemu-io', ['-f', 'raw', ...writes, daemon.uri('vm1')]);
      expect(written.stdout + written.stderr).toMatch(/No space left on device/);
      const line = await toldOf(daemon, 'vm1: a request failed with ENOSPC: ');
      expect(line).toMatchObject({ level: ERROR, code: 'ENOSPC', disk: 'vm1', export: 'vm1', uid: UID });
      expect(line.peer).toBe(`unix ${daemon.socket}`);
      expect(line.msg).toContain(`${daemon.store}/objects/`);
      expect(failuresOf(daemon).length).toBeLessThanOrEqual(3);
      fs.rmSync(fillIt);
      await stopped(daemon);
      // The writes without a line of their own are counted.
      const told = failuresOf(daemon).reduce((sum, { count }) => sum + ((count as number | undefined) ?? 1), 0);
      const { errors } = linesOf(daemon).find(({ msg }) => msg === 'connection closed') as { errors?: number } & Line;
      expect(told).toBe(errors);
    },
  );

  needs('qemu-io', 'nbdinfo')(
    'with objects that are missing or truncated: reads, block status and temporary snapshots, per disk and cause',
    async () => {
      const first = await startDaemon({ args: ['--create', 'vm1:8M', '--create', 'vm2:8M'] });
      for (const name of ['vm1', 'vm2']) {
        await ok('qemu-io', ['-f', 'raw', '-c', 'write -P 1 0 8M', '-c', 'flush', first.uri(name)]);
      }
      await first.stop();
      const objects = objectsOf(first.store);
      expect(objects).toHaveLength(4);
      const daemon = await startDaemon({ store: first.store });
      // Held since before: its objects are those of the disk.
      const reader = await opened(daemon, 'vm1@now');
      for (const object of objects) fs.truncateSync(object, 4096);
      const read = await run('qemu-io', ['-f', 'raw', '-r', '-c', 'read 1M 64k', daemon.uri('vm1')]);
      expect(read.stdout + read.stderr).toMatch(/Input\/output error/);
      expect(await toldOf(daemon, 'vm1: a request failed with EIO')).toMatchObject({ level: ERROR, export: 'vm1' });
      expect((await run('nbdinfo', ['--map', daemon.uri('vm2')])).code).not.toBe(0);
      const status = await toldOf(daemon, 'vm2: a request failed with EIO');
      expect(status).toMatchObject({ level: ERROR, disk: 'vm2', err: { code: 'DAMAGED' } });
      expect(objects.some((object) => status.msg.includes(object))).toBe(true);
      await expect(reader.read(MIB, 4096)).rejects.toThrow();
      expect(await toldOf(daemon, 'vm1@now: a request failed')).toMatchObject({ disk: 'vm1@now', export: 'vm1@now' });
      for (let n = 0; n < 500; n++) await expect(reader.read(n * 4096 + MIB, 4096)).rejects.toThrow();
      expect(failuresOf(daemon).filter(({ disk }) => disk === 'vm1@now')).toHaveLength(1);
      await reader.disconnect();
      await stopped(daemon);
      expect(failuresOf(daemon).at(-1)).toMatchObject({ disk: 'vm1@now', count: 500 });
    },
  );

  needs('qemu-io')('whose disk is gone: the failed flush is in the log, and the open after it', async (context) => {
    const mount = mountImage('ext4', 300 * MIB);
    if (mount === undefined) return skipBecause(context, 'mounting a filesystem needs root');
    const daemon = await startDaemon({
      store: path.join(mount, 'store'),
      args: ['--create', 'vm1:8M', '--create', 'vm2:8M'],
    });
    const client = await opened(daemon, 'vm1');
    await client.write(0, Buffer.alloc(4096, 1));
    shutDown(mount);
    await expect(client.flush()).rejects.toThrow();
    expect(await toldOf(daemon, 'vm1: a request failed with EIO')).toMatchObject({ level: ERROR, export: 'vm1' });
    await client.disconnect();
    const read = await run('qemu-io', ['-f', 'raw', '-c', 'read 0 4k', daemon.uri('vm2')]);
    expect(read.stdout + read.stderr).toMatch(/the server's storage failed/);
    const open = await toldOf(daemon, 'export "vm2" cannot be opened: ');
    expect(open).toMatchObject({ level: ERROR, export: 'vm2', uid: UID });
    expect(open.msg).toMatch(/\/store.*EIO/);
    await daemon.stop();
  });
});

describe('an export that a client is refused', () => {
  needs('nbdinfo', 'qemu-img')(
    'is logged with the peer and the full reason, and again in the line of the close',
    async () => {
      const access = path.join(temporaryDirectory(), 'access');
      fs.writeFileSync(access, 'deny secret from any\nallow * from any\n');
      const daemon = await startDaemon({ args: ['--create', 'secret:1M', '--access', access] });
      expect((await run('nbdinfo', [daemon.uri('secret')])).code).not.toBe(0);
      const refusal = await toldOf(daemon, 'export "secret" refused: you are not allowed to open "secret"');
      expect(refusal).toMatchObject({ level: WARNING, export: 'secret', uid: UID, pid: expect.any(Number) as number });
      for (let n = 0; n < 5; n++) {
        expect((await run('qemu-img', ['info', daemon.uri('missing')])).code).not.toBe(0);
        expect((await run('nbdinfo', [daemon.uri('secret')])).code).not.toBe(0);
      }
      const missing = await toldOf(daemon, 'export "missing" refused: no VDI named "missing" in');
      expect(missing).toMatchObject({ level: 30, export: 'missing', uid: UID });
      expect(missing.msg).toContain(daemon.store);
      await stopped(daemon);
      const lines = linesOf(daemon);
      // The first line, and the line that was held back until the stop.
      for (const name of ['secret', 'missing']) {
        const told = lines.filter(({ msg }) => msg.startsWith(`export "${name}" refused`));
        expect(told).toHaveLength(2);
      }
      const closes = lines.filter(({ msg }) => msg === 'connection closed');
      expect(closes).toHaveLength(11);
      for (const { reason, refused } of closes) {
        expect(['secret', 'missing']).toContain(refused);
        expect(reason).toBe(`the client left when it was refused ${JSON.stringify(refused)}`);
      }
      expect(daemon.log()).not.toMatch(/aborted the handshake/);
    },
  );
});

describe('a cluster', () => {
  needs('qemu-io')('that answers with errors, or not at all: the node and the reason are in the log', async () => {
    const cluster = await new StandIn({ jitterMs: 0 }).start();
    const args = ['--create', 'vm1:8M', '--create', 'vm2:8M', '--cluster-timeout', '1'];
    const daemon = await startDaemon({ cluster: cluster.address, args });
    const isWrite = ({ opcode }: Seen): boolean => opcode === Op.WRITE || opcode === Op.CREATE;
    cluster.fault = (request) => (isWrite(request) ? { result: Res.NO_SPACE } : undefined);
    const written = await run('qemu-io', ['-f', 'raw', '-c', 'write 0 4k', daemon.uri('vm1')]);
    expect(written.stdout + written.stderr).toMatch(/No space left on device/);
    expect(await toldOf(daemon, 'vm1: a request failed with ENOSPC: creating object ')).toMatchObject({
      ...{ level: ERROR, disk: 'vm1', export: 'vm1', uid: UID },
      msg: expect.stringContaining('the cluster answers') as string,
    });
    cluster.fault = () => undefined;
    const client = await opened(daemon, 'vm2');
    await client.write(0, Buffer.alloc(4096, 1));
    cluster.fault = (request) => (isWrite(request) ? { result: Res.HALT } : undefined);
    await expect(client.write(0, Buffer.alloc(4096, 2))).rejects.toThrow();
    const halted = await toldOf(daemon, 'vm2: a request failed with EIO');
    expect(halted.msg).toMatch(/the cluster answers .*HALT.*; given up after trying 127\.0\.0\.1:\d+, /);
    // The daemon tries one node after the other, repeatedly.
    cluster.fault = (request) => (isWrite(request) ? { result: Res.EIO } : undefined);
    for (let n = 0; n < 3; n++) await expect(client.write(0, Buffer.alloc(4096, 2))).rejects.toThrow();
    expect(await toldOf(daemon, 'leaving the Sheepdog node')).toMatchObject({
      ...{ level: WARNING, node: expect.stringMatching(/^127\.0\.0\.1:/) as string },
      msg: expect.stringContaining('it answers EIO') as string,
    });
    expect(linesOf(daemon).filter(({ msg }) => msg.includes('leaving')).length).toBeLessThanOrEqual(
      cluster.ports.length,
    );
    await cluster.stop();
    await expect(client.read(0, 4096)).rejects.toThrow();
    const gone = await waitUntil(
      () => failuresOf(daemon).find(({ msg }) => /ECONNREFUSED/.test(msg)),
      'the node is named',
    );
    expect(gone).toMatchObject({ level: ERROR, disk: 'vm2' });
    expect(gone.msg).toMatch(/cannot connect to 127\.0\.0\.1:\d+: .*given up after trying/);
    await client.disconnect();
    // For clients it is a failure, and not a name that does not exist.
    expect((await run('qemu-io', ['-f', 'raw', '-c', 'read 0 4k', daemon.uri('vm1')])).code).not.toBe(0);
    expect(await toldOf(daemon, 'export "vm1" cannot be opened: ')).toMatchObject({ level: ERROR, uid: UID });
    await daemon.kill();
  });

  needs('qemu-io')('whose nodes are waited for: the log has the disk, the node, and the end of the wait', async () => {
    const cluster = await new StandIn({ jitterMs: 0 }).start();
    const daemon = await startDaemon({ cluster: cluster.address, args: ['--create', 'vm1:8M'] });
    let resume: () => void = () => undefined;
    const resumed = new Promise<void>((resolve) => (resume = resolve));
    cluster.fault = ({ opcode }) => (opcode === Op.CREATE ? { until: resumed } : undefined);
    const writing = run('qemu-io', ['-f', 'raw', '-c', 'write 0 4k', daemon.uri('vm1')]);
    const waits = await toldOf(daemon, 'vm1: a request waits for the cluster for 5 s: 127.0.0.1:');
    expect(waits).toMatchObject({ level: WARNING, disk: 'vm1', requests: 1 });
    expect(waits.msg).toMatch(/:\d+ has not answered$/);
    resume();
    expect((await writing).code).toBe(0);
    expect((await toldOf(daemon, 'no request waits for the cluster any more')).msg).toMatch(/^vm1: .*, after [5-9] s$/);
    expect(linesOf(daemon).filter(({ msg }) => msg.includes('waits for'))).toHaveLength(2);
    await stopped(daemon);
    await cluster.stop();
  });
});
