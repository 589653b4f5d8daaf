/**
 * Targets that changed since the last run: copied, restored from elsewhere, or with files in them that another program has made.
 * Commands touch nothing outside the target, always end, and print only text.
 */
import { createHash } from 'node:crypto';
import fs from 'node:fs';
import path from 'node:path';
import { describe, expect, test } from 'vitest';
import { BIN, cli, ended, haveCommand, ok, start, temporaryDirectory, waitUntil, spawn } from '../harness/daemon.js';
import { BackedUpDisk, bases, hashOf, type BackupResult } from './backups.js';
import { GIB, lastLineOf, MIB, oneLineOf, patterned, storeWith, testStore, type TestStore } from './both-ways.js';

const PAUSED_IO = path.resolve(import.meta.dirname, 'paused-io.mjs');
const SIZE = 8 * MIB;
const TIB = 2 ** 40;

async function newDisk(size = SIZE): Promise<BackedUpDisk> {
  const disk = new BackedUpDisk(await testStore('directly on the store'), size);
  await disk.create();
  await disk.write(0, patterned(2 * MIB, 1));
  return disk;
}

function newTarget(name = 'vm'): string {
  return path.join(temporaryDirectory(), name);
}

interface Hashes {
  readonly treeHash: string;
  readonly treeBlockBytes: number;
  readonly sha256: string | null;
}

describe('hashes', () => {
  /** As docs/backup.md says it. */
  function treeHashOf(content: Buffer, blockBytes: number): string {
    const hash = createHash('sha256');
    for (let at = 0; at < content.length; at += blockBytes) {
      const block = content.subarray(at, at + blockBytes);
      const isZero = block.equals(Buffer.alloc(block.length));
      hash.update(isZero ? Buffer.alloc(32) : createHash('sha256').update(block).digest());
    }
    return hash.digest('hex');
  }

  test('backup, restore, migrate and sha256sum agree on the SHA-256 of the image, and the tree hash is as documented', async () => {
    const disk = await newDisk();
    await disk.write(5 * MIB, patterned(MIB + 512, 2));
    const to = newTarget();
    const image = path.join(temporaryDirectory(), 'vm.img');
    expect((await disk.target.run(['export', 'vm', image])).code).toBe(0);
    const sha256 = (await ok('sha256sum', [image])).split(' ')[0];
    const treeHash = treeHashOf(disk.content, MIB);
    const wanted = { treeHash, treeBlockBytes: MIB, sha256 };
    expect(await disk.backup(to, '--sha256')).toMatchObject(wanted);
    expect(await disk.target.json('restore', to, 'restored')).toMatchObject(wanted);
    const there = path.join(temporaryDirectory(), 'store');
    const migrate = async (...args: string[]): Promise<Hashes> => {
      const places = ['--from', disk.target.store, '--to', there, '--json'];
      const { stdout } = await cli(['migrate', 'restored', ...places, ...args]);
      return (JSON.parse(stdout) as { working: Hashes }).working;
    };
    expect(await migrate('--sha256')).toMatchObject(wanted);
    expect(await migrate('--verify', 'only')).toMatchObject({ ...wanted, sha256: null });
    // Not requested: not computed, and no other field has this name.
    expect(await disk.backup(to)).toMatchObject({ treeHash, sha256: null });
    const listed = await disk.target.json<{ backups: Hashes[] }>('restore', to, '--list');
    expect(listed.backups.map((each) => [each.treeHash, each.sha256])).toEqual([
      [treeHash, sha256],
      [treeHash, null],
    ]);
  });

  test('a target from a version that called the tree hash sha256 is read, continued, and rewritten', async () => {
    const disk = await newDisk();
    const to = newTarget();
    await disk.backup(to);
    const manifest = path.join(to, 'manifest.json');
    const text = fs.readFileSync(manifest, 'utf8');
    fs.writeFileSync(manifest, text.replace('"version": 2', '"version": 1').replace('"treeHash"', '"sha256"'));
    expect(await disk.target.ok('restore', to, '--verify')).toMatch(/^1 backup of vm in .*, all intact/);
    await disk.write(MIB, patterned(MIB, 3));
    expect(await disk.backup(to)).toMatchObject({ id: 2, kind: 'incremental', notes: [] });
    expect(await disk.checkAll(to)).toEqual([1, 2]);
    const written = JSON.parse(fs.readFileSync(manifest, 'utf8')) as { version: number; points: object[] };
    expect(written.version).toBe(2);
    for (const point of written.points) expect(Object.keys(point)).not.toContain('sha256');
  });
});

describe('verifying', () => {
  test('a file that cannot be read is reported as damage of that file, and all backups are checked', async () => {
    const target = await testStore('directly on the store');
    const disk = new BackedUpDisk(target, 4 * MIB);
    await disk.create();
    const to = path.join(temporaryDirectory(), 'backup');
    for (let n = 1; n <= 3; n++) {
      await disk.write(n * MIB, patterned(MIB, n));
      await target.ok('backup', 'vm', '--to', to);
    }
    const names = fs.readdirSync(to);
    const named = (start: RegExp): string => names.find((name) => start.test(name)) ?? '';
    const verify = (name: string): ReturnType<TestStore['run']> =>
      target.run(['restore', to, '--verify'], {
        env: { EIO_ON: name, NODE_OPTIONS: `--import=${path.resolve(import.meta.dirname, 'failing-reads.mjs')}` },
      });
    for (const [name, whole] of [
      [named(/^0003-.*qcow2/), 'intact backups: 1, 2;'],
      [named(/^0002-.*hashes/), 'intact backups: 1, 3;'],
      [named(/^base-1/), 'no backup is intact;'],
    ] as const) {
      const said = oneLineOf(await verify(name), 1, name);
      expect(said).toContain(`${path.join(to, name)} is damaged: it cannot be read: i/o error (EIO)`);
      expect(said).toContain(whole);
    }
    expect(oneLineOf(await verify('manifest.json'), 1, 'manifest')).toMatch(
      /manifest\.json is damaged: it cannot be read/,
    );
  });

  test('--verify compares the SHA-256 of the image if there is one', async () => {
    const target = await testStore('directly on the store');
    await target.ok('vdi', 'create', 'vm', '4M');
    const to = path.join(temporaryDirectory(), 'backup');
    await target.ok('backup', 'vm', '--to', to, '--sha256');
    expect(await target.ok('restore', to, '--verify')).toMatch(/all intact/);
    const manifest = path.join(to, 'manifest.json');
    const text = fs.readFileSync(manifest, 'utf8').replace(/("sha256": ")[0-9a-f]{4}/, '$1ffff');
    fs.writeFileSync(manifest, text);
    expect(await target.fails('restore', to, '--verify')).toMatch(
      /manifest\.json is damaged: .*ffff.* as the SHA-256 of backup 1/,
    );
  });

  test('reads only stored data: 4 TiB with 5 MB in it take seconds, after a touch and with restore --verify', async () => {
    const target = await testStore('directly on the store');
    await target.ok('vdi', 'create', 'vm', '4T');
    const data = path.join(temporaryDirectory(), 'data');
    fs.writeFileSync(data, patterned(5 * MIB, 1));
    await target.ok('import', data, 'vm', '--overwrite');
    const to = newTarget();
    expect(await target.json('backup', 'vm', '--to', to)).toMatchObject({ size: 4 * TIB });
    await target.ok('backup', 'vm', '--to', to);
    for (const name of fs.readdirSync(to)) fs.utimesSync(path.join(to, name), new Date(), new Date());
    const startedAt = Date.now();
    const touched = await target.json<BackupResult>('backup', 'vm', '--to', to);
    expect(touched.notes.join()).toMatch(
      /changed since the last run: .*base-1\.img.*,the stored backups match their hashes/,
    );
    expect(await target.ok('restore', to, '--verify')).toMatch(/^3 backups of vm in .*, all intact/);
    // Reading all of it would take two hours; the limit is far above the time that it takes here.
    expect(Date.now() - startedAt).toBeLessThan(60_000);
  }, 180_000);

  test('finds data where the hashes say zeros, and zeros where they say data', async () => {
    const disk = await newDisk(16 * MIB);
    const to = newTarget();
    await disk.backup(to);
    await disk.write(12 * MIB, patterned(MIB, 3));
    await disk.backup(to);
    const base = path.join(to, 'base-1.img');
    const whole = fs.readFileSync(base);
    const fd = fs.openSync(base, 'r+');
    fs.writeSync(fd, 'stray', 9 * MIB);
    fs.closeSync(fd);
    const stray = await disk.target.fails('restore', to, '--verify');
    expect(stray).toMatch(
      /base-1\.img is damaged: the 1048576 bytes of the disk at 9437184 differ from what was backed up/,
    );
    const holed = Buffer.from(whole);
    holed.fill(0, MIB, 2 * MIB);
    fs.rmSync(base);
    fs.writeFileSync(base, '');
    fs.truncateSync(base, whole.length);
    const again = fs.openSync(base, 'r+');
    fs.writeSync(again, holed, 0, MIB, 0);
    fs.closeSync(again);
    expect(await disk.target.fails('restore', to, '--verify')).toMatch(/1048576 bytes of the disk at 1048576 differ/);
    const refused = lastLineOf(await disk.target.run(['backup', 'vm', '--to', to]), 1, 'backup');
    expect(refused).toMatch(/base-1\.img is damaged/);
  });

  test('ends on a signal, announces what it does, and locks no store meanwhile', async () => {
    const target = await testStore('directly on the store');
    await target.ok('vdi', 'create', 'vm', '64G');
    const to = newTarget();
    await target.ok('backup', 'vm', '--to', to);
    // Stored zeros, which must be read. The hashes are read first, then two blocks, and the next waits until the test says so.
    const fd = fs.openSync(path.join(to, 'base-1.img'), 'r+');
    for (let n = 0; n < 4; n++) fs.writeSync(fd, Buffer.alloc(4 * MIB), 0, 4 * MIB, n * 128 * MIB);
    fs.closeSync(fd);
    const pausedUntil = (file: string): Record<string, string> => ({
      SHEEPGATE_STORE: target.store,
      PAUSED_CALL: 'read',
      PAUSED_AFTER: '4',
      PAUSED_UNTIL: file,
    });
    const signalled = path.join(temporaryDirectory(), 'signalled');
    const child = spawn(process.execPath, ['--import', PAUSED_IO, BIN, 'backup', 'vm', '--to', to], {
      env: { ...process.env, ...pausedUntil(signalled) },
      stdio: ['ignore', 'ignore', 'pipe'],
    });
    let stderr = '';
    child.stderr.setEncoding('utf8').on('data', (text: string) => (stderr += text));
    await waitUntil(() => stderr.includes('\n') || child.exitCode !== null, 'it says what it does');
    expect(stderr).toMatch(
      /^sheepgate: note: changed since the last run: .*base-1\.img; comparing the stored backups.*\n$/,
    );
    expect(await target.names()).toHaveLength(2);
    child.kill('SIGTERM');
    fs.writeFileSync(signalled, '');
    const toldAt = Date.now();
    expect(await ended(child)).toMatchObject({ code: 143 });
    expect(stderr.split('\n')[1]).toBe('sheepgate: interrupted by SIGTERM');
    expect(Date.now() - toldAt).toBeLessThan(10_000);
    expect(await target.names()).toHaveLength(2);
    if (!haveCommand('script'))
      return void console.log('no script (util-linux): progress on a terminal is not looked at');
    const seen = path.join(temporaryDirectory(), 'seen');
    const variables = Object.entries(pausedUntil(seen)).map(([name, value]) => `${name}='${value}'`);
    const command = `'${process.execPath}' --import '${PAUSED_IO}' '${BIN}' backup vm --to '${to}'`;
    const terminal = start('script', ['-qec', `${variables.join(' ')} ${command}`, '/dev/null']);
    let shown = '';
    terminal.stdout.setEncoding('utf8').on('data', (text: string) => (shown += text));
    const progress = /\r\x1b\[Kcomparing with the hashes: [\d.]+ [KMG]iB of 64 GiB, \d+ %/;
    await waitUntil(() => progress.test(shown) || terminal.exitCode !== null, 'it shows its progress');
    fs.writeFileSync(seen, '');
    expect(await ended(terminal), shown).toMatchObject({ code: 0 });
    expect(shown).toMatch(progress);
  }, 180_000);
});

describe('a target and a store that do not match', () => {
  test('the target is behind: it is an older copy, and the original has later backups', async () => {
    const disk = await newDisk();
    const to = newTarget();
    await disk.backup(to);
    const copy = `${to}-copy`;
    fs.cpSync(to, copy, { recursive: true, preserveTimestamps: true });
    await disk.backup(to);
    const { base } = await disk.backup(to);
    const refusal = await disk.target.fails('backup', 'vm', '--to', copy);
    expect(refusal).toMatch(/the target is behind: .*-copy ends with backup 1 of 20/);
    expect(refusal).toContain(`has the snapshot "${base}" of 20`);
    expect(refusal).toMatch(
      /, 2 backups later; .*-copy is an older copy of a target in use: back up to that one, or use/,
    );
    expect(await bases(disk.target)).toEqual([`vm@${base}`]);
  });

  test('the store is behind: it was restored from a copy, and the target has newer data', async () => {
    const disk = await newDisk();
    const to = newTarget();
    const { base } = await disk.backup(to);
    const old = path.join(temporaryDirectory(), 'store');
    fs.cpSync(disk.target.store, old, { recursive: true, preserveTimestamps: true });
    await disk.write(MIB, patterned(MIB, 5));
    await disk.backup(to);
    await disk.backup(to);
    const behind = storeWith(old, undefined);
    const refusal = await behind.fails('backup', 'vm', '--to', to);
    expect(refusal).toContain(`the store is behind: vm in ${old} ends with the snapshot "${base}" of 20`);
    expect(refusal).toMatch(/has 2 backups after that, up to backup 3 of 20.*the target has newer data/);
    expect(refusal).toContain(`'sheepgate restore ${to} NEW-NAME' restores it`);
    expect(refusal).not.toMatch(/older copy of a target/);
    await behind.ok('restore', to, 'newer');
    expect(hashOf(await behind.contentOf('newer'))).toBe(hashOf(disk.content));
    expect(await behind.json('backup', 'vm', '--to', to, '--compare')).toMatchObject({ id: 4, kind: 'incremental' });
  });
});

describe('in a target that others can write to', () => {
  const kinds = {
    'a symbolic link': (file: string, outside: string) => fs.symlinkSync(outside, file),
    'a symbolic link to nothing': (file: string, outside: string) => fs.symlinkSync(`${outside}-new`, file),
    'a fifo': (file: string) => ok('mkfifo', [file]),
    'a directory': (file: string) => fs.mkdirSync(file),
  };

  /** Put each kind of file in the place of one of ours: commands must end, report it, and touch nothing outside the target. */
  async function expectRefused(
    name: (to: string) => string,
    commands: readonly (readonly string[])[],
    ofManifest = false,
  ): Promise<void> {
    const disk = await newDisk();
    const parent = temporaryDirectory();
    const to = path.join(parent, 'vm');
    await disk.backup(to);
    await disk.write(MIB, patterned(MIB, 3));
    await disk.backup(to);
    await disk.write(2 * MIB, patterned(MIB, 4));
    const outside = path.join(temporaryDirectory(), 'precious');
    const file = path.join(to, name(to));
    const content = fs.readFileSync(file);
    // The content behind the link is right: only the link itself is wrong.
    fs.writeFileSync(outside, content);
    for (const [kind, make] of Object.entries(kinds)) {
      fs.rmSync(file);
      await make(file, outside);
      for (const command of commands) {
        const result = await disk.target.run(
          command.map((word) => (word === 'TARGET' ? to : word)),
          {
            timeoutMs: 20_000,
          },
        );
        const line = lastLineOf(result, 1, `${kind}: ${command.join(' ')}`);
        const what = kind.replace(' to nothing', '');
        if (!(ofManifest && kind === 'a directory')) {
          expect(line).toContain(`${file} is ${what}, not a regular file: sheepgate did not create it`);
        }
      }
      fs.rmSync(file, { recursive: true });
      fs.writeFileSync(file, content);
      expect(fs.readFileSync(outside).equals(content), kind).toBe(true);
      expect(fs.existsSync(`${outside}-new`), kind).toBe(false);
    }
  }

  test('any kind of file in the place of the lock is refused', () =>
    expectRefused(
      () => 'lock',
      [
        ['backup', 'vm', '--to', 'TARGET'],
        ['restore', 'TARGET', '--list'],
      ],
    ));

  test('any kind of file in the place of the manifest is refused', () =>
    expectRefused(
      () => 'manifest.json',
      [
        ['backup', 'vm', '--to', 'TARGET'],
        ['restore', 'TARGET', '--list'],
      ],
    ));

  test('any kind of file in the place of the image is refused', () =>
    expectRefused(
      () => 'base-1.img',
      [
        ['backup', 'vm', '--to', 'TARGET', '--keep', '1'],
        ['restore', 'TARGET', 'x'],
        ['restore', 'TARGET', '--verify'],
      ],
    ));

  test('any kind of file in the place of an increment is refused', () =>
    expectRefused(
      (to) => fs.readdirSync(to).find((name) => /^0002.*qcow2$/.test(name)) as string,
      [
        ['backup', 'vm', '--to', 'TARGET'],
        ['restore', 'TARGET', 'x'],
      ],
    ));

  test('any kind of file in the place of the hashes is refused', () =>
    expectRefused(
      (to) => fs.readdirSync(to).find((name) => /^0002.*hashes$/.test(name)) as string,
      [
        ['backup', 'vm', '--to', 'TARGET'],
        ['restore', 'TARGET', 'x'],
      ],
    ));

  test('a link in the place of a file that is to be written is removed, not followed', async () => {
    const disk = await newDisk();
    const to = newTarget();
    await disk.backup(to);
    const outside = path.join(temporaryDirectory(), 'precious');
    fs.writeFileSync(outside, 'precious');
    fs.symlinkSync(outside, path.join(to, 'manifest.json.partial'));
    fs.symlinkSync(outside, path.join(to, 'base-2.img.partial'));
    await disk.write(MIB, patterned(MIB, 3));
    await disk.target.ok('backup', 'vm', '--to', to, '--full', '--json');
    expect(fs.readFileSync(outside, 'utf8')).toBe('precious');
    expect(fs.readdirSync(to).filter((name) => name.endsWith('.partial'))).toEqual([]);
  });

  test('an image with another name (hard link) is not written to', async () => {
    const disk = await newDisk();
    const to = newTarget();
    await disk.backup(to);
    const other = path.join(path.dirname(to), 'other-name');
    fs.linkSync(path.join(to, 'base-1.img'), other);
    const before = fs.readFileSync(other);
    await disk.write(MIB, patterned(MIB, 3));
    const refused = lastLineOf(await disk.target.run(['backup', 'vm', '--to', to, '--keep', '1']), 1, 'backup');
    expect(refused).toMatch(/backup 2 was taken, but .*base-1\.img has 2 names \(hard links\)/);
    expect(fs.readFileSync(other).equals(before)).toBe(true);
    disk.at.set(2, hashOf(disk.content));
    expect(await disk.backup(to)).toMatchObject({ id: 3 });
    expect(await disk.checkAll(to)).toEqual([1, 2, 3]);
  });

  test('a link in the place of the directory beside an image is not followed', async () => {
    const disk = await newDisk();
    const image = newTarget('vm.img');
    const elsewhere = temporaryDirectory();
    fs.symlinkSync(elsewhere, `${image}.sheepgate`);
    expect(await disk.target.fails('backup', 'vm', '--to', image)).toMatch(/vm\.img\.sheepgate is not a directory/);
    expect(fs.readdirSync(elsewhere)).toEqual([]);
  });

  test('names in the header of an increment are not followed', async () => {
    const disk = await newDisk();
    const to = newTarget();
    await disk.backup(to);
    await disk.write(MIB, patterned(MIB, 3));
    const { file } = await disk.backup(to);
    const below = path.basename(fs.readdirSync(to).find((name) => /^0001.*qcow2$/.test(name)) as string);
    const content = fs.readFileSync(file);
    const at = content.indexOf(below);
    expect(at).toBeGreaterThan(0);
    Buffer.from('/dev/full'.padEnd(below.length, '\0')).copy(content, at);
    fs.writeFileSync(file, content);
    await disk.target.ok('restore', to, 'restored');
    expect(hashOf(await disk.target.contentOf('restored'))).toBe(hashOf(disk.content));
  });

  test('the content of a manifest is printed without control characters', async () => {
    const disk = await newDisk();
    const to = newTarget();
    await disk.backup(to);
    const manifest = path.join(to, 'manifest.json');
    const fields = JSON.parse(fs.readFileSync(manifest, 'utf8')) as Record<string, unknown>;
    const evil = '\x1b]0;owned\x07\x9b2J\u202etxt.exe\r\n';
    for (const [field, value] of [
      ['vdi', evil],
      ['store', evil],
      ['version', evil],
      ['format', evil],
    ] as const) {
      fs.writeFileSync(manifest, JSON.stringify({ ...fields, [field]: value }));
      for (const args of [
        ['restore', to, '--list'],
        ['restore', to, '--list', '--json'],
        ['restore', to, '--verify'],
        ['backup', 'vm', '--to', to],
      ]) {
        const { stdout, stderr } = await disk.target.run(args);
        expect(stdout + stderr, args.join(' ')).not.toMatch(/[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]/);
        if (args.includes('--json') && stdout !== '') {
          const { vdi, store } = JSON.parse(stdout) as Record<string, string>;
          expect([vdi, store]).toContain(evil);
        }
      }
    }
    fs.writeFileSync(manifest, `\x1b[31m${JSON.stringify(fields)}`);
    expect(await disk.target.fails('restore', to, '--list')).toMatch(/manifest\.json is damaged: [^\x1b]*\n$/);
  });

  test('sizes and counts are limited, and the message names the limit', async () => {
    const disk = await newDisk();
    const to = newTarget();
    await disk.backup(to);
    const manifest = path.join(to, 'manifest.json');
    const whole = fs.readFileSync(manifest, 'utf8');
    const fields = JSON.parse(whole) as { points: Record<string, unknown>[] };
    const [point] = fields.points;
    const refusedWith = async (points: object[]): Promise<string> => {
      fs.writeFileSync(manifest, JSON.stringify({ ...fields, points }));
      const lines: string[] = [];
      for (const args of [
        ['restore', to, '--list'],
        ['restore', to, 'x'],
        ['backup', 'vm', '--to', to],
      ]) {
        lines.push(oneLineOf(await disk.target.run(args), 1, args.join(' ')));
      }
      return lines.join('');
    };
    const many = Array.from({ length: 20_000 }, (_, n) => ({ ...point, id: n + 1, base: null }));
    expect(await refusedWith(many)).toMatch(/lists 20000 backups, and a target can have at most 10000/);
    expect(await refusedWith([{ ...point, size: 2 ** 52 }])).toMatch(/backup 1 has 4503599627370496 bytes .*more than/);
    expect(await refusedWith([{ ...point, blockBytes: 1 }])).toMatch(/fields are missing or invalid/);
    expect(await refusedWith([{ ...point, time: '../../x' }])).toMatch(/fields are missing/);
    expect(await refusedWith([{ ...point }, { ...point }])).toMatch(/its backups are not in order/);
    // 400,000 of them exceed the maximum size of a manifest.
    fs.writeFileSync(manifest, '');
    fs.truncateSync(manifest, 200 * MIB);
    expect(await disk.target.fails('restore', to, '--list')).toMatch(
      /has 209715200 bytes, and can have at most 16777216/,
    );
    fs.writeFileSync(manifest, whole);
    const hashes = path.join(to, fs.readdirSync(to).find((name) => name.endsWith('.hashes')) as string);
    fs.truncateSync(hashes, 100 * GIB);
    expect(await disk.target.fails('restore', to, 'x')).toMatch(
      /hashes is damaged: it has 107374182400 bytes, and can have at most/,
    );
  });
});
