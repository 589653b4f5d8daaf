/** The process ends in bounded time when its start fails, and when requests wait at its stop. */
import type { ChildProcess } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { describe, expect, test, type TestContext } from 'vitest';
import { NbdClient } from 'nbd-server-ts';
import { Op, StandIn, Res } from '../sheep/stand-in.js';
import { BIN, cli, ended, temporaryDirectory, waitUntil, spawn } from '../harness/daemon.js';
import { byLength } from '../harness/length.js';

/** STOP_GRACE_MS and the steps after it, with time for a busy machine. */
const STOP_LIMIT_MS = 30_000;

/** A cluster, and the daemon of a test: the tests of this file mostly wait, and run beside each other. */
class Served {
  readonly resumed: Promise<void>;
  readonly cluster: StandIn;
  socket = '';
  control = '';
  log = '';
  child: ChildProcess | undefined;
  #resume: () => void = () => undefined;

  private constructor(cluster: StandIn) {
    this.cluster = cluster;
    this.resumed = new Promise((resolve) => (this.#resume = resolve));
  }

  static async start(context: TestContext, options: ConstructorParameters<typeof StandIn>[0]): Promise<Served> {
    const served = new Served(await new StandIn(options).start());
    context.onTestFinished(async () => {
      served.child?.kill('SIGKILL');
      served.#resume();
      await served.cluster.stop();
    });
    return served;
  }

  serve(...args: string[]): ChildProcess {
    const directory = temporaryDirectory();
    this.socket = path.join(directory, 'nbd.sock');
    this.control = path.join(directory, 'c');
    const place = ['--cluster', this.cluster.address, '--control', this.control, '--listen', `unix:${this.socket}`];
    const env = { ...process.env, SHEEPGATE_STATE: directory };
    const child = spawn(process.execPath, [BIN, 'serve', ...place, ...args], {
      env,
      stdio: ['ignore', 'ignore', 'pipe'],
    });
    this.log = '';
    child.stderr.setEncoding('utf8').on('data', (text: string) => (this.log += text));
    this.child = child;
    return child;
  }

  async endsWithin(ms: number): Promise<{ code: number | null; signal: NodeJS.Signals | null }> {
    const before = performance.now();
    const end = await ended(this.child as ChildProcess);
    expect(performance.now() - before, this.log).toBeLessThan(ms);
    expect(fs.existsSync(this.socket)).toBe(false);
    return end;
  }
}

describe.concurrent('a start that fails at any of its requests ends with 1 and its error', () => {
  test.for([
    ['its node has an internal error', { result: Res.INVALID_PARMS }, 1, byLength({ quick: 2, full: 2, long: 1 })],
    // Each run takes some seconds: not at every request.
    ['its node answers garbage', { garbage: true }, 2, 5],
  ] as const)('%s', async ([, fault, first, step], context) => {
    const served = await Served.start(context, { nodes: 1 });
    // The failure comes some requests later each time, until the start succeeds.
    for (let failsAt = first; ; failsAt += step) {
      let count = 0;
      // A repeated request fails again.
      served.cluster.fault = ({ opcode }) => (opcode !== Op.GET_NODE_LIST && ++count >= failsAt ? fault : undefined);
      const child = served.serve('--cluster-timeout', '1', '--create', 'disk:4M');
      const isReady = (): boolean => served.log.includes('"ready"');
      await waitUntil(() => isReady() || child.exitCode !== null, 'it is ready or has ended', 60_000);
      if (child.exitCode === null) {
        expect(failsAt).toBeGreaterThan(3);
        served.cluster.fault = () => undefined;
        child.kill('SIGTERM');
        expect(await served.endsWithin(STOP_LIMIT_MS)).toEqual({ code: 0, signal: null });
        return;
      }
      expect(await served.endsWithin(STOP_LIMIT_MS), `request ${failsAt}`).toEqual({ code: 1, signal: null });
      expect(served.log).toMatch(/^sheepgate: /m);
      if (failsAt > 40) throw new Error('it never becomes ready');
    }
  });
});

test.concurrent('SIGTERM during a start that waits for a node is a stop like any other', async (context) => {
  const served = await Served.start(context, { nodes: 1 });
  let hasAsked = false;
  served.cluster.fault = ({ opcode }) => {
    if (opcode !== Op.READ_VDIS) return undefined;
    hasAsked = true;
    return { until: served.resumed };
  };
  const child = served.serve();
  await waitUntil(() => hasAsked, 'it waits');
  child.kill('SIGTERM');
  expect(await served.endsWithin(5_000)).toEqual({ code: 0, signal: null });
  expect(served.log).toMatch(/"stopped before it was ready"/);
});

test.concurrent(
  'SIGTERM while an open, a write and a command wait for a node ends it within its grace time, and the log names them',
  async (context) => {
    // With enforced locks, closing a disk sends a request to a node as well.
    const served = await Served.start(context, { nodes: 1, useLock: true });
    const child = served.serve('--create', 'disk:64M');
    await waitUntil(() => served.log.includes('"ready"'), 'it is ready');
    const client = await NbdClient.connect({ path: served.socket });
    await client.go('disk');
    await client.write(0, Buffer.alloc(4096, 1));
    const asked: number[] = [];
    const questions = (): number => asked.filter((opcode) => opcode !== Op.WRITE).length;
    served.cluster.fault = ({ opcode }) => {
      asked.push(opcode);
      return { until: served.resumed };
    };
    const writing = client.write(0, Buffer.alloc(4096, 2));
    const other = await NbdClient.connect({ path: served.socket });
    const opening = other.go('disk@now');
    await waitUntil(() => questions() >= 1 && asked.includes(Op.WRITE), 'both wait');
    const command = cli([
      'vdi',
      'create',
      'new',
      '4M',
      '--cluster',
      served.cluster.address,
      '--control',
      served.control,
    ]);
    await waitUntil(() => questions() >= 2, 'the command waits');
    child.kill('SIGTERM');
    await expect(writing).rejects.toThrow();
    await expect(opening).rejects.toThrow();
    expect(await command).toMatchObject({ code: 1 });
    expect(await served.endsWithin(STOP_LIMIT_MS)).toEqual({ code: 1, signal: null });
    expect(served.log).toMatch(/sheepgate: .* was closed before its nodes answered/);
  },
);
