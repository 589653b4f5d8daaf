/** The example units under a real systemd: which users may use the service, and how failed backups are reported. */
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import {
  BACKUP,
  MEMBER_ID,
  SERVICE_ID,
  startSystemd,
  whyNoSystemd,
  type RealSystemd,
} from '../harness/real-systemd.js';

const why = whyNoSystemd();
if (why !== undefined) console.log(`skipped: the example units under systemd: ${why}`);

describe.skipIf(why !== undefined)('the example units under systemd', () => {
  const STORE = ['--store', '/var/lib/sheepgate'];
  const URI = 'nbd+unix:///vm1?socket=/run/sheepgate/nbd.sock';
  const STRANGER = 65_534;
  const UNIT = 'sheepgate-backup@vm1.service';
  let systemd: RealSystemd;

  beforeAll(async () => {
    systemd = await startSystemd();
    // As examples/systemd/README.md says it.
    await systemd.inside(
      ...(['install', '-d', '-o', 'sheepgate', '-g', 'sheepgate', '-m', '710', '/var/lib/sheepgate'] as const),
    );
    const created = await systemd.as(SERVICE_ID, '/opt/sheepgate', 'vdi', 'create', 'vm1', '8M', ...STORE);
    expect(created.stderr).toBe('');
    const started = await systemd.systemctl('start', 'sheepgate.socket', 'sheepgate.service');
    expect(started.code, started.stderr + systemd.said('sheepgate.service')).toBe(0);
  }, 60_000);

  afterAll(() => (systemd as RealSystemd | undefined)?.end());

  test('a member of the group can connect and send commands to the daemon; others can do neither', async () => {
    const member = (...args: string[]) => systemd.as(MEMBER_ID, '/opt/sheepgate', ...args, ...STORE);
    expect(await systemd.as(MEMBER_ID, 'nbdinfo', '--size', URI)).toMatchObject({ code: 0, stdout: '8388608\n' });
    expect(await member('vdi', 'snapshot', 'vm1', 'one')).toMatchObject({ code: 0, stdout: 'took vm1@one\n' });
    expect(await member('vdi', 'delete', 'vm1@one')).toMatchObject({ code: 0 });
    // The files of the store are only for the daemon all the same.
    expect(await systemd.as(MEMBER_ID, 'ls', '/var/lib/sheepgate')).not.toMatchObject({ code: 0 });
    expect((await systemd.as(STRANGER, 'nbdinfo', '--size', URI)).stderr).toMatch(/Permission denied/);
    expect(await systemd.as(STRANGER, '/opt/sheepgate', 'vdi', 'list', ...STORE)).toMatchObject({
      code: 1,
      stderr: expect.stringMatching(
        /^sheepgate: no permission to connect to .*control\.sock; it belongs to another/,
      ) as unknown,
    });
    expect((await systemd.inside('stat', '-c', '%a %U %G', '/var/lib/sheepgate/control.sock')).stdout).toBe(
      '660 sheepgate sheepgate\n',
    );
  });

  test('a backup whose disk is not mounted fails visibly in systemctl --failed, logs the reason, and writes nothing', async () => {
    expect((await systemd.systemctl('start', UNIT)).code).not.toBe(0);
    expect(await systemd.failed()).toEqual([UNIT]);
    expect(systemd.said('sheepgate-backup@vm1.service')).toBe(
      `<3>${BACKUP} is not mounted: no backup of vm1 was made\n`,
    );
    expect((await systemd.inside('ls', BACKUP)).stdout).toBe('');
    // The same without the mount point.
    await systemd.inside('rmdir', BACKUP);
    expect((await systemd.systemctl('start', UNIT)).code).not.toBe(0);
    expect(systemd.said(UNIT)).toMatch(/(is not mounted: no backup of vm1 was made\n.*){2}/s);
    await systemd.inside('mkdir', BACKUP);
    await systemd.systemctl('reset-failed');
  });

  test('a backup to its disk starts the daemon and goes through it', async () => {
    await systemd.inside('mount', '-t', 'tmpfs', 'none', BACKUP);
    await systemd.systemctl('stop', 'sheepgate.service');
    const started = await systemd.systemctl('start', UNIT);
    expect(started.code, systemd.said(UNIT)).toBe(0);
    expect((await systemd.inside('ls', `${BACKUP}/vm1`)).stdout).toMatch(/^0001-.*qcow2$/m);
    expect(await systemd.failed()).toEqual([]);
  });

  test('a backup whose daemon cannot be started reports that, and not a missing filesystem', async () => {
    await systemd.systemctl('stop', 'sheepgate.service', 'sheepgate.socket');
    await systemd.inside('mv', '/var/lib/sheepgate/meta.mdb', '/var/lib/sheepgate/away');
    expect((await systemd.systemctl('start', UNIT)).code).not.toBe(0);
    expect(systemd.said(UNIT).split('\n').at(-2)).toBe(
      'sheepgate: no daemon: there is no control socket /var/lib/sheepgate/control.sock; start one, or leave --control out ' +
        'to open the store itself',
    );
    expect(await systemd.failed()).toContain(UNIT);
  });
});
