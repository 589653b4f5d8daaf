/** The store suite on the store in memory. */
import { memoryStore } from './memory.js';
import { storeSuite } from './suite.js';

storeSuite(memoryStore);
