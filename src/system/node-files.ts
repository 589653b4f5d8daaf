/**
 * The part of the disk seam that Node offers: for the real disk, and for code that creates a directory before libc needs to
 * be loaded. Each method is one call of node:fs and decides nothing.
 */
import fs from 'node:fs';
import { promisify } from 'node:util';
import type { FileCalls, FileStatus } from './disk.js';

const openAsync = promisify(fs.open);
const closeAsync = promisify(fs.close);
const truncateAsync = promisify(fs.ftruncate);
const fdatasyncAsync = promisify(fs.fdatasync);
const fsyncAsync = promisify(fs.fsync);
const unlinkAsync = promisify(fs.unlink);
const renameAsync = promisify(fs.rename);
const lstatAsync = promisify(fs.lstat);
const readdirAsync = promisify(fs.readdir);

export class NodeFiles implements FileCalls {
  open(path: string, flags: number, mode?: number): Promise<number> {
    return openAsync(path, flags, mode);
  }

  openSync(path: string, flags: number, mode?: number): number {
    return fs.openSync(path, flags, mode);
  }

  close(fd: number): Promise<void> {
    return closeAsync(fd);
  }

  closeSync(fd: number): void {
    fs.closeSync(fd);
  }

  /** Not promisified: util.promisify makes an object for the result of fs.read. */
  read(fd: number, into: Buffer, at: number, offset: number): Promise<number> {
    return new Promise((resolve, reject) => {
      fs.read(fd, into, at, into.length - at, offset, (error, count) => (error ? reject(error) : resolve(count)));
    });
  }

  readSync(fd: number, into: Buffer, offset: number): number {
    return fs.readSync(fd, into, 0, into.length, offset);
  }

  write(fd: number, data: Buffer, from: number, offset: number): Promise<number> {
    return new Promise((resolve, reject) => {
      fs.write(fd, data, from, data.length - from, offset, (error, count) => (error ? reject(error) : resolve(count)));
    });
  }

  writeSync(fd: number, data: Buffer, offset: number): number {
    return fs.writeSync(fd, data, 0, data.length, offset);
  }

  truncate(fd: number, size: number): Promise<void> {
    return truncateAsync(fd, size);
  }

  truncateSync(fd: number, size: number): void {
    fs.ftruncateSync(fd, size);
  }

  fdatasync(fd: number): Promise<void> {
    return fdatasyncAsync(fd);
  }

  fsync(fd: number): Promise<void> {
    return fsyncAsync(fd);
  }

  fsyncSync(fd: number): void {
    fs.fsyncSync(fd);
  }

  unlink(path: string): Promise<void> {
    return unlinkAsync(path);
  }

  unlinkSync(path: string): void {
    fs.unlinkSync(path);
  }

  rename(from: string, to: string): Promise<void> {
    return renameAsync(from, to);
  }

  renameSync(from: string, to: string): void {
    fs.renameSync(from, to);
  }

  mkdirSync(path: string, mode?: number): void {
    fs.mkdirSync(path, { mode });
  }

  mkdtempSync(prefix: string): string {
    return fs.mkdtempSync(prefix);
  }

  rmdirSync(path: string): void {
    fs.rmdirSync(path);
  }

  symlinkSync(target: string, path: string): void {
    fs.symlinkSync(target, path);
  }

  fstatSync(fd: number): FileStatus {
    return fs.fstatSync(fd);
  }

  statSync(path: string): FileStatus | undefined {
    return fs.statSync(path, { throwIfNoEntry: false });
  }

  lstatSync(path: string): FileStatus | undefined {
    return fs.lstatSync(path, { throwIfNoEntry: false });
  }

  lstat(path: string): Promise<FileStatus> {
    return lstatAsync(path);
  }

  existsSync(path: string): boolean {
    return fs.existsSync(path);
  }

  readdir(path: string): Promise<string[]> {
    return readdirAsync(path);
  }

  readdirSync(path: string): string[] {
    return fs.readdirSync(path);
  }

  realpathSync(path: string): string {
    return fs.realpathSync(path);
  }

  filesystemTypeSync(path: string): number {
    return fs.statfsSync(path).type;
  }
}

export const nodeFiles: FileCalls = new NodeFiles();
