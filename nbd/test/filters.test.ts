/** The filters, and some of them over each other, against the conformance suite of devices. */

import type { AnyDevice } from '../src/index.js';
import { cache } from '../src/filters/cache.js';
import { delay } from '../src/filters/delay.js';
import { errors } from '../src/filters/error.js';
import { overlay } from '../src/filters/overlay.js';
import { partition } from '../src/filters/partition.js';
import { readOnly } from '../src/filters/read-only.js';
import { stats } from '../src/filters/stats.js';
import { filterSuite } from './device-suite.js';

const PART = { offset: 1000, length: 100_001 };
const smallCache = (device: AnyDevice): AnyDevice => cache(device, { blockSize: 4096, maxBytes: 40_000 });

filterSuite('readOnly', { wrap: readOnly, isWritten: false });
filterSuite('partition', { wrap: (device) => partition(device, PART), view: PART });
filterSuite('overlay', { wrap: (device) => overlay(device), isWritten: false, passesSignal: false });
filterSuite('overlay with small blocks', {
  wrap: (device) => overlay(device, { blockSize: 512 }),
  ...{ isWritten: false, passesSignal: false },
});
filterSuite('cache', { wrap: smallCache, passesSignal: false });
filterSuite('cache with large blocks', { wrap: (device) => cache(device), passesSignal: false });
filterSuite('delay', { wrap: (device) => delay(device, { readMs: 1, writeMs: 1, extentsMs: 1 }) }, { runs: 5 });
filterSuite('errors, of which none happens', { wrap: (device) => errors(device, { rate: 0 }) });
filterSuite('stats', { wrap: stats });

filterSuite('overlay of a partition', {
  wrap: (device) => overlay(partition(device, PART)),
  ...{ view: PART, isWritten: false, passesSignal: false },
});
filterSuite('partition of an overlay', {
  wrap: (device) => partition(overlay(device), PART),
  ...{ view: PART, isWritten: false, passesSignal: false },
});
filterSuite('cache of stats of a partition', {
  wrap: (device) => smallCache(stats(partition(device, PART))),
  ...{ view: PART, passesSignal: false },
});
filterSuite('overlay of a cache of a read-only device', {
  wrap: (device) => overlay(smallCache(readOnly(device))),
  ...{ isWritten: false, passesSignal: false },
});
filterSuite('partition of a partition', {
  wrap: (device) => partition(partition(device, { offset: 500 }), { offset: 500, length: PART.length }),
  view: PART,
});
