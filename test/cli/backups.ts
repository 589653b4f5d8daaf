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

export const hashOf = (data: Buffer): string => createHash('sha256').update(data).digest('hex');

/** A VDI "vm" and its expected content. */
export class BackedUpDisk {
  content: Buffer;
  readonly target: TestStore;
  readonly #image = path.join(temporaryDirectory(), 'content.img');
  /** SHA-256 of the disk at each backup. */
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
      for (const point of kept.points) {
        const wanted = this.at.get(point.id);
        expect(wanted, `backup ${point.id} is known`).toBeDefined();
        const content = Buffer.alloc(point.size);
        const chain = await kept.openChain(point);
        await chain.read(0, content);
        await chain.close();
        expect(hashOf(content), `backup ${point.id}`).toBe(wanted);
        const file = kept.image ?? kept.fileOf(point);
        if (withQemu) expect(hashOf(await readWithQemu(file)), `qemu reads ${point.id}`).toBe(wanted);
      }
      return kept.points.map(({ id }) => id);
    } finally {
      await kept.close();
    }
  }

  /** The newest backup, restored, is the disk. */
  async checkRestored(to: string): Promise<void> {
    await this.target.ok('restore', to, 'restored');
    expect(hashOf((await this.target.run(['export', 'restored', '-'])).stdoutBytes)).toBe(hashOf(this.content));
    await this.target.ok('vdi', 'delete', 'restored');
  }

  /** Through the daemon if there is one, else in this process, because starting another one is slow. */
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

/** The bytes of an image with its backing files; fails if its tables are wrong. */
export async function readWithQemu(file: string): Promise<Buffer> {
  const isRaw = !file.endsWith('.qcow2');
  if (!isRaw) {
    const checked = await run('qemu-img', ['check', '-f', 'qcow2', file]);
    expect(checked.code, checked.stdout + checked.stderr).toBe(0);
  }
  const out = path.join(temporaryDirectory(), 'out.raw');
  const converted = await run('qemu-img', ['convert', '-f', isRaw ? 'raw' : 'qcow2', '-O', 'raw', file, out]);
  expect(converted.code, converted.stderr).toBe(0);
  const data = fs.readFileSync(out);
  fs.rmSync(out);
  return data;
}

/** The snapshots of the VDI that belong to targets. */
export async function bases(target: TestStore): Promise<string[]> {
  return (await target.names()).filter((name) => name.includes('@backup-'));
}
