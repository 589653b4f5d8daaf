/** The store suite on real Sheepdog nodes, where there are any. */
import { realNodes } from './clusters.js';
import { storeSuite } from './suite.js';

for (const kind of realNodes) storeSuite(kind);
