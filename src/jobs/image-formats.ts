/**
 * Image formats other than raw, and archives: imported byte by byte they would be useless as a disk. Owns the magic numbers by
 * which they are recognised, which a raw image does not have by accident, and the advice for each. LUKS is not among them: a
 * guest writes that to its disk. Sources: the probe functions of qemu's block drivers (block/*.c), the VHD Image Format
 * Specification 1.0 ("Hard Disk Footer"), and the formats' own descriptions.
 */
import { shellWord } from '../text/shell-word.js';

/** Bytes that are examined at the beginning and at the end. */
export const HEAD_BYTES = 1024;
export const TAIL_BYTES = 512;

interface Format {
  /** For messages. */
  readonly name: string;
  /** A shell command that imports it as the VDI `name`. `file` and `name` are quoted. */
  readonly remedy: (file: string, name: string) => string;
  readonly isHead?: (head: Buffer) => boolean;
  readonly isTail?: (tail: Buffer) => boolean;
}

/** In a remedy, in place of stdin: the operator fills the name in. */
const SOME_FILE = 'FILE';

const converted = (format: string) => (file: string, name: string) =>
  `convert it: qemu-img convert -f ${format} -O raw ${file} disk.raw && sheepgate import disk.raw ${name}`;
const unpacked = (program: string) => (file: string, name: string) =>
  `unpack it into a pipe: ${program} ${file} | sheepgate import - ${name} --size SIZE`;
const archived = (program: string) => (file: string) =>
  `unpack it with ${program} ${file}, and import the disk that is in it`;

const startsWith = (mark: string | readonly number[], offset = 0): ((head: Buffer) => boolean) => {
  const bytes = typeof mark === 'string' ? Buffer.from(mark, 'latin1') : Buffer.from(mark);
  return (head) => head.subarray(offset, offset + bytes.length).equals(bytes);
};

const FORMATS: readonly Format[] = [
  { name: 'qcow', remedy: converted('qcow'), isHead: startsWith('QFI\xfb\0\0\0\x01') },
  { name: 'qcow2', remedy: converted('qcow2'), isHead: startsWith('QFI\xfb') },
  { name: 'qed', remedy: converted('qed'), isHead: startsWith('QED\0') },
  { name: 'vdi (VirtualBox)', remedy: converted('vdi'), isHead: startsWith([0x7f, 0x10, 0xda, 0xbe], 64) },
  { name: 'vhdx', remedy: converted('vhdx'), isHead: startsWith('vhdxfile') },
  { name: 'vpc (dynamic VHD)', remedy: converted('vpc'), isHead: startsWith('conectix') },
  { name: 'vpc (fixed VHD)', remedy: converted('vpc'), isTail: isFixedVhdFooter },
  { name: 'vmdk', remedy: converted('vmdk'), isHead: startsWith('KDMV') },
  { name: 'vmdk', remedy: converted('vmdk'), isHead: startsWith('COWD') },
  { name: 'vmdk', remedy: converted('vmdk'), isHead: startsWith([0xbe, 0xba, 0xfe, 0xca, 0, 0, 0, 0]) },
  { name: 'vmdk descriptor', remedy: converted('vmdk'), isHead: isVmdkDescriptor },
  { name: 'parallels', remedy: converted('parallels'), isHead: startsWith('WithoutFreeSpace') },
  { name: 'parallels', remedy: converted('parallels'), isHead: startsWith('WithouFreSpacExt') },
  { name: 'bochs', remedy: converted('bochs'), isHead: startsWith('Bochs Virtual HD Image') },
  { name: 'cloop', remedy: converted('cloop'), isHead: startsWith('#!/bin/sh\n#V2.0 Format\nmodprobe cloop ') },
  { name: 'dmg', remedy: converted('dmg'), isTail: isDmgTrailer },
  {
    name: 'android sparse',
    remedy: (file, name) => `convert it: simg2img ${file} disk.raw && sheepgate import disk.raw ${name}`,
    isHead: startsWith([0x3a, 0xff, 0x26, 0xed]),
  },
  { name: 'gzip', remedy: unpacked('gzip -dc'), isHead: startsWith([0x1f, 0x8b, 0x08]) },
  { name: 'xz', remedy: unpacked('xz -dc'), isHead: startsWith([0xfd, 0x37, 0x7a, 0x58, 0x5a, 0x00]) },
  { name: 'zstd', remedy: unpacked('zstd -dc'), isHead: startsWith([0x28, 0xb5, 0x2f, 0xfd]) },
  { name: 'lz4', remedy: unpacked('lz4 -dc'), isHead: startsWith([0x04, 0x22, 0x4d, 0x18]) },
  { name: 'lzop', remedy: unpacked('lzop -dc'), isHead: startsWith([0x89, 0x4c, 0x5a, 0x4f, 0x00, 0x0d, 0x0a, 0x1a]) },
  { name: 'bzip2', remedy: unpacked('bzip2 -dc'), isHead: isBzip2 },
  { name: 'zip', remedy: archived('unzip'), isHead: startsWith('PK\x03\x04') },
  { name: '7z', remedy: archived('7z x'), isHead: startsWith([0x37, 0x7a, 0xbc, 0xaf, 0x27, 0x1c]) },
  // An OVA is a tar file.
  { name: 'tar', remedy: archived('tar -xf'), isHead: startsWith('ustar', 257) },
];

export interface ForeignFormat {
  readonly name: string;
  /** A shell command that imports it as the VDI `name`. `file` is undefined if it came through a pipe. */
  remedy(file: string | undefined, name: string): string;
}

/** The format of a file that begins with `head`; undefined for a raw image. */
export function foreignHead(head: Buffer): ForeignFormat | undefined {
  return foreign(FORMATS.find(({ isHead }) => isHead?.(head)));
}

/** The same for the last TAIL_BYTES, or fewer, of a file. */
export function foreignTail(tail: Buffer): ForeignFormat | undefined {
  return foreign(FORMATS.find(({ isTail }) => isTail?.(tail)));
}

function foreign(format: Format | undefined): ForeignFormat | undefined {
  if (!format) return undefined;
  const { name, remedy } = format;
  return { name, remedy: (file, vdi) => remedy(file === undefined ? SOME_FILE : shellWord(file), shellWord(vdi)) };
}

/** A text file that lists the extents; block/vmdk.c finds its version after comments and empty lines. */
function isVmdkDescriptor(head: Buffer): boolean {
  return /^\s*#\s*Disk\s*DescriptorFile/i.test(head.toString('latin1'));
}

/**
 * Raw data followed by a footer of 512 bytes. The checksum is verified too, because a disk may end with any eight bytes.
 * Offsets: disk type at 60 (2: fixed); at 64, big-endian, the one's complement of the sum of all other bytes.
 */
function isFixedVhdFooter(tail: Buffer): boolean {
  if (tail.length < TAIL_BYTES || !startsWith('conectix')(tail) || tail.readUInt32BE(60) !== 2) return false;
  let sum = 0;
  for (const [at, byte] of tail.entries()) if (at < 64 || at >= 68) sum += byte;
  return tail.readUInt32BE(64) === ~sum >>> 0;
}

/** "koly", version 4, a header of 512 bytes. */
function isDmgTrailer(tail: Buffer): boolean {
  return tail.length >= TAIL_BYTES && startsWith('koly\0\0\0\x04\0\0\x02\0')(tail);
}

/** "BZh", the size of its blocks, and the mark of the first of them. */
function isBzip2(head: Buffer): boolean {
  return /^BZh[1-9](?:1AY&SY|\x17rE8P\x90)/.test(head.toString('latin1', 0, 10));
}
