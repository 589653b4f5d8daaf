/**
 * A block device that is to be overwritten: opened exclusively, examined before anything is written, and kept thin. Owns the
 * list of signatures by which a device that holds something is recognised; runs no other program.
 */
import fs from 'node:fs';
import { OperationError } from '../operations/operations.js';
import { endOf, punchHole } from '../system/libc.js';
import { hostDisk } from '../system/real-disk.js';
import { readPadded, writeFully } from '../system/whole-io.js';
import { isZeros } from '../system/zeros.js';
import { shellWord } from '../text/shell-word.js';
import { blockDeviceAttribute } from '../system/sysfs.js';

/** Read at both ends of a device: all signatures are in there. */
const END_BYTES = 2 ** 20;
/** Between the ends: the bytes of a sample, and the number of samples, evenly spread. */
const SAMPLE_BYTES = 64 * 1024;
const SAMPLES = 256;
/** Holes are punched in whole pages; no device has smaller blocks that matter. */
const ALIGNMENT = 4096;
const SCAN_BYTES = 2 ** 20;
const ZEROS = Buffer.alloc(SCAN_BYTES);

interface Signature {
  readonly name: string;
  /** From the beginning; or, if negative, from the end. */
  readonly at: readonly number[];
  readonly bytes: Buffer;
}

const text = (name: string, at: number | readonly number[], mark: string): Signature => ({
  name,
  at: typeof at === 'number' ? [at] : at,
  bytes: Buffer.from(mark, 'latin1'),
});
const hex = (name: string, at: number | readonly number[], mark: string): Signature => ({
  name,
  at: typeof at === 'number' ? [at] : at,
  bytes: Buffer.from(mark, 'hex'),
});

/** As blkid and wipefs have them (util-linux, libblkid/src/superblocks and partitions). The most specific come first. */
const SIGNATURES: readonly Signature[] = [
  text('a GPT partition table', [512, 4096, -512, -4096], 'EFI PART'),
  text('a LUKS volume', [0, 0x4000, 0x8000], 'LUKS\xba\xbe'),
  text('a LUKS volume', [0x4000, 0x8000, 0x10000, 0x20000, 0x40000, 0x80000], 'SKUL\xba\xbe'),
  text('an LVM physical volume', [0, 512, 1024, 1536], 'LABELONE'),
  hex('a member of a RAID (md)', [0, 4096], 'fc4e2ba9'),
  hex('an ext2, ext3 or ext4 filesystem', 1080, '53ef'),
  text('an XFS filesystem', 0, 'XFSB'),
  text('a btrfs filesystem', 65600, '_BHRfS_M'),
  text('swap space', [4086, 8182, 16374, 32758, 65526], 'SWAPSPACE2'),
  text('swap space', [4086, 8182, 16374, 32758, 65526], 'SWAP-SPACE'),
  text('a bcache or bcachefs device', 4120, '\xc6\x85\x73\xf6\x4e\x1a\x45\xca'),
  text('a bcachefs filesystem', 4120, '\xc6\x85\x73\xf6\x66\xce\x90\xa9'),
  hex('an F2FS filesystem', 1024, '1020f5f2'),
  text('an NTFS filesystem', 3, 'NTFS    '),
  text('an exFAT filesystem', 3, 'EXFAT   '),
  text('a BitLocker volume', 3, '-FVE-FS-'),
  text('a FAT filesystem', [54, 82], 'FAT'),
  text('an ISO 9660 filesystem', 32769, 'CD001'),
  text('a UDF filesystem', [32769, 34817, 36865], 'NSR0'),
  text('an HFS+ filesystem', 1024, 'H+'),
  text('an HFS+ filesystem', 1024, 'HX'),
  text('an APFS container', 32, 'NXSB'),
  text('a squashfs filesystem', 0, 'hsqs'),
  hex('an EROFS filesystem', 1024, 'e2e1f5e0'),
  hex('a GFS2 filesystem', 65536, '01161970'),
  text('an OCFS2 filesystem', [1024, 2048, 4096], 'OCFSV2'),
  text('a ReiserFS filesystem', [8244, 65588], 'ReIsEr'),
  text('a JFS filesystem', 32768, 'JFS1'),
  hex('a NILFS2 filesystem', 1030, '3434'),
  hex('a UFS filesystem', [9564, 66908], '54190100'),
  text('a Ceph OSD', 0, 'bluestore block device'),
  text('a VDO volume', 0, 'dmvdo001'),
  text('an Oracle ASM disk', 32, 'ORCLDISK'),
  text('a qcow2 image', 0, 'QFI\xfb'),
  text('an Apple partition map', 512, 'PM\0\0'),
  hex('a BSD disklabel', [512, 64], '57455682'),
  // Last: many of those above also have a boot sector.
  hex('a partition table or boot sector', 510, '55aa'),
];

/** md's superblocks 0.90 and 1.0 are near the end, where depends on the size. md_p.h; md.c, super_90_load. */
const MD_MAGIC = Buffer.from('fc4e2ba9', 'hex');
const MD_END_BYTES = 64 * 1024;

/** ZFS has two labels of 256 KiB at either end, with uberblocks in the second half of each. */
const ZFS_LABEL_BYTES = 256 * 1024;
const ZFS_MAGIC = [Buffer.from('0cb1ba0000000000', 'hex'), Buffer.from('0000000000bab10c', 'hex')];
const ZFS_UBERBLOCK_BYTES = 1024;

export class BlockDevice {
  readonly #handle: fs.promises.FileHandle;
  readonly file: string;
  readonly size: number;
  /** Holes can be punched, and read as zeros. Found out by trying. */
  #isThin = true;

  private constructor(handle: fs.promises.FileHandle, file: string, size: number) {
    this.#handle = handle;
    this.file = file;
    this.size = size;
  }

  /**
   * Open it to be overwritten. Until it is closed nothing else can claim it (by mounting it, or adding it to LVM or RAID).
   * Errors: BUSY (it is claimed), READ_ONLY, BAD_FILE (it is no block device), EXISTS (it holds something, and `mayReplace` is
   * false).
   */
  static async open(file: string, mayReplace: boolean): Promise<BlockDevice> {
    refuseReadOnly(file, fs.statSync(file).rdev);
    let handle: fs.promises.FileHandle;
    try {
      handle = await fs.promises.open(file, fs.constants.O_RDWR | fs.constants.O_EXCL);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'EBUSY') throw error;
      throw new OperationError(
        'BUSY',
        `${file} is in use: it, or a part of it, is mounted, is swap space, or belongs to LVM, RAID or similar; ` +
          `'lsblk ${file}' shows how it is used; nothing was written`,
        { cause: error },
      );
    }
    try {
      if (!(await handle.stat()).isBlockDevice()) {
        throw new OperationError('BAD_FILE', `${file} is no longer a block device; nothing was written`);
      }
      const device = new BlockDevice(handle, file, await endOf(handle.fd));
      const found = mayReplace ? undefined : await device.#content();
      if (found !== undefined) {
        throw new OperationError('EXISTS', `${file} holds ${found}; --force overwrites it; nothing was written`);
      }
      return device;
    } catch (error) {
      await handle.close();
      throw error;
    }
  }

  get fd(): number {
    return this.#handle.fd;
  }

  /**
   * Make the range read as zeros: by punching a hole where the device can, else by writing zeros where it does not read as
   * zeros already. The signal stops the writing.
   */
  async zero(offset: number, length: number, signal: AbortSignal): Promise<void> {
    const from = Math.ceil(offset / ALIGNMENT) * ALIGNMENT;
    const to = Math.floor((offset + length) / ALIGNMENT) * ALIGNMENT;
    if (to <= from || !(await this.#punch(from, to - from))) return this.#writeZeros(offset, length, signal);
    await this.#writeZeros(offset, from - offset, signal);
    await this.#writeZeros(to, offset + length - to, signal);
  }

  /** Everything written before is durable when this resolves. */
  sync(): Promise<void> {
    return this.#handle.sync();
  }

  close(): Promise<void> {
    return this.#handle.close();
  }

  /**
   * False if the device cannot do it. A discard (BLKDISCARD) is not enough: the range may read as anything afterwards. A
   * punched range reads as zeros, or the call fails (linux block/fops.c, blkdev_fallocate: BLKDEV_ZERO_NOFALLBACK).
   */
  async #punch(offset: number, length: number): Promise<boolean> {
    if (!this.#isThin) return false;
    try {
      this.#isThin = await punchHole(this.fd, offset, length);
    } catch (error) {
      // Old kernels, and devices whose blocks are larger than ALIGNMENT.
      const { code } = error as NodeJS.ErrnoException;
      if (code !== 'EINVAL' && code !== 'ENODEV' && code !== 'ENOSYS') throw error;
      this.#isThin = false;
    }
    return this.#isThin;
  }

  async #writeZeros(offset: number, length: number, signal: AbortSignal): Promise<void> {
    const found = Buffer.allocUnsafe(Math.min(length, SCAN_BYTES));
    for (let done = 0; done < length; done += SCAN_BYTES) {
      signal.throwIfAborted();
      const part = found.subarray(0, Math.min(SCAN_BYTES, length - done));
      await readPadded(hostDisk, this.fd, part, offset + done);
      // Zeros are not written over zeros: a thin device stays thin.
      if (!isZeros(part)) await writeFully(hostDisk, this.fd, ZEROS.subarray(0, part.length), offset + done);
    }
  }

  /** What is on the device, for a message; undefined if nothing was found. */
  async #content(): Promise<string | undefined> {
    const head = Buffer.alloc(Math.min(END_BYTES, this.size));
    const tail = Buffer.alloc(head.length);
    await readPadded(hostDisk, this.fd, head, 0);
    await readPadded(hostDisk, this.fd, tail, this.size - tail.length);
    const found = SIGNATURES.find(({ at, bytes }) => at.some((place) => isAt(place < 0 ? tail : head, place, bytes)));
    if (found) return found.name;
    if (tail.includes(MD_MAGIC, Math.max(0, tail.length - 2 * MD_END_BYTES))) return 'a member of a RAID (md)';
    if (hasZfs(head, tail)) return 'a member of a ZFS pool';
    if (!isZeros(head) || !isZeros(tail) || (await this.#hasDataBetween())) return 'data of an unknown kind';
    return undefined;
  }

  /** By samples: reading a whole device would take hours. */
  async #hasDataBetween(): Promise<boolean> {
    const sample = Buffer.alloc(SAMPLE_BYTES);
    for (let n = 0; n < SAMPLES; n++) {
      const at = Math.floor((this.size / SAMPLES) * n);
      const part = sample.subarray(0, Math.min(SAMPLE_BYTES, this.size - at));
      await readPadded(hostDisk, this.fd, part, at - (at % ALIGNMENT));
      if (!isZeros(part)) return true;
    }
    return false;
  }
}

/** Checked here because opening a read-only device for writing succeeds, and only the first write fails. */
function refuseReadOnly(file: string, rdev: number): void {
  if (blockDeviceAttribute(rdev, 'ro') !== '1') return;
  const how = `'blockdev --setrw ${shellWord(file)}' changes that, unless the device below it is read-only too`;
  throw new OperationError('READ_ONLY', `${file} is a read-only device; nothing was written; ${how}`);
}

function isAt(end: Buffer, place: number, bytes: Buffer): boolean {
  const at = place < 0 ? end.length + place : place;
  return at >= 0 && at + bytes.length <= end.length && end.compare(bytes, 0, bytes.length, at, at + bytes.length) === 0;
}

function hasZfs(head: Buffer, tail: Buffer): boolean {
  return [head, tail].some((end) => {
    const first = end === head ? 0 : Math.max(0, end.length - 2 * ZFS_LABEL_BYTES);
    for (let at = first; at < first + 2 * ZFS_LABEL_BYTES; at += ZFS_UBERBLOCK_BYTES) {
      if (ZFS_MAGIC.some((magic) => isAt(end, at, magic))) return true;
    }
    return false;
  });
}
