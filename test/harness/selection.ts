/**
 * Which test files belong to which run: the quick one, and the one with the clients of other releases. All others are in the full
 * run only. Owns these lists; vitest.config.ts reads them.
 */

/** What real clients do with us: these run once for each set of clients. */
export const WITH_CLIENTS = ['test/e2e/**/*.test.ts', 'test/vm/**/*.test.ts'];

/** ... except these, which test the daemon or our scripts: their results do not depend on the client's version. */
export const ONE_SET_IS_ENOUGH = [
  'test/e2e/examples.test.ts',
  'test/e2e/full-disk.test.ts',
  'test/e2e/many-disks.test.ts',
  'test/e2e/network-drop.test.ts',
  'test/e2e/trim.test.ts',
];

/** Under a minute on two cores: no daemon, no cluster nodes, no commands as processes, nothing to install. */
export const QUICK = [
  'nbd/test/*.test.ts',
  'test/cli/documents.test.ts',
  'test/cli/formatting.test.ts',
  'test/daemon/{dead-peer-timeouts,emitters,lock-wait,repeated-lines}.test.ts',
  'test/export/*.test.ts',
  'test/sheep/{bad-nodes,deadlines,epochs,hash-ring,layouts,read-ahead,vids-in-use}.test.ts',
  'test/store/{local-store,locations,record-index}.test.ts',
  'test/stores/{local,memory,read-only}.test.ts',
  'test/vdi/{catalog-concurrency,direct-vdi,long-requests,timestamp,store-calls,trim-shared}.test.ts',
];
