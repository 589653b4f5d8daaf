/**
 * Shared by the tests of backups: a disk with known content at every backup, and three ways to read a backup back: with our own
 * reader, with qemu, and restored.
 */
import { createHash } from 'node:crypto';
import fs from 'node:fs';
import path from 'node:path';
import { expect } from 'vitest';
import { BackupTarget } from '../../src/jobs/backup/target.js';
import { openOperations } from '../../src/operations/open-operations.js';
import type { Disk } from '../../src/operations/operations.js';
import { haveCommand, run, temporaryDirectory } from '../harness/daemon.js';
import { expectBytes, type TestStore } from './both-ways.js';

export const qemuMissing = ['qemu-img', 'qemu-io'].filter((command) => !haveCommand(command));
if (qemuMissing.length > 0) {
  console.log(
    `backups are not read with qemu: ${qemuMissing.join(', ')} not installed (sh test/install.sh installs it)`,
  );
}

export interface BackupResult {
  readonly id: number;
  readonly kind: 'full' | 'incremental';
  readonly size: number;
  readonly changedBytes: number;
  readonly storedBytes: number;
  readonly file: string;
  readonly base: string | null;
  readonly kept: readonly number[];
  readonly dropped: readonly number[];
  readonly notes: readonly string[];
}

const PIECE_BYTES = 64 * 1024;
const ZEROS = Buffer.alloc(PIECE_BYTES);

/** Equal for equal disks only. Zeros, most of these disks, are not hashed: only their places are in the hash. */
export function hashOf(data: Buffer): string {
  const hash = createHash('sha256').update(String(data.length));
  for (let at = 0; at < data.length; at += PIECE_BYTES) {
    const piece = data.subarray(at, at + PIECE_BYTES);
    if (!piece.equals(ZEROS.subarray(0, piece.length))) hash.update(` ${at} `).update(piece);
  }
  return hash.digest('hex');
}

/** Grows to the largest disk that is read, and is used again: large buffers are what makes the garbage collector work. */
let read = Buffer.alloc(0);
/** ... for what qemu reads. */
let readByQemu = Buffer.alloc(0);

/** A VDI "vm" and its expected content. */
export class BackedUpDisk {
  content: Buffer;
  readonly target: TestStore;
  readonly #image = path.join(temporaryDirectory(), 'content.img');
  /** hashOf the disk at each backup. */
  readonly at = new Map<number, string>();

  constructor(target: TestStore, size: number) {
    this.target = target;
    this.content = Buffer.alloc(size);
  }

  async create(): Promise<void> {
    await this.target.ok('vdi', 'create', 'vm', String(this.content.length), '--block-size-shift', '20');
  }

  /** Overwrite a part only, as a client does: other objects stay unchanged. */
  async write(offset: number, data: Buffer): Promise<void> {
    data.copy(this.content, offset);
    await this.#change((disk) => disk.write(offset, data));
  }

  async trim(offset: number, length: number): Promise<void> {
    this.content.fill(0, offset, offset + length);
    await this.#change((disk) => disk.zero(offset, length));
  }

  async resize(size: number): Promise<void> {
    const resized = Buffer.alloc(size);
    this.content.copy(resized);
    this.content = resized;
    await this.target.ok('vdi', 'resize', 'vm', String(size), '--force');
  }

  async backup(to: string, ...args: string[]): Promise<BackupResult> {
    const result = await this.target.json<BackupResult>('backup', 'vm', '--to', to, ...args);
    this.at.set(result.id, hashOf(this.content));
    return result;
  }

  /** Every kept backup reads as the disk was then, by its hashes and with qemu. */
  checkAll(to: string): Promise<number[]> {
    return this.#check(to, qemuMissing.length === 0);
  }

  /** ... without qemu, which cannot find an image that is not yet at its place. */
  checkAllByReading(to: string): Promise<number[]> {
    return this.#check(to, false);
  }

  async #check(to: string, withQemu: boolean): Promise<number[]> {
    const kept = await BackupTarget.openToRead(to);
    try {
      for await (const { message } of kept.verify(kept.points)) expect.fail(message);
      const images = withQemu
        ? await convertedByQemu(kept.points.map((point) => kept.image ?? kept.fileOf(point)))
        : undefined;
      for (const [n, point] of kept.points.entries()) {
        const wanted = this.at.get(point.id);
        expect(wanted, `backup ${point.id} is known`).toBeDefined();
        if (read.length < point.size) read = Buffer.alloc(point.size);
        const content = read.subarray(0, point.size);
        const chain = await kept.openChain(point);
        await chain.read(0, content);
        await chain.close();
        expect(hashOf(content), `backup ${point.id}`).toBe(wanted);
        if (images) expect(takeImage(images[n] as string).equals(content), `qemu reads ${point.id}`).toBe(true);
      }
      return kept.points.map(({ id }) => id);
    } finally {
      await kept.close();
    }
  }

  /** The newest backup, restored, is the disk. */
  async checkRestored(to: string): Promise<void> {
    await this.target.ok('restore', to, 'restored');
    expectBytes(await this.target.contentOf('restored'), this.content);
    await this.target.ok('vdi', 'delete', 'restored');
  }

  /** Through the daemon if there is one, else in this process: starting a process for each write is slow. */
  async #change(change: (disk: Disk) => Promise<void>): Promise<void> {
    const { store } = this.target;
    const operations = await openOperations({ store, isStoreGiven: true, mayCreate: false, control: undefined });
    const disk = await operations.openDisk('vm');
    await change(disk);
    await disk.flush();
    await disk.close();
    await operations.close();
  }

  /** The disk itself still has the expected content. */
  async checkSource(): Promise<void> {
    await this.target.ok('export', 'vm', this.#image, '--force', '--json');
    expectBytes(fs.readFileSync(this.#image), this.content);
  }
}

/** The bytes of an image with its backing files, until the next call; fails if its tables are wrong. */
export async function readWithQemu(file: string): Promise<Buffer> {
  const [image] = await convertedByQemu([file]);
  return takeImage(image as string);
}

const CONVERT = `
out=$1
shift
for file; do
  case $file in
  *.qcow2) format=qcow2; qemu-img check -f qcow2 "$file" || exit ;;
  *) format=raw ;;
  esac
  n=$((n + 1))
  qemu-img convert -f $format -O raw "$file" "$out/$n" || exit
done`;

/** Raw images of these files. One process runs all of qemu-img: a large process such as this one is slow to start others. */
async function convertedByQemu(files: readonly string[]): Promise<string[]> {
  const directory = temporaryDirectory();
  const result = await run('sh', ['-c', CONVERT, 'sh', directory, ...files]);
  expect(result.code, result.stdout + result.stderr).toBe(0);
  return files.map((_, n) => path.join(directory, String(n + 1)));
}

/** Read the image and remove it. */
function takeImage(image: string): Buffer {
  const fd = fs.openSync(image, 'r');
  const { size } = fs.fstatSync(fd);
  if (readByQemu.length < size) readByQemu = Buffer.alloc(size);
  const content = readByQemu.subarray(0, size);
  for (let done = 0; done < size;) {
    const count = fs.readSync(fd, content, done, size - done, done);
    if (count === 0) throw new Error(`${image} became shorter`);
    done += count;
  }
  fs.closeSync(fd);
  fs.rmSync(image);
  return content;
}

/** The snapshots of the VDI that belong to targets. */
export async function bases(target: TestStore): Promise<string[]> {
  return (await target.names()).filter((name) => name.includes('@backup-'));
}
