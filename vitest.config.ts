import fs from 'node:fs';
import { fileURLToPath } from 'node:url';
import { configDefaults, defineConfig, type TestProjectConfiguration } from 'vitest/config';
import { clientSetProblem, SUITES } from './test/harness/client-set.js';
import { testLength } from './test/harness/length.js';
import { LongestFirst } from './test/harness/longest-first.js';
import { ONE_SET_IS_ENOUGH, QUICK, WITH_CLIENTS } from './test/harness/selection.js';

const ALL = ['nbd/test/**/*.test.ts', 'test/**/*.test.ts'];

/** As the library's `exports`, with the sources in the place of what is built. */
function nbdSources(): { find: RegExp; replacement: string }[] {
  const { name, exports } = JSON.parse(fs.readFileSync(new URL('nbd/package.json', import.meta.url), 'utf8')) as {
    name: string;
    exports: Record<string, { default: string }>;
  };
  return Object.entries(exports).map(([subpath, { default: built }]) => ({
    find: new RegExp(`^${name}${subpath.slice(1)}$`),
    replacement: fileURLToPath(
      new URL(`nbd/${built.replace('/dist/', '/src/').replace(/\.js$/, '.ts')}`, import.meta.url),
    ),
  }));
}

function project(name: string, include: string[], exclude: string[] = []): TestProjectConfiguration {
  return {
    extends: true,
    test: {
      name,
      include,
      exclude: [...configDefaults.exclude, ...exclude],
      env: { SHEEPGATE_TEST_CLIENTS: name },
      globalSetup: ['test/clients/set-up.ts'],
    },
  };
}

const problem = clientSetProblem();
if (problem !== undefined && testLength !== 'quick')
  console.log(`skipped: the tests with other releases' clients: ${problem}`);

export default defineConfig({
  resolve: {
    alias: nbdSources(),
  },
  test: {
    reporters: ['default', fileURLToPath(new URL('test/clients/table.ts', import.meta.url))],
    pool: 'forks',
    // One more than the cores that this must do with: tests also wait, for time-outs and for clients that are slow on purpose.
    maxWorkers: 3,
    // Tests use many large buffers and little heap. V8 counts both, and would mark its small heap again for every few buffers:
    // a quarter of the CPU time of such files.
    execArgv: ['--initial-old-space-size=128'],
    sequence: { sequencer: LongestFirst },
    testTimeout: 120_000,
    hookTimeout: 60_000,
    projects: [
      project('own', testLength === 'quick' ? QUICK : ALL),
      ...(problem === undefined
        ? Object.keys(SUITES).map((name) => project(name, WITH_CLIENTS, ONE_SET_IS_ENOUGH))
        : []),
    ],
  },
});
