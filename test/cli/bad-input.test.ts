/** Bad input: one clear line on stderr; exit code 1 if the request is impossible, 2 for wrong usage. */
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import net from 'node:net';
import path from 'node:path';
import { gzipSync } from 'node:zlib';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { cli, skipBecause, startDaemon, temporaryDirectory } from '../harness/daemon.js';
import { oneLineOf, storeWith, testStore, WAYS, type TestStore } from './both-ways.js';

const LONG = 'x'.repeat(256);
const directory = temporaryDirectory();
const file = (name: string, content: Buffer | string): string => {
  const place = path.join(directory, name);
  fs.writeFileSync(place, content);
  return place;
};
const EMPTY = file('empty.img', '');
const SMALL = file('small.img', Buffer.alloc(4096, 1));
const QCOW2 = file('disk.qcow2', Buffer.concat([Buffer.from('QFI\xfb', 'latin1'), Buffer.alloc(508)]));
const GZIP = file('disk.img.gz', gzipSync(Buffer.alloc(4096, 1)));
const ZSTD_MARK = file('disk.img.zst', Buffer.concat([Buffer.from([0x28, 0xb5, 0x2f, 0xfd]), Buffer.alloc(60)]));

/** [arguments, what the line must say]. The store has vm (1 GiB, snapshot s), and old@s without a working VDI. */
const REFUSED: readonly (readonly [readonly string[], RegExp])[] = [
  // names
  [['vdi', 'create', 'a/b', '1G'], /VDI name "a\/b": must not contain "\/" or "@"/],
  [['vdi', 'create', 'a@b', '1G'], /must not contain "\/" or "@"/],
  [['vdi', 'create', 'a\tb', '1G'], /"a\\tb": must not contain NUL or other control characters/],
  [['vdi', 'create', 'a\nb', '1G'], /control characters/],
  [['vdi', 'create', 'a\x7f', '1G'], /control characters/],
  [['vdi', 'create', LONG, '1G'], /longer than 255 bytes/],
  [['vdi', 'create', 'ä'.repeat(128), '1G'], /longer than 255 bytes/],
  [['vdi', 'create', '', '1G'], /must not be empty/],
  [['vdi', 'create', ' a', '1G'], /must not begin or end with a space/],
  [['vdi', 'create', 'a ', '1G'], /must not begin or end with a space/],
  [['vdi', 'create', 'vm', '1G'], /"vm" exists already/],
  [['vdi', 'create', 'old', '1G'], /"old" exists already/],
  // valid sizes, but not for a VDI
  [['vdi', 'create', 'new', '1000'], /size 1000: must be a positive multiple of 512 bytes/],
  [['vdi', 'create', 'new', '5T'], /at most 4398046511104 bytes; a larger --block-size-shift allows more/],
  [['vdi', 'create', 'new', '65T', '--block-size-shift', '26'], /at most 70368744177664 bytes$/m],
  // tags
  [['vdi', 'snapshot', 'vm', 'now'], /"now" is reserved/],
  [['vdi', 'snapshot', 'vm', 'now:mine'], /"now:mine" is reserved/],
  [['vdi', 'snapshot', 'vm', 's'], /vm has a snapshot "s" already/],
  [['vdi', 'snapshot', 'vm', 'a/b'], /tag "a\/b": must not contain/],
  [['vdi', 'snapshot', 'vm', LONG], /longer than 255 bytes/],
  [['vdi', 'snapshot', 'vm', ''], /must not be empty/],
  [['vdi', 'snapshot', 'vm@s', 't'], /vm@s is a snapshot/],
  [['vdi', 'snapshot', 'nope', 't'], /no VDI named "nope"/],
  [['vdi', 'snapshot', 'old', 't'], /"old" has only snapshots/],
  // unknown
  [['vdi', 'show', 'nope'], /no VDI named "nope" in .*'sheepgate vdi list' shows what is there/],
  [['vdi', 'show', 'vm@nope'], /"vm" has no snapshot "nope"/],
  [['vdi', 'show', 'vm@'], /a tag must follow the @/],
  [['vdi', 'show', 'vm@s@s'], /"vm" has no snapshot "s@s"|must not contain/],
  [['vdi', 'show', ''], /must not be empty/],
  [['vdi', 'delete', 'nope'], /no VDI named "nope"/],
  [['vdi', 'delete', 'vm@nope'], /no snapshot "nope"/],
  [['vdi', 'delete', 'vm@now'], /no snapshot "now"/],
  // the wrong kind
  [['vdi', 'clone', 'vm', 'new'], /can only clone a snapshot: give NAME@TAG, not "vm"/],
  [['vdi', 'clone', 'vm@s', 'vm'], /"vm" exists already/],
  [['vdi', 'clone', 'vm@s', 'new@x'], /must not contain/],
  [['vdi', 'clone', 'vm@nope', 'new'], /no snapshot "nope"/],
  [['vdi', 'rollback', 'vm'], /give NAME@TAG, not "vm"/],
  [['vdi', 'rollback', 'old@s'], /"old" has only snapshots/],
  [['vdi', 'resize', 'vm@s', '2G'], /vm@s is a snapshot/],
  [['vdi', 'resize', 'vm', '512M'], /shrinking it to 536870912 destroys the data behind the new end; --force/],
  [['vdi', 'resize', 'vm', '1000000001'], /multiple of 512/],
  [['vdi', 'resize', 'vm', '5T'], /at most 4398046511104 bytes/],
  // import
  [['import', directory, 'new'], /is a directory, not a disk image/],
  [['import', path.join(directory, 'nope'), 'new'], /no such file/],
  [['import', EMPTY, 'new'], /empty\.img is empty/],
  [['import', '/dev/null', 'new'], /\/dev\/null is empty/],
  [['import', '-', 'new'], /stdin is empty/],
  [['import', QCOW2, 'new'], /is qcow2, not a raw image: .*qemu-img convert.*--raw/],
  [['import', GZIP, 'new'], /is gzip, not a raw image: .*gzip -dc .*--raw/],
  [['import', ZSTD_MARK, 'new'], /is zstd, not a raw image/],
  [['import', SMALL, 'vm'], /"vm" exists already/],
  [['import', SMALL, 'vm@s', '--overwrite'], /must not contain/],
  [['import', SMALL, 'new', '--size', '2K'], /has 4096 bytes, --size says only 2048/],
  [['import', '/dev/zero', 'new', '--size', '1M'], /longer than the 1048576 bytes of the disk/],
  // export
  [['export', 'nope', path.join(directory, 'out')], /no VDI named "nope"/],
  [['export', 'vm@nope', path.join(directory, 'out')], /no snapshot "nope"/],
  [['export', 'nope@now', path.join(directory, 'out')], /no VDI named "nope"/],
  [['export', 'vm@now:', path.join(directory, 'out')], /NAME@now:LABEL/],
  [['export', 'old', path.join(directory, 'out')], /only snapshots/],
  [['export', 'vm', directory], /is a directory; give a file's name/],
  [['export', 'vm', SMALL], /small\.img exists; --force replaces it/],
  [['export', 'vm', path.join(directory, 'no', 'out')], /\/no does not exist; create it, or mount/],
];

/** Wrong usage, which is found before any store is opened. */
const USAGE: readonly (readonly [readonly string[], RegExp])[] = [
  [['vdi', 'create', 'new', '0'], /a size must be above zero/],
  [['vdi', 'create', 'new', '-1'], /"-1" is no size/],
  [['vdi', 'create', '--', 'new', '-5G'], /"-5G" is no size/],
  [['vdi', 'create', 'new', '1KB'], /"1KB" is no size; give a number and a unit/],
  [['vdi', 'create', 'new', '1.5'], /no fractions of a byte/],
  [['vdi', 'create', 'new', '1.33333K'], /not a whole number of bytes/],
  [['vdi', 'create', 'new', '9999999P'], /more than any VDI can have/],
  [['vdi', 'create', 'new', ''], /is no size/],
  [['vdi', 'create', 'new'], /missing required argument 'size'/],
  [['vdi', 'create', 'new', '1G', 'more'], /too many arguments/],
  [['vdi', 'create', 'new', '1G', '--block-size-shift', '19'], /must be 20 to 26/],
  [['vdi', 'create', 'new', '1G', '--block-size-shift', '22.5'], /must be 20 to 26/],
  [['vdi', 'resize', 'vm', 'big'], /"big" is no size/],
  [['vdi', 'lst'], /unknown command 'lst'.*Did you mean list\?/],
  [['foo'], /unknown command 'foo'/],
  [['vdi', 'list', '--nope'], /unknown option '--nope'/],
  [['vdi', 'list', '--store', ''], /--store needs a directory/],
  [['vdi', 'list', '--store', 'x', '--cluster', 'sheep1'], /cannot be used with/],
  [['export', 'vm', '-', '--json'], /--json and the image cannot both go to stdout/],
  [['serve', '--listen', 'foo'], /"foo" is not a listen address; give unix:PATH or tcp:HOST:PORT/],
  [['serve', '--listen', 'unix:'], /a path must follow unix:/],
  [['serve', '--listen', `unix:/${LONG}`], /the path has 257 bytes, a unix socket's at most 107/],
  [['serve', '--listen', 'tcp:'], /give tcp:HOST:PORT, for example/],
  [['serve', '--listen', 'tcp:localhost:http'], /give tcp:HOST:PORT/],
  [['serve', '--listen', 'tcp:localhost:99999'], /port 99999 is above 65535/],
  [['serve', '--listen', 'udp:localhost:1'], /is not a listen address/],
  [['serve', '--create', 'disk'], /give NAME:SIZE, for example vm1:20G/],
  [['serve', '--create', ':1G'], /give NAME:SIZE/],
  [['serve', '--create', 'disk:'], /is no size/],
  [['serve', '--create', 'disk:0'], /above zero/],
  [['serve', '--default', ''], /VDI name "": must not be empty/],
  [['serve', '--default', 'a@'], /a tag must follow the @/],
  [['serve', '--default', 'a/b'], /"b" after the slash is not an option; there are since=TAG/],
  [['serve', '--control-mode', '666'], /"666": give 600, or 660 for the daemon's group/],
  [['serve', '--socket-mode', '999'], /no file mode; give 600, 660 or 666/],
];

describe.each(WAYS)('%s', (way) => {
  let target: TestStore;
  let before: string[];

  beforeAll(async () => {
    target = await testStore(way);
    for (const args of [
      ['vdi', 'create', 'vm', '1G'],
      ['vdi', 'snapshot', 'vm', 's'],
      ['vdi', 'create', 'old', '1M'],
      ['vdi', 'snapshot', 'old', 's'],
      ['vdi', 'delete', 'old'],
    ]) {
      await target.ok(...args);
    }
    before = await target.names();
  });

  afterAll(async () => {
    // The refused commands left nothing behind.
    expect(await target.names()).toEqual(before);
    expect(fs.readdirSync(directory).sort()).toEqual(
      ['disk.img.gz', 'disk.img.zst', 'disk.qcow2', 'empty.img', 'small.img'].sort(),
    );
    expect(target.daemon?.log() ?? '').not.toMatch(/"level":[56]0/);
  });

  test.each(REFUSED.map(([args, says]) => ({ command: args.join(' ').slice(0, 80), args, says })))(
    '$command: exit 1',
    async ({ args, says }) => {
      expect(await target.fails(...args)).toMatch(says);
    },
  );

  test('a gzip or qcow2 image on stdin is refused like a file, and --raw accepts it', async () => {
    for (const [name, bytes] of [
      ['gzip', fs.readFileSync(GZIP)],
      ['qcow2', fs.readFileSync(QCOW2)],
    ] as const) {
      const refused = await target.run(['import', '-', 'piped'], { input: bytes });
      expect(oneLineOf(refused, 1, name)).toMatch(new RegExp(`stdin is ${name}, not a raw image`));
    }
    expect((await target.run(['import', '-', 'piped', '--raw'], { input: fs.readFileSync(GZIP) })).code).toBe(0);
    await target.ok('vdi', 'delete', 'piped');
  });

  test('--size of an existing VDI is not silently ignored by import --overwrite', async () => {
    const result = await target.run(['import', SMALL, 'vm', '--overwrite', '--size', '2G']);
    expect(oneLineOf(result, 2, 'import')).toMatch(/vm exists and keeps its size/);
  });
});

describe('wrong usage, with any store', () => {
  const store = path.join(directory, 'never-made');
  test.each(USAGE.map(([args, says]) => ({ command: args.join(' ').slice(0, 80), args, says })))(
    '$command: exit 2',
    async ({ args, says }) => {
      expect(oneLineOf(await cli(args, { store, asProcess: false }), 2, args.join(' '))).toMatch(says);
      expect(fs.existsSync(store)).toBe(false);
    },
  );

  test('no command, or half a command, shows the help on stderr and exits with 2', async () => {
    for (const args of [[], ['vdi']]) {
      const result = await cli(args, { store });
      expect({ code: result.code, stdout: result.stdout }).toEqual({ code: 2, stdout: '' });
      expect(result.stderr).toMatch(/^Usage: sheepgate/);
    }
  });

  test('--help and --version exit with 0, and every command has an example', async () => {
    expect((await cli(['--version'])).stdout).toMatch(/^\d+\.\d+\.\d+\n$/);
    const commands = [
      'serve',
      'import',
      'export',
      'check',
      ...'create list show tree delete resize snapshot clone rollback'.split(' ').map((name) => `vdi ${name}`),
    ];
    for (const command of commands) {
      const result = await cli([...command.split(' '), '--help']);
      expect({ code: result.code, stderr: result.stderr }, command).toEqual({ code: 0, stderr: '' });
      expect(result.stdout).toMatch(new RegExp(`Examples?:\n[\\s\\S]*sheepgate ${command}`));
    }
  });
});

describe('wrong stores and sockets', () => {
  test('every command reports an unreachable cluster in one line', async () => {
    for (const args of [['vdi', 'list'], ['serve'], ['vdi', 'create', 'x', '1G'], ['export', 'x', '-'], ['check']]) {
      // Only the daemon makes a socket in the runtime directory.
      const options = args[0] === 'serve' ? { env: { XDG_RUNTIME_DIR: directory } } : {};
      const result = await cli([...args, '--cluster', '127.0.0.1:1'], options);
      expect(oneLineOf(result, 1, args.join(' '))).toMatch(/cannot connect to 127\.0\.0\.1:1/);
    }
  });

  test('reading a store that does not exist is an error, and creates none', async () => {
    const store = path.join(directory, 'mistyped');
    for (const args of [
      ['vdi', 'list'],
      ['vdi', 'show', 'x'],
      ['vdi', 'delete', 'x'],
      ['check'],
      ['export', 'x', '-'],
    ]) {
      expect(oneLineOf(await cli(args, { store }), 1, args.join(' '))).toMatch(/no store in .*mistyped: .*--store DIR/);
    }
    expect(fs.existsSync(store)).toBe(false);
  });

  test('a file in the place of a store is refused', async () => {
    for (const args of [['vdi', 'list'], ['vdi', 'create', 'x', '1M'], ['serve']]) {
      expect(oneLineOf(await cli(args, { store: SMALL }), 1, args.join(' '))).toMatch(
        /is not a directory, so it (?:is no|is not a|cannot be a) store/,
      );
      expect(oneLineOf(await cli(args, { store: `${SMALL}/below` }), 1, args.join(' '))).toMatch(/not a directory/);
    }
  });

  test('a store without write permission is reported as such', async (context) => {
    const place = temporaryDirectory();
    fs.chmodSync(place, 0o555);
    try {
      fs.writeFileSync(path.join(place, 'probe'), '');
      fs.rmSync(path.join(place, 'probe'));
      // root may write everywhere, except where no file can be created
      fs.rmSync(place, { recursive: true });
      if (!fs.existsSync('/sys/kernel')) return skipBecause(context, 'needs a user other than root, or /sys');
      const result = await cli(['vdi', 'create', 'x', '1M', '--store', '/sys/kernel/sheepgate']);
      expect(oneLineOf(result, 1, 'create')).toMatch(/\/sys\/kernel\/sheepgate.*(permitted|denied)/i);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'EACCES') throw error;
      const result = await cli(['vdi', 'create', 'x', '1M', '--store', path.join(place, 'store')]);
      expect(oneLineOf(result, 1, 'create')).toMatch(/permission|denied/i);
    }
  });

  test('a store of a newer format is refused and not changed', async () => {
    const target = storeWith(path.join(temporaryDirectory(), 'store'), undefined);
    await target.ok('vdi', 'create', 'x', '1M');
    const script = `import { open } from 'lmdb';
      const env = open({ path: ${JSON.stringify(path.join(target.store, 'meta.mdb'))}, noSubdir: true, encoding: 'binary' });
      console.log([...env.getKeys()].map(String).join(' ')); await env.put('format', Buffer.from('99')); await env.close();`;
    const root = path.resolve(import.meta.dirname, '../..');
    execFileSync(process.execPath, ['--input-type=module', '-e', script], { cwd: root });
    expect(await target.fails('vdi', 'list')).toMatch(/store format 99, this sheepgate knows format \d+/);
  });

  test('--control must lead to a daemon, and to the daemon of the named store', async () => {
    const daemon = await startDaemon();
    const other = storeWith(path.join(temporaryDirectory(), 'other'), undefined);
    await other.ok('vdi', 'create', 'x', '1M');
    expect(await other.fails('vdi', 'list', '--control', daemon.control)).toMatch(
      /serves the store .*, not .*other; leave out --store or --control/,
    );
    expect(await other.fails('vdi', 'list', '--control', path.join(directory, 'none.sock'))).toMatch(
      /no daemon: there is no/,
    );
    expect(await other.fails('vdi', 'list', '--control', SMALL)).toMatch(/not a socket/);
    // Without --store, any store of the daemon is accepted.
    const asked = await cli(['vdi', 'list', '--control', daemon.control]);
    expect(asked.code, asked.stderr).toBe(0);
    // A process listens there, but it is not a daemon.
    const stranger = path.join(directory, 'stranger.sock');
    const server = net
      .createServer((socket) => {
        socket.on('error', () => undefined).resume();
        socket.end('hello\r\n');
      })
      .listen(stranger);
    try {
      expect(await other.fails('vdi', 'list', '--control', stranger)).toMatch(
        /no answer from the daemon|is not a sheepgate daemon/,
      );
    } finally {
      await new Promise((resolve) => server.close(resolve));
    }
  });
});
