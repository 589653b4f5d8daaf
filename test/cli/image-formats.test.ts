/** Images that are not raw: every format that qemu writes is recognised and refused with a remedy, and --raw imports it. */
import fs from 'node:fs';
import path from 'node:path';
import { describe, expect, test } from 'vitest';
import { foreignHead, foreignTail } from '../../src/jobs/image-formats.js';
import { cli, needs, ok, startDaemon, temporaryDirectory } from '../harness/daemon.js';
import { expectBytes, GIB, MIB, oneLineOf, patterned } from './both-ways.js';

/** Format for -f, its options, and what it is called. */
const MADE: readonly (readonly [string, string | undefined, RegExp])[] = [
  ['qcow', undefined, /qcow,/],
  ['qcow2', undefined, /qcow2,/],
  ['qed', undefined, /qed,/],
  ['vdi', undefined, /vdi \(VirtualBox\),/],
  ['vdi', 'static=on', /vdi \(VirtualBox\),/],
  ['vpc', undefined, /vpc \(dynamic VHD\),/],
  ['vpc', 'subformat=fixed,force_size=on', /vpc \(fixed VHD\),/],
  ['vhdx', undefined, /vhdx,/],
  ['vmdk', undefined, /vmdk,/],
  ['vmdk', 'subformat=streamOptimized', /vmdk,/],
  ['vmdk', 'subformat=monolithicFlat', /vmdk descriptor,/],
  ['vmdk', 'subformat=twoGbMaxExtentSparse', /vmdk descriptor,/],
  ['parallels', undefined, /parallels,/],
];

function image(directory: string, n: number): string {
  return path.join(directory, `it's image ${n}`);
}

describe('images made by qemu-img', () => {
  needs('qemu-img')('are refused, from files and pipes, with a command that works', async () => {
    const directory = temporaryDirectory();
    const raw = path.join(directory, 'raw');
    const content = patterned(MIB, 3);
    fs.writeFileSync(raw, content);
    const store = path.join(temporaryDirectory(), 'store');
    for (const [n, [format, options, name]] of MADE.entries()) {
      const file = image(directory, n);
      const how = options === undefined ? [] : ['-o', options];
      await ok('qemu-img', ['convert', '-f', 'raw', '-O', format, ...how, raw, file]);
      const refusal = oneLineOf(await cli(['import', file, 'vm'], { store }), 1, `${format} ${options}`);
      expect(refusal).toMatch(
        new RegExp(`image ${n} is ${name.source} not a raw image: convert it: .*; --raw imports`),
      );
      const piped = await cli(['import', '-', 'vm'], { store, input: fs.readFileSync(file) });
      expect(oneLineOf(piped, 1, format)).toMatch(new RegExp(`stdin is ${name.source} not a raw .* raw FILE disk.raw`));
      // The command, up to the import.
      const [, line] = /convert it: (.*) && sheepgate import disk\.raw vm;/.exec(refusal) ?? [];
      await ok('sh', ['-c', `cd '${directory}' && rm -f disk.raw && ${line}`]);
      expectBytes(fs.readFileSync(path.join(directory, 'disk.raw')).subarray(0, content.length), content);
    }
    // None of them has left anything, or created a store.
    expect(fs.existsSync(store)).toBe(false);
    const forced = await cli(['import', image(directory, 4), 'forced', '--raw'], { store });
    expect(forced.code, forced.stderr).toBe(0);
    const back = await cli(['export', 'forced', '-'], { store });
    const stored = fs.readFileSync(image(directory, 4));
    expectBytes(back.stdoutBytes.subarray(0, stored.length), stored);
  });

  needs('qemu-img')('go into a new VDI without zeroing it first, as docs/import.md says', async () => {
    const directory = temporaryDirectory();
    const [raw, vmdk] = [path.join(directory, 'raw'), path.join(directory, 'disk.vmdk')];
    const size = 4 * GIB;
    fs.writeFileSync(raw, patterned(MIB, 3));
    fs.truncateSync(raw, size);
    await ok('qemu-img', ['convert', '-f', 'raw', '-O', 'vmdk', raw, vmdk]);
    const daemon = await startDaemon({ args: ['--create', `vm1:${size}`] });
    const text = fs.readFileSync(path.resolve(import.meta.dirname, '../../docs/import.md'), 'utf8');
    const [, line = ''] = /^ {4}(qemu-img convert -n .*)$/m.exec(text) ?? [];
    expect(line).toContain('--target-is-zero');
    await ok('sh', ['-c', `cd ${directory} && ${line.replace('/run/sheepgate/nbd.sock', daemon.socket)}`]);
    await ok('qemu-img', ['compare', '-f', 'raw', '-F', 'raw', raw, daemon.uri('vm1')]);
    await daemon.stop();
    // It would take 2048 requests to zero it.
    const [first = ''] = daemon
      .log()
      .split('\n')
      .filter((entry) => entry.includes('"requests":'));
    expect((JSON.parse(first) as { requests: number }).requests).toBeLessThan(100);
  });

  needs('qemu-img', 'tar')('in archives are refused too: an OVA is a tar', async () => {
    const directory = temporaryDirectory();
    await ok('qemu-img', ['create', '-q', '-f', 'vmdk', path.join(directory, 'disk.vmdk'), '8M']);
    const ova = path.join(directory, 'vm.ova');
    await ok('tar', ['-C', directory, '-cf', ova, 'disk.vmdk']);
    const store = path.join(directory, 'store');
    expect(oneLineOf(await cli(['import', ova, 'vm'], { store }), 1, 'ova')).toMatch(
      /vm\.ova is tar, not a raw image: unpack it with tar -xf \S*vm\.ova/,
    );
  });
});

test('data that a guest may have on its disk is not taken for another format', async () => {
  const sector = (text: string, offset = 0): Buffer => {
    const bytes = Buffer.alloc(1024);
    bytes.write(text, offset, 'latin1');
    return bytes;
  };
  for (const head of [
    Buffer.alloc(1024),
    sector('LUKS\xba\xbe\0\x02'),
    sector('\xeb\x3c\x90MSDOS5.0'),
    sector('EFI PART', 512),
    sector('BZh9'),
    sector('# Disk of mine'),
    sector('conectix', 1),
    Buffer.from('Q'),
  ]) {
    expect(foreignHead(head)).toBe(undefined);
  }
  // The eight bytes alone are not a footer; a file shorter than a footer has none.
  expect(foreignTail(sector('conectix').subarray(0, 512))).toBe(undefined);
  expect(foreignTail(Buffer.from('conectix'))).toBe(undefined);
  expect(foreignTail(sector('koly').subarray(0, 512))).toBe(undefined);
  const luks = path.join(temporaryDirectory(), 'luks');
  fs.writeFileSync(luks, Buffer.concat([sector('LUKS\xba\xbe\0\x02'), patterned(4096, 1)]));
  const store = path.join(temporaryDirectory(), 'store');
  expect((await cli(['import', luks, 'vm'], { store })).code).toBe(0);
});

test('packed and rare formats are recognised by their magic numbers', () => {
  const bytes = (...parts: (string | readonly number[])[]): Buffer =>
    Buffer.concat([
      ...parts.map((part) => (typeof part === 'string' ? Buffer.from(part, 'latin1') : Buffer.from(part))),
      Buffer.alloc(64),
    ]);
  const heads: readonly (readonly [string, Buffer, RegExp])[] = [
    ['gzip', bytes([0x1f, 0x8b, 8]), /gzip -dc disk \| sheepgate import - vm --size SIZE/],
    ['xz', bytes([0xfd], '7zXZ', [0]), /xz -dc/],
    ['zstd', bytes([0x28, 0xb5, 0x2f, 0xfd]), /zstd -dc/],
    ['lz4', bytes([0x04, 0x22, 0x4d, 0x18]), /lz4 -dc/],
    ['lzop', bytes([0x89], 'LZO', [0, 0x0d, 0x0a, 0x1a]), /lzop -dc/],
    ['bzip2', bytes('BZh91AY&SY'), /bzip2 -dc/],
    ['zip', bytes('PK\x03\x04'), /unzip disk/],
    ['7z', bytes([0x37, 0x7a, 0xbc, 0xaf, 0x27, 0x1c]), /7z x disk/],
    ['vmdk', bytes('COWD'), /convert -f vmdk/],
    ['bochs', bytes('Bochs Virtual HD Image'), /convert -f bochs/],
    ['cloop', bytes('#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0'), /convert -f cloop/],
    ['android sparse', bytes([0x3a, 0xff, 0x26, 0xed]), /simg2img disk disk\.raw/],
    ['vmdk descriptor', bytes('\n# Disk DescriptorFile\nversion=1\n'), /convert -f vmdk/],
  ];
  for (const [name, head, remedy] of heads) {
    const format = foreignHead(head);
    expect(format?.name).toBe(name);
    expect(format?.remedy('disk', 'vm')).toMatch(remedy);
  }
  const koly = Buffer.alloc(512);
  koly.write('koly\0\0\0\x04\0\0\x02\0', 'latin1');
  expect(foreignTail(koly)?.name).toBe('dmg');
});
