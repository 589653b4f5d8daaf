/** --freeze-cmd and --thaw-cmd: the guest is frozen for the snapshot, and thawed in every case. */
import fs from 'node:fs';
import net from 'node:net';
import path from 'node:path';
import { createInterface } from 'node:readline';
import { expect, test } from 'vitest';
import { BIN, cli, ended, haveCommand, skipBecause, temporaryDirectory, waitUntil, spawn } from '../harness/daemon.js';
import { BackedUpDisk, hashOf } from './backups.js';
import { MIB, oneLineOf, patterned, sharedStore } from './both-ways.js';

const store = sharedStore('through a daemon');

/** A "guest": the commands append to a file what they do. */
function guest() {
  const file = path.join(temporaryDirectory(), 'guest');
  fs.writeFileSync(file, '');
  return {
    file,
    done: () => fs.readFileSync(file, 'utf8').split('\n').filter(Boolean),
    says: (word: string) => `echo ${word} >> ${file}`,
    hooks: (freeze = 'freeze', thaw = 'thaw') => [
      '--freeze-cmd',
      `echo ${freeze} >> ${file}`,
      '--thaw-cmd',
      `echo ${thaw} >> ${file}`,
    ],
  };
}

async function newDisk(): Promise<BackedUpDisk> {
  const disk = new BackedUpDisk(store(), 4 * MIB);
  await disk.create();
  await disk.write(0, patterned(MIB, 1));
  return disk;
}

test('the snapshot is taken between the two commands, and copying begins after the second', async () => {
  const disk = await newDisk();
  const { target } = disk;
  const { hooks, done, file } = guest();
  const [, freeze = '', , thaw = ''] = hooks();
  // What the commands see of the VDI's snapshots.
  const list = `${process.execPath} ${BIN} vdi list --store ${target.store} | grep -c backup- | sed 's/^/snapshots: /'`;
  const look = `${list} >> ${file}`;
  const to = path.join(temporaryDirectory(), 'vm');
  const result = await target.run([
    ...['backup', 'vm', '--to', to, '--json'],
    ...['--freeze-cmd', `${freeze}; ${look}`, '--thaw-cmd', `${look}; ${thaw}`],
  ]);
  expect(result.code, result.stderr).toBe(0);
  expect(done()).toEqual(['freeze', 'snapshots: 0', 'snapshots: 1', 'thaw']);
  expect(JSON.parse(result.stdout)).toMatchObject({ id: 1 });
  // With NAME@now, the open takes the snapshot.
  await target.ok('backup', 'vm', '--to', to, '--no-base', ...hooks());
  expect(done().slice(4)).toEqual(['freeze', 'thaw']);
  await target.ok('vdi', 'snapshot', 'vm', 'still', ...hooks());
  expect(done().slice(6)).toEqual(['freeze', 'thaw']);
});

test('if freezing fails, there is a thaw, no snapshot, and one line of error', async () => {
  const { target } = await newDisk();
  const { says, done } = guest();
  const to = path.join(temporaryDirectory(), 'vm');
  const hooks = ['--freeze-cmd', `${says('freeze')}; exit 3`, '--thaw-cmd', says('thaw')];
  expect(await target.fails('backup', 'vm', '--to', to, ...hooks)).toMatch(
    /no snapshot taken: the freeze command ended with 3\n/,
  );
  expect(await target.fails('vdi', 'snapshot', 'vm', 'still', ...hooks)).toMatch(/no snapshot taken/);
  expect(done()).toEqual(['freeze', 'thaw', 'freeze', 'thaw']);
  expect(await target.names()).toEqual(['vm']);
});

test('if freezing hangs, the guest is thawed after the timeout, and the hanging command is killed', async () => {
  const { target } = await newDisk();
  const { says, done } = guest();
  const to = path.join(temporaryDirectory(), 'vm');
  const hooks = ['--freeze-cmd', `${says('$$')}; sleep 300`, '--thaw-cmd', says('thaw'), '--freeze-timeout', '1'];
  expect(await target.fails('backup', 'vm', '--to', to, ...hooks)).toMatch(/the freeze command did not end within 1 s/);
  const [pid, ...rest] = done();
  expect(rest).toEqual(['thaw']);
  expect(fs.existsSync(`/proc/${pid}`)).toBe(false);
  expect(await target.names()).toEqual(['vm']);
});

test('a snapshot that is taken after the timeout is not used', async () => {
  const { target } = await newDisk();
  const { says, done } = guest();
  const to = path.join(temporaryDirectory(), 'vm');
  // The daemon is stopped by the freeze command, and continued by the late thaw command.
  const pid = target.daemon?.child.pid;
  const hooks = [
    '--freeze-cmd',
    `${says('freeze')}; kill -STOP ${pid}`,
    '--thaw-cmd',
    `${says('thaw')}; kill -CONT ${pid}`,
  ];
  const refusal = await target.fails('backup', 'vm', '--to', to, ...hooks, '--freeze-timeout', '2');
  expect(refusal).toMatch(/the snapshot was not taken within 2 s of the freeze, and the thaw command was run/);
  expect(done()).toEqual(['freeze', 'thaw']);
  expect(await target.names()).toEqual(['vm']);
  expect(await target.fails('vdi', 'snapshot', 'vm', 'late', ...hooks, '--freeze-timeout', '2')).toMatch(
    /was not taken within 2 s/,
  );
  expect(await target.names()).toEqual(['vm']);
});

test.each(['SIGKILL', 'SIGTERM', 'SIGINT'] as const)(
  '%s while the guest is frozen thaws it at once',
  async (signal) => {
    const { target } = await newDisk();
    const { says, done } = guest();
    const to = path.join(temporaryDirectory(), 'vm');
    const hooks = [
      '--freeze-cmd',
      `${says('freeze')}; sleep 300`,
      '--thaw-cmd',
      says('thaw'),
      '--freeze-timeout',
      '600',
    ];
    const child = spawn(process.execPath, [BIN, 'backup', 'vm', '--to', to, ...hooks], {
      env: { ...process.env, SHEEPGATE_STORE: target.store },
      stdio: 'ignore',
    });
    await waitUntil(() => done().includes('freeze'), 'it is frozen');
    child.kill(signal);
    await ended(child);
    await waitUntil(() => done().includes('thaw'), 'it is thawed');
    expect(done()).toEqual(['freeze', 'thaw']);
    const next = await target.run(['backup', 'vm', '--to', to]);
    expect(next.code, next.stderr).toBe(0);
  },
);

test('SIGKILL during the freeze command: the command is killed before the thaw, and freezes nothing after it', async () => {
  const { target } = await newDisk();
  const { says, done, file } = guest();
  const to = path.join(temporaryDirectory(), 'vm');
  const go = `${file}.go`;
  const hooks = [
    ...['--freeze-cmd', `${says('begin')}; while [ ! -e ${go} ]; do sleep 0.1; done; ${says('freeze')}`],
    ...['--thaw-cmd', says('thaw'), '--freeze-timeout', '600'],
  ];
  const child = spawn(process.execPath, [BIN, 'backup', 'vm', '--to', to, ...hooks], {
    env: { ...process.env, SHEEPGATE_STORE: target.store },
    stdio: 'ignore',
  });
  await waitUntil(() => done().includes('begin'), 'it is about to freeze');
  child.kill('SIGKILL');
  await ended(child);
  await waitUntil(() => done().includes('thaw'), 'it is thawed');
  fs.writeFileSync(go, '');
  // A freeze command that was left alive would freeze before a later one has.
  await target.ok(
    'vdi',
    'snapshot',
    'vm',
    'next',
    '--freeze-cmd',
    `sleep 1; ${says('next')}`,
    '--thaw-cmd',
    says('end'),
  );
  expect(done()).toEqual(['begin', 'thaw', 'next', 'end']);
});

test('a thaw that fails is tried again; if it never works, the backup exists and the failure is reported', async () => {
  const disk = await newDisk();
  const { target } = disk;
  const { says, done } = guest();
  const to = path.join(temporaryDirectory(), 'vm');
  const once = path.join(temporaryDirectory(), 'once');
  const second = `${says('thaw')}; test -e ${once} || { touch ${once}; exit 1; }`;
  await target.ok('backup', 'vm', '--to', to, '--freeze-cmd', says('freeze'), '--thaw-cmd', second);
  expect(done()).toEqual(['freeze', 'thaw', 'thaw']);
  const result = await target.run(['backup', 'vm', '--to', to, '--freeze-cmd', 'true', '--thaw-cmd', 'exit 7']);
  expect(result.code).toBe(1);
  expect(result.stderr).toMatch(/note: the thaw command ended with 7: thaw the guest by hand\n/);
  expect(result.stderr).toMatch(/sheepgate: vm was backed up as 2, but the thaw command ended with 7/);
  disk.at.set(1, hashOf(disk.content)).set(2, hashOf(disk.content));
  expect(await disk.checkAll(to)).toEqual([1, 2]);
});

test('output of the commands does not get into the JSON, and one command without the other is wrong usage', async () => {
  const { target } = await newDisk();
  const to = path.join(temporaryDirectory(), 'vm');
  const noisy = ['--freeze-cmd', 'echo frozen', '--thaw-cmd', 'echo thawed'];
  const result = await target.run(['backup', 'vm', '--to', to, '--json', ...noisy]);
  expect(result.code, result.stderr).toBe(0);
  expect(JSON.parse(result.stdout)).toMatchObject({ id: 1 });
  expect(result.stderr).toBe('frozen\nthawed\n');
  for (const args of [
    ['--freeze-cmd', 'true'],
    ['--thaw-cmd', 'true'],
    ['--freeze-timeout', '5'],
  ]) {
    for (const command of [
      ['backup', 'vm', '--to', to],
      ['vdi', 'snapshot', 'vm', 'x'],
    ]) {
      const usage = await cli([...command, ...args], { store: target.store });
      oneLineOf(usage, 2, args.join(' '));
    }
  }
  expect(await target.names()).toHaveLength(2);
});

test('guest-fsfreeze.py freezes through a guest agent, and skips stale answers', async (context) => {
  if (!haveCommand('python3')) return skipBecause(context, 'python3 is not installed');
  const { target } = await newDisk();
  const heard: string[] = [];
  const socket = path.join(temporaryDirectory(), 'qga.sock');
  // As the agent answers: by line, to whom it does not matter.
  const agent = net.createServer((connection) => {
    connection.write('{"return": 5}\n');
    createInterface(connection).on('line', (line) => {
      const { execute, arguments: given } = JSON.parse(line) as { execute: string; arguments: { id?: number } };
      if (execute === 'guest-sync') return void connection.write(`{"return": ${given.id}}\n`);
      heard.push(execute);
      connection.write('{"return": 2}\n');
    });
  });
  await new Promise<void>((resolve) => agent.listen(socket, resolve));
  const script = path.resolve(import.meta.dirname, '../../examples/guest-fsfreeze.py');
  const hooks = [
    '--freeze-cmd',
    `python3 ${script} freeze ${socket}`,
    '--thaw-cmd',
    `python3 ${script} thaw ${socket}`,
  ];
  const result = await target.run(['vdi', 'snapshot', 'vm', 'still', ...hooks]);
  expect(result).toMatchObject({ code: 0, stdout: 'took vm@still\n', stderr: 'freeze: 2\nthaw: 2\n' });
  expect(heard).toEqual(['guest-fsfreeze-freeze', 'guest-fsfreeze-thaw']);
  agent.close();
  const gone = await target.run(['vdi', 'snapshot', 'vm', 'moving', ...hooks]);
  expect(gone.code).toBe(1);
  expect(gone.stderr).toMatch(/freeze .*qga\.sock: .*No such file/);
  expect(await target.names()).toEqual(['vm@still', 'vm']);
});
