/**
 * The protocol beyond plain reads and writes, with real clients: structured replies, holes, block status, error messages.
 * Extended headers are tested here with our own client, and with other clients in client-sets.test.ts.
 */
import fs from 'node:fs';
import path from 'node:path';
import { ALLOCATION_CONTEXT, NbdClient } from 'nbd-server-ts';
import { describe, expect, onTestFinished, test } from 'vitest';
import { hasOwnClients } from '../harness/client-set.js';
import { nbdsh, needs, ok, run, temporaryDirectory, type Daemon } from '../harness/daemon.js';
import { withDaemon } from './shared-daemon.js';

const KIB = 2 ** 10;
const MIB = 2 ** 20;
const TIB = 2 ** 40;

const needsShell = needs('nbdsh');

async function shell(daemon: Daemon, name: string, script: string, debug = false): Promise<string> {
  const args = ['--base-allocation', '-u', daemon.uri(name), '-c', script];
  const result = await nbdsh(args, { env: { LIBNBD_DEBUG: debug ? '1' : undefined } });
  if (result.code !== 0)
    throw new Error(`nbdsh: exit ${result.code ?? result.signal}\n${result.stdout}${result.stderr}`);
  return debug ? result.stderr : result.stdout;
}

/** Data in a few 4 KiB blocks of a 64 MiB disk: at edges of 4 MiB objects, and across one. */
const BLOCKS = [0, 3, 4, 1023, 1024, 1026, 5000, 16383];

/** Writes the blocks, writes and trims some more, and returns the ranges of data, neighbours joined. */
async function scatter(daemon: Daemon): Promise<{ start: number; length: number }[]> {
  const client = await NbdClient.connect({ path: daemon.socket });
  await client.go('disk');
  for (const block of [...BLOCKS, 700, 5001, 9000]) await client.write(block * 4 * KIB, Buffer.alloc(4 * KIB, 0x5a));
  // The only block of an object, a neighbour of another block, and one within its object's data.
  await client.trim(9000 * 4 * KIB, 4 * KIB);
  await client.zero(700 * 4 * KIB, 4 * KIB);
  await client.trim(5001 * 4 * KIB, 4 * KIB);
  await client.flush();
  await client.disconnect();
  const ranges: { start: number; length: number }[] = [];
  for (const block of BLOCKS) {
    const last = ranges.at(-1);
    if (last && last.start + last.length === block * 4 * KIB) last.length += 4 * KIB;
    else ranges.push({ start: block * 4 * KIB, length: 4 * KIB });
  }
  return ranges;
}

async function usedBytes(file: string): Promise<number> {
  return Number((await ok('du', ['-s', '-B1', file])).split('\t')[0]);
}

describe('libnbd, with structured replies', () => {
  needsShell('every command with every flag is answered', async () => {
    await withDaemon('16M', async (daemon) => {
      await shell(
        daemon,
        'disk',
        `
assert h.get_structured_replies_negotiated()
for can in (h.can_cache, h.can_df, h.can_fast_zero, h.can_flush, h.can_fua, h.can_multi_conn, h.can_trim, h.can_zero): assert can(), can
assert h.can_meta_context("base:allocation")
h.pwrite(b"a" * 4096, 0); h.pwrite(b"b" * 4096, 4096, nbd.CMD_FLAG_FUA)
assert h.pread(8192, 0) == b"a" * 4096 + b"b" * 4096
h.zero(512, 0); h.zero(512, 512, nbd.CMD_FLAG_FUA); h.zero(512, 1024, nbd.CMD_FLAG_NO_HOLE); h.zero(512, 1536, nbd.CMD_FLAG_FAST_ZERO)
h.zero(512, 2048, nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO)
assert h.pread(4096, 0) == bytes(2560) + b"a" * 1536
h.trim(4096, 0); h.trim(4096, 4096, nbd.CMD_FLAG_FUA)
assert h.pread(8192, 0) == bytes(8192)
h.cache(8192, 0); h.flush()
assert h.pread(0, 0) == b"" if h.set_strict_mode(0) is None else True
h.pwrite(b"", 0); h.trim(0, 0)
seen = []
h.block_status(8192, 0, lambda m, o, e, err: seen.append((m, o, e)), nbd.CMD_FLAG_REQ_ONE)
assert len(seen) == 1 and len(seen[0][2]) == 2, seen
assert h.pread(16 << 20, 0) == bytes(16 << 20)
`,
      );
    });
  });

  needsShell('a read tells holes from data, in pieces; with DF it is one piece', async () => {
    await withDaemon('16M', async (daemon) => {
      await shell(
        daemon,
        'disk',
        `
h.pwrite(b"x" * 8192, 1 << 20); h.pwrite(b"y" * 4096, (1 << 20) + 65536)
def chunks(length, offset, flags=0):
    seen = []
    data = h.pread_structured(length, offset, lambda b, o, s, e: seen.append((o, len(b), s)), flags)
    return data, sorted(seen)
D, H = nbd.READ_DATA, nbd.READ_HOLE
data, seen = chunks(1 << 20, 1 << 20)
assert seen == [(1048576, 8192, D), (1056768, 57344, H), (1114112, 4096, D), (1118208, 978944, H)], seen
assert data == b"x" * 8192 + bytes(57344) + b"y" * 4096 + bytes(978944)
data, seen = chunks(1 << 20, 1 << 20, nbd.CMD_FLAG_DF)
assert seen == [(1048576, 1048576, D)], seen
assert data == b"x" * 8192 + bytes(57344) + b"y" * 4096 + bytes(978944)
# never written: a hole even in a small read, with and without DF
for flags in 0, nbd.CMD_FLAG_DF:
    assert chunks(4096, 8 << 20, flags) == (bytes(4096), [(8 << 20, 4096, H)])
    assert chunks(8 << 20, 8 << 20, flags) == (bytes(8 << 20), [(8 << 20, 8 << 20, H)])
assert chunks(4096, 1 << 20)[1] == [(1 << 20, 4096, D)]
`,
      );
    });
  });

  needsShell('block status reports what was written, and what was given back', async () => {
    await withDaemon('64M', async (daemon) => {
      const ranges = await scatter(daemon);
      const out = await shell(
        daemon,
        'disk',
        `
import json
size = h.get_size(); at = 0; found = []
while at < size:
    got = []
    h.block_status(size - at, at, lambda m, o, e, err: got.append((m, o, e)))
    (context, offset, entries), = got
    assert context == "base:allocation" and offset == at
    flags = entries[1::2]
    assert all(a != b for a, b in zip(flags, flags[1:])), "not coalesced"
    for length, flag in zip(entries[0::2], flags):
        assert flag in (0, 3)
        if flag == 0: found.append({"start": at, "length": length})
        at += length
print(json.dumps(found))
# from the middle of an extent, and no further than asked with REQ_ONE
one = []
h.block_status(1000, 100, lambda m, o, e, err: one.append(e), nbd.CMD_FLAG_REQ_ONE)
assert one == [[1000, 0]], one
one = []
h.block_status(32 << 20, 4096, lambda m, o, e, err: one.append(e), nbd.CMD_FLAG_REQ_ONE)
assert one == [[8192, 3]], one
`,
      );
      expect(JSON.parse(out)).toEqual(ranges);
    });
  });

  needsShell('a request that is refused says why', async () => {
    await withDaemon('16M', async (daemon) => {
      const debug = await shell(
        daemon,
        'disk',
        `
import errno
h.set_strict_mode(0)
def fails(code, f):
    try: f()
    except nbd.Error as e: assert e.errnum == code, e
    else: raise AssertionError("should have failed")
size = h.get_size()
fails(errno.EINVAL, lambda: h.pread(1, size))
fails(errno.ENOSPC, lambda: h.pwrite(b"x", size))
fails(errno.EINVAL, lambda: h.pread(4096, 0, 0x40))
fails(errno.EINVAL, lambda: h.block_status(size + 1, 0, lambda *a: None))
assert len(h.pread(1, size - 1)) == 1
`,
        true,
      );
      expect(debug).toMatch(/the range reaches beyond the end of the export/);
    });
  });
});

describe('libnbd tools', () => {
  needs('nbdinfo')('nbdinfo --map and --map --totals are exact at 4 KiB', async () => {
    await withDaemon('64M', async (daemon) => {
      const ranges = await scatter(daemon);
      const map = JSON.parse(await ok('nbdinfo', ['--map', '--json', daemon.uri('disk')])) as {
        offset: number;
        length: number;
        type: number;
      }[];
      const data = map.filter(({ type }) => type === 0).map(({ offset, length }) => ({ start: offset, length }));
      expect(data).toEqual(ranges);
      expect(map.every(({ type }) => type === 0 || type === 3)).toBe(true);
      const totals = JSON.parse(await ok('nbdinfo', ['--map', '--totals', '--json', daemon.uri('disk')])) as {
        size: number;
        type: number;
      }[];
      const dataBytes = BLOCKS.length * 4 * KIB;
      expect(totals.map(({ size, type }) => [type, size]).sort()).toEqual([
        [0, dataBytes],
        [3, 64 * MIB - dataBytes],
      ]);
    });
  });

  needs('nbdinfo')('nbdinfo --can reports structured replies and the features that depend on them', async () => {
    await withDaemon('16M', async (daemon) => {
      for (const can of [
        'df',
        'structured-reply',
        'cache',
        'fast-zero',
        'flush',
        'fua',
        'multi-conn',
        'trim',
        'zero',
      ]) {
        expect((await run('nbdinfo', ['--can', can, daemon.uri('disk')])).code, can).toBe(0);
      }
      const described = JSON.parse(await ok('nbdinfo', ['--json', daemon.uri('disk')])) as {
        structured: boolean;
        exports: { contexts: string[] }[];
      };
      expect(described.structured).toBe(true);
      expect(described.exports[0]?.contexts).toEqual([ALLOCATION_CONTEXT]);
    });
  });

  needs('nbdcopy')('nbdcopy out of a sparse disk makes a sparse file', async () => {
    await withDaemon('256M', async (daemon) => {
      const directory = temporaryDirectory();
      const source = path.join(directory, 'in.img');
      const copy = path.join(directory, 'out.img');
      fs.writeFileSync(source, Buffer.alloc(3 * MIB, 0x31));
      fs.truncateSync(source, 256 * MIB);
      await ok('nbdcopy', ['--flush', source, daemon.uri('disk')]);
      await ok('nbdcopy', [daemon.uri('disk'), copy]);
      await ok('cmp', [source, copy]);
      expect(await usedBytes(copy)).toBeLessThan(3.1 * MIB);
    });
  });

  needs('nbdkit', 'nbdinfo')("nbdkit's nbd plugin passes our extents on", async () => {
    await withDaemon('64M', async (daemon) => {
      const ranges = await scatter(daemon);
      const inner = 'nbdinfo --map --json "$uri"';
      const out = await ok('nbdkit', ['-U', '-', 'nbd', `socket=${daemon.socket}`, 'export=disk', '--run', inner]);
      const map = JSON.parse(out) as { offset: number; length: number; type: number }[];
      const data = map.filter(({ type }) => type === 0).map(({ offset, length }) => ({ start: offset, length }));
      expect(data).toEqual(ranges);
    });
  });
});

describe('qemu', () => {
  needs('qemu-img')('qemu-img map is exact at 4 KiB', async () => {
    await withDaemon('64M', async (daemon) => {
      const ranges = await scatter(daemon);
      const map = JSON.parse(await ok('qemu-img', ['map', '--output=json', '-f', 'raw', daemon.uri('disk')])) as {
        start: number;
        length: number;
        data: boolean;
        zero: boolean;
      }[];
      expect(map.filter(({ data }) => data).map(({ start, length }) => ({ start, length }))).toEqual(ranges);
      expect(map.every(({ data, zero }) => data !== zero)).toBe(true);
      expect(map.reduce((sum, { length }) => sum + length, 0)).toBe(64 * MIB);
    });
  });

  needs('qemu-img')('qemu-img convert keeps holes, in and out', async () => {
    await withDaemon('512M', async (daemon) => {
      const directory = temporaryDirectory();
      const source = path.join(directory, 'in.img');
      const copy = path.join(directory, 'out.img');
      const file = fs.openSync(source, 'w');
      fs.ftruncateSync(file, 512 * MIB);
      for (let at = 0; at < 512; at += 16) fs.writeSync(file, Buffer.alloc(512 * KIB, 0x77), 0, 512 * KIB, at * MIB);
      fs.closeSync(file);
      const empty = await usedBytes(path.join(daemon.store));
      await ok('qemu-img', ['convert', '-n', '-f', 'raw', '-O', 'raw', source, daemon.uri('disk')]);
      const used = await usedBytes(source);
      const stored = (await usedBytes(daemon.store)) - empty;
      await ok('qemu-img', ['convert', '-f', 'raw', '-O', 'raw', daemon.uri('disk'), copy]);
      await ok('cmp', [source, copy]);
      console.log(
        `qemu-img convert: ${used} bytes used by the source, ${stored} by the VDI, ${await usedBytes(copy)} by the copy`,
      );
      expect(Math.abs((await usedBytes(copy)) - used)).toBeLessThanOrEqual(used / 100);
      expect(stored).toBeLessThanOrEqual(used * 1.01);
    });
  });
});

describe.runIf(hasOwnClients)('our client, with extended headers', () => {
  async function connected(daemon: Daemon): Promise<NbdClient> {
    const client = await NbdClient.connect({ path: daemon.socket, replies: 'extended' });
    onTestFinished(() => client.destroy());
    await client.go('disk');
    return client;
  }

  test('4 TiB are trimmed, zeroed and mapped by one request each', async () => {
    await withDaemon('4T', async (daemon) => {
      const client = await connected(daemon);
      await client.write(3 * TIB, Buffer.alloc(4096, 1));
      expect(await client.blockStatus(ALLOCATION_CONTEXT, 0, 4 * TIB)).toEqual([
        { offset: 0, length: 3 * TIB, flags: 3 },
        { offset: 3 * TIB, length: 4096, flags: 0 },
        { offset: 3 * TIB + 4096, length: TIB - 4096, flags: 3 },
      ]);
      await client.trim(0, 4 * TIB);
      expect(await client.blockStatus(ALLOCATION_CONTEXT, 0, 4 * TIB)).toEqual([
        { offset: 0, length: 4 * TIB, flags: 3 },
      ]);
      await client.write(TIB, Buffer.alloc(4096, 1));
      await client.zero(4096, 4 * TIB - 4096);
      expect(await client.read(TIB, 4096)).toEqual(Buffer.alloc(4096));
      await client.disconnect();
    });
  });

  test('the map is the same as that of libnbd', async () => {
    await withDaemon('64M', async (daemon) => {
      const ranges = await scatter(daemon);
      const client = await connected(daemon);
      const extents = await client.blockStatus(ALLOCATION_CONTEXT, 0, 64 * MIB);
      const data = extents.filter(({ flags }) => flags === 0).map(({ offset, length }) => ({ start: offset, length }));
      expect(data).toEqual(ranges);
      await client.disconnect();
    });
  });
});
