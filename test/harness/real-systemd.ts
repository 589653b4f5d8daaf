/**
 * systemd as process 1 of its own mount and process namespaces, with the units of examples/systemd in the places that they
 * name, and no other units. Owns all of it. Needs root on a machine that does not run systemd itself (a container), where it
 * disturbs nothing.
 */
import { spawnSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { run, start, temporaryDirectory, waitUntil, type RunResult } from './daemon.js';

const ROOT = path.resolve(import.meta.dirname, '../..');
const EXAMPLES = path.join(ROOT, 'examples/systemd');
const SYSTEMD = '/lib/systemd/systemd';
/** The hierarchy in which systemd keeps the processes of its units: cgroups(7), version 1. */
const CGROUPS = '/sys/fs/cgroup/systemd';
/** The cgroups that it makes there. */
const OUR_CGROUPS = ['init.scope', 'system.slice'];
/** In place of /backup, which tests must not create. */
export const BACKUP = '/srv/backup';
/** Unused ids. */
export const SERVICE_ID = 54_331;
export const MEMBER_ID = 54_332;

const TARGETS = ['basic', 'default', 'local-fs', 'shutdown', 'sockets', 'sysinit', 'umount', 'timers'];

/** Why this machine cannot run it; undefined if it can. */
export function whyNoSystemd(): string | undefined {
  if (process.getuid?.() !== 0) return 'needs root';
  if (!fs.existsSync(SYSTEMD)) return 'needs systemd';
  if (fs.readFileSync('/proc/1/comm', 'utf8').trim() === 'systemd') return 'needs a machine that systemd does not run';
  if (!fs.existsSync(CGROUPS) || OUR_CGROUPS.some((name) => fs.existsSync(path.join(CGROUPS, name)))) {
    return 'needs a hierarchy of cgroups (version 1, name=systemd) that nobody uses';
  }
  return undefined;
}

export interface RealSystemd {
  /** Run a command in the namespaces of the units. */
  inside(command: string, ...args: string[]): Promise<RunResult>;
  /** The same as another user, with the groups of /etc/group. */
  as(id: number, command: string, ...args: string[]): Promise<RunResult>;
  systemctl(...args: string[]): Promise<RunResult>;
  /** The names of units in `systemctl --failed`. */
  failed(): Promise<string[]>;
  /** The output of a unit's processes. */
  said(unit: string): string;
  /** Must be called in any case. */
  end(): Promise<void>;
}

/** Errors: systemd does not start. */
export async function startSystemd(): Promise<RealSystemd> {
  const directory = temporaryDirectory();
  const place = (name: string, text: string, mode = 0o644): string => {
    const file = path.join(directory, name);
    fs.mkdirSync(path.dirname(file), { recursive: true });
    fs.writeFileSync(file, text, { mode });
    return file;
  };
  fs.chmodSync(directory, 0o755);
  for (const name of TARGETS) place(`units/${name}.target`, '[Unit]\nDefaultDependencies=no\n');
  for (const name of fs.readdirSync(EXAMPLES).filter((each) => /\.(service|socket|timer)$/.test(each))) {
    const text = fs.readFileSync(path.join(EXAMPLES, name), 'utf8');
    place(`units/${name}`, text.replaceAll('/usr/bin/sheepgate', '/opt/sheepgate').replaceAll('/backup', BACKUP));
    // There is no journal.
    const log = `${directory}/said-${name.replace('@', '@%i')}`;
    if (name.endsWith('.service')) place(`units/${name}.d/log.conf`, `[Service]\nStandardError=append:${log}\n`);
  }
  const users = `sheepgate:x:${SERVICE_ID}:${SERVICE_ID}::/var/lib/sheepgate:/usr/sbin/nologin\nmember:x:${MEMBER_ID}:${MEMBER_ID}::/:/bin/sh\n`;
  const groups = `sheepgate:x:${SERVICE_ID}:member\nmember:x:${MEMBER_ID}:\n`;
  place('passwd', fs.readFileSync('/etc/passwd', 'utf8') + users);
  place('group', fs.readFileSync('/etc/group', 'utf8') + groups);
  place('sheepgate', `#!/bin/sh\nexec ${process.execPath} /srv/sheepgate/bin/sheepgate.cjs "$@"\n`, 0o755);
  place('console', '');
  const script = place(
    'init.sh',
    `set -e
mount --make-rprivate /
mount -t tmpfs -o mode=755 none /run
mount -t tmpfs -o mode=755 none /opt
mount -t tmpfs -o mode=755 none /srv
mount -t tmpfs -o mode=755 none /var/lib
mkdir /srv/sheepgate ${BACKUP}
mount --bind ${ROOT} /srv/sheepgate
cp ${directory}/sheepgate /opt/
mount --bind ${directory}/passwd /etc/passwd
mount --bind ${directory}/group /etc/group
mount --bind ${directory}/console /dev/console
exec env -i PATH="$PATH" container=other SYSTEMD_UNIT_PATH=${directory}/units ${SYSTEMD} --system --unit=default.target \\
  --log-target=console --show-status=no
`,
  );
  const outer = start('unshare', ['--mount', '--pid', '--fork', '--mount-proc', '--kill-child', 'sh', script]);
  const init = await waitUntil(() => childOf(outer.pid ?? 0), 'systemd is a process');
  const inside: RealSystemd['inside'] = (...command) => run('nsenter', ['-t', init, '--mount', '--pid', ...command]);
  try {
    await waitUntil(async () => (await inside('systemctl', 'is-active', 'default.target')).code === 0, 'systemd is up');
  } catch (error) {
    await leave(init);
    throw error;
  }
  const systemctl: RealSystemd['systemctl'] = (...args) => inside('systemctl', ...args);
  return {
    inside,
    systemctl,
    end: () => leave(init),
    as: (id, ...command) => inside('setpriv', `--reuid=${id}`, `--regid=${id}`, '--init-groups', ...command),
    failed: async () => (await systemctl('--failed', '--plain', '--no-legend')).stdout.match(/^\S+/gm) ?? [],
    said: (unit) => {
      const file = path.join(directory, `said-${unit}`);
      return fs.existsSync(file) ? fs.readFileSync(file, 'utf8') : '';
    },
  };
}

/** The process that is process 1 in the namespace. */
function childOf(pid: number): string | undefined {
  return fs.readFileSync(`/proc/${pid}/task/${pid}/children`, 'utf8').trim().split(' ')[0] || undefined;
}

/** The end of process 1 ends all processes and mounts of the namespaces; the cgroups are removed here. */
async function leave(init: string): Promise<void> {
  process.kill(Number(init), 'SIGKILL');
  await waitUntil(() => {
    const left = OUR_CGROUPS.map((name) => path.join(CGROUPS, name)).filter((place) => fs.existsSync(place));
    // A cgroup stays if it still has a process that is about to end.
    for (const place of left) spawnSync('find', [place, '-depth', '-type', 'd', '-delete']);
    return left.length === 0;
  }, 'its cgroups are gone');
}
