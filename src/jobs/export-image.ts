/** A VDI or snapshot becomes a raw image. Guarantees that an interruption leaves no partial image under its name. */
import type { Operations } from '../operations/operations.js';
import type { Copied } from './disk-copy.js';
import { openTarget, type ImageTarget, type TargetContext } from './image-target.js';
import type { JobContext } from './reporting.js';
import type { WithStore } from './with-store.js';

export interface ExportOptions extends JobContext, TargetContext {
  /** Replace a file that exists, overwrite a device that holds something. */
  readonly mayReplace: boolean;
}

export interface Exported {
  /** Of the image, in bytes. */
  readonly size: number;
  readonly copied: Copied;
}

/**
 * Copy the export `spec` into `file`, or to stdout for "-". Errors: those of openTarget, NO_SPACE, BAD_SIZE, INCOMPLETE, and
 * those of the store.
 */
export async function exportImage(
  withStore: WithStore,
  spec: string,
  file: string,
  options: ExportOptions,
): Promise<Exported> {
  const target = await openTarget(file, options.mayReplace, options);
  try {
    const done = await withStore((operations) => copyOut(operations, spec, target, options));
    await target.finish();
    return done;
  } catch (error) {
    await target.abandon();
    throw error;
  }
}

async function copyOut(
  operations: Operations,
  spec: string,
  target: ImageTarget,
  context: JobContext,
): Promise<Exported> {
  context.signal.throwIfAborted();
  const disk = await operations.openDisk(spec);
  const progress = context.progress(`exporting ${spec}`, disk.size);
  try {
    return { size: disk.size, copied: await target.copy(disk, progress, context.signal) };
  } finally {
    progress.end();
    await disk.close();
  }
}
