/**
 * Common NBD clients in their common uses, each with a new disk.
 */
import { createHash } from 'node:crypto';
import fs from 'node:fs';
import path from 'node:path';
import { describe, expect, test } from 'vitest';
import { cli, haveCommand, nbdsh, needs, ok, run, skipBecause, temporaryDirectory } from '../harness/daemon.js';
import { withDaemon } from './shared-daemon.js';

const MIB = 2 ** 20;

async function shellOk(args: readonly string[]): Promise<string> {
  const { code, signal, stdout, stderr } = await nbdsh(args);
  if (code !== 0) throw new Error(`nbdsh: exit ${code ?? signal}\n${stdout}${stderr}`);
  return stdout;
}

/** Pseudo-random data, the same each time, without two equal blocks. */
function patterned(size: number, seed: number): Buffer {
  const data = Buffer.alloc(size);
  let state = seed >>> 0 || 1;
  for (let at = 0; at + 4 <= size; at += 4) {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    data.writeUInt32LE(state >>> 0, at);
  }
  return data;
}

function sha256(file: string): string {
  return createHash('sha256').update(fs.readFileSync(file)).digest('hex');
}

describe('libnbd tools', () => {
  needs('nbdinfo')('nbdinfo lists VDIs and snapshots and shows sizes, flags and allocation', async () => {
    await withDaemon('64M', async (daemon) => {
      expect((await cli(['vdi', 'snapshot', 'disk', 'one'], { store: daemon.store })).code).toBe(0);
      const list = JSON.parse(await ok('nbdinfo', ['--list', '--json', `nbd+unix://?socket=${daemon.socket}`])) as {
        exports: { 'export-name': string; is_read_only: boolean; 'export-size': number; can_multi_conn: boolean }[];
      };
      const byName = new Map(list.exports.map((entry) => [entry['export-name'], entry]));
      expect([...byName.keys()].sort()).toEqual(['disk', 'disk@one']);
      expect(byName.get('disk')).toMatchObject({ is_read_only: false, 'export-size': 64 * MIB, can_multi_conn: true });
      expect(byName.get('disk@one')).toMatchObject({ is_read_only: true });
      expect((await ok('nbdinfo', ['--size', daemon.uri('disk')])).trim()).toBe(String(64 * MIB));
      expect(await ok('nbdinfo', ['--map', daemon.uri('disk')])).toMatch(/^\s*0\s+67108864/);
      for (const can of ['write', 'trim', 'zero', 'flush', 'fua', 'cache', 'multi-conn', 'fast-zero']) {
        const flag = can === 'write' ? ['--is', 'read-only'] : ['--can', can];
        const result = await run('nbdinfo', [...flag, daemon.uri('disk')]);
        expect(result.code, can).toBe(can === 'write' ? 2 : 0);
      }
      // libnbd 1.14 shows the server's message only in its debug output.
      const missing = await run('nbdinfo', [daemon.uri('missing')], { env: { LIBNBD_DEBUG: '1' } });
      expect(missing.stderr).toMatch(/there is no such VDI: "missing"/);
    });
  });

  needs('nbdcopy')('nbdcopy copies 96 MiB in and out unchanged', async () => {
    await withDaemon('96M', async (daemon) => {
      const directory = temporaryDirectory();
      const source = path.join(directory, 'in.img');
      const copy = path.join(directory, 'out.img');
      const data = patterned(96 * MIB, 7);
      data.fill(0, 20 * MIB, 50 * MIB);
      fs.writeFileSync(source, data);
      await ok('nbdcopy', ['--flush', source, daemon.uri('disk')]);
      await ok('nbdcopy', [daemon.uri('disk'), copy]);
      expect(sha256(copy)).toBe(sha256(source));
    });
  });

  needs('nbdsh')(
    'odd, unaligned, zero-length and out-of-range requests are answered as the protocol says',
    async () => {
      await withDaemon('9M', async (daemon) => {
        const script = `
import errno, os, random
h.set_strict_mode(0)
h.set_pread_initialize(True)
size = h.get_size()
assert size == 9 * 1024 * 1024
random.seed(5)
model = bytearray(size)
def put(o, d):
    h.pwrite(d, o); model[o:o+len(d)] = d
for o, n in [(0, 1), (1, 511), (4095, 2), (4194303, 3), (4194304 - 4097, 8195), (size - 1, 1), (size - 4099, 4099), (123, 5000001)]:
    put(o, random.randbytes(n))
for _ in range(300):
    n = random.choice([1, 7, 512, 513, 4096, 65537]); o = random.randrange(size - n)
    k = random.randrange(4)
    if k < 2: put(o, random.randbytes(n))
    elif k == 2: h.zero(n, o); model[o:o+n] = bytes(n)
    else: h.trim(n, o); model[o:o+n] = bytes(n)
assert h.pread(size, 0) == model
for _ in range(200):
    n = random.choice([1, 3, 512, 4097, 1000000]); o = random.randrange(size - n)
    assert h.pread(n, o) == model[o:o+n]
h.zero(8192, 4000, nbd.CMD_FLAG_NO_HOLE); model[4000:12192] = bytes(8192)
h.zero(8192, 14000, nbd.CMD_FLAG_FAST_ZERO); model[14000:22192] = bytes(8192)
h.pwrite(b'fua', 77, nbd.CMD_FLAG_FUA); model[77:80] = b'fua'
h.cache(100000, 0); h.flush()
def fails(f, *codes):
    try: f()
    except nbd.Error as e: assert e.errnum in codes, (e.errnum, codes); return
    raise AssertionError('should have failed')
fails(lambda: h.pread(1, size), errno.EINVAL)
fails(lambda: h.pread(2, size - 1), errno.EINVAL)
fails(lambda: h.pwrite(b'xx', size - 1), errno.ENOSPC, errno.EINVAL)
fails(lambda: h.trim(4096, size - 1), errno.EINVAL, errno.ENOSPC)
fails(lambda: h.zero(4096, size), errno.ENOSPC, errno.EINVAL)
fails(lambda: h.pread(1, 2**63 - 1), errno.EINVAL, errno.EOVERFLOW)
assert h.pread(size, 0) == model
`;
        await shellOk(['-u', daemon.uri('disk'), '-c', script]);
        const readOnly = `
import errno
for f in (lambda: h.pwrite(b'x', 0), lambda: h.zero(1, 0), lambda: h.trim(1, 0)):
    try: f()
    except nbd.Error as e: assert e.errnum == errno.EPERM, e
    else: raise AssertionError('a snapshot was written')
`;
        expect((await cli(['vdi', 'snapshot', 'disk', 's'], { store: daemon.store })).code).toBe(0);
        await shellOk(['-u', daemon.uri('disk@s'), '-c', `h.set_strict_mode(0)\n${readOnly}`]);
      });
    },
  );

  needs('nbdkit', 'nbdcopy')("nbdkit's nbd plugin serves us on", async () => {
    await withDaemon('32M', async (daemon) => {
      const directory = temporaryDirectory();
      const source = path.join(directory, 'in.img');
      fs.writeFileSync(source, patterned(32 * MIB, 3));
      const inner = `nbdcopy ${source} "$uri" && nbdcopy "$uri" ${directory}/out.img && cmp ${source} ${directory}/out.img`;
      await ok('nbdkit', ['-U', '-', 'nbd', `socket=${daemon.socket}`, 'export=disk', '--run', inner]);
      await ok('nbdcopy', [daemon.uri('disk'), path.join(directory, 'direct.img')]);
      expect(sha256(path.join(directory, 'direct.img'))).toBe(sha256(source));
    });
  });
});

describe('qemu', () => {
  needs('qemu-img')('qemu-img converts, compares and benches', async () => {
    await withDaemon('64M', async (daemon) => {
      const directory = temporaryDirectory();
      const source = path.join(directory, 'in.img');
      const data = Buffer.alloc(64 * MIB);
      patterned(8 * MIB, 9).copy(data, 3 * MIB);
      fs.writeFileSync(source, data);
      const uri = daemon.uri('disk');
      await ok('qemu-img', ['convert', '-n', '-f', 'raw', '-O', 'raw', source, uri]);
      await ok('qemu-img', ['compare', '-f', 'raw', '-F', 'raw', source, uri]);
      await ok('qemu-img', ['convert', '-f', 'raw', '-O', 'qcow2', uri, path.join(directory, 'out.qcow2')]);
      await ok('qemu-img', ['compare', '-f', 'raw', '-F', 'qcow2', uri, path.join(directory, 'out.qcow2')]);
      expect(await ok('qemu-img', ['bench', '-f', 'raw', '-c', '2000', '-d', '32', uri])).toMatch(/Run completed/);
      expect(
        await ok('qemu-img', ['bench', '-w', '-f', 'raw', '-c', '2000', '-d', '32', '--flush-interval', '100', uri]),
      ).toMatch(/Run completed/);
    });
  });

  needs('qemu-io')('qemu-io verifies its patterns, before and after a snapshot', async () => {
    await withDaemon('64M', async (daemon) => {
      const io = (name: string, ...commands: string[]): Promise<string> =>
        ok('qemu-io', ['-f', 'raw', ...commands.flatMap((command) => ['-c', command]), daemon.uri(name)]);
      await io('disk', 'write -P 0x11 0 20M', 'write -P 0x22 3M 5k', 'write -z 10M 1M', 'discard 12M 4M', 'flush');
      await cli(['vdi', 'snapshot', 'disk', 'before'], { store: daemon.store });
      const patterns = [
        'read -P 0x11 0 3M',
        'read -P 0x22 3M 5k',
        'read -P 0 10M 1M',
        'read -P 0 12M 4M',
        'read -P 0x11 16M 4M',
      ];
      expect((await io('disk', 'write -P 0x33 0 20M', 'flush', 'read -P 0x33 0 20M')).includes('failed')).toBe(false);
      const seen = await ok('qemu-io', [
        '-r',
        '-f',
        'raw',
        ...patterns.flatMap((p) => ['-c', p]),
        daemon.uri('disk@before'),
      ]);
      expect(seen).not.toMatch(/fail/i);
    });
  });
});

describe('fio', () => {
  needs('fio')('verifies crc32c over 512 B to 1 MiB at queue depth 32 on 4 connections', async (context) => {
    const engines = await run('fio', ['--enghelp']);
    if (!/\bnbd\b/.test(engines.stdout)) return skipBecause(context, 'this fio has no nbd engine');
    await withDaemon('128M', async (daemon) => {
      const directory = temporaryDirectory();
      const job = (n: number): string[] => [
        `--name=job${n}`,
        `--offset=${n * 32}m`,
        '--size=32m',
        '--io_size=48m',
        '--bsrange=512-1m',
      ];
      await ok(
        'fio',
        [
          '--ioengine=nbd',
          `--uri=${daemon.uri('disk')}`,
          '--rw=randwrite',
          '--iodepth=32',
          '--verify=crc32c',
          '--verify_fatal=1',
          '--randrepeat=0',
          '--fsync=64',
          ...[0, 1, 2, 3].flatMap(job),
        ],
        { cwd: directory },
      );
    });
  });
});

describe('filesystems', () => {
  const fuse = fs.existsSync('/dev/fuse') && haveCommand('nbdfuse') && haveCommand('fusermount3');
  if (!fuse) console.log('skipped: nbdfuse, fusermount3 or /dev/fuse is missing');
  (fuse ? needs('mkfs.ext4', 'e2fsck', 'nbdcopy', 'nbdfuse') : test.skip)(
    'fsck finds a real ext4 image sound through nbdfuse',
    async () => {
      await withDaemon('256M', async (daemon) => {
        const directory = temporaryDirectory();
        const image = path.join(directory, 'fs.img');
        fs.writeFileSync(image, '');
        fs.truncateSync(image, 256 * MIB);
        await ok('mkfs.ext4', ['-q', '-F', '-d', path.resolve('src'), image]);
        await ok('nbdcopy', ['--destination-is-zero', image, daemon.uri('disk')]);
        const file = path.join(directory, 'nbd.img');
        fs.writeFileSync(file, '');
        const script = `nbdfuse "${file}" --unix "${daemon.socket}" disk & pid=$!
        for n in $(seq 200); do [ "$(stat -c %s "${file}")" = ${256 * MIB} ] && break; sleep 0.05; done
        e2fsck -f -n "${file}" && e2fsck -f -y -D "${file}"; code=$?
        fusermount3 -u "${file}"; wait $pid; [ $code -le 1 ]`;
        const uri = { env: { PATH: `${process.env.PATH ?? ''}:/usr/sbin:/sbin` } };
        await ok('sh', ['-c', script.replace(`--unix "${daemon.socket}" disk`, `"${daemon.uri('disk')}"`)], uri);
      });
    },
  );

  for (const mkfs of ['mkfs.ext4', 'mkfs.xfs']) {
    (fuse ? needs(mkfs, 'nbdfuse') : test.skip)(`${mkfs} on a 2 TiB VDI leaves only its metadata`, async () => {
      await withDaemon('2T', async (daemon) => {
        const directory = temporaryDirectory();
        const file = path.join(directory, 'nbd.img');
        fs.writeFileSync(file, '');
        const options = mkfs === 'mkfs.ext4' ? '-q -F -E lazy_itable_init=1,discard' : '-q -f';
        const script = `nbdfuse "${file}" "${daemon.uri('disk')}" & pid=$!
          for n in $(seq 200); do [ "$(stat -c %s "${file}")" = ${2 * 2 ** 40} ] && break; sleep 0.05; done
          ${mkfs} ${options} "${file}"; code=$?
          fusermount3 -u "${file}"; wait $pid; exit $code`;
        await ok('sh', ['-c', script], {
          env: { PATH: `${process.env.PATH ?? ''}:/usr/sbin:/sbin` },
          timeoutMs: 110_000,
        });
        const used = Number((await ok('du', ['-s', '-B1', daemon.store])).split('\t')[0]);
        console.log(`${mkfs} on 2 TiB: the store has ${(used / MIB).toFixed(1)} MiB`);
        expect(used).toBeLessThan(2 * 2 ** 30);
      });
    });
  }

  needs('nbdsh')('trimming all of an empty 4 TiB VDI takes milliseconds', async () => {
    await withDaemon('4T', async (daemon) => {
      const script = `
import time
size = h.get_size(); step = 2**32 - 65536; o = 0; t = time.monotonic()
while o < size:
    n = min(step, size - o); h.trim(n, o); o += n
print(int((time.monotonic() - t) * 1000))
`;
      const took = Number(await shellOk(['-u', daemon.uri('disk'), '-c', script]));
      console.log(`trimming an empty 4 TiB VDI: ${took} ms in ${Math.ceil(2 ** 42 / (2 ** 32 - 65536))} requests`);
      expect(took).toBeLessThan(2000);
      const used = Number((await ok('du', ['-s', '-B1', daemon.store])).split('\t')[0]);
      expect(used).toBeLessThan(32 * MIB);
    });
  });
});
