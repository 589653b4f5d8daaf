/**
 * The files of a store's objects of both kinds, ready for use. Owns how the descriptors are shared between them, and when the
 * store gets the format with overlays: before its first one.
 */
import path from 'node:path';
import { KeyTurns } from './key-turns.js';
import { OBJECTS } from './data-objects.js';
import type { Layers } from './layers.js';
import type { Metadata } from './metadata.js';
import { ObjectFiles, usualDescriptors, type SharedByFiles } from './object-files.js';
import { Overlays } from './overlays.js';
import { ReferenceCounts } from './reference-counts.js';
import { asStoreError } from './store-errors.js';

/** The folder of segment files in a store. */
export const OVERLAYS = 'overlays';
/** One of so many descriptors is for segment files. */
const SEGMENT_DIVISOR = 4;
/** A copy needs two. */
const LEAST_DESCRIPTORS = 2;

/** `metadata` is asked when it is needed: it is opened later. */
export function openLayers(
  shared: SharedByFiles,
  location: string,
  options: { readonly maxDescriptors?: number | undefined; readonly isReadOnly: boolean },
  metadata: () => Metadata | undefined,
): Layers {
  const { isReadOnly } = options;
  const limit = options.maxDescriptors ?? usualDescriptors();
  const forSegments = Math.max(LEAST_DESCRIPTORS, Math.floor(limit / SEGMENT_DIVISOR));
  const maxDescriptors = Math.max(LEAST_DESCRIPTORS, limit - forSegments);
  const whole = ObjectFiles.open(shared, path.join(location, OBJECTS), { maxDescriptors, isReadOnly });
  const segments = whole.beside(shared, path.join(location, OVERLAYS), { maxDescriptors: forSegments, isReadOnly });
  const meta = (): Metadata => {
    const opened = metadata();
    if (opened === undefined) throw new Error('invariant: overlays are used before the metadata is open');
    return opened;
  };
  let preparing: Promise<void> | undefined;
  return {
    whole,
    segments,
    overlays: new Overlays((vid, group) => meta().overlayGroup(vid, group)),
    references: new ReferenceCounts(),
    turns: new KeyTurns(),
    get isReady() {
      return metadata()?.hasOverlayFormat === true;
    },
    prepare: async () => {
      await meta().settled();
      if (meta().hasOverlayFormat) return;
      preparing ??= Promise.resolve()
        .then(() => {
          try {
            segments.makeFolder();
          } catch (error) {
            throw asStoreError(error, `making ${path.join(location, OVERLAYS)}`);
          }
        })
        .then(() => meta().beginOverlays())
        .finally(() => (preparing = undefined));
      await preparing;
    },
  };
}
