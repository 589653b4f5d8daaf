/**
 * The client programs that tests run: this machine's own, or those of another Debian release in a root directory of its
 * own (test/clients/). SHEEPGATE_TEST_CLIENTS says which; each set is a project of vitest.config.ts. Owns how a program
 * of a set is found and started; knows nothing of what tests do with it.
 */
import { execFileSync, spawnSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';

const HERE = fileURLToPath(new URL('../clients/', import.meta.url));
const REPOSITORY = fileURLToPath(new URL('../../', import.meta.url));
const BUILD_TIMEOUT_MS = 10 * 60_000;
/** Exit status of build-root.sh: there can be no such root here. */
const CANNOT = 3;

/** The sets beside this machine's own, and the Debian suites that they come from. */
export const SUITES: Readonly<Record<string, string>> = { 'debian-13': 'trixie', newest: 'sid' };

export interface ClientSet {
  readonly name: string;
  /** Where its programs' root directory is; undefined: they are this machine's own. */
  readonly root: string | undefined;
}

const OWN = 'own';

function directoryOf(suite: string): string {
  const cache = process.env.XDG_CACHE_HOME ?? path.join(os.homedir(), '.cache');
  return path.join(cache, 'sheepgate-test-clients', suite);
}

/** The set of that name; it need not have been built. */
export function clientSetNamed(name: string): ClientSet {
  if (name === OWN) return { name, root: undefined };
  const suite = SUITES[name];
  if (suite === undefined) throw new Error(`SHEEPGATE_TEST_CLIENTS: no client set "${name}"`);
  return { name, root: path.join(directoryOf(suite), 'root') };
}

/** The set that this test process uses. */
export const clientSet = clientSetNamed(process.env.SHEEPGATE_TEST_CLIENTS ?? OWN);

/** Why there can be no set of that name on this machine, or undefined. */
export function clientSetProblem(): string | undefined {
  if (process.getuid?.() !== 0) return 'only root can make and enter root directories of other releases';
  if (spawnSync('mmdebstrap', ['--version'], { stdio: 'ignore' }).error !== undefined) {
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

/** Whether a set has a program of that name where programs are. */
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

/** What to ask for its version, and which words of the answer are the version. */
const VERSIONS: readonly (readonly [program: string, args: readonly string[], version: RegExp])[] = [
  ['qemu-img', ['--version'], /version (\S+)/],
  ['nbdcopy', ['--version'], /^nbdcopy (\S+)/],
  ['nbdkit', ['--version'], /^nbdkit (\S+)/],
  ['nbd-client', ['--version'], /from nbd (\S+)/],
  ['fio', ['--version'], /fio-(\S+)/],
  ['qemu-system-x86_64', ['--version'], /version (\S+)/],
  ['python3', ['--version'], /Python (\S+)/],
];

/** The versions of a set's programs, by program; those that are not there are left out. */
export function versionsOf(set: ClientSet): Readonly<Record<string, string>> {
  const versions: Record<string, string> = {};
  for (const [program, args, pattern] of VERSIONS) {
    if (!hasCommand(set, program)) continue;
    const [command, ...rest] = inSet(set, program, args, '/');
    // nbd-client prints its version and then fails for want of a host; 3.27 does only the latter.
    const { stdout, stderr } = spawnSync(command, rest, { encoding: 'utf8' });
    const version = pattern.exec(stdout + stderr)?.[1] ?? packageVersion(set, program);
    if (version !== undefined) versions[program] = version;
  }
  return versions;
}

/** The version of the Debian package that bears the name of the program. */
function packageVersion(set: ClientSet, program: string): string | undefined {
  const [command, ...args] = inSet(set, 'dpkg-query', ['-W', '-f', '${Version}', program], '/');
  const { status, stdout } = spawnSync(command, args, { encoding: 'utf8' });
  return status === 0 ? /^(?:\d+:)?([^-]+)/.exec(stdout)?.[1] : undefined;
}

/** The name of the release that a set is of. */
export function releaseOf(set: ClientSet): string {
  const file = path.join(set.root ?? '/', 'etc/os-release');
  try {
    return /^PRETTY_NAME="(.*)"$/m.exec(fs.readFileSync(file, 'utf8'))?.[1] ?? 'unknown';
  } catch {
    return 'unknown';
  }
}

/** A Python of the set that has libnbd's module. The one first on the PATH may be another than the system's, and lack it. */
export function nbdPythonOf(set: ClientSet): string | undefined {
  return ['python3', '/usr/bin/python3'].find((python) => {
    try {
      // Not only the import: our own folder nbd/ would pass for a package.
      const [command, ...args] = inSet(set, python, ['-c', 'import nbd; nbd.NBD']);
      execFileSync(command, args, { stdio: 'ignore' });
      return true;
    } catch {
      return false;
    }
  });
}

/** Where a set has the Python code of virtnbdbackup (unpack-virtnbdbackup.sh), as the set's programs see it. */
export function virtnbdbackupOf(set: ClientSet): string | undefined {
  const unpacked = set.root === undefined ? directoryOf('virtnbdbackup') : '/opt/virtnbdbackup';
  const code = path.join(unpacked, 'usr/lib/python3/dist-packages');
  return fs.existsSync(path.join(set.root ?? '/', code, 'libvirtnbdbackup')) ? code : undefined;
}
