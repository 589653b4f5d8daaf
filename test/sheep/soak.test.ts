/**
 * Mixed load on real nodes, through the daemon: fio writes and verifies one disk, another client writes numbered blocks to a
 * second disk, and meanwhile `dog` takes snapshots of both and deletes them again. SHEEPGATE_SOAK_SECONDS gives the
 * duration; without it the test is short.
 */
import { createHash } from 'node:crypto';
import fs from 'node:fs';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import {
  cli,
  haveCommand,
  haveNbdsh,
  nbdsh,
  run,
  startDaemon,
  temporaryDirectory,
  type Daemon,
} from '../harness/daemon.js';
import { realNodesMissing, startRealNodes, type RealNodes } from './clusters.js';

const SECONDS = Number(process.env['SHEEPGATE_SOAK_SECONDS'] ?? 15);
const FORMAT = process.env['SHEEPGATE_TEST_FORMAT'] ?? '-c 2';
const NODES = Number(process.env['SHEEPGATE_TEST_NODES'] ?? 3);
/** Snapshots kept of each disk; the next one replaces the oldest. */
const KEPT = 4;
const HASH_EVERY = 3;
const BLOCK = 4096;
const FIO_BYTES = 64 * 2 ** 20;
const COUNTED_BYTES = 16 * 2 ** 20;
const BLOCKS = COUNTED_BYTES / BLOCK;
/** Spreads the numbered writes over the disk; odd, so that every block is written. */
const STRIDE = 1237;

const missing =
  realNodesMissing() ??
  (haveCommand('fio') && haveCommand('nbdcopy') && haveNbdsh() ? undefined : 'fio, nbdcopy, nbdsh');
if (missing !== undefined) console.log(`no soak test against real Sheepdog nodes: ${missing}`);

/**
 * Writes block n*STRIDE, filled with n, for n = 1, 2, ...; each is answered before the next. Its number is in the file
 * `progress`. Ends when `progress`.stop exists.
 */
const COUNTER = `
import os, struct
fd = os.open(PROGRESS, os.O_RDWR | os.O_CREAT)
h.connect_uri(URI)
n = 0
while not os.path.exists(PROGRESS + '.stop'):
    n += 1
    h.pwrite(struct.pack('<I', n) * ${BLOCK / 4}, (n * ${STRIDE} % ${BLOCKS}) * ${BLOCK})
    os.pwrite(fd, struct.pack('<I', n), 0)
`;

/** The number of the newest write in the content; throws unless the content is exactly that after this write. */
function newestOf(content: Buffer): number {
  let newest = 0;
  for (let at = 0; at < content.length; at += BLOCK) newest = Math.max(newest, content.readUInt32LE(at));
  const expected = new Uint32Array(BLOCKS);
  for (let n = Math.max(1, newest - BLOCKS + 1); n <= newest; n++) expected[(n * STRIDE) % BLOCKS] = n;
  for (let block = 0; block < BLOCKS; block++) {
    for (let at = block * BLOCK; at < (block + 1) * BLOCK; at += 4) {
      if (content.readUInt32LE(at) === expected[block]) continue;
      throw new Error(`block ${block} has ${content.readUInt32LE(at)} at ${at}, should have ${expected[block]}`);
    }
  }
  return newest;
}

describe.skipIf(missing !== undefined)('external snapshots under load', () => {
  let cluster: RealNodes;
  let daemon: Daemon;

  beforeAll(async () => {
    cluster = await startRealNodes({ nodes: NODES, format: FORMAT.split(' ') });
    const create = ['--create', `fio:${FIO_BYTES}`, '--create', `counted:${COUNTED_BYTES}`];
    daemon = await startDaemon({ cluster: cluster.address, args: create });
  }, 60_000);
  afterAll(async () => {
    await (daemon as typeof daemon | undefined)?.stop();
    await (cluster as typeof cluster | undefined)?.stop();
  });

  const sheepgate = async (...args: string[]): Promise<string> => {
    const { code, stdout, stderr } = await cli([...args, '--cluster', cluster.address, '--control', daemon.control]);
    expect(stderr, `sheepgate ${args.join(' ')}`).toBe('');
    expect(code, `sheepgate ${args.join(' ')}`).toBe(0);
    return stdout;
  };
  const read = async (name: string): Promise<Buffer> => {
    const file = path.join(temporaryDirectory(), 'content');
    const { code, stderr } = await run('nbdcopy', [daemon.uri(name), file]);
    expect(stderr).toBe('');
    expect(code).toBe(0);
    const content = fs.readFileSync(file);
    fs.rmSync(path.dirname(file), { recursive: true });
    return content;
  };
  const hashOf = async (name: string): Promise<string> =>
    createHash('sha256')
      .update(await read(name))
      .digest('hex');

  test(
    `after ${SECONDS} s there is no error, every snapshot is a point in time, and no object is lost or left over`,
    async () => {
      const progress = path.join(temporaryDirectory(), 'progress');
      const fio = run(
        'fio',
        [
          '--name=soak',
          '--ioengine=nbd',
          `--uri=${daemon.uri('fio')}`,
          '--rw=randwrite',
          '--bsrange=512-65536',
          '--blockalign=512',
          `--size=${FIO_BYTES}`,
          '--iodepth=32',
          '--verify=crc32c',
          '--verify_fatal=1',
          '--verify_backlog=512',
          '--time_based',
          `--runtime=${SECONDS}`,
        ],
        { timeoutMs: (SECONDS + 120) * 1000, cwd: temporaryDirectory() },
      );
      const script = `PROGRESS=${JSON.stringify(progress)}\nURI=${JSON.stringify(daemon.uri('counted'))}\n${COUNTER}`;
      const counter = nbdsh(['-c', script], { timeoutMs: (SECONDS + 120) * 1000 });
      const answered = (): number => {
        try {
          return fs.readFileSync(progress).readUInt32LE(0);
        } catch {
          return 0;
        }
      };
      let isRunning = true as boolean;
      void fio.then(() => (isRunning = false));
      void counter.then(() => (isRunning = false));
      const kept: { tag: string; newest: number; hash: string | undefined }[] = [];
      let taken = 0;
      for (const until = Date.now() + SECONDS * 1000; Date.now() < until && isRunning; taken++) {
        const tag = `t${taken}`;
        const before = answered();
        await cluster.dog('vdi', 'snapshot', '-s', tag, 'counted');
        const after = answered();
        await cluster.dog('vdi', 'snapshot', '-s', tag, 'fio');
        const newest = newestOf(await read(`counted@${tag}`));
        expect(newest, `the newest write in ${tag}`).toBeGreaterThanOrEqual(before);
        expect(newest, `the newest write in ${tag}`).toBeLessThanOrEqual(after + 1);
        // Not for every disk, so that a snapshot is taken about every second.
        kept.push({ tag, newest, hash: taken % HASH_EVERY === 0 ? await hashOf(`fio@${tag}`) : undefined });
        if (kept.length <= KEPT) continue;
        const [{ tag: oldest } = { tag: '' }] = kept.splice(0, 1);
        for (const name of ['fio', 'counted']) {
          if (taken % 2 === 0) await cluster.dog('vdi', 'delete', '-s', oldest, name);
          else await sheepgate('vdi', 'delete', `${name}@${oldest}`);
        }
      }
      fs.writeFileSync(`${progress}.stop`, '');
      const { code: counterCode, stderr: counterSays } = await counter;
      expect(counterSays).toBe('');
      expect(counterCode).toBe(0);
      const { code, stdout, stderr } = await fio;
      expect(stderr).toBe('');
      expect(code, stdout).toBe(0);
      console.log(`${taken} snapshots of each disk, ${answered()} numbered writes; ${/WRITE:.*/.exec(stdout)?.[0]}`);
      expect(taken).toBeGreaterThan(2);
      expect(newestOf(await read('counted'))).toBe(answered());
      for (const { tag, newest, hash } of kept) {
        expect(newestOf(await read(`counted@${tag}`)), tag).toBe(newest);
        if (hash !== undefined) expect(await hashOf(`fio@${tag}`), tag).toBe(hash);
      }
      await sheepgate('check');
      for (const { tag } of kept)
        for (const name of ['fio', 'counted']) await sheepgate('vdi', 'delete', `${name}@${tag}`);
      const present = await hashOf('fio');
      await sheepgate('check');
      expect(await hashOf('fio')).toBe(present);
      for (const name of ['fio', 'counted']) await sheepgate('vdi', 'delete', name, '--force');
      expect(await cluster.objects(), 'objects and ledgers left').toEqual([]);
    },
    (SECONDS + 240) * 1000,
  );
});
