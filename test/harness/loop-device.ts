/** Loop devices for tests, where this machine has them; unmounted and detached at the end. */
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { onTestFinished, type TestContext } from 'vitest';
import { skipBecause, temporaryDirectory } from './daemon.js';

export interface LoopDevice {
  readonly device: string;
  /** The file behind it. */
  readonly backing: string;
}

/** A device of so many bytes that reads as zeros; skips the test with the reason where there can be none. */
export function loopDevice(context: TestContext, size: number): LoopDevice {
  const backing = path.join(temporaryDirectory(), 'device');
  fs.closeSync(fs.openSync(backing, 'w'));
  fs.truncateSync(backing, size);
  let device: string;
  try {
    device = execFileSync('losetup', ['-f', '--show', backing], { encoding: 'utf8', stdio: 'pipe' }).trim();
  } catch (error) {
    return skipBecause(context, `no loop device can be had: ${(error as Error).message.split('\n')[0]}`);
  }
  onTestFinished(() => void execFileSync('losetup', ['-d', device]));
  return { device, backing };
}

/** Mount the filesystem on the device; skips the test where that is not possible. */
export function mounted(context: TestContext, device: string, ...options: string[]): string {
  const directory = path.join(temporaryDirectory(), 'mnt');
  fs.mkdirSync(directory);
  try {
    execFileSync('mount', [...options, device, directory], { stdio: 'pipe' });
  } catch (error) {
    return skipBecause(context, `nothing can be mounted: ${(error as Error).message.split('\n')[0]}`);
  }
  onTestFinished(() => void execFileSync('umount', [directory]));
  return directory;
}
