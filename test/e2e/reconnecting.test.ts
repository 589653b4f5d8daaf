/**
 * Real clients that reconnect by themselves during a copy of NAME@now, while the disk is written: the image is of one moment,
 * or the copy fails. A proxy cuts their connections, or the daemon is killed.
 */
import fs from 'node:fs';
import path from 'node:path';
import { describe, expect } from 'vitest';
import { NbdClient } from 'nbd-server-ts';
import { attach, expectBytes, MIB, patterned } from '../cli/both-ways.js';
import { CuttingProxy } from '../harness/cutting-proxy.js';
import {
  ended,
  needs,
  run,
  start,
  startDaemon,
  temporaryDirectory,
  waitUntil,
  type Daemon,
} from '../harness/daemon.js';

const SIZE = 32 * MIB;
/** Bytes after which the connection is cut: well within the copy. */
const CUT_AT = 5 * MIB;
/** Slowly, so that the disk has changed when the client reconnects. */
const RATE = '10M';

/** The content of the disk, by its seed: written and compared by every test. */
const contents = new Map<number, Buffer>();
function content(seed: number): Buffer {
  const data = contents.get(seed) ?? patterned(SIZE, seed);
  contents.set(seed, data);
  return data;
}

async function fill(writer: NbdClient, seed: number): Promise<void> {
  const data = content(seed);
  for (let at = 0; at < SIZE; at += 16 * MIB) await writer.write(at, data.subarray(at, at + 16 * MIB));
  await writer.flush();
}

async function served(): Promise<{ daemon: Daemon; writer: NbdClient; proxy: CuttingProxy }> {
  const daemon = await startDaemon({ args: ['--create', `disk:${SIZE}`] });
  const writer = await attach(daemon, 'disk');
  await fill(writer, 1);
  return { daemon, writer, proxy: await CuttingProxy.start(daemon.socket) };
}

const blockdev = (socket: string, spec: string): string =>
  `driver=raw,file.driver=nbd,file.server.type=unix,file.server.path=${socket},file.export=${spec},file.reconnect-delay=20`;

/** Checks that the image is of one moment. */
function expectMoment(image: string, seed: number): void {
  expectBytes(fs.readFileSync(image), content(seed));
}

// The tests mostly wait for clients that are slow on purpose: side by side.
describe.concurrent('qemu-img convert with a reconnect delay', () => {
  for (const spec of ['disk@now', 'disk@now:run']) {
    needs('qemu-img')(`${spec}: a copy that is cut off in the middle continues with the same moment`, async () => {
      const { daemon, writer, proxy } = await served();
      const image = path.join(temporaryDirectory(), 'image');
      proxy.cutAfter(CUT_AT);
      const options = blockdev(proxy.socket, spec);
      const copying = run('qemu-img', ['convert', '-U', '-r', RATE, '--image-opts', options, '-O', 'raw', image]);
      await waitUntil(() => proxy.bytes >= CUT_AT, 'it is cut off');
      await fill(writer, 2);
      const { code, stderr } = await copying;
      expect({ code, stderr }).toMatchObject({ code: 0 });
      expect(proxy.count).toBeGreaterThan(1);
      expectMoment(image, 1);
      expect((await daemon.stop()).code).toBe(0);
    });

    needs('qemu-img')(
      `${spec}: after a restart of a killed daemon the copy fails, and no image is of two moments`,
      async () => {
        const { daemon, writer, proxy } = await served();
        proxy.holdAfter(CUT_AT);
        const image = path.join(temporaryDirectory(), 'image');
        // It gives up after this time: longer than the daemon takes to come back on a busy machine.
        const options = blockdev(proxy.socket, spec).replace('=20', '=8');
        const copying = run('qemu-img', ['convert', '-U', '-r', RATE, '--image-opts', options, '-O', 'raw', image]);
        await waitUntil(() => proxy.bytes >= CUT_AT, 'it is in the middle');
        await fill(writer, 2);
        await daemon.kill();
        writer.destroy();
        const again = await startDaemon({ store: daemon.store, args: ['--listen', `unix:${daemon.socket}`] });
        const { code, stderr } = await copying;
        expect(code, stderr).not.toBe(0);
        expect(again.log()).toMatch(/refused: disk@now/);
        expect((await again.stop()).code).toBe(0);
      },
    );
  }
});

describe.concurrent('nbdkit with its retry filter', () => {
  needs('nbdkit', 'nbdcopy')('a copy that is cut off in the middle continues with the same moment', async () => {
    const { daemon, writer, proxy } = await served();
    const directory = temporaryDirectory();
    const socket = path.join(directory, 'kit.sock');
    const kit = start('nbdkit', [
      ...['-f', '-r', '-U', socket, '--filter=retry', 'nbd', `uri=${proxy.uri('disk@now:run')}`],
      ...['retries=10', 'retry-delay=1', 'retry-exponential=no', 'retry-readonly=no'],
    ]);
    await waitUntil(() => fs.existsSync(socket), 'nbdkit listens');
    const image = path.join(directory, 'image');
    proxy.cutAfter(CUT_AT);
    const copying = run('nbdcopy', ['--connections=1', '--requests=4', `nbd+unix:///?socket=${socket}`, image]);
    await waitUntil(() => proxy.bytes >= CUT_AT, 'it is cut off');
    await fill(writer, 2);
    const { code, stderr } = await copying;
    if (code === 0) expectMoment(image, 1);
    else expect(stderr).not.toBe('');
    expect(proxy.count).toBeGreaterThan(1);
    kit.kill('SIGTERM');
    await ended(kit);
    expect((await daemon.stop()).code).toBe(0);
  });
});
