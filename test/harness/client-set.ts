/**
 * The client programs that tests run: this machine's own, or those of another Debian release in a separate root directory
 * (test/clients/). SHEEPGATE_TEST_CLIENTS names the set; each set is a project of vitest.config.ts. Owns how a program of a set
 * is found and started; knows nothing of the tests.
 */
import { execFileSync, spawnSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';

const HERE = fileURLToPath(new URL('../clients/', import.meta.url));
const REPOSITORY = fileURLToPath(new URL('../../', import.meta.url));
const BUILD_TIMEOUT_MS = 10 * 60_000;
/** Exit status of build-root.sh: this machine cannot have such a root. */
const CANNOT = 3;

/** The sets other than this machine's own, and their Debian suites. */
export const SUITES: Readonly<Record<string, string>> = { 'debian-13': 'trixie', newest: 'sid' };

export interface ClientSet {
  readonly name: string;
  /** The root directory of its programs; undefined for this machine's own. */
  readonly root: string | undefined;
}

const OWN = 'own';

function directoryOf(suite: string): string {
  const cache = process.env.XDG_CACHE_HOME ?? path.join(os.homedir(), '.cache');
  return path.join(cache, 'sheepgate-test-clients', suite);
}

/** The set of that name, built or not. */
export function clientSetNamed(name: string): ClientSet {
  if (name === OWN) return { name, root: undefined };
  const suite = SUITES[name];
  if (suite === undefined) throw new Error(`SHEEPGATE_TEST_CLIENTS: no client set "${name}"`);
  return { name, root: path.join(directoryOf(suite), 'root') };
}

/** The set that this test process uses. */
export const clientSet = clientSetNamed(process.env.SHEEPGATE_TEST_CLIENTS ?? OWN);

/**
 * Whether this test process has this machine's own clients: for parts of a file that test the daemon alone. In the runs with
 * other clients their results would be the same (see ONE_SET_IS_ENOUGH in selection.ts for whole files).
 */
export const hasOwnClients = clientSet.root === undefined;

/** Why this machine cannot have other sets; undefined if it can. */
export function clientSetProblem(): string | undefined {
  if (process.getuid?.() !== 0) return 'only root can make and enter root directories of other releases';
  // Not started: vitest evaluates its configuration once for each project, and mmdebstrap starts four programs of its own.
  if (!hasCommand(clientSetNamed(OWN), 'mmdebstrap')) {
    return 'mmdebstrap is not installed (sh test/install.sh installs it)';
  }
  const { error, stdout } = spawnSync('dpkg', ['--print-architecture'], { encoding: 'utf8' });
  const isDebian = error === undefined && stdout.trim() === 'amd64';
  return isDebian ? undefined : 'they are made on Debian, for amd64';
}

/** Build the root directory of a set if it is not there yet. Throws with the reason if that fails. */
export function buildClientSet(name: string): void {
  const suite = SUITES[name];
  if (suite === undefined) return;
  const built = spawnSync('sh', [path.join(HERE, 'build-root.sh'), suite, directoryOf(suite)], {
    encoding: 'utf8',
    timeout: BUILD_TIMEOUT_MS,
  });
  if (built.status === 0) return;
  const what = built.status === CANNOT ? 'cannot be had here' : `failed (${built.status ?? built.signal})`;
  throw new Error(`client set ${name} ${what}: ${built.stderr}`);
}

/** The program and arguments that run `command` of a set in `directory`, as the same process. */
export function inSet(
  set: ClientSet,
  command: string,
  args: readonly string[],
  directory = process.cwd(),
): [string, ...string[]] {
  if (set.root === undefined) return [command, ...args];
  const shared = [os.tmpdir(), REPOSITORY, process.execPath].join(':');
  return ['/bin/sh', path.join(HERE, 'in-root.sh'), set.root, directory, shared, command, ...args];
}

/** Whether a set has a program of that name in its PATH. */
export function hasCommand(set: ClientSet, name: string): boolean {
  const own = set.root === undefined ? (process.env.PATH ?? '') : '/usr/local/bin:/usr/bin:/bin';
  const places = `${own}:/usr/sbin:/sbin`.split(':').filter((place) => place !== '');
  return places.some((place) => {
    try {
      fs.accessSync(path.join(set.root ?? '/', place, name), fs.constants.X_OK);
      return true;
    } catch {
      return false;
    }
  });
}

/** The arguments that print a program's version, and the pattern that finds it. */
const VERSIONS: readonly (readonly [program: string, args: readonly string[], version: RegExp])[] = [
  ['qemu-img', ['--version'], /version (\S+)/],
  ['nbdcopy', ['--version'], /^nbdcopy (\S+)/],
  ['nbdkit', ['--version'], /^nbdkit (\S+)/],
  ['nbd-client', ['--version'], /from nbd (\S+)/],
  ['fio', ['--version'], /fio-(\S+)/],
  ['qemu-system-x86_64', ['--version'], /version (\S+)/],
  ['python3', ['--version'], /Python (\S+)/],
];

/** The versions of a set's programs, by program, without missing programs. */
export function versionsOf(set: ClientSet): Readonly<Record<string, string>> {
  const versions: Record<string, string> = {};
  for (const [program, args, pattern] of VERSIONS) {
    if (!hasCommand(set, program)) continue;
    const [command, ...rest] = inSet(set, program, args, '/');
    // nbd-client prints its version and then fails because no host is given; 3.27 only fails.
    const { stdout, stderr } = spawnSync(command, rest, { encoding: 'utf8' });
    const version = pattern.exec(stdout + stderr)?.[1] ?? packageVersion(set, program);
    if (version !== undefined) versions[program] = version;
  }
  return versions;
}

/** The version of the Debian package with the name of the program. */
function packageVersion(set: ClientSet, program: string): string | undefined {
  const [command, ...args] = inSet(set, 'dpkg-query', ['-W', '-f', '${Version}', program], '/');
  const { status, stdout } = spawnSync(command, args, { encoding: 'utf8' });
  return status === 0 ? /^(?:\d+:)?([^-]+)/.exec(stdout)?.[1] : undefined;
}

/** The name of a set's release. */
export function releaseOf(set: ClientSet): string {
  const file = path.join(set.root ?? '/', 'etc/os-release');
  try {
    return /^PRETTY_NAME="(.*)"$/m.exec(fs.readFileSync(file, 'utf8'))?.[1] ?? 'unknown';
  } catch {
    return 'unknown';
  }
}

/** A Python of the set with libnbd's module. The first one on the PATH may not be the system's, and lack it. */
export function nbdPythonOf(set: ClientSet): string | undefined {
  return ['python3', '/usr/bin/python3'].find((python) => {
    try {
      // Not only the import: our own folder nbd/ would count as a package.
      const [command, ...args] = inSet(set, python, ['-c', 'import nbd; nbd.NBD']);
      execFileSync(command, args, { stdio: 'ignore' });
      return true;
    } catch {
      return false;
    }
  });
}

/** The path of virtnbdbackup's Python code (unpack-virtnbdbackup.sh), as the set's programs see it. */
export function virtnbdbackupOf(set: ClientSet): string | undefined {
  const unpacked = set.root === undefined ? directoryOf('virtnbdbackup') : '/opt/virtnbdbackup';
  const code = path.join(unpacked, 'usr/lib/python3/dist-packages');
  return fs.existsSync(path.join(set.root ?? '/', code, 'libvirtnbdbackup')) ? code : undefined;
}
