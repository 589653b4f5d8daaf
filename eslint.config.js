// Types are checked by tsc; this checks what tsc cannot: promises that nobody awaits, and the direction in which the
// layers may depend on each other (cli -> jobs, daemon -> operations -> export -> vdi -> store -> sheepdog, system, text; nbd/
// knows nothing of Sheepdog).
import js from '@eslint/js';
import markdown from '@eslint/markdown';
import globals from 'globals';
import { defineConfig } from 'eslint/config';
import tseslint from 'typescript-eslint';

const LAYERS = ['cli', 'jobs', 'daemon', 'operations', 'export', 'vdi', 'store', 'sheepdog', 'system', 'text'];

/**
 * Files of lower layers that the command line and jobs may import beside their neighbours: types, constants and words that
 * all layers share.
 */
const GROUND_FLOORS = [
  'store/locations.js',
  'store/redundancy.js',
  'store/object-store.js',
  'vdi/names.js',
  'vdi/unfinished.js',
  'vdi/catalog-error.js',
];

/** Layers that import their neighbours below and GROUND_FLOORS only. */
const STRICT = new Set(['cli', 'jobs']);

/** `serve` starts the daemon; `reload` knows what it answers; the end of every command knows the journal. */
const DAEMON_STARTERS = ['serve', 'serve-options', 'reload', 'ending'].map((name) => `src/cli/${name}.ts`);

/** Folders of src/ that a file in `layer` may import from, beside its own. */
const MAY_IMPORT = {
  cli: ['jobs', 'operations', 'system', 'text'],
  jobs: ['operations', 'system', 'text'],
  daemon: ['operations', 'export', 'vdi', 'store', 'system', 'text'],
  operations: ['export', 'vdi', 'store', 'system', 'text'],
  export: ['vdi', 'system'],
  vdi: ['store', 'system', 'text'],
  store: ['sheepdog', 'system', 'text'],
  sheepdog: ['text'],
  system: [],
  text: [],
};

/** What a file in `layer` may not import; `besides`: folders that it may import from, in addition to MAY_IMPORT. */
function importRule(layer, besides = []) {
  const allowed = [...MAY_IMPORT[layer], ...besides];
  const forbidden = LAYERS.filter((other) => other !== layer && !allowed.includes(other));
  const floors = STRICT.has(layer) ? GROUND_FLOORS : [];
  const patterns = forbidden.map((other) => ({
    group: [
      `**/${other}/**`,
      ...floors.filter((floor) => floor.startsWith(`${other}/`)).map((floor) => `!**/${floor}`),
    ],
    message: `src/${layer} must not depend on src/${other}`,
  }));
  if (layer === 'vdi' || layer === 'store') {
    patterns.push({
      group: ['nbd-server-ts', 'nbd-server-ts/*', '**/nbd/**'],
      message: `src/${layer} must not know NBD`,
    });
  }
  return { 'no-restricted-imports': ['error', { patterns }] };
}

const layerRules = [
  ...LAYERS.map((layer) => ({ files: [`src/${layer}/**/*.ts`], rules: importRule(layer) })),
  { files: DAEMON_STARTERS, rules: importRule('cli', ['daemon']) },
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
