/** The process ends in bounded time when its start fails, and when requests wait at its stop. */
import { spawn, type ChildProcess } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { NbdClient } from 'nbd-server-ts';
import { Op, StandIn, Res } from '../sheep/stand-in.js';
import { BIN, cli, ended, temporaryDirectory, waitUntil } from '../harness/daemon.js';

/** STOP_GRACE_MS and the steps after it, with time for a busy machine. */
const STOP_LIMIT_MS = 30_000;

let cluster: StandIn;
let resume: () => void;
let resumed: Promise<void>;
let socket: string;
let control: string;
let child: ChildProcess;
let log: string;

beforeEach(async () => {
  cluster = await new StandIn({ nodes: 1 }).start();
  resumed = new Promise((resolve) => (resume = resolve));
});

afterEach(async () => {
  child.kill('SIGKILL');
  resume();
  await cluster.stop();
});

function serve(...args: string[]): void {
  const directory = temporaryDirectory();
  socket = path.join(directory, 'nbd.sock');
  control = path.join(directory, 'c');
  const place = ['--cluster', cluster.address, '--control', control, '--listen', `unix:${socket}`];
  const env = { ...process.env, SHEEPGATE_STATE: directory };
  child = spawn(process.execPath, [BIN, 'serve', ...place, ...args], { env, stdio: ['ignore', 'ignore', 'pipe'] });
  log = '';
  child.stderr?.setEncoding('utf8').on('data', (text: string) => (log += text));
}

async function endsWithin(ms: number): Promise<{ code: number | null; signal: NodeJS.Signals | null }> {
  const before = performance.now();
  const end = await ended(child);
  expect(performance.now() - before, log).toBeLessThan(ms);
  expect(fs.existsSync(socket)).toBe(false);
  return end;
}

describe('a start that fails at any of its requests ends with 1 and its error', () => {
  test.each([
    ['its node has an internal error', { result: Res.INVALID_PARMS }, 1],
    // Each run takes some seconds: not at every request.
    ['its node answers garbage', { garbage: true }, 5],
  ])('%s', async (_, fault, step) => {
    // The failure comes one request later each time, until the start succeeds.
    for (let failsAt = 1; ; failsAt += step) {
      let count = 0;
      // A repeated request fails again.
      cluster.fault = ({ opcode }) => (opcode !== Op.GET_NODE_LIST && ++count >= failsAt ? fault : undefined);
      serve('--cluster-timeout', '1', '--create', 'disk:4M');
      await waitUntil(() => log.includes('"ready"') || child.exitCode !== null, 'it is ready or has ended', 60_000);
      if (child.exitCode === null) {
        expect(failsAt).toBeGreaterThan(3);
        cluster.fault = () => undefined;
        child.kill('SIGTERM');
        expect(await endsWithin(STOP_LIMIT_MS)).toEqual({ code: 0, signal: null });
        return;
      }
      expect(await endsWithin(STOP_LIMIT_MS), `request ${failsAt}`).toEqual({ code: 1, signal: null });
      expect(log).toMatch(/^sheepgate: /m);
      if (failsAt > 40) throw new Error('it never becomes ready');
    }
  });
});

test('SIGTERM during a start that waits for a node is a stop like any other', async () => {
  let hasAsked = false;
  cluster.fault = ({ opcode }) => {
    if (opcode !== Op.READ_VDIS) return undefined;
    hasAsked = true;
    return { until: resumed };
  };
  serve();
  await waitUntil(() => hasAsked, 'it waits');
  child.kill('SIGTERM');
  expect(await endsWithin(5_000)).toEqual({ code: 0, signal: null });
  expect(log).toMatch(/"stopped before it was ready"/);
});

test('SIGTERM while an open, a write and a command wait for a node ends it within its grace time, and the log names them', async () => {
  // With enforced locks, closing a disk sends a request to a node as well.
  await cluster.stop();
  cluster = await new StandIn({ nodes: 1, useLock: true }).start();
  serve('--create', 'disk:64M');
  await waitUntil(() => log.includes('"ready"'), 'it is ready');
  const client = await NbdClient.connect({ path: socket });
  await client.go('disk');
  await client.write(0, Buffer.alloc(4096, 1));
  const asked: number[] = [];
  const questions = (): number => asked.filter((opcode) => opcode !== Op.WRITE).length;
  cluster.fault = ({ opcode }) => {
    asked.push(opcode);
    return { until: resumed };
  };
  const writing = client.write(0, Buffer.alloc(4096, 2));
  const other = await NbdClient.connect({ path: socket });
  const opening = other.go('disk@now');
  await waitUntil(() => questions() >= 1 && asked.includes(Op.WRITE), 'both wait');
  const command = cli(['vdi', 'create', 'new', '4M', '--cluster', cluster.address, '--control', control]);
  await waitUntil(() => questions() >= 2, 'the command waits');
  child.kill('SIGTERM');
  await expect(writing).rejects.toThrow();
  await expect(opening).rejects.toThrow();
  expect(await command).toMatchObject({ code: 1 });
  expect(await endsWithin(STOP_LIMIT_MS)).toEqual({ code: 1, signal: null });
  expect(log).toMatch(/sheepgate: .* was closed before its nodes answered/);
});
