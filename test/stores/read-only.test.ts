/** The store suite on stores that can only be read. */
import { readOnlyStandIn } from './clusters.js';
import { readOnlyLocalStore } from './local.js';
import { storeSuite } from './suite.js';

for (const kind of [readOnlyLocalStore, readOnlyStandIn]) storeSuite(kind);
