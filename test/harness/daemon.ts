/**
 * Starts the built daemon and the built command line as child processes, for tests of what a user would see. Owns every process
 * and temporary directory that it makes, and removes them when the test file ends, passed or failed. Never touches a process
 * that it did not start, and never waits for a fixed time: only for conditions, with a limit.
 */
import { spawn as spawnProcess, type ChildProcess, type ChildProcessWithoutNullStreams } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, afterEach, inject, test, type TestContext } from 'vitest';
import { requireBuild } from './build.js';
import { clientSet, clientSetNamed, hasCommand, inSet, nbdPythonOf, virtnbdbackupOf } from './client-set.js';
import { processState } from './process-state.js';
import { runInside } from './run-inside.js';
import { runResult, type RunResult } from './run-result.js';

export type { RunResult };

export const BIN = fileURLToPath(new URL('../../bin/sheepgate.cjs', import.meta.url));

const failure = inject('clientSetFailure');
if (failure !== undefined) throw new Error(failure);

declare module 'vitest' {
  interface TaskMeta {
    /** The client programs that the test uses. */
    tried?: readonly string[];
    /** Versions that only the test can find, by program. */
    versions?: Readonly<Record<string, string>>;
  }
}

/** The daemon and the command line run on this machine, with any client set. */
const HERE = clientSetNamed('own');

const READY_TIMEOUT_MS = 30_000;
const STOP_TIMEOUT_MS = 30_000;
const RUN_TIMEOUT_MS = 90_000;
/** Limit for a daemon's answer about its connections, after a failed test. */
const TELL_TIMEOUT_MS = 5_000;
/** Length of the end of a daemon's log that is printed after a failed test. */
const TOLD_LOG_CHARACTERS = 8_000;
/** How many daemons, the last ones, are reported after a failed test. */
const TOLD_DAEMONS = 4;
const POLL_MS = 10;
const MAX_POLL_MS = 500;

const children = new Set<ChildProcess>();
const directories = new Set<string>();
/** The daemons of this test file, each with its result. */
const daemons: (() => Promise<string>)[] = [];

/** As node:child_process has it. A process that still runs when the test file ends, as after a failed test, is killed. */
export const spawn = ((...args: Parameters<typeof spawnProcess>) => {
  const child = spawnProcess(...args);
  children.add(child);
  child.once('exit', () => children.delete(child));
  return child;
}) as typeof spawnProcess;

/** An empty directory that is removed when the test file ends. Its path is short enough for unix sockets. */
export function temporaryDirectory(): string {
  const directory = fs.mkdtempSync(path.join(os.tmpdir(), 'sheepgate-'));
  directories.add(directory);
  return directory;
}

/**
 * The same in memory, where the system has that: for small local stores of tests that are not about the disk. Each store has 256
 * folders, and a disk takes ten times as long to make and remove them.
 */
export function memoryDirectory(): string {
  const base = fs.existsSync('/dev/shm') ? '/dev/shm' : os.tmpdir();
  const directory = fs.mkdtempSync(path.join(base, 'sheepgate-'));
  directories.add(directory);
  return directory;
}

/** Kill processes that still run, and remove all temporary directories. Runs by itself at the end of a test file. */
export function cleanUp(): void {
  for (const child of children) child.kill('SIGKILL');
  children.clear();
  for (const directory of directories) fs.rmSync(directory, { recursive: true, force: true });
  directories.clear();
}

// Sockets and the state of a cluster's clients must not be in the developer's own directories. This is set in the test's own
// process, because commands may run inside it; the processes that it starts inherit it.
process.env.XDG_RUNTIME_DIR = temporaryDirectory();
process.env.SHEEPGATE_STATE = temporaryDirectory();

afterAll(async () => {
  const running = [...children];
  for (const child of running) child.kill('SIGKILL');
  await Promise.all(running.map(ended));
  cleanUp();
});
process.on('exit', cleanUp);

// Often only the daemon's log explains what a client saw: that the daemon has ended, was slow, or has refused it.
afterEach(async ({ task }) => {
  if (task.result?.state !== 'fail') return;
  const earlier = daemons.length - TOLD_DAEMONS;
  if (earlier > 0) console.error(`"${task.name}" has failed; of ${earlier} daemons before these nothing is told`);
  for (const tell of daemons.slice(-TOLD_DAEMONS)) console.error(`"${task.name}" has failed; ${await tell()}`);
});

/** Resolves when the process is gone. */
export function ended(child: ChildProcess): Promise<{ code: number | null; signal: NodeJS.Signals | null }> {
  if (child.exitCode !== null || child.signalCode !== null) {
    return Promise.resolve({ code: child.exitCode, signal: child.signalCode });
  }
  return new Promise((resolve) => child.once('exit', (code, signal) => resolve({ code, signal })));
}

function within<T>(promise: Promise<T>, timeoutMs: number, what: () => string): Promise<T> {
  let timer: NodeJS.Timeout;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Error(`not within ${timeoutMs} ms: ${what()}`)), timeoutMs);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

/**
 * Poll `condition` until it returns something truthy, and return that. The pause between two polls is as long as the last poll:
 * a condition that starts a process leaves time for the work that it waits for.
 */
export async function waitUntil<T>(
  condition: () => T | Promise<T>,
  what: string,
  timeoutMs = 20_000,
): Promise<NonNullable<T>> {
  const deadline = Date.now() + timeoutMs;
  for (;;) {
    const askedAt = Date.now();
    const value = await condition();
    if (value) return value;
    if (Date.now() > deadline) throw new Error(`not within ${timeoutMs} ms: ${what}`);
    const pauseMs = Math.max(POLL_MS, Math.min(Date.now() - askedAt, MAX_POLL_MS));
    await new Promise((resolve) => setTimeout(resolve, pauseMs));
  }
}

export interface RunOptions {
  readonly cwd?: string;
  /** Added to the test's own environment; undefined removes a variable. */
  readonly env?: Readonly<Record<string, string | undefined>>;
  /** Written to stdin; without it stdin is /dev/null. */
  readonly input?: string | Buffer;
  readonly timeoutMs?: number;
}

/**
 * Run a command of the client set, or our own Node, to its end. A non-zero exit is a result, not an error; a command that
 * cannot be started is an error.
 */
export async function run(command: string, args: readonly string[], options: RunOptions = {}): Promise<RunResult> {
  if (args.includes(BIN)) requireBuild();
  const set = command === process.execPath ? HERE : clientSet;
  const [program, ...rest] = inSet(set, command, args, options.cwd);
  const child = spawn(program, rest, {
    cwd: options.cwd,
    env: environment(options.env),
    stdio: [options.input === undefined ? 'ignore' : 'pipe', 'pipe', 'pipe'],
  });
  children.add(child);
  const out: Buffer[] = [];
  const err: Buffer[] = [];
  child.stdout?.on('data', (chunk: Buffer) => out.push(chunk));
  child.stderr?.on('data', (chunk: Buffer) => err.push(chunk));
  child.stdin?.on('error', () => undefined); // it may end without reading all of it
  child.stdin?.end(options.input);
  const closed = new Promise<{ code: number | null; signal: NodeJS.Signals | null }>((resolve, reject) => {
    child.once('error', reject);
    child.once('close', (code, signal) => resolve({ code, signal }));
  });
  const timer = setTimeout(() => child.kill('SIGKILL'), options.timeoutMs ?? RUN_TIMEOUT_MS);
  try {
    return runResult(await closed, Buffer.concat(out), Buffer.concat(err));
  } finally {
    clearTimeout(timer);
    children.delete(child);
  }
}

/** Start a command of the client set that runs beside the test, with pipes for its standard streams. */
export function start(command: string, args: readonly string[]): ChildProcessWithoutNullStreams {
  const [program, ...rest] = inSet(clientSet, command, args);
  const child = spawn(program, rest, { env: environment(undefined), stdio: ['pipe', 'pipe', 'pipe'] });
  children.add(child);
  child.once('exit', () => children.delete(child));
  child.stdin.on('error', () => undefined); // it may end without reading all of it
  return child;
}

export interface CliOptions extends RunOptions {
  /** Passed in SHEEPGATE_STORE. */
  readonly store?: string;
  /**
   * True: the test is about the process: its start, its streams, its end, its memory. False: the command runs inside although its
   * name or variables tell otherwise, because it is refused before it needs them.
   */
  readonly asProcess?: boolean;
}

/** All commands are processes, as for users: a slower and more faithful run of the same tests. */
const ALL_AS_PROCESSES = process.env['SHEEPGATE_TEST_PROCESSES'] === '1';

/**
 * Run the built `sheepgate` with `args`. If it can, it runs inside the test's own process, which takes a tenth of the CPU time of
 * a process; the files and the code are the same.
 */
export function cli(args: readonly string[], options: CliOptions = {}): Promise<RunResult> {
  if (!ALL_AS_PROCESSES && !(options.asProcess ?? needsProcess(args, options))) {
    requireBuild();
    const env = environment({ SHEEPGATE_STORE: options.store });
    // The only one of these variables that the store of a cluster reads from the process.
    process.env['SHEEPGATE_STATE'] = env.SHEEPGATE_STATE;
    return runInside(args, env, options.input);
  }
  const env = options.store === undefined ? options.env : { SHEEPGATE_STORE: options.store, ...options.env };
  return run(process.execPath, [BIN, ...args], { ...options, env });
}

/** The output of freeze commands goes to the stderr of the process. */
const NEEDS_PROCESS = /^--(?:freeze|thaw)/;

function needsProcess(args: readonly string[], { env, cwd }: CliOptions): boolean {
  return env !== undefined || cwd !== undefined || args[0] === 'serve' || args.some((arg) => NEEDS_PROCESS.test(arg));
}

/** Like cli, but a failure throws with its stderr, and stdout is parsed as JSON. */
export async function cliJson<T = unknown>(args: readonly string[], options: CliOptions = {}): Promise<T> {
  const result = await cli([...args, '--json'], options);
  if (result.code !== 0) throw new Error(`sheepgate ${args.join(' ')}: exit ${result.code}: ${result.stderr}`);
  return JSON.parse(result.stdout) as T;
}

/** Skip the running test and print the reason, which the reporter does not print. */
export function skipBecause(context: TestContext, reason: string): never {
  console.log(`skipped: ${reason}`);
  return context.skip(reason);
}

type Body = (context: TestContext) => unknown;

/**
 * `test`, or a skip with the reason if the client set lacks one of these programs. 'nbdsh' means a Python with libnbd's module,
 * 'virtnbdbackup' its Python code. The table of docs/clients.md is made from these lists: a test lists the programs that it tries.
 */
export function needs(...commands: string[]): (name: string, body: Body, timeoutMs?: number) => void {
  const have = (command: string): boolean => {
    if (command === 'nbdsh') return haveNbdsh();
    return command === 'virtnbdbackup' ? virtnbdbackupOf(clientSet) !== undefined : haveCommand(command);
  };
  const missing = commands.filter((command) => !have(command));
  // A program that a set lacks must be added to build-root.sh: the test fails instead of being skipped.
  if (missing.length > 0 && clientSet.root !== undefined) {
    throw new Error(`clients "${clientSet.name}" have no ${missing.join(', ')}`);
  }
  if (missing.length > 0) {
    console.log(`skipped: ${missing.join(', ')} not installed (sh test/install.sh installs it)`);
    return (name, body) => test.skip(name, body);
  }
  return (name, body, timeoutMs) => {
    const trying: Body = (context) => {
      context.task.meta.tried = commands;
      return body(context);
    };
    test(name, trying, timeoutMs);
  };
}

/** Run a command of the client set that must succeed, and return its stdout. */
export async function ok(command: string, args: readonly string[], options: RunOptions = {}): Promise<string> {
  const result = await run(command, args, options);
  if (result.code !== 0) {
    throw new Error(
      `${command} ${args.join(' ')}: exit ${result.code ?? result.signal}\n${result.stdout}${result.stderr}`,
    );
  }
  return result.stdout;
}

/** Whether the client set has a program of that name (for `it.skipIf`). */
export function haveCommand(name: string): boolean {
  return hasCommand(clientSet, name);
}

let nbdPython: string | undefined | null = null;

/** A Python with libnbd's module. Searched for when a file first needs it: that starts Python, and most files do not. */
function findNbdPython(): string | undefined {
  if (nbdPython === null) nbdPython = nbdPythonOf(clientSet);
  return nbdPython;
}

/** Whether nbdsh() can be used; prints the reason if not. */
export function haveNbdsh(): boolean {
  const isFound = findNbdPython() !== undefined;
  if (!isFound) console.log('skipped: no python3 can import nbd (sh test/install.sh installs python3-libnbd)');
  return isFound;
}

/** Run libnbd's shell. */
export function nbdsh(args: readonly string[], options: RunOptions = {}): Promise<RunResult> {
  const python = findNbdPython();
  if (python === undefined) throw new Error('no python3 can import nbd: ask haveNbdsh() first');
  return run(python, ['-m', 'nbd', ...args], options);
}

/** The environment for a process that a test starts by itself. */
export function cleanEnvironment(): NodeJS.ProcessEnv {
  return environment(undefined);
}

function environment(extra: RunOptions['env']): NodeJS.ProcessEnv {
  const env: NodeJS.ProcessEnv = { ...process.env };
  // A developer's own settings must not lead a test to the developer's own store, or to files that a client set lacks.
  for (const name of ['SHEEPGATE_STORE', 'SHEEPGATE_CONTROL', 'NODE_OPTIONS', 'NODE_EXTRA_CA_CERTS'])
    env[name] = undefined;
  for (const [name, value] of Object.entries(extra ?? {})) {
    env[name] = value;
  }
  return env;
}

export interface DaemonOptions {
  /** More arguments of `sheepgate serve`. */
  readonly args?: readonly string[];
  /** The store directory; by default a new temporary one. */
  readonly store?: string;
  /** Serve this Sheepdog cluster instead of a store. */
  readonly cluster?: string;
  readonly env?: RunOptions['env'];
  /** A command that executes the command in its arguments: it sets up where the daemon runs. */
  readonly under?: readonly string[];
}

/** What `serve --json` prints when it is ready. */
export interface ReadyLine {
  readonly event: 'ready';
  readonly store: string;
  readonly control: string;
  readonly listeners: readonly string[];
  readonly uris: readonly string[];
  /** VDIs of --create that exist, with another size or block size. */
  readonly kept: readonly object[];
}

export interface Daemon {
  readonly store: string;
  /** Path of the NBD unix socket. */
  readonly socket: string;
  /** Path of the control socket. */
  readonly control: string;
  readonly child: ChildProcess;
  readonly ready: ReadyLine;
  /** Its stderr so far: its log, one JSON object per line. */
  log(): string;
  /** Wait until its log has this: the log comes through a pipe, and may be later than an answer on a socket. */
  logged(what: string | RegExp): Promise<void>;
  /** SIGTERM, and wait for the end. */
  stop(): Promise<{ code: number | null; signal: NodeJS.Signals | null }>;
  /** SIGKILL, and wait for the end. */
  kill(): Promise<void>;
  /** nbd+unix URI of an export. */
  uri(name: string): string;
}

/** Start `sheepgate serve` on its own unix socket, and wait until it is ready. */
export async function startDaemon(options: DaemonOptions = {}): Promise<Daemon> {
  requireBuild();
  const directory = temporaryDirectory();
  const store = options.store ?? path.join(directory, 'store');
  const socket = path.join(directory, 'nbd.sock');
  // A cluster's control socket is in the runtime directory by default, and would be the same for all daemons of a cluster.
  const control = path.join(directory, 'control.sock');
  const place =
    options.cluster === undefined ? ['--store', store] : ['--cluster', options.cluster, '--control', control];
  const args = [BIN, 'serve', '--json', ...place, '--listen', `unix:${socket}`, ...(options.args ?? [])];
  const [command, ...rest] = [...(options.under ?? []), process.execPath, ...args] as [string, ...string[]];
  const child = spawn(command, rest, { env: environment(options.env), stdio: ['ignore', 'pipe', 'pipe'] });
  children.add(child);
  child.once('exit', () => children.delete(child));

  let log = '';
  child.stderr.setEncoding('utf8').on('data', (text: string) => (log += text));
  const happened = [`started ${now()}`];
  child.once('exit', (code, signal) => happened.push(`ended ${now()} (${signal ?? code})`));
  daemons.push(async () => {
    const isAlive = child.exitCode === null && child.signalCode === null;
    const lines = [`a daemon of ${store}: ${happened.join(', ')}`];
    if (isAlive && child.pid !== undefined) lines.push(processState(child.pid), await connectionsOf(place));
    return [...lines, 'the end of its log:', log.slice(-TOLD_LOG_CHARACTERS)].join('\n');
  });
  const readyLine = new Promise<ReadyLine>((resolve, reject) => {
    let out = '';
    child.stdout.setEncoding('utf8').on('data', (text: string) => {
      out += text;
      const end = out.indexOf('\n');
      if (end >= 0) resolve(JSON.parse(out.slice(0, end)) as ReadyLine);
    });
    child.once('error', reject);
    child.once('close', (code, signal) =>
      reject(new Error(`the daemon ended (${signal ?? code}) at its start: ${log}`)),
    );
  });
  let ready: ReadyLine;
  try {
    ready = await within(readyLine, READY_TIMEOUT_MS, () => `the daemon is ready; it says: ${log}`);
  } catch (error) {
    child.kill('SIGKILL');
    throw error;
  }
  happened.push(`ready ${now()}`);

  return {
    store,
    socket,
    control: ready.control,
    child,
    ready,
    log: () => log,
    async logged(what) {
      const has = (): boolean => (typeof what === 'string' ? log.includes(what) : what.test(log));
      await waitUntil(has, `the log has ${String(what)}`).catch((error: unknown) => {
        throw new Error(`${(error as Error).message}; it has: ${log.slice(-TOLD_LOG_CHARACTERS)}`);
      });
    },
    async stop() {
      child.kill('SIGTERM');
      try {
        return await within(ended(child), STOP_TIMEOUT_MS, () => `the daemon stops after SIGTERM; it says: ${log}`);
      } catch (error) {
        child.kill('SIGKILL');
        throw error;
      }
    },
    async kill() {
      child.kill('SIGKILL');
      await ended(child);
    },
    uri: (name) => `nbd+unix:///${encodeURIComponent(name)}?socket=${socket}`,
  };
}

function now(): string {
  return new Date().toISOString();
}

/** The daemon's own list of connections; a daemon whose event loop hangs does not answer. `place`: the options to reach it. */
async function connectionsOf(place: readonly string[]): Promise<string> {
  const { code, stdout, stderr } = await cli(['client', 'list', '--json', ...place], { timeoutMs: TELL_TIMEOUT_MS });
  if (code === 0) return `its connections: ${stdout.trim()}`;
  return `it does not tell of its connections within ${TELL_TIMEOUT_MS} ms: ${stderr.trim()}`;
}
