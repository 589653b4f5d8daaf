/**
 * The tests of every client set (see docs/clients.md): each command with each kind of replies, lengths of 64 bits, several
 * meta contexts, reconnecting, temporary snapshots, copies from export to export, and qemu's block jobs.
 */
import fs from 'node:fs';
import path from 'node:path';
import { describe, expect, onTestFinished } from 'vitest';
import {
  cli,
  cliJson,
  ended,
  nbdsh,
  needs,
  ok,
  run,
  skipBecause,
  start,
  startDaemon,
  temporaryDirectory,
  waitUntil,
  type Daemon,
} from '../harness/daemon.js';
import { encodeExtendedRequest, encodeRequest } from '../../nbd/src/protocol/wire.js';
import { Qmp } from '../vm/qmp.js';

const MIB = 2 ** 20;
const TIB = 2 ** 40;

async function withDaemon(create: readonly string[], use: (daemon: Daemon) => Promise<void>): Promise<void> {
  const daemon = await startDaemon({ args: create.flatMap((each) => ['--create', each]) });
  await use(daemon);
  expect((await daemon.stop()).code, daemon.log()).toBe(0);
}

/** libnbd's shell, not yet connected; the script has the export's `uri`. */
async function shell(uri: string, script: string): Promise<string> {
  const { code, signal, stdout, stderr } = await nbdsh(['-c', `uri = ${JSON.stringify(uri)}\n${script}`]);
  if (code !== 0) throw new Error(`nbdsh: exit ${code ?? signal}\n${stdout}${stderr}`);
  return stdout;
}

const hasExtendedHeaders = async (): Promise<boolean> =>
  (await shell('', 'print(hasattr(h, "set_request_extended_headers"))')).trim() === 'True';

const qemuIo = (uri: string, ...commands: string[]): Promise<string> =>
  ok('qemu-io', ['-f', 'raw', ...commands.flatMap((command) => ['-c', command]), uri]);

/** A running qemu-io that takes one command after the other. */
class QemuIo {
  readonly #child: ReturnType<typeof start>;
  #said = '';

  private constructor(args: readonly string[]) {
    this.#child = start('stdbuf', ['-o0', 'qemu-io', ...args]);
    for (const stream of [this.#child.stdout, this.#child.stderr]) {
      stream.setEncoding('utf8').on('data', (text: string) => (this.#said += text));
    }
  }

  /** Opens the export with an `option` of qemu's nbd driver. */
  static async open(daemon: Daemon, name: string, option: string): Promise<QemuIo> {
    const file = ['driver=nbd', 'server.type=unix', `server.path=${daemon.socket}`, `export=${name}`, option];
    const options = ['driver=raw', ...file.map((each) => `file.${each}`)].join(',');
    const io = new QemuIo([...(name.includes('@') ? ['-r'] : []), '--image-opts', options]);
    await io.#prompt('its start');
    return io;
  }

  /** Runs one command, which must succeed. */
  async does(command: string): Promise<void> {
    this.#said = '';
    this.#child.stdin.write(`${command}\n`);
    await this.#prompt(command);
    if (/fail|error/i.test(this.#said)) throw new Error(`${command}: ${this.#said}`);
  }

  async #prompt(after: string): Promise<void> {
    await waitUntil(() => this.#said.endsWith('qemu-io> '), `qemu-io is ready after ${after}`, 60_000).catch(
      (error: unknown) => {
        throw new Error(`${(error as Error).message}; it says: ${this.#said}`, { cause: error });
      },
    );
  }

  async close(): Promise<void> {
    this.#child.stdin.end();
    expect(await ended(this.#child)).toEqual({ code: 0, signal: null });
  }
}

interface MapEntry {
  readonly start: number;
  readonly length: number;
  readonly data: boolean;
  readonly zero: boolean;
  readonly present: boolean;
}

const qemuMap = async (uri: string): Promise<MapEntry[]> =>
  JSON.parse(await ok('qemu-img', ['map', '--output=json', '-f', 'raw', uri])) as MapEntry[];

/** The same `size` bytes each time, without two equal blocks. */
const PATTERN = `
import hashlib
def pattern(size, seed):
    return b"".join(hashlib.sha256(b"%d %d" % (seed, n)).digest() for n in range((size + 31) // 32))[:size]
`;

describe('libnbd', () => {
  for (const kind of ['simple', 'structured', 'extended'] as const) {
    needs('nbdsh')(`every command, with ${kind} replies`, async (context) => {
      if (kind === 'extended' && !(await hasExtendedHeaders())) {
        return skipBecause(context, 'this libnbd has no extended headers');
      }
      await withDaemon(['disk:16M'], async (daemon) => {
        await shell(
          daemon.uri('disk'),
          `${PATTERN}
kind = "${kind}"
h.set_request_structured_replies(kind != "simple")
if hasattr(h, "set_request_extended_headers"): h.set_request_extended_headers(kind == "extended")
if kind != "simple": h.add_meta_context("base:allocation")
h.connect_uri(uri)
assert h.get_structured_replies_negotiated() == (kind != "simple")
if hasattr(h, "get_extended_headers_negotiated"): assert h.get_extended_headers_negotiated() == (kind == "extended")
assert h.can_df() == (kind != "simple")
size = h.get_size()
model = bytearray(size)
def put(offset, data, flags=0):
    h.pwrite(data, offset, flags); model[offset:offset + len(data)] = data
def clear(call, offset, length, flags):
    call(length, offset, flags); model[offset:offset + length] = bytes(length)
put(0, pattern(1 << 20, 1)); put(4095, b"odd"); put((4 << 20) - 5000, pattern(10000, 2))
put(8 << 20, pattern(5 << 20, 3)); put(size - 1, b"!")
put(77, pattern(4096, 4), nbd.CMD_FLAG_FUA)
h.flush()
for n, flags in enumerate((0, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FAST_ZERO, nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)):
    clear(h.zero, (8 << 20) + n * 100000, 70001, flags)
for n, flags in enumerate((0, nbd.CMD_FLAG_FUA)):
    clear(h.trim, (11 << 20) + n * 1000000, 700000, flags)
h.cache(1 << 20, 0)
assert h.pread(size, 0) == model
for offset, length in ((1, 1), (4095, 4097), (123456, 1 << 20), (size - 1, 1)):
    assert h.pread(length, offset) == model[offset:offset + length]
if kind != "simple":
    got = []
    assert h.pread_structured(size, 0, lambda b, o, s, e: got.append((o, len(b)))) == model
    assert sum(length for _, length in got) == size
h.shutdown()
`,
        );
      });
    });
  }

  needs('nbdsh')('lengths of 64 bits, and several contexts, whole and filtered by payload', async (context) => {
    if (!(await hasExtendedHeaders())) return skipBecause(context, 'this libnbd has no extended headers');
    await withDaemon(['disk:4T'], async (daemon) => {
      await qemuIo(daemon.uri('disk'), 'write 1T 4M', 'flush');
      expect((await cli(['vdi', 'snapshot', 'disk', 'one'], { store: daemon.store })).stderr).toBe('');
      await qemuIo(daemon.uri('disk'), 'write 2T 8M', 'flush');
      const out = await shell(
        daemon.uri('disk'),
        `
import json
for name in ("base:allocation", "sheepgate:changed:one", "qemu:dirty-bitmap:one"): h.add_meta_context(name)
h.connect_uri(uri)
assert h.get_extended_headers_negotiated()
assert h.can_block_status_payload()
size = h.get_size(); assert size == 4 << 40
def status(ask):
    found = {}
    def extent(context, offset, extents, error):
        at = offset
        for length, flags in extents:
            found.setdefault(context, []).append((at, length, flags)); at += length
        return 0
    ask(extent)
    return found
everything = status(lambda cb: h.block_status_64(size, 0, cb))
one = status(lambda cb: h.block_status_filter(size, 0, ["sheepgate:changed:one"], cb))
two = status(lambda cb: h.block_status_filter(size, 0, ["qemu:dirty-bitmap:one", "base:allocation"], cb))
assert sorted(one) == ["sheepgate:changed:one"], one
assert sorted(two) == ["base:allocation", "qemu:dirty-bitmap:one"], two
assert one["sheepgate:changed:one"] == everything["sheepgate:changed:one"]
assert two["base:allocation"] == everything["base:allocation"]
print(json.dumps(everything))
h.trim(3 << 40, 0); h.zero(1 << 40, 3 << 40)
assert status(lambda cb: h.block_status_filter(size, 0, ["base:allocation"], cb)) == {"base:allocation": [(0, size, 3)]}
assert h.pread(4096, 2 << 40) == bytes(4096)
`,
      );
      const found = JSON.parse(out) as Record<string, [number, number, number][]>;
      expect(found['base:allocation']?.filter(([, , flags]) => flags === 0)).toEqual([
        [TIB, 4 * MIB, 0],
        [2 * TIB, 8 * MIB, 0],
      ]);
      for (const name of ['sheepgate:changed:one', 'qemu:dirty-bitmap:one']) {
        expect(found[name]?.filter(([, , flags]) => flags !== 0)).toEqual([[2 * TIB, 8 * MIB, 1]]);
      }
    });
  });

  needs('nbdcopy', 'qemu-img')(
    'nbdcopy copies between exports, over several connections, and keeps holes',
    async () => {
      await withDaemon(['disk:64M', 'copy:64M'], async (daemon) => {
        await qemuIo(
          daemon.uri('disk'),
          'write -P 0x51 0 5M',
          'write -P 0x52 20M 3M',
          'write -P 0x53 33M 512',
          'flush',
        );
        await ok('nbdcopy', ['--connections=4', '--flush', daemon.uri('disk'), daemon.uri('copy')]);
        await ok('qemu-img', ['compare', '-f', 'raw', '-F', 'raw', daemon.uri('disk'), daemon.uri('copy')]);
        const data = (entries: MapEntry[]): number =>
          entries.filter((entry) => entry.data).reduce((sum, { length }) => sum + length, 0);
        expect(data(await qemuMap(daemon.uri('copy')))).toBeLessThanOrEqual(9 * MIB);
      });
    },
  );
});

describe('qemu', () => {
  needs('qemu-io')('FUA, zeroes with and without holes, fast zeroes and discards', async () => {
    await withDaemon(['disk:64M'], async (daemon) => {
      const uri = daemon.uri('disk');
      await qemuIo(uri, 'write -P 0x11 0 32M', 'write -f -P 0x12 1M 4k', 'flush');
      // In this order: zeroes that stay allocated, a hole, fast zeroes or an error, a discard.
      await qemuIo(uri, 'write -z 4M 1M', 'write -z -u 8M 4M', 'write -z -u -n 16M 4M', 'discard 24M 4M', 'flush');
      const reads = [
        'read -P 0x11 0 1M',
        'read -P 0x12 1M 4k',
        'read -P 0 4M 1M',
        'read -P 0 8M 4M',
        'read -P 0 16M 4M',
      ];
      expect(await qemuIo(uri, ...reads, 'read -P 0 24M 4M', 'read -P 0x11 28M 4M')).not.toMatch(/fail/i);
      const holes = (await qemuMap(uri))
        .filter(({ data }) => !data)
        .map(({ start, length }) => [start / MIB, length / MIB]);
      expect(holes).toEqual([
        [8, 4],
        [16, 4],
        [24, 4],
        [32, 32],
      ]);
    });
  });

  needs('qemu-io')('blocks full of encoded requests, as a guest may write them, are treated as data', async () => {
    await withDaemon(['disk:64M'], async (daemon) => {
      const file = path.join(temporaryDirectory(), 'requests');
      // WRITE_ZEROES, TRIM and DISC with both kinds of headers, in the disk's second half.
      const requests = [6, 4, 2].flatMap((type) => [
        encodeRequest(type, 0, 1, 32 * MIB, 4 * MIB),
        encodeExtendedRequest(type, 0, 1, 32 * MIB, 4 * MIB),
      ]);
      fs.writeFileSync(file, Buffer.alloc(MIB, Buffer.concat(requests)));
      const uri = daemon.uri('disk');
      await qemuIo(uri, 'write -P 0x71 32M 4M', `write -s ${file} 0 1M`, `write -f -s ${file} 4095 300k`, 'flush');
      expect(await qemuIo(uri, 'read -P 0x71 32M 4M')).not.toMatch(/fail/i);
      const copy = path.join(path.dirname(file), 'copy');
      await ok('qemu-img', ['convert', '-f', 'raw', '-O', 'raw', uri, copy]);
      const expected = fs.readFileSync(file);
      const head = Buffer.alloc(MIB);
      const opened = fs.openSync(copy, 'r');
      fs.readSync(opened, head, 0, MIB, 0);
      fs.closeSync(opened);
      fs.readFileSync(file).copy(expected, 4095, 0, 300 * 1024);
      expect(head.equals(expected)).toBe(true);
      expect(daemon.log()).not.toMatch(/violation/);
    });
  });

  needs('qemu-io')('zeroes of more than 4 GiB, discards of 1 GiB', async () => {
    await withDaemon(['disk:1T'], async (daemon) => {
      const uri = daemon.uri('disk');
      await qemuIo(uri, 'write -P 7 0 1M', 'write -P 7 9G 1M', 'write -P 7 20G 1M');
      await qemuIo(uri, 'write -z -u -n 0 15G', 'discard 20G 1G', 'read -P 0 9G 1M', 'read -P 0 20G 1M');
      expect((await qemuMap(uri)).filter(({ data }) => data)).toEqual([]);
    });
  });

  needs('qemu-io')('reconnects: what it wrote and writes while the daemon is away arrives', async () => {
    let daemon = await startDaemon({ args: ['--create', 'disk:64M'] });
    const { store, socket } = daemon;
    const io = await QemuIo.open(daemon, 'disk', 'reconnect-delay=100');
    await io.does('write -P 1 0 1M');
    for (const [n, end] of [() => daemon.stop(), () => daemon.kill()].entries()) {
      await end();
      const written = io.does(`write -P ${n + 2} ${n + 1}M 1M`);
      daemon = await startDaemon({ store, args: ['--listen', `unix:${socket}`] });
      await written;
    }
    await io.does('flush');
    await io.close();
    const reads = ['read -P 1 0 1M', 'read -P 2 1M 1M', 'read -P 3 2M 1M'];
    expect(await qemuIo(daemon.uri('disk'), ...reads)).not.toMatch(/fail/i);
    expect((await daemon.stop()).code).toBe(0);
  });

  needs('qemu-img', 'qemu-io')(
    'NAME@now does not change while the disk is written, and is removed afterwards',
    async () => {
      await withDaemon(['disk:64M'], async (daemon) => {
        await qemuIo(daemon.uri('disk'), 'write -P 0x21 0 16M', 'flush');
        const reader = await QemuIo.open(daemon, 'disk@now', 'reconnect-delay=0');
        await reader.does('read -P 0x21 0 1M');
        await qemuIo(daemon.uri('disk'), 'write -P 0x22 0 8M', 'discard 8M 8M', 'write -P 0x23 32M 1M', 'flush');
        const copy = path.join(temporaryDirectory(), 'now.img');
        await ok('qemu-img', ['convert', '-f', 'raw', '-O', 'raw', daemon.uri('disk@now'), copy]);
        expect(await qemuIo(copy, 'read -P 0x21 0 16M', 'read -P 0 16M 48M')).not.toMatch(/fail/i);
        await reader.does('read -P 0x21 0 16M');
        await reader.does('read -P 0 16M 48M');
        await reader.close();
        const disks = (): Promise<unknown[]> => cliJson<unknown[]>(['vdi', 'list'], { store: daemon.store });
        await waitUntil(async () => (await disks()).length === 1, 'the temporary snapshot is gone');
        const reads = ['read -P 0x22 0 8M', 'read -P 0 8M 8M', 'read -P 0x23 32M 1M'];
        expect(await qemuIo(daemon.uri('disk'), ...reads)).not.toMatch(/fail/i);
      });
    },
  );

  needs('qemu-img', 'qemu-io')(
    'clones, snapshots and a rolled back disk have the content of their source',
    async () => {
      await withDaemon(['disk:64M'], async (daemon) => {
        const { store } = daemon;
        const vdi = async (...args: string[]): Promise<void> => {
          expect((await cli(['vdi', ...args], { store })).stderr).toBe('');
        };
        await qemuIo(daemon.uri('disk'), 'write -P 0x31 0 8M', 'flush');
        await vdi('snapshot', 'disk', 'one');
        await qemuIo(daemon.uri('disk'), 'write -P 0x32 0 4M', 'discard 4M 4M', 'flush');
        await vdi('clone', 'disk@one', 'clone');
        await ok('qemu-img', ['compare', '-f', 'raw', '-F', 'raw', daemon.uri('disk@one'), daemon.uri('clone')]);
        await qemuIo(daemon.uri('clone'), 'write -P 0x33 2M 1M', 'flush');
        expect(await ok('qemu-io', ['-r', '-f', 'raw', '-c', 'read -P 0x31 0 8M', daemon.uri('disk@one')])).not.toMatch(
          /fail/i,
        );
        await vdi('rollback', 'disk@one');
        await ok('qemu-img', ['compare', '-f', 'raw', '-F', 'raw', daemon.uri('disk@one'), daemon.uri('disk')]);
      });
    },
  );
});

describe('qemu-storage-daemon', () => {
  for (const job of ['blockdev-mirror', 'blockdev-backup'] as const) {
    needs('qemu-storage-daemon', 'qemu-img')(`${job} from one export to another copies all of it`, async () => {
      await withDaemon(['disk:64M', 'copy:64M'], async (daemon) => {
        await qemuIo(daemon.uri('disk'), 'write -P 0x41 0 5M', 'write -P 0x42 30M 3M', 'flush');
        const monitor = path.join(temporaryDirectory(), 'qmp.sock');
        const blockdev = (name: string): string =>
          `driver=nbd,node-name=${name},server.type=unix,server.path=${daemon.socket},export=${name},discard=unmap,detect-zeroes=unmap`;
        const storage = start('qemu-storage-daemon', [
          ...['--blockdev', blockdev('disk'), '--blockdev', blockdev('copy')],
          ...['--chardev', `socket,id=c,path=${monitor},server=on,wait=off`, '--monitor', 'chardev=c'],
        ]);
        const qmp = await Qmp.connect(monitor);
        onTestFinished(() => qmp.close());
        await qmp.execute(job, { 'job-id': 'j', device: 'disk', target: 'copy', sync: 'full' });
        if (job === 'blockdev-mirror') {
          await qmp.event('BLOCK_JOB_READY', 'j');
          await qmp.execute('block-job-complete', { device: 'j' });
        }
        expect(await qmp.event('BLOCK_JOB_COMPLETED', 'j')).not.toHaveProperty('error');
        await qmp.execute('quit');
        expect((await ended(storage)).code).toBe(0);
        await ok('qemu-img', ['compare', '-f', 'raw', '-F', 'raw', daemon.uri('disk'), daemon.uri('copy')]);
        const data = (await qemuMap(daemon.uri('copy'))).filter((entry) => entry.data);
        const bytes = data.reduce((sum, { length }) => sum + length, 0);
        // A backup writes zeros without holes (docs/clients.md), a mirror keeps holes.
        if (job === 'blockdev-mirror') expect(bytes).toBeLessThanOrEqual(9 * MIB);
      });
    });
  }
});

describe('nbdkit', () => {
  needs(
    'nbdkit',
    'qemu-img',
    'qemu-io',
  )('in between, with filters: writes, zeroes, trims and maps come through', async () => {
    await withDaemon(['disk:64M'], async (daemon) => {
      const socket = path.join(temporaryDirectory(), 'kit.sock');
      const kit = start('nbdkit', [
        '-f',
        '-U',
        socket,
        '--filter=offset',
        '--filter=stats',
        'nbd',
        `socket=${daemon.socket}`,
        'export=disk',
        'offset=4M',
        'range=32M',
        'statsfile=/dev/null',
      ]);
      const uri = `nbd+unix:///?socket=${socket}`;
      await waitUntil(async () => (await run('nbdinfo', ['--size', uri])).code === 0, 'nbdkit listens');
      await qemuIo(uri, 'write -P 0x61 0 8M', 'write -z -u 2M 1M', 'discard 4M 4M', 'flush');
      expect(
        await qemuIo(uri, 'read -P 0x61 0 2M', 'read -P 0 2M 1M', 'read -P 0x61 3M 1M', 'read -P 0 4M 4M'),
      ).not.toMatch(/fail/i);
      expect(
        (await qemuMap(uri)).filter(({ data }) => data).map(({ start, length }) => [start / MIB, length / MIB]),
      ).toEqual([
        [0, 2],
        [3, 1],
      ]);
      expect(await qemuIo(daemon.uri('disk'), 'read -P 0 0 4M', 'read -P 0x61 4M 2M', 'read -P 0 8M 4M')).not.toMatch(
        /fail/i,
      );
      kit.kill('SIGTERM');
      await ended(kit);
    });
  });
});
