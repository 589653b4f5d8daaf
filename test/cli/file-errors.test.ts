/**
 * Errors of the operating system for files that are named on the command line: one line with the operation, the path, the reason
 * and what to do; never Node's own message.
 */
import fs from 'node:fs';
import path from 'node:path';
import { beforeAll, describe, expect, test } from 'vitest';
import { reasonOf, systemMessage, type SystemError } from '../../src/system/system-error.js';
import { BIN, cli, haveCommand, run, skipBecause, startDaemon, temporaryDirectory } from '../harness/daemon.js';
import { mountReadOnly, mountTmpfs } from '../harness/filesystems.js';
import { lastLineOf, oneLineOf, patterned, storeWith, WAYS, testStore, type TestStore } from './both-ways.js';

const directory = temporaryDirectory();
const inside = (...names: string[]): string => path.join(directory, ...names);
const FILE = inside('file');
fs.writeFileSync(FILE, patterned(2 ** 20, 1));
fs.symlinkSync('circle', inside('circle'));
const LONG = inside('x'.repeat(256));
const BELOW_A_FILE = path.join(FILE, 'below');
/** Node's own message: "ENOENT: no such file or directory, open '…'". */
const RAW = /E[A-Z]{3,}: /;

describe('the message', () => {
  const failed = (fields: Partial<SystemError>): SystemError => Object.assign(new Error('raw'), fields) as SystemError;

  test('names the operation, the path, the reason and what to do', () => {
    expect(systemMessage(failed({ code: 'ENOENT', errno: -2, syscall: 'open', path: '/a' }))).toBe(
      'cannot open /a: no such file or directory (ENOENT); check the name, or mount the filesystem that belongs there',
    );
    expect(systemMessage(failed({ code: 'EROFS', errno: -30, syscall: 'rename', path: '/a', dest: '/b' }))).toBe(
      'cannot rename /a to /b: read-only file system (EROFS); mount it writable, or give another place',
    );
  });

  test('takes the path from the caller if the error has none', () => {
    const full = failed({ code: 'ENOSPC', errno: -28, syscall: 'fdatasync' });
    expect(systemMessage(full, '/backup/vm1')).toMatch(
      /^cannot write \/backup\/vm1: no space left on device \(ENOSPC\); /,
    );
    expect(systemMessage(full)).toMatch(/^cannot write: no space/);
  });

  test('of an error that is not a system error is unchanged', () => {
    expect(reasonOf(new Error('it is a fifo'))).toBe('it is a fifo');
  });
});

describe.each(WAYS)('%s', (way) => {
  let target: TestStore;
  let readOnly: string | undefined;
  let full: string | undefined;
  beforeAll(async () => {
    target = await testStore(way);
    await target.ok('import', FILE, 'vm');
    readOnly = mountReadOnly(temporaryDirectory());
    full = mountTmpfs('128k');
  });

  const fails = async (...args: string[]): Promise<string> => {
    const line = await target.fails(...args);
    expect(line).not.toMatch(RAW);
    return line;
  };

  test.each([
    [['import', inside('none'), 'new'], /cannot open .*none: no such file or directory \(ENOENT\); check the name/],
    [
      ['import', BELOW_A_FILE, 'new'],
      /cannot open .*below: not a directory \(ENOTDIR\); a part of this path is a file/,
    ],
    [['import', LONG, 'new'], /cannot open .*: name too long \(ENAMETOOLONG\); give a shorter name/],
    [['import', inside('circle'), 'new'], /cannot open .*circle: .*\(ELOOP\); its symbolic links form a circle/],
    [['export', 'vm', BELOW_A_FILE], /below: not a directory \(ENOTDIR\)/],
    [['export', 'vm', LONG], /\(ENAMETOOLONG\); give a shorter name/],
    [
      ['export', 'vm', LONG.slice(0, -2)],
      /x was not written, and the partial image was removed: cannot .*\.partial: name too long/,
    ],
    [['export', 'vm', inside('circle')], /circle: .*\(ELOOP\)/],
    [['backup', 'vm', '--to', BELOW_A_FILE], /below: not a directory \(ENOTDIR\)/],
    [['backup', 'vm', '--to', LONG], /\(ENAMETOOLONG\)/],
    [['backup', 'vm', '--to', inside('none', 'vm')], /none does not exist; create it, or mount/],
    [['restore', BELOW_A_FILE, 'new'], /below: not a directory \(ENOTDIR\)/],
    [['restore', LONG, '--list'], /\(ENAMETOOLONG\)/],
    [['vdi', 'list', '--control', BELOW_A_FILE], /below: not a directory \(ENOTDIR\)/],
  ] as [string[], RegExp][])('sheepgate %j: one line', async (args, says) => {
    expect(await fails(...args)).toMatch(says);
  });

  test('a read-only place is reported as such', async (context) => {
    if (readOnly === undefined) return skipBecause(context, 'needs root, to mount');
    const place = path.join(readOnly, 'out');
    expect(await fails('export', 'vm', place)).toMatch(
      /out was not written.*read-only file system \(EROFS\); mount it writable/,
    );
    expect(await fails('backup', 'vm', '--to', place)).toMatch(
      /cannot make the directory .*out: read-only file system/,
    );
    expect(await fails('backup', 'vm', '--to', `${place}.img`)).toMatch(/\(EROFS\); mount it writable/);
  });

  test('a full place is reported, with what to do', async (context) => {
    if (full === undefined) return skipBecause(context, 'needs root, to mount');
    const place = path.join(full, 'out');
    expect(await fails('export', 'vm', place)).toMatch(/no space left for .*out .*free space in/);
    expect(await fails('backup', 'vm', '--to', place)).toMatch(
      /no space left in .*out; free some space there, or --keep fewer/,
    );
    expect(fs.readdirSync(full)).toEqual(['out']);
  });

  test('an image with bad sectors is named, and the VDI that was created for it is removed', async () => {
    const preload = path.resolve(import.meta.dirname, 'failing-reads.mjs');
    const result = await target.run(['import', FILE, 'new'], {
      env: { EIO_ON: FILE, NODE_OPTIONS: `--import=${preload}` },
    });
    expect(oneLineOf(result, 1, 'import')).toMatch(/: cannot read .*file: i\/o error \(EIO\); the disk has failed/);
    expect(await target.names()).not.toContain('new');
  });
});

describe('stores', () => {
  test('that cannot be created or read are reported in the same form', async (context) => {
    const create = await cli(['vdi', 'create', 'vm', '1M', '--store', LONG]);
    expect(oneLineOf(create, 1, 'create')).toMatch(/cannot inspect .*: name too long \(ENAMETOOLONG\)/);
    const readOnly = mountReadOnly(temporaryDirectory());
    if (readOnly === undefined) return skipBecause(context, 'needs root, to mount');
    const line = oneLineOf(await cli(['vdi', 'create', 'vm', '1M', '--store', path.join(readOnly, 's')]), 1, 'create');
    expect(line).toMatch(
      /opening store .*cannot make the directory .*s: read-only file system \(EROFS\); mount it writable/,
    );
    expect(line).not.toMatch(RAW);
  });
});

test.for(WAYS)('an import into a store on a full disk names the disk and what to do, %s', async (way, context) => {
  const full = mountTmpfs('6M');
  if (full === undefined) return skipBecause(context, 'needs root, to mount');
  const store = path.join(full, 'store');
  const daemon = way === 'through a daemon' ? await startDaemon({ store }) : undefined;
  const image = inside('large');
  fs.writeFileSync(image, patterned(16 * 2 ** 20, 5));
  const result = await cli(['import', image, 'vm'], { store });
  fs.rmSync(image);
  const line = lastLineOf(result, 1, 'import');
  expect(line).toMatch(
    /(?:writing|creating) object .*: no space left on device \(ENOSPC\); free space on that filesystem, or delete VDIs and snapshots/,
  );
  expect(line).not.toMatch(/ENOSPC: no space/);
  await daemon?.stop();
});

test('missing permissions for a file or directory are reported, with the way out', async (context) => {
  if (process.getuid?.() !== 0 || !haveCommand('setpriv')) return skipBecause(context, 'needs root and setpriv');
  const place = temporaryDirectory();
  fs.chmodSync(place, 0o755);
  const shut = path.join(place, 'shut');
  fs.mkdirSync(shut, { mode: 0o700 });
  const image = path.join(place, 'image');
  fs.writeFileSync(image, patterned(4096, 1), { mode: 0o600 });
  const own = path.join(place, 'own');
  fs.mkdirSync(own);
  fs.chownSync(own, 54_321, 54_321);
  const store = path.join(own, 'store');
  const asOther = async (...args: string[]): Promise<string> => {
    const as = ['--reuid=54321', '--regid=54321', '--clear-groups', process.execPath, BIN];
    const result = await run('setpriv', [...as, ...args, '--store', store], { env: { HOME: '/nonexistent' } });
    if (args[0] === 'vdi') {
      expect(result.code, result.stderr).toBe(0);
      return '';
    }
    const line = oneLineOf(result, 1, args.join(' '));
    expect(line).toMatch(/permission denied \(EACCES\); run this as a user with access, or change the permissions/);
    expect(line).not.toMatch(RAW);
    return line;
  };
  await asOther('vdi', 'create', 'vm', '1M');
  expect(await asOther('import', image, 'new')).toContain(`cannot open ${image}: `);
  expect(await asOther('export', 'vm', path.join(shut, 'out'))).toContain(path.join(shut, 'out'));
  expect(await asOther('export', 'vm', path.join(place, 'out'))).toContain(
    `${path.join(place, 'out')} was not written`,
  );
  expect(await asOther('backup', 'vm', '--to', path.join(place, 'out'))).toContain('cannot make the directory');
  expect(await asOther('backup', 'vm', '--to', path.join(shut, 'out'))).toContain(path.join(shut, 'out'));
  await storeWith(path.join(place, 'roots'), undefined).ok('vdi', 'create', 'vm', '1M');
  await storeWith(path.join(place, 'roots'), undefined).ok('backup', 'vm', '--to', path.join(place, 'backup'));
  expect(await asOther('restore', path.join(place, 'backup'), '--list')).toContain('cannot open ');
});
