// tsc checks types. This checks the rest: promises that nobody awaits, and the layers of src/ (docs/ARCHITECTURE.md). A layer imports
// its neighbours below and the ground floors, and nothing else. nbd/ knows nothing of Sheepdog.
import fs from 'node:fs';
import js from '@eslint/js';
import markdown from '@eslint/markdown';
import globals from 'globals';
import { defineConfig } from 'eslint/config';
import tseslint from 'typescript-eslint';

/** From the top down. */
const LAYERS = ['cli', 'jobs', 'daemon', 'operations', 'export', 'vdi', 'store', 'sheepdog', 'system', 'text'];

/** The layers below that a layer builds on. */
const NEIGHBOURS = {
  cli: ['jobs', 'operations'],
  jobs: ['operations'],
  daemon: ['operations', 'export'],
  operations: ['export', 'vdi'],
  export: ['vdi'],
  vdi: ['store'],
  store: ['sheepdog'],
  sheepdog: [],
  system: [],
  text: [],
};

/** What every layer above may import: whole folders, and files with types, constants and words that all layers share. */
const GROUND_FLOORS = [
  'system/**',
  'text/**',
  'store/locations.js',
  'store/redundancy.js',
  'store/object-store.js',
  'store/open-vdi.js',
  'store/store-error.js',
  'store/vdi-record.js',
  'vdi/names.js',
  'vdi/new-vdi.js',
  'vdi/in-use-time.js',
  'vdi/unfinished.js',
  'vdi/catalog-error.js',
];

/** Files that are the door to a layer which the rest of their own layer must not import. */
const DOORS = [
  // `serve` starts the daemon. The end of every command has to know the journal.
  { files: ['serve', 'serve-options', 'reload', 'ending'].map((name) => `src/cli/${name}.ts`), to: ['daemon/**'] },
  // Only a cluster has nodes to look at.
  {
    files: ['src/operations/inspect-cluster.ts'],
    to: ['store/sheep', 'store/sheep/**', 'store/sheep/deep', 'store/sheep/deep/**'],
  },
  // A rescue is done on the files of a store that may not open.
  { files: ['src/operations/rescue-store.ts'], to: ['store/local', 'store/local/rescue.js'] },
  { files: ['src/operations/open-operations.ts'], to: ['store/local', 'store/local/store-lock.js'] },
];

/** Each folder of src/store is a store. Stores know nothing of each other, and src/vdi knows none of them. */
const STORES = fs
  .readdirSync(new URL('src/store', import.meta.url), { withFileTypes: true })
  .filter((entry) => entry.isDirectory())
  .map(({ name }) => name);
const NO_STORES = STORES.map((store) => `**/${store}/**`);
const USE_NBD = new Set(['cli', 'daemon', 'operations', 'export']);

function importRule(layer, doors = []) {
  const below = LAYERS.slice(LAYERS.indexOf(layer) + 1);
  const allowed = [...GROUND_FLOORS.filter((floor) => below.includes(floor.split('/')[0])), ...doors];
  const patterns = LAYERS.filter((other) => other !== layer && !NEIGHBOURS[layer].includes(other)).map((other) => ({
    group: [`**/${other}/**`, ...allowed.filter((path) => path.startsWith(`${other}/`)).map((path) => `!**/${path}`)],
    message: `src/${layer} must not import src/${other} (eslint.config.js)`,
  }));
  if (layer === 'vdi')
    patterns.push({ group: NO_STORES, message: 'src/vdi knows the contract of stores, and no store' });
  if (!USE_NBD.has(layer))
    patterns.push({
      group: ['nbd-server-ts', 'nbd-server-ts/*', '**/nbd/**'],
      message: `src/${layer} must not know NBD`,
    });
  return { 'no-restricted-imports': ['error', { patterns }] };
}

const layerRules = [
  ...LAYERS.map((layer) => ({ files: [`src/${layer}/**/*.ts`], rules: importRule(layer) })),
  ...DOORS.map(({ files, to }) => ({ files, rules: importRule(files[0].split('/')[1], to) })),
  ...STORES.map((store) => ({
    files: [`src/store/${store}/**/*.ts`],
    rules: {
      '@typescript-eslint/no-restricted-imports': [
        'error',
        {
          patterns: STORES.filter((other) => other !== store).map((other) => ({
            group: [`**/${other}/**`],
            message: 'stores know nothing of each other',
          })),
        },
      ],
    },
  })),
];

export default defineConfig(
  { ignores: ['**/dist/**', 'node_modules/**'] },
  {
    files: ['**/*.{js,mjs,cjs}'],
    extends: [js.configs.recommended],
    languageOptions: { globals: globals.nodeBuiltin },
  },
  { files: ['bin/*.cjs'], languageOptions: { sourceType: 'commonjs', globals: globals.node } },
  // Old versions of Node must be able to read it, to say that they are too old.
  { files: ['bin/sheepgate.cjs'], languageOptions: { ecmaVersion: 5 } },
  { files: ['**/*.md'], plugins: { markdown }, extends: ['markdown/recommended'], language: 'markdown/gfm' },
  // Made from docstrings, where NBD's names begin with underscores when they are shortened.
  { files: ['nbd/docs/api/*.md'], rules: { 'markdown/no-space-in-emphasis': 'off' } },
  {
    files: ['**/*.ts'],
    extends: [...tseslint.configs.strictTypeChecked],
    languageOptions: { parserOptions: { project: './tsconfig.lint.json', tsconfigRootDir: import.meta.dirname } },
    rules: {
      '@typescript-eslint/no-unused-vars': ['error', { argsIgnorePattern: '^_' }],
      // A number in a message is what it looks like.
      '@typescript-eslint/restrict-template-expressions': ['error', { allowNumber: true }],
      // `() => void f()` says that the value is dropped; `() => f()` of a callback that returns nothing says it as well.
      '@typescript-eslint/no-confusing-void-expression': [
        'error',
        { ignoreArrowShorthand: true, ignoreVoidReturningFunctions: true, ignoreVoidOperator: true },
      ],
      // Callbacks that are called for what they do: `void` says so, whatever they return.
      '@typescript-eslint/no-meaningless-void-operator': 'off',
      '@typescript-eslint/switch-exhaustiveness-check': ['error', { considerDefaultExhaustiveForUnions: true }],
    },
  },
  {
    // Tests put methods of their own in the place of real ones, and call the real ones from there.
    files: ['test/**/*.ts', 'nbd/test/**/*.ts'],
    rules: { '@typescript-eslint/unbound-method': 'off' },
  },
  {
    files: ['src/**/*.ts', 'nbd/src/**/*.ts'],
    rules: {
      'no-restricted-syntax': [
        'error',
        {
          selector: "BinaryExpression > CallExpression[callee.object.name='Date'][callee.property.name='now']",
          message: 'durations and deadlines go by performance.now(): the clock may be set meanwhile',
        },
      ],
    },
  },
  {
    files: ['nbd/**/*.ts'],
    rules: {
      // What comes from the wire is a number: a switch over it says what happens with those it does not know.
      '@typescript-eslint/switch-exhaustiveness-check': ['error', { requireDefaultForNonUnion: true }],
      'no-restricted-imports': [
        'error',
        {
          patterns: [
            { group: ['**/src/store/**', '**/src/vdi/**', 'sheepgate'], message: 'nbd/ knows nothing of Sheepdog' },
          ],
        },
      ],
    },
  },
  ...layerRules,
);
