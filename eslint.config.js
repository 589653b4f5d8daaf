// Types are checked by tsc; this holds what it cannot: promises that nobody awaits, and the direction in which the
// layers may depend on each other (cli -> jobs, daemon -> operations -> export -> vdi -> store -> sheepdog, system, text; nbd/
// knows nothing of Sheepdog).
import tseslint from 'typescript-eslint';

const LAYERS = ['cli', 'jobs', 'daemon', 'operations', 'export', 'vdi', 'store', 'sheepdog', 'system', 'text'];

/** Folders of src/ that a file in `layer` may import from, beside its own. */
const MAY_IMPORT = {
  cli: ['jobs', 'daemon', 'operations', 'export', 'vdi', 'store', 'system', 'text'],
  jobs: ['cli', 'operations', 'vdi', 'store', 'system', 'text'],
  daemon: ['operations', 'export', 'vdi', 'store', 'system', 'text'],
  operations: ['export', 'vdi', 'store', 'system', 'text'],
  export: ['vdi', 'system'],
  vdi: ['store', 'system', 'text'],
  store: ['sheepdog', 'system', 'text'],
  sheepdog: ['store', 'text'],
  system: [],
  text: [],
};

const layerRules = LAYERS.map((layer) => {
  const forbidden = LAYERS.filter((other) => other !== layer && !MAY_IMPORT[layer].includes(other));
  const patterns = forbidden.map((other) => ({
    group: [`**/${other}/**`],
    message: `src/${layer} must not depend on src/${other}`,
  }));
  if (layer === 'vdi' || layer === 'store') {
    patterns.push({
      group: ['nbd-server-ts', 'nbd-server-ts/*', '**/nbd/**'],
      message: `src/${layer} must not know NBD`,
    });
  }
  return { files: [`src/${layer}/**/*.ts`], rules: { 'no-restricted-imports': ['error', { patterns }] } };
});

export default tseslint.config(
  { ignores: ['**/dist/**', 'node_modules/**', 'bin/**', 'bench/**', 'eslint.config.js'] },
  {
    files: ['**/*.ts'],
    extends: [...tseslint.configs.recommended],
    languageOptions: { parserOptions: { project: './tsconfig.lint.json', tsconfigRootDir: import.meta.dirname } },
    rules: {
      '@typescript-eslint/no-floating-promises': 'error',
      '@typescript-eslint/no-misused-promises': 'error',
      '@typescript-eslint/await-thenable': 'error',
      '@typescript-eslint/no-explicit-any': 'error',
      '@typescript-eslint/no-unused-vars': ['error', { argsIgnorePattern: '^_' }],
      '@typescript-eslint/switch-exhaustiveness-check': 'off',
    },
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
