/** The store suite on a local store in which every object is an overlay. */
import { localStoreOfOverlays } from './local.js';
import { storeSuite } from './suite.js';

storeSuite(localStoreOfOverlays);
