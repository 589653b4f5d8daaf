/**
 * The two ways in which a command reaches a store: it opens the store itself, or a daemon has the store open and does the work.
 * Tests of the command line run in both ways and expect the same. Owns nothing beyond what the harness cleans up.
 */
import fs from 'node:fs';
import path from 'node:path';
import { afterEach, beforeAll, expect } from 'vitest';
import { NbdClient } from 'nbd-server-ts';
import { cli, startDaemon, temporaryDirectory, type Daemon, type RunResult } from '../harness/daemon.js';

export const MIB = 2 ** 20;
export const GIB = 2 ** 30;
export const WAYS = ['directly on the store', 'through a daemon'] as const;
export type Way = (typeof WAYS)[number];

export interface TestStore {
  readonly store: string;
  /** Undefined if there is none. */
  readonly daemon: Daemon | undefined;
  /** Run sheepgate on this store. */
  run(args: readonly string[], options?: Parameters<typeof cli>[1]): Promise<RunResult>;
  /** ... expecting success and nothing on stderr; returns stdout. */
  ok(...args: string[]): Promise<string>;
  /** ... with --json. */
  json<T = Record<string, unknown>>(...args: string[]): Promise<T>;
  /** ... expecting exit code 1, nothing on stdout and one line on stderr, which is returned. */
  fails(...args: string[]): Promise<string>;
  /** The names in the store, NAME or NAME@TAG. */
  names(): Promise<string[]>;
  /** The bytes of a VDI or snapshot, exported to a file: only a process can export to its stdout. */
  contentOf(spec: string): Promise<Buffer>;
  /** Import these bytes from a file. */
  fill(name: string, content: Buffer, ...args: string[]): Promise<void>;
}

/** An empty store, and a daemon on it or not. */
export async function testStore(way: Way): Promise<TestStore> {
  const store = path.join(temporaryDirectory(), 'store');
  const daemon = way === 'through a daemon' ? await startDaemon({ store }) : undefined;
  return storeWith(store, daemon);
}

/** One store for all tests of a file or describe block, which is emptied after each of them: a daemon of its own costs a test 0.2 s. */
export function sharedStore(way: Way): () => TestStore {
  let shared: TestStore;
  beforeAll(async () => {
    shared = await testStore(way);
  });
  afterEach(() => deleteAll(shared));
  return () => shared;
}

/** `always`: arguments of every command. */
export function storeWith(store: string, daemon: Daemon | undefined, always: readonly string[] = []): TestStore {
  const newFile = (): string => path.join(temporaryDirectory(), 'image');
  const run: TestStore['run'] = (args, options) => cli([...args, ...always], { store, ...options });
  const ok: TestStore['ok'] = async (...args) => {
    const result = await run(args);
    expect({ code: result.code, stderr: result.stderr }, args.join(' ')).toEqual({ code: 0, stderr: '' });
    return result.stdout;
  };
  return {
    store,
    daemon,
    run,
    ok,
    json: async <T>(...args: string[]) => JSON.parse(await ok(...args, '--json')) as T,
    fails: async (...args) => oneLineOf(await run(args), 1, args.join(' ')),
    names: async () => {
      const vdis = JSON.parse(await ok('vdi', 'list', '--json')) as { name: string; tag: string | null }[];
      return vdis.map(({ name, tag }) => (tag === null ? name : `${name}@${tag}`));
    },
    contentOf: async (spec) => {
      const file = newFile();
      await ok('export', spec, file, '--json');
      const content = fs.readFileSync(file);
      fs.rmSync(file);
      return content;
    },
    fill: async (name, content, ...args) => {
      const file = newFile();
      fs.writeFileSync(file, content);
      await ok('import', file, name, '--raw', ...args);
      fs.rmSync(file);
    },
  };
}

/** Delete all VDIs and snapshots, so that the next test can use the store and its daemon. */
export async function deleteAll(target: TestStore): Promise<void> {
  for (const name of await target.names()) await target.ok('vdi', 'delete', name);
}

/** The one line of a refusal on stderr; fails if there is more, such as a stack. */
export function oneLineOf(result: RunResult, code: number, what: string): string {
  expect({ code: result.code, signal: result.signal, stdout: result.stdout }, `${what}: ${result.stderr}`).toEqual({
    code,
    signal: null,
    stdout: '',
  });
  expect(result.stderr, what).toMatch(/^sheepgate: [^\n]+\n$/);
  expect(result.stderr, what).not.toMatch(/\n\s+at |internal error|undefined|\[object/);
  return result.stderr;
}

/** The line of a refusal that comes after notes. */
export function lastLineOf(result: RunResult, code: number, what: string): string {
  const lines = result.stderr.split('\n').filter((line) => !line.startsWith('sheepgate: note: '));
  return oneLineOf({ ...result, stderr: lines.join('\n') }, code, what);
}

/** A client that has the export open. */
export async function attach(daemon: Daemon, name: string): Promise<NbdClient> {
  const client = await NbdClient.connect({ path: daemon.socket });
  await client.go(name);
  return client;
}

/** Like random data, the same every time, without a zero block. */
export function patterned(size: number, seed: number): Buffer {
  const data = Buffer.alloc(size);
  const words = new Uint32Array(data.buffer, data.byteOffset, size >>> 2);
  let state = seed >>> 0 || 1;
  for (let n = 0; n < words.length; n++) {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    words[n] = state;
  }
  return data.fill(1, words.byteLength);
}

/** Buffers are equal; toEqual takes minutes to compare megabytes. */
export function expectBytes(found: Buffer, wanted: Buffer): void {
  expect(found.length).toBe(wanted.length);
  if (found.equals(wanted)) return;
  const at = found.findIndex((byte, i) => byte !== wanted[i]);
  expect.fail(`byte ${at} is ${found[at]}, not ${wanted[at]}`);
}

/** Bytes that a file, or everything in a directory, occupies on the disk. */
export function diskUsage(place: string): number {
  const status = fs.lstatSync(place, { throwIfNoEntry: false });
  if (!status) return 0; // removed after it was listed
  const below = status.isDirectory() ? fs.readdirSync(place) : [];
  return below.reduce((sum, name) => sum + diskUsage(path.join(place, name)), status.blocks * 512);
}
