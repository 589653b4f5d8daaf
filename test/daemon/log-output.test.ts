/**
 * The log has no reader, no room, or no terminal any more: nothing waits for it or ends because of it, memory stays bounded, and
 * dropped lines are counted, and the count is written later.
 */
import { execFileSync, type ChildProcess } from 'node:child_process';
import fs from 'node:fs';
import net from 'node:net';
import path from 'node:path';
import { describe, expect, test } from 'vitest';
import { NbdClient } from 'nbd-server-ts';
import { LogOutput, WAITING_BYTES } from '../../src/daemon/log/log-output.js';
import { BIN, cli, ended, haveCommand, skipBecause, temporaryDirectory, waitUntil, spawn } from '../harness/daemon.js';

const LINE = `${'x'.repeat(199)}\n`;
/** More than a pipe and the output together can hold. */
const MANY = Math.ceil((2 * WAITING_BYTES) / LINE.length);
const NONBLOCKING = fs.constants.O_NONBLOCK;

const note = (count: number, why: string): string => `dropped ${count}: ${why}\n`;

function fifo(): { readonly name: string; readonly fd: number } {
  const name = path.join(temporaryDirectory(), 'fifo');
  execFileSync('mkfifo', [name]);
  // Both ends, so that opening it does not wait.
  return { name, fd: fs.openSync(name, fs.constants.O_RDWR) };
}

/** Read a fifo until it is empty; through a descriptor with a mode of its own. */
function readerOf(name: string): () => string {
  const fd = fs.openSync(name, fs.constants.O_RDONLY | NONBLOCKING);
  const buffer = Buffer.alloc(2 ** 20);
  return () => {
    let text = '';
    for (;;) {
      try {
        const length = fs.readSync(fd, buffer, 0, buffer.length, null);
        if (length === 0) return text;
        text += buffer.toString('latin1', 0, length);
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code !== 'EAGAIN') throw error;
        return text;
      }
    }
  };
}

function flagsOf(fd: number): number {
  return parseInt(/flags:\s*(\d+)/.exec(fs.readFileSync(`/proc/self/fdinfo/${fd}`, 'utf8'))?.[1] ?? '', 8);
}

/** The count in the note, which must stand after the kept lines and before the later ones. */
async function countTold(read: () => string, output: LogOutput): Promise<{ kept: number; dropped: number }> {
  let text = '';
  await waitUntil(() => (text += read()).includes('dropped '), 'the log has the number of dropped lines');
  output.write('later\n');
  await waitUntil(() => (text += read()).endsWith('later\n'), 'it is written on');
  const [before, after, ...rest] = text.split(/^dropped /m);
  expect(rest).toEqual([]);
  expect(after).toMatch(/^\d+: nobody read it\nlater\n$/);
  const kept = (before ?? '').split(LINE).length - 1;
  expect(before).toBe(LINE.repeat(kept));
  return { kept, dropped: Number.parseInt(after ?? '') };
}

describe('unread log lines', () => {
  test('wait in bounded memory, and lines without room there are counted', async () => {
    const { name, fd } = fifo();
    const output = new LogOutput(fd, note);
    const before = performance.now();
    for (let n = 0; n < MANY; n++) output.write(LINE);
    expect(performance.now() - before).toBeLessThan(2_000);
    const { kept, dropped } = await countTold(readerOf(name), output);
    expect(kept + dropped).toBe(MANY);
    expect(kept * LINE.length).toBeGreaterThan(WAITING_BYTES / 2);
    expect(kept * LINE.length).toBeLessThan(WAITING_BYTES + 2 ** 18);
    expect(await output.drain(1_000)).toBe(true);
    expect(flagsOf(fd) & NONBLOCKING).toBe(0);
  });

  test('wait for a socket likewise, whose mode is not changed', async () => {
    const place = path.join(temporaryDirectory(), 'socket');
    let theirs: net.Socket | undefined;
    const server = net.createServer({ pauseOnConnect: true }, (socket) => (theirs = socket)).listen(place);
    const ours = net.connect(place);
    await waitUntil(() => theirs, 'it is connected');
    const { fd } = (ours as unknown as { readonly _handle: { readonly fd: number } })._handle;
    const output = new LogOutput(fd, note);
    for (let n = 0; n < MANY; n++) output.write(LINE);
    let text = '';
    theirs?.setEncoding('latin1').on('data', (chunk: string) => (text += chunk));
    theirs?.resume();
    const read = (): string => {
      const some = text;
      text = '';
      return some;
    };
    const { kept, dropped } = await countTold(read, output);
    expect(kept + dropped).toBe(MANY);
    ours.destroy();
    server.close();
  });

  test('are awaited only for the given time', async () => {
    const { name, fd } = fifo();
    const output = new LogOutput(fd, note);
    for (let n = 0; n < MANY; n++) output.write(LINE);
    expect(await output.drain(20)).toBe(false);
    const read = readerOf(name);
    const draining = output.drain(20_000);
    let isDrained: boolean | undefined;
    void draining.then((value) => (isDrained = value));
    // An empty pipe is not the end: waiting lines are written when there is room.
    await waitUntil(() => (read(), isDrained !== undefined), 'all is written');
    expect(isDrained).toBe(true);
  });
});

test('a full disk is not an error, and the note has the cause', async () => {
  const output = new LogOutput(fs.openSync('/dev/full', 'w'), note);
  for (let n = 0; n < MANY; n++) output.write(LINE);
  output.flushSync();
  expect(await output.drain(20)).toBe(false);
});

test('a closed descriptor and a pipe without a reader are not errors', async () => {
  const { name, fd } = fifo();
  const broken = fs.openSync(name, fs.constants.O_WRONLY | NONBLOCKING);
  fs.closeSync(fd);
  for (const each of [broken, 4_000]) {
    const output = new LogOutput(each, note);
    output.write(LINE);
    expect(await output.drain(20)).toBe(false);
  }
});

test('lines reach a file in their order', async () => {
  const file = path.join(temporaryDirectory(), 'log');
  const output = new LogOutput(fs.openSync(file, 'w'), note);
  let expected = '';
  for (let n = 0; n < 5_000; n++) {
    output.write(`${n}\n`);
    expected += `${n}\n`;
  }
  expect(await output.drain(10_000)).toBe(true);
  expect(fs.readFileSync(file, 'utf8')).toBe(expected);
});

test('a line that never has room is counted, and those after it are written', async () => {
  const file = path.join(temporaryDirectory(), 'log');
  const output = new LogOutput(fs.openSync(file, 'w'), note);
  output.write(`${'x'.repeat(WAITING_BYTES)}\n`);
  output.write('one\n');
  expect(await output.drain(1_000)).toBe(true);
  expect(fs.readFileSync(file, 'utf8')).toBe(`dropped 1: it was longer than ${WAITING_BYTES} bytes\none\n`);
});

test('the last line before the process ends is in the file', async () => {
  const file = path.join(temporaryDirectory(), 'log');
  const output = new LogOutput(fs.openSync(file, 'w'), note);
  output.write('one\n');
  output.write('two\n');
  output.write('dead\n');
  output.flushSync();
  expect(fs.readFileSync(file, 'utf8')).toContain('two\ndead\n');
  expect(await output.drain(1_000)).toBe(true);
  expect(fs.readFileSync(file, 'utf8').split('\n').sort()).toEqual(['', 'dead', 'one', 'two']);
});

describe('a daemon', () => {
  const places = (): { readonly socket: string; readonly args: string[] } => {
    const directory = temporaryDirectory();
    const socket = path.join(directory, 'nbd.sock');
    const place = ['--store', path.join(directory, 's'), '--listen', `unix:${socket}`, '--create', 'd:1M'];
    return { socket, args: [BIN, 'serve', '--debug', ...place] };
  };
  /** Requests, each of which is a line of 128 bytes in the log: by default more than a pipe and the log's memory hold. */
  const work = async (socket: string, requests = 12_000): Promise<void> => {
    const client = await waitUntil(() => NbdClient.connect({ path: socket }).catch(() => undefined), 'it listens');
    await client.go('d');
    const read = async (): Promise<void> => {
      for (let n = 0; n < requests / 10; n++) await client.read(0, 512);
    };
    await Promise.all(Array.from({ length: 10 }, read));
    await client.disconnect();
  };
  const stopped = async (child: ChildProcess): Promise<void> => {
    child.kill('SIGTERM');
    expect(await ended(child)).toEqual({ code: 0, signal: null });
  };

  test('whose log has no room serves, and stops in order', async () => {
    const { socket, args } = places();
    const full = fs.openSync('/dev/full', 'w');
    const child = spawn(process.execPath, args, { stdio: ['ignore', full, full] });
    await work(socket, 1_000);
    await stopped(child);
  });

  test('with an unread log serves, logs the number of dropped lines later, and stops in order', async () => {
    const { socket, args } = places();
    const { name, fd } = fifo();
    const child = spawn(process.execPath, args, { stdio: ['ignore', fd, fd] });
    await work(socket);
    await work(socket, 10);
    const read = readerOf(name);
    let log = '';
    await waitUntil(() => (log += read()).includes('"dropped"'), 'the log has the number of dropped lines');
    const line = log.split('\n').find((each) => each.includes('"dropped"')) ?? '';
    expect(JSON.parse(line)).toMatchObject({ level: 40, reason: 'nobody read it', msg: expect.any(String) as string });
    // Without a reader it ends all the same.
    await work(socket);
    await stopped(child);
  });

  test('that fails to start with an unread log ends', async () => {
    const { fd } = fifo();
    const fill = new LogOutput(fd, note);
    for (let n = 0; n < MANY; n++) fill.write(LINE);
    const file = path.join(temporaryDirectory(), 'file');
    fs.writeFileSync(file, '');
    const child = spawn(process.execPath, [BIN, 'serve', '--store', file], { stdio: ['ignore', fd, fd] });
    expect(await ended(child)).toEqual({ code: 1, signal: null });
  });

  test('on a terminal that is stopped with Ctrl-S, and then closed, continues to serve', async (context) => {
    if (!haveCommand('python3')) skipBecause(context, 'no python3 to make a terminal with');
    const { socket, args } = places();
    // Runs its arguments on a new terminal; Ctrl-S is typed at the first line it is given, and the end closes the terminal.
    const terminal = [
      'import os, pty, sys',
      'pid, fd = pty.fork()',
      'if pid == 0: os.execv(sys.argv[1], sys.argv[1:])',
      'print(pid, flush=True)',
      'os.read(fd, 1)',
      'sys.stdin.readline()',
      'os.write(fd, b"\\x13")',
      'print("stopped", flush=True)',
      'sys.stdin.readline()',
      'os.close(fd)',
      'print("closed", flush=True)',
      'print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)',
    ].join('\n');
    const python = spawn('python3', ['-c', terminal, process.execPath, ...args], {
      stdio: ['pipe', 'pipe', 'inherit'],
    });
    let out = '';
    python.stdout.setEncoding('utf8').on('data', (text: string) => (out += text));
    await work(socket, 10);
    python.stdin.write('\n');
    await waitUntil(() => out.includes('stopped'), 'Ctrl-S was typed');
    await work(socket);
    python.stdin.write('\n');
    await waitUntil(() => out.includes('closed'), 'the terminal is closed');
    await work(socket, 1_000);
    process.kill(Number.parseInt(out), 'SIGTERM');
    await ended(python);
    expect(out).toMatch(/closed\n0\n$/);
  });
});

test('a command whose stderr has no room still has its exit code', async () => {
  const full = fs.openSync('/dev/full', 'w');
  const child = spawn(process.execPath, [BIN, 'vdi', 'show', 'nope', '--store', temporaryDirectory()], {
    stdio: ['ignore', 'ignore', full],
  });
  expect(await ended(child)).toEqual({ code: 1, signal: null });
  expect((await cli(['vdi', 'list'], { store: temporaryDirectory() })).code).not.toBe(null);
});
