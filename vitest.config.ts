import { fileURLToPath } from 'node:url';
import { defineConfig, type TestProjectConfiguration } from 'vitest/config';
import { clientSetProblem, SUITES } from './test/harness/client-set.js';
import { LongestFirst } from './test/harness/longest-first.js';

/** What real clients do with us: these run once for each set of clients. */
const WITH_CLIENTS = ['test/e2e/**/*.test.ts', 'test/vm/**/*.test.ts'];

/** As the package's `exports`, with the sources in the place of what is built. */
function nbdSource(file: string): string {
  return fileURLToPath(new URL(`nbd/src/${file}.ts`, import.meta.url));
}

function project(name: string, include: string[]): TestProjectConfiguration {
  return {
    extends: true,
    test: { name, include, env: { SHEEPGATE_TEST_CLIENTS: name }, globalSetup: ['test/clients/set-up.ts'] },
  };
}

const problem = clientSetProblem();
if (problem !== undefined) console.log(`skipped: the tests with other releases' clients: ${problem}`);

export default defineConfig({
  resolve: {
    alias: [
      { find: /^nbd-server-ts$/, replacement: nbdSource('index') },
      { find: /^nbd-server-ts\/block-device$/, replacement: nbdSource('block-device') },
      { find: /^nbd-server-ts\/client$/, replacement: nbdSource('client/client') },
      { find: /^nbd-server-ts\/limits$/, replacement: nbdSource('server/limits') },
    ],
  },
  test: {
    reporters: ['default', fileURLToPath(new URL('test/clients/table.ts', import.meta.url))],
    pool: 'forks',
    // One more than the cores that this must do with: tests also wait, for time-outs and for clients that are slow on purpose.
    maxWorkers: 3,
    sequence: { sequencer: LongestFirst },
    testTimeout: 120_000,
    hookTimeout: 60_000,
    projects: [
      project('own', ['nbd/test/**/*.test.ts', 'test/**/*.test.ts']),
      ...(problem === undefined ? Object.keys(SUITES).map((name) => project(name, WITH_CLIENTS)) : []),
    ],
  },
});
