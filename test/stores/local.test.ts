/** The store suite on the local store. */
import { localStore } from './local.js';
import { storeSuite } from './suite.js';

storeSuite(localStore);
