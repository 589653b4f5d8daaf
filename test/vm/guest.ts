/**
 * A Linux guest under qemu, for tests with the kernel's NBD client. Kernel, programs and qemu come from the client set.
 * Owns the cache of kernel and initramfs, and the qemu processes. A guest runs one shell script, and exchanges lines with
 * the test over its serial port.
 */
import { spawn, spawnSync, type ChildProcess } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, afterEach, type TestContext } from 'vitest';
import { clientSet, inSet } from '../harness/client-set.js';
import { ended, temporaryDirectory, waitUntil } from '../harness/daemon.js';
import { isStopped, processState } from '../harness/process-state.js';

const BUILD = fileURLToPath(new URL('build-guest.sh', import.meta.url));
/** Downloads are kept between runs; each client set has its own guest. */
const CACHE = path.join(
  process.env.XDG_CACHE_HOME ?? path.join(os.homedir(), '.cache'),
  'sheepgate-test-guest',
  clientSet.name,
);
const BUILD_TIMEOUT_MS = 5 * 60_000;
const CANNOT = 3;
/** The guest's disk cache and tmpfs have to fit. */
const MEMORY_MIB = 512;

/** With ERMS or FSRM the kernel copies by "rep movsb", which qemu emulates byte by byte: five times slower than the alternative. */
const CPU = 'max,-erms,-fsrm';
const KERNEL_OPTIONS = [
  ...['console=ttyS0', 'quiet', 'panic=-1', 'mitigations=off'],
  // Under load an emulated timer fires late. The kernel would take it for broken and panic: no_timer_check prevents that.
  ...['no_timer_check', 'tsc=reliable'],
  // What costs CPU time at boot and that no test needs: self-tests of cryptography, keys for modules, clearing of new pages.
  ...['cryptomgr.notests', 'random.trust_cpu=on', 'init_on_alloc=0', 'audit=0'],
  'initcall_blacklist=jent_mod_init,crypto_kdf108_init,load_system_certificate_list,trace_eval_init',
];

/**
 * Trace events of qemu's NBD reconnects, on stderr: a line for each attempt, each option, and each wait before the next
 * attempt.
 */
const TRACED = [
  ...['nbd_reconnect_attempt', 'nbd_reconnect_attempt_result', 'nbd_connect_thread_sleep', 'nbd_client_handshake'],
  ...['nbd_client_handshake_success', 'nbd_send_option_request', 'nbd_receive_option_reply', 'nbd_server_error_msg'],
];
/** Length of the end of that output, printed after a failed test. */
const TOLD_CHARACTERS = 8_000;

const children = new Set<ChildProcess>();
/** Running guests, each with the stderr of its qemu so far. */
const guests = new Map<ChildProcess, () => string>();
afterEach(({ task }) => {
  if (task.result?.state !== 'fail') return;
  for (const [{ pid }, said] of guests) {
    const state = pid === undefined ? 'never started' : processState(pid);
    console.error(
      `"${task.name}" has failed; its qemu, ${state}\nwhat it said last:\n${said().slice(-TOLD_CHARACTERS)}`,
    );
  }
});
afterAll(async () => {
  const running = [...children];
  for (const child of running) child.kill('SIGKILL');
  await Promise.all(running.map(ended));
});
process.on('exit', () => {
  for (const child of children) child.kill('SIGKILL');
});

/** Why a guest cannot run here; undefined if it can. Builds the guest if needed. */
export function guestProblem(): string | undefined {
  const root = clientSet.root === undefined ? [] : [clientSet.root];
  const built = spawnSync('sh', [BUILD, CACHE, ...root], { encoding: 'utf8', timeout: BUILD_TIMEOUT_MS });
  if (built.status === 0) return undefined;
  // A client set has everything for its guest, and this machine has the build tools (test/install.sh).
  if (built.status === CANNOT && clientSet.root === undefined) return built.stderr.trim();
  throw new Error(`building the guest failed (${built.status ?? built.signal}): ${built.stderr}`);
}

/** Records for the table of docs/clients.md that a test has used the guest kernel's nbd driver, and nbd-client. */
export function triesKernel({ task }: TestContext, { kernel }: Guest): void {
  task.meta.tried = ['linux', 'nbd-client'];
  task.meta.versions = { linux: kernel.replace(/(\+deb\d+)?-cloud.*$/, '') };
}

export interface Guest {
  /** The output of `uname -r` in the guest: 6.12.118+deb13-cloud-amd64. */
  readonly kernel: string;
  /** Resolves with the rest of the next line that starts with "::WORD". Fails if the guest fails, ends or is too slow. */
  expect(word: string, timeoutMs?: number): Promise<string>;
  /** Answers a `wait_for WORD` of the job. */
  send(word: string): void;
  /** Waits for the guest's power-off. */
  end(): Promise<void>;
  /**
   * Does `work` while qemu is stopped: for killing a daemon that qemu is connected to over TCP. A client that connects just
   * when Linux closes a listener may get a connection that is neither answered nor reset (the last packet of the handshake is
   * dropped: ListenDrops in /proc/net/netstat), and qemu would wait on it until its reconnect-delay is over.
   */
  whileStopped(work: () => Promise<void>): Promise<void>;
  /** The guest's output so far. */
  console(): string;
}

const EXPECT_TIMEOUT_MS = 90_000;

/**
 * Boots a guest that runs `job` (shell, sourced by its init), with more `devices` (arguments of qemu), and prints the version
 * of its kernel. Files of devices must be below the temporary directory: qemu may run in another release's root.
 */
export async function bootGuest(job: string, devices: readonly string[] = []): Promise<Guest> {
  const directory = temporaryDirectory();
  const kernelFile = path.join(directory, 'kernel');
  const initramfs = path.join(directory, 'initramfs');
  fs.copyFileSync(path.join(CACHE, 'kernel'), kernelFile, fs.constants.COPYFILE_FICLONE);
  // The kernel unpacks consecutive archives: the job is appended to the cached archive.
  fs.copyFileSync(path.join(CACHE, 'initramfs'), initramfs, fs.constants.COPYFILE_FICLONE);
  fs.writeFileSync(path.join(directory, 'job'), job);
  const archive = spawnSync('cpio', ['-o', '-H', 'newc', '--quiet'], { cwd: directory, input: 'job\n' });
  if (archive.status !== 0) throw new Error(`cpio failed: ${String(archive.stderr)}`);
  fs.appendFileSync(initramfs, archive.stdout);

  const [command, ...args] = inSet(clientSet, 'qemu-system-x86_64', [
    ...['-nodefaults', '-no-user-config', '-no-reboot', '-display', 'none', '-machine', 'q35,accel=tcg'],
    ...['-cpu', CPU, '-smp', '1', '-m', String(MEMORY_MIB), '-serial', 'stdio'],
    ...['-kernel', kernelFile, '-initrd', initramfs, '-append', KERNEL_OPTIONS.join(' ')],
    ...['-netdev', 'user,id=n0,ipv6=off', '-device', 'virtio-net-pci,netdev=n0,romfile='],
    ...['-msg', 'timestamp=on', ...TRACED.flatMap((event) => ['-trace', event])],
    ...devices,
  ]);
  const child = spawn(command, args, { stdio: ['pipe', 'pipe', 'pipe'] });
  children.add(child);
  child.once('exit', () => children.delete(child));
  let output = '';
  /** Separate streams: a line of qemu must not split a line of the guest. */
  let errors = '';
  let seen = 0;
  const listeners = new Set<() => void>();
  const onOutput = (text: string): void => {
    output += text;
    for (const listener of listeners) listener();
  };
  child.stdout.setEncoding('utf8').on('data', onOutput);
  child.stderr.setEncoding('utf8').on('data', (text: string) => (errors += text));
  guests.set(child, () => errors);
  child.once('exit', () => onOutput(''));
  const tail = (): string => `${output.slice(-4000)}\nqemu: ${errors.slice(-1000)}`;

  const expectLine = (word: string, timeoutMs = EXPECT_TIMEOUT_MS): Promise<string> =>
    new Promise((resolve, reject) => {
      const finish = (settle: () => void): void => {
        clearTimeout(timer);
        listeners.delete(look);
        settle();
      };
      const timer = setTimeout(
        () => finish(() => reject(new Error(`no "::${word}" within ${timeoutMs} ms:\n${tail()}`))),
        timeoutMs,
      );
      const look = (): void => {
        for (let end = output.indexOf('\n', seen); end >= 0; end = output.indexOf('\n', seen)) {
          const line = output.slice(seen, end).trim();
          seen = end + 1;
          const said = line.slice(line.indexOf('::') + 2);
          if (!line.includes('::')) continue;
          if (said.startsWith('FAIL')) return finish(() => reject(new Error(`the guest says ${said}:\n${tail()}`)));
          if (said.split(' ')[0] === word) return finish(() => resolve(said.slice(word.length + 1)));
        }
        if (child.exitCode !== null || child.signalCode !== null) {
          finish(() => reject(new Error(`the guest ended before "::${word}":\n${tail()}`)));
        }
      };
      listeners.add(look);
      look();
    });

  const kernel = await expectLine('BOOTED');
  console.log(`guest of clients "${clientSet.name}": Linux ${kernel}`);
  return {
    kernel,
    expect: expectLine,
    send(word) {
      child.stdin.write(`${word}\n`);
    },
    async end() {
      await ended(child);
    },
    async whileStopped(work) {
      child.kill('SIGSTOP');
      try {
        await waitUntil(() => child.pid !== undefined && isStopped(child.pid), 'qemu stands still');
        await work();
      } finally {
        child.kill('SIGCONT');
      }
    },
    console: () => output,
  };
}
