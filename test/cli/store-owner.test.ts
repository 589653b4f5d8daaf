/** Commands as root on the store of a service user: the files that they make must belong to that user. Needs root and setpriv. */
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { describe, expect, test } from 'vitest';
import { NbdClient } from 'nbd-server-ts';
import {
  BIN,
  cli,
  ended,
  haveCommand,
  run,
  start,
  startDaemon,
  temporaryDirectory,
  waitUntil,
} from '../harness/daemon.js';
import { StandIn } from '../sheep/stand-in.js';
import { oneLineOf, patterned } from './both-ways.js';

/** A user and a group without names, which no machine uses. */
const UID = 54_321;
const GID = 54_322;

const isRoot = process.geteuid?.() === 0 && haveCommand('setpriv');
if (!isRoot) console.log('skipped: root beside a service user needs root and setpriv');

interface Manifest {
  readonly dependencies?: Readonly<Record<string, string>>;
  readonly optionalDependencies?: Readonly<Record<string, string>>;
}

/** The folders of the packages that the one in `folder` needs, all of them in `checkout`'s node_modules. */
function packagesFor(checkout: string, folder: string, found = new Set<string>()): Set<string> {
  const manifest = JSON.parse(fs.readFileSync(path.join(checkout, folder, 'package.json'), 'utf8')) as Manifest;
  for (const name of Object.keys({ ...manifest.dependencies, ...manifest.optionalDependencies })) {
    const needed = path.join('node_modules', name);
    // Optional packages for other systems are not installed.
    if (found.has(needed) || !fs.existsSync(path.join(checkout, needed))) continue;
    packagesFor(checkout, needed, found.add(needed));
  }
  return found;
}

/** The program where every user can read it, as if installed: this checkout may be readable only by its owner. */
function installed(): string {
  const checkout = path.dirname(path.dirname(BIN));
  const directory = temporaryDirectory();
  fs.chmodSync(directory, 0o755);
  const parts = ['package.json', 'bin', 'dist/bundle', ...packagesFor(checkout, '.')];
  execFileSync('cp', ['-a', '--parents', ...parts, directory], { cwd: checkout });
  return path.join(directory, 'bin', path.basename(BIN));
}

const program = isRoot ? installed() : BIN;

const AS_OWNER = ['setpriv', `--reuid=${UID}`, `--regid=${GID}`, '--clear-groups'];

function asOwner(...args: string[]) {
  const [command, ...rest] = [...AS_OWNER, process.execPath, program, ...args];
  return run(command as string, rest, { env: { HOME: '/nonexistent', XDG_RUNTIME_DIR: undefined } });
}

/** The empty directory of a service's store, and a directory that only root can enter. */
function places() {
  const directory = temporaryDirectory();
  fs.chmodSync(directory, 0o755);
  const store = path.join(directory, 'store');
  fs.mkdirSync(store, { mode: 0o700 });
  fs.chownSync(store, UID, GID);
  const roots = path.join(directory, 'roots');
  fs.mkdirSync(roots, { mode: 0o700 });
  return { store, roots, directory };
}

/** The service. */
async function serving(store: string, directory: string) {
  const sockets = path.join(directory, 'sockets');
  fs.mkdirSync(sockets);
  fs.chownSync(sockets, UID, GID);
  const [command, ...rest] = [...AS_OWNER, process.execPath, program, 'serve', '--create-store=no', '--store', store];
  const daemon = start(command, [...rest, '--listen', `unix:${path.join(sockets, 'nbd.sock')}`]);
  let log = '';
  daemon.stderr.setEncoding('utf8').on('data', (text: string) => (log += text));
  await waitUntil(() => fs.existsSync(path.join(store, 'control.sock')), 'the daemon listens');
  return { daemon, log: () => log };
}

function ownersOf(directory: string): string[] {
  const names = ['.', ...fs.readdirSync(directory, { recursive: true, encoding: 'utf8' })];
  const owners = names.map((name) => fs.lstatSync(path.join(directory, name))).map(({ uid, gid }) => `${uid}:${gid}`);
  return [...new Set(owners)];
}

describe.skipIf(!isRoot)('as root on the store of a service user', () => {
  test('all files made there belong to that user; sources and targets may be readable and writable by root only', async () => {
    const { store, roots } = places();
    const image = path.join(roots, 'image');
    fs.writeFileSync(image, Buffer.alloc(9 * 2 ** 20, 7), { mode: 0o600 });
    const done = async (...args: string[]): Promise<void> => {
      expect(await cli([...args, '--store', store]), args.join(' ')).toMatchObject({ code: 0 });
    };
    await done('import', image, 'disk');
    await done('vdi', 'create', 'other', '64M');
    await done('vdi', 'snapshot', 'disk', 's');
    await done('import', image, 'disk', '--overwrite');
    await done('vdi', 'clone', 'disk@s', 'copy');
    await done('export', 'copy', path.join(roots, 'exported'));
    await done('check');
    expect(ownersOf(store)).toEqual([`${UID}:${GID}`]);
    expect(fs.readFileSync(path.join(roots, 'exported')).equals(fs.readFileSync(image))).toBe(true);
    expect(fs.statSync(path.join(roots, 'exported')).uid).toBe(0);
    // The service can do everything with it.
    expect(await asOwner('vdi', 'delete', 'copy', '--store', store)).toMatchObject({ code: 0, stderr: '' });
    expect(await asOwner('check', '--store', store)).toMatchObject({ code: 0 });
  });

  test('a backup is written where that user may write, and restored from where only root can read', async () => {
    const { store, roots, directory } = places();
    expect((await cli(['vdi', 'create', 'disk', '8M', '--store', store])).code).toBe(0);
    const refused = await cli(['backup', 'disk', '--to', path.join(roots, 'backup'), '--store', store]);
    expect(refused).toMatchObject({
      code: 1,
      stderr: expect.stringContaining(`this command works as its owner, uid ${UID}`) as string,
    });
    const backups = path.join(directory, 'backups');
    fs.mkdirSync(backups);
    fs.chownSync(backups, UID, GID);
    const frozen = path.join(roots, 'frozen');
    const freezing = ['--freeze-cmd', `id -u > ${frozen}`, '--thaw-cmd', 'true'];
    const taken = await cli(['backup', 'disk', '--to', path.join(backups, 'disk'), ...freezing, '--store', store]);
    expect(taken).toMatchObject({ code: 0, stderr: '' });
    expect(fs.readFileSync(frozen, 'utf8')).toBe('0\n');
    fs.renameSync(path.join(backups, 'disk'), path.join(roots, 'disk'));
    execFileSync('chown', ['-R', '0:0', path.join(roots, 'disk')]);
    expect(await cli(['restore', path.join(roots, 'disk'), 'again', '--store', store])).toMatchObject({ code: 0 });
    expect(ownersOf(store)).toEqual([`${UID}:${GID}`]);
  });

  test('a store that is created below a directory of that user belongs to that user', async () => {
    const { store: home, roots } = places();
    const image = path.join(roots, 'image');
    fs.writeFileSync(image, Buffer.alloc(5 * 2 ** 20, 3), { mode: 0o600 });
    const below = path.join(home, 'a', 'store');
    const refused = await cli(['serve', '--store', below]);
    expect(refused).toMatchObject({
      code: 1,
      stderr: expect.stringContaining(`setpriv --reuid=${UID} --regid=${GID}`) as string,
    });
    expect(fs.readdirSync(home)).toEqual([]);
    expect(await cli(['import', image, 'disk', '--store', below])).toMatchObject({ code: 0 });
    expect(ownersOf(home)).toEqual([`${UID}:${GID}`]);
    expect(await asOwner('check', '--store', below)).toMatchObject({ code: 0 });
    // Below a directory of root, it belongs to root.
    expect((await cli(['vdi', 'create', 'disk', '1M', '--store', path.join(roots, 'store')])).code).toBe(0);
    expect(ownersOf(roots)).toEqual(['0:0']);
  });

  test('serve is refused with the command to use instead, and does not touch the store', async () => {
    const { store } = places();
    const refused = await cli(['serve', '--store', store]);
    expect(refused).toMatchObject({
      code: 1,
      stderr: expect.stringContaining(`setpriv --reuid=${UID} --regid=${GID}`) as string,
    });
    expect(fs.readdirSync(store)).toEqual([]);
  });

  test('the daemon of a service serves disks that root has imported', async () => {
    const { store, roots, directory } = places();
    const image = path.join(roots, 'image');
    fs.writeFileSync(image, Buffer.alloc(5 * 2 ** 20, 3), { mode: 0o600 });
    expect((await cli(['import', image, 'disk', '--store', store])).code).toBe(0);
    const { daemon } = await serving(store, directory);
    const copied = path.join(roots, 'copied');
    expect((await cli(['export', 'disk@now', copied, '--store', store])).code).toBe(0);
    expect(fs.readFileSync(copied).equals(fs.readFileSync(image))).toBe(true);
    daemon.kill('SIGTERM');
    expect((await ended(daemon)).code).toBe(0);
  });

  test('a member of the service’s group controls its daemon through a socket that the group may use', async () => {
    const { store, directory } = places();
    expect((await cli(['vdi', 'create', 'disk', '1M', '--store', store])).code).toBe(0);
    fs.chmodSync(store, 0o750);
    const { daemon } = await serving(store, directory);
    const member = (...args: string[]) => {
      const identity = ['--reuid=54323', `--regid=${GID}`, '--clear-groups'];
      const command = [...identity, process.execPath, program, ...args, '--store', store];
      return run('setpriv', command, { env: { HOME: '/nonexistent', XDG_RUNTIME_DIR: undefined } });
    };
    expect((await member('vdi', 'list')).stderr).toMatch(/no permission to connect to .*control\.sock/);
    fs.chmodSync(path.join(store, 'control.sock'), 0o660);
    expect(await member('vdi', 'snapshot', 'disk', 'one')).toMatchObject({ code: 0, stderr: '' });
    expect(await cli(['vdi', 'list', '--store', store])).toMatchObject({ code: 0, stderr: '' });
    // As in a home directory: root did not create it for a service, and any user may own it.
    fs.chownSync(directory, UID, GID);
    for (const refused of [await member('vdi', 'list'), await cli(['vdi', 'list', '--store', store])]) {
      expect(oneLineOf(refused, 1, 'vdi list')).toMatch(/nothing was sent to .*: its directory belongs to uid 54321/);
    }
    expect(await asOwner('vdi', 'list', '--store', store)).toMatchObject({ code: 0, stderr: '' });
    daemon.kill('SIGTERM');
    expect((await ended(daemon)).code).toBe(0);
  });

  test('a file that an earlier version made as root is named in the daemon’s log when a client needs it', async () => {
    const { store, roots, directory } = places();
    const image = path.join(roots, 'image');
    fs.writeFileSync(image, Buffer.alloc(5 * 2 ** 20, 3), { mode: 0o600 });
    expect((await cli(['import', image, 'disk', '--store', store])).code).toBe(0);
    const names = fs.readdirSync(path.join(store, 'objects'), { recursive: true, encoding: 'utf8' });
    const object = names.find((name) => name.length > 2) ?? '';
    fs.chownSync(path.join(store, 'objects', object), 0, 0);
    const { daemon, log } = await serving(store, directory);
    expect((await cli(['export', 'disk', path.join(roots, 'copied'), '--store', store])).code).toBe(1);
    await waitUntil(() => log().includes('a request failed'), 'it is in the log');
    const line =
      log()
        .split('\n')
        .find((text) => text.includes('a request failed')) ?? '';
    expect(line).toContain(object);
    expect(JSON.parse(line)).toMatchObject({ level: 50, code: 'EPERM', err: { code: 'PERMISSION' } });
    daemon.kill('SIGTERM');
    await ended(daemon);
    expect((await cli(['check', '--store', store])).stdout).toContain(`${object} belongs to uid 0`);
  });

  test('one command does not open two stores of different users', async () => {
    const { store, directory } = places();
    const own = path.join(directory, 'own');
    expect((await cli(['vdi', 'create', 'disk', '1M', '--store', own])).code).toBe(0);
    const refused = await cli(['migrate', 'disk', '--from', own, '--to', store]);
    expect(refused).toMatchObject({
      code: 1,
      stderr: expect.stringContaining(`start the daemon of ${store}, which`) as string,
    });
    expect(fs.readdirSync(store)).toEqual([]);
  });

  test('a disk is migrated between a cluster and the store, both ways, and the state of the cluster stays root’s', async () => {
    const { store, roots, directory } = places();
    const cluster = await new StandIn({ jitterMs: 0 }).start();
    const there = `cluster:${cluster.address}`;
    const state = path.join(roots, 'state');
    const options = { env: { SHEEPGATE_STATE: state, XDG_RUNTIME_DIR: roots } };
    const image = patterned(6 * 2 ** 20, 1);
    const done = async (...args: string[]): Promise<void> => {
      expect(await cli(args, options), args.join(' ')).toMatchObject({ code: 0, stderr: '' });
    };
    expect((await cli(['import', '-', 'disk', '--size', '6M', '--store', store], { input: image })).code).toBe(0);
    // A guest that was cut off from a killed daemon: the migration has state to store.
    const socket = path.join(directory, 'nbd.sock');
    const daemon = await startDaemon({
      cluster: cluster.address,
      args: ['--listen', `unix:${socket}`, '--create', 'back:1M'],
      ...options,
    });
    const client = await NbdClient.connect({ path: socket });
    await client.go('back');
    await daemon.kill();
    await client.disconnect().catch(() => undefined);
    await done('migrate', 'disk', '--from', store, '--to', there);
    await done('migrate', 'disk', '--from', there, '--to', store, '--as', 'again');
    expect(ownersOf(store)).toEqual([`${UID}:${GID}`]);
    expect(ownersOf(state)).toEqual(['0:0']);
    const copied = path.join(roots, 'copied');
    expect((await cli(['export', 'again', copied, '--store', store])).code).toBe(0);
    expect(fs.readFileSync(copied).equals(image)).toBe(true);
    // The state was stored at the end: the guest was cut off.
    const [directoryOfCluster = ''] = fs.readdirSync(state);
    const facts = fs.readdirSync(path.join(state, directoryOfCluster));
    const texts = facts.map((name) => fs.readFileSync(path.join(state, directoryOfCluster, name), 'utf8'));
    expect(texts.filter((text) => text.includes('"back"') && text.includes('"lostAt"'))).toHaveLength(1);
    expect((await cli(['vdi', 'delete', 'back', '--cluster', cluster.address], options)).code).toBe(1);
    await done('vdi', 'delete', 'back', '--force', '--cluster', cluster.address);
    await cluster.stop();
  }, 60_000);

  test('if the daemon’s socket is for root only, migrate says which daemon to start', async () => {
    const { store, roots } = places();
    const own = path.join(roots, 'own');
    const daemon = await startDaemon({ store: own, args: ['--create', 'disk:1M'] });
    expect((await cli(['vdi', 'create', 'other', '1M', '--store', store])).code).toBe(0);
    for (const args of [
      ['disk', '--from', own, '--to', store],
      ['other', '--from', store, '--to', own],
    ]) {
      const refused = await cli(['migrate', ...args]);
      expect(oneLineOf(refused, 1, args.join(' '))).toMatch(
        new RegExp(
          `is open, this command works as its owner, uid ${UID}.* start the daemon of ${store}, which then opens the store itself`,
        ),
      );
    }
    await daemon.stop();
  });

  test('a new store belongs to the owner of its parent directory, and migrate says how to make it another user’s', async () => {
    const { store, directory } = places();
    expect((await cli(['vdi', 'create', 'disk', '1M', '--store', store])).code).toBe(0);
    const fresh = path.join(directory, 'fresh');
    const refused = oneLineOf(await cli(['migrate', 'disk', '--from', store, '--to', fresh]), 1, 'migrate');
    expect(refused).toContain(`${fresh} does not exist and would belong to uid 0`);
    expect(refused).toContain(`${store} to uid ${UID}`);
    expect(fs.existsSync(fresh)).toBe(false);
    execFileSync('sh', ['-c', /'(install [^']*)'/.exec(refused)?.[1] ?? 'false']);
    expect(await cli(['migrate', 'disk', '--from', store, '--to', fresh])).toMatchObject({ code: 0, stderr: '' });
    expect(ownersOf(fresh)).toEqual([`${UID}:${GID}`]);
    const home = path.join(directory, 'home');
    fs.mkdirSync(home);
    fs.chownSync(home, UID, GID);
    const below = path.join(home, 'deep', 'store');
    expect(await cli(['migrate', 'disk', '--from', store, '--to', below])).toMatchObject({ code: 0, stderr: '' });
    expect(ownersOf(home)).toEqual([`${UID}:${GID}`]);
  });

  test('check reports files with another owner, and how to repair that', async () => {
    const { store } = places();
    expect((await cli(['vdi', 'create', 'disk', '1M', '--store', store])).code).toBe(0);
    for (const folder of ['objects/07', 'objects/08']) fs.chownSync(path.join(store, folder), 0, 0);
    const found = await cli(['check', '--store', store]);
    expect(found.code).toBe(1);
    expect(found.stdout).toMatch(/^wrong owner: .* belongs to uid 0, the store to uid 54321, and 1 more/m);
    execFileSync('sh', ['-c', /find .*/.exec(found.stdout)?.[0] ?? 'false']);
    expect((await cli(['check', '--store', store])).code).toBe(0);
    // A file that prevents opening the store is reported as well.
    fs.chownSync(path.join(store, 'recent'), 0, 0);
    const refused = await asOwner('vdi', 'list', '--store', store);
    expect(refused).toMatchObject({
      code: 1,
      stderr: expect.stringMatching(/cannot .*recent.*\(EACCES\); .*wrong owner.*as root: find/) as string,
    });
  });
});
