/** The store suite on the stand-in for a Sheepdog cluster. */
import { standIns } from './clusters.js';
import { storeSuite } from './suite.js';

for (const kind of standIns) storeSuite(kind);
